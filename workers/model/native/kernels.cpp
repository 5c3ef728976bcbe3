// The engine's arithmetic on processors with AVX512-bf16, or AMX beside it: matrix products over
// packed weights, in bf16 or quantized to 8 bits, norms, gated MLPs, attention over the slot cache, a
// whole step of a Llama-like model. sampler.cpp chooses tokens by what comes out.
//
// Plain C ABI at the end of the file; binding.py declares it for Python and checks the processor.
// Nothing here knows Python or torch. Tensors are bf16 (the upper half of a float32), sums float32.
//
// Contents: 1 memory, 2 vectors of 16 floats, 3 the team of threads, 4 packed weights and their
// product, 5 row operations, 6 attention, 7 single operations, 8 adapters, 9 the step, 10 the C ABI.

#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "sampler.h"
#include "vectors.h"

#ifdef HEADRACE_EMULATE_AMX
#include "amx_emulation.h"  // tests: the tile instructions in software, for machines without them
#endif

namespace {

using namespace headrace;

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- 1. memory ---------------------------------------------------------------------------------

constexpr size_t kHugePage = size_t{2} << 20;

// Zeros on pages of 2 MiB where the system has them: weights stream 5-15 % faster than from 4 KiB
// pages. Untouched pages take no memory.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t bytes) : size_((bytes + 2 * kHugePage - 1) / kHugePage * kHugePage) {
    mapping_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(mapping_);
    data_ = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    madvise(data_, size_ - kHugePage, MADV_HUGEPAGE);
  }
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Pages() {
    if (data_ != nullptr) munmap(mapping_, size_);
  }
  template <class T = char>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  // Takes the page faults now instead of in the first large step.
  void touch(size_t bytes) const {
    for (size_t i = 0; i < bytes; i += 4096) static_cast<volatile char*>(data_)[i] = 0;
  }

 private:
  void swap(Pages& other) {
    std::swap(mapping_, other.mapping_);
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
  }
  void* mapping_ = nullptr;
  size_t size_ = 0;
  char* data_ = nullptr;
};

// Hands out memory in one direction: what is asked for in order lies in order.
class Arena {
 public:
  char* take(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max(bytes, kChunk);
      chunks_.emplace_back(left_);
      next_ = chunks_.back().data();
    }
    left_ -= bytes;
    return std::exchange(next_, next_ + bytes);
  }

 private:
  static constexpr size_t kChunk = size_t{64} << 20;  // its unused end is never touched
  std::vector<Pages> chunks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

// ---- 2. vectors of 16 floats -------------------------------------------------------------------
//
// More of them than vectors.h has, which the sampler needs as well.

constexpr __mmask32 first_halves(int count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
}

inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline void store_bf16(bf16* to, __m512 x, __mmask16 lanes = 0xffff) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(x));
}

inline __m512bh load_pairs(const bf16* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

// The same two neighbouring bf16 in all 16 lanes.
inline __m512bh broadcast_pair(const bf16* from) {
  int pair;
  std::memcpy(&pair, from, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

inline __m512 negate(__m512 x) { return _mm512_sub_ps(_mm512_setzero_ps(), x); }

inline __m512 tanh(__m512 x) {  // 1 - 2 / (e^2x + 1)
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 grown = exp(_mm512_add_ps(x, x));
  return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(grown, one)));
}

// erf by Abramowitz and Stegun 7.1.26; absolute error below 1.5e-7.
inline __m512 erf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exp(negate(_mm512_mul_ps(x, x))));
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
  return _mm512_or_ps(_mm512_sub_ps(one, tail), sign);
}

enum Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

inline __m512 activate(Activation activation, __m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  switch (activation) {
    case kSilu:
      return _mm512_div_ps(x, _mm512_add_ps(one, exp(negate(x))));
    case kGeluTanh: {
      const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one);
      const __m512 inner = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(0.7978845608f));
      return _mm512_mul_ps(half, _mm512_add_ps(one, tanh(inner)));
    }
    case kGelu:
      break;
  }
  const __m512 inner = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678119f));
  return _mm512_mul_ps(half, _mm512_add_ps(one, erf(inner)));
}

// Order of a vector that takes turns between two others: a0 b0 a1 b1 …, from their halves.
// `halves` does so with the two halves of one vector.
struct Interleave {
  __m512i low, high, halves;
  Interleave() {
    alignas(64) uint16_t order[64], own[32];
    for (int i = 0; i < 64; i++) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    for (int i = 0; i < 32; i++) own[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    low = _mm512_load_si512(order);
    high = _mm512_load_si512(order + 32);
    halves = _mm512_load_si512(own);
  }
};

// Transposes 16 x 16 values of 32 bits: rows become columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {  // pairs of rows, then quads, inside each 128-bit lane
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    t[i + 2] = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
    t[i + 3] = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // then the lanes themselves
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Sums 16 vectors across their lanes: lane i of the answer is the sum of sums[i].
inline __m512 sum_each(const __m512 (&sums)[16]) {
  __m512 quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512 *s = sums + 4 * i;
    const __m512 low =
        _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    const __m512 high =
        _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
}

// ---- 3. the team of threads --------------------------------------------------------------------

// AMX state: eight tiles of 16 rows x 64 bytes, set up per thread before use and given back after,
// so that the kernel need not save 8 KiB at each switch of threads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 30-100 us, more than a fair barrier takes. Longer spins gain nothing on quiet cores and, beside a
// busy process, burn the time that a thread will want later; sleeping here instead is no better.
constexpr int kSpinsBeforeYield = 2000;
constexpr uint64_t kIdleCycles = 6'000'000;  // about 2 ms: longer than from one step to the next

template <class Condition>
inline void spin_until(Condition is_met) {
  for (int spins = 0; !is_met(); spins++) {
    if (spins < kSpinsBeforeYield) {
      _mm_pause();
    } else {
      sched_yield();  // the one we wait for may want this very core
    }
  }
}

// Parts of a job that nobody has taken yet: every thread has a run of its own, takes it from the
// front, and then helps the others from the back. So a thread that lost its core to another process
// for a while holds the others up by one part, not by all of its own.
class Claims {
 public:
  explicit Claims(int num_threads) : taken_(num_threads) {}
  // The number of a part of the owner's `count` parts, or -1 when all are taken.
  int take(int owner, int count, bool from_back) {
    auto& taken = taken_[owner].counts;
    uint64_t now = taken.load(std::memory_order_relaxed);
    for (;;) {
      const int front = static_cast<int>(now & 0xffffffff), back = static_cast<int>(now >> 32);
      if (front + back >= count) return -1;
      const uint64_t next = now + (from_back ? uint64_t{1} << 32 : 1);
      if (taken.compare_exchange_weak(now, next, std::memory_order_relaxed))
        return from_back ? count - 1 - back : front;
    }
  }
  void reset() {
    for (auto& taken : taken_) taken.counts.store(0, std::memory_order_relaxed);
  }

 private:
  struct alignas(128) Taken {
    std::atomic<uint64_t> counts{0};  // from the front, and from the back in the upper half
  };
  std::vector<Taken> taken_;
};

// Memory that a thread will read soon, asked for bit by bit while it computes something else: what
// is bound by reading then finds it in a cache. Each bit is small, for a processor waits for few
// lines at a time, and those of the computation itself are among them.
class alignas(128) Readahead {
 public:
  // Room for so many runs, so that nothing is allocated inside a job.
  void reserve(size_t num_runs) { runs_.reserve(num_runs); }
  void begin() {
    runs_.clear();
    num_bytes_ = 0;
    next_run_ = 0;
    at_ = end_ = nullptr;
  }
  void add(const void* from, size_t num_bytes) {
    if (num_bytes == 0) return;
    runs_.push_back({static_cast<const char*>(from), num_bytes});
    num_bytes_ += num_bytes;
  }
  // So much at a time that all has been asked for after `num_pulls`.
  void spread(size_t num_pulls) {
    const size_t lines = num_bytes_ / kLine / std::max(num_pulls, size_t{1}) + 1;
    bytes_per_pull_ = kLine * std::min(lines, kMostLines);
  }

