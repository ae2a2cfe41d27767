// Planted faults of Hopper's asynchronous units: mbarriers, TMA, wgmma, proxies. `// FAULT name` marks the line a report
// must name.
#include "harness.h"

using namespace mmpo::test;

namespace {

constexpr int kRows = 64, kColumns = 64, kTileBytes = kRows * kColumns * 2;

std::vector<bf16> numbers(int rows, int columns) {
    std::vector<bf16> values(size_t(rows * columns));
    // Small integers, so that products are exact.
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_bf16(float(int(i * 7 % 13) - 6));
    return values;
}

// ------------------------------------------------------------------------------------------------------- loads and waits

struct LoadFaults {
    uint32_t expected_bytes = kTileBytes;
    uint32_t parity = 0;
    uint32_t arrivals = 1;
    bool wait = true;
    bool init = true;
    bool sync_after_init = true;
    Swizzle read_swizzle = Swizzle::bytes_128;
};

__global__ void tile_load_kernel(float* out, const __grid_constant__ CUtensorMap map, LoadFaults form) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t tile = shared_address(raw), full = tile + kTileBytes;
    if (threadIdx.x == 0 && form.init) {
        mbarrier_init(full, form.arrivals);
        fence_mbarrier_init();
    }
    if (form.sync_after_init) __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(full, form.expected_bytes);  // FAULT uninitialised_mbarrier
        tma_load_2d(tile, &map, 0, 0, full);                   // FAULT load_without_wait
    }
    if (form.wait) mbarrier_wait(full, form.parity);  // FAULT wrong_byte_count missing_arrival uninitialised_mbarrier
    for (int i = int(threadIdx.x); i < kRows * kColumns; i += int(blockDim.x)) {
        const int row = i / kColumns, column = i % kColumns;
        const int chunk = form.read_swizzle == Swizzle::bytes_128 ? (column / 8) ^ (row % 8) : (column / 8) ^ (row / 2 % 4);
        out[i] = to_float(reinterpret_cast<const bf16*>(raw)[row * kColumns + chunk * 8 + column % 8]);  // FAULT wrong_parity
    }
#endif
}

std::string run_tile_load(LoadFaults form) {
    const std::vector<bf16> values = numbers(kRows, kColumns);
    std::vector<float> expected(values.size());
    for (size_t i = 0; i < values.size(); ++i) expected[i] = to_float(values[i]);
    DeviceArray<bf16> in(values);
    DeviceArray<float> out(values.size());
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, in.data(), kRows, kColumns, kColumns, kRows, kColumns, Swizzle::bytes_128) != 0) return "no tensor map";
    return outcome(LAUNCH(tile_load_kernel, dim3(1), dim3(128), kTileBytes + 8, nullptr, out.data(), map, form), out, expected);
}

CASE(load_without_wait) {
    LoadFaults form;
    form.wait = !bug;
    return run_tile_load(form);
}
CASE(wrong_parity) {
    LoadFaults form;
    form.parity = bug ? 1 : 0;
    return run_tile_load(form);
}
CASE(wrong_byte_count) {
    LoadFaults form;
    form.expected_bytes = kTileBytes + (bug ? 16 : 0);
    return run_tile_load(form);
}
CASE(missing_arrival) {
    LoadFaults form;
    form.arrivals = bug ? 2 : 1;
    return run_tile_load(form);
}
CASE(uninitialised_mbarrier) {
    LoadFaults form;
    form.init = !bug;
    return run_tile_load(form);
}
CASE(unordered_mbarrier_init) {
    LoadFaults form;
    form.sync_after_init = !bug;
    return run_tile_load(form);
}
CASE(swizzle_mismatch) {
    LoadFaults form;
    form.read_swizzle = bug ? Swizzle::bytes_64 : Swizzle::bytes_128;
    return run_tile_load(form);
}

// ------------------------------------------------------------------------------------------------------------- pipelines

struct PipelineFaults {
    bool wait_full = true, wait_empty = true, invert_empty = true;
};

