// The native library as its binding and its tests use it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lapefast/kernels.h"

namespace lapefast {

// Each checks every index before anything is written and throws std::invalid_argument with a
// message for the user. `threads` is an upper bound; results are the same bits for any number.
void profile(const ProfileCall& call, int threads);
void edit(const EditCall& call, int threads);
void leave_one_out(const LeaveOneOutCall& call, int threads);

// One thread puts the classes of each row in the order of its scores, and says where a score occurs
// last. A row has fewer than 2^32 scores.
void rank_rows(const RankCall& call);

// `edit` in two halves, for tables that serve many calls: their check, of which the width is the
// only part of the rest that counts; and the edit by tables that passed it unchanged.
void check_tables(const EditCall& call);
void edit_checked(const EditCall& call, int threads);

// Instruction sets that were compiled in and that this processor has, slowest first.
std::vector<std::string> available_isas();
// The one in use: the fastest available, or what LAPEFAST_CPU_ISA forced when the library loaded.
std::string isa();
// Uses the named one from now on; throws std::invalid_argument if it is not available.
void select_isa(const std::string& name);

// Whether a thread pool was found in the process (the OpenMP runtime that torch loaded).
bool has_thread_pool();
// Runs body(index, count) on up to `threads` threads of that pool, or once with (0, 1).
void run_parallel(int threads, void (*body)(void* context, int index, int count), void* context);

}  // namespace lapefast
