// SwiGLU (Shazeer 2020): out[T, F] = silu(gate) * up with silu(x) = x / (1 + e^-x), and its gradient.
//
// A row of gate_up[T, 2F] is F gate values, then F up values. Both directions assign.

#include "common/sigmoid.cuh"
#include "common/vector.cuh"

namespace {

// Vectors of a lane. With two or three inputs, 64 or 96 bytes are under way in each lane.
constexpr int kVectors = 2;

template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    swiglu_forward_kernel(bf16* __restrict__ out, const bf16* __restrict__ gate_up, int rows, int width) {
    const WarpTile tile = warp_tile<kVectors>(width);
    if (tile.row >= rows) return;
    const bf16* const gate_row = gate_up + 2 * int64_t(tile.row) * width;
    const bf16* const up_row = gate_row + width;
    bf16* const out_row = out + int64_t(tile.row) * width;
    uint4 gates[kVectors], ups[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        gates[v] = load8<kVectorized>(gate_row, tile.column + v * kVectorStride, width);
        ups[v] = load8<kVectorized>(up_row, tile.column + v * kVectorStride, width);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float gate[kVector], up[kVector];
        unpack8(gate, gates[v]);
        unpack8(up, ups[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
        store8<kVectorized>(out_row, tile.column + v * kVectorStride, width, pack8(up));
    }
}

// d silu(x)/dx = sigmoid(x) * (1 + x * (1 - sigmoid(x))).
template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    swiglu_backward_kernel(bf16* __restrict__ dgate_up, const bf16* __restrict__ dout, const bf16* __restrict__ gate_up,
                           int rows, int width) {
    const WarpTile tile = warp_tile<kVectors>(width);
    if (tile.row >= rows) return;
    const int64_t gate_start = 2 * int64_t(tile.row) * width;
    const bf16* const dout_row = dout + int64_t(tile.row) * width;
    uint4 gates[kVectors], ups[kVectors], douts[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = tile.column + v * kVectorStride;
        gates[v] = load8<kVectorized>(gate_up + gate_start, column, width);
        ups[v] = load8<kVectorized>(gate_up + gate_start + width, column, width);
        douts[v] = load8<kVectorized>(dout_row, column, width);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        float gate[kVector], up[kVector], grad[kVector];
        unpack8(gate, gates[v]);
        unpack8(up, ups[v]);
        unpack8(grad, douts[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float weight = sigmoid(gate[i]);
            const float dup = grad[i] * gate[i] * weight;
            gate[i] = grad[i] * up[i] * weight * (1.0f + gate[i] * (1.0f - weight));
            up[i] = dup;
        }
        const int column = tile.column + v * kVectorStride;
        store8<kVectorized>(dgate_up + gate_start, column, width, pack8(gate));
        store8<kVectorized>(dgate_up + gate_start + width, column, width, pack8(up));
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(swiglu_forward)(bf16* out, const bf16* gate_up, int32_t rows, int32_t width,
                                        mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const unsigned blocks = warp_tile_blocks<kVectors>(rows, width);
    return vector_rows(width)
               ? LAUNCH(swiglu_forward_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), out, gate_up, rows, width)
               : LAUNCH(swiglu_forward_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), out, gate_up, rows,
                        width);
}

mmpo_status MMPO_EXPORT(swiglu_backward)(bf16* dgate_up, const bf16* dout, const bf16* gate_up, int32_t rows,
                                         int32_t width, mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const unsigned blocks = warp_tile_blocks<kVectors>(rows, width);
    return vector_rows(width) ? LAUNCH(swiglu_backward_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), dgate_up,
                                       dout, gate_up, rows, width)
                              : LAUNCH(swiglu_backward_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), dgate_up,
                                       dout, gate_up, rows, width);
}
