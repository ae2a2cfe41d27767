// Flash attention backward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask), for any
// GPU from sm_80 on. common/attention_backward.cuh has what it shares with Hopper's kernel, and explains the order of
// dQ.
//
//   dqkv[T, (H + 2K) * E]   bf16, assigned
//
// A warp owns 16 keys. Scores are formed transposed (their rows are keys), which puts P^T and dS^T into the registers
// that the gemms dV += P^T dO and dK += dS^T Q need them in. Only dS goes through shared memory, for dQ = dS K, whose
// 16 x 32 parts are shared out among the warps.
#include "common/attention_backward.cuh"

namespace {

struct BackwardTiles {
    int block_m;      // rows of queries of a step
    int block_n;      // keys of a block
    int dout_stages;  // of shared memory for dO; Q has two

    constexpr int warps() const { return block_n / kMmaRows; }
};

// The tiles fit kSharedLimit, so that every GPU from sm_80 on runs the same ones. A thread has 255 registers: dK and dV
// take E of them, S and dP take BLOCK_M, dQ and operands some 60.
//
//   E = 64   registers       64 + 64 + 60
//            shared memory   K and V 32, Q 2 x 8, dO 2 x 8, dS 16: 80 KiB
//   E = 128  registers       128 + 32 + 60
//            shared memory   K and V 64, Q 2 x 8, dO 8, dS 8: 96 KiB. dO has one stage, which is filled again while dK
//                            and dQ are formed, as they do not need it. With 64 keys K and V would take half as much,
//                            but twice as much would be added to dQ.
constexpr BackwardTiles backward_tiles(int head_size) {
    return head_size == 64 ? BackwardTiles{64, 128, 2} : BackwardTiles{32, 128, 1};
}

// The constants of one head size.
template <int E>
struct Config {
    static constexpr BackwardTiles kTiles = backward_tiles(E);
    static constexpr int BLOCK_M = kTiles.block_m, BLOCK_N = kTiles.block_n;
    static constexpr int kThreads = kTiles.warps() * 32;
    static constexpr int kQueryStages = 2, kDoutStages = kTiles.dout_stages;

    // dQ is cut into 16 x 32 parts, one for each warp.
    static constexpr int kPartColumns = 32, kPartsAcross = E / kPartColumns;
    static_assert(BLOCK_M / kMmaRows * kPartsAcross == kTiles.warps(), "a part of dQ for each warp");

    using Keys = SharedTile<BLOCK_N, E>;     // or values
    using Queries = SharedTile<BLOCK_M, E>;  // or dO
    using Walk = QueryWalk<BLOCK_N>;
    using Scores = float[BLOCK_M / 8][4];  // a warp's part of S, dP or dS, transposed
    using KeySums = float[E / 8][4];       // a warp's part of dK or dV
};

// dS^T in shared memory: [BLOCK_N keys, BLOCK_M queries] of bf16. Its 16-byte chunks are exchanged such that eight rows
// of one chunk column fall into eight groups of banks.
template <int BLOCK_M>
struct ScoreTile {
    static constexpr int kChunks = BLOCK_M / kChunkValues;
    static constexpr int kRowsAcross = 8 / kChunks;  // rows in 128 bytes

    uint32_t base;  // shared address

    DEVICE uint32_t address(int key, int chunk) const {
        return base + uint32_t(key * BLOCK_M * 2 + (chunk ^ (key / kRowsAcross & (kChunks - 1))) * kChunkBytes);
    }
};

// Where things lie in shared memory. Stages are filled in rotation, one a step.
template <int E>
struct Shared {
    using C = Config<E>;
    static constexpr int kKeys = 0;
    static constexpr int kValues = kKeys + C::Keys::kBytes;
    static constexpr int kQueries = kValues + C::Keys::kBytes;
    static constexpr int kDout = kQueries + C::kQueryStages * C::Queries::kBytes;
    static constexpr int kDs = kDout + C::kDoutStages * C::Queries::kBytes;
    static constexpr int kStatistics = kDs + C::BLOCK_N * C::BLOCK_M * 2;
    static constexpr int kStatisticsBytes = 2 * C::BLOCK_M * int(sizeof(float));
    static constexpr int kTicket = kStatistics + C::kQueryStages * kStatisticsBytes;
    static constexpr int kBytes = kTicket + int(sizeof(uint32_t));
    static_assert(kBytes <= kSharedLimit, "a block fits into every GPU");

