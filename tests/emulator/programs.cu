// Whole kernels of the kinds the program is made of, to be right under every schedule and timing, and free of findings.
#include <cmath>

#include "harness.h"

using namespace mmpo::test;

namespace {

std::vector<bf16> small_integers(size_t count, int step) {
    std::vector<bf16> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = to_bf16(float(int(i * size_t(step) % 19) - 9));
    return values;
}

// out[M, N] = a[M, K] * b[N, K]^T, exact for small integers.
std::vector<float> product(const std::vector<bf16>& a, const std::vector<bf16>& b, int m, int n, int k) {
    std::vector<float> out(size_t(m) * size_t(n), 0.0f);
    for (int row = 0; row < m; ++row) {
        for (int column = 0; column < n; ++column) {
            float sum = 0.0f;
            for (int i = 0; i < k; ++i) sum += to_float(a[size_t(row * k + i)]) * to_float(b[size_t(column * k + i)]);
            out[size_t(row * n + column)] = sum;
        }
    }
    return out;
}

// ------------------------------------------------------------------------------------- mma.sync with cp.async, two stages

constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 32, kStageBytes = (BLOCK_M + BLOCK_N) * BLOCK_K * 2;

struct ProductShape {
    int m, n, k;
};

// Rows of 64 bytes in 16-byte chunks, permuted so that 8 rows of one chunk column lie in different banks.
DEVICE uint32_t chunk_offset(int row, int chunk) { return uint32_t(row * 64 + ((chunk ^ (row / 2 & 3)) << 4)); }

DEVICE void load_stage(uint32_t stage, const bf16* a, const bf16* b, int k0, ProductShape shape) {
    const int m0 = int(blockIdx.y) * BLOCK_M, n0 = int(blockIdx.x) * BLOCK_N;
    for (int i = int(threadIdx.x); i < (BLOCK_M + BLOCK_N) * 4; i += 128) {
        const bool of_a = i < BLOCK_M * 4;
        const int row = of_a ? i / 4 : i / 4 - BLOCK_M, chunk = i % 4, k = k0 + chunk * 8;
        const int global_row = (of_a ? m0 : n0) + row;
        const bool inside = global_row < (of_a ? shape.m : shape.n) && k < shape.k;
        const bf16* matrix = of_a ? a : b;
        cp_async_16(stage + (of_a ? 0u : BLOCK_M * 64u) + chunk_offset(row, chunk), matrix + (inside ? size_t(global_row) * size_t(shape.k) + size_t(k) : 0), inside);
    }
    cp_async_commit();
}

// A warp's 32 x 32 part of one stage.
DEVICE void multiply_stage(float (&sums)[2][4][4], uint32_t stage, int warp_m, int warp_n) {
    const int lane = int(lane_id());
    for (int kk = 0; kk < 2; ++kk) {
        uint32_t left[2][4], right[4];
        for (int i = 0; i < 2; ++i) ldmatrix_x4(left[i], stage + chunk_offset(warp_m + i * 16 + lane % 16, kk * 2 + lane / 16));
        for (int j = 0; j < 2; ++j) {
            ldmatrix_x4(right, stage + BLOCK_M * 64u + chunk_offset(warp_n + j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
            for (int i = 0; i < 2; ++i) {
                const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
                mma_m16n8k16(sums[i][2 * j], left[i], low);
                mma_m16n8k16(sums[i][2 * j + 1], left[i], high);
            }
        }
    }
}

__global__ void __launch_bounds__(128) mma_product_kernel(float* out, const bf16* a, const bf16* b, ProductShape shape) {
    DYNAMIC_SHARED(raw);
    const uint32_t base = shared_address(raw);
    const int warp = int(threadIdx.x) / 32, warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
    float sums[2][4][4] = {};
    const int steps = (shape.k + BLOCK_K - 1) / BLOCK_K;
    load_stage(base, a, b, 0, shape);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            load_stage(base + uint32_t((step + 1) % 2 * kStageBytes), a, b, (step + 1) * BLOCK_K, shape);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        multiply_stage(sums, base + uint32_t(step % 2 * kStageBytes), warp_m, warp_n);
        __syncthreads();
    }
    const int lane = int(lane_id());
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
            for (int e = 0; e < 4; ++e) {
                const int row = int(blockIdx.y) * BLOCK_M + warp_m + i * 16 + lane / 4 + e / 2 * 8;
                const int column = int(blockIdx.x) * BLOCK_N + warp_n + j * 8 + lane % 4 * 2 + e % 2;
                if (row < shape.m && column < shape.n) out[size_t(row) * size_t(shape.n) + size_t(column)] = sums[i][j][e];
            }
        }
    }
}