  // Inlined always, as prefetch_step() is.
  [[gnu::always_inline]] void pull() {
    if (at_ >= end_) {
      if (next_run_ == runs_.size()) return;
      const Run& run = runs_[next_run_++];
      at_ = run.from;
      end_ = run.from + run.num_bytes;
    }
    const char* stop = std::min(at_ + bytes_per_pull_, end_);
    for (; at_ < stop; at_ += kLine) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  static constexpr size_t kLine = 64, kMostLines = 32;
  struct Run {
    const char* from;
    size_t num_bytes;
  };
  std::vector<Run> runs_;
  size_t num_bytes_ = 0, next_run_ = 0, bytes_per_pull_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// A pool of threads that run one job together: the caller is number 0. Between jobs the others
// sleep, after a while; inside a job they meet at barriers, which spin and then yield.
// One thread at a time may call run().
class Team {
 public:
  Team(int num_threads, bool use_amx)
      : num_threads_(num_threads),
        use_amx_(use_amx),
        claims_{Claims(num_threads), Claims(num_threads)},
        num_shared_(num_threads),
        readaheads_(num_threads),
        arenas_(num_threads) {
    try {
      for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { serve(i); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~Team() { stop(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return num_threads_; }
  bool uses_amx() const { return use_amx_; }
  Arena& arena(int thread) { return arenas_[thread]; }
  Readahead& readahead(int thread) { return readaheads_[thread]; }

  // Room of a thread for a quantized block that has been widened; for products in tiles only.
  bf16* widened(int thread) { return widened_.empty() ? nullptr : widened_[thread].data<bf16>(); }
  void reserve_widened(size_t bytes) {
    if (bytes <= widened_bytes_) return;
    std::vector<Pages> larger;
    for (int i = 0; i < num_threads_; i++) larger.emplace_back(bytes);
    widened_ = std::move(larger);
    widened_bytes_ = bytes;
  }

  void run(const std::function<void(int)>& job) {
    job_ = &job;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    work(0);
  }

  // Work that all threads share: work(owner, number) for the items of this thread, then for those
  // that others have not begun. A thread's items are `first[thread]` up to `first[thread + 1]`.
  // All threads of a job call it; between two such calls is a barrier.
  template <class Work>
  void share(int thread, const std::vector<int>& first, Work work) {
    Claims& claims = next_claims(thread);
    for (int i = 0; i < num_threads_; i++) {
      const int owner = (thread + i) % num_threads_;
      const int count = first[owner + 1] - first[owner];
      for (int taken; (taken = claims.take(owner, count, i > 0)) >= 0;)
        work(owner, first[owner] + taken);
    }
  }

  // All threads of a job wait here for one another.
  void barrier() {
    if (num_threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      spin_until([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
  }

 private:
  // While one set of claims is in use nobody looks at the other, and it can be made ready.
  Claims& next_claims(int thread) {
    const int number = num_shared_[thread].value++;
    if (thread == 0) claims_[(number + 1) % 2].reset();
    return claims_[number % 2];
  }

  void work(int thread) {
    if (use_amx_) {
      const TileConfig config;
      _tile_loadconfig(&config);
    }
    (*job_)(thread);
    if (use_amx_) _tile_release();
    barrier();
  }

  void serve(int thread) {
    for (int seen = 0;;) {
      const uint64_t deadline = __rdtsc() + kIdleCycles;
      spin_until([&] {
        return generation_.load(std::memory_order_acquire) != seen || __rdtsc() > deadline;
      });
      generation_.wait(seen, std::memory_order_acquire);
      seen++;
      if (is_stopping_) return;
      work(thread);
    }
  }

  void stop() {
    is_stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  const int num_threads_;
  const bool use_amx_;
  const std::function<void(int)>* job_ = nullptr;
  bool is_stopping_ = false;
  // Apart from one another: a waiting thread reads one line only.
  alignas(128) std::atomic<int> generation_{0};
  alignas(128) std::atomic<int> phase_{0};
  alignas(128) std::atomic<int> arrived_{0};
  struct alignas(128) Count {
    int value = 0;
  };
  Claims claims_[2];
  std::vector<Count> num_shared_;  // per thread
  std::vector<Readahead> readaheads_;  // per thread
  std::vector<Arena> arenas_;
  std::vector<Pages> widened_;  // per thread
  size_t widened_bytes_ = 0;
  std::vector<std::thread> threads_;
};

// The part [first, last) of `count` items that a thread takes.
struct Share {
  int first, last;
  Share(int count, int thread, int num_threads)
      : first(static_cast<int>(int64_t{count} * thread / num_threads)),
        last(static_cast<int>(int64_t{count} * (thread + 1) / num_threads)) {}
};

// ---- 4. packed weights and their product -------------------------------------------------------
//
// A weight [n outputs, k inputs] is cut into blocks of 32 outputs, a block into steps of 32 inputs,
// and a step is two tiles of 1 KiB, one for outputs 0-15 and one for 16-31:
//
//              output 0      output 1          output 15
//   line 0   in 0, in 1  |  in 0, in 1  | …  |  in 0, in 1        64 bytes = one register
//   line 1   in 2, in 3  |  in 2, in 3  | …  |  in 2, in 3
//     …
//   line 15  in 30, 31   |  in 30, 31   | …  |  in 30, 31
//
// Both instruction sets want pairs of inputs side by side: AVX512's vdpbf16ps multiplies the two of
// each lane by the same two of the other operand (one row's inputs, in all lanes) and adds both to
// the lane's sum; AMX's tdpbf16ps does so for 16 rows by 16 outputs by 32 inputs at once.
// Blocks are dealt to threads in runs, and each thread's run lies in its own arena; who is done
// first helps the others.
//
// A quantized weight has the same blocks of the same steps, in half of the bytes: a step is a
// QuantizedStep, and becomes bf16 just before it is used.

constexpr int kStep = 32;                         // inputs per step
constexpr int kBlock = 32;                        // outputs per block
constexpr int kTile = 16 * 32;                    // bf16 per tile
constexpr int kStepSize = 2 * kTile;              // bf16 per step of a block
constexpr int kMaxRowsAvx = 14;                   // 28 sums, 2 weights, 1 input: 31 of 32 registers
constexpr int kMaxRowsQuantized = 10;             // 20 sums, 4 tables, 4 weights, 1 input
constexpr int kMaxRowsAmx = 32;                   // 4 of 8 tiles hold sums
// A tile computes 16 rows, even where there are fewer, and reading weights into it takes longer
// than into registers (Sapphire Rapids: a step of one row 11.6 ms, on AVX512 9.7; of 8, 14 and 21).
constexpr int kFewestRowsAmx = 3;
constexpr int kSlackRows = 32;                    // rows behind a matrix that a tile load may read
constexpr size_t kPrefetchAhead = 8192;           // bytes, where one pass reads a block

// Elements between the rows of a matrix of inputs: whole steps, and never a multiple of 2 KiB,
// which would put all rows into the same few places of the first-level cache.
constexpr int row_stride(int k) { return round_up(k, kStep) + kStep; }

// One tile from 16 rows of a row-major matrix: a transposition of 16 x 16 pairs. What lies beyond
// the given rows and columns becomes zero.
inline void pack_tile(const bf16* from, ptrdiff_t stride, int rows, int columns, bf16* tile) {
  const __mmask32 present = first_halves(columns);
  __m512i lines[16];
  for (int i = 0; i < 16; i++)
    lines[i] = _mm512_maskz_loadu_epi16(i < rows ? present : 0, from + (i < rows ? i * stride : 0));
  transpose(lines);
  for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 32, lines[i]);
}

// A step of a block in whole numbers from -127 to 127, each with its sign in the highest bit, times
// one scale per output. A line holds what lines of the same number hold in two tiles of bf16, cut
// into four: 8 numbers of the left tile, 8 of the right, the next 8 of the left, and so on, which
// is how unpacking leaves them (see QuantizedLines).
struct alignas(64) QuantizedStep {
  bf16 scales[kBlock];
  uint8_t lines[16][64];

  // Where the number of an output and an input stands.
  static constexpr int line(int input) { return input / 2; }
  static constexpr int place(int output, int input) {
    const int word = output % 16 * 2 + input % 2;
    return word / 8 * 16 + output / 16 * 8 + word % 8;
  }
};

struct Weight {
  int outputs, inputs;  // as the caller knows them
  bool is_paired;       // two weights: a block is 16 outputs of one, then the same 16 of the other
  bool is_quantized;
  int steps, blocks;
  std::vector<int> first_block;        // per thread, and the end
  std::vector<const char*> data;       // per thread
  const float* bias = nullptr;         // [blocks * 32], or none

  size_t block_bytes() const {
    return steps * (is_quantized ? sizeof(QuantizedStep) : kStepSize * sizeof(bf16));
  }

  const char* block(int number) const {
    const auto next = std::upper_bound(first_block.begin(), first_block.end(), number);
    const auto thread = next - first_block.begin() - 1;
    return data[thread] + (number - first_block[thread]) * block_bytes();
  }
};

struct WeightSource {
  const bf16* rows;   // [outputs, inputs]
  const bf16* other;  // the second of a pair, or null
  const float* bias;
  const float* other_bias;
};

// Numbers of 32 inputs of one output: the largest becomes 127 and its scale is rounded up to bf16,
// so that nothing lies beyond.
inline void quantize(const bf16* from, int columns, int output, QuantizedStep& step) {
  const auto value = [&](int i) { return std::bit_cast<float>(uint32_t{from[i]} << 16); };
  float largest = 0.0f;
  for (int i = 0; i < columns; i++) largest = std::max(largest, std::abs(value(i)));
  const auto scale = (std::bit_cast<uint32_t>(largest / 127.0f) + 0xffff) >> 16;
  step.scales[output] = static_cast<bf16>(scale);
  const float factor = largest == 0.0f ? 0.0f : 1.0f / std::bit_cast<float>(scale << 16);
  for (int i = 0; i < columns; i++) {
    const auto size = static_cast<uint8_t>(std::abs(value(i)) * factor + 0.5f);
    step.lines[step.line(i)][step.place(output, i)] = size | (from[i] >> 15 << 7);
  }
}

std::unique_ptr<Weight> pack(Team& team, int outputs, int inputs, const WeightSource& source,
                             bool is_quantized) {
  auto weight = std::make_unique<Weight>();
  const bool is_paired = source.other != nullptr;
  const int per_block = is_paired ? 16 : kBlock;
  weight->outputs = outputs;
  weight->inputs = inputs;
  weight->is_paired = is_paired;
  weight->is_quantized = is_quantized;
  weight->steps = round_up(inputs, kStep) / kStep;
  // An even number of paired blocks: what they give is taken by another weight in whole steps.
  weight->blocks = round_up(outputs, kBlock) / per_block;
  std::vector<char*> parts;
  for (int thread = 0; thread <= team.size(); thread++)
    weight->first_block.push_back(Share(weight->blocks, thread, team.size()).first);
  for (int thread = 0; thread < team.size(); thread++) {
    const int count = weight->first_block[thread + 1] - weight->first_block[thread];
    parts.push_back(team.arena(thread).take(count * weight->block_bytes()));
    weight->data.push_back(parts.back());
  }
  if (is_quantized) team.reserve_widened(size_t(weight->steps) * kStepSize * sizeof(bf16));
  team.run([&](int thread) {  // each thread touches its own memory first
    auto* tile = reinterpret_cast<bf16*>(parts[thread]);
    auto* quantized = reinterpret_cast<QuantizedStep*>(parts[thread]);
    for (int b = weight->first_block[thread]; b < weight->first_block[thread + 1]; b++)
      for (int step = 0; step < weight->steps; step++, tile += kStepSize, quantized++)
        for (int half = 0; half < 2; half++) {
          const bf16* rows = is_paired && half == 1 ? source.other : source.rows;
          const int first = b * per_block + (is_paired ? 0 : half * 16);
          const int present = std::clamp(outputs - first, 0, 16);
          const int columns = inputs - step * kStep;
          const bf16* from = rows + (present ? size_t(first) * inputs + step * kStep : 0);
          if (is_quantized)  // what is absent stays zero, as its pages are
            for (int i = 0; i < present; i++)
              quantize(from + size_t(i) * inputs, std::min(columns, kStep), half * 16 + i,
                       *quantized);
          else
            pack_tile(from, inputs, present, columns, tile + half * kTile);
        }
  });
  if (source.bias == nullptr) return weight;
  auto* bias = reinterpret_cast<float*>(
      team.arena(0).take(size_t(weight->blocks) * kBlock * sizeof(float)));
  for (int i = 0; i < weight->blocks * kBlock; i++) {
    const bool is_other = is_paired && i % 32 >= 16;
    const int output = is_paired ? i / 32 * 16 + i % 16 : i;
    const float* from = is_other ? source.other_bias : source.bias;
    bias[i] = output < outputs && from != nullptr ? from[output] : 0.0f;
  }
  weight->bias = bias;
  return weight;
}

// Which part of each step a product asks memory for while it computes, how far ahead, in bytes.
// Several groups of rows pass over the same block: each asks for its share of the next block, so
// that reading and computing overlap. At a thread's last block the next is that of the next weight.
// Beside it each step pulls at the readahead, if there is one.
struct Prefetch {
  size_t distance;
  int first_line, last_line;
  Readahead* readahead;
  Prefetch(int steps, size_t step_bytes, int group, int num_groups, Readahead* also)
      : distance(num_groups > 1 ? steps * step_bytes : kPrefetchAhead),
        first_line(static_cast<int>(step_bytes / 64) * group / num_groups),
        last_line(static_cast<int>(step_bytes / 64) * (group + 1) / num_groups),
        readahead(also) {}
};

// Inlined always: GCC 12 takes a function that only prefetches for one without effect, and then
// drops the call.
[[gnu::always_inline]] inline void prefetch_step(const void* step, const Prefetch& ahead) {
  const char* from = reinterpret_cast<const char*>(step) + ahead.distance;
  for (int line = ahead.first_line; line < ahead.last_line; line++)
    _mm_prefetch(from + line * 64, _MM_HINT_T1);
  if (ahead.readahead != nullptr) ahead.readahead->pull();
}

// Inputs of ROWS rows, step by step, and what is added up of them.
template <int ROWS>
struct RowInputs {
  const bf16* rows[(ROWS + 2) / 3];  // every third: the two between are one stride and two away
  size_t stride;

  RowInputs(const bf16* a, size_t row_stride) : stride(row_stride) {
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] = a + r * stride;
  }
  [[gnu::always_inline]] void add_line(int line, __m512bh left, __m512bh right,
                                       __m512 (&sum)[ROWS][2]) const {
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; r++) {
      const __m512bh input = broadcast_pair(rows[r / 3] + r % 3 * stride + line * 2);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], input, left);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], input, right);
    }
  }
  void advance() {
    for (auto& row : rows) row += kStep;
  }
};

// Computes sums[rows][32] = a[rows, inputs] x one block.
template <class Block>
using BlockProduct = void (*)(const bf16* a, size_t stride, const Block* block, int steps,
                              const Prefetch& ahead, float* sums);

template <int ROWS>
void product_avx512(const bf16* a, size_t stride, const bf16* block, int steps,
                    const Prefetch& ahead, float* sums) {
  __m512 sum[ROWS][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
  RowInputs<ROWS> inputs(a, stride);
  for (int step = 0; step < steps; step++, block += kStepSize, inputs.advance()) {
    prefetch_step(block, ahead);
#pragma GCC unroll 4
    for (int line = 0; line < 16; line++)
      inputs.add_line(line, load_pairs(block + line * 32), load_pairs(block + kTile + line * 32),
                      sum);
  }
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; r++) {
    _mm512_store_ps(sums + r * kBlock, sum[r][0]);
    _mm512_store_ps(sums + r * kBlock + 16, sum[r][1]);
  }
}

// Makes bf16 of whole numbers: both bytes of it are looked up by the number's size, 64 at a time.
struct QuantizedLines {
  __m512i low[2], high[2];  // the lower and the upper byte of 0, 1, …, 127 in bf16

  QuantizedLines() {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; i++) {
      const auto number = std::bit_cast<uint32_t>(static_cast<float>(i)) >> 16;
      bytes[0][i] = number & 0xff;
      bytes[1][i] = number >> 8;
    }
    for (int i = 0; i < 2; i++) {
      low[i] = _mm512_load_si512(bytes[0] + i * 64);
      high[i] = _mm512_load_si512(bytes[1] + i * 64);
    }
  }
  [[gnu::always_inline]] void widen(const uint8_t* line, __m512i& left, __m512i& right) const {
    const __m512i numbers = _mm512_load_si512(line);
    const __m512i lower = _mm512_permutex2var_epi8(low[0], numbers, low[1]);  // ignores the sign
    __m512i upper = _mm512_permutex2var_epi8(high[0], numbers, high[1]);
    constexpr int kOrFirstWithAndOfOthers = 0xf8;
    upper = _mm512_ternarylogic_epi32(upper, numbers, _mm512_set1_epi8(-128),
                                      kOrFirstWithAndOfOthers);
    left = _mm512_unpacklo_epi8(lower, upper);
    right = _mm512_unpackhi_epi8(lower, upper);
  }
};

// Sums of whole numbers are exact up to the last bit of the inputs; each step's get their scale.
template <int ROWS>
void product_quantized(const bf16* a, size_t stride, const QuantizedStep* block, int steps,
                       const Prefetch& ahead, float* sums) {
  const QuantizedLines lines;
  __m512 total[ROWS][2];
  for (auto& row : total) row[0] = row[1] = _mm512_setzero_ps();
  RowInputs<ROWS> inputs(a, stride);
  for (int step = 0; step < steps; step++, block++, inputs.advance()) {
    prefetch_step(block, ahead);
    __m512 sum[ROWS][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int line = 0; line < 16; line++) {
      __m512i left, right;
      lines.widen(block->lines[line], left, right);
      inputs.add_line(line, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right),
                      sum);
    }
    const __m512 left = load_bf16(block->scales), right = load_bf16(block->scales + 16);
#pragma GCC unroll 10
    for (int r = 0; r < ROWS; r++) {
      total[r][0] = _mm512_fmadd_ps(sum[r][0], left, total[r][0]);
      total[r][1] = _mm512_fmadd_ps(sum[r][1], right, total[r][1]);
    }
  }
#pragma GCC unroll 10
  for (int r = 0; r < ROWS; r++) {
    _mm512_store_ps(sums + r * kBlock, total[r][0]);
    _mm512_store_ps(sums + r * kBlock + 16, total[r][1]);
  }
}

// A block in bf16, scales multiplied in: what tiles want, and worth its while for many rows.
void widen_block(const QuantizedStep* block, int steps, bf16* to) {
  const QuantizedLines lines;
  const Prefetch ahead(steps, sizeof(QuantizedStep), 0, 1, nullptr);
  const Interleave interleave;
  const auto scaled = [&](__m512i pairs, __m512 scale) {  // a lane is two inputs of one output
    const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
    const __m512bh apart =
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, scale), _mm512_mul_ps(first, scale));
    return _mm512_permutexvar_epi16(interleave.halves, reinterpret_cast<__m512i>(apart));
  };
  for (int step = 0; step < steps; step++, block++, to += kStepSize) {
    prefetch_step(block, ahead);
    const __m512 left_scales = load_bf16(block->scales);
    const __m512 right_scales = load_bf16(block->scales + 16);
    for (int line = 0; line < 16; line++) {
      __m512i left, right;
      lines.widen(block->lines[line], left, right);
      _mm512_store_si512(to + line * 32, scaled(left, left_scales));
      _mm512_store_si512(to + kTile + line * 32, scaled(right, right_scales));
    }
  }
}

