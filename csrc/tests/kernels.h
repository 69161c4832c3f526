// What the tests of the kernels share: a thread pool, who computes, and matrices of bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "lapefast/library.h"

// A thread pool that the sanitizers can see through, under the names by which the library looks for
// the OpenMP runtime.
inline thread_local int thread_index = 0;
inline thread_local int thread_count = 1;
extern "C" {
__attribute__((visibility("default"))) int omp_get_thread_num() { return thread_index; }
__attribute__((visibility("default"))) int omp_get_num_threads() { return thread_count; }
__attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*), void* context,
                                                          unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned index = 0; index < threads; ++index)
    others.emplace_back([=] {
      thread_index = static_cast<int>(index);
      thread_count = static_cast<int>(threads);
      body(context);
    });
  for (std::thread& other : others) other.join();
}
}

namespace kernels {

using lapefast::Activation;
using lapefast::DType;

// Who computes.
template <class Call>
struct Engine {
  std::string name;
  void (*run)(const Call& call);
};

inline float widen(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Small numbers of both signs that repeat with a long period; none is zero.
inline std::uint16_t sample(std::int64_t at) {
  return narrow(static_cast<float>((at * 7919 + 13) % 1009 - 504.5) / 64.0f);
}

// Exactly as many elements as the kernel may touch, so that a sanitizer sees any other.
struct Matrix {
  std::int64_t rows, width, stride;
  std::vector<std::uint16_t> data;
  Matrix(std::int64_t r, std::int64_t w, std::int64_t s, std::int64_t seed)
      : rows(r), width(w), stride(s), data(r ? (r - 1) * s + w : 0) {
    for (std::size_t at = 0; at < data.size(); ++at) data[at] = sample(seed + at);
  }
  std::uint16_t& at(std::int64_t row, std::int64_t column) { return data[row * stride + column]; }
  lapefast::Rows view() { return {data.data(), stride}; }
};

template <class Function>
bool refuses(const Function& function) {
  try {
    function();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Calls test with the name of each instruction set, which is selected.
template <class Test>
void with_each_isa(const Test& test) {
  for (const std::string& isa : lapefast::available_isas()) {
    lapefast::select_isa(isa);
    CHECK(lapefast::isa() == isa, isa);
    test(isa);
  }
}

}  // namespace kernels
