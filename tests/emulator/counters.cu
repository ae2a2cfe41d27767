// What the emulated device counts, against counts made by hand. Not for a GPU.
#include "harness.h"

#if MMPO_EMULATED

using namespace mmpo::test;

namespace {

mmpo_emulator_counters counted() {
    mmpo_emulator_counters counters;
    MMPO_EXPORT(counters)(&counters);
    return counters;
}

std::string expect(const char* what, uint64_t found, uint64_t expected) {
    return found == expected ? "" : std::string(what) + ": " + std::to_string(found) + " counted, not " + std::to_string(expected);
}

std::string first_problem(std::initializer_list<std::string> problems) {
    for (const std::string& problem : problems) {
        if (!problem.empty()) return problem;
    }
    return "";
}

// Two warps: each loads 4 matrices at `row_bytes` between rows, and multiplies 3 times.
__global__ void matrix_work_kernel(float* out, const uint4* in, uint32_t row_bytes) {
    DYNAMIC_SHARED(raw);
    const uint32_t row = shared_address(raw) + threadIdx.x % 32 * row_bytes;
    if (threadIdx.x < 32) cp_async_16(row, in, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a[4];
    ldmatrix_x4(a, row);
    const uint32_t b[2] = {a[0], a[1]};
    float d[4] = {};
    for (int i = 0; i < 3; ++i) mma_m16n8k16(d, a, b);
    out[threadIdx.x] = d[0];
}

std::string check_matrix_work(uint32_t row_bytes, uint64_t conflicts) {
    DeviceArray<uint4> in(std::vector<uint4>(1, uint4{0, 0, 0, 0}));
    DeviceArray<float> out(64);
    MMPO_EXPORT(reset_counters)();
    if (const int error = LAUNCH(matrix_work_kernel, dim3(1), dim3(64), 32 * row_bytes, nullptr, out.data(), in.data(), row_bytes)) return device_error(error);
    const mmpo_emulator_counters counters = counted();
    return first_problem({
        expect("launches", counters.launches, 1),
        expect("blocks", counters.blocks, 1),
        expect("mma operations", counters.mma_operations, 6),
        expect("mma flops", counters.mma_flops, 6 * 4096),
        expect("matrices", counters.matrix_rows_moved, 8),
        expect("bank conflicts", counters.matrix_bank_conflicts, conflicts),
        expect("cp.async bytes", counters.copy_async_bytes, 32 * 16),
        expect("barrier arrivals", counters.barriers, 64),
    });
}

// Rows 16 bytes apart fill all banks; 32 apart, half of them twice; 128 apart, the same four banks eight times.
CASE(count_matrix_work) { return check_matrix_work(16, 0); }
CASE(count_two_way_conflicts) { return check_matrix_work(32, 8 * 1); }
CASE(count_eight_way_conflicts) { return check_matrix_work(128, 8 * 7); }

__global__ void strided_kernel(float* out, const float* in, int global_stride, int shared_stride) {
    DYNAMIC_SHARED(raw);
    float* shared = reinterpret_cast<float*>(raw);
    shared[int(threadIdx.x) * shared_stride] = in[int(threadIdx.x) * global_stride];
    out[threadIdx.x] = shared[int(threadIdx.x) * shared_stride];
}

// One warp, 4 bytes per lane: 4 sectors when contiguous, 32 when 32 bytes apart; 1 wavefront, or as many as lanes share
// a bank.
std::string check_strides(int global_stride, int shared_stride, uint64_t sectors, uint64_t wavefronts) {
    DeviceArray<float> in(iota(size_t(32 * global_stride))), out(32);
    MMPO_EXPORT(reset_counters)();
    const int error = LAUNCH(strided_kernel, dim3(1), dim3(32), size_t(32 * 4 * shared_stride), nullptr, out.data(), in.data(), global_stride, shared_stride);
    if (error != 0) return device_error(error);
    if (!MMPO_CHECKED) return "";
    const mmpo_emulator_counters counters = counted();
    return first_problem({
        expect("global load bytes", counters.global_load_bytes, 128),
        expect("global store bytes", counters.global_store_bytes, 128),
        expect("load sectors", counters.global_load_sectors, sectors),
        expect("store sectors", counters.global_store_sectors, 4),
        expect("shared loads", counters.shared_loads, 32),
        expect("shared stores", counters.shared_stores, 32),
        expect("wavefronts", counters.shared_wavefronts, 2 * wavefronts),
        expect("ideal wavefronts", counters.shared_wavefronts_ideal, 2),
    });
}

CASE(count_contiguous) { return check_strides(1, 1, 4, 1); }
CASE(count_strided) { return check_strides(8, 1, 32, 1); }
CASE(count_two_way) { return check_strides(2, 2, 8, 2); }
CASE(count_all_in_one_bank) { return check_strides(1, 32, 4, 32); }
CASE(count_padded) { return check_strides(1, 33, 4, 1); }

__global__ void vector_copy_kernel(uint4* out, const uint4* in) { store_128(out + threadIdx.x, load_128(in + threadIdx.x)); }

CASE(count_vectors) {
    DeviceArray<uint4> in(std::vector<uint4>(96, uint4{1, 2, 3, 4})), out(96);
    MMPO_EXPORT(reset_counters)();
    if (const int error = LAUNCH(vector_copy_kernel, dim3(1), dim3(96), 0, nullptr, out.data(), in.data())) return device_error(error);
    const mmpo_emulator_counters counters = counted();
    return first_problem({
        expect("vector load bytes", counters.vector_load_bytes, 96 * 16),
        expect("vector store bytes", counters.vector_store_bytes, 96 * 16),
        expect("load sectors", counters.global_load_sectors, MMPO_CHECKED ? 48 : 0),
    });
}

__global__ void wgmma_count_kernel(float* out) {
    DYNAMIC_SHARED(raw);
    for (int i = int(threadIdx.x); i < 16384 / 4; i += 128) reinterpret_cast<uint32_t*>(raw)[i] = 0;
    fence_proxy_async();
    __syncthreads();
    const uint64_t tile = wgmma_descriptor(shared_address(raw), 16, 1024, Swizzle::bytes_128);
    float d[64];
    wgmma_fence();
    for (int k = 0; k < 4; ++k) wgmma_ss<128>(d, tile, tile, k != 0);
    wgmma_commit();
    wgmma_wait<0>();
    out[threadIdx.x] = d[0];
}

CASE(count_wgmma) {
    DeviceArray<float> out(128);
    MMPO_EXPORT(reset_counters)();
    if (const int error = LAUNCH(wgmma_count_kernel, dim3(1), dim3(128), 16384, nullptr, out.data())) return device_error(error);
    const mmpo_emulator_counters counters = counted();
    return first_problem({expect("wgmma operations", counters.wgmma_operations, 4), expect("wgmma flops", counters.wgmma_flops, 4ull * 2 * 64 * 128 * 16)});
}

}  // namespace

#endif