// Tiles 0-3 are the sums: 0 and 1 for rows 0-15 (left and right 16 outputs), 2 and 3 for rows
// 16-31; 4 and 5 hold inputs, 6 and 7 weights. A tile of inputs is read whole: rows behind the last
// one are computed in vain and never looked at.
template <bool SECOND_HALF>
void product_amx(const bf16* a, size_t stride, const bf16* block, int steps,
                 const Prefetch& ahead, float* sums) {
  const size_t row_bytes = stride * sizeof(bf16);
  constexpr size_t kSumBytes = kBlock * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (SECOND_HALF) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; step++, block += kStepSize, a += kStep) {
    prefetch_step(block, ahead);
    _tile_loadd(4, a, row_bytes);
    _tile_loadd(6, block, 64);
    _tile_loadd(7, block + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (SECOND_HALF) {
      _tile_loadd(5, a + 16 * stride, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + 16, kSumBytes);
  if constexpr (SECOND_HALF) {
    _tile_stored(2, sums + 16 * kBlock, kSumBytes);
    _tile_stored(3, sums + 16 * kBlock + 16, kSumBytes);
  }
}

inline BlockProduct<bf16> block_product(bool use_amx, int rows) {
  static constexpr BlockProduct<bf16> avx512[kMaxRowsAvx] = {
      product_avx512<1>,  product_avx512<2>,  product_avx512<3>,  product_avx512<4>,
      product_avx512<5>,  product_avx512<6>,  product_avx512<7>,  product_avx512<8>,
      product_avx512<9>,  product_avx512<10>, product_avx512<11>, product_avx512<12>,
      product_avx512<13>, product_avx512<14>};
  if (use_amx) return rows > 16 ? product_amx<true> : product_amx<false>;
  return avx512[rows - 1];
}

inline BlockProduct<QuantizedStep> quantized_product(int rows) {
  static constexpr BlockProduct<QuantizedStep> products[kMaxRowsQuantized] = {
      product_quantized<1>, product_quantized<2>, product_quantized<3>, product_quantized<4>,
      product_quantized<5>, product_quantized<6>, product_quantized<7>, product_quantized<8>,
      product_quantized<9>, product_quantized<10>};
  return products[rows - 1];
}

// How a thread multiplies: with tiles or without, and what it asks memory for meanwhile, or null.
struct Manner {
  bool use_amx;
  Readahead* readahead;
};

// For each row of a[rows, steps * 32]: epilogue(row, number, left 16, right 16 sums) of one block,
// by product(rows) for at most `max_rows` at a time.
template <class Block, class Product, class Epilogue>
void multiply_block(const bf16* a, size_t stride, int rows, const Block* block, size_t step_bytes,
                    int steps, int number, int max_rows, Readahead* readahead, Product product,
                    Epilogue epilogue) {
  alignas(64) float sums[kMaxRowsAmx * kBlock];
  const int num_groups = (rows + max_rows - 1) / max_rows;
  for (int group = 0; group < num_groups; group++) {
    const Share share(rows, group, num_groups);
    const int count = share.last - share.first;
    product(count)(a + share.first * stride, stride, block, steps,
                   Prefetch(steps, step_bytes, group, num_groups, readahead), sums);
    for (int r = 0; r < count; r++)
      epilogue(share.first + r, number, _mm512_load_ps(sums + r * kBlock),
               _mm512_load_ps(sums + r * kBlock + 16));
  }
}

// The same for blocks of bf16 that lie one behind the other.
template <class Epilogue>
void multiply(Manner manner, const bf16* a, size_t stride, int rows, const bf16* blocks, int steps,
              int first_block, int last_block, Epilogue epilogue) {
  const bool use_amx = manner.use_amx && rows >= kFewestRowsAmx;
  const auto product = [&](int count) { return block_product(use_amx, count); };
  for (int b = first_block; b < last_block; b++, blocks += size_t(steps) * kStepSize)
    multiply_block(a, stride, rows, blocks, kStepSize * sizeof(bf16), steps, b,
                   use_amx ? kMaxRowsAmx : kMaxRowsAvx, manner.readahead, product, epilogue);
}

// The same for one quantized block, with room for it in bf16.
template <class Epilogue>
void multiply(Manner manner, const bf16* a, size_t stride, int rows, const QuantizedStep* block,
              int steps, int number, bf16* widened, Epilogue epilogue) {
  if (rows < kFewestRowsAmx || (!manner.use_amx && rows <= kMaxRowsQuantized))
    return multiply_block(a, stride, rows, block, sizeof(QuantizedStep), steps, number,
                          kMaxRowsQuantized, manner.readahead, quantized_product, epilogue);
  widen_block(block, steps, widened);
  multiply(manner, a, stride, rows, widened, steps, number, number + 1, epilogue);
}

// a[rows] x weight with the bias added: this thread's blocks, then what others have not begun.
// All threads of the team call it, and a barrier stands before and behind.
template <class Epilogue>
void multiply(Team& team, int thread, const Weight& weight, const bf16* a, int rows,
              Epilogue epilogue) {
  const size_t stride = row_stride(weight.inputs);
  const Manner manner{team.uses_amx(), &team.readahead(thread)};
  const auto product = [&](auto finish) {
    team.share(thread, weight.first_block, [&](int owner, int number) {
      const int taken = number - weight.first_block[owner];
      const void* block = weight.data[owner] + taken * weight.block_bytes();
      if (weight.is_quantized)
        multiply(manner, a, stride, rows, static_cast<const QuantizedStep*>(block), weight.steps,
                 number, team.widened(thread), finish);
      else
        multiply(manner, a, stride, rows, static_cast<const bf16*>(block), weight.steps, number,
                 number + 1, finish);
    });
  };
  if (weight.bias == nullptr) return product(epilogue);
  product([&](int row, int block, __m512 left, __m512 right) {
    const float* bias = weight.bias + block * kBlock;
    epilogue(row, block, _mm512_add_ps(left, _mm512_loadu_ps(bias)),
             _mm512_add_ps(right, _mm512_loadu_ps(bias + 16)));
  });
}

// Epilogues. Rows of `to` are `stride` elements apart and `width` long.
inline auto store_as_bf16(bf16* to, size_t stride, int width) {
  return [=](int row, int block, __m512 left, __m512 right) {
    bf16* at = to + row * stride + block * kBlock;
    store_bf16(at, left, first_lanes(width - block * kBlock));
    store_bf16(at + 16, right, first_lanes(width - block * kBlock - 16));
  };
}

inline auto store_as_float(float* to, size_t stride, int width) {
  return [=](int row, int block, __m512 left, __m512 right) {
    float* at = to + row * stride + block * kBlock;
    _mm512_mask_storeu_ps(at, first_lanes(width - block * kBlock), left);
    _mm512_mask_storeu_ps(at + 16, first_lanes(width - block * kBlock - 16), right);
  };
}

inline auto add_to_float(float* to, size_t stride) {
  return [=](int row, int block, __m512 left, __m512 right) {
    float* at = to + row * stride + block * kBlock;
    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), left));
    _mm512_storeu_ps(at + 16, _mm512_add_ps(_mm512_loadu_ps(at + 16), right));
  };
}

