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

Pair exp_bfloat16(Pair x) { return exp_exact(x); }
Pair exp_float16(Pair x) { return exp_exact(x); }
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