std::string run_mma_product(ProductShape shape) {
    const std::vector<bf16> a_values = small_integers(size_t(shape.m * shape.k), 7), b_values = small_integers(size_t(shape.n * shape.k), 5);
    DeviceArray<bf16> a(a_values), b(b_values);
    DeviceArray<float> out(size_t(shape.m * shape.n));
    const dim3 grid(unsigned((shape.n + BLOCK_N - 1) / BLOCK_N), unsigned((shape.m + BLOCK_M - 1) / BLOCK_M));
    const int error = LAUNCH(mma_product_kernel, grid, dim3(128), 2 * kStageBytes, nullptr, out.data(), a.data(), b.data(), shape);
    return outcome(error, out, product(a_values, b_values, shape.m, shape.n, shape.k));
}

CASE(mma_product) { return run_mma_product({128, 128, 96}); }
CASE(mma_product_ragged) { return run_mma_product({70, 33, 72}); }

// --------------------------------------------------------------------- wgmma with TMA: a producer warp and a consumer group

constexpr int WGMMA_M = 64, WGMMA_N = 128, WGMMA_K = 64, kStages = 3;
constexpr int kATile = WGMMA_M * WGMMA_K * 2, kBTile = WGMMA_N * WGMMA_K * 2, kTmaStage = kATile + kBTile;
constexpr int kWgmmaShared = kStages * kTmaStage + 2 * kStages * 8;

#if MMPO_SM90
DEVICE void produce_tiles(uint32_t base, const CUtensorMap* a_map, const CUtensorMap* b_map, int steps) {
    const uint32_t full = base + kStages * kTmaStage, empty = full + kStages * 8;
    for (int step = 0; step < steps; ++step) {
        const uint32_t stage = uint32_t(step % kStages), tile = base + stage * kTmaStage;
        mbarrier_wait(empty + stage * 8, uint32_t(step / kStages & 1) ^ 1u);
        mbarrier_arrive_expect_tx(full + stage * 8, kTmaStage);
        tma_load_2d(tile, a_map, step * WGMMA_K, int(blockIdx.y) * WGMMA_M, full + stage * 8);
        tma_load_2d(tile + kATile, b_map, step * WGMMA_K, int(blockIdx.x) * WGMMA_N, full + stage * 8);
    }
}

DEVICE void consume_tiles(float (&d)[WGMMA_N / 2], uint32_t base, int steps) {
    const uint32_t full = base + kStages * kTmaStage, empty = full + kStages * 8;
    for (int step = 0; step < steps; ++step) {
        const uint32_t stage = uint32_t(step % kStages), tile = base + stage * kTmaStage;
        mbarrier_wait(full + stage * 8, uint32_t(step / kStages & 1));
        const uint64_t a = wgmma_descriptor(tile, 16, 1024, Swizzle::bytes_128), b = wgmma_descriptor(tile + kATile, 16, 1024, Swizzle::bytes_128);
        pin_registers(d);
        wgmma_fence();
        for (int k = 0; k < WGMMA_K / 16; ++k) wgmma_ss<WGMMA_N>(d, a + uint64_t(2 * k), b + uint64_t(2 * k), step + k != 0);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(d);
        if (threadIdx.x % 128 == 0) mbarrier_arrive(empty + stage * 8);
    }
}
#endif

__global__ void __launch_bounds__(160) wgmma_product_kernel(float* out, const __grid_constant__ CUtensorMap a_map,
                                                            const __grid_constant__ CUtensorMap b_map, ProductShape shape) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t base = shared_address(raw), barriers = base + kStages * kTmaStage;
    const int steps = (shape.k + WGMMA_K - 1) / WGMMA_K;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 2 * kStages; ++i) mbarrier_init(barriers + 8 * i, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (elect_one()) produce_tiles(base, &a_map, &b_map, steps);
        return;
    }
    float d[WGMMA_N / 2];
    consume_tiles(d, base, steps);
    const int row = int(blockIdx.y) * WGMMA_M + int(threadIdx.x) / 32 * 16 + int(lane_id()) / 4;
    const int column = int(blockIdx.x) * WGMMA_N + 2 * (int(lane_id()) % 4);
    for (int j = 0; j < WGMMA_N / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int r = row + e / 2 * 8, c = column + 8 * j + e % 2;
            if (r < shape.m && c < shape.n) out[size_t(r) * size_t(shape.n) + size_t(c)] = d[4 * j + e];
        }
    }
