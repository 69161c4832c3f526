// Rows of keys in order, without Python: against the standard library, at the edges of memory.
// Built to run under the sanitizers too.
#include <algorithm>
#include <random>

#include "kernels.h"

namespace {

constexpr std::int64_t half = std::int64_t{1} << 32;

bool upper_half_is_less(std::int64_t a, std::int64_t b) { return (a >> 32) < (b >> 32); }

// `distinct`: how many upper halves there are; 0 for any.
std::vector<std::int64_t> sample_keys(std::int64_t count, std::int64_t distinct) {
  std::mt19937_64 random(static_cast<std::uint64_t>(count));
  std::vector<std::int64_t> keys(static_cast<std::size_t>(count));
  for (std::int64_t& key : keys) {
    key = static_cast<std::int64_t>(random());
    if (distinct) key = (key >> 32) % distinct * half + (key & (half - 1));
  }
  return keys;
}

void rows_are_sorted_stably_and_apart(std::int64_t rows, std::int64_t width,
                                      std::int64_t distinct) {
  const std::string where = std::to_string(width) + " of " + std::to_string(distinct);
  std::vector<std::int64_t> keys = sample_keys(rows * width, distinct), expected = keys;
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
      for (const std::int64_t distinct : {0, 1, 2, 5000})
        rows_are_sorted_stably_and_apart(rows, width, distinct);
  the_ends_of_the_range_keep_their_places();
  return checks::failures ? 1 : 0;
}
