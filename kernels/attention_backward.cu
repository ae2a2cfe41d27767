// Flash attention backward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask), for any
// GPU from sm_80 on. What it shares with Hopper's kernel, and the order of dQ, is told in
// common/attention_backward.cuh.
//
//   dqkv[T, (H + 2K) * E]   bf16, assigned
//
// A warp owns 16 keys. Scores are formed transposed (rows are keys), so that P^T and dS^T are in the registers that the
// products dV += P^T dO and dK += dS^T Q want; only dS goes through shared memory, for dQ = dS K, whose 16 x 32 parts
// are shared out among the warps.
#include "common/attention_backward.cuh"

namespace {

struct BackwardTiles {
    int block_m;      // rows of queries of a step
    int block_n;      // keys of a block
    int dout_stages;  // of shared memory for dO; Q has two

    constexpr int warps() const { return block_n / 16; }
};

// Shared memory is what an sm_86 block may have, 99 KiB: every GPU from sm_80 on runs the same tiles.
constexpr BackwardTiles backward_tiles(int head_size) {
    // Registers of a thread, of 255: dK and dV take E, S and dP take BLOCK_M, dQ and operands some 60.
    if (head_size == 64) {
        // 64 + 64 + 60. 80 KiB: K and V 32, Q 2 x 8, dO 2 x 8, dS 16.
        return {64, 128, 2};
    }
    // 128 + 32 + 60. 96 KiB: K and V 64, Q 2 x 8, dO 8, dS 8. dO's only stage is filled again while dK and dQ are
    // formed, which do not need it. 64 keys would halve K and V, and double what is added to dQ.
    return {32, 128, 1};
}

// The kernel's constants of one head size, and where its tiles lie in shared memory.
template <int E>
struct Plan {
    static constexpr BackwardTiles kTiles = backward_tiles(E);
    static constexpr int BLOCK_M = kTiles.block_m, BLOCK_N = kTiles.block_n;
    static constexpr int kThreads = kTiles.warps() * 32;
    static constexpr int kQueryStages = 2, kDoutStages = kTiles.dout_stages;

    // dQ is cut into 16 x 32 parts, one a warp.
    static constexpr int kPartColumns = 32, kPartsAcross = E / kPartColumns;
    static_assert(BLOCK_M / 16 * kPartsAcross == kTiles.warps(), "a part of dQ for each warp");

    static constexpr int kKeys = 0;
    static constexpr int kValues = kKeys + kTileBytes<BLOCK_N, E>;
    static constexpr int kQueries = kValues + kTileBytes<BLOCK_N, E>;
    static constexpr int kDout = kQueries + kQueryStages * kTileBytes<BLOCK_M, E>;
    static constexpr int kScoreGradients = kDout + kDoutStages * kTileBytes<BLOCK_M, E>;
    static constexpr int kStatistics = kScoreGradients + BLOCK_N * BLOCK_M * 2;
    static constexpr int kStatisticsBytes = 2 * BLOCK_M * int(sizeof(float));
    static constexpr int kTicket = kStatistics + kQueryStages * kStatisticsBytes;
    static constexpr int kBytes = kTicket + int(sizeof(uint32_t));
    static_assert(kBytes <= 99 * 1024, "what an sm_86 block may have");

