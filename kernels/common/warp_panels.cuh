// How a warp of an sm_90 kernel stores its accumulators: it writes them to panels of shared memory of its own, from
// which TMA stores carry whole lines to global memory while the warp computes on. No other warp takes part, so no
// barrier is needed.
//
// A panel is 16 rows of 128 bytes (64 bf16 or 32 f32 values) in the 128-byte swizzle: chunk c of row r lies at c ^ (r &
// 7). Stores clip what lies outside the array, so ragged edges need no predicates.
#pragma once

#include "hopper.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kPanelRows = 16;
// Accumulators that a lane holds of one panel's columns.
constexpr int kPanelAccumulatorsBf16 = 32, kPanelAccumulatorsF32 = 16;
constexpr int kPanelColumnsF32 = 32;

using Panel = PanelTile<kPanelRows, kPanelColumns>;

// A warp's panels, used in rotation.
template <int kPanels>
struct WarpPanels {
    static constexpr int kBytes = kPanels * Panel::kBytes;

    uint32_t base;  // shared address, a multiple of 1024
    int next = 0;

    // The next panel, free to be written: waits for the last store that left from it. Call in all lanes.
    DEVICE Panel acquire() {
        if (lane_id() == 0) bulk_wait_read<kPanels - 1>();
        __syncwarp();
        return {base + uint32_t(next * Panel::kBytes)};
    }

    // Stores the panel that `acquire` gave and that has been written since. `store(address)` queues one TMA store. Call
    // in all lanes.
    template <class Store>
    DEVICE void send(const Store& store) {
        fence_proxy_async();
        __syncwarp();
        if (lane_id() == 0) {
            store(base + uint32_t(next * Panel::kBytes));
            bulk_commit();
        }
        next = next + 1 == kPanels ? 0 : next + 1;
    }

    // Waits until no store reads shared memory any more. Call before the block ends.
    DEVICE void drain() const {
        if (lane_id() == 0) bulk_wait_read<0>();
    }
};

// Encodes the tensor map of a row-major array for stores from panels. `columns`, and `row_elements` (the distance
// between rows), must be a multiple of 8 for bf16 or 4 for f32.
inline mmpo_status encode_panel_map(CUtensorMap* out, bf16* base, int64_t rows, int64_t columns, int64_t row_elements) {
    return encode_tensor_map_2d(out, base, uint64_t(rows), uint64_t(columns), uint64_t(row_elements), kPanelRows,
                                kPanelColumns, Swizzle::bytes_128);
}
inline mmpo_status encode_panel_map(CUtensorMap* out, bf16* base, int64_t rows, int64_t columns) {
    return encode_panel_map(out, base, rows, columns, columns);
}
inline mmpo_status encode_panel_map(CUtensorMap* out, float* base, int64_t rows, int64_t columns) {
    TensorMapShape shape{};
    shape.rank = 2;
    shape.sizes[0] = uint64_t(columns);
    shape.sizes[1] = uint64_t(rows);
    shape.strides_bytes[0] = uint64_t(columns) * sizeof(float);
    shape.box[0] = kPanelColumnsF32;
    shape.box[1] = kPanelRows;
    shape.swizzle = Swizzle::bytes_128;
    return encode_tensor_map(out, base, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, shape);
}

// A lane's accumulators of a panel rounded to bf16, two to a register.
using PanelPairs = uint32_t[kPanelAccumulatorsBf16 / 2];

// Writes a panel of bf16 values. The eight rows that stmatrix writes at once lie in eight different chunk columns.
DEVICE void write_panel_bf16(Panel panel, const PanelPairs& pairs) {
    const int lane = int(lane_id()), matrix = lane / 8;
    const int row = matrix % 2 * 8 + lane % 8;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // Columns 16 * pair ..: two matrices side by side, two below each other.
        const uint32_t r[4] = {pairs[4 * pair], pairs[4 * pair + 1], pairs[4 * pair + 2], pairs[4 * pair + 3]};
        stmatrix_x4(panel.address(row, 2 * pair + matrix / 2), r);
    }
}

DEVICE void pack_panel(PanelPairs& pairs, const float (&values)[kPanelAccumulatorsBf16]) {
#pragma unroll
    for (int i = 0; i < kPanelAccumulatorsBf16 / 2; ++i) pairs[i] = pack_bf16x2(values[2 * i], values[2 * i + 1]);
}

// Writes accumulators of 64 columns to a panel, rounded to bf16.
DEVICE void write_panel_bf16(Panel panel, const float (&values)[kPanelAccumulatorsBf16]) {
    PanelPairs pairs;
    pack_panel(pairs, values);
    write_panel_bf16(panel, pairs);
}

// Writes accumulators of 32 columns to a panel as f32. A half warp stores four rows at once, eight bytes per lane. If
// all four rows stored the same columns, the swizzle would leave rows 0 and 1 (and rows 2 and 3) in the same banks. So
// odd rows store columns that are 16 further on (or back) than those of even rows.
DEVICE void write_panel_f32(Panel panel, const float (&values)[kPanelAccumulatorsF32]) {
    const int lane = int(lane_id());
    const bool odd_row = lane / 4 % 2 != 0;
#pragma unroll
    for (int round = 0; round < 4; ++round) {
        const int group = odd_row ? round ^ 2 : round;  // of eight columns
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int here = 4 * round + 2 * half, there = 4 * (round ^ 2) + 2 * half;
            const float low = odd_row ? values[there] : values[here];
            const float high = odd_row ? values[there + 1] : values[here + 1];
            const uint32_t chunk = panel.address(lane / 4 + 8 * half, 2 * group + lane % 4 / 2);
            store_shared_64(chunk + uint32_t(lane % 2 * 8), make_uint2(__float_as_uint(low), __float_as_uint(high)));
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
