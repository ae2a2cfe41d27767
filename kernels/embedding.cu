// Token embedding: out[T, D] = table[token_ids[T], :], and its gradient dtable[V, D] += scatter(dout[T, D]).
//
// The forward assigns, the backward accumulates. A scatter with atomics would add the rows of a token in a different
// order each time. Instead `rows_by_token` lists the rows sorted by token, so that a token's rows are one run of the
// list. One warp (for a short run) or one block (for a long one) sums them in f32 and updates the table's row once.

#include "common/row_gather.cuh"

namespace {

// The longest run that one warp sums; it finds the run's end with one vote over its lanes. Longer runs (punctuation,
// end tokens: hundreds of rows in a batch) would keep one warp busy long after all others are done.
constexpr int kShortRun = kWarp;
// Rows that a warp loads at once: with this many, a run of a few rows costs one round trip to memory.
constexpr int kRowsAtOnce = 4;
// Columns of a warp or block: one vector per lane.
constexpr int kRunColumns = kTileColumns<1>;

// The list of rows sorted by token.
struct SortedTokens {
    const uint32_t* token_ids;
    const uint32_t* rows_by_token;
    int rows;

    // The token at `position` of the list.
    DEVICE uint32_t token(int position) const { return token_ids[rows_by_token[position]]; }
    DEVICE bool is(int position, uint32_t wanted) const {
        return position >= 0 && position < rows && token(position) == wanted;
    }
};

DEVICE void add_values(float (&sum)[kVector], uint4 packed) {
    float values[kVector];
    unpack8(values, packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += values[i];
}

// A warp looks at one position of the list and 256 columns. It sums the run that starts there, if it is short.
template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    add_short_runs_kernel(float* dtable, const bf16* __restrict__ dout, SortedTokens sorted, int width) {
    const WarpTile tile = warp_tile<1>(width);
    const int position = tile.row;
    if (position >= sorted.rows) return;
    const uint32_t token = sorted.token(position);
    if (sorted.is(position - 1, token) || sorted.is(position + kShortRun, token)) return;

    const int mine = position + int(lane_id());
    const int run = __popc(__ballot_sync(0xffffffffu, sorted.is(mine, token)));
    const uint32_t my_row = mine < sorted.rows ? sorted.rows_by_token[mine] : 0;
    float sum[kVector] = {};
    for (int first = 0; first < run; first += kRowsAtOnce) {
        uint4 packed[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            const uint32_t row = __shfl_sync(0xffffffffu, my_row, first + i);
            packed[i] = load8<kVectorized>(dout + int64_t(row) * width, tile.column, first + i < run ? width : 0);
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) add_values(sum, packed[i]);
    }

    float* const out = dtable + int64_t(token) * width;
    float total[kVector];
    load8<kVectorized>(total, out, tile.column, width);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] += sum[i];
    store8<kVectorized>(out, tile.column, width, total);
}

// The first position of a long run whose first multiple of kShortRun is `anchor`, or -1 if there is none. Every long
// run covers such a multiple, and only the block of the first one works. All warps of a block get the same answer.
DEVICE int long_run_start(const SortedTokens& sorted, int anchor, uint32_t token) {
    if (sorted.is(anchor - kShortRun, token)) return -1;
    const uint32_t before = __ballot_sync(0xffffffffu, sorted.is(anchor - int(lane_id()), token));
    const int start = anchor + 1 - __popc(before);
    return sorted.is(start + kShortRun, token) ? start : -1;
}

// A block looks at one multiple of kShortRun in the list and 256 columns; its warps take the run's rows in rotation.
template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    add_long_runs_kernel(float* dtable, const bf16* __restrict__ dout, SortedTokens sorted, int width) {
    DYNAMIC_SHARED(shared);
    float (*const warp_sums)[kRunColumns] = reinterpret_cast<float (*)[kRunColumns]>(shared);
    const int anchor = int(blockIdx.x) * kShortRun;
    const uint32_t token = sorted.token(anchor);
    const int start = long_run_start(sorted, anchor, token);
    if (start < 0) return;

    const int warp = int(threadIdx.x) / kWarp;
    const int tile_column = int(blockIdx.y) * kRunColumns;
    const int in_tile = int(lane_id()) * kVector;
    float sum[kVector] = {};
    for (int first = start + warp * kRowsAtOnce; sorted.is(first, token); first += kBlockWarps * kRowsAtOnce) {
        uint4 packed[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            const bool in_run = sorted.is(first + i, token);
            const int64_t row = in_run ? sorted.rows_by_token[first + i] : 0;
            packed[i] = load8<kVectorized>(dout + row * width, tile_column + in_tile, in_run ? width : 0);
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) add_values(sum, packed[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) warp_sums[warp][in_tile + i] = sum[i];
    __syncthreads();

    static_assert(kRunColumns == kBlock, "each thread adds up one column");
    const int column = tile_column + int(threadIdx.x);
    if (column >= width) return;
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < kBlockWarps; ++other) total += warp_sums[other][threadIdx.x];
    dtable[int64_t(token) * width + column] += total;
}

template <bool kVectorized>
mmpo_status launch_backward(float* dtable, const bf16* dout, const SortedTokens& sorted, int width,
                            mmpo_stream stream) {
    const mmpo_status status = LAUNCH(add_short_runs_kernel<kVectorized>, warp_tile_blocks<1>(sorted.rows, width),
                                      kBlock, 0, cuda_stream(stream), dtable, dout, sorted, width);
    if (status != kSuccess) return status;
    const dim3 grid(unsigned(ceil_div(sorted.rows, kShortRun)), unsigned(ceil_div(width, kRunColumns)));
    return LAUNCH(add_long_runs_kernel<kVectorized>, grid, kBlock, kBlockWarps * kRunColumns * sizeof(float),
                  cuda_stream(stream), dtable, dout, sorted, width);
}

}  // namespace

mmpo_status MMPO_EXPORT(embedding_forward)(bf16* out, const bf16* table, const uint32_t* token_ids, int32_t rows,
                                           int32_t width, mmpo_stream stream) {
    return launch_gather(out, table, token_ids, rows, width, stream);
}

mmpo_status MMPO_EXPORT(embedding_backward)(float* dtable, const bf16* dout, const uint32_t* token_ids,
                                            const uint32_t* rows_by_token, int32_t rows, int32_t width,
                                            mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const SortedTokens sorted{token_ids, rows_by_token, rows};
    return vector_rows(width) ? launch_backward<true>(dtable, dout, sorted, width, stream)
                              : launch_backward<false>(dtable, dout, sorted, width, stream);
}
