#include "launch.cuh"

namespace lapefast::cuda {
template void profile_as<BFloat16>(const ProfileCall&, Stream);
template void edit_as<BFloat16>(const EditCall&, Stream);
}  // namespace lapefast::cuda
