// Flash attention backward for packed pairs on Hopper: TMA, wgmma, warpgroups with roles (after Shah et al. 2024). What
// it shares with the portable kernel, and the order of dQ, is told in common/attention_backward.cuh.
//
//   dqkv[T, (H + 2K) * E]   bf16, assigned
//
// A block owns 128 keys of one key/value head. Its first warpgroup moves data: one thread of warp 0 loads tiles of Q
// and dO ahead, one thread of warp 1 adds finished terms of dQ, in turn. The two others own 64 keys each:
//
//   S^T = K Q^T, dP^T = V dO^T       both operands in shared memory
//   dV += P^T dO, dK += dS^T Q       P^T and dS^T are in the registers that the product wants, dV and dK stay in others
//   dQ = dS K                        over all 128 keys, so dS goes through shared memory; each forms a 64 x 64 part
//
// dS has two buffers, so that one barrier a step is enough: a warpgroup refills a buffer only after a barrier that the
// other warpgroup reached after reading it.
#include "common/attention_backward.cuh"
#include "common/hopper.cuh"

namespace {

struct BackwardTiles {
    int block_m;  // rows of queries of a step
    int block_n;  // keys of a block
    int stages;   // of Q and dO in shared memory
    int producer_registers, consumer_registers;
};

// Two consumer warpgroups of 240 registers and a producer of 24 are just what a block of 384 threads is launched with,
// 168 each. 192 KiB of shared memory for tiles leave 35 of a block's 227: too few for another stage or dQ's second
// buffer.
constexpr BackwardTiles backward_tiles(int head_size) {
    // Registers of a consumer: dV and dK take E, S and dP take BLOCK_M, of which P^T and dS^T take half as operands
    // beside dQ's 32.
    if (head_size == 64) {
        // 64 + 128, then 64 + 64 + 32. KiB: K and V 32, Q and dO 2 x 32, dS 2 x 32, dQ 32.
        return {128, 128, 2, 24, 240};
    }
    // 128 + 64, then 128 + 32 + 32. KiB: K and V 64, Q and dO 2 x 32, dS 2 x 16, dQ 32. 128 queries would need 128 +
    // 128 registers for the scores alone.
    return {64, 128, 2, 24, 240};
}

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
constexpr int kGroupKeys = 64;  // rows of a wgmma
constexpr int kGradientBuffers = 2;
constexpr int kTilesOfStage = 2;  // Q and dO

enum class NamedBarrier : uint32_t { score_gradients = 1 };

template <int E>
struct Plan {
    static constexpr BackwardTiles kTiles = backward_tiles(E);
    static constexpr int BLOCK_M = kTiles.block_m, BLOCK_N = kTiles.block_n, kStages = kTiles.stages;
    static_assert(kTiles.producer_registers * kWarpgroupThreads + kTiles.consumer_registers * kConsumerThreads <=
                      65536 / kThreads / 8 * 8 * kThreads,
                  "setmaxnreg moves registers within what the block was launched with");
    static_assert(BLOCK_N == kConsumers * kGroupKeys, "a warpgroup owns the rows of one wgmma");
    static_assert(BLOCK_M * E == kConsumers * 64 * 64, "each warpgroup forms 64 x 64 values of dQ");

    using Keys = PanelTile<BLOCK_N, E>;
    using Queries = PanelTile<BLOCK_M, E>;
    using Gradients = PanelTile<BLOCK_N, BLOCK_M>;  // dS^T
    using Ring = StageRing<kStages>;

    static constexpr int kDqBytes = BLOCK_M * E * int(sizeof(float));
    static constexpr int kStatisticsBytes = 2 * BLOCK_M * int(sizeof(float));
    static constexpr int kStageBytes = kTilesOfStage * Queries::kBytes;  // that TMA brings, beside the statistics

    static constexpr int kKeys = 0;
    static constexpr int kValues = kKeys + Keys::kBytes;
    static constexpr int kStage = kValues + Keys::kBytes;
    static constexpr int kGradients = kStage + kStages * kStageBytes;
    static constexpr int kDq = kGradients + kGradientBuffers * Gradients::kBytes;
    static constexpr int kStatistics = kDq + kDqBytes;
    static constexpr int kRing = kStatistics + kStages * kStatisticsBytes;
    static constexpr int kKeysFull = kRing + Ring::kBytes;
    static constexpr int kDqFull = kKeysFull + 8, kDqEmpty = kDqFull + 8, kTicket = kDqEmpty + 8;
    static constexpr int kBytes = kTicket + 8;
    static_assert(kBytes <= 227 * 1024, "what a block may have");

