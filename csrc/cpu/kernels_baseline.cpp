// Kernels for any processor of the family: SSE2 on x86-64, NEON on 64-bit Arm.
#include "lapefast/kernels.h"

namespace lapefast::baseline {
namespace {
constexpr int lanes = 4;
#include "vector.inc"

F widen_half(HalfBits bits) { return widen_half_portable(bits); }
HalfBits narrow_half(F values) { return narrow_half_portable(values); }

LAPEFAST_INLINE Pair exp_bfloat16(Pair x) { return exp_exact(x); }
LAPEFAST_INLINE Pair exp_float16(Pair x) { return exp_exact(x); }
U count_above(U counts, Pair values, float threshold) {
  return count_above_portable(counts, values, threshold);
}
using Nonfinite = I;
I nonfinite_lanes(Pair values) { return nonfinite_lanes_portable(values); }
bool any(I mask) {
  const L words = (L)mask;
  return (words[0] | words[1]) != 0;
}

#include "kernels.inc"
#include "leave_one_out.inc"
}  // namespace

#if defined(__aarch64__)
extern const Kernels kernels = {"neon", profile, edit, leave_one_out};
#else
extern const Kernels kernels = {"baseline", profile, edit, leave_one_out};
#endif

}  // namespace lapefast::baseline
