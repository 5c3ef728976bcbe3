// Choosing tokens natively: processors, then what a drawn row keeps, then the race; one row at a
// time, read from the first levels of the cache. workers/model/sampler.py says what and why.
//
// Numbers are those of the torch path: heated scores and noise to the bit, sums to the last one. No
// static has a constructor: this is loaded on processors that cannot run it.

#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

namespace headrace {
namespace {

constexpr int kBlock = 128;  // tokens that race as one; what is running relies on it
constexpr int kSlack = 16;   // floats behind an array that a whole store may overwrite
constexpr float kFaintest = -80.0f;  // scores below weigh as much as this: nothing
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- noise: workers/model/noise.py -------------------------------------------------------------

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15, kFirstFactor = 0xBF58476D1CE4E5B9,
                   kSecondFactor = 0x94D049BB133111EB;

constexpr uint64_t mix(uint64_t word) {
  word += kGamma;
  word = (word ^ (word >> 30)) * kFirstFactor;
  word = (word ^ (word >> 27)) * kSecondFactor;
  return word ^ (word >> 31);
}

constexpr uint64_t noise_key(uint64_t first, uint64_t second) { return mix(mix(first) ^ second); }

constexpr uint64_t random_bits(uint64_t key, uint64_t index) { return mix(key + index * kGamma); }

inline __m512i random_bits(uint64_t key, __m512i indices) {
  const auto times = [](__m512i x, uint64_t factor) {
    return _mm512_mullo_epi64(x, _mm512_set1_epi64(static_cast<int64_t>(factor)));
  };
  const __m512i one = _mm512_set1_epi64(1);
  __m512i bits = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(key)),
                                  times(_mm512_add_epi64(indices, one), kGamma));
  bits = times(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 30)), kFirstFactor);
  bits = times(_mm512_xor_si512(bits, _mm512_srli_epi64(bits, 27)), kSecondFactor);
  return _mm512_xor_si512(bits, _mm512_srli_epi64(bits, 31));
}

double exponential_noise(uint64_t key, uint64_t index) {
  const auto whole = static_cast<double>(random_bits(key, index) >> 11);
  return -std::log((whole + 0.5) * 0x1p-53);
}

constexpr uint64_t kInsideBlocks = uint64_t{1} << 32;  // noise of tokens lies behind that of blocks

// ---- vectors -----------------------------------------------------------------------------------

inline __m512 all(float x) { return _mm512_set1_ps(x); }

inline __m512 weigh(__m512 heated) { return exp(_mm512_max_ps(heated, all(kFaintest))); }

// Which of 16 heated scores a band holds.
inline __mmask16 holds(const Band& band, __m512 heated) {
  const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(heated, all(band.center)));
  const __mmask16 is_high = _mm512_cmp_ps_mask(heated, all(band.floor), _CMP_GE_OQ);
  return _mm512_mask_cmp_ps_mask(is_high, distance, all(band.radius), _CMP_LE_OQ);
}

// Sums of 16 floats at a time, in doubles.
struct Sum {
  __m512d lanes = _mm512_setzero_pd();
  void add(__m512 x) {
    const __m256 high = _mm512_extractf32x8_ps(x, 1);
    lanes = _mm512_add_pd(lanes, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    lanes = _mm512_add_pd(lanes, _mm512_cvtps_pd(high));
  }
  double total() const { return _mm512_reduce_add_pd(lanes); }
};

// Writes the chosen lanes side by side; up to 16 floats behind them are overwritten.
inline void store_chosen(float* to, __mmask16 chosen, __m512 x) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(chosen, x));
}

// Of nine keys spread over all of them.
float median(const float* keys, int count) {
  float sample[9];
  for (int i = 0; i < 9; i++) sample[i] = keys[int64_t{count - 1} * i / 8];
  std::nth_element(sample, sample + 4, sample + 9);
  return sample[4];
}

}  // namespace

// A little low, since sums of floats are rounded.
float Band::lowest() const {
  const float slack = (radius + std::abs(center)) * 1e-5f;
  return std::max(floor, center - radius - slack);
}

