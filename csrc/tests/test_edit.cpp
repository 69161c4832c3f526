// The edit op without Python: every instruction set, and the GPU's kernel on a CPU, against scalar
// arithmetic, and with tables that hold anything. Built to run under the sanitizers too.
#include <limits>

#include "kernels.h"
#include "lapefast/cuda.h"

namespace {

using namespace kernels;
using Call = lapefast::EditCall;

// Edits of bfloat16 matrices: which set each row has, and the tables of the sets.
struct Edits {
  std::vector<std::int32_t> sets, offsets, neurons;
  std::vector<float> scale, shift;
  std::int64_t flags[2] = {0, 0};

  // The call; up may be none. It points into this and the matrices.
  Call of(Activation activation, Matrix& gate, Matrix* up, Matrix& product) {
    Call call{};
    call.dtype = DType::bfloat16;
    call.activation = activation;
    call.rows = gate.rows;
    call.width = gate.width;
    call.gate = gate.view();
    if (up) call.up = up->view();
    call.product = product.view();
    call.sets = {sets.data(), gate.rows};
    call.set_count = static_cast<std::int64_t>(offsets.size()) - 1;
    call.offsets = offsets.data();
    call.capacity = static_cast<std::int64_t>(neurons.size());
    call.neurons = neurons.data();
    call.scale = scale.data();
    call.shift = shift.data();
    call.flags = flags;
    return call;
  }
};

void edit_touches_only_what_its_tables_name(const Engine<Call>& engine) {
  for (const std::int64_t width : {1, 33, 100, 264, 2100}) {
    Matrix gate(6, width, width, 1), up(6, width, width, 2), product(6, width, width, 3);
    const std::int32_t last = static_cast<std::int32_t>(width - 1);
    Edits edits{{0, -1, 1, 0, 1, -1}, {0, 1, 2}, {0, last}, {0.0f, 2.0f}, {3.0f, -1.0f}};
    engine.run(edits.of(Activation::identity, gate, &up, product));
    for (std::int64_t row = 0; row < 6; ++row)
      for (std::int64_t column = 0; column < width; ++column) {
        float active = widen(gate.at(row, column));
        if (edits.sets[row] == 0 && column == 0) active = 3.0f;
        if (edits.sets[row] == 1 && column == last) active = widen(narrow(2.0f * active - 1.0f));
        const std::uint16_t made = narrow(active * widen(up.at(row, column)));
        CHECK(product.at(row, column) == made, engine.name + " width " + std::to_string(width));
      }
    CHECK(edits.flags[0] == 0 && edits.flags[1] == 0, engine.name);
  }
}

// Set 0 edits every neuron, set 1 runs of neighbours and some that stand alone, set 2 every third.
void each_edited_neuron_has_its_own_edit(const Engine<Call>& engine) {
  const auto edited = [](std::int64_t set, std::int64_t column) {
    const bool in_run = column % 101 > 20, alone = column % 101 == 7;
    return set == 0 || (set == 1 && (in_run || alone)) || (set == 2 && column % 3 == 1);
  };
  // Products that are exact, so that a fused operation gives the same.
  const float scales[] = {0.5f, 0.0f, -1.0f, 2.0f, 4.0f}, shifts[] = {0.0f, 3.0f, -0.75f};
  for (const std::int64_t width : {31, 32, 200, 2100}) {
    Matrix gate(4, width, width, 1), up(4, width, width, 2), product(4, width, width, 3);
    Edits edits{{2, 0, 1, -1}, {0}, {}, {}, {}};
    for (std::int64_t set = 0; set < 3; ++set) {
      for (std::int64_t column = 0; column < width; ++column)
        if (edited(set, column)) {
          edits.neurons.push_back(static_cast<std::int32_t>(column));
          edits.scale.push_back(scales[(column + set) % 5]);
          edits.shift.push_back(shifts[column % 3]);
        }
      edits.offsets.push_back(static_cast<std::int32_t>(edits.neurons.size()));
    }
    engine.run(edits.of(Activation::identity, gate, &up, product));
    for (std::int64_t row = 0; row < 4; ++row)
      for (std::int64_t column = 0; column < width; ++column) {
        float active = widen(gate.at(row, column));
        const std::int32_t set = edits.sets[row];
        if (set >= 0 && edited(set, column))
          active = widen(narrow(active * scales[(column + set) % 5] + shifts[column % 3]));
        const std::uint16_t made = narrow(active * widen(up.at(row, column)));
        CHECK(product.at(row, column) == made, engine.name + " width " + std::to_string(width));
      }
  }
}

// In any set, also one that no row has.
void bad_tables_are_refused_when_they_are_checked(const std::string& isa) {
  using Table = std::vector<std::int32_t>;
  const auto refused = [](const Table& offsets, const Table& neurons) {
    Call call{};
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

#ifdef LAPEFAST_CUDA_ON_CPU
const Engine<Call> gpu{"cuda on a CPU",
                       [](const auto& call) { lapefast::cuda::edit(call, {nullptr, 2}); }};

// Tables may hold anything: the kernel must neither leave memory nor write where it should not.
void tables_of_nonsense_are_survived_on_a_gpu() {
  std::uint32_t state = 1;
  const auto random = [&state] { return state = state * 1664525u + 1013904223u; };
  for (int round = 0; round < 200; ++round) {
    const std::int64_t width = round % 2 ? 50 : 256;
    Matrix gate(5, width, width, 1), product(5, width, width, 3);
    Edits edits{std::vector<std::int32_t>(5), std::vector<std::int32_t>(4),
                std::vector<std::int32_t>(7), std::vector<float>(7, 0.0f),
                std::vector<float>(7, 1.0f)};
    for (auto* table : {&edits.sets, &edits.offsets, &edits.neurons})
      for (std::int32_t& entry : *table) {
        const std::uint32_t drawn = random();
        entry = static_cast<std::int32_t>(drawn % 3 ? drawn % 9 : drawn);
      }
    gpu.run(edits.of(Activation::relu, gate, nullptr, product));
    for (std::int64_t row = 0; row < 5; ++row)
      for (std::int64_t column = 0; column < width; ++column) {
        const float value = widen(gate.at(row, column));
        const std::uint16_t made = product.at(row, column);
        CHECK(made == narrow(value < 0 ? 0.0f : value) || made == narrow(1.0f), gpu.name);
      }
  }
}
#endif

}  // namespace

int main() {
  with_each_isa([](const std::string& isa) {
    const Engine<Call> plain{isa, [](const auto& call) { lapefast::edit(call, 1); }};
    const Engine<Call> checked{isa + ", checked", [](const auto& call) {
                                 lapefast::check_tables(call);
                                 lapefast::edit_checked(call, 1);
                               }};
    for (const Engine<Call>& engine : {plain, checked}) {
      edit_touches_only_what_its_tables_name(engine);
      each_edited_neuron_has_its_own_edit(engine);
    }
    bad_tables_are_refused_when_they_are_checked(isa);
  });
#ifdef LAPEFAST_CUDA_ON_CPU
  edit_touches_only_what_its_tables_name(gpu);
  each_edited_neuron_has_its_own_edit(gpu);
  tables_of_nonsense_are_survived_on_a_gpu();
#endif
  return checks::failures ? 1 : 0;
}
