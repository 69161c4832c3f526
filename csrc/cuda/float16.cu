#include "launch.cuh"

namespace lapefast::cuda {
template void profile_as<Float16>(const ProfileCall&, Stream);
template void edit_as<Float16>(const EditCall&, Stream);
}  // namespace lapefast::cuda