void Sampler::reserve(int vocab_size) {
  if (vocab_size == vocab_size_) return;
  vocab_size_ = 0;  // until all is there
  num_blocks_ = (vocab_size + kBlock - 1) / kBlock;
  width_ = num_blocks_ * kBlock;
  own_.assign(width_, -kInfinity);
  block_max_.resize(num_blocks_);
  candidates_.reserve(width_);
  for (Weighted* pairs : {&some_, &others_}) {
    pairs->keys.resize(width_ + kSlack);
    pairs->weights.resize(width_ + kSlack);
  }
  vocab_size_ = vocab_size;
}

void Sampler::choose(const float* logits, HeadraceSamplingRow& row) {
  const bool is_changed = row.num_seen > 0 || row.num_biases > 0 || row.num_banned > 0 ||
                          row.mask != nullptr || row.watermark_delta != 0.0f;
  if (!is_changed && width_ == vocab_size_) {
    scores_ = logits;
  } else {
    std::memcpy(own_.data(), logits, vocab_size_ * sizeof(float));
    scores_ = own_.data();
    process(row);
  }
  choose(row);
}

void Sampler::choose(const bf16* logits, HeadraceSamplingRow& row) {
  for (int i = 0; i < vocab_size_; i += 16) {
    const __mmask16 lanes = first_lanes(vocab_size_ - i);
    _mm512_mask_storeu_ps(&own_[i], lanes, load_bf16(logits + i, lanes));
  }
  scores_ = own_.data();
  process(row);
  choose(row);
}

void Sampler::choose(HeadraceSamplingRow& row) {
  row.num_tops_found = 0;
  find_best();
  if (!is_finite_) {
    const bool is_restricted = row.mask != nullptr || row.num_banned > 0;
    row.outcome = is_restricted && best_ == -kInfinity ? kExhausted : kNotFinite;
    return;
  }
  row.outcome = kChosen;
  if (row.is_drawn)
    draw(row);
  else
    take_best(row);
}

// ---- processors: workers/model/processors.py ---------------------------------------------------

void Sampler::process(const HeadraceSamplingRow& row) {
  if (row.watermark_delta != 0.0f) watermark(row);
  penalize(row);
  for (int i = 0; i < row.num_biases; i++)
    if (row.bias_ids[i] >= 0 && row.bias_ids[i] < vocab_size_)
      own_[row.bias_ids[i]] += row.biases[i];
  for (int i = 0; i < row.num_banned; i++)
    if (row.banned[i] >= 0 && row.banned[i] < vocab_size_) own_[row.banned[i]] += -kInfinity;
  if (row.mask != nullptr) mask(row);
}

// See workers/model/watermark.py: 64 bits are four tokens, and two of our vectors are 32.
void Sampler::watermark(const HeadraceSamplingRow& row) {
  const __m512i bound = _mm512_set1_epi16(static_cast<int16_t>(row.watermark_bound));
  const bool are_all_green = row.watermark_bound > std::numeric_limits<int16_t>::max();
  const __m512 delta = all(row.watermark_delta);
  __m512i words = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int i = 0; i < width_; i += 32) {
    const __m512i numbers = random_bits(row.watermark_key, words);
    const __mmask32 green =
        are_all_green ? 0xffffffffu : _mm512_cmplt_epi16_mask(numbers, bound);
    for (int half = 0; half < 2; half++) {
      float* at = &own_[i + 16 * half];
      const __m512 x = _mm512_loadu_ps(at);
      _mm512_storeu_ps(at, _mm512_mask_add_ps(x, static_cast<__mmask16>(green >> 16 * half), x, delta));
    }
    words = _mm512_add_epi64(words, _mm512_set1_epi64(8));
  }
}

void Sampler::penalize(const HeadraceSamplingRow& row) {
  const auto factor = static_cast<float>(row.repetition);
  for (int i = 0; i < row.num_seen; i++) {
    const int64_t id = row.seen_ids[i];
    if (id < 0 || id >= vocab_size_) continue;
    const auto in_all = static_cast<double>(row.seen_in_all[i]);
    const auto in_answer = static_cast<double>(row.seen_in_answer[i]);
    const double less = in_answer * row.frequency + std::min(in_answer, 1.0) * row.presence +
                        in_all * row.relative;
    const float x = own_[id];
    // A product in double is rounded once, before and not within what is subtracted.
    const float scaled = x < 0.0f ? static_cast<float>(double{x} * factor) : x / factor;
    own_[id] = scaled - static_cast<float>(less);
  }
}