    static DEVICE uint32_t queries(uint32_t shared, int stage) { return shared + kStage + stage * kStageBytes; }
    static DEVICE uint32_t dout(uint32_t shared, int stage) { return queries(shared, stage) + Queries::kBytes; }
    static DEVICE uint32_t statistics(uint32_t shared, int stage) {
        return shared + kStatistics + stage * kStatisticsBytes;
    }
    static DEVICE uint32_t gradients(uint32_t shared, int step) {
        return shared + kGradients + step % kGradientBuffers * Gradients::kBytes;
    }
};

template <int E>
using Walk = QueryWalk<Plan<E>::BLOCK_N>;

struct TensorMaps {
    CUtensorMap queries, dout;  // by [token, head, E], boxes of a tile of queries: its tokens x packed heads x 64
    CUtensorMap keys;           // by [token, column], boxes of BLOCK_N x 64
};

#if MMPO_SM90

// Rows of the stages that no load fills, because packed tokens leave them over: zeros, so that products do not meet
// NaN. The __syncthreads of take_keys follows.
template <int E>
DEVICE void clear_idle_rows(uint32_t shared, int used) {
    using P = Plan<E>;
    constexpr int kRowChunks = kPanelRowBytes / kChunkBytes, kPanels = P::kStages * kTilesOfStage * P::Queries::kPanels;
    const int chunks = (P::BLOCK_M - used) * kRowChunks;
    for (int i = int(threadIdx.x); i < kPanels * chunks; i += kThreads) {
        const int offset = i / chunks * P::Queries::kPanelBytes + used * kPanelRowBytes + i % chunks * kChunkBytes;
        store_shared_128(shared + uint32_t(P::kStage + offset), make_uint4(0, 0, 0, 0));
    }
    fence_proxy_async();
}

// ---- loads, one thread

template <int E>
DEVICE void produce(uint32_t shared, const TensorMaps& maps, const AttentionGradient& problem,
                    const GradientWorkspace& workspace, const OwnedKeys& owned, const Walk<E>& walk) {
    using P = Plan<E>;
    const typename P::Ring ring{shared + P::kRing};
    const uint32_t keys_full = shared + P::kKeysFull;
    mbarrier_arrive_expect_tx(keys_full, 2 * P::Keys::kBytes);
    P::Keys::load(shared + P::kKeys, &maps.keys, problem.key_column(owned.kv_head), owned.keys.first, keys_full);
    P::Keys::load(shared + P::kValues, &maps.keys, problem.value_column(owned.kv_head), owned.keys.first, keys_full);
    StageCursor<P::kStages> at;
    const uint32_t bytes =
        uint32_t(problem.tile_tokens * problem.packing.heads * 2 * E * int(sizeof(bf16)) + P::kStatisticsBytes);
    const int first_pack = owned.kv_head * problem.packs();
    for (int pack = first_pack; pack < first_pack + problem.packs(); ++pack) {
        for (int step = 0; step < walk.steps; ++step, at.advance()) {
            const QueryTile tile = walk.tile(step);
            const int64_t slot = int64_t(tile.number) * problem.packing.groups + pack;
            const uint32_t full = ring.full(at.stage);
            const auto load = [&](uint32_t to, const CUtensorMap* map) {
#pragma unroll
                for (int panel = 0; panel < P::Queries::kPanels; ++panel)
                    tma_load_3d(to + panel * P::Queries::kPanelBytes, map, panel * kPanelColumns,
                                pack * problem.packing.heads, tile.first, full);
            };
            mbarrier_wait(ring.empty(at.stage), at.parity ^ 1u);
            mbarrier_arrive_expect_tx(full, bytes);
            load(P::queries(shared, at.stage), &maps.queries);
            bulk_load(P::statistics(shared, at.stage), workspace.statistics + slot * (2 * P::BLOCK_M),
                      P::kStatisticsBytes, full);
            load(P::dout(shared, at.stage), &maps.dout);
        }
    }
}

// ---- dQ's sums, one thread

template <int E, class Order>
DEVICE void add_terms(uint32_t shared, const AttentionGradient& problem, const GradientWorkspace& workspace,
                      const OwnedKeys& owned, const Walk<E>& walk) {
    using P = Plan<E>;
    uint32_t parity = 0;
    const int first_pack = owned.kv_head * problem.packs();
    for (int pack = first_pack; pack < first_pack + problem.packs(); ++pack) {
        for (int step = 0; step < walk.steps; ++step, parity ^= 1u) {
            const QueryTile tile = walk.tile(step);
            const int64_t slot = int64_t(tile.number) * problem.packing.groups + pack;
            float* to = workspace.dq + slot * (P::BLOCK_M * E);
            // The turn first: it comes while this step's term is still formed.
            if constexpr (Order::kTurns) {
                wait_for_turn(workspace.turns + slot, tile.turn);
                fence_proxy_async_global();
            }
            mbarrier_wait(shared + P::kDqFull, parity);
            if (Order::kTurns && tile.turn == 0)
                bulk_store(to, shared + P::kDq, P::kDqBytes);
            else
                bulk_add_f32(to, shared + P::kDq, P::kDqBytes);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(shared + P::kDqEmpty);
            if constexpr (Order::kTurns) {
                bulk_wait<0>();
                pass_turn(workspace.turns + slot, tile.turn);
            }
        }
    }
}

// ---- a consumer

// Probabilities that the mask hides become 0. Rows are keys, from the `first_key`-th of the block on, columns queries.
template <int E, int kCount>
DEVICE void hide_probabilities(float (&p)[kCount], const Walk<E>& walk, const QueryTile& tile, int first_key) {
    const int key = first_key + int(lane_id()) / 4, query = int(lane_id()) % 4 * 2;
    const int top = walk.first_seeing(tile, key) - query, bottom = walk.first_seeing(tile, key + 8) - query;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (i / 4 * 8 + i % 2 < (i % 4 < 2 ? top : bottom)) p[i] = 0.0f;
}

// Turns scores into P. `lse` is in base 2, of the tile's queries, from this lane's first column on; `delta` below too.
template <int kCount>
DEVICE void probabilities(float (&scores)[kCount], float scale_log2, uint32_t lse) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 of = load_shared_f32x2(lse + uint32_t(j * 8) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            scores[4 * j + i] = exp2_approx(scores[4 * j + i] * scale_log2 - (i % 2 == 0 ? of.x : of.y));
    }
}