    static DEVICE int queries(int step) { return kQueries + step % kQueryStages * kTileBytes<BLOCK_M, E>; }
    static DEVICE int dout(int step) { return kDout + step % kDoutStages * kTileBytes<BLOCK_M, E>; }
    static DEVICE int statistics(int step) { return kStatistics + step % kQueryStages * kStatisticsBytes; }
};

// ---- loads

// Starts copying a tile of queries' rows: tokens first.. of a matrix with `stride` values a token, packed heads from
// `source` on. Rows without a query become zeros.
template <int E>
DEVICE void load_packed_async(uint32_t tile, const bf16* source, int64_t stride, const AttentionGradient& problem,
                              int first) {
    using P = Plan<E>;
    constexpr int kChunks = E / kChunkValues;
    static_assert(P::BLOCK_M * kChunks % P::kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < P::BLOCK_M * kChunks / P::kThreads; ++i) {
        const int index = int(threadIdx.x) + i * P::kThreads;
        const int row = index / kChunks, chunk = index % kChunks;
        const int offset = problem.packing.token(row);
        const bool valid = offset < problem.tile_tokens && first + offset < problem.rows;
        const int64_t from = valid ? (first + offset) * stride + (row - offset * problem.packing.heads) * E : 0;
        cp_async_16(tile_address<E>(tile, row, chunk), source + from + chunk * kChunkValues, valid);
    }
}

template <int E>
DEVICE void load_queries(uint32_t shared, const AttentionGradient& problem, const GradientWorkspace& workspace,
                         const QueryTile& tile, int pack, int step) {
    using P = Plan<E>;
    load_packed_async<E>(shared + P::queries(step), problem.qkv + problem.query_column(pack * problem.packing.heads),
                         problem.stride(), problem, tile.first);
    if (int(threadIdx.x) < P::kStatisticsBytes / kChunkBytes) {
        const int64_t slot = int64_t(tile.number) * problem.packing.groups + pack;
        cp_async_16(shared + P::statistics(step) + threadIdx.x * kChunkBytes,
                    workspace.statistics + slot * (2 * P::BLOCK_M) + threadIdx.x * 4, true);
    }
}

template <int E>
DEVICE void load_dout(uint32_t shared, const AttentionGradient& problem, const QueryTile& tile, int pack, int step) {
    using P = Plan<E>;
    load_packed_async<E>(shared + P::dout(step), problem.dout + problem.query_column(pack * problem.packing.heads),
                         problem.out_stride(), problem, tile.first);
}

// ---- scores, dS

// Scores that the mask hides become -inf. Rows are keys, from the `first_key`-th of the block on, columns queries.
template <int NT, class Walk>
DEVICE void hide_scores(float (&scores)[NT][4], const Walk& walk, const QueryTile& tile, int first_key) {
    const int key = first_key + int(lane_id()) / 4, query = int(lane_id()) % 4 * 2;
    const int top = walk.first_seeing(tile, key) - query, bottom = walk.first_seeing(tile, key + 8) - query;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (n * 8 + i % 2 < (i < 2 ? top : bottom)) scores[n][i] = -INFINITY;
}

// Turns scores into P and dP into dS. `statistics` holds lse of the columns, then delta.
template <int NT>
DEVICE void score_gradients(float (&scores)[NT][4], float (&dp)[NT][4], float scale_log2, uint32_t statistics) {
    const uint32_t own = statistics + lane_id() % 4 * uint32_t(sizeof(float2));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        const float2 lse = load_shared_f32x2(own + uint32_t(n * 32));
        const float2 delta = load_shared_f32x2(own + uint32_t((NT + n) * 32));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[n][i] = exp2_approx(scores[n][i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
            dp[n][i] = scores[n][i] * (dp[n][i] - (i % 2 == 0 ? delta.x : delta.y));
        }
    }
}

// dS^T lies in shared memory as [BLOCK_N keys, BLOCK_M queries] of bf16, its 16-byte chunks exchanged so that eight
// rows of one chunk column fall into eight groups of banks.
template <int BLOCK_M>
DEVICE uint32_t gradient_address(uint32_t tile, int key, int chunk) {
    constexpr int kChunks = BLOCK_M / kChunkValues, kRowsAcross = 8 / kChunks;  // rows in 128 bytes
    return tile + uint32_t(key * BLOCK_M * 2 + (chunk ^ (key / kRowsAcross & (kChunks - 1))) * kChunkBytes);
}

template <int BLOCK_M>
DEVICE void store_gradients(uint32_t tile, const float (&ds)[BLOCK_M / 8][4], int first_key) {
    const int key = first_key + int(lane_id()) / 4;
    const uint32_t within = lane_id() % 4 * 4;
#pragma unroll
    for (int n = 0; n < BLOCK_M / 8; ++n) {
        store_shared_32(gradient_address<BLOCK_M>(tile, key, n) + within, pack_bf16x2(ds[n][0], ds[n][1]));
        store_shared_32(gradient_address<BLOCK_M>(tile, key + 8, n) + within, pack_bf16x2(ds[n][2], ds[n][3]));
    }
}

// ---- dQ

// The warp's part of dS K over the first `keys` of the block: dq[4][4] of 16 queries and 32 columns.
template <int E>
DEVICE void multiply_keys(float (&dq)[4][4], uint32_t shared, int keys, int row_group, int column_part) {
    using P = Plan<E>;
    const int lane = int(lane_id());
#pragma unroll 4
    for (int k = 0; k < keys; k += 16) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, gradient_address<P::BLOCK_M>(shared + P::kScoreGradients, k + lane % 8 + lane / 16 * 8,
                                                          2 * row_group + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t b[2][2];
            load_b<E>(b, shared + P::kKeys, k, 2 * column_part + half);
            mma_m16n8k16(dq[2 * half], a, b[0]);
            mma_m16n8k16(dq[2 * half + 1], a, b[1]);
        }
    }
}

