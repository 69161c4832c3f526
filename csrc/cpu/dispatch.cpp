// Checks what the indices hold, picks the instruction set, splits the columns over threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "lapefast/library.h"
#include "turn.h"

namespace lapefast {

namespace baseline {
extern const Kernels kernels;
}
#ifdef LAPEFAST_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found{&baseline::kernels};
#ifdef LAPEFAST_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2) found.push_back(&avx2::kernels);
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::kernels);
#endif
  return found;
}

const Kernels* named(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) return kernels;
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  throw std::invalid_argument("LAPEFAST_CPU_ISA must be one of " + names +
                              " on this processor, got '" + name + "'.");
}

std::atomic<const Kernels*> selected{nullptr};

const Kernels& kernels() {
  const Kernels* current = selected.load(std::memory_order_acquire);
  if (!current) {
    const char* forced = std::getenv("LAPEFAST_CPU_ISA");
    current = forced && *forced ? named(forced) : available().back();
    selected.store(current, std::memory_order_release);
  }
  return *current;
}

[[noreturn]] void refuse_index(const char* what, const char* things, std::int64_t got,
                               std::int64_t count) {
  throw std::invalid_argument(std::string(what) + " holds " + std::to_string(got) +
                              ", but there are " + std::to_string(count) + " " + things +
                              ", numbered from 0 (-1 for none).");
}

void check_rows(const RowIndex& index, std::int64_t rows, std::int64_t count, const char* what,
                const char* things) {
  if (!index.data) {
    if (rows > 0 && count < 1) refuse_index(what, things, 0, count);
    return;
  }
  const std::int64_t size = rows > 0 ? index.size : 0;
  for (std::int64_t row = 0; row < size; ++row)
    if (index.data[row] < -1 || index.data[row] >= count)
      refuse_index(what, things, index.data[row], count);
}

void check_set(const EditCall& call, std::int64_t set) {
  const std::int64_t start = call.offsets[set], stop = call.offsets[set + 1];
  if (start < 0 || stop < start || stop > call.capacity)
    throw std::invalid_argument("edit: offsets[" + std::to_string(set) + ":" +
                                std::to_string(set + 2) + "] must ascend within [0, " +
                                std::to_string(call.capacity) + "], got " + std::to_string(start) +
                                " and " + std::to_string(stop) + ".");
  std::int64_t previous = -1;
  for (std::int64_t entry = start; entry < stop; ++entry) {
    const std::int64_t neuron = call.neurons[entry];
    if (neuron < 0 || neuron >= call.width)
      throw std::invalid_argument("edit: neurons of set " + std::to_string(set) +
                                  " must lie within [0, " + std::to_string(call.width) + "), got " +
                                  std::to_string(neuron) + ".");
    if (neuron <= previous)
      throw std::invalid_argument("edit: neurons of set " + std::to_string(set) +
                                  " must ascend without repeats.");
    previous = neuron;
  }
}

void check_sets(const EditCall& call) {
  if (call.rows == 0) return;
  const std::int64_t size = call.sets.data ? call.sets.size : 1;
  std::vector<bool> checked(static_cast<std::size_t>(call.set_count), false);
  for (std::int64_t row = 0; row < size; ++row) {
    const std::int64_t set = call.sets.data ? call.sets.data[row] : 0;
    if (set < 0 || checked[static_cast<std::size_t>(set)]) continue;
    check_set(call, set);
    checked[static_cast<std::size_t>(set)] = true;
  }
}

// A thread gets whole 128-byte pieces of a row (64 columns of two bytes): no two threads write to
// one cache line, nor to the pair of lines that prefetchers fetch together.
constexpr std::int64_t column_unit = 64;
// From so many chunks for each thread on, rows are shared out, else columns. Two threads on halves
// of short rows take each other's lines: [4096, 1024] took 1.5 times as long.
constexpr std::int64_t chunks_per_thread = 2;

template <class Call>
struct Job {
  const Call* call;
  void (*kernel)(const Call&, const Share&);
  Turn* turn;
};

template <class Call>
void run_columns(void* context, int index, int count) {
  auto& job = *static_cast<Job<Call>*>(context);
  const std::int64_t width = job.call->width;
  const std::int64_t units = (width + column_unit - 1) / column_unit;
  const std::int64_t begin = units * index / count * column_unit;
  const std::int64_t end = std::min(width, units * (index + 1) / count * column_unit);
  if (begin < end) job.kernel(*job.call, {begin, end, 0, 1, nullptr});
}

template <class Call>
void run_rows(void* context, int index, int count) {
  auto& job = *static_cast<Job<Call>*>(context);
  job.kernel(*job.call, {0, job.call->width, index, count, job.turn});
}

template <class Call>
void split(const Call& call, int threads, void (*kernel)(const Call&, const Share&)) {
  if (call.rows == 0 || call.width == 0) return;
  const std::int64_t units = (call.width + column_unit - 1) / column_unit;
  const std::int64_t chunks = (call.rows + chunk_rows - 1) / chunk_rows;
  Job<Call> job{&call, kernel, nullptr};
  if (threads > 1 && chunks >= chunks_per_thread * threads) {
    Turn turn(static_cast<std::size_t>((call.width + tile_width - 1) / tile_width));
    job.turn = &turn;
    run_parallel(threads, run_rows<Call>, &job);
  } else {
    run_parallel(static_cast<int>(std::min<std::int64_t>(threads, units)), run_columns<Call>, &job);
  }
}

struct LeaveOneOutJob {
  const LeaveOneOutCall* call;
  std::vector<float>* scratch;
};

void run_leave_one_out(void* context, int index, int count) {
  const auto& job = *static_cast<LeaveOneOutJob*>(context);
  kernels().leave_one_out(*job.call, index, count, job.scratch->data() + index * job.call->columns);
}

void check_ends(const LeaveOneOutCall& call) {
  for (std::int64_t row = 0; row < call.heads * call.length; ++row)
    if (call.ends[row] < 0 || call.ends[row] > call.columns)
      throw std::invalid_argument("leave_one_out: ends must lie within [0, " +
                                  std::to_string(call.columns) + "], got " +
                                  std::to_string(call.ends[row]) + ".");
}

}  // namespace

void leave_one_out(const LeaveOneOutCall& call, int threads) {
  check_ends(call);
  const std::int64_t scores = call.heads * call.dimensions;
  if (scores == 0) return;
  const int shares = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), scores));
  std::vector<float> scratch(static_cast<std::size_t>(shares * call.columns));
  LeaveOneOutJob job{&call, &scratch};
  run_parallel(shares, run_leave_one_out, &job);
}

void profile(const ProfileCall& call, int threads) {
  const char* what = call.product.data ? "profile: groups" : "observe: groups";
  check_rows(call.groups, call.rows, call.statistics.groups, what, "groups");
  split(call, threads, kernels().profile);
}

void edit(const EditCall& call, int threads) {
  check_rows(call.sets, call.rows, call.set_count, "edit: sets", "sets");
  check_sets(call);
  split(call, threads, kernels().edit);
}

void check_tables(const EditCall& call) {
  for (std::int64_t set = 0; set < call.set_count; ++set) check_set(call, set);
}

void edit_checked(const EditCall& call, int threads) {
  check_rows(call.sets, call.rows, call.set_count, "edit: sets", "sets");
  split(call, threads, kernels().edit);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

std::string isa() { return kernels().name; }

void select_isa(const std::string& name) { selected.store(named(name), std::memory_order_release); }

}  // namespace lapefast
