// Flash attention backward for packed pairs on Hopper: TMA, wgmma, and warpgroups with roles (after Shah et al. 2024).
// common/attention_backward.cuh has what it shares with the portable kernel, and explains the order of dQ.
//
//   dqkv[T, (H + 2K) * E]   bf16, assigned
//
// A block owns 128 keys of one key/value head. Its first warpgroup moves data: one thread of warp 0 loads tiles of Q
// and dO ahead, one thread of warp 1 adds finished terms of dQ, in turn. The other two warpgroups are consumers and own
// 64 keys each:
//
//   S^T = K Q^T, dP^T = V dO^T       both operands come from shared memory
//   dV += P^T dO, dK += dS^T Q       P^T and dS^T are already in the registers that wgmma takes A from, and dV and dK
//                                    stay in registers as well
//   dQ = dS K                        over all 128 keys, so dS goes through shared memory; each consumer forms a part of
//                                    64 x 64 values
//
// dS has two buffers, so that one barrier per step is enough: a consumer refills a buffer only after a barrier that the
// other consumer reached after reading it.
#include "common/attention_backward.cuh"
#include "common/hopper.cuh"

namespace {

struct BackwardTiles {
    int block_m;  // rows of queries of a step
    int block_n;  // keys of a block
    int stages;   // of Q and dO in shared memory
    int producer_registers, consumer_registers;
};

// A block of 384 threads is launched with 168 registers each. That is exactly enough for two consumers with 240 per
// thread and a producer with 24. A consumer's dV and dK take E registers. S and dP take BLOCK_M; later P^T and dS^T
// take their place as operands, with half as many, and dQ takes 32.
//
//   E = 64   registers       64 + 128, then 64 + 64 + 32
//            shared memory   K and V 32, Q and dO 2 x 32, dS 2 x 32, dQ 32: 192 KiB
//   E = 128  registers       128 + 64, then 128 + 32 + 32. With 128 queries S and dP would need 128 beside the 128 of
//                            dV and dK.
//            shared memory   K and V 64, Q and dO 2 x 32, dS 2 x 16, dQ 32: 192 KiB
//
// That leaves 35 of a block's 227 KiB: too few for another stage, or for a second buffer of dQ.
constexpr BackwardTiles backward_tiles(int head_size) {
    return head_size == 64 ? BackwardTiles{128, 128, 2, 24, 240} : BackwardTiles{64, 128, 2, 24, 240};
}

constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
constexpr int kConsumerKeys = kWgmmaRows;
constexpr int kDsBuffers = 2;
constexpr int kTilesOfStage = 2;  // Q and dO

enum class NamedBarrier : uint32_t { ds = 1 };

// The constants of one head size.
template <int E>
struct Config {
    static constexpr BackwardTiles kTiles = backward_tiles(E);
    static constexpr int BLOCK_M = kTiles.block_m, BLOCK_N = kTiles.block_n, kStages = kTiles.stages;
    static constexpr int kProducerRegisters = kTiles.producer_registers;
    static constexpr int kConsumerRegisters = kTiles.consumer_registers;
    static_assert(kProducerRegisters * kWarpgroupThreads + kConsumerRegisters * kConsumerThreads <=
                      kMultiprocessorRegisters / kThreads / 8 * 8 * kThreads,
                  "setmaxnreg moves registers within what the block was launched with");
    static_assert(BLOCK_N == kConsumers * kConsumerKeys, "a consumer owns the rows of one wgmma");
    static_assert(BLOCK_M * E == kConsumers * 64 * 64, "each consumer forms 64 x 64 values of dQ");

    using Keys = PanelTile<BLOCK_N, E>;      // or values
    using Queries = PanelTile<BLOCK_M, E>;   // or dO
    using Ds = PanelTile<BLOCK_N, BLOCK_M>;  // dS^T
    using Ring = StageRing<kStages>;
    using Cursor = StageCursor<kStages>;
    using Walk = QueryWalk<BLOCK_N>;
};

// Where things lie in shared memory.
template <int E>
struct Shared {
    using C = Config<E>;
    static constexpr int kDqBytes = C::BLOCK_M * E * int(sizeof(float));
    static constexpr int kStatisticsBytes = 2 * C::BLOCK_M * int(sizeof(float));
    static constexpr int kStageBytes = kTilesOfStage * C::Queries::kBytes;  // without the statistics

