// Leaving one dimension out of attention, without Python: every instruction set against scalar
// arithmetic, at the edges of memory, and any number of threads. Built to run under the sanitizers
// too.
#include "kernels.h"

namespace {

using namespace kernels;

// Attention maps of causal rows, each as long as the kernel may read and no longer.
struct Maps {
  std::int64_t heads, key_heads, length, dimensions, columns;
  std::vector<float> query, keys, logits, probabilities;
  std::vector<std::int32_t> ends;
  std::vector<double> scores;
  Maps(std::int64_t h, std::int64_t k, std::int64_t l, std::int64_t d)
      : heads(h),
        key_heads(k),
        length(l),
        dimensions(d),
        columns((l + lapefast::map_unit - 1) / lapefast::map_unit * lapefast::map_unit),
        query(h * l * d),
        keys(k * d * columns),
        logits(h * l * columns, -INFINITY),
        probabilities(logits.size()),
        ends(h * l),
        scores(h * d, -1.0) {
    for (std::size_t at = 0; at < query.size(); ++at) query[at] = widen(sample(at)) / 4;
    for (std::size_t at = 0; at < keys.size(); ++at) keys[at] = widen(sample(3 * at)) / 4;
    for (std::int64_t row = 0; row < h * l; ++row) {
      const std::int64_t end = row % l + 1;
      ends[row] = static_cast<std::int32_t>(end);
      double total = 0.0;
      for (std::int64_t column = 0; column < end; ++column) {
        float& logit = logits[row * columns + column];
        logit = widen(sample(row * 31 + column)) / 8;
        total += std::exp(static_cast<double>(logit));
      }
      for (std::int64_t column = 0; column < end; ++column)
        probabilities[row * columns + column] = static_cast<float>(
            std::exp(static_cast<double>(logits[row * columns + column])) / total);
    }
  }
  lapefast::LeaveOneOutCall call() {
    return {heads,        key_heads,   length,        dimensions,           columns,
            query.data(), keys.data(), logits.data(), probabilities.data(), ends.data(),
            scores.data()};
  }
  double expected(std::int64_t head, std::int64_t dimension) const {
    const std::int64_t key = head / (heads / key_heads) * dimensions + dimension;
    double changes = 0.0;
    for (std::int64_t row = head * length; row < (head + 1) * length; ++row) {
      std::vector<double> left(static_cast<std::size_t>(ends[row]));
      double total = 0.0;
      for (std::size_t column = 0; column < left.size(); ++column) {
        const double taken =
            static_cast<double>(query[row * dimensions + dimension]) * keys[key * columns + column];
        left[column] = std::exp(logits[row * columns + column] - taken);
        total += left[column];
      }
      for (std::size_t column = 0; column < left.size(); ++column) {
        const double change = left[column] / total - probabilities[row * columns + column];
        changes += change * change;
      }
    }
    return changes;
  }
};

void leaving_one_out_equals_scalar_arithmetic(const std::string& isa) {
  for (const std::int64_t length : {1, 2, 31, 32, 33, 65}) {
    Maps maps(4, 2, length, 3);
    lapefast::leave_one_out(maps.call(), 1);
    for (std::int64_t head = 0; head < 4; ++head)
      for (std::int64_t dimension = 0; dimension < 3; ++dimension) {
        const double found = maps.scores[head * 3 + dimension];
        const double expected = maps.expected(head, dimension);
        // The norm of the changes is off by a few spacings of the maps' norm, at most sqrt(length).
        const double slack = 1e-6 * std::sqrt(static_cast<double>(length));
        CHECK(std::abs(std::sqrt(found) - std::sqrt(expected)) <= slack, isa);
      }
    static std::vector<double> first[66];  // of the first instruction set: all give the same bits
    if (first[length].empty()) first[length] = maps.scores;
    CHECK(maps.scores == first[length], isa);
    for (const int threads : {2, 3}) {
      Maps again(4, 2, length, 3);
      lapefast::leave_one_out(again.call(), threads);
      CHECK(again.scores == maps.scores, isa);
    }
    for (const std::int32_t bad : {-1, static_cast<std::int32_t>(maps.columns) + 1}) {
      Maps broken(4, 2, length, 3);
      broken.ends.back() = bad;
      CHECK(refuses([&] { lapefast::leave_one_out(broken.call(), 1); }), isa);
      CHECK(broken.scores[0] == -1.0, isa);
    }
  }
}

}  // namespace

int main() {
  with_each_isa(leaving_one_out_equals_scalar_arithmetic);
  return checks::failures ? 1 : 0;
}
