// The rows that the log-prob head scores: out[N, D] = hidden[scored_rows[N], :], and the gradient of that.
//
// Both directions assign. A pair's last prompt row predicts the first token of both responses, so a row is gathered at
// most twice. `row_scores[T, 2]` is the relation seen from the rows, so that the backward can gather too, instead of
// adding with atomics.

#include "common/row_gather.cuh"

namespace {

constexpr uint32_t kNone = 0xffffffffu;
// Vectors of a lane. Rows that predict nothing are written without being read, so two reads of two vectors suffice.
constexpr int kBackwardVectors = 2;

// Loads the lane's vectors of dout of one scored token, or zeros if `score` is kNone.
template <bool kVectorized>
DEVICE void load_score(uint4 (&packed)[kBackwardVectors], const bf16* dout, uint32_t score, int column, int width) {
    const bf16* const row = dout + int64_t(score == kNone ? 0 : score) * width;
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        packed[v] = load8<kVectorized>(row, column + v * kVectorStride, score == kNone ? 0 : width);
    }
}

template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    gather_backward_kernel(bf16* __restrict__ dhidden, const bf16* __restrict__ dout,
                           const uint32_t* __restrict__ row_scores, int rows, int width) {
    const WarpTile tile = warp_tile<kBackwardVectors>(width);
    if (tile.row >= rows) return;
    uint4 first[kBackwardVectors], second[kBackwardVectors];
    load_score<kVectorized>(first, dout, row_scores[2 * int64_t(tile.row)], tile.column, width);
    load_score<kVectorized>(second, dout, row_scores[2 * int64_t(tile.row) + 1], tile.column, width);
    bf16* const out = dhidden + int64_t(tile.row) * width;
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        float sum[kVector], other[kVector];
        unpack8(sum, first[v]);
        unpack8(other, second[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += other[i];
        store8<kVectorized>(out, tile.column + v * kVectorStride, width, pack8(sum));
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(gather_rows)(bf16* out, const bf16* hidden, const uint32_t* scored_rows, int32_t scored,
                                     int32_t width, mmpo_stream stream) {
    return launch_gather(out, hidden, scored_rows, scored, width, stream);
}

mmpo_status MMPO_EXPORT(gather_rows_backward)(bf16* dhidden, const bf16* dout, const uint32_t* row_scores, int32_t rows,
                                              int32_t width, mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const unsigned blocks = warp_tile_blocks<kBackwardVectors>(rows, width);
    return vector_rows(width) ? LAUNCH(gather_backward_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), dhidden,
                                       dout, row_scores, rows, width)
                              : LAUNCH(gather_backward_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), dhidden,
                                       dout, row_scores, rows, width);
}
