// Planted faults of memory accesses. `// FAULT name` marks the line a report must name.
#include "harness.h"

using namespace mmpo::test;

namespace {

constexpr int kThreads = 64;

__global__ void global_access_kernel(float* out, const float* in, int read_shift, int write_shift) {
    const int i = int(threadIdx.x);
    const float value = in[i + read_shift];  // FAULT global_read
    out[i + write_shift] = value;            // FAULT global_write
}

std::string run_global_access(int read_shift, int write_shift) {
    DeviceArray<float> in(iota(kThreads)), out(kThreads);
    const int error = LAUNCH(global_access_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), read_shift, write_shift);
    return outcome(error, out, iota(kThreads));
}

CASE(global_read) { return run_global_access(bug ? 1 : 0, 0); }
CASE(global_write) { return run_global_access(0, bug ? 1 : 0); }

CASE(global_write_before) {
    DeviceArray<float> in(iota(kThreads)), out(kThreads);
    const int error = LAUNCH(global_access_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), 0, bug ? -1 : 0);
    return error != 0 ? device_error(error) : "";
}

CASE(use_after_free) {
    DeviceArray<float> in(iota(kThreads)), out(kThreads);
    if (bug) in.release();
    const int error = LAUNCH(global_access_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), 0, 0);
    return error != 0 ? device_error(error) : compare(out.download(), iota(kThreads));
}

CASE(uninitialised_global) {
    DeviceArray<float> in(kThreads), out(kThreads);
    if (!bug) in.upload(iota(kThreads));
    const int error = LAUNCH(global_access_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), 0, 0);
    return outcome(error, out, iota(kThreads));
}

__global__ void host_pointer_kernel(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

CASE(wild_pointer) {
    DeviceArray<float> in(iota(kThreads)), out(kThreads);
    const float* source = bug ? reinterpret_cast<const float*>(uintptr_t(4096)) : in.data();
    return outcome(LAUNCH(host_pointer_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), source), out, iota(kThreads));
}

__global__ void vector_kernel(float* out, const float* in, int shift) {
    const float4 value = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + shift);  // FAULT misaligned_vector
    out[4 * threadIdx.x] = value.x;
    out[4 * threadIdx.x + 1] = value.y;
    out[4 * threadIdx.x + 2] = value.z;
    out[4 * threadIdx.x + 3] = value.w;
}

CASE(misaligned_vector) {
    DeviceArray<float> in(iota(4 * kThreads + 4)), out(4 * kThreads);
    return outcome(LAUNCH(vector_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), bug ? 1 : 0), out, iota(4 * kThreads));
}

__global__ void wrapped_vector_kernel(float* out, const float* in, int shift) {
    const uint4 value = load_128(in + 4 * threadIdx.x + shift);  // FAULT misaligned_load_128
    store_128(out + 4 * threadIdx.x, value);
}

CASE(misaligned_load_128) {
    DeviceArray<float> in(iota(4 * kThreads + 4)), out(4 * kThreads);
    const int error = LAUNCH(wrapped_vector_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), in.data(), bug ? 1 : 0);
    return outcome(error, out, iota(4 * kThreads));
}

__global__ void shared_access_kernel(float* out, int write_shift, bool write_all) {
    DYNAMIC_SHARED(raw);
    float* shared = reinterpret_cast<float*>(raw);
    if (write_all || threadIdx.x != 5) shared[int(threadIdx.x) + write_shift] = float(threadIdx.x);  // FAULT shared_write
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];  // FAULT uninitialised_shared
}

std::string run_shared_access(int write_shift, bool write_all) {
    DeviceArray<float> out(kThreads);
    const int error =
        LAUNCH(shared_access_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, out.data(), write_shift, write_all);
    return outcome(error, out, iota(kThreads));
}

CASE(shared_write) { return run_shared_access(bug ? 1 : 0, true); }
CASE(uninitialised_shared) { return run_shared_access(0, !bug); }

__global__ void static_shared_kernel(float* out, int shift) {
    SHARED_ARRAY(float, first, kThreads);
    SHARED_ARRAY(float, second, kThreads);
    first[threadIdx.x] = float(threadIdx.x);
    second[threadIdx.x] = 0.0f;
    __syncthreads();
    const float* source = first;
    out[threadIdx.x] = source[int(threadIdx.x) - shift] + second[threadIdx.x];  // FAULT static_shared_read
}

CASE(static_shared_read) {
    DeviceArray<float> out(kThreads);
    return outcome(LAUNCH(static_shared_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), bug ? 1 : 0), out, iota(kThreads));
}

__global__ void matrix_address_kernel(float* out, uint32_t shift) {
    DYNAMIC_SHARED(raw);
    float* shared = reinterpret_cast<float*>(raw);
    for (int i = int(threadIdx.x); i < 256; i += 32) shared[i] = float(i);
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, shared_address(raw) + threadIdx.x * 16 + shift);  // FAULT misaligned_ldmatrix
    out[threadIdx.x] = __uint_as_float(r[0]);
}

CASE(misaligned_ldmatrix) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(matrix_address_kernel, dim3(1), dim3(32), 1024, nullptr, out.data(), bug ? 8u : 0u), out, iota(32));
}

__global__ void overflow_kernel(float* out, int rows, int width) {
    const int offset = rows * width;  // FAULT offset_overflow
    out[threadIdx.x] = offset > 0 ? 1.0f : 2.0f;
}

CASE(offset_overflow) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(overflow_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), 1 << 20, bug ? 1 << 12 : 4), out,
                   std::vector<float>(32, 1.0f));
}

__global__ void local_array_kernel(float* out, int last) {
    float values[8];
    for (int i = 0; i <= last; ++i) values[i] = float(i);  // FAULT local_array
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i) sum += values[i];
    out[threadIdx.x] = sum;
}

CASE(local_array) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(local_array_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug ? 8 : 7), out, std::vector<float>(32, 28.0f));
}

#if MMPO_EMULATED
__global__ void large_stack_kernel(float* out, int depth) {
    // Far past the stack an emulated thread has.
    volatile char* top = static_cast<char*>(__builtin_alloca(size_t(depth)));
    for (int i = depth - 1; i >= 0; i -= 4096) top[i] = 1;
    out[threadIdx.x] = float(threadIdx.x);
}

CASE(stack_overflow) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(large_stack_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug ? 400 << 10 : 1 << 12), out, iota(32));
}
#endif

}  // namespace
