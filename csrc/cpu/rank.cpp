// Rows of scores in order, by radix, which depends on no vector instructions: NumPy's sort by
// AVX-512 is slow where a processor is slow to store compressed vectors (Zen 4).
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>

#include "lapefast/library.h"

namespace lapefast {
namespace {

// Above, bits that grow as the score falls, below them the class.
std::uint64_t key_of(float score, std::int32_t its_class) {
  const float falling = 0.0f - score;  // never -0, which would stand apart from 0
  std::uint32_t order;
  std::memcpy(&order, &falling, sizeof(order));
  constexpr std::uint32_t sign = std::uint32_t{1} << 31;
  order = order & sign ? ~order : order | sign;
  return std::uint64_t{order} << 32 | static_cast<std::uint32_t>(its_class);
}

// Sorts `bits` at a time, from the lowest; `scratch` has room for twice as many keys as the row.
template <int bits>
void rank_row(const RankCall& call, std::int64_t row, std::uint64_t* scratch) {
  constexpr int digits = (32 + bits - 1) / bits, values = 1 << bits;
  std::uint32_t places[digits][values] = {};
  const auto digit = [](std::uint64_t key, int at) {
    return (key >> (32 + at * bits)) & (values - 1);
  };
  const auto count = static_cast<std::size_t>(call.width);
  const float* scores = call.scores + row * call.width;
  // What is counted is a copy: another thread may change the scores, and the places be too few.
  std::uint64_t *from = scratch, *to = scratch + count;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t key = from[i] = key_of(scores[i], call.classes[i]);
    for (int at = 0; at < digits; ++at) ++places[at][digit(key, at)];
  }
  for (int at = 0; at < digits; ++at) {
    if (places[at][digit(from[0], at)] == count) continue;  // all have the same here
    std::uint32_t before = 0;
    for (std::uint32_t& place : places[at]) before += std::exchange(place, before);
    for (std::size_t i = 0; i < count; ++i) to[places[at][digit(from[i], at)]++] = from[i];
    std::swap(from, to);
  }
  std::int32_t* ordered = call.ordered + row * call.width;
  std::int8_t* last = call.last + row * call.width;
  for (std::size_t i = 0; i < count; ++i) {
    ordered[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(from[i]));
    last[i] = i + 1 == count || from[i] >> 32 != from[i + 1] >> 32;
  }
}

}  // namespace

void rank_rows(const RankCall& call) {
  if (call.rows == 0 || call.width == 0) return;
  const std::unique_ptr<std::uint64_t[]> scratch(
      new std::uint64_t[2 * static_cast<std::size_t>(call.width)]);
  // Of longer rows fewer passes take less time, though their tables are larger: measured.
  const auto rank = call.width < 1024 ? rank_row<8> : rank_row<11>;
  for (std::int64_t row = 0; row < call.rows; ++row) rank(call, row, scratch.get());
}

}  // namespace lapefast
