// Flash attention backward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask).
//
//   dqkv[T, (H + 2K) * E]   bf16, assigned
//
// Probabilities are computed again from qkv and lse. Three kernels, none with atomics, so bits repeat:
//   preprocess  delta[T, H] = row sums of dout * out, into the workspace
//   dkdv        a block owns a tile of keys of one key/value head; dK and dV stay in registers while it walks, in a
//   fixed
//               order, the query heads of its group and the queries that see its keys
//   dq          a block owns a tile of queries of one head and walks the keys that it sees, as the forward does
// The second walk costs two more products than accumulating dQ by f32 atomics would (7 instead of 5); it is the price
// of a fixed order.
#include "api.h"
#include "common/attention_tiles.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
// A warp owns 16 rows of the tile that stays (keys in dkdv, queries in dq), the height of an mma.
constexpr int BLOCK_M = kWarps * 16;
constexpr int kStages = 2;

// Rows of a tile that streams past: two accumulators of 16 x E f32 stay in a warp's registers (dK and dV), so at
// E = 128 only half as many score columns fit beside them without spilling.
template <int E>
constexpr int kStreamRows = E == 64 ? 64 : 32;

struct Problem {
    const bf16* qkv;
    const bf16* dout;
    const float* lse;
    const float* delta;
    bf16* dqkv;
    int64_t stride;  // values of a row of qkv
    int heads, kv_heads, head_size;
    float scale, scale_log2;

    DEVICE int group() const { return heads / kv_heads; }
    DEVICE int64_t query_column(int head) const { return int64_t(head) * head_size; }
    DEVICE int64_t key_column(int kv_head) const { return int64_t(heads + kv_head) * head_size; }
    DEVICE int64_t value_column(int kv_head) const { return key_column(kv_heads + kv_head); }
    DEVICE int64_t out_stride() const { return int64_t(heads) * head_size; }
};

// Shared memory of both main kernels: two tiles that stay, then per stage two tiles that stream past; dkdv also keeps
// lse and delta of the stage's queries.
template <int E>
struct SharedLayout {
    static constexpr int kStay = kTileBytes<BLOCK_M, E>;
    static constexpr int kStream = kTileBytes<kStreamRows<E>, E>;
    static constexpr int kStatistics = 2 * kStreamRows<E> * int(sizeof(float));
    static constexpr int kTiles = 2 * kStay + kStages * 2 * kStream;
    static constexpr int kBytes = kTiles + kStages * kStatistics;

    static DEVICE uint32_t stay(uint32_t base, int which) { return base + which * kStay; }
    static DEVICE uint32_t stream(uint32_t base, int block, int which) {
        return base + 2 * kStay + (block % kStages * 2 + which) * kStream;
    }
    static DEVICE float* statistics(unsigned char* raw, int block) {
        return reinterpret_cast<float*>(raw + kTiles + block % kStages * kStatistics);
    }
};

// ------------------------------------------------------------------------------------------------------- preprocess

// One warp a (row, head).
template <int E>
__global__ void __launch_bounds__(kThreads)
    attention_delta_kernel(float* delta, const bf16* dout, const bf16* out, int64_t row_heads) {
    const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (index >= row_heads) return;
    const int lane = int(lane_id());
    const uint32_t* left = reinterpret_cast<const uint32_t*>(dout + index * E);
    const uint32_t* right = reinterpret_cast<const uint32_t*>(out + index * E);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < E / 64; ++i) {
        const uint32_t a = left[lane + 32 * i], b = right[lane + 32 * i];
        sum += low_bf16(a) * low_bf16(b) + high_bf16(a) * high_bf16(b);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) delta[index] = sum;
}

// ------------------------------------------------------------------------------------------------------- dK and dV

// The queries that see a tile of keys: one range, [first key, last), each query from its own key on. Rejected rows see
// the tile's prompt keys, but none of its chosen ones.
struct QueryBlocks {
    int first, last, blocks;
    // Queries from `blind_from` on do not see keys from `hidden_from` on.
    int blind_from, hidden_from;

