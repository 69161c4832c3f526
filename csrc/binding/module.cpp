// lapefast._native: tensors in, exceptions out. What the user may get wrong the caller says with
// the better message (lapefast/ops/checks.py), before a call or once it is refused here, where
// nothing is believed: sizes, types and places are read from the tensors themselves, and what they
// hold before anything is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "lapefast/cuda.h"
#include "lapefast/library.h"
#include "tensor.h"

namespace {

namespace py = pybind11;
using lapefast::binding::Tensor;

// gate, up and product, of one type, shape and place.
template <class Call>
void set_rows(Call& call, int activation, const Tensor& gate, py::handle up, py::handle product) {
  if (activation < 0 || activation >= lapefast::activation_count)
    throw std::invalid_argument("activation has no such number.");
  call.activation = static_cast<lapefast::Activation>(activation);
  call.dtype = gate.float_type();
  call.rows = gate.rows();
  call.width = gate.width();
  call.gate = gate.as_rows();
  const auto like_gate = [&](py::handle object, const char* name) -> lapefast::Rows {
    if (object.is_none()) return {};
    const Tensor tensor(object, name);
    tensor.float_type();
    tensor.expect(tensor.same_type(gate) && tensor.same_place(gate) && tensor.same_sizes(gate),
                  "must be as gate is");
    return tensor.as_rows();
  };
  call.up = like_gate(up, "up");
  call.product = like_gate(product, "product");
}

lapefast::RowIndex row_index(py::handle object, const char* name, const Tensor& gate) {
  if (object.is_none()) return {};
  const Tensor index(object, name);
  const std::int64_t size = index.elements() == 1 ? 1 : gate.rows();
  return {index.contiguous<std::int32_t>(size, gate), size};
}

std::int64_t* flags_of(py::handle object, const Tensor& gate) {
  const Tensor flags(object, "flags");
  flags.expect(flags.dimensions() == 1, "must have one dimension");
  return flags.contiguous<std::int64_t>(2, gate);
}

lapefast::ProfileCall profile_call(const Tensor& gate, py::handle up, py::handle product,
                                   int activation, float threshold, py::handle groups,
                                   py::handle counts, py::handle sums, py::handle square_sums,
                                   py::handle up_abs_sums, py::handle flags) {
  lapefast::ProfileCall call{};
  set_rows(call, activation, gate, up, product);
  if (std::isnan(threshold)) throw std::invalid_argument("threshold must be a number.");
  call.threshold = threshold;
  call.groups = row_index(groups, "groups", gate);
  constexpr std::int64_t none = INT64_MAX;
  call.statistics.groups = none;
  const auto add_statistic = [&](py::handle object, const char* name, auto*& address) {
    if (object.is_none()) return;
    const Tensor statistic(object, name);
    const std::int64_t held = statistic.rows();
    statistic.expect(statistic.dimensions() == 2 && statistic.width() == call.width &&
                         (call.statistics.groups == none || held == call.statistics.groups),
                     "is of another size");
    call.statistics.groups = held;
    address = statistic.contiguous<std::remove_reference_t<decltype(*address)>>(
        statistic.elements(), gate);
  };
  add_statistic(counts, "counts", call.statistics.counts);
  add_statistic(sums, "sums", call.statistics.sums);
  add_statistic(square_sums, "square_sums", call.statistics.square_sums);
  add_statistic(up_abs_sums, "up_abs_sums", call.statistics.up_abs_sums);
  call.flags = flags_of(flags, gate);
  if (!up_abs_sums.is_none() && up.is_none()) throw std::invalid_argument("up_abs_sums needs up.");
  return call;
}

void set_edited(lapefast::EditCall& call, int activation, const Tensor& gate, py::handle up,
                py::handle product, py::handle sets) {
  set_rows(call, activation, gate, up, product);
  if (product.is_none()) throw std::invalid_argument("edit needs a product.");
  if (call.product.data == call.gate.data && call.gate.data &&
      (call.activation != lapefast::Activation::identity || call.up.data ||
       call.product.stride != call.gate.stride))
    throw std::invalid_argument("edit writes over gate only where nothing else is computed.");
  call.sets = row_index(sets, "sets", gate);
}

// `place`: a tensor that lies where the tables must.
void set_tables(lapefast::EditCall& call, const Tensor& place, py::handle offsets,
                py::handle neurons, py::handle scale, py::handle shift) {
  const Tensor bounds(offsets, "offsets"), members(neurons, "neurons");
  call.set_count = bounds.elements() - 1;
  bounds.expect(call.set_count >= 0, "must hold one more than there are sets");
  call.offsets = bounds.contiguous<std::int32_t>(call.set_count + 1, place);
  call.capacity = members.elements();
  call.neurons = members.contiguous<std::int32_t>(call.capacity, place);
  call.scale = Tensor(scale, "scale").contiguous<float>(call.capacity, place);
  call.shift = Tensor(shift, "shift").contiguous<float>(call.capacity, place);
}

// Elements from which the interpreter's lock is released; below it, giving it up and taking it back
// costs more than the kernel runs.
constexpr std::int64_t release_lock_from = 1 << 16;

template <class Call>
void run_on_cpu(const Call& call, int threads, void (*op)(const Call&, int)) {
  if (call.rows * call.width >= release_lock_from) {
    py::gil_scoped_release released;
    op(call, threads);
  } else {
    op(call, threads);
  }
}

#ifdef LAPEFAST_CUDA_ON_CPU
// For tests: the GPU's kernels, on a CPU's memory.
bool cuda_on_cpu = false;
#endif

// `resource`: how many threads may compute, or on a GPU the stream to queue on.
template <class Call>
void run(const Tensor& gate, const Call& call, std::uintptr_t resource,
         void (*on_cpu)(const Call&, int),
         [[maybe_unused]] void (*on_gpu)(const Call&, lapefast::cuda::Stream)) {
#ifdef LAPEFAST_CUDA_ON_CPU
  if (cuda_on_cpu) return on_gpu(call, {nullptr, static_cast<int>(resource)});
#endif
  if (gate.device_type() == lapefast::binding::dlpack::cpu)
    return run_on_cpu(call, static_cast<int>(resource), on_cpu);
#ifdef LAPEFAST_CUDA
  if (gate.device_type() == lapefast::binding::dlpack::cuda) {
    const int processors = lapefast::cuda::processors_of(gate.device());
    return on_gpu(call, {reinterpret_cast<void*>(resource), processors});
  }
#endif
  gate.expect(false, "is on a device that this library was not built for");
}

#ifdef LAPEFAST_CUDA
constexpr bool has_cuda = true;
constexpr auto profile_on_gpu = &lapefast::cuda::profile;
constexpr auto edit_on_gpu = &lapefast::cuda::edit;
#else
constexpr bool has_cuda = false;
constexpr std::nullptr_t profile_on_gpu = nullptr, edit_on_gpu = nullptr;
#endif

void profile(py::handle gate_object, py::handle up, py::handle product, int activation,
             float threshold, py::handle groups, py::handle counts, py::handle sums,
             py::handle square_sums, py::handle up_abs_sums, py::handle flags,
             std::uintptr_t resource) {
  const Tensor gate(gate_object, "gate");
  run<lapefast::ProfileCall>(gate,
                             profile_call(gate, up, product, activation, threshold, groups, counts,
                                          sums, square_sums, up_abs_sums, flags),
                             resource, lapefast::profile, profile_on_gpu);
}

void edit(py::handle gate_object, py::handle up, py::handle product, int activation,
          py::handle sets, py::handle offsets, py::handle neurons, py::handle scale,
          py::handle shift, py::handle flags, std::uintptr_t resource) {
  const Tensor gate(gate_object, "gate");
  lapefast::EditCall call{};
  set_edited(call, activation, gate, up, product, sets);
  set_tables(call, gate, offsets, neurons, scale, shift);
  call.flags = flags_of(flags, gate);
  run<lapefast::EditCall>(gate, call, resource, lapefast::edit, edit_on_gpu);
}

// Edit tables on the CPU, copied and checked once. A decoding step comes back to the same ones for
// every token and layer, and reading four tensors anew takes longer than the kernel runs.
class KeptTables {
 public:
  KeptTables(py::handle offsets, py::handle neurons, py::handle scale, py::handle shift,
             std::int64_t width) {
    const Tensor place(offsets, "offsets");
    place.expect(place.device_type() == lapefast::binding::dlpack::cpu, "must be on the CPU");
    if (width < 0) throw std::invalid_argument("width must not be negative.");
    set_tables(tables_, place, offsets, neurons, scale, shift);
    tables_.width = width;
    own(offsets_, tables_.offsets, tables_.set_count + 1);
    own(neurons_, tables_.neurons, tables_.capacity);
    own(scale_, tables_.scale, tables_.capacity);
    own(shift_, tables_.shift, tables_.capacity);
    lapefast::check_tables(tables_);
  }
  KeptTables(const KeptTables&) = delete;

