// How a warp of an sm_90 kernel writes what it holds in accumulators: through panels of shared memory of its own, from
// which TMA stores carry whole lines to global memory while the warp computes on. No other warp takes part, so no
// barrier.
//
// A panel is 16 rows of 128 bytes (64 bf16 or 32 f32 values) in the 128-byte swizzle: chunk c of row r at c ^ (r & 7).
// Stores clip what lies outside of the array, so ragged edges need no predicates.
#pragma once

#include "hopper.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kPanelRows = 16;
// Accumulators a lane holds of one panel's columns.
constexpr int kPanelAccumulatorsBf16 = 32, kPanelAccumulatorsF32 = 16;
constexpr int kPanelColumnsF32 = 32;

// A warp's panels, used in turn.
template <int kPanels>
struct WarpPanels {
    static constexpr int kPanelBytes = kPanelRows * kPanelRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;

    uint32_t base;  // shared address, a multiple of 1024
    int next = 0;

    // The next panel, free to be written: waits for the store that left from it last. Call in all lanes.
    DEVICE uint32_t acquire() {
        if (lane_id() == 0) bulk_wait_read<kPanels - 1>();
        __syncwarp();
        return base + uint32_t(next * kPanelBytes);
    }

    // Sends off the panel that `acquire` gave, written by now: `store(panel)` queues one TMA store. Call in all lanes.
    template <class Store>
    DEVICE void send(const Store& store) {
        fence_proxy_async();
        __syncwarp();
        if (lane_id() == 0) {
            store(base + uint32_t(next * kPanelBytes));
            bulk_commit();
        }
        next = next + 1 == kPanels ? 0 : next + 1;
    }

    // Until no store reads shared memory any more: before the block ends.
    DEVICE void drain() const {
        if (lane_id() == 0) bulk_wait_read<0>();
    }
};

// Maps of row-major arrays for the stores of panels. `columns` (and the distance between rows, where it is another)
// must be a multiple of 8 (bf16) or 4 (f32).
inline int encode_panel_map(CUtensorMap* out, bf16* base, int64_t rows, int64_t columns, int64_t row_elements) {
    return encode_tensor_map_2d(out, base, uint64_t(rows), uint64_t(columns), uint64_t(row_elements), kPanelRows,
                                kPanelColumns, Swizzle::bytes_128);
}
inline int encode_panel_map(CUtensorMap* out, bf16* base, int64_t rows, int64_t columns) {
    return encode_panel_map(out, base, rows, columns, columns);
}
inline int encode_panel_map(CUtensorMap* out, float* base, int64_t rows, int64_t columns) {
    const TensorMapShape shape{2,
                               {uint64_t(columns), uint64_t(rows), 1},
                               {uint64_t(columns) * sizeof(float), 0},
                               {kPanelColumnsF32, kPanelRows, 1},
                               Swizzle::bytes_128};
    return encode_tensor_map(out, base, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, shape);
}

// A lane's accumulators of a panel rounded to bf16, two to a register.
using PanelPairs = uint32_t[kPanelAccumulatorsBf16 / 2];

// Writes a panel of bf16 values. The eight rows that stmatrix writes at once lie in eight different chunk columns.
DEVICE void write_panel_bf16(uint32_t panel, const PanelPairs& pairs) {
    const int lane = int(lane_id()), matrix = lane / 8;
    const int row = matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // Columns 16 * pair ..: two matrices side by side, two below each other.
        const uint32_t r[4] = {pairs[4 * pair], pairs[4 * pair + 1], pairs[4 * pair + 2], pairs[4 * pair + 3]};
        stmatrix_x4(PanelTile<kPanelRows, kPanelColumns>::address(panel, row, 2 * pair + matrix / 2), r);
    }
}

DEVICE void pack_panel(PanelPairs& pairs, const float (&values)[kPanelAccumulatorsBf16]) {
#pragma unroll
    for (int i = 0; i < kPanelAccumulatorsBf16 / 2; ++i) pairs[i] = pack_bf16x2(values[2 * i], values[2 * i + 1]);
}

// Writes accumulators of 64 columns to a panel, rounded to bf16.
DEVICE void write_panel_bf16(uint32_t panel, const float (&values)[kPanelAccumulatorsBf16]) {
    PanelPairs pairs;
    pack_panel(pairs, values);
    write_panel_bf16(panel, pairs);
}

// Writes accumulators of 32 columns to a panel as they are. A half warp's stores cover rows 4i .. 4i+4, eight bytes a
// lane: were all four at the same columns, the swizzle would leave rows 0 and 1 (2 and 3) in the same banks. So odd
// rows store the columns 16 further on (or back) meanwhile.
DEVICE void write_panel_f32(uint32_t panel, const float (&values)[kPanelAccumulatorsF32]) {
    const int lane = int(lane_id());
    const bool odd_row = lane / 4 % 2 != 0;
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
        const int group = odd_row ? turn ^ 2 : turn;  // Of eight columns.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int here = 4 * turn + 2 * half, there = 4 * (turn ^ 2) + 2 * half;
            const float low = odd_row ? values[there] : values[here];
            const float high = odd_row ? values[there + 1] : values[here + 1];
            const uint32_t chunk =
                PanelTile<kPanelRows, kPanelColumns>::address(panel, lane / 4 + 8 * half, 2 * group + lane % 4 / 2);
            store_shared_64(chunk + uint32_t(lane % 2 * 8), make_uint2(__float_as_uint(low), __float_as_uint(high)));
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