void Sampler::mask(const HeadraceSamplingRow& row) {
  const __m512 forbidden = all(-kInfinity);
  for (int i = 0; i < width_; i += 32) {
    const uint32_t allowed = i / 32 < row.num_mask_words ? row.mask[i / 32] : 0;
    for (int half = 0; half < 2; half++) {
      float* at = &own_[i + 16 * half];
      const __m512 x = _mm512_loadu_ps(at);
      // Added, not set: what is not a number stays so.
      const auto lanes = static_cast<__mmask16>(~allowed >> 16 * half);
      _mm512_storeu_ps(at, _mm512_mask_add_ps(x, lanes, x, forbidden));
    }
  }
}

// ---- choices: workers/model/sampler.py ---------------------------------------------------------

// The best score of each block and of all. Not finite if any is not a number or +inf, or all -inf.
void Sampler::find_best() {
  __mmask16 unordered = 0;
  best_ = -kInfinity;
  for (int block = 0; block < num_blocks_; block++) {
    const float* x = scores_ + block * kBlock;
    __m512 most = all(-kInfinity);
    for (int i = 0; i < kBlock; i += 32) {
      const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + 16);
      unordered |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_max_ps(a, b));
    }
    block_max_[block] = _mm512_reduce_max_ps(most);
    best_ = std::max(best_, block_max_[block]);
  }
  if (unordered != 0) best_ = std::numeric_limits<float>::quiet_NaN();
  is_finite_ = std::isfinite(best_);
}

void Sampler::take_best(HeadraceSamplingRow& row) {
  temperature_ = 1.0f;
  const auto block = std::find(block_max_.begin(), block_max_.end(), best_) - block_max_.begin();
  const float* first = scores_ + block * kBlock;
  row.token = std::find(first, first + kBlock, best_) - scores_;
  const auto log_total = static_cast<float>(std::log(mass(kLowest)));
  row.logprob = -log_total;
  if (row.num_tops > 0) list_tops(row, Band{}, log_total);
}

void Sampler::draw(HeadraceSamplingRow& row) {
  temperature_ = row.temperature;
  const Band band = find_band(row);
  const float lowest = band.lowest();
  const uint64_t key = noise_key(row.seed, row.position);
  double total = 0.0, best_time = -1.0;
  int winner = 0;
  for (int block = 0; block < num_blocks_; block++) {
    if (heat(block_max_[block]) < lowest) continue;
    const double mass = block_mass(block, band);
    total += mass;
    const double time = mass / exponential_noise(key, block);
    if (time > best_time) best_time = time, winner = block;
  }
  const auto log_total = static_cast<float>(std::log(total));
  row.token = draw_inside(winner, key, band);
  row.logprob = heat(scores_[row.token]) - log_total;
  if (row.num_tops > 0) list_tops(row, band, log_total);
}

// The winner among the tokens of a block that are kept.
int Sampler::draw_inside(int block, uint64_t key, const Band& band) const {
  alignas(64) float weights[kBlock];
  const int first = block * kBlock;
  for (int i = 0; i < kBlock; i += 16) {
    const __m512 heated = heat(_mm512_loadu_ps(scores_ + first + i));
    _mm512_store_ps(weights + i, _mm512_maskz_mov_ps(holds(band, heated), weigh(heated)));
  }
  double best_time = -1.0;
  int winner = first;
  for (int i = 0; i < kBlock; i++) {
    if (weights[i] == 0.0f) continue;
    const double time = weights[i] / exponential_noise(key, kInsideBlocks + first + i);
    if (time > best_time) best_time = time, winner = first + i;
  }
  return winner;
}