  void edit(const Tensor& gate, py::handle up, py::handle product, int activation, py::handle sets,
            int threads) const {
    lapefast::EditCall call = tables_;
    set_edited(call, activation, gate, up, product, sets);
    edit_on_cpu(gate, call, threads);
  }

  // Edits a made activation where it lies.
  void edit_in_place(const Tensor& activation, py::handle sets, int threads) const {
    lapefast::EditCall call = tables_;
    constexpr int identity = static_cast<int>(lapefast::Activation::identity);
    set_rows(call, identity, activation, py::none(), py::none());
    activation.expect(call.rows < 2 || call.gate.stride >= call.width, "must not overlap itself");
    call.product = call.gate;
    call.sets = row_index(sets, "sets", activation);
    edit_on_cpu(activation, call, threads);
  }

 private:
  template <class T>
  static void own(std::vector<T>& copy, const T*& address, std::int64_t count) {
    if (count > 0) copy.assign(address, address + count);
    address = copy.data();
  }

  void edit_on_cpu(const Tensor& gate, const lapefast::EditCall& call, int threads) const {
    gate.expect(gate.device_type() == lapefast::binding::dlpack::cpu, "must be on the CPU");
    gate.expect(call.width == tables_.width, "must be as wide as its tables say");
    run_on_cpu(call, threads, lapefast::edit_checked);
  }

