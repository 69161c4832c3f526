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

// The indices of the rows of one warp, the same for all its lanes. None becomes an address before
// it was compared with the number of groups or sets.
class Indices {
 public:
  __device__ Indices(const RowIndex& index, std::int64_t limit, const Place& place)
      : each_(index.data && index.size != 1 ? index.data : nullptr),
        last_(limit <= INT32_MAX ? static_cast<std::int32_t>(limit) - 1 : INT32_MAX),
        one_(index.data && !each_ ? index.data[0] : 0),
        outside_(0) {
    // One index for all is outside once, where the first row is.
    if (!each_) one_ = checked(one_, place.first_row == 0);
  }

  // That of a row, or -1 where there is none or it is out of range.
  __device__ std::int32_t of(std::int64_t row) { return each_ ? checked(each_[row], true) : one_; }

  // Counts those out of range, by one thread of those that saw them.
  __device__ void report(std::int64_t* flags, const Place& place) const {
    if (outside_ && place.column == 0) add(flags + 1, outside_);
  }

 private:
  __device__ std::int32_t checked(std::int32_t value, bool counts) {
    outside_ += counts && (value < -1 || value > last_);
    return value <= last_ ? value < 0 ? -1 : value : -1;
  }

  const std::int32_t* each_;
  std::int32_t last_, one_, outside_;
};

// A row that a warp has come to, at the lane's columns.
template <class Format>
class Cursor {
 public:
  __device__ Cursor(const Rows& rows, const Place& place)
      : at_(static_cast<char*>(rows.data) +
            (place.first_row * rows.stride + place.column) * Format::size),
        step_(rows.stride * Format::size) {}
  __device__ char* ahead(int rows) const { return at_ + rows * step_; }
  __device__ void advance(int rows) { at_ += rows * step_; }

 private:
  char* at_;
  std::int64_t step_;
};

}  // namespace lapefast::cuda
