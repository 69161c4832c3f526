// A torch tensor as the binding sees it: what it holds and where, read without torch's headers.
//
// torch 2.10 and later describe a tensor through a table of C functions that hangs on its class
// (DLPack's exchange protocol, https://dmlc.github.io/dlpack), in a tenth of the time that asking
// it from Python takes. Only the part of that table that is used is declared here, in the layout
// that its major version 1 fixes. Earlier versions of torch are asked from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "lapefast/kernels.h"

namespace lapefast::binding {

namespace py = pybind11;

namespace dlpack {

struct Tensor {
  void* data;
  std::int32_t device_type, device;
  std::int32_t dimensions;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeTable {
  std::uint32_t major, minor;
  ExchangeTable* previous;
  void* unused[3];
  int (*describe)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** out);
};

constexpr std::uint8_t integer = 0, floating = 2, bfloat = 4;
constexpr std::int32_t cpu = 1, cuda = 2;

}  // namespace dlpack

// The table of the class of `object`; null where it has none that we can read.
inline const dlpack::ExchangeTable* exchange_table(py::handle object) {
  // Of the last class asked for, which is nearly always torch.Tensor; guarded by the GIL.
  static PyTypeObject* type = nullptr;
  static const dlpack::ExchangeTable* table = nullptr;
  if (Py_TYPE(object.ptr()) == type) return table;
  const dlpack::ExchangeTable* found = nullptr;
  const py::object capsule =
      py::getattr(py::type::handle_of(object), "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    found = static_cast<const dlpack::ExchangeTable*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->major != 1) found = found->previous;
  if (found && !found->describe) found = nullptr;
  // Kept alive, so that no other class can come to lie at its address.
  py::handle(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()))).inc_ref();
  type = Py_TYPE(object.ptr());
  return table = found;
}

