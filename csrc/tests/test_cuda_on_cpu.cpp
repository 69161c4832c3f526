// What stands in for a GPU in the tests (cuda_on_cpu.h): barriers and shuffles mean what they say.
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include "check.h"
#include "cuda_on_cpu.h"

namespace {

using lapefast::cuda::launch;

// Each thread writes its number and, after the barrier, reads its neighbour's.
void reads_neighbours(int* out) {
  __shared__ int numbers[128];
  const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    numbers[thread] = thread * 10 + round;
    __syncthreads();
    out[blockIdx.x * 128 + thread] += numbers[(thread + 33) % 128];
    __syncthreads();
  }
}

// The lanes of a warp shuffle while the other warps do not.
void shuffles(int* out) {
  int value = static_cast<int>(threadIdx.y * 100 + threadIdx.x);
  if (threadIdx.y % 2 == 0) {
    value = __shfl_sync(0xffffffffu, value, static_cast<int>((threadIdx.x + 1) % 32));
    __syncwarp();
    value = __shfl_sync(0xffffffffu, value, static_cast<int>((threadIdx.x + 1) % 32));
  }
  out[threadIdx.y * 32 + threadIdx.x] = value;
}

void adds(long* total) { atomicAdd(total, 1L); }

void leaves_some_behind(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[0] = 1;
}

void waits_at_two_places(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    out[0] = 1;
    __syncthreads();
  }
}

// A GPU would hang, or worse.
bool ends_the_program(void (*kernel)(int*)) {
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    int out = 0;
    launch(kernel, 1u, nullptr, &out);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  std::vector<int> read(3 * 128), shuffled(128);
  launch(reads_neighbours, 3u, nullptr, read.data());
  for (int at = 0; at < 3 * 128; ++at)
    CHECK(read[at] == 30 * ((at % 128 + 33) % 128) + 3, std::to_string(at));
  launch(shuffles, 1u, nullptr, shuffled.data());
  for (int warp = 0; warp < 4; ++warp)
    for (int lane = 0; lane < 32; ++lane) {
      const int from = warp % 2 ? lane : (lane + 2) % 32;
      CHECK(shuffled[warp * 32 + lane] == warp * 100 + from, std::to_string(lane));
    }
  long total = 0;
  launch(adds, 7u, nullptr, &total);
  CHECK(total == 7 * 128, "");
  CHECK(ends_the_program(leaves_some_behind), "");
  CHECK(ends_the_program(waits_at_two_places), "");
  return checks::failures ? 1 : 0;
}
