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

// Why kernels cannot run with the driver that there is, in words; empty where they can.
std::string problem();

// Multiprocessors of a device; throws std::runtime_error where there is none.
int processors_of(int device);

// Queue the kernel on the stream and return. Addresses are the device's. An index out of range is
// skipped and counted in flags[1]; nothing that memory holds makes a kernel read or write outside
// of what the call describes. Throws std::runtime_error where the launch fails.
void profile(const ProfileCall& call, Stream stream);
void edit(const EditCall& call, Stream stream);

}  // namespace lapefast::cuda