  std::vector<std::int32_t> offsets_, neurons_;
  std::vector<float> scale_, shift_;
  lapefast::EditCall tables_{};
};

// Kept tables are a capsule, which Python can hold and pass on, but neither make nor look into.
constexpr const char* kept_name = "lapefast.KeptTables";

py::capsule keep_tables(py::handle offsets, py::handle neurons, py::handle scale, py::handle shift,
                        std::int64_t width) {
  auto kept = std::make_unique<KeptTables>(offsets, neurons, scale, shift, width);
  py::capsule capsule(kept.get(), kept_name,
                      [](void* held) { delete static_cast<KeptTables*>(held); });
  kept.release();
  return capsule;
}

const KeptTables& kept_in(py::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), kept_name))
    throw std::invalid_argument("tables must be what keep_tables returned.");
  return *static_cast<const KeptTables*>(PyCapsule_GetPointer(capsule.ptr(), kept_name));
}

void edit_kept(py::handle tables, py::handle gate, py::handle up, py::handle product,
               int activation, py::handle sets, int threads) {
  kept_in(tables).edit(Tensor(gate, "gate"), up, product, activation, sets, threads);
}

void edit_kept_in_place(py::handle tables, py::handle activation, py::handle sets, int threads) {
  kept_in(tables).edit_in_place(Tensor(activation, "activation"), sets, threads);
}