// Assigns the first term of dQ, or adds to what the block before left.
template <int E>
DEVICE void add_in_turn(float* dq_tile, const uint32_t* counter, uint32_t turn, const float (&dq)[4][4], int row_group,
                        int column_part) {
    float* to = dq_tile + dq_fragment<E>(row_group, column_part * 4);
    constexpr int kNext = 32 * 4;
    if (lane_id() == 0) wait_for_turn(counter, turn);
    __syncwarp();
    uint4 sums[4] = {};
    if (turn != 0) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[n] = load_128(to + n * kNext);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        store_128(to + n * kNext, make_uint4(__float_as_uint(__uint_as_float(sums[n].x) + dq[n][0]),
                                             __float_as_uint(__uint_as_float(sums[n].y) + dq[n][1]),
                                             __float_as_uint(__uint_as_float(sums[n].z) + dq[n][2]),
                                             __float_as_uint(__uint_as_float(sums[n].w) + dq[n][3])));
    }
}

// Adds as many f32 at once as sm_80 has an instruction for: one.
template <int E>
DEVICE void add_in_any_order(float* dq_tile, const float (&dq)[4][4], int row_group, int column_part) {
    __syncwarp();  // else addresses are formed under the product, and registers do not suffice
    float* to = dq_tile + dq_fragment<E>(row_group, column_part * 4);
    constexpr int kNext = 32 * 4;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) atomicAdd(to + n * kNext + i, dq[n][i]);
}

// ---- the kernel

template <int E, class Order>
__global__ void __launch_bounds__(Plan<E>::kThreads)
    attention_backward_kernel(AttentionGradient problem, GradientWorkspace workspace) {
    using P = Plan<E>;
    constexpr int BLOCK_M = P::BLOCK_M, BLOCK_N = P::BLOCK_N;
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    const OwnedKeys owned = take_keys<BLOCK_N>(problem, workspace, reinterpret_cast<uint32_t*>(raw + P::kTicket));
    const RowTile& keys = owned.keys;
    const QueryWalk<BLOCK_N> walk(owned.span, owned.pair, keys, problem.tile_tokens, problem.packing.heads);
    const int warp = int(threadIdx.x) / 32;
    const int row_group = warp / P::kPartsAcross, column_part = warp % P::kPartsAcross;
    const int first_pack = owned.kv_head * problem.packs();
    const float scale_log2 = problem.scale * kLog2E;

    load_tile_async<BLOCK_N, E, P::kThreads>(shared + P::kKeys, problem.qkv + problem.key_column(owned.kv_head),
                                             problem.stride(), keys.first, keys.last);
    load_tile_async<BLOCK_N, E, P::kThreads>(shared + P::kValues, problem.qkv + problem.value_column(owned.kv_head),
                                             problem.stride(), keys.first, keys.last);
    load_queries<E>(shared, problem, workspace, walk.tile(0), first_pack, 0);
    load_dout<E>(shared, problem, walk.tile(0), first_pack, 0);
    cp_async_commit();

    float dk[E / 8][4], dv[E / 8][4];
    clear(dk);
    clear(dv);
    int slot = 0;  // (tile of queries, pack) that the step before added to, and its turn
    uint32_t turn = 0;
    int pack = first_pack, index = 0;  // of the step
    const int steps = walk.steps * problem.packs();
    for (int step = 0; step < steps; ++step) {
        const QueryTile tile = walk.tile(index);
        const int next_index = index + 1 == walk.steps ? 0 : index + 1;
        const int next_pack = pack + int(next_index == 0);
        const bool more = step + 1 < steps;
        cp_async_wait<0>();
        // The stage has arrived, and all warps are done with the stage filled next, with dS, and with their sums of dQ.
        __syncthreads();
        if (Order::kTurns && threadIdx.x == 0 && step != 0) pass_turn(workspace.turns + slot, turn);
        if (more) {
            load_queries<E>(shared, problem, workspace, walk.tile(next_index), next_pack, step + 1);
            if (P::kDoutStages > 1) load_dout<E>(shared, problem, walk.tile(next_index), next_pack, step + 1);
        }
        cp_async_commit();

        float scores[BLOCK_M / 8][4], dp[BLOCK_M / 8][4];
        clear(scores);
        clear(dp);
        const bool seen = warp * 16 < tile.keys;  // some of this warp's keys
        if (seen) {
            multiply_transposed<E>(scores, shared + P::kKeys, warp * 16, shared + P::queries(step));
            multiply_transposed<E>(dp, shared + P::kValues, warp * 16, shared + P::dout(step));
            if (tile.crosses) hide_scores(scores, walk, tile, warp * 16);
            score_gradients(scores, dp, scale_log2, shared + P::statistics(step));
            store_gradients<BLOCK_M>(shared + P::kScoreGradients, dp, warp * 16);
            multiply_from_accumulators<E>(dv, scores, shared + P::dout(step));
        }
        __syncthreads();  // all of dS is there, and all warps are done with dO
        if (P::kDoutStages == 1 && more) load_dout<E>(shared, problem, walk.tile(next_index), next_pack, step + 1);
        cp_async_commit();
        if (seen) multiply_from_accumulators<E>(dk, dp, shared + P::queries(step));

        float dq[4][4];
        clear(dq);
        multiply_keys<E>(dq, shared, tile.keys, row_group, column_part);
        slot = tile.number * problem.packing.groups + pack;
        turn = tile.turn;
        float* dq_tile = workspace.dq + int64_t(slot) * (BLOCK_M * E);
        if constexpr (Order::kTurns)
            add_in_turn<E>(dq_tile, workspace.turns + slot, turn, dq, row_group, column_part);
        else
            add_in_any_order<E>(dq_tile, dq, row_group, column_part);
        index = next_index;
        pack = next_pack;
    }
    if constexpr (Order::kTurns) {
        __syncthreads();
        if (threadIdx.x == 0) pass_turn(workspace.turns + slot, turn);
    }
    const int first_key = keys.first + warp * 16;
    store_rows<E>(problem.dqkv + problem.key_column(owned.kv_head), problem.stride(), first_key, keys.last, dk,
                  problem.scale, problem.scale);
    store_rows<E>(problem.dqkv + problem.value_column(owned.kv_head), problem.stride(), first_key, keys.last, dv, 1.0f,
                  1.0f);
}

