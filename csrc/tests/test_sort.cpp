// Rows of keys in order, without Python: against the standard library, at the edges of memory.
// Built to run under the sanitizers too.
#include <algorithm>
#include <random>

#include "kernels.h"

namespace {

constexpr std::int64_t half = std::int64_t{1} << 32;

bool upper_half_is_less(std::int64_t a, std::int64_t b) { return (a >> 32) < (b >> 32); }

// Keys whose upper halves differ in the bits of `mask` only: in few digits, or in all.
std::vector<std::int64_t> sample_keys(std::int64_t count, std::uint32_t mask) {
  std::mt19937_64 random(static_cast<std::uint64_t>(count));
  std::vector<std::int64_t> keys(static_cast<std::size_t>(count));
  const std::uint64_t varied = (static_cast<std::uint64_t>(mask) << 32) | (half - 1);
  for (std::int64_t& key : keys) key = static_cast<std::int64_t>(random() & varied);
  return keys;
}

void rows_are_sorted_stably_and_apart(std::int64_t rows, std::int64_t width, std::uint32_t mask) {
  const std::string where =
      std::to_string(rows) + " by " + std::to_string(width) + ", bits " + std::to_string(mask);
  std::vector<std::int64_t> keys = sample_keys(rows * width, mask), expected = keys;
  lapefast::sort_rows(keys.data(), rows, width);
  for (std::int64_t row = 0; row < rows; ++row) {
    const auto first = expected.begin() + row * width;
    std::stable_sort(first, first + width, upper_half_is_less);
  }
  CHECK(keys == expected, where);
}

void the_ends_of_the_range_keep_their_places() {
  std::vector<std::int64_t> keys{INT64_MAX, 0, -1, INT64_MIN, half, -half};
  lapefast::sort_rows(keys.data(), 1, static_cast<std::int64_t>(keys.size()));
  CHECK((keys == std::vector<std::int64_t>{INT64_MIN, -1, -half, 0, half, INT64_MAX}), "the ends");
}

}  // namespace

int main() {
  for (const std::int64_t width : {0, 1, 2, 3, 255, 256, 1023, 1024, 1025, 3000})
    for (const std::int64_t rows : {0, 1, 3})
      for (const std::uint32_t mask :
           {0u, 0xffu, 0xff00u, 0x3ff800u, 0x80000001u, 0xff00ffu, 0x7fffffffu, 0xffffffffu})
        rows_are_sorted_stably_and_apart(rows, width, mask);
  the_ends_of_the_range_keep_their_places();
  return checks::failures ? 1 : 0;
}