// For paired weights: left is gate, right is up.
inline auto store_gated(Activation activation, bf16* to, size_t stride) {
  return [=](int row, int block, __m512 gate, __m512 up) {
    store_bf16(to + row * stride + block * 16, _mm512_mul_ps(activate(activation, gate), up));
  };
}

// ---- 5. row operations -------------------------------------------------------------------------

inline __m512 load_row(const bf16* from, __mmask16 lanes) { return load_bf16(from, lanes); }
inline __m512 load_row(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}
inline void store_row(bf16* to, __m512 x, __mmask16 lanes) { store_bf16(to, x, lanes); }
inline void store_row(float* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

// to = x / sqrt(mean(x^2) + eps) * weight
template <class From, class To>
void rms_norm(const From* x, const float* weight, int width, float eps, To* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    const __m512 v = load_row(x + i, first_lanes(width - i));
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int i = 0; i < width; i += 16) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 v = _mm512_mul_ps(load_row(x + i, lanes), factor);
    store_row(to + i, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes, weight + i)), lanes);
  }
}

// to = (x - mean) / sqrt(variance + eps) * weight + bias; a null weight or bias is 1 or 0.
void layer_norm(const bf16* x, const float* weight, const float* bias, int width, float eps,
                bf16* to) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16)
    sum = _mm512_add_ps(sum, load_bf16(x + i, first_lanes(width - i)));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(width));
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 v = _mm512_maskz_sub_ps(lanes, load_bf16(x + i, lanes), mean);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(variance + eps));
  for (int i = 0; i < width; i += 16) {
    const __mmask16 lanes = first_lanes(width - i);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(load_bf16(x + i, lanes), mean), factor);
    if (weight != nullptr) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes, weight + i));
    if (bias != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, bias + i));
    store_bf16(to + i, v, lanes);
  }
}

// ---- 6. attention ------------------------------------------------------------------------------
//
// Keys and values of a layer lie as [slot, kv head, position, size]. A step brings stretches:
// neighbouring positions of one slot. A stretch of one token (decoding) is bound by reading the
// cache: attend_token() streams it once, with keys as rows of dot products. A longer stretch
// (prefill) is bound by arithmetic: attend_span() packs keys and values like weights and lets the
// matrix product work on many query vectors. Both go through the cache in spans, with a running
// maximum and sum ("online softmax": Milakov and Gimelshein 2018; Dao et al. 2022).

constexpr int kMaxHeadSize = 256;
constexpr int kTokenSpan = 128;   // positions whose scores are known before their values are read
constexpr int kSpan = 256;        // the same for prefill: keys and values of a span fit in L2
constexpr int kMaxQueryRows = 128;  // query vectors (tokens x heads of a group) that share a span
constexpr int kHeadsTogether = 4; // query heads whose dot products with one key are done at once
constexpr float kMasked = -1e30f;

struct Attention {
  int num_heads, num_kv_heads, size;
  float scale;
  float softcap;  // 0: none
  int window;     // positions that a token sees, itself included; 0: all
  int group() const { return num_heads / num_kv_heads; }
  int first_visible(int position) const {
    return window > 0 ? std::max(0, position - window + 1) : 0;
  }
};

struct LayerCache {
  bf16 *keys, *values;
  int max_tokens;
  // Position 0 of one head of one slot.
  size_t offset(const Attention& shape, int slot, int kv_head) const {
    return (size_t(slot) * shape.num_kv_heads + kv_head) * max_tokens * shape.size;
  }
};

// Vectors of tokens and heads; those of one head are contiguous. Strides in elements.
struct TokenVectors {
  const bf16* data;
  ptrdiff_t token_stride, head_stride;
  const bf16* at(int token, int head) const {
    return data + token * token_stride + head * head_stride;
  }
};

struct Output {
  bf16* data;
  ptrdiff_t token_stride;
};

struct Stretch {
  int first_token, slot, start, count;
};

struct PrefillItem {
  int stretch, first, count;  // tokens [first, first + count) of the stretch
};

inline __m512 cap(__m512 scores, float scale, float softcap) {
  scores = _mm512_mul_ps(scores, _mm512_set1_ps(scale));
  if (softcap == 0.0f) return scores;
  const __m512 limit = _mm512_set1_ps(softcap);
  return _mm512_mul_ps(limit, tanh(_mm512_div_ps(scores, limit)));
}

// Scores become weights exp(score - maximum) in bf16; returns the factor by which what was summed
// before must shrink because the maximum rose. Only positions [first, last) are visible; the
// weights of the others, up to `length` rounded up to 32, are 0.
struct RunningSoftmax {
  float max = kMasked, sum = 0.0f;

  float add(const float* scores, int first, int last, int length, bf16* weights) {
    const auto visible = [&](int i) {
      return static_cast<__mmask16>(first_lanes(last - i) & ~first_lanes(first - i));
    };
    __m512 most = _mm512_set1_ps(max);
    for (int i = 0; i < length; i += 16)
      most = _mm512_mask_max_ps(most, visible(i), most, _mm512_loadu_ps(scores + i));
    const float new_max = _mm512_reduce_max_ps(most);
    const __m512 shift = _mm512_set1_ps(new_max);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < round_up(length, 32); i += 16) {
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + i), shift);
      const __m512 weight = _mm512_maskz_mov_ps(visible(i), exp(shifted));
      total = _mm512_add_ps(total, weight);
      store_bf16(weights + i, weight);
    }
    const float shrink = new_max == max ? 1.0f : std::exp(max - new_max);
    sum = sum * shrink + _mm512_reduce_add_ps(total);
    max = new_max;
    return shrink;
  }
};

// Into the second-level cache: a span of keys and one of values would fill the first.
[[gnu::always_inline]] inline void prefetch(const bf16* from, int count) {
  for (int i = 0; i < count; i += 32)
    _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
}

// Rows of `size` bf16 as CHUNKS registers of 32; what lies behind `size` reads as zero.
template <int CHUNKS, bool EXACT>
struct HeadVectors {
  int size_given;
  int size() const { return EXACT ? CHUNKS * 32 : size_given; }
  __m512i load(const bf16* row, int chunk) const {
    if constexpr (EXACT) return _mm512_loadu_si512(row + chunk * 32);
    return _mm512_maskz_loadu_epi16(first_halves(size_given - chunk * 32), row + chunk * 32);
  }
};

// Dot products of one query vector with 16 neighbouring keys; where there are fewer, with the last
// one again, since nothing behind it may be read.
template <bool ALL, int CHUNKS, bool EXACT>
inline __m512 dot_16(HeadVectors<CHUNKS, EXACT> vectors, const __m512bh (&query)[CHUNKS],
                     const bf16* keys, int last) {
  __m512 dots[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const bf16* key = keys + (ALL ? i : std::min(i, last)) * vectors.size();
    dots[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; c++)
      dots[i] = _mm512_dpbf16_ps(dots[i], query[c],
                                 reinterpret_cast<__m512bh>(vectors.load(key, c)));
  }
  return sum_each(dots);
}

// sums[h][0 … 31] += weights[h] x values, for one chunk of the head size.
template <int HEADS, int CHUNKS, bool EXACT>
inline void add_values(HeadVectors<CHUNKS, EXACT> vectors, const bf16 (&weights)[HEADS][kTokenSpan],
                       const bf16* values, int length, int chunk, const bf16* next,
                       float (&sums)[HEADS][CHUNKS * 32]) {
  const Interleave interleave;
  const int size = vectors.size();
  __m512 sum[HEADS][2];
  for (int h = 0; h < HEADS; h++)
    for (int half = 0; half < 2; half++)
      sum[h][half] = _mm512_load_ps(sums[h] + chunk * 32 + half * 16);
  for (int j = 0; j < length; j += 2) {
    if (chunk == 0) prefetch(next + j * size, 2 * size);
    // Two positions side by side, as vdpbf16ps wants pairs; behind the end one of weight 0.
    const __m512i even = vectors.load(values + j * size, chunk);
    const __m512i odd = vectors.load(values + std::min(j + 1, length - 1) * size, chunk);
    const auto left =
        reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(even, interleave.low, odd));
    const auto right =
        reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(even, interleave.high, odd));
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++) {
      const __m512bh pair = broadcast_pair(weights[h] + j);
      sum[h][0] = _mm512_dpbf16_ps(sum[h][0], pair, left);
      sum[h][1] = _mm512_dpbf16_ps(sum[h][1], pair, right);
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int half = 0; half < 2; half++)
      _mm512_store_ps(sums[h] + chunk * 32 + half * 16, sum[h][half]);
}

inline void scale_row(float* row, int width, float factor) {
  for (int i = 0; i < width; i += 16)
    _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(factor)));
}

// HEADS query vectors of one token against `count` keys and values. While keys are read their
// values are asked for, while values are read the next keys: in the end `next`, another item's.
template <int HEADS, int CHUNKS, bool EXACT>
void attend_token(const Attention& shape, const bf16* query, ptrdiff_t head_stride,
                  const bf16* keys, const bf16* values, int count, const bf16* next, bf16* out) {
  const HeadVectors<CHUNKS, EXACT> vectors{shape.size};
  const int size = vectors.size();
  alignas(64) float scores[HEADS][kTokenSpan];
  alignas(64) bf16 weights[HEADS][kTokenSpan];
  alignas(64) float sums[HEADS][CHUNKS * 32] = {};
  __m512bh q[HEADS][CHUNKS];
  RunningSoftmax softmax[HEADS];
  for (int h = 0; h < HEADS; h++)
    for (int c = 0; c < CHUNKS; c++)
      q[h][c] = reinterpret_cast<__m512bh>(vectors.load(query + h * head_stride, c));
  for (int start = 0; start < count; start += kTokenSpan) {
    const int length = std::min(kTokenSpan, count - start);
    for (int j = 0; j < length; j += 16, keys += 16 * size) {
      prefetch(values + j * size, 16 * size);
      for (int h = 0; h < HEADS; h++) {
        const __m512 dots = length - j >= 16 ? dot_16<true>(vectors, q[h], keys, 15)
                                             : dot_16<false>(vectors, q[h], keys, length - j - 1);
        _mm512_store_ps(scores[h] + j, cap(dots, shape.scale, shape.softcap));
      }
    }
    for (int h = 0; h < HEADS; h++) {
      const float shrink = softmax[h].add(scores[h], 0, length, length, weights[h]);
      if (shrink != 1.0f) scale_row(sums[h], CHUNKS * 32, shrink);
    }
    const bf16* following = start + kTokenSpan < count ? keys : next;
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; c++)
      add_values(vectors, weights, values, length, c, following, sums);
    values += length * size;
  }
  for (int h = 0; h < HEADS; h++) {
    const __m512 factor = _mm512_set1_ps(1.0f / softmax[h].sum);
    for (int i = 0; i < size; i += 16)
      store_bf16(out + h * size + i, _mm512_mul_ps(_mm512_load_ps(sums[h] + i), factor),
                 first_lanes(size - i));
  }
}

using AttendToken = void (*)(const Attention&, const bf16*, ptrdiff_t, const bf16*, const bf16*,
                             int, const bf16*, bf16*);

template <int CHUNKS, bool EXACT>
AttendToken attend_token_for(int heads) {
  static constexpr AttendToken by_heads[kHeadsTogether] = {
      attend_token<1, CHUNKS, EXACT>, attend_token<2, CHUNKS, EXACT>,
      attend_token<3, CHUNKS, EXACT>, attend_token<4, CHUNKS, EXACT>};
  return by_heads[heads - 1];
}