    uint32_t base;

    DEVICE typename C::Keys keys() const { return {base + kKeys}; }
    DEVICE typename C::Keys values() const { return {base + kValues}; }
    DEVICE typename C::Queries queries(int step) const {
        return {base + kQueries + step % C::kQueryStages * C::Queries::kBytes};
    }
    DEVICE typename C::Queries dout(int step) const {
        return {base + kDout + step % C::kDoutStages * C::Queries::kBytes};
    }
    DEVICE ScoreTile<C::BLOCK_M> ds() const { return {base + kDs}; }
    // lse of the tile's rows, then delta.
    DEVICE uint32_t statistics(int step) const {
        return base + kStatistics + step % C::kQueryStages * kStatisticsBytes;
    }
};

// ---- loads

// Starts copying a tile of queries from a matrix with `stride` values per token: tokens from `first` on, and of each
// token the packed heads that start at `source`. Rows without a query become zeros.
template <int E>
DEVICE void load_packed_async(typename Config<E>::Queries tile, const bf16* source, int64_t stride,
                              const BackwardProblem& problem, int first) {
    using C = Config<E>;
    constexpr int kChunks = E / kChunkValues;
    static_assert(C::BLOCK_M * kChunks % C::kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < C::BLOCK_M * kChunks / C::kThreads; ++i) {
        const int index = int(threadIdx.x) + i * C::kThreads;
        const int row = index / kChunks, chunk = index % kChunks;
        const int offset = problem.packing.token(row);
        const bool valid = offset < problem.tile_tokens && first + offset < problem.rows;
        const int64_t from = valid ? (first + offset) * stride + (row - offset * problem.packing.heads) * E : 0;
        cp_async_16(tile.address(row, chunk), source + from + chunk * kChunkValues, valid);
    }
}

template <int E>
DEVICE void load_queries(const Shared<E>& shared, const BackwardProblem& problem, const BackwardWorkspace& workspace,
                         const QueryTile& tile, int pack, int step) {
    using C = Config<E>;
    load_packed_async<E>(shared.queries(step), problem.qkv + problem.query_column(pack * problem.packing.heads),
                         problem.stride(), problem, tile.first);
    if (int(threadIdx.x) < Shared<E>::kStatisticsBytes / kChunkBytes) {
        const int64_t entry = int64_t(tile.number) * problem.packing.groups + pack;
        cp_async_16(shared.statistics(step) + threadIdx.x * kChunkBytes,
                    workspace.statistics + entry * (2 * C::BLOCK_M) + threadIdx.x * 4, true);
    }
}

template <int E>
DEVICE void load_dout(const Shared<E>& shared, const BackwardProblem& problem, const QueryTile& tile, int pack,
                      int step) {
    load_packed_async<E>(shared.dout(step), problem.dout + problem.query_column(pack * problem.packing.heads),
                         problem.out_stride(), problem, tile.first);
}

// Starts copying the block's keys and values, and Q and dO of its first step.
template <int E>
DEVICE void load_first(const Shared<E>& shared, const BackwardProblem& problem, const BackwardWorkspace& workspace,
                       const OwnedKeys& owned, const QueryTile& tile, int pack) {
    using C = Config<E>;
    load_tile_async<C::kThreads>(shared.keys(), problem.qkv + problem.key_column(owned.kv_head), problem.stride(),
                                 owned.keys.first, owned.keys.last);
    load_tile_async<C::kThreads>(shared.values(), problem.qkv + problem.value_column(owned.kv_head), problem.stride(),
                                 owned.keys.first, owned.keys.last);
    load_queries<E>(shared, problem, workspace, tile, pack, 0);
    load_dout<E>(shared, problem, tile, pack, 0);
    cp_async_commit();
}

// ---- scores, P, dS

// Sets scores that the mask hides to -inf. Rows are keys, from key number `first_key` of the block on; columns are
// queries.
template <int NT, class Walk>
DEVICE void mask_scores(float (&scores)[NT][4], const Walk& walk, const QueryTile& tile, int first_key) {
    const int key = first_key + int(lane_id()) / 4, query = int(lane_id()) % 4 * 2;
    const int top = walk.first_seeing(tile, key) - query, bottom = walk.first_seeing(tile, key + 8) - query;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (n * 8 + i % 2 < (i < 2 ? top : bottom)) scores[n][i] = -INFINITY;
}

// Turns scores into P, and dP into dS. `statistics`: see Shared.
template <int NT>
DEVICE void form_p_and_ds(float (&scores)[NT][4], float (&dp)[NT][4], float scale_log2, uint32_t statistics) {
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

// Writes the warp's 16 rows of dS^T, from key number `first_key` of the block on.
template <int BLOCK_M>
DEVICE void store_ds(ScoreTile<BLOCK_M> tile, const float (&ds)[BLOCK_M / 8][4], int first_key) {
    const int key = first_key + int(lane_id()) / 4;
    const uint32_t within = lane_id() % 4 * 4;
#pragma unroll
    for (int n = 0; n < BLOCK_M / 8; ++n) {
        store_shared_32(tile.address(key, n) + within, pack_bf16x2(ds[n][0], ds[n][1]));
        store_shared_32(tile.address(key + 8, n) + within, pack_bf16x2(ds[n][2], ds[n][3]));
    }
}

// The first half of a step, for a warp some of whose keys are seen: forms P and dS, stores dS for dQ, and adds P^T dO
// to dV. `dp` must be zero, and receives dS.
template <int E>
DEVICE void form_scores(typename Config<E>::KeySums& dv, typename Config<E>::Scores& dp, const Shared<E>& shared,
                        const typename Config<E>::Walk& walk, const QueryTile& tile, int step, int first_key,
                        float scale_log2) {
    typename Config<E>::Scores scores;
    clear(scores);
    multiply_transposed(scores, shared.keys(), first_key, shared.queries(step));
    multiply_transposed(dp, shared.values(), first_key, shared.dout(step));
    if (tile.crosses) mask_scores(scores, walk, tile, first_key);
    form_p_and_ds(scores, dp, scale_log2, shared.statistics(step));
    store_ds(shared.ds(), dp, first_key);
    multiply_from_accumulators(dv, scores, shared.dout(step));
}

// ---- dQ

// Forms the warp's part of dS K over the first `keys` keys of the block: dq[4][4] of 16 queries and 32 columns.
template <int E>
DEVICE void multiply_keys(float (&dq)[4][4], const Shared<E>& shared, int keys, int row_group, int column_part) {
    const int lane = int(lane_id());
#pragma unroll 4
    for (int k = 0; k < keys; k += 16) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, shared.ds().address(k + lane % 8 + lane / 16 * 8, 2 * row_group + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t b[2][2];
            load_b(b, shared.keys(), k, 2 * column_part + half);
            mma_m16n8k16(dq[2 * half], a, b[0]);
            mma_m16n8k16(dq[2 * half + 1], a, b[1]);
        }
    }
}

// Waits for the block's turn, then assigns the first term of dQ, or adds to what the blocks before have left.
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

// Adds value by value, because sm_80 has no atomic addition of several f32 at once.
template <int E>
DEVICE void add_in_any_order(float* dq_tile, const float (&dq)[4][4], int row_group, int column_part) {
    // Without this the compiler forms addresses while the gemm runs, and there are not enough registers for both.
    __syncwarp();
    float* to = dq_tile + dq_fragment<E>(row_group, column_part * 4);
    constexpr int kNext = 32 * 4;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) atomicAdd(to + n * kNext + i, dq[n][i]);
}

