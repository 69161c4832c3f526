// Kernels for any processor of the family: SSE2 on x86-64, NEON on 64-bit Arm.
#include "lapefast/kernels.h"

namespace lapefast::baseline {
namespace {
constexpr int lanes = 4;
#include "vector.inc"

F exp_half(F x) { return exp_exact(x); }

F widen_half(HalfBits bits) { return widen_half_portable(bits); }
HalfBits narrow_half(F values) { return narrow_half_portable(values); }

bool any(I mask) {
  const L pairs = (L)mask;
  return (pairs[0] | pairs[1]) != 0;
}

#include "kernels.inc"
}  // namespace

#if defined(__aarch64__)
extern const Kernels kernels = {"neon", profile, edit};
#else
extern const Kernels kernels = {"baseline", profile, edit};
#endif

}  // namespace lapefast::baseline