AttendToken attend_token_for(int size, int heads) {
  if (size == 64) return attend_token_for<2, true>(heads);
  if (size == 128) return attend_token_for<4, true>(heads);
  if (size < 64) return attend_token_for<2, false>(heads);
  if (size < 128) return attend_token_for<4, false>(heads);
  return attend_token_for<kMaxHeadSize / 32, false>(heads);
}

// What a thread needs for prefill; sized for the largest head.
struct SpanScratch {
  alignas(64) bf16 queries[(kMaxQueryRows + kSlackRows) * kMaxHeadSize];
  alignas(64) bf16 keys[kSpan * kMaxHeadSize];
  alignas(64) bf16 values[kSpan * kMaxHeadSize];
  alignas(64) float scores[kMaxQueryRows * kSpan];
  alignas(64) bf16 weights[(kMaxQueryRows + kSlackRows) * kSpan];
  alignas(64) float sums[kMaxQueryRows * kMaxHeadSize];
  RunningSoftmax softmax[kMaxQueryRows];
  float shrink[kMaxQueryRows];
};

// Keys [length, size] as a weight with an output per key; values as one with an input per key.
void pack_keys(const bf16* keys, int length, int size, bf16* to) {
  for (int first = 0; first < length; first += kBlock)
    for (int step = 0; step < size; step += kStep)
      for (int half = 0; half < kBlock; half += 16, to += kTile) {
        const int rows = std::clamp(length - first - half, 0, 16);
        const bf16* from = keys + (rows > 0 ? (first + half) * size : 0) + step;
        pack_tile(from, size, rows, size - step, to);
      }
}

void pack_values(const bf16* values, int length, int size, bf16* to) {
  const Interleave interleave;
  for (int column = 0; column < size; column += kBlock)
    for (int first = 0; first < length; first += kStep, to += kStepSize)
      for (int line = 0; line < 16; line++) {
        const int position = first + 2 * line;
        const bf16* row = values + position * size + column;
        const __mmask32 present = first_halves(size - column);
        const __m512i even = _mm512_maskz_loadu_epi16(position < length ? present : 0, row);
        const __m512i odd =
            _mm512_maskz_loadu_epi16(position + 1 < length ? present : 0, row + size);
        _mm512_store_si512(to + line * 32, _mm512_permutex2var_epi16(even, interleave.low, odd));
        _mm512_store_si512(to + kTile + line * 32,
                           _mm512_permutex2var_epi16(even, interleave.high, odd));
      }
}

// All query heads of one kv head, for `count` neighbouring tokens from position `start` on.
// Query row r is head r % group of token r / group.
void attend_span(bool use_amx, const Attention& shape, const TokenVectors& query, int first_token,
                 int kv_head, int start, int count, const bf16* keys, const bf16* values,
                 SpanScratch& scratch, const Output& out) {
  const Manner manner{use_amx, nullptr};
  const int group = shape.group(), rows = count * group, size = shape.size;
  const int width = round_up(size, kStep);
  for (int r = 0; r < rows; r++) {
    const bf16* from = query.at(first_token + r / group, kv_head * group + r % group);
    for (int i = 0; i < width; i += 32)
      _mm512_store_si512(scratch.queries + r * width + i,
                         _mm512_maskz_loadu_epi16(first_halves(size - i), from + i));
    scratch.softmax[r] = RunningSoftmax();
  }
  std::fill_n(scratch.sums, rows * width, 0.0f);
  const int end = start + count;
  for (int first = shape.first_visible(start); first < end; first += kSpan) {
    const int length = std::min(kSpan, end - first);
    const int blocks = round_up(length, kBlock) / kBlock;
    pack_keys(keys + size_t(first) * size, length, size, scratch.keys);
    pack_values(values + size_t(first) * size, length, size, scratch.values);
    multiply(manner, scratch.queries, width, rows, scratch.keys, width / kStep, 0, blocks,
             [&](int row, int block, __m512 left, __m512 right) {
               float* at = scratch.scores + row * kSpan + block * kBlock;
               _mm512_store_ps(at, cap(left, shape.scale, shape.softcap));
               _mm512_store_ps(at + 16, cap(right, shape.scale, shape.softcap));
             });
    for (int r = 0; r < rows; r++) {
      const int position = start + r / group;
      scratch.shrink[r] = scratch.softmax[r].add(
          scratch.scores + r * kSpan, shape.first_visible(position) - first, position + 1 - first,
          length, scratch.weights + r * kSpan);
    }
    multiply(manner, scratch.weights, kSpan, rows, scratch.values, blocks, 0, width / kBlock,
             [&](int row, int block, __m512 left, __m512 right) {
               float* at = scratch.sums + row * width + block * kBlock;
               const __m512 shrink = _mm512_set1_ps(scratch.shrink[row]);
               _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), shrink, left));
               _mm512_store_ps(at + 16, _mm512_fmadd_ps(_mm512_load_ps(at + 16), shrink, right));
             });
  }
  for (int r = 0; r < rows; r++) {
    bf16* to = out.data + (first_token + r / group) * out.token_stride +
               (kv_head * group + r % group) * size;
    const __m512 factor = _mm512_set1_ps(1.0f / scratch.softmax[r].sum);
    for (int i = 0; i < size; i += 16)
      store_bf16(to + i, _mm512_mul_ps(_mm512_load_ps(scratch.sums + r * width + i), factor),
                 first_lanes(size - i));
  }
}

// Who computes what of a step's attention; the same in every layer. A single token's kv heads are
// items of their own, dealt to threads in runs; who is done first helps the others.
class AttentionPlan {
 public:
  AttentionPlan(const std::vector<Stretch>& stretches, int num_heads, int num_kv_heads,
                int num_threads)
      : stretches_(stretches) {
    const int tokens_together = std::max(1, kMaxQueryRows / (num_heads / num_kv_heads));
    std::vector<int64_t> cost_before{0};
    for (int s = 0; s < static_cast<int>(stretches.size()); s++) {
      if (stretches[s].count == 1) {
        singles_.push_back(s);
        for (int head = 0; head < num_kv_heads; head++)
          cost_before.push_back(cost_before.back() + stretches[s].start + 16);
      } else {
        for (int first = 0; first < stretches[s].count; first += tokens_together)
          blocks_.push_back({s, first, std::min(tokens_together, stretches[s].count - first)});
      }
    }
    // The costliest first, so that no thread starts a long one when the others are done.
    std::stable_sort(blocks_.begin(), blocks_.end(), [&](const auto& a, const auto& b) {
      return stretches[a.stretch].start + a.first > stretches[b.stretch].start + b.first;
    });
    // Items are split where half (a third, …) of the positions to read lies behind.
    for (int thread = 0; thread <= num_threads; thread++) {
      const int64_t target = cost_before.back() * thread / num_threads;
      const auto at = std::lower_bound(cost_before.begin(), cost_before.end(), target);
      first_item_.push_back(static_cast<int>(at - cost_before.begin()));
    }
  }

  // This thread's part for one layer whose new keys and values are all written. `next_block` is
  // shared by the threads and starts at 0.
  void attend(Team& team, int thread, const Attention& shape, const LayerCache& cache,
              const TokenVectors& query, const Output& out, SpanScratch& scratch,
              std::atomic<int>& next_block) const {
    const int num_heads = shape.num_kv_heads;
    team.share(thread, first_item_, [&](int owner, int item) {
      const int next = std::min(item + 1, first_item_[owner + 1] - 1);
      attend_single(item, next, shape, cache, query, out);
    });
    const int num_items = static_cast<int>(blocks_.size()) * num_heads;
    for (int item; (item = next_block.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      const PrefillItem& block = blocks_[item / num_heads];
      const Stretch& stretch = stretches_[block.stretch];
      const int head = item % num_heads;
      const size_t offset = cache.offset(shape, stretch.slot, head);
      attend_span(team.uses_amx(), shape, query, stretch.first_token + block.first, head,
                  stretch.start + block.first, block.count, cache.keys + offset,
                  cache.values + offset, scratch, out);
    }
  }

  // Has what this thread's items read in a layer asked for while `num_pulls` steps of products run.
  void read_ahead(Team& team, int thread, const Attention& shape, const LayerCache& cache,
                  size_t num_pulls) const {
    const int first = first_item_[thread], last = first_item_[thread + 1];
    Readahead& readahead = team.readahead(thread);
    readahead.begin();
    for (int item = first; item < last; item++) {
      const auto [offset, count] = visible(item, shape, cache);
      const size_t num_bytes = size_t(count - 1) * shape.size * sizeof(bf16);  // the last is new
      readahead.add(cache.keys + offset, num_bytes);
      readahead.add(cache.values + offset, num_bytes);
    }
    readahead.spread(num_pulls);
  }

 private:
  void attend_single(int item, int next_item, const Attention& shape, const LayerCache& cache,
                     const TokenVectors& query, const Output& out) const {
    const Stretch& stretch = single(item, shape);
    const int kv_head = item % shape.num_kv_heads, group = shape.group();
    const auto [offset, count] = visible(item, shape, cache);
    const bf16 *keys = cache.keys + offset, *values = cache.values + offset;
    const bf16* next = cache.keys + visible(next_item, shape, cache).offset;
    for (int first = 0; first < group; first += kHeadsTogether) {
      const int heads = std::min(kHeadsTogether, group - first);
      const int head = kv_head * group + first;
      const bf16* following = first + heads < group ? keys : next;
      attend_token_for(shape.size, heads)(
          shape, query.at(stretch.first_token, head), query.head_stride, keys, values, count,
          following, out.data + stretch.first_token * out.token_stride + head * shape.size);
    }
  }

  struct Positions {
    size_t offset;  // in a layer's keys or values
    int count;
  };

  const Stretch& single(int item, const Attention& shape) const {
    return stretches_[singles_[item / shape.num_kv_heads]];
  }

  // What an item sees, its own position included.
  Positions visible(int item, const Attention& shape, const LayerCache& cache) const {
    const Stretch& stretch = single(item, shape);
    const int first = shape.first_visible(stretch.start);
    const size_t head = cache.offset(shape, stretch.slot, item % shape.num_kv_heads);
    return {head + size_t(first) * shape.size, stretch.start + 1 - first};
  }

  const std::vector<Stretch>& stretches_;
  std::vector<int> singles_;          // stretches of one token
  std::vector<PrefillItem> blocks_;   // the others, in pieces
  std::vector<int> first_item_;       // per thread, and the end
};

// New keys and values of these tokens go into the cache.
void write_cache(const Attention& shape, const LayerCache& cache, const Stretch& stretch,
                 const TokenVectors& keys, const TokenVectors& values, int first, int last) {
  const size_t bytes = shape.size * sizeof(bf16);
  for (int i = first; i < last; i++)
    for (int head = 0; head < shape.num_kv_heads; head++) {
      const size_t at = cache.offset(shape, stretch.slot, head) +
                        size_t(stretch.start + i) * shape.size;
      std::memcpy(cache.keys + at, keys.at(stretch.first_token + i, head), bytes);
      std::memcpy(cache.values + at, values.at(stretch.first_token + i, head), bytes);
    }
}

// ---- 7. single operations ----------------------------------------------------------------------

// Rows in pages of their own, each followed by what a product may read beyond it.
class RowBuffer {
 public:
  bf16* reserve(int rows, int width) {
    const size_t needed = size_t(rows + kSlackRows) * row_stride(width) * sizeof(bf16);
    if (needed > size_) {
      pages_ = Pages(needed);
      size_ = needed;
    }
    return pages_.data<bf16>();
  }

