// Runs CUDA kernels on a CPU: the part of the language that csrc/cuda uses, in plain C++.
//
// The threads of a block are fibers, so that a barrier or a shuffle means what it says: a thread
// stops there until the others have come. Blocks, and threads between barriers, run in a random
// order, one at a time. A barrier that some threads of a block do not reach, or that they reach at
// different places, ends the program, where a GPU would hang. Made for tests: right, not fast.
#pragma once

#include <math.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

namespace lapefast::cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};

class Block;

// What runs now.
inline Index thread_index, block_index, grid_size;
inline Block* block = nullptr;

struct Fiber {
  ucontext_t context;
  Index index;
  bool done = false;
  const char* waits_at = nullptr;  // where it stopped, or null
  bool waits_for_warp = false;
  std::uint64_t word = 0;  // what it holds out in a shuffle
  void* stack = nullptr;
};

class Block {
 public:
  static constexpr std::size_t stack_size = 256 * 1024;

  Block(int width, int height) : fibers_(static_cast<std::size_t>(width * height)) {
    const std::size_t bytes = fibers_.size() * stack_size;
    stacks_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks_ == MAP_FAILED) std::abort();
    for (std::size_t at = 0; at < fibers_.size(); ++at) {
      fibers_[at].index = {static_cast<unsigned>(at % width), static_cast<unsigned>(at / width), 0};
      fibers_[at].stack = static_cast<char*>(stacks_) + at * stack_size;
    }
  }
  ~Block() { munmap(stacks_, fibers_.size() * stack_size); }
  Block(const Block&) = delete;

  void run(const std::function<void()>& body, std::minstd_rand& random) {
    body_ = &body;
    block = this;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = stack_size;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      fiber.waits_at = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    std::vector<std::size_t> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0);
    for (;;) {
      std::shuffle(order.begin(), order.end(), random);
      bool all_done = true;
      for (const std::size_t at : order) {
        if (!fibers_[at].done && !fibers_[at].waits_at) resume(fibers_[at]);
        all_done = all_done && fibers_[at].done;
      }
      if (all_done) return;
      release();
    }
  }

  void wait(const char* where, bool warp) {
    current_->waits_at = where;
    current_->waits_for_warp = warp;
    leave(false);
  }

  Fiber& current() { return *current_; }
  Fiber& lane(int lane) {
    return fibers_[static_cast<std::size_t>((current_ - fibers_.data()) / 32 * 32 + lane)];
  }

 private:
  static void enter() {
    Block& self = *block;
    self.entered(nullptr);
    (*self.body_)();
    self.current_->done = true;
    self.leave(true);
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    thread_index = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, stack_size);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swapcontext(&scheduler_, &fiber.context);
#endif
  }

  void leave([[maybe_unused]] bool for_good) {
    Fiber& fiber = *current_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack_, scheduler_size_);
    swapcontext(&fiber.context, &scheduler_);
    entered(fake);
#else
    swapcontext(&fiber.context, &scheduler_);
#endif
  }

  void entered([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
#endif
  }

  // Lets go the warps whose lanes, or the block whose threads, have all come to one place.
  void release() {
    bool released = false;
    for (std::size_t warp = 0; warp < fibers_.size(); warp += 32)
      released |= release(warp, std::min(warp + 32, fibers_.size()), true);
    if (!released && !release(0, fibers_.size(), false)) {
      std::fprintf(stderr, "A barrier was not reached by all threads, or at different places:\n");
      for (const Fiber& fiber : fibers_)
        if (fiber.waits_at && fiber.index.x == 0)
          std::fprintf(stderr, "  thread (0, %u) waits at %s\n", fiber.index.y, fiber.waits_at);
      std::abort();
    }
  }

  bool release(std::size_t begin, std::size_t end, bool warp) {
    for (std::size_t at = begin; at < end; ++at)
      if (fibers_[at].done || fibers_[at].waits_at != fibers_[begin].waits_at ||
          fibers_[at].waits_for_warp != warp)
        return false;
    for (std::size_t at = begin; at < end; ++at) fibers_[at].waits_at = nullptr;
    return true;
  }

  std::vector<Fiber> fibers_;
  void* stacks_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_size_ = 0;
#endif
};

// Runs `body` once for each thread of each block.
inline void run_grid(unsigned blocks, int width, int height, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  static std::minstd_rand random;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static Block threads(width, height);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  grid_size = {blocks, 1, 1};
  for (const unsigned at : order) {
    block_index = {at, 0, 0};
    threads.run(body, random);
  }
}

template <class Value>
Value shuffle(const char* where, Value value, int lane) {
  static_assert(sizeof(Value) <= 8);
  __builtin_memcpy(&block->current().word, &value, sizeof value);
  block->wait(where, true);
  Value other;
  __builtin_memcpy(&other, &block->lane(lane).word, sizeof other);
  block->wait(where, true);  // nobody holds out another before all have read
  return other;
}

}  // namespace lapefast::cuda_on_cpu

#define threadIdx (lapefast::cuda_on_cpu::thread_index)
#define blockIdx (lapefast::cuda_on_cpu::block_index)
#define gridDim (lapefast::cuda_on_cpu::grid_size)

#define LAPEFAST_TEXT_(x) #x
#define LAPEFAST_TEXT(x) LAPEFAST_TEXT_(x)
#define LAPEFAST_HERE __FILE__ ":" LAPEFAST_TEXT(__LINE__)
#define __syncthreads() (lapefast::cuda_on_cpu::block->wait(LAPEFAST_HERE, false))
#define __syncwarp() (lapefast::cuda_on_cpu::block->wait(LAPEFAST_HERE, true))
#define __shfl_sync(mask, value, lane) \
  (lapefast::cuda_on_cpu::shuffle(LAPEFAST_HERE, (value), (lane)))

template <class Value>
Value atomicAdd(Value* to, Value value) {
  const Value before = *to;
  *to += value;
  return before;
}

namespace lapefast::cuda {

// In place of the one in csrc/cuda/launch.cuh.
template <class Stream, class... Parameters>
void launch(void (*kernel)(Parameters...), unsigned blocks, Stream, Parameters... values) {
  cuda_on_cpu::run_grid(blocks, 32, 4, [&] { kernel(values...); });
}

}  // namespace lapefast::cuda