    static constexpr int kKeys = 0;
    static constexpr int kValues = kKeys + C::Keys::kBytes;
    static constexpr int kStage = kValues + C::Keys::kBytes;
    static constexpr int kDs = kStage + C::kStages * kStageBytes;
    static constexpr int kDq = kDs + kDsBuffers * C::Ds::kBytes;
    static constexpr int kStatistics = kDq + kDqBytes;
    static constexpr int kRing = kStatistics + C::kStages * kStatisticsBytes;
    static constexpr int kKeysFull = kRing + C::Ring::kBytes;
    static constexpr int kDqFull = kKeysFull + 8, kDqEmpty = kDqFull + 8, kTicket = kDqEmpty + 8;
    static constexpr int kBytes = kTicket + 8;
    static_assert(kBytes <= kSharedLimitSm90, "fewer stages");

    uint32_t base;

    DEVICE typename C::Keys keys() const { return {base + kKeys}; }
    DEVICE typename C::Keys values() const { return {base + kValues}; }
    DEVICE typename C::Queries queries(int stage) const { return {base + kStage + stage * kStageBytes}; }
    DEVICE typename C::Queries dout(int stage) const {
        return {base + kStage + stage * kStageBytes + C::Queries::kBytes};
    }
    DEVICE typename C::Ds ds(int step) const { return {base + kDs + step % kDsBuffers * C::Ds::kBytes}; }
    DEVICE uint32_t dq() const { return base + kDq; }
    // lse in base 2 of the stage's rows of queries, then delta.
    DEVICE uint32_t statistics(int stage) const { return base + kStatistics + stage * kStatisticsBytes; }
    DEVICE typename C::Ring ring() const { return {base + kRing}; }
    // mbarriers: keys and values have arrived; dQ's buffer is full, or empty again.
    DEVICE uint32_t keys_full() const { return base + kKeysFull; }
    DEVICE uint32_t dq_full() const { return base + kDqFull; }
    DEVICE uint32_t dq_empty() const { return base + kDqEmpty; }
};

struct TensorMaps {
    CUtensorMap queries, dout;  // [token, head, E] in boxes of a tile's tokens x packed heads x 64
    CUtensorMap keys;           // [token, column] in boxes of BLOCK_N x 64
};

#if MMPO_SM90

// Zeros the rows of the stages that no load ever fills, so that gemms read no NaN there. (Whole tokens of packed heads
// may leave a few rows of a tile over.) The __syncthreads of take_keys must follow.
template <int E>
DEVICE void clear_idle_rows(const Shared<E>& shared, int used) {
    using C = Config<E>;
    constexpr int kRowChunks = kPanelRowBytes / kChunkBytes, kPanels = C::kStages * kTilesOfStage * C::Queries::kPanels;
    const int chunks = (C::BLOCK_M - used) * kRowChunks;
    for (int i = int(threadIdx.x); i < kPanels * chunks; i += kThreads) {
        const int offset = i / chunks * C::Queries::kPanelBytes + used * kPanelRowBytes + i % chunks * kChunkBytes;
        store_shared_128(shared.base + uint32_t(Shared<E>::kStage + offset), make_uint4(0, 0, 0, 0));
    }
    fence_proxy_async();
}

// ---- loads, by one thread

// Loads the block's keys and values once, then Q, dO and their statistics for each step into the ring of stages.
template <int E>
DEVICE void produce(const Shared<E>& shared, const TensorMaps& maps, const BackwardProblem& problem,
                    const BackwardWorkspace& workspace, const OwnedKeys& owned, const typename Config<E>::Walk& walk) {
    using C = Config<E>;
    const typename C::Ring ring = shared.ring();
    const uint32_t keys_full = shared.keys_full();
    mbarrier_arrive_expect_tx(keys_full, 2 * C::Keys::kBytes);
    shared.keys().load(&maps.keys, problem.key_column(owned.kv_head), owned.keys.first, keys_full);
    shared.values().load(&maps.keys, problem.value_column(owned.kv_head), owned.keys.first, keys_full);
    typename C::Cursor cursor;
    const uint32_t bytes =
        uint32_t(problem.tile_tokens * problem.packing.heads * 2 * E * int(sizeof(bf16)) + Shared<E>::kStatisticsBytes);
    const int first_pack = owned.kv_head * problem.packs();
    for (int pack = first_pack; pack < first_pack + problem.packs(); ++pack) {
        for (int step = 0; step < walk.steps; ++step, cursor.advance()) {
            const QueryTile tile = walk.tile(step);
            const int64_t entry = int64_t(tile.number) * problem.packing.groups + pack;
            const uint32_t full = ring.full(cursor.stage);
            const auto load = [&](typename C::Queries to, const CUtensorMap* map) {
#pragma unroll
                for (int panel = 0; panel < C::Queries::kPanels; ++panel)
                    tma_load_3d(to.panel(panel), map, panel * kPanelColumns, pack * problem.packing.heads, tile.first,
                                full);
            };
            mbarrier_wait(ring.empty(cursor.stage), cursor.parity ^ 1u);
            mbarrier_arrive_expect_tx(full, bytes);
            load(shared.queries(cursor.stage), &maps.queries);
            bulk_load(shared.statistics(cursor.stage), workspace.statistics + entry * (2 * C::BLOCK_M),
                      Shared<E>::kStatisticsBytes, full);
            load(shared.dout(cursor.stage), &maps.dout);
        }
    }
}

// ---- dQ's sums, by one thread

// Moves each step's term of dQ, which the consumers leave in shared memory, to the workspace: adds it there when it is
// this block's turn, or assigns it if the turn is the first.
template <int E, class Order>
DEVICE void add_terms(const Shared<E>& shared, const BackwardProblem& problem, const BackwardWorkspace& workspace,
                      const OwnedKeys& owned, const typename Config<E>::Walk& walk) {
    using C = Config<E>;
    uint32_t parity = 0;
    const int first_pack = owned.kv_head * problem.packs();
    for (int pack = first_pack; pack < first_pack + problem.packs(); ++pack) {
        for (int step = 0; step < walk.steps; ++step, parity ^= 1u) {
            const QueryTile tile = walk.tile(step);
            const int64_t entry = int64_t(tile.number) * problem.packing.groups + pack;
            float* to = workspace.dq + entry * (C::BLOCK_M * E);
            // Wait for the turn first: it comes while consumers still form this step's term.
            if constexpr (Order::kTurns) {
                wait_for_turn(workspace.turns + entry, tile.turn);
                fence_proxy_async_global();
            }
            mbarrier_wait(shared.dq_full(), parity);
            if (Order::kTurns && tile.turn == 0)
                bulk_store(to, shared.dq(), Shared<E>::kDqBytes);
            else
                bulk_add_f32(to, shared.dq(), Shared<E>::kDqBytes);
            bulk_commit();
            bulk_wait_read<0>();
            mbarrier_arrive(shared.dq_empty());
            if constexpr (Order::kTurns) {
                bulk_wait<0>();
                pass_turn(workspace.turns + entry, tile.turn);
            }
        }
    }
}

// ---- a consumer

// Sets probabilities that the mask hides to 0. Rows are keys, from key number `first_key` of the block on; columns are
// queries.
template <int kCount, class Walk>
DEVICE void mask_probabilities(float (&p)[kCount], const Walk& walk, const QueryTile& tile, int first_key) {
    const int key = first_key + int(lane_id()) / 4, query = int(lane_id()) % 4 * 2;
    const int top = walk.first_seeing(tile, key) - query, bottom = walk.first_seeing(tile, key + 8) - query;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (i / 4 * 8 + i % 2 < (i % 4 < 2 ? top : bottom)) p[i] = 0.0f;
}

// Turns scores into P. `lse_address` is that of the queries' lse, from this lane's first column on.
template <int kCount>
DEVICE void form_p(float (&scores)[kCount], float scale_log2, uint32_t lse_address) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 lse = load_shared_f32x2(lse_address + uint32_t(j * 8) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            scores[4 * j + i] = exp2_approx(scores[4 * j + i] * scale_log2 - (i % 2 == 0 ? lse.x : lse.y));
    }
}

