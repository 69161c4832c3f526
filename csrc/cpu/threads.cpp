// The thread pool: the OpenMP runtime that torch has loaded, found by name at the first use.
// Linking one of our own would put two pools into one process.
#include <dlfcn.h>
#include <sched.h>

#include <mutex>

#include "lapefast/library.h"
#include "turn.h"

namespace lapefast {
namespace {

// The entry points that GCC's code calls; libgomp, libomp and libiomp5 all export them.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Query = int (*)();

struct Runtime {
  Parallel parallel = nullptr;
  Query thread_index = nullptr;
  Query thread_count = nullptr;
};

Runtime find_runtime() {
  Runtime found;
  found.parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  found.thread_index = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  found.thread_count = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (!found.thread_index || !found.thread_count) found.parallel = nullptr;
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
};

void enter(void* argument) {
  const Region& region = *static_cast<const Region*>(argument);
  region.body(region.context, runtime().thread_index(), runtime().thread_count());
}

// Many small locks, so that calls on different statistics rarely meet.
constexpr std::size_t stripe_count = 64;
std::mutex stripes[stripe_count];

std::mutex& stripe(const void* key) {
  const auto address = reinterpret_cast<std::uintptr_t>(key);
  return stripes[(address >> 6) * 0x9E3779B97F4A7C15u >> 58];
}

}  // namespace

bool has_thread_pool() { return runtime().parallel != nullptr; }

void run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1 || !has_thread_pool()) {
    body(context, 0, 1);
    return;
  }
  Region region{body, context};
  runtime().parallel(enter, &region, static_cast<unsigned>(threads), 0);
}

void lock_statistics(const void* key) { stripe(key).lock(); }
void unlock_statistics(const void* key) { stripe(key).unlock(); }

void wait_for_turn(Turn* turn, std::int64_t tile, std::int64_t chunk) {
  const std::atomic<std::int64_t>& current = turn->chunk_of[static_cast<std::size_t>(tile)];
  // Chunks take about equally long, so a turn comes soon; where threads outnumber processors, the
  // one whose turn it is may need this one's.
  for (int tries = 0; current.load(std::memory_order_acquire) != chunk; ++tries)
    if (tries > 1000) sched_yield();
}

void end_turn(Turn* turn, std::int64_t tile, std::int64_t chunk) {
  wait_for_turn(turn, tile, chunk);
  turn->chunk_of[static_cast<std::size_t>(tile)].store(chunk + 1, std::memory_order_release);
}

}  // namespace lapefast
