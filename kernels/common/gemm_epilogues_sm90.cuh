// The epilogues of the linear layers' Hopper gemms (gemm_sm90.cuh): what is stored, and how.
#pragma once

#include "gemm_launch_sm90.cuh"
#include "sigmoid.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm_sm90 {

// Adds columns x .. x + 64 of bias[width] to the accumulators of a panel.
DEVICE void add_bias(float (&values)[kPanelAccumulatorsBf16], const bf16* bias, int x, int width) {
    const int pair = x + int(lane_id()) % 4 * 2;
#pragma unroll
    for (int j = 0; j < kPanelAccumulatorsBf16 / 4; ++j) {
        if (pair + 8 * j >= width) return;
        const float low = to_float(bias[pair + 8 * j]), high = to_float(bias[pair + 8 * j + 1]);
        values[4 * j] += low;
        values[4 * j + 1] += high;
        values[4 * j + 2] += low;
        values[4 * j + 3] += high;
    }
}

// out[M, N] = the accumulators (+ bias), rounded to bf16 once.
struct StoreBf16 {
    CUtensorMap out;
    const bf16* bias;  // [N], or null for none
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
            if (bias != nullptr) add_bias(values, bias, x, shape_n);
            write_panel_bf16(panels.acquire(), values);
            panels.send([&](uint32_t panel) { tma_store_2d(&out, panel, x, row); });
        }
    }
};

// out[M, N] (+)= the accumulators. The memory system does the addition, so no warp waits for the old values. The order
// of additions is fixed, hence the bits as well: each element receives one addition per launch, and launches run in
// order.
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

// gate_up[M, 2F] = the accumulators (+ bias), and out[M, F] = silu(gate) * up of the values as stored, as swiglu.cu has
// it. This saves a pass over gate_up. It needs GatedForwardLines, and tiles in which a consumer holds gate and up of
// the same columns, at least 64 of them.
struct StoreSwiGlu {
    CUtensorMap gate, up, out;  // [M, F] each; gate and up are the halves of gate_up's rows
    const bf16* bias;           // [2F], or null for none
    int shape_m, width;         // M, F

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        static_assert(kCount % (2 * kPanelAccumulatorsBf16) == 0, "whole panels of gate, then as many of up");
        if (row >= shape_m) return;
#pragma unroll
        for (int first = 0; first < kCount / 2; first += kPanelAccumulatorsBf16) {
            const int x = column / 2 + 2 * first;
            if (x >= width) return;
            float gates[kPanelAccumulatorsBf16], ups[kPanelAccumulatorsBf16];
#pragma unroll
            for (int i = 0; i < kPanelAccumulatorsBf16; ++i) {
                gates[i] = d[first + i];
                ups[i] = d[kCount / 2 + first + i];
            }
            if (bias != nullptr) {
                add_bias(gates, bias, x, width);
                add_bias(ups, bias + width, x, width);
            }
            PanelPairs gate_pairs, up_pairs;
            pack_panel(gate_pairs, gates);
            pack_panel(up_pairs, ups);
            store(panels, gate, gate_pairs, x, row);
            store(panels, up, up_pairs, x, row);
#pragma unroll
            for (int i = 0; i < kPanelAccumulatorsBf16 / 2; ++i) {
                const float low = low_bf16(gate_pairs[i]), high = high_bf16(gate_pairs[i]);
                up_pairs[i] = pack_bf16x2(low_bf16(up_pairs[i]) * (low * sigmoid(low)),
                                          high_bf16(up_pairs[i]) * (high * sigmoid(high)));
            }
            store(panels, out, up_pairs, x, row);
        }
    }

    template <class Panels>
    static DEVICE void store(Panels& panels, const CUtensorMap& map, const PanelPairs& pairs, int x, int row) {
        write_panel_bf16(panels.acquire(), pairs);
        panels.send([&](uint32_t panel) { tma_store_2d(&map, panel, x, row); });
    }
};

// Encodes the maps of an epilogue that knows its sizes.
inline mmpo_status encode_swiglu_maps(StoreSwiGlu& epilogue, bf16* out, bf16* gate_up) {
    const int rows = epilogue.shape_m, width = epilogue.width;
    if (const mmpo_status error = encode_panel_map(&epilogue.gate, gate_up, rows, width, 2 * width)) return error;
    if (const mmpo_status error = encode_panel_map(&epilogue.up, gate_up + width, rows, width, 2 * width)) return error;
    return encode_panel_map(&epilogue.out, out, rows, width);
}

}  // namespace gemm_sm90
}  // namespace MMPO_VARIANT
}  // namespace mmpo
