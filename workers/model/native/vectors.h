// Vectors of 16 floats: what the kernels' sources share. Compiled with AVX512 only.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace headrace {

using bf16 = uint16_t;  // the upper half of a float32

constexpr __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

inline __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 load_bf16(const bf16* from, __mmask16 lanes = 0xffff) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from));
}

// exp(x) = 2^n * 2^f with n whole and |f| <= 1/2; relative error below 2e-7. NaN stays NaN.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // a NaN in the second operand is returned
  x = _mm512_min_ps(_mm512_set1_ps(88.5f), x);
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);  // Taylor coefficients of 2^f: ln(2)^k / k!
  for (float c : {1.33335581e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.240226507f, 0.69314718f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

}  // namespace headrace
