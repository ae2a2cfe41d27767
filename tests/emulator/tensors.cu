// What TMA puts where: swizzles against tables written down from the PTX ISA's figures, boxes at the edges of arrays,
// stores and reductions; and wgmma on tiles of every swizzle. The same cases run on a GPU.
#include "harness.h"

using namespace mmpo::test;

namespace {

std::vector<bf16> counted(size_t count) {
    std::vector<bf16> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = bf16{uint16_t(i + 1)};
    return values;
}

std::vector<int> bits_of(const std::vector<bf16>& values) {
    std::vector<int> bits(values.size());
    for (size_t i = 0; i < values.size(); ++i) bits[i] = values[i].bits;
    return bits;
}

// ------------------------------------------------------------------------------------------------------------- swizzles

// Which 16-byte chunk of its row an element's chunk goes to, for 8 rows: `table[row][chunk]`.
const int kChunks128[8][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5}, {3, 2, 1, 0, 7, 6, 5, 4},
    {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2}, {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0},
};
const int kChunks64[8][4] = {{0, 1, 2, 3}, {0, 1, 2, 3}, {1, 0, 3, 2}, {1, 0, 3, 2}, {2, 3, 0, 1}, {2, 3, 0, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}};
const int kChunks32[8][2] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {1, 0}, {1, 0}, {1, 0}, {1, 0}};

int swizzled_chunk(Swizzle swizzle, int row, int chunk) {
    switch (swizzle) {
        case Swizzle::bytes_128: return kChunks128[row % 8][chunk];
        case Swizzle::bytes_64: return kChunks64[row % 8][chunk];
        case Swizzle::bytes_32: return kChunks32[row % 8][chunk];
        default: return chunk;
    }
}

// Loads one box and copies shared memory out as it lies there.
__global__ void load_image_kernel(bf16* out, const __grid_constant__ CUtensorMap map, int x, int y, int z, bool three, uint32_t bytes) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t tile = shared_address(raw), full = tile + bytes;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, bytes);
        if (three) tma_load_3d(tile, &map, x, y, z, full);
        else tma_load_2d(tile, &map, x, y, full);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    for (uint32_t i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = reinterpret_cast<const bf16*>(raw)[i];
#endif
}

std::string check_swizzle(Swizzle swizzle, int columns) {
    constexpr int kRows = 16;
    const std::vector<bf16> values = counted(size_t(kRows * columns));
    DeviceArray<bf16> in(values), out(values.size());
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, in.data(), kRows, uint64_t(columns), uint64_t(columns), kRows, uint32_t(columns), swizzle) != 0) return "no tensor map";
    const uint32_t bytes = uint32_t(kRows * columns * 2);
    if (const int error = LAUNCH(load_image_kernel, dim3(1), dim3(32), bytes + 8, nullptr, out.data(), map, 0, 0, 0, false, bytes))
        return device_error(error);
    std::vector<int> expected(values.size());
    for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < columns; ++column) {
            const int at = row * columns + swizzled_chunk(swizzle, row, column / 8) * 8 + column % 8;
            expected[size_t(at)] = values[size_t(row * columns + column)].bits;
        }
    }
    return compare(bits_of(out.download()), expected);
}

CASE(swizzle_none) { return check_swizzle(Swizzle::none, 40); }
CASE(swizzle_32) { return check_swizzle(Swizzle::bytes_32, 16); }
CASE(swizzle_64) { return check_swizzle(Swizzle::bytes_64, 32); }
CASE(swizzle_128) { return check_swizzle(Swizzle::bytes_128, 64); }

// ---------------------------------------------------------------------------------------------------------------- boxes

struct Box {
    int x, y, z;
};

