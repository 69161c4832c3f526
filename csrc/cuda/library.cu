#include <atomic>

#include "launch.cuh"

namespace lapefast::cuda {

#ifdef LAPEFAST_CUDA_ON_CPU
std::string problem() { return ""; }
int processors_of(int) { return 2; }
#else
std::string problem() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver";
  // Within a major version any driver serves.
  constexpr int major = CUDART_VERSION / 1000;
  if (driver / 1000 >= major) return "";
  return "the NVIDIA driver is for CUDA " + std::to_string(driver / 1000) +
         ", and the kernels need one for CUDA " + std::to_string(major);
}

int processors_of(int device) {
  constexpr int remembered = 64;
  static std::atomic<int> known[remembered];
  const bool remember = device >= 0 && device < remembered;
  int count = remember ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    expect_success(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                   "tell how many multiprocessors a device has");
    if (remember) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}
#endif

void profile(const ProfileCall& call, Stream stream) {
  if (call.rows == 0 || call.width == 0) return;
  switch (call.dtype) {
    case DType::float32:
      return profile_as<Float32>(call, stream);
    case DType::float16:
      return profile_as<Float16>(call, stream);
    case DType::bfloat16:
      return profile_as<BFloat16>(call, stream);
  }
}

void edit(const EditCall& call, Stream stream) {
  // Nothing is computed, so the tables are not looked at either.
  if (call.rows == 0 || call.width == 0) return;
  switch (call.dtype) {
    case DType::float32:
      return edit_as<Float32>(call, stream);
    case DType::float16:
      return edit_as<Float16>(call, stream);
    case DType::bfloat16:
      return edit_as<BFloat16>(call, stream);
  }
}

}  // namespace lapefast::cuda
