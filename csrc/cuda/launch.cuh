// From a call to the kernel compiled for it and to how many threads run it.
#pragma once

#include <stdexcept>
#include <string>

#include "edit.cuh"
#include "lapefast/cuda.h"
#include "profile.cuh"

namespace lapefast::cuda {

#ifndef LAPEFAST_CUDA_ON_CPU
inline void expect_success(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA could not ") + what + ": " +
                             cudaGetErrorString(status) + ".");
}

// Kernels are launched by this function alone; csrc/tests/cuda_on_cpu.h has another.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), unsigned blocks, Stream stream, Parameters... values) {
  void* arguments[] = {&values...};
  expect_success(
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(lanes, warps),
                       arguments, 0, static_cast<cudaStream_t>(stream.handle)),
      "launch a kernel");
}
#endif

// Whether 16 bytes at a time can be read and written: every row starts at a multiple of them, and
// none ends within.
template <class Format>
bool aligned(std::int64_t width, std::initializer_list<Rows> all) {
  constexpr int count = per_vector<Format>;
  if (width % count) return false;
  for (const Rows& rows : all)
    if (reinterpret_cast<std::uintptr_t>(rows.data) % 16 || rows.stride % count) return false;
  return true;
}

inline std::int64_t tiles_of(std::int64_t width, int count) {
  return (width + lanes * count - 1) / (lanes * count);
}

// Rows per warp, so that about 32 warps for each multiprocessor have one run each, within bounds.
inline int run_length(std::int64_t rows, std::int64_t tiles, int processors, int low, int high) {
  const std::int64_t even = rows * tiles / (static_cast<std::int64_t>(processors) * 32);
  return static_cast<int>(even < low ? low : even > high ? high : even);
}

inline unsigned blocks_of(std::int64_t rows, std::int64_t tiles, int run) {
  const std::int64_t per_block = static_cast<std::int64_t>(warps) * run;
  const std::int64_t blocks = (rows + per_block - 1) / per_block * tiles;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("the input is too large for one launch of a GPU kernel.");
  return static_cast<unsigned>(blocks);
}

// Kernels are compiled for each activation where models compute it in the kernel: in half
// precision. In float32 their own module does.
template <class Format, Activation activation>
using Compiled = std::conditional_t<Format::is_half || activation == Activation::identity,
                                    Known<activation>, Asked>;

// And for what is wanted of the statistics where that is most of the work.
template <class Chosen, bool gated>
constexpr Wanted compiled_for(Wanted wanted) {
  constexpr bool identity = std::is_same_v<Chosen, Known<Activation::identity>>;
  constexpr bool silu = std::is_same_v<Chosen, Known<Activation::silu>>;
  if (gated && (identity || silu)) return wanted;
  if (std::is_same_v<Chosen, Asked> || !(gated || identity)) return Wanted::any;
  return wanted == Wanted::counts ? Wanted::counts : Wanted::any;
}

template <class Format, class Chosen, bool gated, Wanted wanted, int count>
void launch_profile(const ProfileCall& call, Stream stream) {
  const std::int64_t tiles = tiles_of(call.width, count);
  // A run with sums stays within one chunk of the rows: 16, 32 or 64 of them.
  const bool sums = has_sums(wanted);
  int run = run_length(call.rows, tiles, stream.processors, 16, sums ? chunk_rows : 1024);
  if (sums) run = run < 32 ? 16 : run < 64 ? 32 : 64;
  launch(profile_kernel<Format, Chosen, gated, wanted, count>, blocks_of(call.rows, tiles, run),
         stream, call, run);
}

template <class Format, Activation activation, bool gated>
void launch_profile(const ProfileCall& call, Stream stream) {
  constexpr int count = per_vector<Format>;
  using Chosen = Compiled<Format, activation>;
  if (!aligned<Format>(call.width, {call.gate, call.up, call.product}))
    return launch_profile<Format, Asked, gated, Wanted::any, 1>(call, stream);
  const Statistics& s = call.statistics;
  const Wanted wanted = compiled_for<Chosen, gated>(s.square_sums || s.up_abs_sums ? Wanted::any
                                                    : s.sums   ? Wanted::counts_and_sums
                                                    : s.counts ? Wanted::counts
                                                               : Wanted::none);
#define LAPEFAST_CASE(one)                               \
  if constexpr (compiled_for<Chosen, gated>(one) == one) \
    if (wanted == one) return launch_profile<Format, Chosen, gated, one, count>(call, stream)
  LAPEFAST_CASE(Wanted::none);
  LAPEFAST_CASE(Wanted::counts);
  LAPEFAST_CASE(Wanted::counts_and_sums);
  LAPEFAST_CASE(Wanted::any);
#undef LAPEFAST_CASE
}

template <class Format, Activation activation>
void launch_edit(const EditCall& call, Stream stream) {
  constexpr int vector = per_vector<Format>;
  const bool whole = aligned<Format>(call.width, {call.gate, call.up, call.product});
  const std::int64_t tiles = tiles_of(call.width, whole ? vector : 1);
  // Few rows are a step of decoding: as many warps as there are rows, for the shortest wait.
  const int run = call.rows <= 64 ? 1 : run_length(call.rows, tiles, stream.processors, 8, 64);
  launch(whole ? edit_kernel<Format, Compiled<Format, activation>, vector>
               : edit_kernel<Format, Asked, 1>,
         blocks_of(call.rows, tiles, run), stream, call, run);
}

// Calls `body` with the activation as a constant.
template <class Body>
void with_activation(Activation activation, const Body& body) {
#define LAPEFAST_CASE(name) \
  case Activation::name:    \
    return body(std::integral_constant<Activation, Activation::name>{})
  switch (activation) {
    LAPEFAST_CASE(identity);
    LAPEFAST_CASE(silu);
    LAPEFAST_CASE(relu);
    LAPEFAST_CASE(relu_squared);
    LAPEFAST_CASE(gelu);
    LAPEFAST_CASE(gelu_tanh);
    LAPEFAST_CASE(gelu_new);
    LAPEFAST_CASE(quick_gelu);
  }
#undef LAPEFAST_CASE
}

template <class Format>
void profile_as(const ProfileCall& call, Stream stream) {
  with_activation(call.activation, [&](auto activation) {
    if (call.up.data)
      launch_profile<Format, activation.value, true>(call, stream);
    else
      launch_profile<Format, activation.value, false>(call, stream);
  });
}

template <class Format>
void edit_as(const EditCall& call, Stream stream) {
  with_activation(call.activation,
                  [&](auto activation) { launch_edit<Format, activation.value>(call, stream); });
}

// Each in a file of its own, which compiles beside the others.
extern template void profile_as<Float32>(const ProfileCall&, Stream);
extern template void profile_as<Float16>(const ProfileCall&, Stream);
extern template void profile_as<BFloat16>(const ProfileCall&, Stream);
extern template void edit_as<Float32>(const EditCall&, Stream);
extern template void edit_as<Float16>(const EditCall&, Stream);
extern template void edit_as<BFloat16>(const EditCall&, Stream);

}  // namespace lapefast::cuda