    DEVICE QueryBlocks(const Span& span, const RowTile& keys, int rows) {
        const int prompt_last = span.start + span.prompt;
        blind_from = prompt_last + span.chosen;
        hidden_from = keys.rejected ? keys.last : prompt_last;
        first = keys.first;
        last = !keys.rejected && keys.first < prompt_last ? blind_from + span.rejected : keys.sequence_last;
        blocks = (last - first + rows - 1) / rows;
    }

    // Whether `rows` queries from `first_query` on are blind to some of a warp's 16 keys.
    DEVICE bool crosses_boundary(int first_key, int first_query, int rows) const {
        const int query_last = first_query + rows, key_last = first_key + 15;
        return first_query < key_last || query_last > last || (query_last > blind_from && key_last >= hidden_from);
    }

    DEVICE bool seen(int query, int key) const {
        return query >= key && query < last && (query < blind_from || key < hidden_from);
    }
};

template <int E>
DEVICE void load_queries(unsigned char* raw, uint32_t shared, const Problem& problem, int head,
                         const QueryBlocks& queries, int index, int stage) {
    constexpr int kRows = kStreamRows<E>;
    using Layout = SharedLayout<E>;
    const int first = queries.first + index * kRows;
    load_tile_async<kRows, E, kThreads>(Layout::stream(shared, stage, 0), problem.qkv + problem.query_column(head),
                                        problem.stride, first, queries.last);
    load_tile_async<kRows, E, kThreads>(Layout::stream(shared, stage, 1), problem.dout + problem.query_column(head),
                                        problem.out_stride(), first, queries.last);
    float* statistics = Layout::statistics(raw, stage);
    for (int i = int(threadIdx.x); i < kRows; i += kThreads) {
        const int row = min(first + i, queries.last - 1);
        const int64_t at = int64_t(row) * problem.heads + head;
        statistics[i] = problem.lse[at] * kLog2E;
        statistics[kRows + i] = problem.delta[at];
    }
}

// Sets the transposed scores (rows are keys, columns queries) of what no query sees to -inf.
template <int NT>
DEVICE void mask_keys(float (&scores)[NT][4], const QueryBlocks& queries, int first_key, int first_query) {
    const int lane = int(lane_id());
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int query = first_query + n * 8 + lane % 4 * 2 + i % 2;
            if (!queries.seen(query, first_key + lane / 4 + i / 2 * 8)) scores[n][i] = -INFINITY;
        }
    }
}

// Turns transposed scores and dP into P and dS.
template <int NT>
DEVICE void probabilities_of_keys(float (&scores)[NT][4], float (&dp)[NT][4], const Problem& problem,
                                  const float* statistics) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + int(lane_id()) % 4 * 2 + i % 2;
            const float p = exp2_approx(scores[n][i] * problem.scale_log2 - statistics[column]);
            scores[n][i] = p;
            dp[n][i] = p * (dp[n][i] - statistics[NT * 8 + column]);
        }
    }
}