// A 4 x 6 x 24 array of bf16 and boxes of 2 x 4 x 16, some of them past its edges, where zeros are read.
std::string check_box(Box at) {
    constexpr int kSizes[3] = {24, 6, 4};
    constexpr int kBox[3] = {16, 4, 2};
    const std::vector<bf16> values = counted(24 * 6 * 4);
    DeviceArray<bf16> in(values), out(16 * 4 * 2);
    const TensorMapShape shape{3, {24, 6, 4}, {24 * 2, 24 * 6 * 2}, {16, 4, 2}, Swizzle::none};
    CUtensorMap map;
    if (encode_tensor_map(&map, in.data(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, shape) != 0) return "no tensor map";
    if (const int error = LAUNCH(load_image_kernel, dim3(1), dim3(32), 256 + 8, nullptr, out.data(), map, at.x, at.y, at.z, true, 256u))
        return device_error(error);
    std::vector<int> expected;
    for (int z = at.z; z < at.z + kBox[2]; ++z) {
        for (int y = at.y; y < at.y + kBox[1]; ++y) {
            for (int x = at.x; x < at.x + kBox[0]; ++x) {
                const bool inside = x >= 0 && x < kSizes[0] && y >= 0 && y < kSizes[1] && z >= 0 && z < kSizes[2];
                expected.push_back(inside ? values[size_t((z * kSizes[1] + y) * kSizes[0] + x)].bits : 0);
            }
        }
    }
    return compare(bits_of(out.download()), expected);
}

CASE(box_inside) { return check_box({8, 1, 2}); }
CASE(box_past_the_end) { return check_box({16, 4, 3}); }
CASE(box_before_the_start) { return check_box({-3, -2, -1}); }
CASE(box_outside) { return check_box({0, 6, 0}); }

__global__ void bulk_load_kernel(float* out, const float* in) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t full = shared_address(raw) + 512;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, 512);
        bulk_load(shared_address(raw), in, 512, full);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    for (int i = int(threadIdx.x); i < 128; i += 32) out[i] = reinterpret_cast<const float*>(raw)[i];
#endif
}

CASE(bulk_load) {
    DeviceArray<float> in(iota(128)), out(128);
    return outcome(LAUNCH(bulk_load_kernel, dim3(1), dim3(32), 520, nullptr, out.data(), in.data()), out, iota(128));
}

// --------------------------------------------------------------------------------------------------- stores, reductions

// Writes 8 x 16 ones to x = 8, y = 4 of a 10 x 20 array, so that the box hangs over two edges.
template <class T>
__global__ void store_box_kernel(const __grid_constant__ CUtensorMap map, T value, bool add) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    for (int i = int(threadIdx.x); i < 8 * 16; i += 32) reinterpret_cast<T*>(raw)[i] = value;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (add) tma_reduce_add_2d(&map, shared_address(raw), 8, 4);
        else tma_store_2d(&map, shared_address(raw), 8, 4);
        bulk_commit();
        bulk_wait<0>();
    }
#endif
}

template <class T>
std::string check_store(CUtensorMapDataType type, T first, T second, bool add, std::vector<T>& found) {
    // Rows are 24 elements apart, for the alignment of strides.
    DeviceArray<T> out(std::vector<T>(10 * 24, first));
    const TensorMapShape shape{2, {20, 10, 1}, {24 * sizeof(T), 0}, {16, 8, 1}, Swizzle::none};
    CUtensorMap map;
    if (encode_tensor_map(&map, out.data(), type, shape) != 0) return "no tensor map";
    if (const int error = LAUNCH(store_box_kernel<T>, dim3(1), dim3(32), 8 * 16 * sizeof(T), nullptr, map, second, add)) return device_error(error);
    found = out.download();
    return "";
}

bool in_stored_box(size_t i) { return i % 24 >= 8 && i % 24 < 20 && i / 24 >= 4; }

CASE(store_clipped) {
    std::vector<float> found, expected(240);
    const std::string error = check_store<float>(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3.0f, 0.5f, false, found);
    for (size_t i = 0; i < 240; ++i) expected[i] = in_stored_box(i) ? 0.5f : 3.0f;
    return error.empty() ? compare(found, expected) : error;
}

CASE(reduce_f32) {
    std::vector<float> found, expected(240);
    const std::string error = check_store<float>(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3.0f, 0.5f, true, found);
    for (size_t i = 0; i < 240; ++i) expected[i] = in_stored_box(i) ? 3.5f : 3.0f;
    return error.empty() ? compare(found, expected) : error;
}

CASE(reduce_bf16) {
    std::vector<bf16> found;
    // 259 lies between 258 and 260 of bf16: the even mantissa wins.
    const std::string error = check_store<bf16>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, to_bf16(256.0f), to_bf16(3.0f), true, found);
    if (!error.empty()) return error;
    std::vector<int> expected(240);
    for (size_t i = 0; i < 240; ++i) expected[i] = to_bf16(in_stored_box(i) ? 260.0f : 256.0f).bits;
    return compare(bits_of(found), expected);
}

// ------------------------------------------------------------------------------------- wgmma on tiles of every swizzle

constexpr int kDepth = 64;