 private:
  Pages pages_;
  size_t size_ = 0;
};

// A team with its weights and scratch memory.
class Engine {
 public:
  Engine(int num_threads, bool use_amx) : team(num_threads, use_amx) {
    for (int i = 0; i < num_threads; i++) spans_.emplace_back(sizeof(SpanScratch));
  }

  void linear(const Weight& weight, const bf16* x, int rows, bf16* to, float* to_float) {
    bf16* staged = inputs_.reserve(rows, weight.inputs);
    team.run([&](int thread) {
      stage(thread, x, rows, weight.inputs, staged);
      const int width = weight.outputs;
      if (to_float != nullptr)
        multiply(team, thread, weight, staged, rows, store_as_float(to_float, width, width));
      else
        multiply(team, thread, weight, staged, rows, store_as_bf16(to, width, width));
    });
  }

  void gated_mlp(const Weight& gate_up, const Weight& down, Activation activation, const bf16* x,
                 int rows, bf16* to) {
    bf16* staged = inputs_.reserve(rows, gate_up.inputs);
    bf16* gated = gated_.reserve(rows, down.inputs);
    team.run([&](int thread) {
      stage(thread, x, rows, gate_up.inputs, staged);
      multiply(team, thread, gate_up, staged, rows,
               store_gated(activation, gated, row_stride(down.inputs)));
      team.barrier();
      multiply(team, thread, down, gated, rows, store_as_bf16(to, down.outputs, down.outputs));
    });
  }

  // The first half of a gated MLP, with something more added to gate and up: [rows, outputs] each.
  void gate(const Weight& gate_up, Activation activation, const bf16* x, int rows,
            const float* more_gate, const float* more_up, bf16* to) {
    bf16* staged = inputs_.reserve(rows, gate_up.inputs);
    const int width = gate_up.outputs;
    team.run([&](int thread) {
      stage(thread, x, rows, gate_up.inputs, staged);
      multiply(team, thread, gate_up, staged, rows, [=](int row, int block, __m512 gate,
                                                        __m512 up) {
        const __mmask16 lanes = first_lanes(width - block * 16);
        const size_t at = size_t(row) * width + block * 16;
        gate = _mm512_add_ps(gate, _mm512_maskz_loadu_ps(lanes, more_gate + at));
        up = _mm512_add_ps(up, _mm512_maskz_loadu_ps(lanes, more_up + at));
        store_bf16(to + at, _mm512_mul_ps(activate(activation, gate), up), lanes);
      });
    });
  }

  // Applies work(row) to all rows; few of them are not worth waking the others.
  void for_rows(int rows, int width, const std::function<void(int)>& work) {
    if (int64_t{rows} * width < kWorthWaking) {
      for (int row = 0; row < rows; row++) work(row);
      return;
    }
    team.run([&](int thread) {
      const Share share(rows, thread, team.size());
      for (int row = share.first; row < share.last; row++) work(row);
    });
  }

  void attend(const Attention& shape, const LayerCache& cache,
              const std::vector<Stretch>& stretches, const TokenVectors& query,
              const TokenVectors& keys, const TokenVectors& values, const Output& out) {
    const AttentionPlan plan(stretches, shape.num_heads, shape.num_kv_heads, team.size());
    std::atomic<int> next_block{0};
    team.run([&](int thread) {
      for (const Stretch& stretch : stretches) {
        // Single tokens are dealt in turn, longer stretches in parts.
        const bool is_mine = stretch.first_token % team.size() == thread;
        const Share share = stretch.count > 1 ? Share(stretch.count, thread, team.size())
                                              : Share(is_mine ? 1 : 0, 0, 1);
        write_cache(shape, cache, stretch, keys, values, share.first, share.last);
      }
      team.barrier();
      plan.attend(team, thread, shape, cache, query, out, spans(thread), next_block);
    });
  }

  // Rows differ in what they cost, so each thread takes the next one when it is done.
  template <class Logit>
  void sample(const Logit* logits, int rows, int vocab, HeadraceSamplingRow* asked) {
    while (static_cast<int>(samplers_.size()) < team.size()) samplers_.emplace_back();
    for (Sampler& sampler : samplers_) sampler.reserve(vocab);
    std::atomic<int> next_row{0};
    const auto take_rows = [&](int thread) {
      for (int row; (row = next_row.fetch_add(1, std::memory_order_relaxed)) < rows;)
        samplers_[thread].choose(logits + size_t(row) * vocab, asked[row]);
    };
    if (rows == 1 || int64_t{rows} * vocab < kWorthWaking)
      take_rows(0);
    else
      team.run(take_rows);
  }

  SpanScratch& spans(int thread) { return *spans_[thread].data<SpanScratch>(); }

  const Weight* keep(std::unique_ptr<Weight> weight) {
    weights_.push_back(std::move(weight));
    return weights_.back().get();
  }

  Team team;

 private:
  static constexpr int64_t kWorthWaking = 16 * 1024;  // elements; about 2 us of one thread

  // Copies the inputs of a product to where whole steps and tiles may be read.
  void stage(int thread, const bf16* x, int rows, int width, bf16* to) {
    const Share share(rows, thread, team.size());
    const int stride = row_stride(width), used = round_up(width, kStep);
    for (int row = share.first; row < share.last; row++) {
      std::memcpy(to + size_t(row) * stride, x + size_t(row) * width, width * sizeof(bf16));
      std::fill(to + size_t(row) * stride + width, to + size_t(row) * stride + used, 0);
    }
    team.barrier();
  }

  std::vector<std::unique_ptr<Weight>> weights_;
  std::vector<Pages> spans_;  // per thread
  std::vector<Sampler> samplers_;  // per thread, from the first use on
  RowBuffer inputs_, gated_;
};

// ---- 8. adapters -------------------------------------------------------------------------------
//
// A low-rank adapter (LoRA) adds B(A(x)) to what a linear gives. Rows of one step may have different
// adapters, or none. A is as small as B, and both together a few percent of the weight, but there is
// one of each per adapter: what counts is to read each once, in order, at the speed of memory. So
//
//   shrink   A of all siblings (q, k, v) stands row below row: each row of A is a dot product with
//            the inputs, four rows of A at a time. Everybody waits until all rows have been shrunk.
//   expand   B lies like a packed weight, tiles of 16 outputs, pairs of ranks side by side, and is
//            added where the product of the weight comes out, tile by tile, from registers.

}  // namespace

extern "C" {

// B of one linear: tiles of [rank / 2][16 outputs][2]; null where the linear has none.
struct HeadraceExpand {
  const bf16* tiles;
  int first, rank;                             // where its ranks begin in the shrunk row; a multiple of 4
};

// What an adapter adds to one packed weight: up to three linears in one.
struct HeadraceLowRank {
  const bf16* shrink;                          // [rank, inputs in whole steps], or null
  int rank;                                    // of all parts
  HeadraceExpand parts[3];
};

enum { kQkv = 0, kOut = 1, kGateUp = 2, kDown = 3, kAdapted = 4 };

}  // extern "C"

namespace {

constexpr int kRanksTogether = 4, kRowsTogether = 4;
constexpr int kUnitsAhead = 2;  // so many times four rows of A: 4-12 KiB each, as kPrefetchAhead

// shrunk[row][first .. first + 4) of up to four rows; `next` is what will be read soon.
template <int ROWS>
void shrink_rows(const bf16* const* x, const bf16* ranks, const bf16* next, int width,
                 bf16* const* shrunk) {
  __m512 sums[16];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int k = 0; k < width; k += kStep) {
    __m512bh a[kRanksTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kRanksTogether; i++) {
      a[i] = load_pairs(ranks + size_t(i) * width + k);
      _mm_prefetch(reinterpret_cast<const char*>(next + size_t(i) * width + k), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) {
      const __m512bh input = load_pairs(x[row] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRanksTogether; i++)
        sums[row * 4 + i] = _mm512_dpbf16_ps(sums[row * 4 + i], input, a[i]);
    }
  }
  alignas(32) bf16 all[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), narrow(sum_each(sums)));
  for (int row = 0; row < ROWS; row++)
    std::memcpy(shrunk[row], all + row * 4, kRanksTogether * sizeof(bf16));
}

inline __m512 expand(__m512 sum, const HeadraceExpand& part, int tile, const bf16* shrunk) {
  if (part.tiles == nullptr) return sum;
  const bf16* line = part.tiles + size_t(tile) * part.rank * 16;
  const bf16* pair = shrunk + part.first;
  const int ahead = part.rank * 32;  // two tiles: those of the next block
  __m512 other = _mm512_setzero_ps();
  for (int i = 0; i < part.rank; i += 4, line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(line + ahead + 32), _MM_HINT_T1);
    sum = _mm512_dpbf16_ps(sum, broadcast_pair(pair + i), load_pairs(line));
    other = _mm512_dpbf16_ps(other, broadcast_pair(pair + i + 2), load_pairs(line + 32));
  }
  return _mm512_add_ps(sum, other);
}

// Which rows of a step have which adapter, and their shrunk inputs of the moment.
class StepAdapters {
 public:
  // `adapters` has one per stretch, each [num_layers][kAdapted]; null where there is none.
  void set(const HeadraceLowRank* const* adapters, const std::vector<Stretch>& stretches,
           int num_layers) {
    groups_.clear();
    of_row_.clear();
    stride_ = 0;
    if (adapters == nullptr) return;
    for (size_t i = 0; i < stretches.size(); i++) {
      const HeadraceLowRank* adapter = adapters[i];
      of_row_.insert(of_row_.end(), stretches[i].count, adapter);
      if (adapter == nullptr) continue;
      auto group = std::find_if(groups_.begin(), groups_.end(),
                                [&](const Group& g) { return g.adapter == adapter; });
      if (group == groups_.end()) {
        group = groups_.insert(groups_.end(), Group{adapter, {}});
        for (int part = 0; part < num_layers * kAdapted; part++)
          stride_ = std::max(stride_, size_t(adapter[part].rank));
      }
      for (int row = 0; row < stretches[i].count; row++)
        group->rows.push_back(stretches[i].first_token + row);
    }
    if (groups_.empty()) of_row_.clear();
    shrunk_.resize(std::max(shrunk_.size(), of_row_.size() * stride_));
  }

  bool any() const { return !groups_.empty(); }

  // This thread's share of A(x) for the weight `number` (layer * kAdapted + which of the four).
  void shrink(int thread, int num_threads, int number, const bf16* x, int inputs) {
    const int width = round_up(inputs, kStep);
    int total = 0;
    for (const Group& group : groups_) total += group.adapter[number].rank / kRanksTogether;
    const Share share(total, thread, num_threads);
    int first = 0;
    for (size_t g = 0; g < groups_.size(); g++) {
      const HeadraceLowRank& part = groups_[g].adapter[number];
      const int count = part.rank / kRanksTogether;
      const HeadraceLowRank* after = g + 1 < groups_.size() ? groups_[g + 1].adapter + number : &part;
      for (int i = std::max(0, share.first - first); i < std::min(count, share.last - first); i++) {
        const bf16* ranks = part.shrink + size_t(i) * kRanksTogether * width;
        const size_t ahead = i + kUnitsAhead < count ? i + kUnitsAhead : i + kUnitsAhead - count;
        const bf16* from = i + kUnitsAhead < count ? part.shrink : after->shrink;
        const bf16* next = from == nullptr ? nullptr : from + ahead * kRanksTogether * width;
        shrink_group(groups_[g], ranks, next == nullptr ? ranks : next, i * kRanksTogether, x,
                     row_stride(inputs), width);
      }
      first += count;
    }
  }

