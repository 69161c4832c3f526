// How the elements of each type are held: `words` 32-bit words of a row, unpacked to floats.
#pragma once

#include "device.h"

namespace lapefast::cuda {

struct Float32 {
  static constexpr int size = 4;
  static constexpr bool is_half = false;
  static constexpr bool takes_short_exp = false;
  __device__ static void unpack(std::uint32_t word, float* to) { to[0] = float_of(word); }
  __device__ static std::uint32_t pack(const float* from) { return bits_of(from[0]); }
  __device__ static float round(float value) { return value; }
};

struct BFloat16 {
  static constexpr int size = 2;
  static constexpr bool is_half = true;
  // SiLU is the same for all its values if e^x is off by (4 + |x|) 2^-24 of itself: none lies that
  // near a tie but subnormal ones, whose e^x is 1. In binary16 some normal ones do.
  static constexpr bool takes_short_exp = true;
  __device__ static void unpack(std::uint32_t word, float* to) {
    to[0] = float_of(word << 16);
    to[1] = float_of(word & 0xffff0000u);
  }
  __device__ static std::uint32_t pack(const float* from) {
    return pack_bfloat16(from[0], from[1]);
  }
  __device__ static float round(float value) { return float_of(pack_bfloat16(value, value) << 16); }
};

struct Float16 {
  static constexpr int size = 2;
  static constexpr bool is_half = true;
  static constexpr bool takes_short_exp = false;
  __device__ static void unpack(std::uint32_t word, float* to) {
    to[0] = widen_float16(word);
    to[1] = widen_float16(word >> 16);
  }
  __device__ static std::uint32_t pack(const float* from) { return pack_float16(from[0], from[1]); }
  __device__ static float round(float value) { return widen_float16(pack_float16(value, value)); }
};

// `count` neighbouring elements of a row in one thread: 16 bytes of them, or a single one where
// rows do not start at multiples of 16 bytes or a width is no multiple of that.
template <class Format>
constexpr int per_vector = 16 / Format::size;

template <class Format, int count>
struct Elements {
  static_assert(count == 1 || count == per_vector<Format>);
  static constexpr int words = count == 1 ? 1 : 4;
  std::uint32_t held[words];

  __device__ static Elements load(const char* address) {
    Elements elements;
    if constexpr (count > 1) {
      const Words read = load_words(address);
#pragma unroll
      for (int at = 0; at < words; ++at) elements.held[at] = read.at[at];
    } else if constexpr (Format::size == 2) {
      elements.held[0] = *reinterpret_cast<const std::uint16_t*>(address);
    } else {
      elements.held[0] = *reinterpret_cast<const std::uint32_t*>(address);
    }
    return elements;
  }

  __device__ void store(char* address) const {
    if constexpr (count > 1) {
      store_words(address, {{held[0], held[1], held[2], held[3]}});
    } else if constexpr (Format::size == 2) {
      *reinterpret_cast<std::uint16_t*>(address) = static_cast<std::uint16_t>(held[0]);
    } else {
      *reinterpret_cast<std::uint32_t*>(address) = held[0];
    }
  }

  __device__ void unpack(float (&to)[count]) const {
    if constexpr (count == 1) {
      float pair[2];
      Format::unpack(held[0], pair);
      to[0] = pair[0];
    } else {
#pragma unroll
      for (int at = 0; at < words; ++at) Format::unpack(held[at], to + at * (4 / Format::size));
    }
  }

  // The nearest elements to these floats.
  __device__ static Elements nearest(const float (&from)[count]) {
    Elements elements;
    if constexpr (count == 1) {
      const float pair[2] = {from[0], 0.0f};
      elements.held[0] = Format::pack(pair);
    } else {
#pragma unroll
      for (int at = 0; at < words; ++at)
        elements.held[at] = Format::pack(from + at * (4 / Format::size));
    }
    return elements;
  }

  __device__ static void round(float (&values)[count]) {
    if constexpr (Format::is_half) nearest(values).unpack(values);
  }
};

}  // namespace lapefast::cuda