template <int E>
__global__ void __launch_bounds__(kThreads) attention_dkdv_kernel(Problem problem, const uint32_t* spans) {
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    using Layout = SharedLayout<E>;
    constexpr int kRows = kStreamRows<E>;
    const Span span = load_span(spans, int(blockIdx.z));
    const int kv_head = int(blockIdx.y), warp = int(threadIdx.x) / 32;
    RowTile keys;
    if (!find_row_tile(keys, span, int(blockIdx.x), BLOCK_M)) return;
    const QueryBlocks queries(span, keys, kRows);
    const int steps = queries.blocks * problem.group();
    const int first_head = kv_head * problem.group();

    load_tile_async<BLOCK_M, E, kThreads>(Layout::stay(shared, 0), problem.qkv + problem.key_column(kv_head),
                                          problem.stride, keys.first, keys.last);
    load_tile_async<BLOCK_M, E, kThreads>(Layout::stay(shared, 1), problem.qkv + problem.value_column(kv_head),
                                          problem.stride, keys.first, keys.last);
    load_queries<E>(raw, shared, problem, first_head, queries, 0, 0);
    cp_async_commit();

    float dk[E / 8][4], dv[E / 8][4];
    clear(dk);
    clear(dv);
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<0>();
        __syncthreads();  // the stage has arrived, and all warps are done with the one that is filled next
        const int next = step + 1;
        if (next < steps) {
            load_queries<E>(raw, shared, problem, first_head + next / queries.blocks, queries, next % queries.blocks,
                            next);
        }
        cp_async_commit();

        const int first_key = keys.first + warp * 16;
        float scores[kRows / 8][4], dp[kRows / 8][4];
        clear(scores);
        clear(dp);
        multiply_transposed<E>(scores, Layout::stay(shared, 0), warp * 16, Layout::stream(shared, step, 0));
        multiply_transposed<E>(dp, Layout::stay(shared, 1), warp * 16, Layout::stream(shared, step, 1));
        const int first_query = queries.first + step % queries.blocks * kRows;
        if (queries.crosses_boundary(first_key, first_query, kRows)) mask_keys(scores, queries, first_key, first_query);
        probabilities_of_keys(scores, dp, problem, Layout::statistics(raw, step));
        multiply_from_accumulators<E>(dv, scores, Layout::stream(shared, step, 1));
        multiply_from_accumulators<E>(dk, dp, Layout::stream(shared, step, 0));
    }
    const int first_row = keys.first + warp * 16;
    store_rows<E>(problem.dqkv + problem.key_column(kv_head), problem.stride, first_row, keys.last, dk, problem.scale,
                  problem.scale);
    store_rows<E>(problem.dqkv + problem.value_column(kv_head), problem.stride, first_row, keys.last, dv, 1.0f, 1.0f);
}

// --------------------------------------------------------------------------------------------------------------- dQ

template <int E>
DEVICE void load_keys(uint32_t shared, const Problem& problem, int kv_head, const KeyBlocks<kStreamRows<E>>& blocks,
                      int block) {
    using Layout = SharedLayout<E>;
    const int first = blocks.first(block), limit = blocks.limit(block);
    load_tile_async<kStreamRows<E>, E, kThreads>(
        Layout::stream(shared, block, 0), problem.qkv + problem.key_column(kv_head), problem.stride, first, limit);
    load_tile_async<kStreamRows<E>, E, kThreads>(
        Layout::stream(shared, block, 1), problem.qkv + problem.value_column(kv_head), problem.stride, first, limit);
}

// A lane's two query rows (top: lane / 4, bottom: lane / 4 + 8): their lse in base 2, and delta.
struct RowStatistics {
    float lse_log2[2], delta[2];

    DEVICE RowStatistics(const Problem& problem, int head, int first_row, int last_row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = min(first_row + int(lane_id()) / 4 + 8 * half, last_row - 1);
            const int64_t at = int64_t(row) * problem.heads + head;
            lse_log2[half] = problem.lse[at] * kLog2E;
            delta[half] = problem.delta[at];
        }
    }
};

// Turns scores (rows are queries, columns keys) and dP into dS, left in `dp`.
template <int NT>
DEVICE void score_gradients(const float (&scores)[NT][4], float (&dp)[NT][4], const Problem& problem,
                            const RowStatistics& rows, int first_query, int first_key, int limit, bool causal) {
    const int lane = int(lane_id());
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2;
            const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
            const int query = first_query + lane / 4 + 8 * half;
            const bool seen = key < limit && (!causal || key <= query);
            const float p = seen ? exp2_approx(scores[n][i] * problem.scale_log2 - rows.lse_log2[half]) : 0.0f;
            dp[n][i] = p * (dp[n][i] - rows.delta[half]);
        }
    }
}