#endif
}

std::string run_wgmma_product(ProductShape shape) {
    const std::vector<bf16> a_values = small_integers(size_t(shape.m * shape.k), 7), b_values = small_integers(size_t(shape.n * shape.k), 5);
    DeviceArray<bf16> a(a_values), b(b_values);
    DeviceArray<float> out(size_t(shape.m * shape.n));
    CUtensorMap a_map, b_map;
    const uint64_t k = uint64_t(shape.k);
    if (encode_tensor_map_2d(&a_map, a.data(), uint64_t(shape.m), k, k, WGMMA_M, WGMMA_K, Swizzle::bytes_128) != 0) return "no tensor map";
    if (encode_tensor_map_2d(&b_map, b.data(), uint64_t(shape.n), k, k, WGMMA_N, WGMMA_K, Swizzle::bytes_128) != 0) return "no tensor map";
    const dim3 grid(unsigned((shape.n + WGMMA_N - 1) / WGMMA_N), unsigned((shape.m + WGMMA_M - 1) / WGMMA_M));
    const int error = LAUNCH(wgmma_product_kernel, grid, dim3(160), kWgmmaShared, nullptr, out.data(), a_map, b_map, shape);
    return outcome(error, out, product(a_values, b_values, shape.m, shape.n, shape.k));
}

CASE(wgmma_product) { return run_wgmma_product({128, 128, 320}); }
CASE(wgmma_product_ragged) { return run_wgmma_product({70, 150, 136}); }

// ------------------------------------------------------------------------------------------------- a softmax of each row

__global__ void __launch_bounds__(128) softmax_kernel(float* out, const float* in, int width) {
    SHARED_ARRAY(float, partial, 8);
    const float* row = in + size_t(blockIdx.x) * size_t(width);
    const auto block_reduce = [&](float value, bool maximum, float* slots) {
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, step);
            value = maximum ? fmaxf(value, other) : value + other;
        }
        if (lane_id() == 0) slots[threadIdx.x / 32] = value;
        __syncthreads();
        value = slots[0];
        for (int i = 1; i < 4; ++i) value = maximum ? fmaxf(value, slots[i]) : value + slots[i];
        return value;
    };
    float largest = -INFINITY, sum = 0.0f;
    for (int i = int(threadIdx.x); i < width; i += 128) largest = fmaxf(largest, row[i]);
    largest = block_reduce(largest, true, partial);
    for (int i = int(threadIdx.x); i < width; i += 128) sum += __expf(row[i] - largest);
    sum = block_reduce(sum, false, partial + 4);
    for (int i = int(threadIdx.x); i < width; i += 128) out[size_t(blockIdx.x) * size_t(width) + size_t(i)] = __expf(row[i] - largest) / sum;
}

CASE(softmax) {
    constexpr int kRows = 5, kWidth = 301;
    std::vector<float> values(kRows * kWidth);
    for (size_t i = 0; i < values.size(); ++i) values[i] = float(int(i * 37 % 101) - 50) * 0.2f;
    DeviceArray<float> in(values), out(values.size());
    if (const int error = LAUNCH(softmax_kernel, dim3(kRows), dim3(128), 0, nullptr, out.data(), in.data(), kWidth)) return device_error(error);
    const std::vector<float> found = out.download();
    for (int row = 0; row < kRows; ++row) {
        double sum = 0.0;
        for (int i = 0; i < kWidth; ++i) sum += std::exp(double(values[size_t(row * kWidth + i)]));
        for (int i = 0; i < kWidth; ++i) {
            const double expected = std::exp(double(values[size_t(row * kWidth + i)])) / sum;
            const float value = found[size_t(row * kWidth + i)];
            if (!(std::fabs(value - expected) <= 1e-6)) return "row " + std::to_string(row) + ": " + std::to_string(value) + ", not " + std::to_string(expected);
        }
    }
    return "";
}

}  // namespace
