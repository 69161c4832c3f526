// The profile op without Python: every instruction set, and the GPU's kernel on a CPU, against
// scalar arithmetic, at the edges of memory, and from several threads at once. Built to run under
// the sanitizers too.
#include <sys/mman.h>

#include <limits>

#include "kernels.h"
#include "lapefast/cuda.h"

namespace {

using namespace kernels;
using Call = lapefast::ProfileCall;

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

Call profile_call(Matrix& gate, Matrix& up, Matrix& product,
                  const std::vector<std::int32_t>& groups, Tally& tally, std::int64_t group_count) {
  Call call{};
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
void profile_equals_scalar_arithmetic(const Engine<Call>& engine) {
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
        engine.run(profile_call(gate, up, product, groups, tally, 3));
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

void nonfinite_activations_are_counted(const Engine<Call>& engine) {
  for (const bool in_place : {false, true}) {
    Matrix gate(9, 70, 70, 1), up(9, 70, 70, 2), product(9, 70, 70, 3);
    gate.at(0, 0) = 0x7fc0;
    gate.at(5, 69) = 0x7f80;
    gate.at(8, 3) = 0x7f80;
    Tally tally(1, 70);
    const std::vector<std::int32_t> groups{0, 0, 0, 0, 0, 0, 0, 0, -1};
    engine.run(profile_call(gate, up, in_place ? gate : product, groups, tally, 1));
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

#ifdef LAPEFAST_CUDA_ON_CPU
const Engine<Call> gpu{"cuda on a CPU",
                       [](const auto& call) { lapefast::cuda::profile(call, {nullptr, 2}); }};

void a_bad_group_is_skipped_and_counted_on_a_gpu() {
  for (const std::int64_t width : {50, 256}) {
    Matrix gate(6, width, width, 1), up(6, width, width, 2), product(6, width, width, 3);
    Tally tally(3, width), expected(3, width);
    std::vector<std::int32_t> groups{0, 3, 1, -2, 2, std::numeric_limits<std::int32_t>::max()};
    gpu.run(profile_call(gate, up, product, groups, tally, 3));
    CHECK(tally.flags[1] == 3, gpu.name);
    groups = {0, -1, 1, -1, 2, -1};
    gpu.run(profile_call(gate, up, product, groups, expected, 3));
    CHECK(tally.counts == expected.counts && tally.sums == expected.sums, gpu.name);
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
  gpu.run(call);
  CHECK(tally.counts == std::vector<std::int64_t>(width, rows), gpu.name);
  CHECK(tally.sums == std::vector<double>(width, 6.0), gpu.name);
  munmap(memory, bytes);
}
#endif

}  // namespace

int main() {
  CHECK(lapefast::has_thread_pool(), "");
  with_each_isa([](const std::string& isa) {
    const Engine<Call> engine{isa, [](const auto& call) { lapefast::profile(call, 1); }};
    profile_equals_scalar_arithmetic(engine);
    nonfinite_activations_are_counted(engine);
    a_bad_index_is_refused_before_anything_is_written(isa);
    several_threads_share_statistics(isa);
    results_do_not_depend_on_the_number_of_threads(isa);
  });
  CHECK(refuses([] { lapefast::select_isa("none"); }), "");
#ifdef LAPEFAST_CUDA_ON_CPU
  profile_equals_scalar_arithmetic(gpu);
  nonfinite_activations_are_counted(gpu);
  a_bad_group_is_skipped_and_counted_on_a_gpu();
  rows_far_apart_are_addressed_in_64_bits_on_a_gpu();
#endif
  return checks::failures ? 1 : 0;
}
