// Kernels with one property each, for test_sass.py.
#include <cstdint>

using Half = unsigned short;

__device__ uint4 combined(uint4 a, uint4 b) {
  return {a.x ^ b.x, a.y + b.y, a.z & b.z, a.w - b.w};
}

#define WALK                                                                        \
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < vectors; \
       i += int64_t(gridDim.x) * blockDim.x)

extern "C" {

__global__ void wide(const uint4* gate, const uint4* up, uint4* product, int64_t vectors) {
#pragma unroll 1
  WALK __stcg(product + i, combined(__ldg(gate + i), __ldg(up + i)));
}

__global__ void unrolled(const uint4* gate, const uint4* up, uint4* product, int64_t vectors) {
#pragma unroll 2
  WALK __stcg(product + i, combined(__ldg(gate + i), __ldg(up + i)));
}

__global__ void without_loop(const uint4* gate, const uint4* up, uint4* product) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  __stcg(product + i, combined(__ldg(gate + i), __ldg(up + i)));
}

__global__ void narrow_store(const uint4* gate, const uint4* up, uint2* product, int64_t vectors) {
#pragma unroll 1
  WALK {
    const uint4 result = combined(__ldg(gate + i), __ldg(up + i));
    __stcg(product + 2 * i, make_uint2(result.x, result.y));
    __stcg(product + 2 * i + 1, make_uint2(result.z, result.w));
  }
}

__global__ void narrow_load(const uint4* gate, const unsigned* up, uint4* product,
                            int64_t vectors) {
#pragma unroll 1
  WALK {
    const uint4 other = {__ldg(up + 4 * i), __ldg(up + 4 * i + 1), __ldg(up + 4 * i + 2),
                         __ldg(up + 4 * i + 3)};
    __stcg(product + i, combined(__ldg(gate + i), other));
  }
}

__global__ void element_wise(const Half* gate, const Half* up, Half* product, int64_t vectors) {
#pragma unroll 1
  WALK product[i] = gate[i] ^ up[i];
}

// 32 registers for 48 values that live through the loop.
__global__ void __launch_bounds__(1024, 2) spilling(const uint4* gate, const uint4* up,
                                                    uint4* product, int64_t vectors,
                                                    unsigned* sums) {
  unsigned sum[48] = {};
#pragma unroll 1
  WALK {
    const uint4 result = combined(__ldg(gate + i), __ldg(up + i));
    __stcg(product + i, result);
#pragma unroll
    for (int j = 0; j < 48; ++j) sum[j] += __funnelshift_l(result.x, result.y, j) * result.z;
  }
#pragma unroll
  for (int j = 0; j < 48; ++j) atomicAdd(sums + j, sum[j]);
}

__global__ void stack_array(const uint4* gate, const uint4* up, uint4* product, int64_t vectors,
                            const int* order, unsigned* sums) {
  unsigned seen[16] = {};
#pragma unroll 1
  WALK {
    const uint4 result = combined(__ldg(gate + i), __ldg(up + i));
    __stcg(product + i, result);
    seen[order[i] & 15] += result.x;
  }
  for (int j = 0; j < 16; ++j) atomicAdd(sums + j, seen[j]);
}

__global__ void fenced(const uint4* gate, const uint4* up, uint4* product, int64_t vectors,
                       int* done) {
#pragma unroll 1
  WALK __stcg(product + i, combined(__ldg(gate + i), __ldg(up + i)));
  __threadfence();
  atomicAdd(done, 1);
}

// What a row may need and mostly does not: a search when its index changes, a slow division.
__global__ void detours(const float4* gate, const float4* up, float4* product, int64_t vectors,
                        const int* groups, const int* lists, unsigned long long* counts) {
  int held = -1;
  int64_t found = 0;
#pragma unroll 1
  WALK {
    const int group = __ldg(groups + i);
    const float4 a = __ldg(gate + i), b = __ldg(up + i);
    if (group != held) {
      atomicAdd(counts + found, 1ull);
#pragma unroll 1
      for (found = 0; __ldg(lists + found) < group; found = 2 * found + 1);
      held = group;
    }
    __stcg(product + i, make_float4(a.x / b.x, a.y / b.y, a.z / b.z, a.w / b.w));
  }
}

// A call at every row.
__device__ __noinline__ unsigned mixed(unsigned x) {
  for (int i = 0; i < (x & 31); ++i) x = x * 1664525u + 1013904223u;
  return x;
}

__global__ void calling(const uint4* gate, const uint4* up, uint4* product, int64_t vectors) {
#pragma unroll 1
  WALK {
    uint4 result = combined(__ldg(gate + i), __ldg(up + i));
    result.x = mixed(result.x);
    __stcg(product + i, result);
  }
}
}
