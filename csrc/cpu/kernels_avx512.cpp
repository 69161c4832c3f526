// Kernels for AVX-512 F, BW, VL and DQ.
#include <immintrin.h>

#include "lapefast/kernels.h"

namespace lapefast::avx512 {
namespace {
constexpr int lanes = 16;
#include "vector.inc"

F widen_half(HalfBits bits) { return (F)_mm512_cvtph_ps((__m256i)bits); }
HalfBits narrow_half(F values) {
  return (HalfBits)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
}

F multiply_add(F x, F y, F z) { return (F)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
// 0 for an infinite x.
F fraction(F x) { return (F)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
F times_power_of_two(F x, F n) { return (F)_mm512_scalef_ps((__m512)x, (__m512)n); }

#include "exponentials.inc"

// x, or +-104 with its sign: beyond, e^x is infinite or vanishes beside 1.
F limited(F x) {
  constexpr int smaller_magnitude_sign_of_first = 2;
  return (F)_mm512_range_ps((__m512)x, (__m512)splat(104.0f), smaller_magnitude_sign_of_first);
}

// The fraction taken by one instruction is 1.4 times faster here than clamping, rounding and a
// fused subtraction.
LAPEFAST_INLINE Pair exp_bfloat16(Pair x) { return fused_exp_bfloat16(x); }
LAPEFAST_INLINE Pair exp_float16(Pair x) { return fused_exp_float16({limited(x.a), limited(x.b)}); }

U count_above(U counts, Pair values, float threshold) {
  const __m512 limit = (__m512)splat(threshold);
  const __mmask16 a = _mm512_cmp_ps_mask((__m512)values.a, limit, _CMP_GT_OQ);
  const __mmask16 b = _mm512_cmp_ps_mask((__m512)values.b, limit, _CMP_GT_OQ);
  __m512i sum = _mm512_mask_add_epi32((__m512i)counts, a, (__m512i)counts, _mm512_set1_epi32(1));
  return (U)_mm512_mask_add_epi32(sum, b, sum, _mm512_set1_epi32(0x10000));
}
using Nonfinite = __mmask16;
Nonfinite nonfinite_lanes(Pair values) {
  constexpr int infinite_or_nan = 0x99;
  return _mm512_fpclass_ps_mask((__m512)values.a, infinite_or_nan) |
         _mm512_fpclass_ps_mask((__m512)values.b, infinite_or_nan);
}
bool any(Nonfinite lanes_found) { return lanes_found != 0; }

#include "kernels.inc"
#include "leave_one_out.inc"
}  // namespace

extern const Kernels kernels = {"avx512", profile, edit, leave_one_out};

}  // namespace lapefast::avx512
