// The turn of kernels.h, apart from it because it holds an atomic.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace lapefast {

struct Turn {
  explicit Turn(std::size_t tiles) : chunk_of(tiles) {}
  std::vector<std::atomic<std::int64_t>> chunk_of;  // by tile
};

}  // namespace lapefast
