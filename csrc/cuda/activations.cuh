// The activations in float32, rounded to `Format` where eager PyTorch on a GPU rounds.
//
// The library is compiled without contracting a multiply and an add; PyTorch's own kernels are
// compiled with it, so `fmaf` stands where its source has one. Which of these equal PyTorch's own
// results on a GPU is for the comparison of all 65,536 values there to say, not for this file.
#pragma once

#include "formats.cuh"
#include "lapefast/kernels.h"

namespace lapefast::cuda {

// numerator / (1 + e), with e not below 0. The IEEE division has a rare path of its own behind a
// branch for every element, three times the instructions of all the rest of SiLU. For what is
// rounded to a half type after it, one Newton step on the nearest reciprocal is as good; a quarter
// of both sides keeps the reciprocal of the largest denominators above zero. Where the numerator or
// the denominator is infinite the rest is NaN, and the first quotient is right already; so it is
// where nothing is left, and a step by +0 would make +0 of a quotient of -0.
template <class Format>
__device__ inline float over_one_plus(float numerator, float e) {
  if constexpr (!Format::is_half) return numerator / (1.0f + e);
  const float part = 0.25f * numerator, whole = 0.25f * (1.0f + e);
  const float reciprocal = reciprocal_nearly(whole);
  const float quotient = part * reciprocal;
  const float rest = fmaf(-whole, quotient, part);
  return fabsf(rest) > 0.0f ? fmaf(rest, reciprocal, quotient) : quotient;
}

// NaN stays. -0 becomes +0, as in eager on a GPU: it clamps by the maximum of x and 0, and of -0
// and +0 PTX takes +0.
__device__ inline float relu(float x) { return x <= 0.0f ? 0.0f : x; }

// x holds values of Format; so does the result.
template <class Format, Activation activation>
__device__ inline float activate(float x) {
  if constexpr (activation == Activation::identity) {
    return x;
  } else if constexpr (activation == Activation::silu) {
    const float e = Format::takes_short_exp ? exp2_nearly(x * -1.44269504f) : expf(-x);
    return over_one_plus<Format>(x, e);
  } else if constexpr (activation == Activation::relu) {
    return relu(x);
  } else if constexpr (activation == Activation::relu_squared) {
    return relu(x) * relu(x);
  } else if constexpr (activation == Activation::gelu) {
    return x * 0.5f * (1.0f + erff(x * 0.707106781186547524400844362104849f));
  } else if constexpr (activation == Activation::gelu_tanh) {
    const float inner = 0.79788456080286535587989f * fmaf(0.044715f, x * x * x, x);
    return 0.5f * x * (1.0f + tanhf(inner));
  } else if constexpr (activation == Activation::gelu_new) {
    // As composed in Python: a rounding after every operation, the two multiplications of the cube
    // included.
    float inner = Format::round(Format::round(x * x) * x);
    inner = Format::round(x + Format::round(inner * 0.044715f));
    inner = Format::round(inner * 0.79788456080286535587989f);
    const float plus_one = Format::round(1.0f + Format::round(tanhf(inner)));
    return Format::round(x * 0.5f) * plus_one;
  } else {
    static_assert(activation == Activation::quick_gelu);
    const float scaled = Format::round(x * 1.702f);
    return x * Format::round(over_one_plus<Format>(1.0f, expf(-scaled)));
  }
}

// What a kernel is compiled for: one activation, or to ask which at run time, so that the rarer
// kernels are compiled once and not once for each.
template <Activation activation>
struct Known {};
struct Asked {};

template <class Format, Activation activation, int count>
__device__ inline void activate(float (&values)[count], Known<activation>, Activation) {
  if constexpr (activation != Activation::identity) {
#pragma unroll
    for (int at = 0; at < count; ++at) values[at] = activate<Format, activation>(values[at]);
    if constexpr (activation != Activation::relu) Elements<Format, count>::round(values);
  }
}

template <class Format, int count>
__device__ inline void activate(float (&values)[count], Asked, Activation asked) {
  switch (asked) {
    case Activation::identity:
      return;
    case Activation::silu:
      return activate<Format>(values, Known<Activation::silu>{}, asked);
    case Activation::relu:
      return activate<Format>(values, Known<Activation::relu>{}, asked);
    case Activation::relu_squared:
      return activate<Format>(values, Known<Activation::relu_squared>{}, asked);
    case Activation::gelu:
      return activate<Format>(values, Known<Activation::gelu>{}, asked);
    case Activation::gelu_tanh:
      return activate<Format>(values, Known<Activation::gelu_tanh>{}, asked);
    case Activation::gelu_new:
      return activate<Format>(values, Known<Activation::gelu_new>{}, asked);
    case Activation::quick_gelu:
      return activate<Format>(values, Known<Activation::quick_gelu>{}, asked);
  }
}

}  // namespace lapefast::cuda