// ---- launchers

template <int E, class Order>
int launch(const AttentionGradient& problem, void* memory, const uint32_t* host_spans, cudaStream_t stream) {
    using P = Plan<E>;
    const unsigned key_tiles = unsigned(all_row_tiles(host_spans, problem.pairs, P::BLOCK_N) * problem.kv_heads);
    if (key_tiles == 0) return kSuccess;
    const GradientWorkspace workspace(memory, problem, P::BLOCK_M);
    int status = launch_prepare<E, P::BLOCK_M, P::BLOCK_N, Order>(problem, workspace, host_spans, stream);
    if (status != kSuccess) return status;
    status = LAUNCH((attention_backward_kernel<E, Order>), dim3(key_tiles), dim3(P::kThreads), P::kBytes, stream,
                    problem, workspace);
    if (status != kSuccess) return status;
    return launch_finish<E, P::BLOCK_M>(problem, workspace, host_spans, stream);
}

template <int E>
int launch_ordered(bool any_order, const AttentionGradient& problem, void* memory, const uint32_t* host_spans,
                   cudaStream_t stream) {
    return any_order ? launch<E, AnyOrder>(problem, memory, host_spans, stream)
                     : launch<E, FixedOrder>(problem, memory, host_spans, stream);
}

}  // namespace

extern "C" int64_t MMPO_EXPORT(attention_backward_workspace)(int32_t rows, int32_t pairs, int32_t heads,
                                                             int32_t kv_heads, int32_t head_size) {
    const BackwardTiles tiles = backward_tiles(head_size);
    return GradientWorkspace::bytes(rows, pairs, heads, kv_heads, head_size, tiles.block_m, tiles.block_n);
}

extern "C" mmpo_status MMPO_EXPORT(attention_backward)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                       const mmpo_bf16* out, const float* lse, const mmpo_bf16* qkv,
                                                       const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                       int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                       float scale, int32_t any_order, mmpo_stream stream) {
    const int block_m = backward_tiles(head_size).block_m;
    const HeadPacking packing = gradient_packing(heads, kv_heads, block_m);
    const AttentionGradient problem{dqkv, dout,  out,      lse,       qkv,   spans,   pairs,
                                    rows, heads, kv_heads, head_size, scale, packing, block_m / packing.heads};
    switch (head_size) {
        case 64:
            return launch_ordered<64>(any_order != 0, problem, workspace, host_spans, cuda_stream(stream));
        case 128:
            return launch_ordered<128>(any_order != 0, problem, workspace, host_spans, cuda_stream(stream));
        default:
            return kInvalidValue;
    }
}
