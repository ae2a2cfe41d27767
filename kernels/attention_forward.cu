// Flash attention forward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask).
//
//   out[T, H * E] = softmax(scale * q k^T + mask) v        bf16, assigned
//   lse[T, H]     = logsumexp of the masked, scaled scores  f32, natural log, assigned
//
// q, k, v are columns of qkv[T, (H + 2K) * E]; query head h reads key/value head h / (H / K). A block takes one tile of
// queries of one head and walks the key blocks that its rows may see; scores stay in registers, softmax is online and
// in base 2. Tensor cores: mma.sync, so every GPU from sm_80 on.
#include "api.h"
#include "common/attention_tiles.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
// A warp owns 16 query rows, the height of an mma.
constexpr int BLOCK_M = kWarps * 16;
constexpr int BLOCK_N = 64;
// Key and value blocks in flight: one in use, one arriving.
constexpr int kStages = 2;
constexpr int kScoreTiles = BLOCK_N / 8;

// Shared memory, in order: queries, then a stage's keys and values. E = 128: 16 + 2 * 32 = 80 KiB, so two blocks share
// a multiprocessor of sm_80 (164 KiB) and one fits into sm_86's 100 KiB.
template <int E>
struct SharedLayout {
    static constexpr int kQueries = 0;
    static constexpr int kKeys = kTileBytes<BLOCK_M, E>;
    static constexpr int kStageBytes = 2 * kTileBytes<BLOCK_N, E>;
    static constexpr int kBytes = kKeys + kStages * kStageBytes;

    static DEVICE uint32_t keys(uint32_t base, int block) { return base + kKeys + block % kStages * kStageBytes; }
    static DEVICE uint32_t values(uint32_t base, int block) { return keys(base, block) + kTileBytes<BLOCK_N, E>; }
};

struct Problem {
    const bf16* qkv;
    int64_t stride;  // values of a row of qkv
    int heads, kv_heads, head_size;
    float scale_log2;  // scale * log2(e): scores in base 2

    DEVICE const bf16* queries(int head) const { return qkv + int64_t(head) * head_size; }
    DEVICE const bf16* keys(int head) const { return qkv + int64_t(heads + head / (heads / kv_heads)) * head_size; }
    DEVICE const bf16* values(int head) const { return keys(head) + int64_t(kv_heads) * head_size; }
};

// The running softmax of a lane's two rows (top: lane / 4, bottom: lane / 4 + 8).
template <int E>
struct OnlineSoftmax {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};  // this lane's columns only, until finish
    float out[E / 8][4];

    DEVICE OnlineSoftmax() { clear(out); }

    // Replaces scores (base 2) by exp2(score - maximum) and rescales what was there before.
    DEVICE void update(float (&scores)[kScoreTiles][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = maximum[half];
#pragma unroll
            for (int n = 0; n < kScoreTiles; ++n) {
                highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // A row that has seen no key yet keeps -inf; 0 in its place avoids inf - inf.
            const float base = highest == -INFINITY ? 0.0f : highest;
            const float rescale = exp2_approx(maximum[half] - base);
            maximum[half] = highest;
            float added = 0.0f;
#pragma unroll
            for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[n][i] = exp2_approx(scores[n][i] - base);
                    added += scores[n][i];
                }
            }
            sum[half] = sum[half] * rescale + added;
#pragma unroll
            for (int n = 0; n < E / 8; ++n) {
                out[n][2 * half] *= rescale;
                out[n][2 * half + 1] *= rescale;
            }
        }
    }

    // Sums over the four lanes of a row.
    DEVICE void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
        }
    }
};

template <int E>
DEVICE void load_keys_and_values(uint32_t shared, const Problem& problem, int head, const KeyBlocks<BLOCK_N>& blocks,
                                 int block) {
    const int first = blocks.first(block), limit = blocks.limit(block);
    using Layout = SharedLayout<E>;
    load_tile_async<BLOCK_N, E, kThreads>(Layout::keys(shared, block), problem.keys(head), problem.stride, first,
                                          limit);
    load_tile_async<BLOCK_N, E, kThreads>(Layout::values(shared, block), problem.values(head), problem.stride, first,
                                          limit);
}