// Forms the warp's part of the block's term of one tile of dQ, and adds it to the workspace. Returns the entry's
// number.
template <int E, class Order>
DEVICE int add_to_dq(const Shared<E>& shared, const BackwardProblem& problem, const BackwardWorkspace& workspace,
                     const QueryTile& tile, int pack, int row_group, int column_part) {
    using C = Config<E>;
    float dq[4][4];
    clear(dq);
    multiply_keys<E>(dq, shared, tile.keys, row_group, column_part);
    const int entry = tile.number * problem.packing.groups + pack;
    float* dq_tile = workspace.dq + int64_t(entry) * (C::BLOCK_M * E);
    if constexpr (Order::kTurns)
        add_in_turn<E>(dq_tile, workspace.turns + entry, tile.turn, dq, row_group, column_part);
    else
        add_in_any_order<E>(dq_tile, dq, row_group, column_part);
    return entry;
}

// ---- dK, dV

template <int E>
DEVICE void store_key_gradients(const BackwardProblem& problem, const OwnedKeys& owned, int warp_key,
                                const typename Config<E>::KeySums& dk, const typename Config<E>::KeySums& dv) {
    const int first_key = owned.keys.first + warp_key;
    store_rows<E>(problem.dqkv + problem.key_column(owned.kv_head), problem.stride(), first_key, owned.keys.last, dk,
                  problem.scale);
    store_rows<E>(problem.dqkv + problem.value_column(owned.kv_head), problem.stride(), first_key, owned.keys.last, dv,
                  1.0f);
}

