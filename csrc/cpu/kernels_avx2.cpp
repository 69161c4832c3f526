// Kernels for AVX2, FMA and F16C.
#include <immintrin.h>

#include "lapefast/kernels.h"

namespace lapefast::avx2 {
namespace {
constexpr int lanes = 8;
#include "vector.inc"

F widen_half(HalfBits bits) { return (F)_mm256_cvtph_ps((__m128i)bits); }
HalfBits narrow_half(F values) {
  return (HalfBits)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
}

F multiply_add(F x, F y, F z) { return (F)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
F fraction(F x) { return x - ((x + shifter) - shifter); }
// 2^n as 2 * 2^(n - 1): n reaches 128 before the result overflows.
F times_power_of_two(F x, F n) { return (x + x) * (F)(((U)(n + shifter) + 126u) << 23); }

#include "exponentials.inc"

// x within what these can take; NaN stays NaN. Beyond, e^x is infinite or vanishes beside 1.
F limited(F x) {
  return (F)_mm256_max_ps((__m256)splat(-86.0f), _mm256_min_ps((__m256)splat(89.0f), (__m256)x));
}

LAPEFAST_INLINE Pair exp_bfloat16(Pair x) {
  return fused_exp_bfloat16({limited(x.a), limited(x.b)});
}
LAPEFAST_INLINE Pair exp_float16(Pair x) { return fused_exp_float16({limited(x.a), limited(x.b)}); }
U count_above(U counts, Pair values, float threshold) {
  return count_above_portable(counts, values, threshold);
}
using Nonfinite = I;
I nonfinite_lanes(Pair values) { return nonfinite_lanes_portable(values); }
bool any(I mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }

#include "kernels.inc"
#include "leave_one_out.inc"
}  // namespace

extern const Kernels kernels = {"avx2", profile, edit, leave_one_out};

}  // namespace lapefast::avx2