// The likeliest of what is kept, best first; of equals the lower ids come first.
void Sampler::list_tops(HeadraceSamplingRow& row, const Band& band, float log_total) {
  float cut = band.lowest();
  // Only typical-p takes away from above; for the others the best of a block are kept.
  if (band.radius == kInfinity && row.num_tops < num_blocks_)
    cut = std::max(cut, heat(best_of_blocks(row.num_tops)));
  candidates_.clear();
  for (int block = 0; block < num_blocks_; block++) {
    if (heat(block_max_[block]) < cut) continue;
    for (int i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
      const __m512 heated = heat(_mm512_loadu_ps(scores_ + i));
      uint32_t kept = holds(band, heated) & _mm512_cmp_ps_mask(heated, all(cut), _CMP_GE_OQ);
      for (; kept != 0; kept &= kept - 1) {
        const int id = i + std::countr_zero(kept);
        candidates_.push_back({heat(scores_[id]), id});
      }
    }
  }
  const int count = std::min(row.num_tops, static_cast<int32_t>(candidates_.size()));
  std::partial_sort(candidates_.begin(), candidates_.begin() + count, candidates_.end(),
                    [](const Candidate& a, const Candidate& b) {
                      return a.heated != b.heated ? a.heated > b.heated : a.id < b.id;
                    });
  for (int i = 0; i < count; i++) {
    row.top_ids[i] = candidates_[i].id;
    row.top_logprobs[i] = candidates_[i].heated - log_total;
  }
  row.num_tops_found = count;
}

// ---- what a drawn row keeps: workers/model/warpers.py ------------------------------------------

Band Sampler::find_band(const HeadraceSamplingRow& row) {
  const int top_k = row.top_k < width_ ? row.top_k : 0;
  Band band;
  if (top_k > 0 || row.top_p < 1.0f || row.log_min_p > -kInfinity)
    band.floor = find_floor(row, top_k);
  if (row.typical_p < 1.0f) narrow_to_typical(row.typical_p, band);
  return band;
}

// The lowest score that top-k, top-p and min-p keep.
float Sampler::find_floor(const HeadraceSamplingRow& row, int top_k) {
  float floor = kLowest;
  if (top_k > 0) {
    const float cut = top_k <= num_blocks_ ? heat(best_of_blocks(top_k)) : kLowest;
    gather(std::max(cut, kLowest), [](__m512) { return all(1.0f); });
    floor = select(top_k);
  }
  if (row.top_p < 1.0f) {
    // As in the torch path the goal is a float: equals that just reach it end there.
    const double total = mass(floor);
    const float goal = row.top_p * static_cast<float>(total);
    gather(top_k > 0 ? floor : std::max(negligible(total, row.top_p), kLowest), weigh);
    floor = select(goal);
  }
  return std::max(floor, row.log_min_p);
}

// Of what is kept so far, what typical-p keeps.
void Sampler::narrow_to_typical(float typical_p, Band& band) {
  Sum weights, weighted;
  for (int block = 0; block < num_blocks_; block++) {
    if (heat(block_max_[block]) < band.floor) continue;
    for (int i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
      const __m512 heated = heat(_mm512_loadu_ps(scores_ + i));
      const __m512 weight = _mm512_maskz_mov_ps(holds(band, heated), weigh(heated));
      weights.add(weight);
      weighted.add(_mm512_mul_ps(weight, _mm512_max_ps(heated, all(kFaintest))));
    }
  }
  const double total = weights.total();
  const auto mean = static_cast<float>(weighted.total() / total);
  const float goal = typical_p * static_cast<float>(total);
  gather_near(mean, std::max(mean - negligible(total, typical_p), -mean), band.floor);
  band.radius = -select(goal);
  band.center = mean;
}

// The `count`-th best of the blocks' best scores: `count` tokens are not below it.
float Sampler::best_of_blocks(int count) {
  std::copy(block_max_.begin(), block_max_.end(), some_.keys.begin());
  std::fill_n(some_.weights.begin(), num_blocks_, 1.0f);
  some_.count = num_blocks_;
  return select(count);
}

// A heated score: tokens below do not hold `1 - share` of the mass, all together.
float Sampler::negligible(double total, float share) const {
  return static_cast<float>(std::log(total * (1.0 - share) / width_)) - 1e-3f;
}

double Sampler::block_mass(int block, const Band& band) const {
  __m512 sum = _mm512_setzero_ps();
  for (int i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
    const __m512 heated = heat(_mm512_loadu_ps(scores_ + i));
    sum = _mm512_mask_add_ps(sum, holds(band, heated), sum, weigh(heated));
  }
  return _mm512_reduce_add_ps(sum);
}