// ---- the kernel

// A step of the block's walk: one tile of queries (number `index` of the walk) of one pack of heads.
struct Step {
    int number, index, pack;

    // The step after this one: the next tile of queries, or the first one of the next pack.
    DEVICE Step next(int tiles) const {
        const int next_index = index + 1 == tiles ? 0 : index + 1;
        return {number + 1, next_index, pack + int(next_index == 0)};
    }
};

template <int E, class Order>
__global__ void __launch_bounds__(Config<E>::kThreads)
    attention_backward_kernel(BackwardProblem problem, BackwardWorkspace workspace) {
    using C = Config<E>;
    DYNAMIC_SHARED(raw);
    const Shared<E> shared{shared_address(raw)};
    const OwnedKeys owned =
        take_keys<C::BLOCK_N>(problem, workspace, reinterpret_cast<uint32_t*>(raw + Shared<E>::kTicket));
    const typename C::Walk walk(owned.span, owned.pair, owned.keys, problem.tile_tokens, problem.packing.heads);
    const int warp = int(threadIdx.x) / 32;
    const int row_group = warp / C::kPartsAcross, column_part = warp % C::kPartsAcross;
    const float scale_log2 = problem.scale * kLog2E;

    Step step{0, 0, owned.kv_head * problem.packs()};
    load_first<E>(shared, problem, workspace, owned, walk.tile(0), step.pack);
    typename C::KeySums dk, dv;
    clear(dk);
    clear(dv);
    // The workspace entry that the step before added to, and this block's turn there.
    int entry = 0;
    uint32_t turn = 0;
    const int steps = walk.steps * problem.packs();
    while (step.number < steps) {
        const QueryTile tile = walk.tile(step.index);
        const Step next = step.next(walk.steps);
        const bool more = next.number < steps;
        cp_async_wait<0>();
        // After this, the stage has arrived, and all warps are done with the stage that is filled next, with dS, and
        // with their sums of dQ.
        __syncthreads();
        if (Order::kTurns && threadIdx.x == 0 && step.number != 0) pass_turn(workspace.turns + entry, turn);
        if (more) {
            load_queries<E>(shared, problem, workspace, walk.tile(next.index), next.pack, next.number);
            if (C::kDoutStages > 1) load_dout<E>(shared, problem, walk.tile(next.index), next.pack, next.number);
        }
        cp_async_commit();

        typename C::Scores dp;
        clear(dp);
        // Whether a query of the step sees any of this warp's 16 keys. (The number of the first one is computed anew at
        // each use, because E = 128 spills if it is kept in a register.)
        const bool seen = warp * kMmaRows < tile.keys;
        if (seen) form_scores<E>(dv, dp, shared, walk, tile, step.number, warp * kMmaRows, scale_log2);
        __syncthreads();  // After this, all of dS is there, and all warps are done with dO.
        if (C::kDoutStages == 1 && more) {
            load_dout<E>(shared, problem, walk.tile(next.index), next.pack, next.number);
        }
        cp_async_commit();
        if (seen) multiply_from_accumulators(dk, dp, shared.queries(step.number));

        entry = add_to_dq<E, Order>(shared, problem, workspace, tile, step.pack, row_group, column_part);
        turn = tile.turn;
        step = next;
    }
    if constexpr (Order::kTurns) {
        __syncthreads();
        if (threadIdx.x == 0) pass_turn(workspace.turns + entry, turn);
    }
    store_key_gradients<E>(problem, owned, warp * kMmaRows, dk, dv);
}