// Turns dP into dS. `delta_address` is that of the queries' delta, from this lane's first column on.
template <int kCount>
DEVICE void form_ds(float (&dp)[kCount], const float (&p)[kCount], uint32_t delta_address) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 delta = load_shared_f32x2(delta_address + uint32_t(j * 8) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[4 * j + i] = p[4 * j + i] * (dp[4 * j + i] - (i % 2 == 0 ? delta.x : delta.y));
    }
}

// What a consumer warpgroup keeps from step to step.
template <int E>
struct Consumer {
    using C = Config<E>;
    using Walk = typename C::Walk;
    using Cursor = typename C::Cursor;
    static constexpr int BLOCK_M = C::BLOCK_M, kDepthSteps = BLOCK_M / kWgmmaDepth;
    // Whether dS is formed under dV's gemm. At E = 64 there are not enough registers to keep P as that gemm's operand
    // beside P and dP in f32.
    static constexpr bool kFormsUnderDv = E == 128;

    Shared<E> shared;
    int index;  // of this warpgroup among the consumers
    float scale_log2;
    float dk[E / 2], dv[E / 2];

    DEVICE int warp() const { return int(threadIdx.x) / 32 % 4; }
    // The first of this warp's 16 keys in the block.
    DEVICE int key() const { return index * kConsumerKeys + warp() * 16; }