class Tensor {
 public:
  // `name` is that of the argument, for messages.
  Tensor(py::handle object, const char* name) : object_(object), name_(name) {
    if (const dlpack::ExchangeTable* table = exchange_table(object)) {
      if (table->describe(object.ptr(), &seen_)) throw py::error_already_set();
    } else {
      ask(object);
    }
  }
  Tensor(const Tensor&) = delete;

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(seen_.data) + seen_.byte_offset);
  }
  std::int32_t device_type() const { return seen_.device_type; }
  std::int32_t device() const { return seen_.device; }
  bool same_place(const Tensor& other) const {
    return seen_.device_type == other.seen_.device_type && seen_.device == other.seen_.device;
  }
  bool same_sizes(const Tensor& other) const {
    return seen_.dimensions == other.seen_.dimensions &&
           std::equal(seen_.shape, seen_.shape + seen_.dimensions, other.seen_.shape);
  }
  int dimensions() const { return seen_.dimensions; }
  std::int64_t size(int at) const { return seen_.shape[at]; }
  std::int64_t width() const { return seen_.shape[seen_.dimensions - 1]; }
  std::int64_t rows() const {
    std::int64_t product = 1;
    for (int at = 0; at + 1 < seen_.dimensions; ++at) product = times(product, seen_.shape[at]);
    return product;
  }
  std::int64_t elements() const { return seen_.dimensions ? times(rows(), width()) : 1; }
  bool same_type(const Tensor& other) const {
    return seen_.code == other.seen_.code && seen_.bits == other.seen_.bits;
  }

  DType float_type() const {
    expect(seen_.dimensions > 0, "must have a last dimension");
    if (seen_.code == dlpack::bfloat && seen_.bits == 16) return DType::bfloat16;
    expect(seen_.code == dlpack::floating && (seen_.bits == 16 || seen_.bits == 32),
           "must be float32, float16 or bfloat16");
    return seen_.bits == 16 ? DType::float16 : DType::float32;
  }

  // The tensor as [rows, width]; refused where no single stride leads from row to row.
  Rows as_rows() const {
    expect_memory(elements());
    expect_aligned(seen_.bits / 8);
    const int last = seen_.dimensions - 1;
    if (!seen_.strides || elements() == 0) return {data<void>(), width()};
    expect(seen_.strides[last] == 1 || width() <= 1, "must have a last stride of 1");
    std::int64_t row_stride = width(), extent = -1;
    for (int at = last - 1; at >= 0; --at) {
      if (seen_.shape[at] == 1) continue;
      if (extent < 0) row_stride = seen_.strides[at];
      expect(extent < 0 || seen_.strides[at] == extent, "must have rows one fixed stride apart");
      extent = seen_.strides[at] * seen_.shape[at];
    }
    return {data<void>(), row_stride};
  }

  // Of sizes. A tensor that holds nothing, or one element over and over, may have any.
  std::int64_t times(std::int64_t a, std::int64_t b) const {
    std::int64_t product;
    expect(!__builtin_mul_overflow(a, b, &product), "has sizes that are too large");
    return product;
  }

  // Contiguous elements of a type that is no vector, at the place of `where`.
  template <class T>
  T* contiguous(std::int64_t count, const Tensor& where) const {
    constexpr bool whole = std::is_integral_v<T>;
    expect(seen_.code == (whole ? dlpack::integer : dlpack::floating) &&
               seen_.bits == 8 * sizeof(T) && seen_.lanes == 1,
           "is of another type");
    expect(same_place(where), "is on another device");
    expect(elements() == count, "is of another size");
    expect_memory(count);
    expect_aligned(sizeof(T));
    std::int64_t stride = 1;
    for (int at = seen_.dimensions - 1; at >= 0 && seen_.strides && count > 1; --at) {
      expect(seen_.shape[at] == 1 || seen_.strides[at] == stride, "must be contiguous");
      stride *= seen_.shape[at];
    }
    return data<T>();
  }

  void expect(bool holds, const char* what) const {
    if (!holds) throw std::invalid_argument(std::string(name_) + " " + what + ".");
  }

 private:
  // A view of a tensor without memory (a fake one, or one that is all zeros) begins at null and as
  // many bytes as its offset says. Where Linux on 64 bits puts memory, none begins that low, so
  // hardly any other tensor needs to be asked, which takes longer than the rest of a call.
  void expect_memory(std::int64_t count) const {
    constexpr std::uintptr_t usual = std::uintptr_t{1} << 46;
    if (count == 0) return;
    bool has = seen_.data != nullptr;
    if (has && reinterpret_cast<std::uintptr_t>(seen_.data) < usual)
      has = object_.attr("untyped_storage")().attr("data_ptr")().cast<std::uintptr_t>() != 0;
    expect(has, "has no memory");
  }

  // Views of bytes, as `torch.frombuffer` makes them, may start anywhere.
  void expect_aligned(std::size_t size) const {
    expect(reinterpret_cast<std::uintptr_t>(data<void>()) % size == 0,
           "must begin at a multiple of its elements' size");
  }

  void ask(py::handle tensor) {
    for (const py::handle size : tensor.attr("shape")) own_.push_back(size.cast<std::int64_t>());
    const std::size_t dimensions = own_.size();
    for (const py::handle step : tensor.attr("stride")()) own_.push_back(step.cast<std::int64_t>());
    const std::string type = py::str(tensor.attr("dtype"));
    const bool whole = type.find(".int") != std::string::npos;
    const std::string device = py::str(tensor.attr("device").attr("type"));
    seen_.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
    seen_.device_type = device == "cpu" ? dlpack::cpu : device == "cuda" ? dlpack::cuda : 0;
    seen_.device = device == "cuda" ? tensor.attr("device").attr("index").cast<std::int32_t>() : 0;
    seen_.dimensions = static_cast<std::int32_t>(dimensions);
    seen_.code = whole                                        ? dlpack::integer
                 : type.find("bfloat16") != std::string::npos ? dlpack::bfloat
                 : type.find(".float") != std::string::npos   ? dlpack::floating
                                                              : 255;
    seen_.bits = static_cast<std::uint8_t>(8 * tensor.attr("element_size")().cast<int>());
    seen_.lanes = 1;
    seen_.shape = own_.data();
    seen_.strides = own_.data() + dimensions;
    seen_.byte_offset = 0;
  }

  py::handle object_;
  const char* name_;
  dlpack::Tensor seen_{};
  std::vector<std::int64_t> own_;  // shape and strides, where the class has no table
};

}  // namespace lapefast::binding