// One thread loads `tiles` tiles through two buffers; a warp adds them up.
__global__ void pipeline_kernel(float* out, const __grid_constant__ CUtensorMap map, int tiles, PipelineFaults form) {
#if MMPO_SM90
    constexpr uint32_t kStageBytes = 8 * 64 * 2;
    DYNAMIC_SHARED(raw);
    const uint32_t base = shared_address(raw), full = base + 2 * kStageBytes, empty = full + 16;
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < 2; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 32) {
        for (int tile = 0; tile < tiles; ++tile) {
            const uint32_t stage = uint32_t(tile) % 2, round = uint32_t(tile) / 2 % 2;
            if (form.wait_empty) mbarrier_wait(empty + 8 * stage, form.invert_empty ? round ^ 1 : round);  // FAULT empty_parity
            mbarrier_arrive_expect_tx(full + 8 * stage, kStageBytes);  // FAULT missing_empty_wait missing_full_wait
            tma_load_2d(base + stage * kStageBytes, &map, 0, tile * 8, full + 8 * stage);  // FAULT missing_empty_wait
        }
    } else if (threadIdx.x < 32) {
        float sum = 0.0f;
        for (int tile = 0; tile < tiles; ++tile) {
            const uint32_t stage = uint32_t(tile) % 2, round = uint32_t(tile) / 2 % 2;
            if (form.wait_full) mbarrier_wait(full + 8 * stage, round);  // FAULT empty_parity missing_empty_wait
            const bf16* rows = reinterpret_cast<const bf16*>(raw + stage * kStageBytes);
            for (int i = int(threadIdx.x); i < 8 * 64; i += 32) sum += to_float(rows[i]);  // FAULT missing_full_wait
            mbarrier_arrive(empty + 8 * stage);
        }
        out[threadIdx.x] = sum;
    }
#endif
}

std::string run_pipeline(PipelineFaults form) {
    constexpr int kTiles = 6;
    const std::vector<bf16> values = numbers(kTiles * 8, 64);
    std::vector<float> expected(32, 0.0f);
    for (size_t i = 0; i < values.size(); ++i) expected[i % 32] += to_float(values[i]);
    DeviceArray<bf16> in(values);
    DeviceArray<float> out(32);
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, in.data(), kTiles * 8, 64, 64, 8, 64, Swizzle::none) != 0) return "no tensor map";
    return outcome(LAUNCH(pipeline_kernel, dim3(1), dim3(64), 2 * 1024 + 32, nullptr, out.data(), map, kTiles, form), out, expected);
}

CASE(missing_full_wait) { return run_pipeline({!bug, true, true}); }
CASE(missing_empty_wait) { return run_pipeline({true, !bug, true}); }
CASE(empty_parity) { return run_pipeline({true, true, !bug}); }

// ----------------------------------------------------------------------------------------------------------------- stores

struct StoreFaults {
    bool fence = true, commit = true, wait = true, sync = true;
};

__global__ void tile_store_kernel(const __grid_constant__ CUtensorMap map, StoreFaults form) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    bf16* tile = reinterpret_cast<bf16*>(raw);
    for (int i = int(threadIdx.x); i < 64 * 16; i += 128) tile[i] = to_bf16(float(i % 128));
    if (form.fence) fence_proxy_async();
    if (form.sync) __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, shared_address(raw), 0, 0);  // FAULT missing_proxy_fence missing_store_sync missing_store_wait missing_store_commit
        if (form.commit) bulk_commit();
        if (form.wait) bulk_wait<0>();
    }
#endif
}

std::string run_tile_store(StoreFaults form) {
    DeviceArray<bf16> out(64 * 16);
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, out.data(), 64, 16, 16, 64, 16, Swizzle::none) != 0) return "no tensor map";
    if (const int error = LAUNCH(tile_store_kernel, dim3(1), dim3(128), 2048, nullptr, map, form)) return device_error(error);
    const std::vector<bf16> found = out.download();
    std::vector<float> values(found.size()), expected(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        values[i] = to_float(found[i]);
        expected[i] = float(i % 128);
    }
    return compare(values, expected);
}

