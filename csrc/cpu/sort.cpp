// Rows of keys in order, by radix, which depends on no vector instructions: NumPy's sort by AVX-512
// takes three times as long on some processors (Zen 4 stores compressed vectors slowly) as on
// others.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "lapefast/library.h"

namespace lapefast {
namespace {

constexpr std::uint64_t sign = std::uint64_t{1} << 63;

// By the upper 32 bits, `bits` at a time from the lowest; `scratch` has room for twice as many
// keys.
template <int bits>
void sort_row(std::uint64_t* keys, std::uint64_t* scratch, std::size_t count) {
  constexpr int digits = (32 + bits - 1) / bits, values = 1 << bits;
  std::uint32_t places[digits][values] = {};
  const auto digit = [](std::uint64_t key, int at) {
    return ((key ^ sign) >> (32 + at * bits)) & (values - 1);
  };
  // Of a copy: another thread may change the keys meanwhile, and the places be too few.
  std::uint64_t *from = scratch, *to = scratch + count;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t key = from[i] = keys[i];
    for (int at = 0; at < digits; ++at) ++places[at][digit(key, at)];
  }
  for (int at = 0; at < digits; ++at) {
    if (places[at][digit(from[0], at)] == count) continue;  // all have the same here
    std::uint32_t before = 0;
    for (std::uint32_t& place : places[at]) before += std::exchange(place, before);
    for (std::size_t i = 0; i < count; ++i) to[places[at][digit(from[i], at)]++] = from[i];
    std::swap(from, to);
  }
  std::copy(from, from + count, keys);
}

}  // namespace

void sort_rows(std::int64_t* keys, std::int64_t rows, std::int64_t width) {
  if (rows == 0 || width < 2) return;
  // Of a type that may look at any integer's bits.
  auto* row = reinterpret_cast<std::uint64_t*>(keys);
  const auto count = static_cast<std::size_t>(width);
  const std::unique_ptr<std::uint64_t[]> scratch(new std::uint64_t[2 * count]);
  // Of longer rows fewer passes take less time, though their tables are larger: measured.
  const auto sort = width < 1024 ? sort_row<8> : sort_row<11>;
  for (; rows > 0; --rows, row += count) sort(row, scratch.get(), count);
}

}  // namespace lapefast