// Turns dP into dS.
template <int kCount>
DEVICE void score_gradients(float (&dp)[kCount], const float (&p)[kCount], uint32_t delta) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 of = load_shared_f32x2(delta + uint32_t(j * 8) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? of.x : of.y));
    }
}

// What a consumer warpgroup keeps from step to step.
template <int E>
struct Consumer {
    using P = Plan<E>;
    static constexpr int BLOCK_M = P::BLOCK_M, kDepthSteps = BLOCK_M / kWgmmaDepth;
    // Whether dS is formed under dV's product. At E = 64 registers do not suffice for P as that product's operand
    // beside P and dP in f32.
    static constexpr bool kFormsUnderDv = E == 128;

    uint32_t shared;
    int group;  // 0 or 1
    float scale_log2;
    float dk[E / 2], dv[E / 2];

    DEVICE int warp() const { return int(threadIdx.x) / 32 % 4; }
    // First of this warp's 16 keys in the block.
    DEVICE int key() const { return group * kGroupKeys + warp() * 16; }

    // S^T and dP^T of this warpgroup's keys and the stage's queries, committed one after the other.
    DEVICE void form_scores(float (&scores)[BLOCK_M / 2], float (&dp)[BLOCK_M / 2], int stage) {
        pin_registers(scores);
        pin_registers(dp);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step)
            wgmma_ss<BLOCK_M>(scores, P::Keys::depth_in_columns(shared + P::kKeys, group * kGroupKeys, step),
                              P::Queries::depth_in_columns(P::queries(shared, stage), 0, step), step != 0);
        wgmma_commit();
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step)
            wgmma_ss<BLOCK_M>(dp, P::Keys::depth_in_columns(shared + P::kValues, group * kGroupKeys, step),
                              P::Queries::depth_in_columns(P::dout(shared, stage), 0, step), step != 0);
        wgmma_commit();
    }

    // Writes this warp's 16 rows of dS^T.
    DEVICE void store_gradients(const uint32_t (&ds)[kDepthSteps][4], int step) const {
        const int row = key() + int(lane_id()) % 16;
        const uint32_t first = P::Gradients::address(P::gradients(shared, step), row, int(lane_id()) / 16);
        // Chunks 2k further on: the swizzle exchanges chunks by xor, which one register for all of them allows.
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k)
            stmatrix_x4((first + uint32_t(k / 4 * P::Gradients::kPanelBytes)) ^ uint32_t(k % 4 * 32), ds[k]);
    }

    // dQ's part, over the first `kKeys` of the block: for E = 128 half of the columns of 64 queries, for E = 64 half of
    // 128 queries.
    template <int kKeys>
    DEVICE void multiply_keys(float (&dq)[32], int step) const {
        constexpr bool kColumns = E == 128;
#pragma unroll
        for (int k = 0; k < kKeys / kWgmmaDepth; ++k)
            wgmma_ss<64, true, true>(
                dq, P::Gradients::depth_in_rows(P::gradients(shared, step), kColumns ? 0 : group * 64, k),
                P::Keys::depth_in_rows(shared + P::kKeys, kColumns ? group * 64 : 0, k), k != 0);
    }

    DEVICE void stage_dq(const float (&dq)[32]) const {
        const int row_group = warp() + (E == 128 ? 0 : group * 4), column_group = E == 128 ? group * 8 : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            store_shared_128(shared + P::kDq + uint32_t(dq_fragment<E>(row_group, column_group + j)) * 4,
                             make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                                        __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
        }
    }

    // dk or dv += weights^T * tile, where the tile's rows are the step's queries.
    DEVICE void accumulate(float (&sum)[E / 2], const uint32_t (&weights)[kDepthSteps][4], uint32_t tile) {
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k)
            wgmma_rs<E, true>(sum, weights[k], P::Queries::depth_in_rows(tile, 0, k), true);
        wgmma_commit();
    }

    DEVICE void add_to_dv(const uint32_t (&p)[kDepthSteps][4], int stage) {
        pin_registers(dv);
        wgmma_fence();
        accumulate(dv, p, P::dout(shared, stage));
    }

    // A step of a warpgroup some of whose keys are seen; `kKeys` of the block's are.
    template <int kKeys>
    DEVICE void step(const Walk<E>& walk, const QueryTile& tile, int number, const StageCursor<P::kStages>& at) {
        const typename P::Ring ring{shared + P::kRing};
        uint32_t p[kDepthSteps][4], ds[kDepthSteps][4];
        mbarrier_wait(ring.full(at.stage), at.parity);
        const uint32_t lse = P::statistics(shared, at.stage) + lane_id() % 4 * uint32_t(sizeof(float2));
        const uint32_t delta = lse + BLOCK_M * uint32_t(sizeof(float));
        {
            float scores[BLOCK_M / 2], dp[BLOCK_M / 2];
            form_scores(scores, dp, at.stage);
            wgmma_wait<1>();
            pin_registers(scores);
            // Apply the mask after the exponentials. The branch then separates them from the wait for dP, and ptxas
            // keeps them ahead of that wait, overlapped with dP's gemm (tests/compiled/sass.rs checks this). Exponentials that
            // the mask hides may overflow.
            probabilities(scores, scale_log2, lse);
            if (tile.crosses) hide_probabilities<E>(scores, walk, tile, key());
#pragma unroll
            for (int k = 0; k < kDepthSteps; ++k) accumulators_to_operand(p[k], scores, k);
            if constexpr (kFormsUnderDv) {
                add_to_dv(p, at.stage);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            pin_registers(dp);
            score_gradients(dp, scores, delta);
#pragma unroll
            for (int k = 0; k < kDepthSteps; ++k) accumulators_to_operand(ds[k], dp, k);
        }
        if constexpr (!kFormsUnderDv) add_to_dv(p, at.stage);
        store_gradients(ds, number);
        fence_proxy_async();
        bar_sync(uint32_t(NamedBarrier::score_gradients), kConsumerThreads);

        float dq[32];
        pin_registers(dq);
        pin_registers(dk);
        wgmma_fence();
        multiply_keys<kKeys>(dq, number);
        wgmma_commit();
        accumulate(dk, ds, P::queries(shared, at.stage));
        wgmma_wait<1>();
        pin_registers(dq);
        pin_registers(dv);
        hand_over(dq, number);
        wgmma_wait<0>();
        pin_registers(dk);
        mbarrier_arrive_if(ring.empty(at.stage), lane_id() == 0);
    }

    // A step of the second warpgroup when only the first one's keys are seen: it has its part of dQ to form.
    DEVICE void step_without_keys(int number, const StageCursor<P::kStages>& at) {
        const typename P::Ring ring{shared + P::kRing};
        mbarrier_wait(ring.full(at.stage), at.parity);
        bar_sync(uint32_t(NamedBarrier::score_gradients), kConsumerThreads);
        // Behind the barrier: a lane that had not waited yet could miss the phase.
        mbarrier_arrive_if(ring.empty(at.stage), lane_id() == 0);
        float dq[32];
        pin_registers(dq);
        wgmma_fence();
        multiply_keys<kGroupKeys>(dq, number);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(dq);
        hand_over(dq, number);
    }

    // Stages this warpgroup's part of dQ when the part before has left.
    DEVICE void hand_over(const float (&dq)[32], int number) const {
        mbarrier_wait(shared + P::kDqEmpty, uint32_t(number + 1) & 1u);
        stage_dq(dq);
        fence_proxy_async();
        __syncwarp();
        mbarrier_arrive_if(shared + P::kDqFull, lane_id() == 0);
    }

    // Stores this warp's 16 rows of dK or dV, times `factor`, to rows first_key.. of a matrix; rows from `limit` on are
    // dropped. Through this warp's rows of V, which no product needs any more, so that a store covers whole lines.
    DEVICE void store(bf16* out, int64_t stride, int first_key, int limit, float (&sum)[E / 2], float factor) const {
        const int lane = int(lane_id());
        constexpr int kRowChunks = E / kChunkValues;
#pragma unroll
        for (int i = 0; i < E / 2; ++i) sum[i] *= factor;
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            uint32_t values[4];
            accumulators_to_operand(values, sum, k);
            stmatrix_x4(P::Keys::address(shared + P::kValues, key() + lane % 16, 2 * k + lane / 16), values);
        }
        __syncwarp();
        constexpr int kRowsAtOnce = 32 / kRowChunks, kAccesses = 16 / kRowsAtOnce;
        const int row = key() + lane / kRowChunks, chunk = lane % kRowChunks;
        uint4 chunks[kAccesses];
#pragma unroll
        for (int i = 0; i < kAccesses; ++i)
            chunks[i] = load_shared_128(P::Keys::address(shared + P::kValues, row + i * kRowsAtOnce, chunk));
        bf16* to = out + (first_key + row) * stride + chunk * kChunkValues;
#pragma unroll
        for (int i = 0; i < kAccesses; ++i)
            if (first_key + row + i * kRowsAtOnce < limit) store_128(to + i * kRowsAtOnce * stride, chunks[i]);
        __syncwarp();
    }

    DEVICE void any_step(const Walk<E>& walk, const QueryTile& tile, int number, const StageCursor<P::kStages>& at) {
        if (tile.keys > kGroupKeys)
            step<P::BLOCK_N>(walk, tile, number, at);
        else if (group == 0)
            step<kGroupKeys>(walk, tile, number, at);
        else
            step_without_keys(number, at);
    }
};