CASE(missing_proxy_fence) { return run_tile_store({!bug, true, true, true}); }
CASE(missing_store_commit) { return run_tile_store({true, !bug, true, true}); }
CASE(missing_store_wait) { return run_tile_store({true, true, !bug, true}); }
CASE(missing_store_sync) { return run_tile_store({true, true, true, !bug}); }

// Blocks add a tile in bulk, in turns. A turn may be passed only when the addition has landed.
__global__ void bulk_turns_kernel(float* sums, uint32_t* counter, uint32_t* next_ticket, bool fence, bool wait) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    SHARED_ARRAY(uint32_t, ticket, 1);
    if (threadIdx.x == 0) ticket[0] = atomicAdd(next_ticket, 1u);
    __syncthreads();
    reinterpret_cast<float*>(raw)[threadIdx.x] = float(ticket[0]);
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        wait_for_turn(counter, ticket[0]);
        if (fence) fence_proxy_async_global();
        if (ticket[0] == 0) bulk_store(sums, shared_address(raw), 512);  // FAULT turn_passed_early turn_without_fence
        else bulk_add_f32(sums, shared_address(raw), 512);  // FAULT turn_passed_early turn_without_fence
        bulk_commit();
        if (wait) bulk_wait<0>();
        pass_turn(counter, ticket[0]);
        bulk_wait<0>();
    }
#endif
}

std::string run_bulk_turns(bool fence, bool wait) {
    constexpr uint32_t kBlocks = 20;
    DeviceArray<float> sums(128);
    DeviceArray<uint32_t> counters(std::vector<uint32_t>(2, 0u));
    return outcome(LAUNCH(bulk_turns_kernel, dim3(kBlocks), dim3(128), 512, nullptr, sums.data(), counters.data(), counters.data() + 1, fence, wait), sums,
                   std::vector<float>(128, float(kBlocks * (kBlocks - 1) / 2)));
}

CASE(turn_passed_early) { return run_bulk_turns(true, !bug); }
CASE(turn_without_fence) { return run_bulk_turns(!bug, true); }

// ---------------------------------------------------------------------------------------------------------- registers

// 65536 registers of a multiprocessor are 168 for each of 384 threads: 24 + 2 * 240 is all of it, 32 + 2 * 240 more.
template <int kProducer>
__global__ void __launch_bounds__(384) register_pool_kernel(float* out) {
#if MMPO_SM90
    if (threadIdx.x < 128) setmaxnreg_decrease<kProducer>();  // FAULT register_pool
    else setmaxnreg_increase<240>();  // FAULT register_pool
    out[threadIdx.x] = float(threadIdx.x);
#endif
}

CASE(register_pool) {
    DeviceArray<float> out(384);
    const int error = bug ? LAUNCH(register_pool_kernel<32>, dim3(1), dim3(384), 0, nullptr, out.data())
                          : LAUNCH(register_pool_kernel<24>, dim3(1), dim3(384), 0, nullptr, out.data());
    return outcome(error, out, iota(384));
}

// ------------------------------------------------------------------------------------------------------------------ wgmma

struct WgmmaFaults {
    bool fence = true, commit = true, wait = true, proxy_fence = true;
    bool read_early = false, overwrite_early = false;
    uint32_t stride_bytes = 1024;
};