template <int E>
__global__ void __launch_bounds__(kThreads) attention_dq_kernel(Problem problem, const uint32_t* spans) {
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    using Layout = SharedLayout<E>;
    constexpr int kRows = kStreamRows<E>;
    const Span span = load_span(spans, int(blockIdx.z));
    const int head = int(blockIdx.y), kv_head = head / problem.group(), warp = int(threadIdx.x) / 32;
    RowTile queries;
    if (!find_row_tile(queries, span, int(blockIdx.x), BLOCK_M)) return;
    const KeyBlocks<kRows> blocks(span, queries);
    const int first_row = queries.first + warp * 16;

    load_tile_async<BLOCK_M, E, kThreads>(Layout::stay(shared, 0), problem.qkv + problem.query_column(head),
                                          problem.stride, queries.first, queries.last);
    load_tile_async<BLOCK_M, E, kThreads>(Layout::stay(shared, 1), problem.dout + problem.query_column(head),
                                          problem.out_stride(), queries.first, queries.last);
    load_keys<E>(shared, problem, kv_head, blocks, 0);
    cp_async_commit();
    const RowStatistics rows(problem, head, first_row, queries.last);

    float dq[E / 8][4];
    clear(dq);
    for (int block = 0; block < blocks.blocks; ++block) {
        cp_async_wait<0>();
        __syncthreads();  // the block has arrived, and all warps are done with the stage that is filled next
        if (block + 1 < blocks.blocks) load_keys<E>(shared, problem, kv_head, blocks, block + 1);
        cp_async_commit();

        float scores[kRows / 8][4], dp[kRows / 8][4];
        clear(scores);
        clear(dp);
        multiply_transposed<E>(scores, Layout::stay(shared, 0), warp * 16, Layout::stream(shared, block, 0));
        multiply_transposed<E>(dp, Layout::stay(shared, 1), warp * 16, Layout::stream(shared, block, 1));
        score_gradients(scores, dp, problem, rows, first_row, blocks.first(block), blocks.limit(block),
                        block >= blocks.shared_blocks);
        multiply_from_accumulators<E>(dq, dp, Layout::stream(shared, block, 0));
    }
    store_rows<E>(problem.dqkv + problem.query_column(head), problem.stride, first_row, queries.last, dq, problem.scale,
                  problem.scale);
}

// --------------------------------------------------------------------------------------------------------- launchers

template <int E>
int launch(const Problem& problem, float* delta, const bf16* out, const uint32_t* spans, int tiles, int pairs,
           int64_t row_heads, cudaStream_t stream) {
    const int delta_blocks = int((row_heads + kWarps - 1) / kWarps);
    int status = LAUNCH(attention_delta_kernel<E>, dim3(delta_blocks), dim3(kThreads), 0, stream, delta, problem.dout,
                        out, row_heads);
    if (status != 0) return status;
    status = LAUNCH(attention_dkdv_kernel<E>, dim3(tiles, problem.kv_heads, pairs), dim3(kThreads),
                    SharedLayout<E>::kBytes, stream, problem, spans);
    if (status != 0) return status;
    return LAUNCH(attention_dq_kernel<E>, dim3(tiles, problem.heads, pairs), dim3(kThreads), SharedLayout<E>::kBytes,
                  stream, problem, spans);
}

}  // namespace

extern "C" int64_t MMPO_EXPORT(attention_backward_workspace)(int32_t rows, int32_t heads, int32_t, int32_t) {
    return int64_t(rows) * heads * int64_t(sizeof(float));
}

extern "C" mmpo_status MMPO_EXPORT(attention_backward)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                       const mmpo_bf16* out, const float* lse, const mmpo_bf16* qkv,
                                                       const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                       int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                       float scale, mmpo_stream stream) {
    const int tiles = most_row_tiles(host_spans, pairs, BLOCK_M);
    if (rows == 0 || tiles == 0) return 0;
    const int64_t stride = int64_t(heads + 2 * kv_heads) * head_size, row_heads = int64_t(rows) * heads;
    float* delta = static_cast<float*>(workspace);
    const Problem problem{qkv, dout, lse, delta, dqkv, stride, heads, kv_heads, head_size, scale, scale * kLog2E};
    switch (head_size) {
        case 64:
            return launch<64>(problem, delta, out, spans, tiles, pairs, row_heads, stream);
        case 128:
            return launch<128>(problem, delta, out, spans, tiles, pairs, row_heads, stream);
        default:
            return 1;
    }
}
