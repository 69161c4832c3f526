// The profile kernel: the product and, in the same pass, the statistics.
//
// A lane keeps the counters and sums of its columns in registers while its warp walks down a run of
// rows of one group; where the group changes it adds them to the statistics, and at the end the
// warps of a block add up in shared memory, so that one addition per column leaves the block.
#pragma once

#include "activations.cuh"
#include "walk.cuh"

namespace lapefast::cuda {

// Which statistics a kernel is compiled for; `any`: whichever the call has.
enum class Wanted { none, counts, counts_and_sums, any };

// Rows in flight: their loads are issued before the first is used.
constexpr int rows_in_flight = 2;

constexpr bool has_counts(Wanted wanted) { return wanted != Wanted::none; }
constexpr bool has_sums(Wanted wanted) {
  return wanted == Wanted::counts_and_sums || wanted == Wanted::any;
}
constexpr bool has_the_others(Wanted wanted) { return wanted == Wanted::any; }

// One lane's results for its columns. What a kernel does not use takes no registers.
template <int count>
struct Partial {
  int counts[count];
  // float32 over at most chunk_rows rows, as on the CPU: a run that has sums is no longer.
  float sums[count], square_sums[count], up_abs_sums[count];

  __device__ void clear() {
#pragma unroll
    for (int at = 0; at < count; ++at) {
      counts[at] = 0;
      sums[at] = square_sums[at] = up_abs_sums[at] = 0.0f;
    }
  }
};

// Adds one lane's partial results to the statistics of `group`.
template <Wanted wanted, int count>
__device__ void flush(const ProfileCall& call, const Partial<count>& partial, std::int32_t group,
                      std::int64_t column) {
  const Statistics& s = call.statistics;
  const std::int64_t cell = group * call.width + column;
#pragma unroll
  for (int at = 0; at < count; ++at) {
    if (s.counts && partial.counts[at]) add(s.counts + cell + at, partial.counts[at]);
    if constexpr (has_sums(wanted))
      if (s.sums) add(s.sums + cell + at, partial.sums[at]);
    if constexpr (has_the_others(wanted)) {
      if (s.square_sums) add(s.square_sums + cell + at, partial.square_sums[at]);
      if (s.up_abs_sums) add(s.up_abs_sums + cell + at, partial.up_abs_sums[at]);
    }
  }
}

// Adds what the warps of a block hold of one statistic, whose groups are in `groups` (-1: nothing).
// Neighbouring threads add to neighbouring columns.
template <int count, class Element, class Total>
__device__ void combine(const Element (&mine)[count], bool inside,
                        Element (*shared)[tile_columns<count>], const std::int32_t* groups,
                        const ProfileCall& call, std::int64_t tile_start, Total* total) {
  if (inside)
#pragma unroll
    for (int at = 0; at < count; ++at) shared[threadIdx.y][threadIdx.x * count + at] = mine[at];
  __syncthreads();
  const int thread = threadIdx.y * lanes + threadIdx.x;
  for (int offset = thread; offset < tile_columns<count>; offset += lanes * warps) {
    const std::int64_t column = tile_start + offset;
    if (column >= call.width) break;
    Total sum = 0;
    for (int warp = 0; warp < warps; ++warp) {
      if (groups[warp] < 0) continue;
      sum += shared[warp][offset];
      // A group that the next warps share waits for them.
      int next = warp + 1;
      while (next < warps && groups[next] < 0) ++next;
      if (next < warps && groups[next] == groups[warp]) continue;
      if (sum != 0) add(total + groups[warp] * call.width + column, sum);
      sum = 0;
    }
  }
  __syncthreads();
}

// `gated`: the product is activation * up; otherwise it is the activation, where it is wanted.
template <class Format, class Chosen, bool gated, Wanted wanted, int count>
__global__ void __launch_bounds__(lanes* warps)
    profile_kernel(const ProfileCall call, const int run) {
  using Vector = Elements<Format, count>;
  const Statistics& s = call.statistics;
  const Place at = place<count>(call.rows, call.width, run);
  const bool inside = at.column < call.width;
  Partial<count> partial;
  partial.clear();
  std::int32_t held = -1;  // the group whose results `partial` holds
  int nonfinite = 0;
  Indices groups_of_rows(call.groups, s.groups, at);
  Cursor<Format> gate(call.gate, at), up(call.up, at), made(call.product, at);

  // `rows` rows from `row` on.
  const auto walk = [&](std::int64_t row, auto rows) {
    Vector gates[rows], ups[rows];
#pragma unroll
    for (int ahead = 0; ahead < rows; ++ahead) {
      if (!inside) break;
      gates[ahead] = Vector::load(gate.ahead(ahead));
      if constexpr (gated) ups[ahead] = Vector::load(up.ahead(ahead));
    }
#pragma unroll
    for (int ahead = 0; ahead < rows; ++ahead) {
      const std::int32_t group = groups_of_rows.of(row + ahead);
      if (!inside) continue;
      float values[count];
      gates[ahead].unpack(values);
      activate<Format>(values, Chosen{}, call.activation);
      if (group >= 0) {
        if (has_counts(wanted) && group != held) {
          if (held >= 0) flush<wanted>(call, partial, held, at.column);
          partial.clear();
          held = group;
        }
        // NaN times 0 and infinity times 0 are NaN: one multiply-add an element finds them.
        float probe = 0.0f;
#pragma unroll
        for (int element = 0; element < count; ++element)
          probe = fmaf(values[element], 0.0f, probe);
        if (probe != probe)
#pragma unroll
          for (int element = 0; element < count; ++element)
            nonfinite += values[element] - values[element] != 0.0f;
#pragma unroll
        for (int element = 0; element < count; ++element) {
          if constexpr (has_counts(wanted))
            partial.counts[element] += values[element] > call.threshold;
          if constexpr (has_sums(wanted)) partial.sums[element] += values[element];
        }
      }
      if constexpr (gated) {
        float factors[count];
        ups[ahead].unpack(factors);
#pragma unroll
        for (int element = 0; element < count; ++element) {
          if constexpr (has_the_others(wanted))
            if (group >= 0) partial.up_abs_sums[element] += fabsf(factors[element]);
          values[element] *= factors[element];
        }
      }
      const Vector product = Vector::nearest(values);
      if constexpr (has_the_others(wanted)) {
        if (group >= 0) {
          product.unpack(values);
#pragma unroll
          for (int element = 0; element < count; ++element)
            partial.square_sums[element] += values[element] * values[element];
        }
      }
      if (gated || call.product.data) product.store(made.ahead(ahead));
    }
    gate.advance(rows);
    up.advance(rows);
    made.advance(rows);
  };
  std::int64_t row = at.first_row;
  for (; row + rows_in_flight <= at.end_row; row += rows_in_flight)
    walk(row, std::integral_constant<int, rows_in_flight>{});
  for (; row < at.end_row; ++row) walk(row, std::integral_constant<int, 1>{});

  if (nonfinite) add(call.flags, nonfinite);
  groups_of_rows.report(call.flags, at);
  if constexpr (has_counts(wanted)) {
    __shared__ std::int32_t groups[warps];
    __shared__ int whole[warps][tile_columns<count>];
    // Lane 0 is inside where any lane of its tile is.
    if (threadIdx.x == 0) groups[threadIdx.y] = held;
    if (s.counts) combine(partial.counts, inside, whole, groups, call, at.tile_start, s.counts);
    if constexpr (has_sums(wanted)) {
      __shared__ float real[warps][tile_columns<count>];
      if (s.sums) combine(partial.sums, inside, real, groups, call, at.tile_start, s.sums);
      if constexpr (has_the_others(wanted)) {
        if (s.square_sums)
          combine(partial.square_sums, inside, real, groups, call, at.tile_start, s.square_sums);
        if (s.up_abs_sums)
          combine(partial.up_abs_sums, inside, real, groups, call, at.tile_start, s.up_abs_sums);
      }
    }
  }
}

}  // namespace lapefast::cuda
