// Stands where the CUDA runtime stands: the functions that the launchers' objects, as nvcc made them, call. Everything
// is done when the call returns. CUDA Runtime API; the functions with two underscores are what nvcc's host code calls.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

#include "launch.h"
#include "stand_in.h"
#include "tensor_map.h"

namespace {

struct Function {
    std::string name;
    uint32_t dynamic_shared = 48 * 1024;
};

struct Registry {
    std::mutex mutex;
    std::map<const void*, Function> functions;
};
Registry& registry() {
    static Registry registry;
    return registry;
}

struct Configuration {
    dim3 grid, block;
    size_t shared = 0;
    void* stream = nullptr;
};
thread_local Configuration pushed;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_text;

cudaError_t failed(cudaError_t error, const std::string& text) {
    last_error = error;
    last_text = text;
    return error;
}

ptx::Dim3 sizes(dim3 d) { return {d.x, d.y, d.z}; }

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, unsigned cluster) {
    Function known;
    {
        const std::lock_guard lock(registry().mutex);
        const auto found = registry().functions.find(function);
        if (found == registry().functions.end())
            return failed(cudaErrorInvalidDeviceFunction, "launch of an unknown function");
        known = found->second;
    }
    if (shared > known.dynamic_shared) {
        return failed(cudaErrorInvalidValue,
                      "more dynamic shared memory than was asked for by cudaFuncSetAttribute: " + known.name);
    }
    try {
        ptx::Machine::get().launch(current_device(), known.name, sizes(grid), sizes(block), arguments, uint32_t(shared),
                                   cluster);
        return cudaSuccess;
    } catch (const ptx::Fault& fault) {
        return failed(cudaErrorLaunchFailure, fault.text);
    }
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    const std::lock_guard lock(registry().mutex);
    registry().functions[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<void**>(stream) = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
    return launch(kernel, grid, block, arguments, shared, 1);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
    return launch(function, grid, block, arguments, shared, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    unsigned cluster = 1;
    for (unsigned k = 0; k < config->numAttrs; ++k) {
        if (config->attrs[k].id != cudaLaunchAttributeClusterDimension) {
            return failed(cudaErrorInvalidValue, "a launch attribute that this machine does not know");
        }
        const auto& size = config->attrs[k].val.clusterDim;
        cluster = size.x * size.y * size.z;
    }
    return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, cluster);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return failed(cudaErrorInvalidValue, "an unknown attribute");
    if (value < 0 || uint32_t(value) > ptx::kDeviceTable[current_device()].most_shared) {
        return failed(cudaErrorInvalidValue, "more dynamic shared memory than a block can have");
    }
    const std::lock_guard lock(registry().mutex);
    registry().functions[function].dynamic_shared = uint32_t(value);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* out, int value, size_t bytes, cudaStream_t) {
    ptx::GlobalMemory& memory = ptx::GlobalMemory::get();
    const auto address = reinterpret_cast<uint64_t>(out);
    const std::string wrong = value == 0 ? memory.host_zero(address, bytes) : memory.host_write(address, bytes);
    if (!wrong.empty()) return failed(cudaErrorIllegalAddress, wrong);
    memset(out, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* out, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    if (kind != cudaMemcpyDeviceToDevice)
        return failed(cudaErrorInvalidValue, "a copy that this machine does not know");
    const std::string wrong =
        ptx::GlobalMemory::get().host_copy(reinterpret_cast<uint64_t>(out), reinterpret_cast<uint64_t>(source), bytes);
    if (!wrong.empty()) return failed(cudaErrorIllegalAddress, wrong);
    memmove(out, source, bytes);
    return cudaSuccess;
}
// What the emulated device's own cases (tests/emulator) call besides.
cudaError_t cudaMalloc(void** out, size_t bytes) {
    *out = reinterpret_cast<void*>(ptx::GlobalMemory::get().allocate(bytes));
    return *out != nullptr ? cudaSuccess : failed(cudaErrorMemoryAllocation, "no memory");
}
cudaError_t cudaFree(void* memory) {
    if (ptx::GlobalMemory::get().free(reinterpret_cast<uint64_t>(memory))) return cudaSuccess;
    return failed(cudaErrorInvalidValue, "frees what is no allocation");
}
cudaError_t cudaMemset(void* out, int value, size_t bytes) { return cudaMemsetAsync(out, value, bytes, nullptr); }
cudaError_t cudaMemcpy(void* out, const void* source, size_t bytes, cudaMemcpyKind kind) {
    ptx::GlobalMemory& memory = ptx::GlobalMemory::get();
    std::string wrong = "a copy that this machine does not know";
    if (kind == cudaMemcpyHostToDevice) wrong = memory.host_write(reinterpret_cast<uint64_t>(out), bytes);
    if (kind == cudaMemcpyDeviceToHost) wrong = memory.host_read(reinterpret_cast<uint64_t>(source), bytes);
    if (!wrong.empty()) return failed(cudaErrorInvalidValue, wrong);
    memcpy(out, source, bytes);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorString(cudaError_t) { return last_text.c_str(); }
cudaError_t cudaGetDevice(int* device) {
    *device = current_device();
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount) return failed(cudaErrorInvalidValue, "an unknown attribute");
    *value = multiprocessors();
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    if (std::string(name) != "cuTensorMapEncodeTiled") return failed(cudaErrorInvalidValue, "an unknown entry point");
    *function = reinterpret_cast<void*>(&ptx::encode_tensor_map);
    if (found != nullptr) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- for the tests

// Reads the PTX of a folder; an error text, or an empty one.
const char* ptx_machine_open(const char* folder) {
    static thread_local std::string text;
    text = ptx::Machine::get().open(folder);
    return text.c_str();
}
// landing: 0 late, 1 early, 2 by seed. seed 0: warps in order. creation_zeros: whether zeros of a buffer's creation
// count as written.
void ptx_machine_configure(int landing, uint64_t seed, int measured_rounding, int creation_zeros) {
    ptx::Machine::get().configure({ptx::Landing(landing), seed, measured_rounding != 0, creation_zeros != 0});
}
const char* ptx_machine_edit(const char* entry, const char* from, const char* to, int occurrence) {
    static thread_local std::string text;
    text = ptx::Machine::get().edit(entry, from, to, occurrence);
    return text.c_str();
}
void ptx_machine_restore() { ptx::Machine::get().restore(); }
void ptx_machine_multiprocessors(int count) { set_multiprocessors(count); }
}
