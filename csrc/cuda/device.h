// What a kernel needs of the machine: memory accesses of fixed width, conversions and atomics.
//
// The only file with inline PTX. Every function has a body for the host too, so that the kernels,
// unchanged, also run on a CPU (csrc/tests/cuda_on_cpu.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef LAPEFAST_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

namespace lapefast::cuda {

// 16 bytes of a row as they lie in memory.
struct __attribute__((aligned(16), may_alias)) Words {
  std::uint32_t at[4];
};

// Streaming: what is read here is not read again soon. Not the read-only path, as the product may
// be written over gate.
__device__ inline Words load_words(const void* address) {
#ifdef __CUDA_ARCH__
  const uint4 read = __ldcs(static_cast<const uint4*>(address));
  return {{read.x, read.y, read.z, read.w}};
#else
  return *static_cast<const Words*>(address);
#endif
}

// Kept in the second-level cache, where the last projection finds it. A plain assignment of 16
// bytes may be compiled to four stores.
__device__ inline void store_words(void* address, const Words& words) {
#ifdef __CUDA_ARCH__
  __stcg(static_cast<uint4*>(address),
         make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]));
#else
  *static_cast<Words*>(address) = words;
#endif
}

__device__ inline std::uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__device__ inline float float_of(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Two floats to the nearest bfloat16, ties to even; `low` in the lower half.
__device__ inline std::uint32_t pack_bfloat16(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto nearest = [](float value) -> std::uint32_t {
    const std::uint32_t bits = bits_of(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return nearest(low) | nearest(high) << 16;
#endif
}

// Two floats to the nearest binary16, ties to even; `low` in the lower half.
__device__ inline std::uint32_t pack_float16(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  const auto nearest = [](float value) -> std::uint32_t {
    const _Float16 half = static_cast<_Float16>(value);
    std::uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
  };
  return nearest(low) | nearest(high) << 16;
#endif
}

// The binary16 in the lower 16 bits.
__device__ inline float widen_float16(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<std::uint16_t>(bits)));
  return value;
#else
  const std::uint16_t low = static_cast<std::uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &low, sizeof half);
  return static_cast<float>(half);
#endif
}

// 1 / x within one unit in the last place, in one instruction; 0 where that is below 2^-126.
__device__ inline float reciprocal_nearly(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = 1.0f / x;
  return fabsf(result) < 0x1p-126f ? copysignf(0.0f, result) : result;
#endif
}

// 2^x within two units in the last place, in one instruction; 0 where that is below 2^-126.
__device__ inline float exp2_nearly(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
#endif
}

__device__ inline void add(std::int64_t* to, std::int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
__device__ inline void add(double* to, double value) { atomicAdd(to, value); }

}  // namespace lapefast::cuda
