// Kernels for AVX-512 F, BW, VL and DQ.
#include <immintrin.h>

#include "lapefast/kernels.h"

namespace lapefast::avx512 {
namespace {
constexpr int lanes = 16;
#include "vector.inc"

F exp_half(F x) { return exp_exact(x); }

F widen_half(HalfBits bits) { return (F)_mm512_cvtph_ps((__m256i)bits); }
HalfBits narrow_half(F values) {
  return (HalfBits)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
}

bool any(I mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

#include "kernels.inc"
}  // namespace

extern const Kernels kernels = {"avx512", profile, edit};

}  // namespace lapefast::avx512