  const HeadraceLowRank* of_row(int row, int number) const {
    return of_row_[row] == nullptr ? nullptr : of_row_[row] + number;
  }
  const bf16* shrunk(int row) const { return shrunk_.data() + row * stride_; }

 private:
  struct Group {
    const HeadraceLowRank* adapter;
    std::vector<int> rows;
  };

  void shrink_group(const Group& group, const bf16* ranks, const bf16* next, int first_rank,
                    const bf16* x, size_t x_stride, int width) {
    const int count = static_cast<int>(group.rows.size());
    for (int done = 0; done < count; done += kRowsTogether) {
      const bf16* from[kRowsTogether];
      bf16* to[kRowsTogether];
      const int num_rows = std::min(kRowsTogether, count - done);
      for (int i = 0; i < num_rows; i++) {
        const int row = group.rows[done + i];
        from[i] = x + row * x_stride;
        to[i] = shrunk_.data() + row * stride_ + first_rank;
      }
      static constexpr decltype(&shrink_rows<1>) shrink[kRowsTogether] = {
          shrink_rows<1>, shrink_rows<2>, shrink_rows<3>, shrink_rows<4>};
      shrink[num_rows - 1](from, ranks, next, width, to);
    }
  }

  std::vector<Group> groups_;
  std::vector<const HeadraceLowRank*> of_row_;  // per token
  std::vector<bf16> shrunk_;                    // [tokens, stride_]
  size_t stride_ = 0;
};

// ---- 9. the step -------------------------------------------------------------------------------
//
// All tokens of a step go through the model together, whoever they belong to:
//
//   residual <- embedding
//   per layer:  q, k, v  <- norm(residual) x Wqkv       (k and v go into the cache)
//               residual += attention(q, cache) x Wo
//               residual += (act(gate) * up) x Wdown,   gate, up <- norm(residual) x Wgate_up
//   logits   <- norm(residual of the asked rows) x Whead
//
// The residual stays float32 all the way, which makes the step more exact than bf16 modules are.

}  // namespace

extern "C" {

struct HeadraceLayer {
  const void *qkv, *out, *gate_up, *down;      // packed weights
  const float *attention_norm, *mlp_norm;      // [hidden]
  const float *query_norm, *key_norm;          // [size], or null
  bf16 *keys, *values;                         // [slot, kv head, max_tokens, size]
  int window;                                  // 0: none
};

struct HeadraceModel {
  int num_layers, hidden, num_heads, num_kv_heads, size, vocab;
  int activation, num_slots, max_tokens;
  float eps, scale;
  const HeadraceLayer* layers;
  const float* last_norm;
  const void* head;                            // packed
  const bf16* embedding;                       // [vocab, hidden], or null: that of the head
  const float *cosines, *sines;                // [max_tokens, size / 2]
};

}  // extern "C"

namespace {

// Row `index` of what was packed, as floats.
void unpack_row(const Weight& weight, int index, float* to) {
  const char* block = weight.block(index / kBlock);
  if (weight.is_quantized) {
    const auto* step = reinterpret_cast<const QuantizedStep*>(block);
    for (int i = 0; i < weight.inputs; i += kStep, step++) {
      const float scale = std::bit_cast<float>(uint32_t{step->scales[index % kBlock]} << 16);
      for (int j = 0; j < std::min(kStep, weight.inputs - i); j++) {
        const int number = step->lines[step->line(j)][step->place(index % kBlock, j)];
        to[i + j] = scale * static_cast<float>(number < 128 ? number : 128 - number);
      }
    }
    return;
  }
  const bf16* tile = reinterpret_cast<const bf16*>(block) + index % kBlock / 16 * kTile;
  const __m512i lines = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(16));
  for (int step = 0; step < weight.steps; step++, tile += kStepSize) {
    const __m512i pairs = _mm512_i32gather_epi32(lines, tile + index % 16 * 2, 4);
    const int first = step * kStep;
    _mm512_mask_storeu_ps(to + first, first_lanes(weight.inputs - first),
                          widen(_mm512_castsi512_si256(pairs)));
    _mm512_mask_storeu_ps(to + first + 16, first_lanes(weight.inputs - first - 16),
                          widen(_mm512_extracti64x4_epi64(pairs, 1)));
  }
}

