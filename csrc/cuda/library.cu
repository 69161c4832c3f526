#include <atomic>

#include "launch.cuh"

namespace lapefast::cuda {

#ifndef LAPEFAST_CUDA_ON_CPU
OnDevice::OnDevice(int device) : device_(device) {
  constexpr int remembered = 64;
  static std::atomic<int> known[remembered];
  expect_success(cudaGetDevice(&before_), "tell which device is in use");
  if (before_ != device_) expect_success(cudaSetDevice(device_), "use a device");
  const bool remember = device >= 0 && device < remembered;
  processors = remember ? known[device].load(std::memory_order_relaxed) : 0;
  if (processors) return;
  expect_success(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
                 "tell how many multiprocessors a device has");
  if (remember) known[device].store(processors, std::memory_order_relaxed);
}

OnDevice::~OnDevice() {
  if (before_ != device_) cudaSetDevice(before_);
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
