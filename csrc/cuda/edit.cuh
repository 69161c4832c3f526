// The edit kernel: the product for every row, some neurons' activations edited on the way.
//
// A lane keeps the edits of its columns in registers for as long as the rows that its warp walks
// down are of one set, and looks them up in the set's sorted list where the set changes.
#pragma once

#include "activations.cuh"
#include "walk.cuh"

namespace lapefast::cuda {

template <int count>
struct LaneEdits {
  std::uint32_t chosen = 0;  // a bit per column
  float scale[count], shift[count];
};

__device__ inline std::int32_t clamp(std::int64_t value, std::int64_t low, std::int64_t high) {
  return static_cast<std::int32_t>(value < low ? low : value > high ? high : value);
}

// The edits of `set` for this lane's columns. What the tables hold never becomes an address
// without a comparison: they may be anything.
template <int count>
__device__ __forceinline__ void look_up(const EditCall& call, std::int32_t set, std::int64_t column,
                                        LaneEdits<count>& edits) {
  edits.chosen = 0;
  if (set < 0) return;
  std::int32_t start = clamp(call.offsets[set], 0, call.capacity);
  const std::int32_t stop = clamp(call.offsets[set + 1], start, call.capacity);
#pragma unroll 1
  for (std::int32_t end = stop; start < end;) {
    const std::int32_t middle = start + (end - start) / 2;
    if (call.neurons[middle] < column)
      start = middle + 1;
    else
      end = middle;
  }
#pragma unroll 1
  for (; start < stop; ++start) {
    const std::int64_t ahead = call.neurons[start] - column;
    if (ahead < 0 || ahead >= count) return;
    const int offset = static_cast<int>(ahead);
    const float scale = call.scale[start], shift = call.shift[start];
    // Not indexed by `offset`, which would put the arrays into memory.
#pragma unroll
    for (int at = 0; at < count; ++at)
      if (offset == at) {
        edits.scale[at] = scale;
        edits.shift[at] = shift;
      }
    edits.chosen |= 1u << offset;
  }
}

// Counts the used entries that name no neuron, each by one thread of the grid.
__device__ inline void check_entries(const EditCall& call) {
  const std::int32_t used = clamp(call.offsets[call.set_count], 0, call.capacity);
  const std::int64_t thread = threadIdx.y * lanes + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * lanes * warps;
  for (std::int64_t entry = static_cast<std::int64_t>(blockIdx.x) * lanes * warps + thread;
       entry < used; entry += threads)
    if (call.neurons[entry] < 0 || call.neurons[entry] >= call.width) add(call.flags + 1, 1);
}

template <class Format, class Chosen, int count>
__global__ void __launch_bounds__(lanes* warps) edit_kernel(const EditCall call, const int run) {
  using Vector = Elements<Format, count>;
  const Place at = place<count>(call.rows, call.width, run);
  check_entries(call);
  if (at.column >= call.width) return;
  LaneEdits<count> edits;
  std::int32_t held = -1;  // the set whose edits `edits` holds
  Indices sets(call.sets, call.set_count, at);
  Cursor<Format> gate_at(call.gate, at), up_at(call.up, at), made_at(call.product, at);
  for (std::int64_t row = at.first_row; row < at.end_row; ++row) {
    const Vector gate = Vector::load(gate_at.ahead(0));
    Vector up;
    if (call.up.data) up = Vector::load(up_at.ahead(0));
    const std::int32_t set = sets.of(row);
    if (set != held) {
      look_up(call, set, at.column, edits);
      held = set;
    }
    float values[count];
    gate.unpack(values);
    activate<Format>(values, Chosen{}, call.activation);
    if (edits.chosen) {
#pragma unroll
      for (int element = 0; element < count; ++element) {
        const float scaled = values[element] * edits.scale[element] + edits.shift[element];
        const float edited = edits.scale[element] == 0.0f ? edits.shift[element] : scaled;
        values[element] = edits.chosen >> element & 1u ? edited : values[element];
      }
      Vector::round(values);
    }
    if (call.up.data) {
      float factors[count];
      up.unpack(factors);
#pragma unroll
      for (int element = 0; element < count; ++element) values[element] *= factors[element];
    }
    Vector::nearest(values).store(made_at.ahead(0));
    gate_at.advance(1);
    up_at.advance(1);
    made_at.advance(1);
  }
  sets.report(call.flags, at);
}

}  // namespace lapefast::cuda