template <int E>
DEVICE void consume(uint32_t shared, const AttentionGradient& problem, const OwnedKeys& owned, const Walk<E>& walk) {
    using P = Plan<E>;
    Consumer<E> consumer;
    consumer.shared = shared;
    // From one lane, so that the compiler knows it is uniform and keeps descriptors in uniform registers.
    consumer.group = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0) - 1;
    consumer.scale_log2 = problem.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < E / 2; ++i) consumer.dk[i] = consumer.dv[i] = 0.0f;
    mbarrier_wait(shared + P::kKeysFull, 0);
    StageCursor<P::kStages> at;
    int number = 0;
    for (int pack = 0; pack < problem.packs(); ++pack)
        for (int step = 0; step < walk.steps; ++step, ++number, at.advance())
            consumer.any_step(walk, walk.tile(step), number, at);
    consumer.store(problem.dqkv + problem.key_column(owned.kv_head), problem.stride(), owned.keys.first,
                   owned.keys.last, consumer.dk, problem.scale);
    consumer.store(problem.dqkv + problem.value_column(owned.kv_head), problem.stride(), owned.keys.first,
                   owned.keys.last, consumer.dv, 1.0f);
}

#endif  // MMPO_SM90

template <int E, class Order>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ TensorMaps maps, AttentionGradient problem,
                                   GradientWorkspace workspace) {
#if MMPO_SM90
    using P = Plan<E>;
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    if (threadIdx.x == 0) {
        typename P::Ring{shared + P::kRing}.init(kConsumerThreads / 32);
        mbarrier_init(shared + P::kKeysFull, 1);
        mbarrier_init(shared + P::kDqFull, kConsumerThreads / 32);
        mbarrier_init(shared + P::kDqEmpty, 1);
        fence_mbarrier_init();
    }
    // While the ticket travels.
    if (threadIdx.x == 32) {
        prefetch_tensor_map(&maps.keys);
        prefetch_tensor_map(&maps.queries);
        prefetch_tensor_map(&maps.dout);
    }
    clear_idle_rows<E>(shared, problem.tile_tokens * problem.packing.heads);
    const OwnedKeys owned = take_keys<P::BLOCK_N>(problem, workspace, reinterpret_cast<uint32_t*>(raw + P::kTicket));
    const Walk<E> walk(owned.span, owned.pair, owned.keys, problem.tile_tokens, problem.packing.heads);
    if (threadIdx.x < kWarpgroupThreads) {
        setmaxnreg_decrease<P::kTiles.producer_registers>();
        if (threadIdx.x == 0) produce<E>(shared, maps, problem, workspace, owned, walk);
        if (threadIdx.x == 32) add_terms<E, Order>(shared, problem, workspace, owned, walk);
    } else {
        setmaxnreg_increase<P::kTiles.consumer_registers>();
        consume<E>(shared, problem, owned, walk);
    }
#endif
}

