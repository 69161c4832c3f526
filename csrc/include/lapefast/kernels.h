// What the kernels are asked to do: addresses, sizes and strides, no framework.
//
// This header is included by translation units compiled for different instruction sets, so it
// holds plain data only: an inline function here could be compiled for AVX-512 and then be picked
// by the linker for every caller.
#pragma once

#include <cstdint>

namespace lapefast {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

enum class Activation : int {
  identity = 0,
  silu = 1,
  relu = 2,
  relu_squared = 3,
  gelu = 4,
  gelu_tanh = 5,
  gelu_new = 6,
  quick_gelu = 7,
};
constexpr int activation_count = 8;

// Elements [rows, width]; neighbours in a row are adjacent, rows are `stride` elements apart.
struct Rows {
  void* data;
  std::int64_t stride;
};

// One index per row, or one for every row; null means 0 for every row.
struct RowIndex {
  const std::int32_t* data;
  std::int64_t size;
};

// Each is null or contiguous [groups, width].
struct Statistics {
  std::int64_t groups;  // INT64_MAX where there is no statistic that a group could miss
  std::int64_t* counts;
  double* sums;
  double* square_sums;
  double* up_abs_sums;
};

struct ProfileCall {
  DType dtype;
  Activation activation;
  std::int64_t rows;
  std::int64_t width;
  Rows gate;
  Rows up;       // data null: there is none
  Rows product;  // data null: only the statistics are wanted
  float threshold;
  RowIndex groups;
  Statistics statistics;
  std::int64_t* flags;
};

struct EditCall {
  DType dtype;
  Activation activation;
  std::int64_t rows;
  std::int64_t width;
  Rows gate;
  Rows up;
  Rows product;
  RowIndex sets;
  std::int64_t set_count;
  const std::int32_t* offsets;  // [set_count + 1]
  std::int64_t capacity;
  const std::int32_t* neurons;  // [capacity], ascending within a set
  const float* scale;           // [capacity]
  const float* shift;           // [capacity]
  std::int64_t* flags;          // the GPU's kernels write to them
};

// How much an attention map changes when one dimension of one head's queries and keys is left out.
struct LeaveOneOutCall {
  std::int64_t heads;      // of the queries
  std::int64_t key_heads;  // each serves heads / key_heads consecutive heads
  std::int64_t length;     // of the queries
  std::int64_t dimensions;
  std::int64_t columns;        // of the maps; a multiple of map_unit
  const float* query;          // [heads, length, dimensions], times the factor of the scores
  const float* keys;           // [key_heads, dimensions, columns]
  const float* logits;         // [heads, length, columns]; minus infinity where masked
  const float* probabilities;  // [heads, length, columns]: their softmax
  const std::int32_t* ends;    // [heads, length]: columns from here on are masked; 0: no such row
  double* scores;              // [heads, dimensions]: the sum of the squared changes
};

// In which order the columns of each row of scores stand, the highest first.
struct RankCall {
  std::int64_t rows, width;
  const float* scores;          // [rows, width]; no NaN
  const std::int32_t* classes;  // [width]
  std::int32_t* ordered;        // [rows, width]: the classes in that order
  std::int8_t* last;            // [rows, width]: 1 where the next score is a lower one
};

// Sums over a row of a map are made in this many parts, whatever the width of the vectors.
constexpr int map_unit = 32;

// Rows that are summed up in float32 before they are added to the statistics in float64, counted
// from the first row of a call, so that sums are the same however the work is shared.
constexpr int chunk_rows = 64;

// Columns that are walked over a chunk of rows before the next, so that their counters and sums
// stay in the first-level cache: 28 KB at most.
constexpr int tile_width = 2048;

// Says which chunk may add to the sums of a tile now: they are added in the order of the rows.
struct Turn;
void wait_for_turn(Turn* turn, std::int64_t tile, std::int64_t chunk);
// Waits for the turn of `chunk` and passes it on.
void end_turn(Turn* turn, std::int64_t tile, std::int64_t chunk);

// What one thread does of a call: of all rows some columns, or of all columns every `chunk_step`-th
// chunk of rows.
struct Share {
  std::int64_t begin, end;
  std::int64_t first_chunk, chunk_step;
  Turn* turn;  // null where one thread does all rows
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*profile)(const ProfileCall& call, const Share& share);
  void (*edit)(const EditCall& call, const Share& share);
  // Every `step`-th score from `first` on; `scratch` holds one row of a map.
  void (*leave_one_out)(const LeaveOneOutCall& call, std::int64_t first, std::int64_t step,
                        float* scratch);
};

// Guards the additions to statistics, which several calls may share; `key` is any address of
// theirs.
void lock_statistics(const void* key);
void unlock_statistics(const void* key);

}  // namespace lapefast
