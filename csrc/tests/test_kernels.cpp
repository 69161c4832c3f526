// The kernels without Python: every instruction set, and the GPU's kernels on a CPU, against scalar
// arithmetic, at the edges of memory, and from several threads at once. Built to run under the
// sanitizers too.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "lapefast/cuda.h"
#include "lapefast/library.h"

// A thread pool that the sanitizers can see through, under the names by which the library looks for
// the OpenMP runtime.
thread_local int thread_index = 0;
thread_local int thread_count = 1;
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

namespace {

using lapefast::Activation;
using lapefast::DType;

// Who computes.
struct Engine {
  std::string name;
  void (*profile)(const lapefast::ProfileCall& call);
  void (*edit)(const lapefast::EditCall& call);
};

float widen(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Small numbers of both signs that repeat with a long period; none is zero.
std::uint16_t sample(std::int64_t at) {
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

struct Tally {
  std::vector<std::int64_t> counts;
  std::vector<double> sums, square_sums, up_abs_sums;
  std::int64_t flags[2] = {0, 0};
  Tally(std::int64_t groups, std::int64_t width)
      : counts(groups * width), sums(counts.size()), square_sums(sums), up_abs_sums(sums) {}
  lapefast::Statistics view(std::int64_t groups) {
    return {groups, counts.data(), sums.data(), square_sums.data(), up_abs_sums.data()};
  }
};

lapefast::ProfileCall profile_call(Matrix& gate, Matrix& up, Matrix& product,
                                   const std::vector<std::int32_t>& groups, Tally& tally,
                                   std::int64_t group_count) {
  lapefast::ProfileCall call{};
  call.dtype = DType::bfloat16;
  call.activation = Activation::relu;
  call.rows = gate.rows;
  call.width = gate.width;
  call.gate = gate.view();
  call.up = up.view();
  call.product = product.view();
  call.groups = {groups.data(), static_cast<std::int64_t>(groups.size())};
  call.statistics = tally.view(group_count);
  call.flags = tally.flags;
  return call;
}

// Widths around the blocks of every instruction set and the tiles, and some that a GPU reads 16
// bytes at a time; strides with and without a gap.
void profile_equals_scalar_arithmetic(const Engine& engine) {
  for (const std::int64_t width :
       {1, 3, 7, 8, 9, 16, 31, 32, 33, 64, 100, 264, 2047, 2048, 2049, 4101})
    for (const std::int64_t rows : {0, 1, 2, 5, 70})
      for (const std::int64_t gap : {0, 5, 8}) {
        const std::string where =
            engine.name + " [" + std::to_string(rows) + ", " + std::to_string(width) + "]";
        Matrix gate(rows, width, width + gap, 1), up(rows, width, width + gap, 2);
        Matrix product(rows, width, width, 3);
        std::vector<std::int32_t> groups(rows);
        for (std::int64_t row = 0; row < rows; ++row)
          groups[row] = static_cast<std::int32_t>(row < 30 ? row % 4 - 1 : row / 9 % 3);
        Tally tally(3, width), expected(3, width);
        engine.profile(profile_call(gate, up, product, groups, tally, 3));
        bool products = true;
        for (std::int64_t row = 0; row < rows; ++row)
          for (std::int64_t column = 0; column < width; ++column) {
            const float value = widen(gate.at(row, column)), factor = widen(up.at(row, column));
            const float active = value < 0 ? 0.0f : value;
            const std::uint16_t made = narrow(active * factor);
            products = products && product.at(row, column) == made;
            if (groups[row] < 0) continue;
            const std::int64_t cell = groups[row] * width + column;
            expected.counts[cell] += active > 0;
            expected.sums[cell] += active;
            expected.square_sums[cell] += static_cast<double>(widen(made)) * widen(made);
            expected.up_abs_sums[cell] += std::fabs(factor);
          }
        CHECK(products, where);
        CHECK(tally.counts == expected.counts, where);
        // The samples are multiples of 2^-7 below 8: sums of them are exact in float32.
        CHECK(tally.sums == expected.sums, where);
        CHECK(tally.up_abs_sums == expected.up_abs_sums, where);
        for (std::size_t cell = 0; cell < expected.square_sums.size(); ++cell) {
          const double total = expected.square_sums[cell];
          // At most 64 additions and one rounded square, each by 2^-24.
          CHECK(std::fabs(tally.square_sums[cell] - total) <= 65 * 0x1p-24 * total, where);
        }
        CHECK(tally.flags[0] == 0 && tally.flags[1] == 0, where);
      }
}

void edit_touches_only_what_its_tables_name(const Engine& engine) {
  for (const std::int64_t width : {1, 33, 100, 264, 2100}) {
    Matrix gate(6, width, width, 1), up(6, width, width, 2), product(6, width, width, 3);
    const std::vector<std::int32_t> sets{0, -1, 1, 0, 1, -1};
    const std::int32_t last = static_cast<std::int32_t>(width - 1);
    const std::vector<std::int32_t> offsets{0, 1, 2}, neurons{0, last};
    const std::vector<float> scale{0.0f, 2.0f}, shift{3.0f, -1.0f};
    lapefast::EditCall call{};
    call.dtype = DType::bfloat16;
    call.activation = Activation::identity;
    call.rows = 6;
    call.width = width;
    call.gate = gate.view();
    call.up = up.view();
    call.product = product.view();
    call.sets = {sets.data(), 6};
    call.set_count = 2;
    call.offsets = offsets.data();
    call.capacity = 2;
    call.neurons = neurons.data();
    call.scale = scale.data();
    call.shift = shift.data();
    std::int64_t flags[2] = {0, 0};
    call.flags = flags;
    engine.edit(call);
    for (std::int64_t row = 0; row < 6; ++row)
      for (std::int64_t column = 0; column < width; ++column) {
        float active = widen(gate.at(row, column));
        if (sets[row] == 0 && column == 0) active = 3.0f;
        if (sets[row] == 1 && column == last) active = widen(narrow(2.0f * active - 1.0f));
        const std::uint16_t made = narrow(active * widen(up.at(row, column)));
        CHECK(product.at(row, column) == made, engine.name + " width " + std::to_string(width));
      }
    CHECK(flags[0] == 0 && flags[1] == 0, engine.name);
  }
}

#ifdef LAPEFAST_CUDA_ON_CPU
const Engine gpu{"cuda on a CPU",
                 [](const auto& call) { lapefast::cuda::profile(call, {nullptr, 2}); },
                 [](const auto& call) { lapefast::cuda::edit(call, {nullptr, 2}); }};

void a_bad_group_is_skipped_and_counted_on_a_gpu() {
  for (const std::int64_t width : {50, 256}) {
    Matrix gate(6, width, width, 1), up(6, width, width, 2), product(6, width, width, 3);
    Tally tally(3, width), expected(3, width);
    std::vector<std::int32_t> groups{0, 3, 1, -2, 2, std::numeric_limits<std::int32_t>::max()};
    gpu.profile(profile_call(gate, up, product, groups, tally, 3));
    CHECK(tally.flags[1] == 3, gpu.name);
    groups = {0, -1, 1, -1, 2, -1};
    gpu.profile(profile_call(gate, up, product, groups, expected, 3));
    CHECK(tally.counts == expected.counts && tally.sums == expected.sums, gpu.name);
  }
}

// Tables may hold anything: the kernel must neither leave memory nor write where it should not.
void tables_of_nonsense_are_survived_on_a_gpu() {
  std::uint32_t state = 1;
  const auto random = [&state] { return state = state * 1664525u + 1013904223u; };
  for (int round = 0; round < 200; ++round) {
    const std::int64_t width = round % 2 ? 50 : 256;
    Matrix gate(5, width, width, 1), product(5, width, width, 3);
    std::vector<std::int32_t> sets(5), offsets(4), neurons(7);
    for (auto* table : {&sets, &offsets, &neurons})
      for (std::int32_t& entry : *table) {
        const std::uint32_t drawn = random();
        entry = static_cast<std::int32_t>(drawn % 3 ? drawn % 9 : drawn);
      }
    const std::vector<float> scale(7, 0.0f), shift(7, 1.0f);
    std::int64_t flags[2] = {0, 0};
    lapefast::EditCall call{};
    call.dtype = DType::bfloat16;
    call.activation = Activation::relu;
    call.rows = 5;
    call.width = width;
    call.gate = gate.view();
    call.product = product.view();
    call.sets = {sets.data(), 5};
    call.set_count = 3;
    call.offsets = offsets.data();
    call.capacity = 7;
    call.neurons = neurons.data();
    call.scale = scale.data();
    call.shift = shift.data();
    call.flags = flags;
    gpu.edit(call);
    for (std::int64_t row = 0; row < 5; ++row)
      for (std::int64_t column = 0; column < width; ++column) {
        const float value = widen(gate.at(row, column));
        const std::uint16_t made = product.at(row, column);
        CHECK(made == narrow(value < 0 ? 0.0f : value) || made == narrow(1.0f), gpu.name);
      }
  }
}

// Rows that lie more than 2^31 elements apart, in memory that is reserved but mostly never touched.
void rows_far_apart_are_addressed_in_64_bits_on_a_gpu() {
  const std::int64_t width = 256, stride = (std::int64_t{1} << 31) + 8, rows = 3;
  const std::size_t bytes = 2 * ((rows - 1) * stride + width);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(memory != MAP_FAILED, "");
  if (memory == MAP_FAILED) return;
  auto* data = static_cast<std::uint16_t*>(memory);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t column = 0; column < width; ++column)
      data[row * stride + column] = narrow(static_cast<float>(row + 1));
  Matrix none(rows, width, width, 1), product(rows, width, width, 3);
  Tally tally(1, width);
  auto call = profile_call(none, none, product, {}, tally, 1);
  call.gate = {data, stride};
  call.up = {};
  call.groups = {};
  call.statistics.up_abs_sums = nullptr;
  gpu.profile(call);
  CHECK(tally.counts == std::vector<std::int64_t>(width, rows), gpu.name);
  CHECK(tally.sums == std::vector<double>(width, 6.0), gpu.name);
  munmap(memory, bytes);
}
#endif

template <class Function>
bool refuses(const Function& function) {
  try {
    function();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void a_bad_index_is_refused_before_anything_is_written(const std::string& isa) {
  for (const std::int32_t bad : {3, -2, std::numeric_limits<std::int32_t>::max()}) {
    Matrix gate(4, 50, 50, 1), up(4, 50, 50, 2), product(4, 50, 50, 3);
    const std::vector<std::uint16_t> before = product.data;
    Tally tally(3, 50);
    const std::vector<std::int32_t> groups{0, 1, 2, bad};
    const auto call = profile_call(gate, up, product, groups, tally, 3);
    CHECK(refuses([&] { lapefast::profile(call, 1); }), isa);
    CHECK(product.data == before, isa);
    CHECK(tally.counts == std::vector<std::int64_t>(150), isa);
  }
}

// In any set, also one that no row has.
void bad_tables_are_refused_when_they_are_checked(const std::string& isa) {
  using Table = std::vector<std::int32_t>;
  const auto refused = [](const Table& offsets, const Table& neurons) {
    lapefast::EditCall call{};
    call.width = 50;
    call.set_count = static_cast<std::int64_t>(offsets.size()) - 1;
    call.offsets = offsets.data();
    call.capacity = static_cast<std::int64_t>(neurons.size());
    call.neurons = neurons.data();
    return refuses([&] { lapefast::check_tables(call); });
  };
  CHECK(!refused({0, 1, 3}, {49, 0, 1}) && !refused({0}, {}), isa);
  for (const std::int32_t bad : {-1, 50, std::numeric_limits<std::int32_t>::max()})
    CHECK(refused({0, 1, 3}, {49, 0, bad}), isa);
  for (const std::int32_t bad : {-1, 4, std::numeric_limits<std::int32_t>::max()})
    CHECK(refused({0, 1, bad}, {49, 0, 1}) && refused({0, bad, 3}, {49, 0, 1}), isa);
  CHECK(refused({0, 1, 3}, {49, 1, 1}) && refused({0, 2, 1}, {49, 0, 1}), isa);
}

void nonfinite_activations_are_counted(const Engine& engine) {
  for (const bool in_place : {false, true}) {
    Matrix gate(9, 70, 70, 1), up(9, 70, 70, 2), product(9, 70, 70, 3);
    gate.at(0, 0) = 0x7fc0;
    gate.at(5, 69) = 0x7f80;
    gate.at(8, 3) = 0x7f80;
    Tally tally(1, 70);
    const std::vector<std::int32_t> groups{0, 0, 0, 0, 0, 0, 0, 0, -1};
    engine.profile(profile_call(gate, up, in_place ? gate : product, groups, tally, 1));
    CHECK(tally.flags[0] == 2, engine.name);
  }
}

// Calls from several threads add to one set of statistics; nothing is lost, and a sanitizer of
// threads has nothing to say.
void several_threads_share_statistics(const std::string& isa) {
  const std::int64_t width = 2100;
  Tally shared(2, width), once(2, width);
  const std::vector<std::int32_t> groups{0, 1, 1, 0, 0};
  const auto run = [&](Tally& tally) {
    Matrix gate(5, width, width, 1), up(5, width, width, 2), product(5, width, width, 3);
    gate.at(1, 1) = 0x7fc0;
    lapefast::profile(profile_call(gate, up, product, groups, tally, 2), 1);
  };
  run(once);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread)
    threads.emplace_back([&] {
      for (int round = 0; round < 10; ++round) run(shared);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(shared.flags[0] == 40, isa);
  bool equal = true;
  for (std::size_t cell = 0; cell < shared.counts.size(); ++cell)
    equal = equal && shared.counts[cell] == 40 * once.counts[cell];
  CHECK(equal, isa);
}

// Any number of threads gives the same bits, whether they share out columns or rows.
void results_do_not_depend_on_the_number_of_threads(const std::string& isa) {
  for (const std::int64_t width : {100, 4500})
    for (const std::int64_t rows : {60, 64 * 9 + 5}) {
      Matrix gate(rows, width, width, 1), up(rows, width, width, 2);
      for (std::size_t at = 0; at < gate.data.size(); ++at) gate.data[at] ^= at % 128;
      std::vector<std::int32_t> groups(rows);
      for (std::int64_t row = 0; row < rows; ++row)
        groups[row] = static_cast<std::int32_t>(row < 200 ? row / 5 % 3 - 1 : row / 150 % 2);
      Matrix one(rows, width, width, 3);
      Tally expected(2, width);
      lapefast::profile(profile_call(gate, up, one, groups, expected, 2), 1);
      for (const int threads : {2, 3}) {
        Matrix product(rows, width, width, 4);
        Tally tally(2, width);
        lapefast::profile(profile_call(gate, up, product, groups, tally, 2), threads);
        const std::string where = isa + " " + std::to_string(threads) + " threads";
        CHECK(product.data == one.data, where);
        CHECK(tally.counts == expected.counts, where);
        CHECK(tally.sums == expected.sums, where);
        CHECK(tally.square_sums == expected.square_sums, where);
        CHECK(tally.up_abs_sums == expected.up_abs_sums, where);
      }
    }
}

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
  CHECK(lapefast::has_thread_pool(), "");
  for (const std::string& isa : lapefast::available_isas()) {
    lapefast::select_isa(isa);
    CHECK(lapefast::isa() == isa, isa);
    const Engine engine{isa, [](const auto& call) { lapefast::profile(call, 1); },
                        [](const auto& call) { lapefast::edit(call, 1); }};
    profile_equals_scalar_arithmetic(engine);
    edit_touches_only_what_its_tables_name(engine);
    edit_touches_only_what_its_tables_name(
        {isa + ", checked", engine.profile, [](const auto& call) {
           lapefast::check_tables(call);
           lapefast::edit_checked(call, 1);
         }});
    nonfinite_activations_are_counted(engine);
    a_bad_index_is_refused_before_anything_is_written(isa);
    bad_tables_are_refused_when_they_are_checked(isa);
    several_threads_share_statistics(isa);
    results_do_not_depend_on_the_number_of_threads(isa);
    leaving_one_out_equals_scalar_arithmetic(isa);
  }
  CHECK(refuses([] { lapefast::select_isa("none"); }), "");
#ifdef LAPEFAST_CUDA_ON_CPU
  profile_equals_scalar_arithmetic(gpu);
  edit_touches_only_what_its_tables_name(gpu);
  nonfinite_activations_are_counted(gpu);
  a_bad_group_is_skipped_and_counted_on_a_gpu();
  tables_of_nonsense_are_survived_on_a_gpu();
  rows_far_apart_are_addressed_in_64_bits_on_a_gpu();
#endif
  return checks::failures ? 1 : 0;
}