// to = x with each pair (x[i], x[i + size / 2]) turned by the angle of its position.
void rotate(const float* x, const float* cosines, const float* sines, int size, bf16* to) {
  const int half = size / 2;
  for (int i = 0; i < half; i += 16) {
    const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + half + i);
    const __m512 c = _mm512_loadu_ps(cosines + i), s = _mm512_loadu_ps(sines + i);
    store_bf16(to + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store_bf16(to + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

class Step {
 public:
  Step(Engine& engine, const HeadraceModel& model, int num_tokens)
      : engine_(engine), model_(model), next_blocks_(model.num_layers) {
    const auto& layer = model.layers[0];
    query_width_ = model.num_heads * model.size;
    qkv_width_ = (model.num_heads + 2 * model.num_kv_heads) * model.size;
    gated_width_ = static_cast<const Weight*>(layer.down)->inputs;
    residual_stride_ = round_up(model.hidden, kBlock);
    for (const void* packed : {layer.qkv, layer.out, layer.gate_up, layer.down}) {
      const auto& weight = *static_cast<const Weight*>(packed);
      num_layer_steps_ += size_t(weight.blocks) * weight.steps;
    }
    reserve(num_tokens);
  }

  // Whether these tokens, places and rows exist.
  bool accepts(int num_tokens, const int* tokens, const std::vector<Stretch>& stretches,
               int num_rows, const int* rows) const {
    const auto all_below = [](const int* numbers, int count, int limit) {
      return std::all_of(numbers, numbers + count, [&](int n) { return n >= 0 && n < limit; });
    };
    int total = 0;
    for (const auto& [first, slot, start, count] : stretches) {
      if (slot < 0 || slot >= model_.num_slots || start < 0 || count < 1) return false;
      if (count > model_.max_tokens - start) return false;
      total += count;
    }
    return total == num_tokens && num_tokens > 0 && all_below(tokens, num_tokens, model_.vocab) &&
           all_below(rows, num_rows, num_tokens);
  }

  void run(int num_tokens, const int* tokens, const std::vector<Stretch>& stretches,
           const HeadraceLowRank* const* adapters, int num_rows, const int* rows, float* logits) {
    reserve(num_tokens);
    adapters_.set(adapters, stretches, model_.num_layers);
    places_.clear();
    for (const auto& stretch : stretches)
      for (int i = 0; i < stretch.count; i++) places_.push_back({stretch.slot, stretch.start + i});
    for (auto& next : next_blocks_) next.store(0, std::memory_order_relaxed);
    Team& team = engine_.team;
    const AttentionPlan plan(stretches, model_.num_heads, model_.num_kv_heads, team.size());
    for (int thread = 0; thread < team.size(); thread++)
      team.readahead(thread).reserve(2 * stretches.size() * model_.num_kv_heads);
    team.run([&](int thread) {
      const Share share(num_tokens, thread, team.size());
      for (int t = share.first; t < share.last; t++) embed(tokens[t], residual(t));
      read_ahead(thread, num_tokens, 0, plan);
      for (int i = 0; i < model_.num_layers; i++) {
        attend(thread, share, num_tokens, i, plan);
        feed_forward(thread, share, num_tokens, i);
      }
      compute_logits(thread, num_rows, rows, logits);
    });
  }

 private:
  struct Place {
    int slot, position;
  };

  float* residual(int token) { return residual_ + size_t(token) * residual_stride_; }

  // Scratch memory for a step, touched at once.
  void reserve(int num_tokens) {
    if (num_tokens <= capacity_) return;
    const size_t rows = num_tokens + kSlackRows;
    std::vector<std::pair<void**, size_t>> parts;
    size_t total = 0;
    const auto add = [&](auto** pointer, size_t stride) {
      parts.emplace_back(reinterpret_cast<void**>(pointer), total);
      total += (rows * stride * sizeof(**pointer) + 63) / 64 * 64;
    };
    add(&residual_, residual_stride_);
    add(&qkv_, qkv_width_);
    add(&normed_, row_stride(model_.hidden));
    add(&query_, query_width_);
    add(&attended_, row_stride(query_width_));
    add(&gated_, row_stride(gated_width_));
    scratch_ = Pages(total);
    scratch_.touch(total);
    for (const auto& [pointer, offset] : parts) *pointer = scratch_.data() + offset;
    capacity_ = num_tokens;
  }

  void embed(int token, float* to) const {
    if (model_.embedding == nullptr)
      return unpack_row(*static_cast<const Weight*>(model_.head), token, to);
    const bf16* from = model_.embedding + size_t(token) * model_.hidden;
    for (int i = 0; i < model_.hidden; i += 16) {
      const __mmask16 lanes = first_lanes(model_.hidden - i);
      _mm512_mask_storeu_ps(to + i, lanes, load_bf16(from + i, lanes));
    }
  }

  // normed_ = norm(residual) for this thread's tokens; then all wait for all.
  void normalise(const Share& share, const float* weight) {
    for (int t = share.first; t < share.last; t++)
      rms_norm(residual(t), weight, model_.hidden, model_.eps,
               normed_ + size_t(t) * row_stride(model_.hidden));
    engine_.team.barrier();
  }

  Attention attention(int layer) const {
    return {model_.num_heads, model_.num_kv_heads, model_.size,
            model_.scale,     0.0f,                model_.layers[layer].window};
  }
  LayerCache cache(int layer) const {
    return {model_.layers[layer].keys, model_.layers[layer].values, model_.max_tokens};
  }

  // The products between the attention of two layers are bound by arithmetic where rows are many:
  // meanwhile memory brings what the next attention reads, which by itself would wait for it.
  void read_ahead(int thread, int num_tokens, int layer, const AttentionPlan& plan) {
    Team& team = engine_.team;
    if (layer == model_.num_layers) return team.readahead(thread).begin();
    const int rows_together = team.uses_amx() ? kMaxRowsAmx : kMaxRowsAvx;
    const size_t passes = (num_tokens + rows_together - 1) / rows_together;
    plan.read_ahead(team, thread, attention(layer), cache(layer),
                    num_layer_steps_ / team.size() * passes);
  }

  void attend(int thread, const Share& share, int num_tokens, int number,
              const AttentionPlan& plan) {
    const HeadraceLayer& layer = model_.layers[number];
    Team& team = engine_.team;
    const Attention shape = attention(number);
    const LayerCache cache = this->cache(number);
    normalise(share, layer.attention_norm);
    multiply_adapted(thread, layer.qkv, number, kQkv, normed_, num_tokens,
                     store_as_float(qkv_, qkv_width_, qkv_width_));
    team.barrier();
    for (int t = share.first; t < share.last; t++) place_token(t, layer, shape, cache);
    team.barrier();
    plan.attend(team, thread, shape, cache, {query_, query_width_, model_.size},
                {attended_, row_stride(query_width_)}, engine_.spans(thread),
                next_blocks_[number]);
    read_ahead(thread, num_tokens, number + 1, plan);
    team.barrier();
    multiply_adapted(thread, layer.out, number, kOut, attended_, num_tokens,
                     add_to_float(residual_, residual_stride_));
    team.barrier();
  }

  // From the products of a token: queries turned, keys turned and stored, values stored.
  void place_token(int token, const HeadraceLayer& layer, const Attention& shape,
                   const LayerCache& cache) {
    const auto [slot, position] = places_[token];
    const int size = model_.size;
    const float* cosines = model_.cosines + size_t(position) * size / 2;
    const float* sines = model_.sines + size_t(position) * size / 2;
    float* from = qkv_ + size_t(token) * qkv_width_;
    bf16* query = query_ + size_t(token) * query_width_;
    for (int head = 0; head < model_.num_heads; head++, from += size, query += size) {
      if (layer.query_norm != nullptr)
        rms_norm(from, layer.query_norm, size, model_.eps, from);
      rotate(from, cosines, sines, size, query);
    }
    for (int head = 0; head < model_.num_kv_heads; head++, from += size) {
      if (layer.key_norm != nullptr) rms_norm(from, layer.key_norm, size, model_.eps, from);
      const size_t at = cache.offset(shape, slot, head) + size_t(position) * size;
      rotate(from, cosines, sines, size, cache.keys + at);
      const float* value = from + model_.num_kv_heads * size;
      for (int i = 0; i < size; i += 16)
        store_bf16(cache.values + at + i, _mm512_loadu_ps(value + i));
    }
  }

  void feed_forward(int thread, const Share& share, int num_tokens, int number) {
    const HeadraceLayer& layer = model_.layers[number];
    Team& team = engine_.team;
    normalise(share, layer.mlp_norm);
    multiply_adapted(thread, layer.gate_up, number, kGateUp, normed_, num_tokens,
                     store_gated(static_cast<Activation>(model_.activation), gated_,
                                 row_stride(gated_width_)));
    team.barrier();
    multiply_adapted(thread, layer.down, number, kDown, gated_, num_tokens,
                     add_to_float(residual_, residual_stride_));
    team.barrier();
  }

  // The product of a layer's weight, and what the adapters of the step add to it.
  template <class Epilogue>
  void multiply_adapted(int thread, const void* packed, int layer, int which, const bf16* a,
                        int rows, Epilogue epilogue) {
    Team& team = engine_.team;
    const Weight& weight = *static_cast<const Weight*>(packed);
    if (!adapters_.any()) return multiply(team, thread, weight, a, rows, epilogue);
    const int number = layer * kAdapted + which;
    adapters_.shrink(thread, team.size(), number, a, weight.inputs);
    team.barrier();
    multiply(team, thread, weight, a, rows, [=, this](int row, int block, __m512 left,
                                                      __m512 right) {
      if (const HeadraceLowRank* adapter = adapters_.of_row(row, number)) {
        const bf16* shrunk = adapters_.shrunk(row);
        const auto [part, tile] = locate(which, block);
        left = expand(left, adapter->parts[part], tile, shrunk);
        right = which == kGateUp ? expand(right, adapter->parts[1], tile, shrunk)
                                 : expand(right, adapter->parts[part], tile + 1, shrunk);
      }
      epilogue(row, block, left, right);
    });
  }

  struct Location {
    int part, tile;
  };

  // Which linear the left half of a block belongs to, and which of its tiles of 16 outputs it is.
  // Heads are multiples of 32 wide, so both halves of a block of q, k and v are of one of them.
  Location locate(int which, int block) const {
    if (which == kGateUp) return {0, block};
    const int tile = block * 2;
    if (which != kQkv) return {0, tile};
    const int queries = query_width_ / 16, keys = model_.num_kv_heads * model_.size / 16;
    if (tile < queries) return {0, tile};
    if (tile < queries + keys) return {1, tile - queries};
    return {2, tile - queries - keys};
  }

  void compute_logits(int thread, int num_rows, const int* rows, float* logits) {
    Team& team = engine_.team;
    const Share share(num_rows, thread, team.size());
    for (int i = share.first; i < share.last; i++)
      rms_norm(residual(rows[i]), model_.last_norm, model_.hidden, model_.eps,
               normed_ + size_t(i) * row_stride(model_.hidden));
    team.barrier();
    multiply(team, thread, *static_cast<const Weight*>(model_.head), normed_, num_rows,
             store_as_float(logits, model_.vocab, model_.vocab));
  }

  Engine& engine_;
  const HeadraceModel model_;
  int query_width_, qkv_width_, gated_width_, residual_stride_;
  size_t num_layer_steps_ = 0;  // of a layer's products, one pass over each weight
  int capacity_ = 0;  // tokens that the scratch memory holds
  Pages scratch_;
  // Per token. Rows of bf16 that a product reads lie row_stride() apart.
  float *residual_, *qkv_;
  bf16 *normed_, *query_, *attended_, *gated_;
  std::vector<Place> places_;
  StepAdapters adapters_;
  std::vector<std::atomic<int>> next_blocks_;  // per layer; see AttentionPlan::attend
};

// ---- 10. the C ABI ------------------------------------------------------------------------------

// Runs `work`; false where memory or threads could not be had.
template <class Work>
bool succeeds(Work work) noexcept {
  try {
    work();
    return true;
  } catch (...) {
    return false;
  }
}

std::vector<Stretch> stretches_of(int count, const int* slots, const int* starts,
                                  const int* counts) {
  std::vector<Stretch> stretches;
  for (int i = 0, token = 0; i < count; token += counts[i++])
    stretches.push_back({token, slots[i], starts[i], counts[i]});
  return stretches;
}

}  // namespace

extern "C" {

enum { kHasAvx512 = 1, kHasAmx = 2 };

// Which of our instructions this processor and system allow. Compiled for any x86-64, unlike the
// rest, because it is called to find out whether the rest may be.
__attribute__((target("no-avx"))) int headrace_features() {
  __builtin_cpu_init();
  int features = 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"))
    features |= kHasAvx512;
#ifdef HEADRACE_EMULATE_AMX
  features |= kHasAmx;
#else
  // Linux gives a process the tiles when it asks; an older kernel, or one without AMX, says no.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
    features |= kHasAmx;
#endif
  return features;
}

// Null where threads or memory could not be had.
void* headrace_engine_new(int num_threads, int use_amx) {
  Engine* engine = nullptr;
  succeeds([&] { engine = new Engine(num_threads, use_amx != 0); });
  return engine;
}

void headrace_engine_free(void* engine) { delete static_cast<Engine*>(engine); }

// Packs rows [outputs, inputs], or two such (gate and up), as they are or quantized; biases are
// float or null. Lives as long as the engine. Null where memory could not be had.
const void* headrace_weight_new(void* engine, int outputs, int inputs, const bf16* rows,
                                const bf16* other, const float* bias, const float* other_bias,
                                int is_quantized) {
  auto& e = *static_cast<Engine*>(engine);
  const void* weight = nullptr;
  succeeds([&] {
    weight = e.keep(
        pack(e.team, outputs, inputs, {rows, other, bias, other_bias}, is_quantized != 0));
  });
  return weight;
}

// x [rows, inputs] -> one of bf16 or float [rows, outputs]; the other is null.
int headrace_linear(void* engine, const void* weight, const bf16* x, int rows, bf16* to,
                    float* to_float) {
  return succeeds([&] {
    const auto& packed = *static_cast<const Weight*>(weight);
    static_cast<Engine*>(engine)->linear(packed, x, rows, to, to_float);
  });
}

int headrace_gated_mlp(void* engine, const void* gate_up, const void* down, int activation,
                       const bf16* x, int rows, bf16* to) {
  return succeeds([&] {
    static_cast<Engine*>(engine)->gated_mlp(*static_cast<const Weight*>(gate_up),
                                            *static_cast<const Weight*>(down),
                                            static_cast<Activation>(activation), x, rows, to);
  });
}

// activation(gate(x) + more_gate) * (up(x) + more_up); `more` and the answer are [rows, outputs].
int headrace_gate(void* engine, const void* gate_up, int activation, const bf16* x, int rows,
                  const float* more_gate, const float* more_up, bf16* to) {
  return succeeds([&] {
    static_cast<Engine*>(engine)->gate(*static_cast<const Weight*>(gate_up),
                                       static_cast<Activation>(activation), x, rows, more_gate,
                                       more_up, to);
  });
}

// x [rows, width] -> [rows, width].
void headrace_rms_norm(void* engine, const bf16* x, const float* weight, int rows, int width,
                       float eps, bf16* to) {
  static_cast<Engine*>(engine)->for_rows(rows, width, [&](int row) {
    rms_norm(x + size_t(row) * width, weight, width, eps, to + size_t(row) * width);
  });
}

void headrace_layer_norm(void* engine, const bf16* x, const float* weight, const float* bias,
                         int rows, int width, float eps, bf16* to) {
  static_cast<Engine*>(engine)->for_rows(rows, width, [&](int row) {
    layer_norm(x + size_t(row) * width, weight, bias, width, eps, to + size_t(row) * width);
  });
}

struct HeadraceAttention {
  int num_heads, num_kv_heads, size, window, max_tokens;
  float scale, softcap;
  bf16 *keys, *values;  // [slot, kv head, max_tokens, size]
};

struct HeadraceVectors {
  const bf16* data;
  ptrdiff_t token_stride, head_stride;
};

// Writes the new keys and values of `count` stretches into the cache, then lets every token see its
// sequence up to itself. Tokens stand in the order of the stretches; out is [tokens, heads, size].
int headrace_attend(void* engine, const HeadraceAttention* layer, int count, const int* slots,
                    const int* starts, const int* counts, const HeadraceVectors* query,
                    const HeadraceVectors* keys, const HeadraceVectors* values, bf16* out) {
  const auto vectors = [](const HeadraceVectors* v) {
    return TokenVectors{v->data, v->token_stride, v->head_stride};
  };
  return succeeds([&] {
    const Attention shape{layer->num_heads, layer->num_kv_heads, layer->size,
                          layer->scale,     layer->softcap,      layer->window};
    static_cast<Engine*>(engine)->attend(
        shape, {layer->keys, layer->values, layer->max_tokens},
        stretches_of(count, slots, starts, counts), vectors(query), vectors(keys), vectors(values),
        {out, ptrdiff_t{shape.num_heads} * shape.size});
  });
}

// Chooses a token for each row of logits [rows, vocab], which are bf16 or float and stay as they are.
int headrace_sample(void* engine, const void* logits, int is_bf16, int rows, int vocab,
                    HeadraceSamplingRow* asked) {
  auto& e = *static_cast<Engine*>(engine);
  return succeeds([&] {
    if (is_bf16)
      e.sample(static_cast<const bf16*>(logits), rows, vocab, asked);
    else
      e.sample(static_cast<const float*>(logits), rows, vocab, asked);
  });
}

// A model's step on this engine, with scratch memory for `num_tokens` at first. `model` is copied;
// what it points to must outlive the step. Null where memory could not be had.
void* headrace_step_new(void* engine, const HeadraceModel* model, int num_tokens) {
  Step* step = nullptr;
  succeeds([&] { step = new Step(*static_cast<Engine*>(engine), *model, num_tokens); });
  return step;
}

void headrace_step_free(void* step) { delete static_cast<Step*>(step); }

enum { kDone = 0, kNoMemory = 1, kUnknownPlace = 2 };

// Computes the tokens of `count` stretches, in their order, and writes the logits of `rows` among
// them, [num_rows, vocab]. `adapters` is null, or has one adapter per stretch or null for none.
int headrace_step_run(void* step, int num_tokens, const int* tokens, int count, const int* slots,
                      const int* starts, const int* counts,
                      const HeadraceLowRank* const* adapters, int num_rows, const int* rows,
                      float* logits) {
  auto& s = *static_cast<Step*>(step);
  int result = kNoMemory;
  succeeds([&] {
    const std::vector<Stretch> stretches = stretches_of(count, slots, starts, counts);
    if (!s.accepts(num_tokens, tokens, stretches, num_rows, rows)) {
      result = kUnknownPlace;
      return;
    }
    s.run(num_tokens, tokens, stretches, adapters, num_rows, rows, logits);
    result = kDone;
  });
  return result;
}

}  // extern "C"
