// The one header that a kernel file includes. The same source becomes device code under nvcc, and otherwise host code
// that runs on the emulated device (kernels/emulator/).
//
// Rules that keep a kernel portable between the two:
//   - everything but the launchers stands in an anonymous namespace, and launchers are named by MMPO_EXPORT;
//   - shared memory comes from DYNAMIC_SHARED and SHARED_ARRAY, launches from LAUNCH, PTX from the wrappers in ptx.cuh;
//   - wgmma accumulators and register operands live in arrays that stay alive until the wait;
//   - a thread waits for other threads of its block only through barriers, mbarriers and collectives, and for another
//     block only through wait_for_turn; it never spins on memory itself.
#pragma once

#include "../api.h"
#include "variant.h"

#if MMPO_EMULATED

#include "../emulator/language.h"
#include "../emulator/tensor_map.h"

// Dynamic shared memory, aligned to 1024 bytes, which is what the 128-byte swizzle of TMA tiles needs.
#define DYNAMIC_SHARED(name) unsigned char* const name = ::mmpo::emulated::dynamic_shared()
// `SHARED_ARRAY(float, partial, 32);` declares `float partial[32]` in shared memory.
#define SHARED_ARRAY(type, name, count)                                                \
    static const char name##_key = 0;                                                  \
    type(&name)[count] = *static_cast<type(*)[count]>(::mmpo::emulated::static_shared( \
        &name##_key, sizeof(type) * (count), alignof(type), ::mmpo::emulated::Site{__FILE__, __LINE__}))

// `LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)` returns 0 or an error code. Put the kernel in
// parentheses if its template arguments contain a comma.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    LAUNCH_CLUSTERS(kernel, 1, grid, block, shared_bytes, stream, __VA_ARGS__)
// As LAUNCH, in clusters of `cluster` blocks that are neighbours along x; the grid's x must be a multiple of it.
#define LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
    ((void)(stream),                                                             \
     ::mmpo::emulated::launch(#kernel, {grid, block, shared_bytes, unsigned(cluster)}, kernel, __VA_ARGS__))

#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define MMPO_SITE
#define MMPO_SITE_ONLY
#define MMPO_PASS_SITE

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                           \
    (::mmpo::allow_dynamic_shared(reinterpret_cast<const void*>(&kernel), shared_bytes), \
     kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), static_cast<int>(cudaGetLastError()))
#define LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...)         \
    (::mmpo::allow_dynamic_shared(reinterpret_cast<const void*>(&kernel), shared_bytes), \
     ::mmpo::launch_clusters(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__))

#endif

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

// Whether device code may use Hopper's instructions (wgmma, TMA, setmaxnreg). Kernels that need them wrap their body in
// `#if MMPO_SM90`, because the fat binary compiles every file for sm_80 too, except those whose names end in _sm90.cu.
#if MMPO_EMULATED || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MMPO_SM90 1
#else
#define MMPO_SM90 0
#endif

namespace mmpo {
inline namespace MMPO_VARIANT {

#if MMPO_EMULATED
using emulated::multiprocessors;
#else
// A kernel must ask for more than 48 KiB of dynamic shared memory. If the request is refused, the launch itself fails.
inline void allow_dynamic_shared(const void* kernel, size_t bytes) {
    if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}
template <class... Parameters, class... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &size;
    config.numAttrs = 1;
    cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
    return int(cudaGetLastError());
}
// Multiprocessors of the current device, or 1 if it cannot be asked. Persistent kernels have as many blocks.
inline int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 1;
}
#endif

// A bfloat16, the top half of an f32. Our own type, so that device and emulated code share its layout and conversions.
using bf16 = ::mmpo_bf16;

HOST_DEVICE float to_float(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to nearest even. NaN becomes the canonical 0x7fff, as in the hardware's conversion.
HOST_DEVICE bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
    return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The two values of a packed pair; `low` is in bits 0..15.
HOST_DEVICE float low_bf16(uint32_t pair) { return to_float(bf16{uint16_t(pair)}); }
HOST_DEVICE float high_bf16(uint32_t pair) { return to_float(bf16{uint16_t(pair >> 16)}); }

}  // namespace MMPO_VARIANT
}  // namespace mmpo

#if !MMPO_EMULATED
using namespace mmpo;
#endif

#include "ptx.cuh"
