// Planted faults of clusters: who waits for whom, and until when a block must stay. `// FAULT name` marks the line a report
// must name.
#include "harness.h"

using namespace mmpo::test;

namespace {

constexpr int kRows = 16, kColumns = 64, kTileBytes = kRows * kColumns * 2, kBlocks = 4, kSlices = 5;

struct ClusterFaults {
    bool sync_after_init = true, sync_before_exit = true, sync_everywhere = true;
    bool release_peer = true, wait_for_peer = true;
    uint16_t ranks = 3;
};

// A ring of one stage between two blocks: of each slice every block loads half and multicasts it to both; every warp adds
// up both halves, then gives the stage back to both producers.
__global__ void __launch_bounds__(96) shared_slices_kernel(float* out, const __grid_constant__ CUtensorMap map, ClusterFaults form) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t stage = shared_address(raw), full = stage + 2 * kTileBytes, empty = full + 8, rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_init(empty, form.wait_for_peer ? 4 : 2);
        fence_mbarrier_init();
    }
    if (form.sync_after_init) cluster_sync();
    else __syncthreads();
    if (threadIdx.x < 32) {
        for (int slice = 0; slice < kSlices && threadIdx.x == 0; ++slice) {
            mbarrier_wait_cluster(empty, uint32_t(slice + 1) % 2);  // FAULT missing_peer_release
            mbarrier_arrive_expect_tx(full, 2 * kTileBytes);
            tma_load_2d_multicast(stage + rank * kTileBytes, &map, 0, (2 * slice + int(rank)) * kRows, full, form.ranks);  // FAULT multicast_outside unordered_cluster_init missing_peer_wait
        }
    } else {
        float sum = 0.0f;
        for (int slice = 0; slice < kSlices; ++slice) {
            mbarrier_wait(full, uint32_t(slice) % 2);
            for (int i = int(threadIdx.x) - 32; i < kTileBytes; i += 64) sum += to_float(reinterpret_cast<const bf16*>(raw)[i]);  // FAULT missing_peer_wait
            __syncwarp();
            const uint32_t lane = lane_id();
            if (lane == rank || (lane < 2 && form.release_peer && form.wait_for_peer)) mbarrier_arrive_at(empty, lane);  // FAULT missing_cluster_exit
        }
        out[blockIdx.x * 64 + threadIdx.x - 32] = sum;
    }
    if (!form.sync_everywhere && rank == 1 && threadIdx.x / 32 == 1) bar_sync(1, 64);  // FAULT cluster_barrier
    if (form.sync_before_exit) cluster_sync();                                         // FAULT cluster_barrier
#endif
}

std::string run_slices(ClusterFaults form) {
    std::vector<bf16> values(2 * kSlices * kRows * kColumns);
    for (size_t i = 0; i < values.size(); ++i) values[i] = to_bf16(float(int(i * 7 % 13) - 6));
    // A 128-byte swizzle moves chunks of 8 values within their row: thread t adds up column t, but for that.
    std::vector<float> expected(kBlocks * 64, 0.0f);
    for (int block = 0; block < kBlocks; ++block) {
        for (int row = 0; row < 2 * kSlices * kRows; ++row) {
            for (int column = 0; column < kColumns; ++column) {
                const int swizzled = ((column / 8) ^ (row % 8)) * 8 + column % 8;
                expected[size_t(block * 64 + swizzled)] += to_float(values[size_t(row * kColumns + column)]);
            }
        }
    }
    DeviceArray<bf16> in(values);
    DeviceArray<float> out(expected.size());
    CUtensorMap map;
    if (encode_tensor_map_2d(&map, in.data(), 2 * kSlices * kRows, kColumns, kColumns, kRows, kColumns, Swizzle::bytes_128) != 0) return "no tensor map";
    return outcome(LAUNCH_CLUSTERS(shared_slices_kernel, 2, dim3(kBlocks), dim3(96), 2 * kTileBytes + 16, nullptr, out.data(), map, form), out, expected);
}

CASE(unordered_cluster_init) {
    ClusterFaults form;
    form.sync_after_init = !bug;
    return run_slices(form);
}
CASE(missing_cluster_exit) {
    ClusterFaults form;
    form.sync_before_exit = !bug;
    return run_slices(form);
}
CASE(cluster_barrier) {
    ClusterFaults form;
    form.sync_everywhere = !bug;
    return run_slices(form);
}
CASE(missing_peer_release) {
    ClusterFaults form;
    form.release_peer = !bug;
    return run_slices(form);
}
CASE(missing_peer_wait) {
    ClusterFaults form;
    form.wait_for_peer = !bug;
    return run_slices(form);
}
CASE(multicast_outside) {
    ClusterFaults form;
    form.ranks = bug ? 5 : 3;
    return run_slices(form);
}

}  // namespace
