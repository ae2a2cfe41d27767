// Stands where libcuda.so stands: as much of the CUDA driver as the program calls, with two devices that execute PTX.
// Everything is done when the call returns. CUDA Driver API.
#include <cuda.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "stand_in.h"

namespace {

// A context of each device, a stream, an event: addresses that nothing lies at.
char contexts[ptx::kDevices], stream, event;
thread_local CUcontext current = nullptr;
std::atomic<int> multiprocessor_count{132};

CUresult checked(const std::string& wrong) {
    if (wrong.empty()) return CUDA_SUCCESS;
    fprintf(stderr, "%s\n", wrong.c_str());
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

ptx::GlobalMemory& memory() { return ptx::GlobalMemory::get(); }

}  // namespace

int current_device() {
    const auto context = reinterpret_cast<char*>(current);
    return context >= contexts && context < contexts + ptx::kDevices ? int(context - contexts) : 0;
}
int multiprocessors() { return multiprocessor_count; }
void set_multiprocessors(int count) { multiprocessor_count = count; }

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    *count = ptx::kDevices;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal < ptx::kDevices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    const ptx::Device& of = ptx::kDeviceTable[device];
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = of.major;
            break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = of.minor;
            break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = multiprocessors();
            break;
        default:
            *value = 0;
    }
    return CUDA_SUCCESS;
}
#undef cuDeviceTotalMem
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = size_t(80) << 30;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    snprintf(name, size_t(length), "PTX for %s, executed", ptx::kDeviceTable[device].target);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    memset(uuid, device + 1, sizeof *uuid);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = reinterpret_cast<CUcontext>(&contexts[device]);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }

CUresult cuStreamCreate(CUstream* out, unsigned) {
    *out = reinterpret_cast<CUstream>(&stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream) { return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned) { return CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent* out, unsigned) {
    *out = reinterpret_cast<CUevent>(&event);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent, CUstream) { return CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventQuery(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent, CUevent) {
    *milliseconds = 1.0f;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* left, size_t* total) {
    *left = size_t(8) << 30;
    *total = size_t(80) << 30;
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
    *out = memory().allocate(bytes);
    return *out != 0 ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFree_v2(CUdeviceptr address) { return memory().free(address) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    *out = malloc(bytes);
    return *out != nullptr ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFreeHost(void* host) {
    free(host);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr out, const void* source, size_t bytes, CUstream) {
    const CUresult result = checked(memory().host_write(out, bytes));
    if (result == CUDA_SUCCESS) memcpy(reinterpret_cast<void*>(out), source, bytes);
    return result;
}
CUresult cuMemcpyDtoHAsync_v2(void* out, CUdeviceptr source, size_t bytes, CUstream) {
    const CUresult result = checked(memory().host_read(source, bytes));
    if (result == CUDA_SUCCESS) memcpy(out, reinterpret_cast<const void*>(source), bytes);
    return result;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr out, CUdeviceptr source, size_t bytes, CUstream) {
    const CUresult result = checked(memory().host_copy(out, source, bytes));
    if (result == CUDA_SUCCESS) memmove(reinterpret_cast<void*>(out), reinterpret_cast<const void*>(source), bytes);
    return result;
}
CUresult cuMemsetD8Async(CUdeviceptr out, unsigned char value, size_t bytes, CUstream) {
    const CUresult result = checked(memory().host_write(out, bytes));
    if (result == CUDA_SUCCESS) memset(reinterpret_cast<void*>(out), value, bytes);
    return result;
}

CUresult cuGetErrorName(CUresult, const char** text) {
    *text = "error of the PTX machine";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY    ? "out of memory"
            : error == CUDA_ERROR_INVALID_DEVICE ? "no such device"
                                                 : "error of the PTX machine";
    return CUDA_SUCCESS;
}
}
