// What Hopper products (product_sm90.cuh) do with their accumulators: the plain stores.
#pragma once

#include "product_sm90.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace hopper {

// out[M, N] (+ bias), rounded once.
struct StoreBf16 {
    CUtensorMap out;
    const bf16* bias;  // [N], or null
    int shape_m, shape_n;

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        if (row >= shape_m) return;
#pragma unroll
        for (int first = 0; first < kCount; first += kPanelAccumulatorsBf16) {
            const int x = column + 2 * first;
            if (x >= shape_n) return;
            float values[kPanelAccumulatorsBf16];
#pragma unroll
            for (int i = 0; i < kPanelAccumulatorsBf16; ++i) values[i] = d[first + i];
            if (bias != nullptr) add_bias(values, x);
            write_panel_bf16(panels.acquire(), values);
            panels.send([&](uint32_t panel) { tma_store_2d(&out, panel, x, row); });
        }
    }

    DEVICE void add_bias(float (&values)[kPanelAccumulatorsBf16], int x) const {
        const int pair = x + int(lane_id()) % 4 * 2;
#pragma unroll
        for (int j = 0; j < kPanelAccumulatorsBf16 / 4; ++j) {
            if (pair + 8 * j >= shape_n) return;
            const float low = to_float(bias[pair + 8 * j]), high = to_float(bias[pair + 8 * j + 1]);
            values[4 * j] += low;
            values[4 * j + 1] += high;
            values[4 * j + 2] += low;
            values[4 * j + 3] += high;
        }
    }
};

// out[M, N] (+)= the accumulators. The memory system adds, so that no warp waits for the old values; each element gets
// one addition a launch, and launches are in order: the bits are the same, run after run.
struct StoreF32 {
    CUtensorMap out;
    int shape_m, shape_n;
    bool add;

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        if (row >= shape_m) return;
#pragma unroll
        for (int first = 0; first < kCount; first += kPanelAccumulatorsF32) {
            const int x = column + 2 * first;
            if (x >= shape_n) return;
            float values[kPanelAccumulatorsF32];
#pragma unroll
            for (int i = 0; i < kPanelAccumulatorsF32; ++i) values[i] = d[first + i];
            write_panel_f32(panels.acquire(), values);
            panels.send([&](uint32_t panel) {
                if (add)
                    tma_reduce_add_2d(&out, panel, x, row);
                else
                    tma_store_2d(&out, panel, x, row);
            });
        }
    }
};

}  // namespace hopper
}  // namespace MMPO_VARIANT
}  // namespace mmpo