// Of all scores from `floor` on.
double Sampler::mass(float floor) const {
  const Band band{.floor = floor};
  double total = 0.0;
  for (int block = 0; block < num_blocks_; block++)
    if (heat(block_max_[block]) >= floor) total += block_mass(block, band);
  return total;
}

// Into `some_`: heated scores from `cut` on, each with what `weigh` says.
template <class Weigh>
void Sampler::gather(float cut, Weigh weigh) {
  int count = 0;
  for (int block = 0; block < num_blocks_; block++) {
    if (heat(block_max_[block]) < cut) continue;
    for (int i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
      const __m512 heated = heat(_mm512_loadu_ps(scores_ + i));
      const __mmask16 is_wanted = _mm512_cmp_ps_mask(heated, all(cut), _CMP_GE_OQ);
      if (is_wanted == 0) continue;
      store_chosen(&some_.keys[count], is_wanted, heated);
      store_chosen(&some_.weights[count], is_wanted, weigh(heated));
      count += std::popcount(is_wanted);
    }
  }
  some_.count = count;
}

// Into `some_`: heated scores from `floor` on within `reach` of `center`, by how near they are.
void Sampler::gather_near(float center, float reach, float floor) {
  const Band band{floor, center, reach};
  const float lowest = band.lowest();
  int count = 0;
  for (int block = 0; block < num_blocks_; block++) {
    if (heat(block_max_[block]) < lowest) continue;
    for (int i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
      const __m512 heated = heat(_mm512_loadu_ps(scores_ + i));
      const __mmask16 is_near = holds(band, heated);
      if (is_near == 0) continue;
      const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(heated, all(center)));
      store_chosen(&some_.keys[count], is_near, _mm512_sub_ps(_mm512_setzero_ps(), distance));
      store_chosen(&some_.weights[count], is_near, weigh(heated));
      count += std::popcount(is_near);
    }
  }
  some_.count = count;
}

// The largest key of `some_` such that it and all above it weigh `goal`; the smallest if all weigh
// less. Uses `some_` up. Quickselect: only the part in which the end must lie is looked at again.
float Sampler::select(double goal) {
  double mass_above = 0.0;  // of keys that are larger than all that are left
  float pivot = kLowest;
  while (some_.count > 0) {
    pivot = median(some_.keys.data(), some_.count);
    Sum above, equal;
    int num_above = 0, num_below = 0;
    for (int i = 0; i < some_.count; i += 16) {
      const __mmask16 lanes = first_lanes(some_.count - i);
      const __m512 key = _mm512_loadu_ps(&some_.keys[i]);
      const __m512 weight = _mm512_loadu_ps(&some_.weights[i]);
      const __mmask16 is_above = _mm512_mask_cmp_ps_mask(lanes, key, all(pivot), _CMP_GT_OQ);
      const __mmask16 is_below = _mm512_mask_cmp_ps_mask(lanes, key, all(pivot), _CMP_LT_OQ);
      above.add(_mm512_maskz_mov_ps(is_above, weight));
      equal.add(_mm512_maskz_mov_ps(lanes & ~(is_above | is_below), weight));
      // In place: what is written has been read.
      store_chosen(&some_.keys[num_above], is_above, key);
      store_chosen(&some_.weights[num_above], is_above, weight);
      store_chosen(&others_.keys[num_below], is_below, key);
      store_chosen(&others_.weights[num_below], is_below, weight);
      num_above += std::popcount(is_above);
      num_below += std::popcount(is_below);
    }
    const double mass_from_pivot = mass_above + above.total() + equal.total();
    if (num_above > 0 && mass_above + above.total() >= goal) {
      some_.count = num_above;
    } else if (mass_from_pivot >= goal) {
      return pivot;
    } else {
      mass_above = mass_from_pivot;
      std::swap(some_, others_);
      some_.count = num_below;
    }
  }
  return pivot;
}

inline __m512 Sampler::heat(__m512 scores) const {
  const __m512 relative = _mm512_sub_ps(scores, all(best_));
  // A division takes as long as all else here.
  return temperature_ == 1.0f ? relative : _mm512_div_ps(relative, all(temperature_));
}

}  // namespace headrace