// One 64 x 64 x 64 product. `span` is the width of a TMA box in elements: the swizzle's, or 8 without.
template <bool kTransposedA, bool kTransposedB>
__global__ void wgmma_tile_kernel(float* out, const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, int span,
                                  Swizzle swizzle) {
#if MMPO_SM90
    constexpr uint32_t kTile = 64 * kDepth * 2;
    DYNAMIC_SHARED(raw);
    const uint32_t a_tile = shared_address(raw), b_tile = a_tile + kTile, full = b_tile + kTile;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, 2 * kTile);
        for (int i = 0; i < 64; i += span) {
            tma_load_2d(a_tile + uint32_t(i) * 128, &a_map, i, 0, full);
            tma_load_2d(b_tile + uint32_t(i) * 128, &b_map, i, 0, full);
        }
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    const uint32_t row_bytes = uint32_t(span) * 2, block_bytes = 64 * row_bytes;
    const auto descriptor = [&](uint32_t tile, bool transposed, int k) {
        if (transposed) {
            if (swizzle == Swizzle::none) return wgmma_descriptor(tile + uint32_t(k) * row_bytes, 128, block_bytes, swizzle);
            return wgmma_descriptor(tile + uint32_t(k) * row_bytes, block_bytes, 8 * row_bytes, swizzle);
        }
        const uint32_t at = tile + uint32_t(k / span) * block_bytes + uint32_t(k % span) * 2;
        return wgmma_descriptor(at, swizzle == Swizzle::none ? block_bytes : 16, 8 * row_bytes, swizzle);
    };
    float d[32];
    wgmma_fence();
    for (int k = 0; k < kDepth; k += 16)
        wgmma_ss<64, kTransposedA, kTransposedB>(d, descriptor(a_tile, kTransposedA, k), descriptor(b_tile, kTransposedB, k), k != 0);
    wgmma_commit();
    wgmma_wait<0>();
    const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = 2 * (int(threadIdx.x) % 4);
    for (int j = 0; j < 8; ++j) {
        for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * 64 + 8 * j + column + e % 2] = d[4 * j + e];
    }
#endif
}

// Operands as matrices [64, 64]: rows along M or N with K innermost, or the other way round.
template <bool kTransposedA, bool kTransposedB>
std::string check_wgmma_tile(Swizzle swizzle, int span) {
    std::vector<bf16> a_values(64 * kDepth), b_values(64 * kDepth);
    for (size_t i = 0; i < a_values.size(); ++i) {
        a_values[i] = to_bf16(float(int(i * 7 % 17) - 8));
        b_values[i] = to_bf16(float(int(i * 5 % 13) - 6));
    }
    DeviceArray<bf16> a(a_values), b(b_values);
    DeviceArray<float> out(64 * 64);
    CUtensorMap a_map, b_map;
    if (encode_tensor_map_2d(&a_map, a.data(), 64, 64, 64, 64, uint32_t(span), swizzle) != 0) return "no tensor map";
    if (encode_tensor_map_2d(&b_map, b.data(), 64, 64, 64, 64, uint32_t(span), swizzle) != 0) return "no tensor map";
    std::vector<float> expected(64 * 64, 0.0f);
    for (int m = 0; m < 64; ++m) {
        for (int n = 0; n < 64; ++n) {
            for (int k = 0; k < kDepth; ++k) {
                const bf16 left = a_values[size_t(kTransposedA ? k * 64 + m : m * 64 + k)];
                const bf16 right = b_values[size_t(kTransposedB ? k * 64 + n : n * 64 + k)];
                expected[size_t(m * 64 + n)] += to_float(left) * to_float(right);
            }
        }
    }
    const int error = LAUNCH((wgmma_tile_kernel<kTransposedA, kTransposedB>), dim3(1), dim3(128), 2 * 64 * kDepth * 2 + 8, nullptr, out.data(), a_map,
                             b_map, span, swizzle);
    return outcome(error, out, expected);
}

std::string check_wgmma_tiles(Swizzle swizzle, int span) {
    std::string problem = check_wgmma_tile<false, false>(swizzle, span);
    if (problem.empty()) problem = check_wgmma_tile<true, false>(swizzle, span);
    if (problem.empty()) problem = check_wgmma_tile<false, true>(swizzle, span);
    return problem.empty() ? check_wgmma_tile<true, true>(swizzle, span) : problem;
}

CASE(wgmma_swizzle_none) { return check_wgmma_tiles(Swizzle::none, 8); }
CASE(wgmma_swizzle_32) { return check_wgmma_tiles(Swizzle::bytes_32, 16); }
CASE(wgmma_swizzle_64) { return check_wgmma_tiles(Swizzle::bytes_64, 32); }
CASE(wgmma_swizzle_128) { return check_wgmma_tiles(Swizzle::bytes_128, 64); }

}  // namespace