void leave_one_out(py::handle query_object, py::handle keys, py::handle logits,
                   py::handle probabilities, py::handle ends, py::handle scores, int threads) {
  const Tensor query(query_object, "query"), key(keys, "keys"), map(logits, "logits");
  lapefast::LeaveOneOutCall call{};
  query.expect(query.device_type() == lapefast::binding::dlpack::cpu, "must be on the CPU");
  query.expect(query.dimensions() == 3, "must be [heads, length, dimensions]");
  key.expect(key.dimensions() == 3, "must be [key heads, dimensions, columns]");
  call.heads = query.size(0), call.length = query.size(1), call.dimensions = query.size(2);
  call.key_heads = key.size(0), call.columns = key.size(2);
  key.expect(call.key_heads > 0 && call.heads % call.key_heads == 0,
             "must serve equally many heads each");
  key.expect(call.columns % lapefast::map_unit == 0, "must be padded");
  key.expect(key.size(1) == call.dimensions, "must have as many dimensions as query");
  const std::int64_t rows = query.times(call.heads, call.length);
  const std::int64_t cells = query.times(rows, call.columns);
  call.query = query.contiguous<float>(query.elements(), query);
  call.keys = key.contiguous<float>(key.elements(), query);
  call.logits = map.contiguous<float>(cells, query);
  call.probabilities = Tensor(probabilities, "probabilities").contiguous<float>(cells, query);
  call.ends = Tensor(ends, "ends").contiguous<std::int32_t>(rows, query);
  call.scores =
      Tensor(scores, "scores").contiguous<double>(query.times(call.heads, call.dimensions), query);
  py::gil_scoped_release released;
  lapefast::leave_one_out(call, threads);
}

void rank_rows(py::handle scores_object, py::handle classes, py::handle ordered, py::handle last) {
  const Tensor scores(scores_object, "scores");
  scores.expect(scores.device_type() == lapefast::binding::dlpack::cpu, "must be on the CPU");
  scores.expect(scores.dimensions() == 2, "must be [rows, width]");
  scores.expect(scores.width() < std::int64_t{1} << 32, "has rows that are too long");
  lapefast::RankCall call{};
  const std::int64_t cells = scores.elements();
  call.rows = scores.rows(), call.width = scores.width();
  call.scores = scores.contiguous<float>(cells, scores);
  call.classes = Tensor(classes, "classes").contiguous<std::int32_t>(call.width, scores);
  call.ordered = Tensor(ordered, "ordered").contiguous<std::int32_t>(cells, scores);
  call.last = Tensor(last, "last").contiguous<std::int8_t>(cells, scores);
  py::gil_scoped_release released;
  lapefast::rank_rows(call);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Kernels of lapefast; used through lapefast.ops.";
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
  module.def("keep_tables", &keep_tables, "Edit tables on the CPU, copied and checked once.");
  module.def("edit_kept", &edit_kept);
  module.def("edit_kept_in_place", &edit_kept_in_place);
  module.def("leave_one_out", &leave_one_out);
  module.def("rank_rows", &rank_rows);
  module.def("isa", &lapefast::isa, "The instruction set in use.");
  module.def("available_isas", &lapefast::available_isas,
             "Instruction sets that are compiled in and that this processor has, slowest first.");
  module.def("has_thread_pool", &lapefast::has_thread_pool,
             "Whether the OpenMP runtime that torch loaded was found.");
  module.attr("has_cuda") = has_cuda;
#ifdef LAPEFAST_CUDA
  module.def("cuda_problem", &lapefast::cuda::problem,
             "Why the CUDA kernels cannot run with the driver of this machine; empty if they can.");
#endif
#ifdef LAPEFAST_CUDA_ON_CPU
  module.def("run_cuda_on_cpu", [] { cuda_on_cpu = true; });
#endif
}
