/* A CUDA driver without a GPU behind it: as much of libcuda.so.1 as the program calls before its first launch, so that
 * its messages about drivers, GPUs and memory can be tested anywhere. The environment says what it pretends:
 * FAKE_CUDA_VERSION (13000), FAKE_CUDA_GPUS (1), FAKE_CUDA_CAPABILITY (90), FAKE_CUDA_ALLOCATION (2: it has no free memory). */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101 };
enum { MULTIPROCESSORS = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

static int pretended(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value != NULL ? atoi(value) : otherwise;
}

static char context, stream, event;
static void *current;

int cuInit(unsigned flags) { return flags == 0 ? SUCCESS : 1; }
int cuDriverGetVersion(int *version) {
    *version = pretended("FAKE_CUDA_VERSION", 13000);
    return SUCCESS;
}
int cuDeviceGetCount(int *count) {
    *count = pretended("FAKE_CUDA_GPUS", 1);
    return SUCCESS;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < pretended("FAKE_CUDA_GPUS", 1) ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int capability = pretended("FAKE_CUDA_CAPABILITY", 90);
    (void)device;
    *value = attribute == CAPABILITY_MAJOR   ? capability / 10
             : attribute == CAPABILITY_MINOR ? capability % 10
             : attribute == MULTIPROCESSORS  ? 4
                                             : 0;
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)16 << 30;
    return SUCCESS;
}
int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    strncpy(name, "Pretended GPU", (size_t)length);
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **out, int device) {
    (void)device;
    *out = &context;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}
int cuCtxSetCurrent(void *wanted) {
    current = wanted;
    return SUCCESS;
}
int cuCtxGetCurrent(void **out) {
    *out = current;
    return SUCCESS;
}
int cuCtxSynchronize(void) { return SUCCESS; }
int cuStreamCreate(void **out, unsigned flags) {
    (void)flags;
    *out = &stream;
    return SUCCESS;
}
int cuStreamSynchronize(void *which) { return which == &stream ? SUCCESS : 1; }
int cuStreamDestroy_v2(void *which) { return which == &stream ? SUCCESS : 1; }
int cuEventCreate(void **out, unsigned flags) {
    (void)flags;
    *out = &event;
    return SUCCESS;
}
int cuEventSynchronize(void *which) { return which == &event ? SUCCESS : 1; }
int cuEventDestroy_v2(void *which) { return which == &event ? SUCCESS : 1; }
int cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    *out = malloc(bytes);
    return *out != NULL ? SUCCESS : OUT_OF_MEMORY;
}
int cuMemFreeHost(void *memory) {
    free(memory);
    return SUCCESS;
}
int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
    (void)bytes;
    *out = 0;
    return pretended("FAKE_CUDA_ALLOCATION", OUT_OF_MEMORY);
}
int cuMemFree_v2(uint64_t memory) { return memory == 0 ? SUCCESS : 1; }
int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    *unused = (size_t)1 << 20;
    *total = (size_t)16 << 30;
    return SUCCESS;
}
int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "pretended error";
    return SUCCESS;
}
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }
