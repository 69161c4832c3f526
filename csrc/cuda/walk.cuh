// How the threads of a GPU share out [rows, width]: what the profile and the edit kernel have in
// common.
#pragma once

#include "formats.cuh"
#include "lapefast/kernels.h"

namespace lapefast::cuda {

// A block is `warps` warps of 32 lanes. A lane owns `count` neighbouring columns; a warp, which so
// spans a tile of 32 * count columns, walks down a run of consecutive rows.
constexpr int lanes = 32;
constexpr int warps = 4;

template <int count>
constexpr int tile_columns = lanes * count;

struct Place {
  std::int64_t first_row, end_row;
  std::int64_t tile_start;  // the tile's first column
  std::int64_t column;      // this lane's first column
};

// One dimension of blocks: tiles of one run of rows lie side by side, and the second dimension of
// a grid would end at 65,535.
template <int count>
__device__ inline Place place(std::int64_t rows, std::int64_t width, int run) {
  const std::int64_t tiles = (width + tile_columns<count> - 1) / tile_columns<count>;
  const std::int64_t block = blockIdx.x;
  Place place;
  place.tile_start = block % tiles * tile_columns<count>;
  place.column = place.tile_start + static_cast<std::int64_t>(threadIdx.x) * count;
  place.first_row = (block / tiles * warps + threadIdx.y) * run;
  place.end_row = place.first_row + run < rows ? place.first_row + run : rows;
  return place;
}

// The index of a row. It never becomes an address before it was compared with the number of groups
// or sets; the same for all lanes of a warp.
__device__ inline std::int32_t index_of(const RowIndex& index, std::int64_t row) {
  return index.data ? index.data[index.size == 1 ? 0 : row] : 0;
}

// 1 where the index of this row is outside [-1, limit), said by one thread of the grid.
__device__ inline int outside(const RowIndex& index, std::int64_t row, std::int32_t value,
                              std::int64_t limit, const Place& at) {
  if (value >= -1 && value < limit) return 0;
  return at.column == 0 && (row == 0 || (index.data && index.size != 1));
}

template <class Format>
__device__ inline char* address(const Rows& rows, std::int64_t row, std::int64_t column) {
  return static_cast<char*>(rows.data) + (row * rows.stride + column) * Format::size;
}

}  // namespace lapefast::cuda
