// The ops on an NVIDIA GPU, as the binding and the tests use them.
#pragma once

#include <string>

#include "lapefast/kernels.h"

namespace lapefast::cuda {

// A stream of the current device, and how many multiprocessors that device has.
struct Stream {
  void* handle;
  int processors;
};

// Makes a device the current one while it lives. Throws std::runtime_error where there is none.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  int processors;

 private:
  int before_, device_;
};

// Queue the kernel on the stream and return. Addresses are the device's. An index out of range is
// skipped and counted in flags[1]; nothing that memory holds makes a kernel read or write outside
// of what the call describes. Throws std::runtime_error where the launch fails.
void profile(const ProfileCall& call, Stream stream);
void edit(const EditCall& call, Stream stream);

}  // namespace lapefast::cuda