// out[64, 64] = a[64, 64] * b[64, 64]^T, both written by ordinary stores in the 128-byte swizzle.
__global__ void wgmma_kernel(float* out, const bf16* a, const bf16* b, WgmmaFaults form) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    bf16* tiles = reinterpret_cast<bf16*>(raw);
    for (int i = int(threadIdx.x); i < kRows * kColumns; i += 128) {
        const int row = i / kColumns, column = i % kColumns, at = row * kColumns + ((column / 8) ^ (row % 8)) * 8 + column % 8;
        tiles[at] = a[i];
        tiles[kRows * kColumns + at] = b[i];
    }
    if (form.proxy_fence) fence_proxy_async();
    __syncthreads();
    const uint32_t base = shared_address(raw);
    const uint64_t a_tile = wgmma_descriptor(base, 16, form.stride_bytes, Swizzle::bytes_128);
    const uint64_t b_tile = wgmma_descriptor(base + kTileBytes, 16, 1024, Swizzle::bytes_128);
    float d[32];
    float sum = 0.0f;
    if (form.fence) wgmma_fence();
    for (int k = 0; k < 4; ++k) wgmma_ss<64>(d, a_tile + uint64_t(2 * k), b_tile + uint64_t(2 * k), k != 0);  // FAULT wgmma_without_fence wgmma_proxy_fence missing_wgmma_wait missing_wgmma_commit
    if (form.commit) wgmma_commit();
    if (form.overwrite_early) tiles[threadIdx.x] = to_bf16(0.0f);  // FAULT operand_overwritten
    if (form.read_early) sum += d[0];                              // FAULT accumulator_read_early
    if (form.wait) wgmma_wait<0>();
    const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = 2 * (int(threadIdx.x) % 4);
    for (int j = 0; j < 8; ++j) {
        for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * kColumns + 8 * j + column + e % 2] = d[4 * j + e];
    }
    if (form.read_early && sum == 123456.0f) out[0] = sum;
#endif
}

std::string run_wgmma(WgmmaFaults form) {
    const std::vector<bf16> a_values = numbers(kRows, kColumns);
    std::vector<bf16> b_values = a_values;
    for (size_t i = 0; i < b_values.size(); ++i) b_values[i] = to_bf16(float(int(i * 5 % 11) - 5));
    std::vector<float> expected(kRows * kColumns, 0.0f);
    for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
            for (int k = 0; k < kColumns; ++k)
                expected[size_t(row * kColumns + column)] +=
                    to_float(a_values[size_t(row * kColumns + k)]) * to_float(b_values[size_t(column * kColumns + k)]);
        }
    }
    DeviceArray<bf16> a(a_values), b(b_values);
    DeviceArray<float> out(expected.size());
    return outcome(LAUNCH(wgmma_kernel, dim3(1), dim3(128), 2 * kTileBytes, nullptr, out.data(), a.data(), b.data(), form), out, expected);
}

CASE(wgmma_without_fence) {
    WgmmaFaults form;
    form.fence = !bug;
    return run_wgmma(form);
}
CASE(missing_wgmma_commit) {
    WgmmaFaults form;
    form.commit = !bug;
    return run_wgmma(form);
}
CASE(missing_wgmma_wait) {
    WgmmaFaults form;
    form.wait = !bug;
    return run_wgmma(form);
}
CASE(wgmma_proxy_fence) {
    WgmmaFaults form;
    form.proxy_fence = !bug;
    return run_wgmma(form);
}
CASE(accumulator_read_early) {
    WgmmaFaults form;
    form.read_early = bug;
    return run_wgmma(form);
}
CASE(operand_overwritten) {
    WgmmaFaults form;
    form.overwrite_early = bug;
    return run_wgmma(form);
}
CASE(descriptor_stride) {
    WgmmaFaults form;
    form.stride_bytes = bug ? 512 : 1024;
    return run_wgmma(form);
}

__global__ void divergent_elect_kernel(float* out, bool diverge) {
#if MMPO_SM90
    float value = 0.0f;
    if (!diverge || threadIdx.x < 16) value = elect_one() ? 1.0f : 0.0f;
    else value = elect_one() ? 2.0f : 0.0f;  // FAULT divergent_elect
    out[threadIdx.x] = value;
#endif
}

CASE(divergent_elect) {
    DeviceArray<float> out(32);
    std::vector<float> expected(32, 0.0f);
    expected[0] = 1.0f;
    return outcome(LAUNCH(divergent_elect_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug), out, expected);
}

}  // namespace