// Sets the scores that a warp's rows may not see to -inf.
DEVICE void mask_scores(float (&scores)[kScoreTiles][4], const KeyBlocks<BLOCK_N>& blocks, int block, int first_row) {
    const int lane = int(lane_id());
    const bool causal = block >= blocks.shared_blocks;
    const int limit = blocks.limit(block);
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = blocks.first(block) + n * 8 + lane % 4 * 2 + i % 2;
            const int query = first_row + lane / 4 + i / 2 * 8;
            if (key >= limit || (causal && key > query)) scores[n][i] = -INFINITY;
        }
    }
}

template <int E>
DEVICE void store_results(bf16* out, float* lse, const Problem& problem, int head, const RowTile& tile, int first_row,
                          const OnlineSoftmax<E>& softmax) {
    const int64_t stride = int64_t(problem.heads) * E;
    store_rows<E>(out + int64_t(head) * E, stride, first_row, tile.last, softmax.out, 1.0f / softmax.sum[0],
                  1.0f / softmax.sum[1]);
    const int lane = int(lane_id());
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        if (row < tile.last) {
            lse[int64_t(row) * problem.heads + head] = softmax.maximum[half] * kLn2 + logf(softmax.sum[half]);
        }
    }
}

template <int E>
__global__ void __launch_bounds__(kThreads)
    attention_forward_kernel(bf16* out, float* lse, Problem problem, const uint32_t* spans) {
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    using Layout = SharedLayout<E>;
    const Span span = load_span(spans, int(blockIdx.z));
    const int head = int(blockIdx.y), warp = int(threadIdx.x) / 32;
    RowTile tile;
    if (!find_row_tile(tile, span, int(blockIdx.x), BLOCK_M)) return;
    const KeyBlocks<BLOCK_N> blocks(span, tile);
    const int first_row = tile.first + warp * 16;

    load_tile_async<BLOCK_M, E, kThreads>(shared + Layout::kQueries, problem.queries(head), problem.stride, tile.first,
                                          tile.last);
    load_keys_and_values<E>(shared, problem, head, blocks, 0);
    cp_async_commit();

    OnlineSoftmax<E> softmax;
    for (int block = 0; block < blocks.blocks; ++block) {
        cp_async_wait<0>();
        __syncthreads();  // the block has arrived, and all warps are done with the stage that is filled next
        if (block + 1 < blocks.blocks) load_keys_and_values<E>(shared, problem, head, blocks, block + 1);
        cp_async_commit();

        float scores[kScoreTiles][4];
        clear(scores);
        multiply_transposed<E>(scores, shared + Layout::kQueries, warp * 16, Layout::keys(shared, block));
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[n][i] *= problem.scale_log2;
        if (blocks.crosses_boundary(block, first_row)) mask_scores(scores, blocks, block, first_row);
        softmax.update(scores);
        multiply_from_accumulators<E>(softmax.out, scores, Layout::values(shared, block));
    }
    softmax.finish();
    store_results<E>(out, lse, problem, head, tile, first_row, softmax);
}

template <int E>
int launch(bf16* out, float* lse, const Problem& problem, const uint32_t* spans, dim3 grid, cudaStream_t stream) {
    return LAUNCH(attention_forward_kernel<E>, grid, dim3(kThreads), SharedLayout<E>::kBytes, stream, out, lse, problem,
                  spans);
}

}  // namespace

extern "C" mmpo_status MMPO_EXPORT(attention_forward)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv,
                                                      const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                      int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                      float scale, mmpo_stream stream) {
    const int tiles = most_row_tiles(host_spans, pairs, BLOCK_M);
    if (rows == 0 || tiles == 0) return 0;
    const int64_t stride = int64_t(heads + 2 * kv_heads) * head_size;
    const Problem problem{qkv, stride, heads, kv_heads, head_size, scale * kLog2E};
    const dim3 grid(tiles, heads, pairs);
    switch (head_size) {
        case 64:
            return launch<64>(out, lse, problem, spans, grid, stream);
        case 128:
            return launch<128>(out, lse, problem, spans, grid, stream);
        default:
            return 1;
    }
}