    // Starts S^T and dP^T of this consumer's keys and the stage's queries, as two groups of wgmma in this order.
    DEVICE void form_scores(float (&scores)[BLOCK_M / 2], float (&dp)[BLOCK_M / 2], int stage) {
        pin_registers(scores);
        pin_registers(dp);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step)
            wgmma_ss<BLOCK_M>(scores, shared.keys().depth_in_columns(index * kConsumerKeys, step),
                              shared.queries(stage).depth_in_columns(0, step), step != 0);
        wgmma_commit();
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step)
            wgmma_ss<BLOCK_M>(dp, shared.values().depth_in_columns(index * kConsumerKeys, step),
                              shared.dout(stage).depth_in_columns(0, step), step != 0);
        wgmma_commit();
    }

    // Writes this warp's 16 rows of dS^T.
    DEVICE void store_ds(const uint32_t (&ds)[kDepthSteps][4], int step) const {
        const int row = key() + int(lane_id()) % 16;
        const uint32_t first = shared.ds(step).address(row, int(lane_id()) / 16);
        // The swizzle exchanges chunks by xor, so the chunk 2k further on is found by xor from one register.
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k)
            stmatrix_x4((first + uint32_t(k / 4 * C::Ds::kPanelBytes)) ^ uint32_t(k % 4 * 32), ds[k]);
    }

    // Starts this consumer's part of dQ, over the first `kKeys` keys of the block. The part is half of the columns of
    // 64 queries at E = 128, and half of 128 queries at E = 64.
    template <int kKeys>
    DEVICE void multiply_keys(float (&dq)[32], int step) const {
        constexpr bool kColumns = E == 128;
#pragma unroll
        for (int k = 0; k < kKeys / kWgmmaDepth; ++k)
            wgmma_ss<64, true, true>(dq, shared.ds(step).depth_in_rows(kColumns ? 0 : index * 64, k),
                                     shared.keys().depth_in_rows(kColumns ? index * 64 : 0, k), k != 0);
    }

    // Writes this consumer's part of dQ to the shared buffer, in the order of dq_fragment.
    DEVICE void stage_dq(const float (&dq)[32]) const {
        const int row_group = warp() + (E == 128 ? 0 : index * 4), column_group = E == 128 ? index * 8 : 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            store_shared_128(shared.dq() + uint32_t(dq_fragment<E>(row_group, column_group + j)) * 4,
                             make_uint4(__float_as_uint(dq[4 * j]), __float_as_uint(dq[4 * j + 1]),
                                        __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3])));
        }
    }

    // Starts sum += weights^T * tile, where sum is dk or dv and the tile's rows are the step's queries.
    DEVICE void accumulate(float (&sum)[E / 2], const uint32_t (&weights)[kDepthSteps][4], typename C::Queries tile) {
#pragma unroll
        for (int k = 0; k < kDepthSteps; ++k) wgmma_rs<E, true>(sum, weights[k], tile.depth_in_rows(0, k), true);
        wgmma_commit();
    }

    DEVICE void add_to_dv(const uint32_t (&p)[kDepthSteps][4], int stage) {
        pin_registers(dv);
        wgmma_fence();
        accumulate(dv, p, shared.dout(stage));
    }

    // A step in which some keys of this consumer are seen, and at most the first `kKeys` keys of the block.
    template <int kKeys>
    DEVICE void step(const Walk& walk, const QueryTile& tile, int number, const Cursor& cursor) {
        const typename C::Ring ring = shared.ring();
        uint32_t p[kDepthSteps][4], ds[kDepthSteps][4];
        mbarrier_wait(ring.full(cursor.stage), cursor.parity);
        const uint32_t lse = shared.statistics(cursor.stage) + lane_id() % 4 * uint32_t(sizeof(float2));
        const uint32_t delta = lse + BLOCK_M * uint32_t(sizeof(float));
        {
            float scores[BLOCK_M / 2], dp[BLOCK_M / 2];
            form_scores(scores, dp, cursor.stage);
            wgmma_wait<1>();
            pin_registers(scores);
            // Apply the mask after the exponentials. The branch then separates them from the wait for dP, and ptxas
            // keeps them ahead of that wait, overlapped with dP's gemm (tests/compiled/sass.rs checks this).
            // Exponentials that the mask hides may overflow.
            form_p(scores, scale_log2, lse);
            if (tile.crosses) mask_probabilities(scores, walk, tile, key());
#pragma unroll
            for (int k = 0; k < kDepthSteps; ++k) accumulators_to_operand(p[k], scores, k);
            if constexpr (kFormsUnderDv) {
                add_to_dv(p, cursor.stage);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            pin_registers(dp);
            form_ds(dp, scores, delta);
#pragma unroll
            for (int k = 0; k < kDepthSteps; ++k) accumulators_to_operand(ds[k], dp, k);
        }
        if constexpr (!kFormsUnderDv) add_to_dv(p, cursor.stage);
        store_ds(ds, number);
        fence_proxy_async();
        bar_sync(uint32_t(NamedBarrier::ds), kConsumerThreads);

        float dq[32];
        pin_registers(dq);
        pin_registers(dk);
        wgmma_fence();
        multiply_keys<kKeys>(dq, number);
        wgmma_commit();
        accumulate(dk, ds, shared.queries(cursor.stage));
        wgmma_wait<1>();
        pin_registers(dq);
        pin_registers(dv);
        hand_over(dq, number);
        wgmma_wait<0>();
        pin_registers(dk);
        mbarrier_arrive_if(ring.empty(cursor.stage), lane_id() == 0);
    }

    // A step of the second consumer in which only the first consumer's keys are seen: it still forms its part of dQ.
    DEVICE void step_without_keys(int number, const Cursor& cursor) {
        const typename C::Ring ring = shared.ring();
        mbarrier_wait(ring.full(cursor.stage), cursor.parity);
        bar_sync(uint32_t(NamedBarrier::ds), kConsumerThreads);
        // After the barrier, so that all lanes have waited for `full`: a lane that had not could miss the phase.
        mbarrier_arrive_if(ring.empty(cursor.stage), lane_id() == 0);
        float dq[32];
        pin_registers(dq);
        wgmma_fence();
        multiply_keys<kConsumerKeys>(dq, number);
        wgmma_commit();
        wgmma_wait<0>();
        pin_registers(dq);
        hand_over(dq, number);
    }

    // Stages this consumer's part of dQ once the buffer's last contents have left.
    DEVICE void hand_over(const float (&dq)[32], int number) const {
        mbarrier_wait(shared.dq_empty(), uint32_t(number + 1) & 1u);
        stage_dq(dq);
        fence_proxy_async();
        __syncwarp();
        mbarrier_arrive_if(shared.dq_full(), lane_id() == 0);
    }

    // Stores this warp's 16 rows of dK or dV, times `factor`, to rows from first_key on of a matrix; rows from `limit`
    // on are dropped. They go through this warp's rows of V, which no gemm needs any more, so that a store covers whole
    // lines.
    DEVICE void store(bf16* out, int64_t stride, int first_key, int limit, float (&sum)[E / 2], float factor) const {
        const int lane = int(lane_id());
        constexpr int kRowChunks = E / kChunkValues;
#pragma unroll
        for (int i = 0; i < E / 2; ++i) sum[i] *= factor;
#pragma unroll
        for (int k = 0; k < E / 16; ++k) {
            uint32_t values[4];
            accumulators_to_operand(values, sum, k);
            stmatrix_x4(shared.values().address(key() + lane % 16, 2 * k + lane / 16), values);
        }
        __syncwarp();
        constexpr int kRowsAtOnce = 32 / kRowChunks, kAccesses = 16 / kRowsAtOnce;
        const int row = key() + lane / kRowChunks, chunk = lane % kRowChunks;
        uint4 chunks[kAccesses];
#pragma unroll
        for (int i = 0; i < kAccesses; ++i)
            chunks[i] = load_shared_128(shared.values().address(row + i * kRowsAtOnce, chunk));
        bf16* to = out + (first_key + row) * stride + chunk * kChunkValues;
#pragma unroll
        for (int i = 0; i < kAccesses; ++i)
            if (first_key + row + i * kRowsAtOnce < limit) store_128(to + i * kRowsAtOnce * stride, chunks[i]);
        __syncwarp();
    }

    // Runs the step in the form that fits the number of keys that its queries see.
    DEVICE void any_step(const Walk& walk, const QueryTile& tile, int number, const Cursor& cursor) {
        if (tile.keys > kConsumerKeys)
            step<C::BLOCK_N>(walk, tile, number, cursor);
        else if (index == 0)
            step<kConsumerKeys>(walk, tile, number, cursor);
        else
            step_without_keys(number, cursor);
    }
};

