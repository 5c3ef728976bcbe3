// The AMX instructions that kernels.cpp uses, in software: eight tiles of 16 rows x 64 bytes per
// thread. Lets the logic of that path run on any machine; a use that the processor would refuse
// (tiles not configured, another shape) ends the process.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

constexpr int kRows = 16, kBytes = 64, kFloats = 16;

struct State {
  bool is_configured = false;
  unsigned char tiles[8][kRows][kBytes];
};

inline thread_local State state;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline unsigned char (&tile(int number))[kRows][kBytes] {
  require(state.is_configured, "a tile is used before it is configured");
  return state.tiles[number];
}

// Intel's manual, "LDTILECFG": byte 0 palette, bytes 16-47 bytes per row, 48-63 rows.
inline void configure(const void* from) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  require(bytes[0] == 1, "palette 1 is the only one");
  for (int i = 0; i < 8; i++) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, sizeof width);
    require(width == kBytes && bytes[48 + i] == kRows, "only whole tiles are emulated");
  }
  // The real ones are zero here; garbage finds whoever relies on that.
  std::memset(state.tiles, 0x7f, sizeof state.tiles);
  state.is_configured = true;
}

inline void release() { state.is_configured = false; }

inline void zero(int number) { std::memset(tile(number), 0, sizeof state.tiles[0]); }

inline void load(int number, const void* from, size_t stride) {
  for (int row = 0; row < kRows; row++)
    std::memcpy(tile(number)[row], static_cast<const char*>(from) + row * stride, kBytes);
}

inline void store(int number, void* to, size_t stride) {
  for (int row = 0; row < kRows; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, tile(number)[row], kBytes);
}

inline float bf16(const unsigned char* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Intel's manual, "TDPBF16PS": sums[m][n] += a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1].
inline void multiply(int sums, int a, int b) {
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < kFloats; n++) {
      float sum;
      std::memcpy(&sum, tile(sums)[m] + 4 * n, sizeof sum);
      for (int k = 0; k < kRows; k++) {
        const unsigned char *left = tile(a)[m] + 4 * k, *right = tile(b)[k] + 4 * n;
        sum += bf16(left) * bf16(right) + bf16(left + 2) * bf16(right + 2);
      }
      std::memcpy(tile(sums)[m] + 4 * n, &sum, sizeof sum);
    }
}

}  // namespace emulated_amx

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::configure
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply
