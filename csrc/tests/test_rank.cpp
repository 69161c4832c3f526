// Rows of scores in order, without Python: against the standard library, at the edges of memory.
// Built to run under the sanitizers too.
#include <algorithm>
#include <numeric>
#include <random>

#include "kernels.h"

namespace {

// Scores whose bits differ in those of `mask` only: in few of the digits sorted by, or in all.
std::vector<float> sample_scores(std::int64_t count, std::uint32_t mask) {
  std::mt19937 random(static_cast<std::uint32_t>(count));
  std::vector<float> scores(static_cast<std::size_t>(count));
  for (float& score : scores) do {
      const std::uint32_t bits = random() & mask;
      std::memcpy(&score, &bits, sizeof(bits));
    } while (std::isnan(score));
  return scores;
}

void rows_are_ranked_apart(std::int64_t rows, std::int64_t width, std::uint32_t mask) {
  const std::string where =
      std::to_string(rows) + " by " + std::to_string(width) + ", bits " + std::to_string(mask);
  const std::vector<float> scores = sample_scores(rows * width, mask);
  std::vector<std::int32_t> classes(static_cast<std::size_t>(width));
  std::iota(classes.begin(), classes.end(), -1);  // each its own, so that all places are seen
  std::vector<std::int32_t> ordered(scores.size());
  std::vector<std::int8_t> last(scores.size(), 2);
  lapefast::rank_rows({rows, width, scores.data(), classes.data(), ordered.data(), last.data()});
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* own = scores.data() + row * width;
    std::vector<std::int32_t> expected = classes;
    std::stable_sort(expected.begin(), expected.end(),
                     [&](std::int32_t a, std::int32_t b) { return own[a + 1] > own[b + 1]; });
    CHECK(std::equal(expected.begin(), expected.end(), ordered.begin() + row * width), where);
    for (std::int64_t at = 0; at < width; ++at) {
      const bool ends = at + 1 == width || own[expected[at] + 1] != own[expected[at + 1] + 1];
      CHECK(last[row * width + at] == ends, where);
    }
  }
}

void what_is_equal_or_infinite_has_its_place() {
  const std::vector<float> scores{-0.0f, -INFINITY, 0.0f, INFINITY, 1e-45f, -1e-45f};
  const std::vector<std::int32_t> classes{0, 1, 2, 3, 4, 5};
  std::vector<std::int32_t> ordered(6);
  std::vector<std::int8_t> last(6);
  lapefast::rank_rows({1, 6, scores.data(), classes.data(), ordered.data(), last.data()});
  CHECK((ordered == std::vector<std::int32_t>{3, 4, 0, 2, 5, 1}), "the order");
  CHECK((last == std::vector<std::int8_t>{1, 1, 0, 1, 1, 1}), "both zeros are one score");
}

}  // namespace

int main() {
  for (const std::int64_t width : {0, 1, 2, 3, 255, 256, 1023, 1024, 1025, 3000})
    for (const std::int64_t rows : {0, 1, 3})
      for (const std::uint32_t mask :
           {0u, 0xffu, 0xff00u, 0x3ff800u, 0x80000001u, 0xff00ffu, 0x7fffffffu, 0xffffffffu})
        rows_are_ranked_apart(rows, width, mask);
  what_is_equal_or_infinite_has_its_place();
  return checks::failures ? 1 : 0;
}