template <int E>
DEVICE void consume(const Shared<E>& shared, const BackwardProblem& problem, const OwnedKeys& owned,
                    const typename Config<E>::Walk& walk) {
    Consumer<E> consumer;
    consumer.shared = shared;
    // The shuffle tells the compiler that the number is uniform, so that descriptors stay in uniform registers.
    consumer.index = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0) - 1;
    consumer.scale_log2 = problem.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < E / 2; ++i) consumer.dk[i] = consumer.dv[i] = 0.0f;
    mbarrier_wait(shared.keys_full(), 0);
    typename Config<E>::Cursor cursor;
    int number = 0;
    for (int pack = 0; pack < problem.packs(); ++pack)
        for (int step = 0; step < walk.steps; ++step, ++number, cursor.advance())
            consumer.any_step(walk, walk.tile(step), number, cursor);
    consumer.store(problem.dqkv + problem.key_column(owned.kv_head), problem.stride(), owned.keys.first,
                   owned.keys.last, consumer.dk, problem.scale);
    consumer.store(problem.dqkv + problem.value_column(owned.kv_head), problem.stride(), owned.keys.first,
                   owned.keys.last, consumer.dv, 1.0f);
}

#endif  // MMPO_SM90

template <int E, class Order>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ TensorMaps maps, BackwardProblem problem,
                                   BackwardWorkspace workspace) {
#if MMPO_SM90
    using C = Config<E>;
    DYNAMIC_SHARED(raw);
    const Shared<E> shared{shared_address(raw)};
    if (threadIdx.x == 0) {
        shared.ring().init(kConsumerWarps);
        mbarrier_init(shared.keys_full(), 1);
        mbarrier_init(shared.dq_full(), kConsumerWarps);
        mbarrier_init(shared.dq_empty(), 1);
        fence_mbarrier_init();
    }
    // Another warp prefetches, and does so before take_keys waits for the ticket.
    if (threadIdx.x == 32) {
        prefetch_tensor_map(&maps.keys);
        prefetch_tensor_map(&maps.queries);
        prefetch_tensor_map(&maps.dout);
    }
    clear_idle_rows<E>(shared, problem.tile_tokens * problem.packing.heads);
    const OwnedKeys owned =
        take_keys<C::BLOCK_N>(problem, workspace, reinterpret_cast<uint32_t*>(raw + Shared<E>::kTicket));
    const typename C::Walk walk(owned.span, owned.pair, owned.keys, problem.tile_tokens, problem.packing.heads);
    if (threadIdx.x < kWarpgroupThreads) {
        setmaxnreg_decrease<C::kProducerRegisters>();
        if (threadIdx.x == 0) produce<E>(shared, maps, problem, workspace, owned, walk);
        if (threadIdx.x == 32) add_terms<E, Order>(shared, problem, workspace, owned, walk);
    } else {
        setmaxnreg_increase<C::kConsumerRegisters>();
        consume<E>(shared, problem, owned, walk);
    }
#endif
}