// ---- launchers

template <int E, class Order>
mmpo_status launch(const BackwardProblem& problem, void* memory, const uint32_t* host_spans, cudaStream_t stream) {
    using C = Config<E>;
    const unsigned key_tiles = unsigned(all_row_tiles(host_spans, problem.pairs, C::BLOCK_N) * problem.kv_heads);
    if (key_tiles == 0) return kSuccess;
    const BackwardWorkspace workspace(memory, problem, C::BLOCK_M);
    if (const mmpo_status error =
            launch_prepare<E, C::BLOCK_M, C::BLOCK_N, Order>(problem, workspace, host_spans, stream)) {
        return error;
    }
    if (const mmpo_status error = LAUNCH((attention_backward_kernel<E, Order>), dim3(key_tiles), dim3(C::kThreads),
                                         Shared<E>::kBytes, stream, problem, workspace)) {
        return error;
    }
    return launch_finish<E, C::BLOCK_M>(problem, workspace, host_spans, stream);
}

template <int E>
mmpo_status launch_ordered(bool any_order, const BackwardProblem& problem, void* memory, const uint32_t* host_spans,
                           cudaStream_t stream) {
    return any_order ? launch<E, AnyOrder>(problem, memory, host_spans, stream)
                     : launch<E, FixedOrder>(problem, memory, host_spans, stream);
}

}  // namespace

extern "C" int64_t MMPO_EXPORT(attention_backward_workspace)(int32_t rows, int32_t pairs, int32_t heads,
                                                             int32_t kv_heads, int32_t head_size) {
    const BackwardTiles tiles = backward_tiles(head_size);
    return BackwardWorkspace::bytes(rows, pairs, heads, kv_heads, head_size, tiles.block_m, tiles.block_n);
}

extern "C" mmpo_status MMPO_EXPORT(attention_backward)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                       const mmpo_bf16* out, const float* lse, const mmpo_bf16* qkv,
                                                       const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                       int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                       float scale, int32_t any_order, mmpo_stream stream) {
    const BackwardProblem problem = backward_problem(dqkv, dout, out, lse, qkv, spans, pairs, rows, heads, kv_heads,
                                                     head_size, scale, backward_tiles(head_size).block_m);
    switch (head_size) {
        case 64:
            return launch_ordered<64>(any_order != 0, problem, workspace, host_spans, cuda_stream(stream));
        case 128:
            return launch_ordered<128>(any_order != 0, problem, workspace, host_spans, cuda_stream(stream));
        default:
            return kInvalidValue;
    }
}
