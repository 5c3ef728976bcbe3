// Choosing a token by one row of logits and its parameters; the C ABI in kernels.cpp deals rows to
// threads. What is chosen, and why in this order: workers/model/sampler.py and its neighbours, which
// do the same in torch.

#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "vectors.h"

// One row: what is asked, then what came of it. Zero where nothing is asked, so that all zeros are a
// plain greedy row. Sizes count entries; sampler.py in this folder fills it in.
struct HeadraceSamplingRow {
  uint64_t seed, position;  // of a drawn row

  const int64_t *seen_ids, *seen_in_all, *seen_in_answer;  // see workers/engine/counts.py
  const int64_t* bias_ids;  // those beyond the vocabulary change nothing; so below
  const float* biases;
  const int64_t* banned;
  const uint32_t* mask;  // low bits first; tokens behind its end are forbidden
  int32_t num_seen, num_biases, num_banned, num_mask_words;
  double repetition, frequency, presence, relative;  // the last times the share of all tokens

  uint64_t watermark_key;
  int32_t watermark_bound;  // a token whose 16 bits are below is green
  float watermark_delta;

  int32_t is_drawn, top_k;
  float temperature, top_p, log_min_p, typical_p;  // log_min_p -inf is off

  int32_t num_tops;     // likeliest tokens that are asked for
  int32_t* top_ids;     // room for them
  float* top_logprobs;

  int64_t token;
  float logprob;
  int32_t outcome;         // an Outcome
  int32_t num_tops_found;  // best first
};

namespace headrace {

enum Outcome : int32_t {
  kChosen = 0,
  kNotFinite = 1,  // the logits are broken, or forbid everything by themselves
  kExhausted = 2,  // a mask or bans left nothing to choose
};

// Which tokens a row keeps: heated scores from `floor` on that lie within `radius` of `center`.
struct Band {
  float floor = std::numeric_limits<float>::lowest();  // nobody keeps -inf
  float center = 0.0f, radius = std::numeric_limits<float>::infinity();
  float lowest() const;
};

// The scratch memory of one thread, and the row it is at. A row's result is a function of the row:
// sums run in one order, whoever computes them.
class Sampler {
 public:
  // Room for rows of this size, and for no others; must come before the first choice.
  void reserve(int vocab_size);

  void choose(const float* logits, HeadraceSamplingRow& row);
  void choose(const bf16* logits, HeadraceSamplingRow& row);

 private:
  // Keys with weights, for select().
  struct Weighted {
    std::vector<float> keys, weights;
    int count = 0;
  };
  struct Candidate {
    float heated;
    int32_t id;
  };

  void choose(HeadraceSamplingRow& row);
  void process(const HeadraceSamplingRow& row);
  void watermark(const HeadraceSamplingRow& row);
  void penalize(const HeadraceSamplingRow& row);
  void mask(const HeadraceSamplingRow& row);
  void find_best();
  void take_best(HeadraceSamplingRow& row);
  void draw(HeadraceSamplingRow& row);
  int draw_inside(int block, uint64_t key, const Band& band) const;
  void list_tops(HeadraceSamplingRow& row, const Band& band, float log_total);

  Band find_band(const HeadraceSamplingRow& row);
  float find_floor(const HeadraceSamplingRow& row, int top_k);
  void narrow_to_typical(float typical_p, Band& band);
  float best_of_blocks(int count);
  float negligible(double total, float share) const;
  double block_mass(int block, const Band& band) const;
  double mass(float floor) const;
  template <class Weigh>
  void gather(float cut, Weigh weigh);
  void gather_near(float center, float reach, float floor);
  float select(double goal);

  __m512 heat(__m512 scores) const;
  float heat(float score) const { return (score - best_) / temperature_; }

  int vocab_size_ = 0, num_blocks_ = 0, width_ = 0;  // width: the vocabulary in whole blocks
  const float* scores_ = nullptr;  // of the row at hand: the logits, or `own_`
  std::vector<float> own_;
  float best_ = 0.0f, temperature_ = 1.0f;
  bool is_finite_ = false;
  std::vector<float> block_max_;
  Weighted some_, others_;
  std::vector<Candidate> candidates_;
};

}  // namespace headrace
