// Clusters: ranks, multicast by every mask, arrivals in another block's shared memory.
#include "harness.h"

using namespace mmpo::test;

namespace {

constexpr int kRows = 16, kColumns = 64, kTileBytes = kRows * kColumns * 2;

std::vector<bf16> numbers(int count) {
    std::vector<bf16> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_bf16(float(int(i * 7 % 251) - 125));
    return values;
}

__global__ void ranks_kernel(float* out) {
#if MMPO_SM90
    cluster_sync();
    if (threadIdx.x == 0) out[blockIdx.x] = float(cluster_rank());
#endif
}

CASE(cluster_ranks) {
    DeviceArray<float> out(12);
    std::vector<float> expected;
    for (int block = 0; block < 12; ++block) expected.push_back(float(block % 4));
    return outcome(LAUNCH_CLUSTERS(ranks_kernel, 4, dim3(12), dim3(64), 0, nullptr, out.data()), out, expected);
}

// Block r of a cluster multicasts tile 4 * cluster + r to the blocks of mask r + 1 .. Each block then writes what it got:
// of each sender its tile, zeros if none.
__global__ void masks_kernel(float* out, const __grid_constant__ CUtensorMap map, uint32_t first_mask) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t tiles = shared_address(raw), full = tiles + 4 * kTileBytes;
    const uint32_t rank = cluster_rank(), own = (first_mask + rank * 5) % 15 + 1;
    uint32_t received = 0;
    for (uint32_t sender = 0; sender < 4; ++sender) received += ((first_mask + sender * 5) % 15 + 1) >> rank & 1u;
    for (int i = int(threadIdx.x); i < 4 * kTileBytes / 2; i += int(blockDim.x)) reinterpret_cast<bf16*>(raw)[i] = to_bf16(0.0f);
    fence_proxy_async();
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(full, received * kTileBytes);
        tma_load_2d_multicast(tiles + rank * kTileBytes, &map, 0, int(blockIdx.x) * kRows, full, uint16_t(own));
    }
    mbarrier_wait(full, 0);
    for (int i = int(threadIdx.x); i < 4 * kTileBytes / 2; i += int(blockDim.x)) {
        const int row = i / kColumns, column = i % kColumns, chunk = column / 8 ^ row % 8;
        out[int(blockIdx.x) * 4 * kRows * kColumns + i] = to_float(reinterpret_cast<const bf16*>(raw)[row * kColumns + chunk * 8 + column % 8]);
    }
    cluster_sync();
#endif
}

CASE(multicast_masks) {
    constexpr int kBlocks = 8, kTile = kRows * kColumns;
    const std::vector<bf16> values = numbers(kBlocks * kTile);
    DeviceArray<bf16> in(values);
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, in.data(), kBlocks * kRows, kColumns, kColumns, kRows, kColumns, Swizzle::bytes_128) != 0) return "no tensor map";
    for (uint32_t first_mask = 0; first_mask < 15; ++first_mask) {
        std::vector<float> expected;
        for (uint32_t block = 0; block < kBlocks; ++block) {
            for (uint32_t sender = 0; sender < 4; ++sender) {
                const bool gets = (((first_mask + sender * 5) % 15 + 1) >> block % 4 & 1u) != 0;
                for (int i = 0; i < kTile; ++i) expected.push_back(gets ? to_float(values[(block / 4 * 4 + sender) * kTile + size_t(i)]) : 0.0f);
            }
        }
        DeviceArray<float> out(expected.size());
        const int error = LAUNCH_CLUSTERS(masks_kernel, 4, dim3(kBlocks), dim3(64), 4 * kTileBytes + 8, nullptr, out.data(), map, first_mask);
        const std::string report = outcome(error, out, expected);
        if (!report.empty()) return report;
    }
    return "";
}

// Each round, every block adds to a sum of its own and tells the next block of the ring, which waits for it.
__global__ void ring_kernel(float* out, int rounds) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t heard = shared_address(raw), rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_init(heard, 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        uint32_t parity = 0;
        for (int round = 0; round < rounds; ++round) {
            if (rank == 0) mbarrier_arrive_at(heard, 1);
            mbarrier_wait_cluster(heard, parity);
            if (rank != 0) mbarrier_arrive_at(heard, rank == 3 ? 0 : rank + 1);
            parity ^= 1;
        }
        out[blockIdx.x] = float(rounds);
    }
    cluster_sync();
#endif
}

CASE(arrivals_round_a_ring) {
    DeviceArray<float> out(8);
    return outcome(LAUNCH_CLUSTERS(ring_kernel, 4, dim3(8), dim3(32), 8, nullptr, out.data(), 5), out, std::vector<float>(8, 5.0f));
}

}  // namespace
