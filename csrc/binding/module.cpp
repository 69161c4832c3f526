// lapefast._native: addresses, sizes and strides in, exceptions out. Tensors were checked by the
// caller (lapefast/ops/checks.py); what they hold is checked here, before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "lapefast/library.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Elements from which the interpreter's lock is released; below it, giving it up and taking it back
// costs more than the kernel runs.
constexpr Size release_lock_from = 1 << 16;

template <class Call>
void run(const Call& call, int threads, void (*op)(const Call&, int)) {
  if (call.rows * call.width >= release_lock_from) {
    py::gil_scoped_release released;
    op(call, threads);
  } else {
    op(call, threads);
  }
}

void check(int dtype, int activation, Size rows, Size width) {
  if (dtype < 0 || dtype > 2 || activation < 0 || activation >= lapefast::activation_count ||
      rows < 0 || width < 0)
    throw std::invalid_argument(
        "native call with an unknown dtype, activation or a negative size.");
}

void profile(int dtype, int activation, Size rows, Size width, Address gate, Size gate_stride,
             Address up, Size up_stride, Address product, Size product_stride, float threshold,
             Address groups, Size groups_size, Size group_count, Address counts, Address sums,
             Address square_sums, Address up_abs_sums, Address flags, int threads) {
  check(dtype, activation, rows, width);
  lapefast::ProfileCall call{};
  call.dtype = static_cast<lapefast::DType>(dtype);
  call.activation = static_cast<lapefast::Activation>(activation);
  call.rows = rows;
  call.width = width;
  call.gate = {pointer<void>(gate), gate_stride};
  call.up = {pointer<void>(up), up_stride};
  call.product = {pointer<void>(product), product_stride};
  call.threshold = threshold;
  call.groups = {pointer<std::int32_t>(groups), groups_size};
  call.statistics = {group_count, pointer<Size>(counts), pointer<double>(sums),
                     pointer<double>(square_sums), pointer<double>(up_abs_sums)};
  call.flags = pointer<Size>(flags);
  run(call, threads, lapefast::profile);
}

void edit(int dtype, int activation, Size rows, Size width, Address gate, Size gate_stride,
          Address up, Size up_stride, Address product, Size product_stride, Address sets,
          Size sets_size, Size set_count, Address offsets, Size capacity, Address neurons,
          Address scale, Address shift, int threads) {
  check(dtype, activation, rows, width);
  lapefast::EditCall call{};
  call.dtype = static_cast<lapefast::DType>(dtype);
  call.activation = static_cast<lapefast::Activation>(activation);
  call.rows = rows;
  call.width = width;
  call.gate = {pointer<void>(gate), gate_stride};
  call.up = {pointer<void>(up), up_stride};
  call.product = {pointer<void>(product), product_stride};
  call.sets = {pointer<std::int32_t>(sets), sets_size};
  call.set_count = set_count;
  call.offsets = pointer<std::int32_t>(offsets);
  call.capacity = capacity;
  call.neurons = pointer<std::int32_t>(neurons);
  call.scale = pointer<float>(scale);
  call.shift = pointer<float>(shift);
  run(call, threads, lapefast::edit);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of lapefast; used through lapefast.ops.";
  // What the user did wrong reaches Python as lapefast's own error.
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::invalid_argument& error) {
      py::set_error(py::module_::import("lapefast.errors").attr("InputError"), error.what());
    }
  });
  module.def("profile", &profile);
  module.def("edit", &edit);
  module.def("isa", &lapefast::isa, "The instruction set in use.");
  module.def("available_isas", &lapefast::available_isas,
             "Instruction sets that are compiled in and that this processor has, slowest first.");
  module.def("has_thread_pool", &lapefast::has_thread_pool,
             "Whether the OpenMP runtime that torch loaded was found.");
}