// ---- launchers

template <int E>
int encode_maps(TensorMaps& maps, const AttentionGradient& problem) {
    using P = Plan<E>;
    const uint64_t rows = uint64_t(problem.rows), stride = uint64_t(problem.stride());
    const auto packed_map = [&](CUtensorMap& map, const bf16* base, uint64_t heads) {
        const TensorMapShape shape{3,
                                   {E, heads, rows},
                                   {E * sizeof(bf16), heads * E * sizeof(bf16)},
                                   {kPanelColumns, uint32_t(problem.packing.heads), uint32_t(problem.tile_tokens)},
                                   Swizzle::bytes_128};
        return encode_tensor_map(&map, base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, shape);
    };
    int status = packed_map(maps.queries, problem.qkv, stride / E);
    if (status != kSuccess) return status;
    status = packed_map(maps.dout, problem.dout, uint64_t(problem.heads));
    if (status != kSuccess) return status;
    return encode_tensor_map_2d(&maps.keys, problem.qkv, rows, stride, stride, P::BLOCK_N, kPanelColumns,
                                Swizzle::bytes_128);
}

template <int E, class Order>
int launch(const AttentionGradient& problem, void* memory, const uint32_t* host_spans, cudaStream_t stream) {
    using P = Plan<E>;
    const unsigned key_tiles = unsigned(all_row_tiles(host_spans, problem.pairs, P::BLOCK_N) * problem.kv_heads);
    if (key_tiles == 0) return kSuccess;
    TensorMaps maps;
    int status = encode_maps<E>(maps, problem);
    if (status != kSuccess) return status;
    const GradientWorkspace workspace(memory, problem, P::BLOCK_M);
    status = launch_prepare<E, P::BLOCK_M, P::BLOCK_N, Order>(problem, workspace, host_spans, stream);
    if (status != kSuccess) return status;
    status = LAUNCH((attention_backward_sm90_kernel<E, Order>), dim3(key_tiles), dim3(kThreads), P::kBytes, stream,
                    maps, problem, workspace);
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

extern "C" int64_t MMPO_EXPORT(attention_backward_sm90_workspace)(int32_t rows, int32_t pairs, int32_t heads,
                                                                  int32_t kv_heads, int32_t head_size) {
    const BackwardTiles tiles = backward_tiles(head_size);
    return GradientWorkspace::bytes(rows, pairs, heads, kv_heads, head_size, tiles.block_m, tiles.block_n);
}

extern "C" mmpo_status MMPO_EXPORT(attention_backward_sm90)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                            const mmpo_bf16* out, const float* lse,
                                                            const mmpo_bf16* qkv, const uint32_t* spans,
                                                            const uint32_t* host_spans, int32_t pairs, int32_t rows,
                                                            int32_t heads, int32_t kv_heads, int32_t head_size,
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