// ---- launchers

template <int E>
mmpo_status encode_maps(TensorMaps& maps, const BackwardProblem& problem) {
    const uint64_t rows = uint64_t(problem.rows), stride = uint64_t(problem.stride());
    const auto head_map = [&](CUtensorMap& map, const bf16* base, uint64_t heads) {
        return encode_head_map(&map, base, rows, heads, E, problem.tile_tokens, problem.packing.heads);
    };
    if (const mmpo_status error = head_map(maps.queries, problem.qkv, stride / E)) return error;
    if (const mmpo_status error = head_map(maps.dout, problem.dout, uint64_t(problem.heads))) return error;
    return encode_tensor_map_2d(&maps.keys, problem.qkv, rows, stride, stride, Config<E>::BLOCK_N, kPanelColumns,
                                Swizzle::bytes_128);
}

template <int E, class Order>
mmpo_status launch(const BackwardProblem& problem, void* memory, const uint32_t* host_spans, cudaStream_t stream) {
    using C = Config<E>;
    const unsigned key_tiles = unsigned(all_row_tiles(host_spans, problem.pairs, C::BLOCK_N) * problem.kv_heads);
    if (key_tiles == 0) return kSuccess;
    TensorMaps maps;
    if (const mmpo_status error = encode_maps<E>(maps, problem)) return error;
    const BackwardWorkspace workspace(memory, problem, C::BLOCK_M);
    if (const mmpo_status error =
            launch_prepare<E, C::BLOCK_M, C::BLOCK_N, Order>(problem, workspace, host_spans, stream)) {
        return error;
    }
    if (const mmpo_status error = LAUNCH((attention_backward_sm90_kernel<E, Order>), dim3(key_tiles), dim3(kThreads),
                                         Shared<E>::kBytes, stream, maps, problem, workspace)) {
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

extern "C" int64_t MMPO_EXPORT(attention_backward_sm90_workspace)(int32_t rows, int32_t pairs, int32_t heads,
                                                                  int32_t kv_heads, int32_t head_size) {
    const BackwardTiles tiles = backward_tiles(head_size);
    return BackwardWorkspace::bytes(rows, pairs, heads, kv_heads, head_size, tiles.block_m, tiles.block_n);
}

extern "C" mmpo_status MMPO_EXPORT(attention_backward_sm90)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                            const mmpo_bf16* out, const float* lse,
                                                            const mmpo_bf16* qkv, const uint32_t* spans,
                                                            const uint32_t* host_spans, int32_t pairs, int32_t rows,
                                                            int32_t heads, int32_t kv_heads, int32_t head_size,
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
