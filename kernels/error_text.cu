// The text of a status: the CUDA runtime's, or the emulated device's report of its last failed call.

#include "common/device.cuh"
#if MMPO_EMULATED
#include "emulator/emulator_api.h"
#endif

const char* MMPO_EXPORT(error_text)(mmpo_status status) {
#if MMPO_EMULATED
    return status == 0 ? "" : MMPO_EXPORT(last_error)();
#else
    return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
}
