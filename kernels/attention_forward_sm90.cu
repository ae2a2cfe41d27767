// Flash attention forward for packed pairs `prompt | chosen | rejected`, on Hopper's wgmma and TMA (Dao 2023; warp
// specialisation and the order of gemms as in Shah et al. 2024, with a shared-prefix mask and packed query heads).
//
//   out[T, H * E] = softmax(scale * q k^T + mask) v        bf16, assigned
//   lse[T, H]     = logsumexp of the masked, scaled scores  f32, natural log, assigned
//
// A block of the persistent grid is one producer warp and two or three consumer warpgroups. The producer walks the
// tiles (common/attention_schedule.cuh) and copies queries, keys and values by TMA into rings of stages. Each consumer
// has a slab of the tile, which is 64 packed rows: tokens x the query heads that share a key/value head. Scores and
// output stay in its registers.
//
// NOTE: TMA also reads rows that no query of the tile may see: rows past a sequence's end, rows in the gap before a
// rejected response's own keys, and zeros past row T. As keys they get a weight of exactly 0, as queries their result
// is not stored. Their values are other rows of the same qkv. If those hold a NaN or infinity, it spreads to the tile's
// rows as well, because 0 * infinity is NaN.
#include "common/attention_forward_sm90.cuh"
#include "common/launch.cuh"
#include "common/online_softmax.cuh"

namespace {

using namespace attention_forward_sm90;

// ---- the producer

// How TMA sees qkv.
struct TensorMaps {
    CUtensorMap queries;    // [T, H + 2K, E] in boxes of a slab's tokens x packed heads x 64
    CUtensorMap key_block;  // [T, (H + 2K) * E] in boxes of BLOCK_N x 64
    CUtensorMap key_seam;   // the same in boxes of kSeamRows x 64
};

// Starts the copy of key block `block` of a sequence: its slots' rows, columns from `column` on.
template <int E>
DEVICE void load_block(typename Config<E>::Keys tile, const TensorMaps& maps, const CausalSequence& sequence, int block,
                       int column, uint32_t mbarrier) {
    using C = Config<E>;
    const int first = block * C::BLOCK_N;
    if (first < sequence.own_slot && first + C::BLOCK_N > sequence.own_slot) {
        // Pieces start at multiples of kSeamRows, as own_slot does, so each piece lies on one side of the seam.
#pragma unroll 1
        for (int piece = 0; piece < C::BLOCK_N; piece += kSeamRows) {
            const int row = sequence.row_of(first + piece);
            for (int panel = 0; panel < C::Keys::kPanels; ++panel) {
                tma_load_2d(tile.panel(panel) + uint32_t(piece * kPanelRowBytes), &maps.key_seam,
                            column + panel * kPanelColumns, row, mbarrier);
            }
        }
        return;
    }
    tile.load(&maps.key_block, column, sequence.row_of(first), mbarrier);
}

template <int E>
struct Producer {
    using C = Config<E>;
    const Shared<E>& shared;
    const TensorMaps& maps;
    const Problem& problem;
    typename C::QueryCursor query;
    typename C::KeyCursor key;

    // Loads a tile: its description, its queries, then its keys and values.
    DEVICE void start_tile(const ScheduledTile& scheduled) {
        const int tile_tokens = C::kConsumers * problem.slab_tokens, first_token = scheduled.tile * tile_tokens;
        const CausalSequence& sequence = scheduled.sequence;
        const int tokens = min(tile_tokens, sequence.length - first_token);
        TileWork work{};
        work.first_row = sequence.first_row + first_token;
        work.last_row = sequence.first_row + sequence.length;
        work.first_slot = sequence.own_slot + first_token;
        work.blocks = C::Cut::blocks(work.first_slot + tokens - 1);
        work.gap_first = sequence.shared;
        work.gap_last = sequence.own_slot;
        work.first_head = scheduled.group * problem.packing.heads;
        publish(work, tokens);
        load_keys(sequence, work);
    }

    // Leaves the tile's description for the consumers, and starts the copies of its queries. Slabs that hold no token
    // are left out.
    DEVICE void publish(const TileWork& work, int tokens) {
        const typename C::QueryRing ring = shared.query_ring();
        mbarrier_wait(ring.empty(query.stage), query.parity ^ 1);
        const uint32_t at = shared.work(query.stage);
        store_shared_128(at, uint4{uint32_t(work.blocks), uint32_t(work.first_row), uint32_t(work.last_row),
                                   uint32_t(work.first_slot)});
        store_shared_128(at + 16,
                         uint4{uint32_t(work.gap_first), uint32_t(work.gap_last), uint32_t(work.first_head), 0});
        const int slabs = (tokens + problem.slab_tokens - 1) / problem.slab_tokens;
        const int slab_bytes = problem.slab_tokens * problem.packing.heads * E * int(sizeof(bf16));
        mbarrier_arrive_expect_tx(ring.full(query.stage), uint32_t(slabs * slab_bytes));
#pragma unroll 1
        for (int slab = 0; slab < slabs; ++slab) {
            for (int panel = 0; panel < C::Slab::kPanels; ++panel) {
                tma_load_3d(shared.slab(query.stage, slab).panel(panel), &maps.queries, panel * kPanelColumns,
                            work.first_head, work.first_row + slab * problem.slab_tokens, ring.full(query.stage));
            }
        }
        query.advance();
    }

    // From the diagonal backwards, in the order in which consumers take them.
    DEVICE void load_keys(const CausalSequence& sequence, const TileWork& work) {
        const int kv_head = work.first_head / (problem.heads / problem.kv_heads);
        const int key_column = (problem.heads + kv_head) * E, value_column = key_column + problem.kv_heads * E;
        const typename C::KeyRing keys = shared.key_ring(), values = shared.value_ring();
        for (int block = work.blocks - 1; block >= 0; --block) {
            mbarrier_wait(keys.empty(key.stage), key.parity ^ 1);
            mbarrier_arrive_expect_tx(keys.full(key.stage), C::Keys::kBytes);
            load_block<E>(shared.keys(key.stage), maps, sequence, block, key_column, keys.full(key.stage));
            mbarrier_wait(values.empty(key.stage), key.parity ^ 1);
            mbarrier_arrive_expect_tx(values.full(key.stage), C::Keys::kBytes);
            load_block<E>(shared.values(key.stage), maps, sequence, block, value_column, values.full(key.stage));
            key.advance();
        }
    }
};

template <int E>
DEVICE void produce(const Shared<E>& shared, const TensorMaps& maps, const Problem& problem, const uint32_t* spans) {
    using C = Config<E>;
    const typename C::Cut cut{C::kConsumers * problem.slab_tokens};
    TileWalk<typename C::Cut> walk(cut, spans, problem.pairs, problem.packing.groups, problem.count);
    Producer<E> producer{shared, maps, problem, {}, {}};
    if (lane_id() == 0) {
        prefetch_tensor_map(&maps.queries);
        prefetch_tensor_map(&maps.key_block);
        prefetch_tensor_map(&maps.key_seam);
    }
    ScheduledTile tile;
    while (walk.next(tile)) {
        if (lane_id() == 0) producer.start_tile(tile);
        __syncwarp();
    }
    if (lane_id() == 0) producer.publish(TileWork{}, 0);
}

// ---- the consumers

// The part of a tile that one consumer has: its slab.
struct SlabWork {
    int first_row, last_row;  // its tokens, as rows of the batch
    int first_slot;           // of first_row
    int blocks;               // key blocks that its rows see; 0 if no token is left for it

    DEVICE SlabWork(const TileWork& work, const Problem& problem, int slab, int block_n) {
        const int skipped = slab * problem.slab_tokens;
        first_row = work.first_row + skipped;
        last_row = min(first_row + problem.slab_tokens, work.last_row);
        first_slot = work.first_slot + skipped;
        blocks = first_row < work.last_row ? last_slot() / block_n + 1 : 0;
    }

    DEVICE int last_slot() const { return first_slot + last_row - first_row - 1; }
};

template <int E>
struct Consumer {
    using C = Config<E>;
    static constexpr int BLOCK_N = C::BLOCK_N;
    const Shared<E>& shared;
    const Problem& problem;
    int index;                         // of this warpgroup among the consumers, and of its slab in the tile
    typename C::KeyCursor key, value;  // the next key block, and the next value block
    float scores[BLOCK_N / 2];
    uint32_t weights[BLOCK_N / 16][4];  // exp2(scores) in bf16, the A operand of the second gemm
    float out[E / 2];

    // NOTE: ping-pong. The consumers issue their gemms in turns, so that the exponentials of one run under the gemms of
    // the others; otherwise all would wait for the tensor cores at one time and for the special function units at
    // another. At E = 128 a block of a slab takes 1024 cycles of gemms and 512 of exponentials; at E = 64 it takes as
    // many of both, so ping-pong gains most there. Every consumer takes the same number of turns in a tile, also for
    // blocks that it skips.
    DEVICE void take_turn() const { bar_sync(uint32_t(NamedBarrier::turn) + index, 2 * kWarpgroupThreads); }
    DEVICE void pass_turn() const {
        bar_arrive(uint32_t(NamedBarrier::turn) + (index + 1) % C::kConsumers, 2 * kWarpgroupThreads);
    }

    // Frees a stage for the next copy. Gemms that a wait has seen finish have read their operands. Each warp arrives,
    // because its wait says nothing about the other warps.
    DEVICE static void release(const typename C::KeyRing& ring, typename C::KeyCursor& cursor) {
        mbarrier_arrive_if(ring.empty(cursor.stage), lane_id() == 0);
        cursor.advance();
    }
    DEVICE void release_keys() { release(shared.key_ring(), key); }
    DEVICE void release_values() { release(shared.value_ring(), value); }
    DEVICE void await_keys() const { mbarrier_wait(shared.key_ring().full(key.stage), key.parity); }
    DEVICE void await_values() const { mbarrier_wait(shared.value_ring().full(value.stage), value.parity); }

    // The scores of a block's first N keys.
    template <int N>
    DEVICE float (&first_scores())[N / 2] {
        return *reinterpret_cast<float (*)[N / 2]>(&scores);
    }

    // Starts scores = queries * keys^T for the first N keys. The tensor cores may still be reading the weights of the
    // block before, and adding to the output.
    template <int N>
    DEVICE void start_scores(typename C::Slab queries) {
        const typename C::Keys keys = shared.keys(key.stage);
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step) {
            wgmma_ss<N>(first_scores<N>(), queries.depth_in_columns(0, step), keys.depth_in_columns(0, step),
                        step != 0);
        }
        wgmma_commit();
    }

    // Starts out += weights * values for the first N keys.
    template <int N>
    DEVICE void start_output() {
        const typename C::Keys values = shared.values(value.stage);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / kWgmmaDepth; ++step) {
            wgmma_rs<E, true>(out, weights[step], values.depth_in_rows(0, step), true);
        }
        wgmma_commit();
    }

    DEVICE void start_output(bool half) {
        if (half) {
            start_output<BLOCK_N / 2>();
        } else {
            start_output<BLOCK_N>();
        }
    }

    DEVICE void round_weights() {
#pragma unroll
        for (int step = 0; step < BLOCK_N / kWgmmaDepth; ++step) accumulators_to_operand(weights[step], scores, step);
    }

    // Keeps the compiler from writing the register operands of the next gemms after the fence that follows.
    DEVICE void pin_operands() {
        pin_registers(out);
#pragma unroll
        for (int step = 0; step < BLOCK_N / kWgmmaDepth; ++step) pin_registers(weights[step]);
    }

    // A block that no row of this slab sees: only hands its stages on.
    DEVICE void skip_block() {
        await_keys();
        await_values();
        // After the barrier, so that all lanes have waited: a lane that had not could miss the phase.
        take_turn();
        pass_turn();
        release_keys();
        release_values();
    }

    // The token of this lane's upper (0) or lower (1) row, counted from the slab's first.
    DEVICE int token(int half) const {
        return problem.packing.token(int(threadIdx.x) % kWarpgroupThreads / 32 * 16 + int(lane_id()) / 4 + 8 * half);
    }

    // Sets the scores of keys after a row's own key, and of keys in the gap, to -inf. Blocks that end before the slab's
    // first slot and hold no gap need neither.
    template <int N>
    DEVICE void mask(const TileWork& tile, const SlabWork& work, int block) {
        const int first = block * BLOCK_N;
        if (first + BLOCK_N - 1 > work.first_slot) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int limit = work.first_slot + token(half) - first - int(lane_id()) % 4 * 2;
                mask_scores(first_scores<N>(), half, [=](int column) { return column > limit; });
            }
        }
        if (first < tile.gap_last && first + BLOCK_N > tile.gap_first && tile.gap_first != tile.gap_last) {
            const int offset = first + int(lane_id()) % 4 * 2;
            const int gap_first = tile.gap_first - offset, gap_last = tile.gap_last - offset;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                mask_scores(first_scores<N>(), half,
                            [=](int column) { return column >= gap_first && column < gap_last; });
            }
        }
    }

    // The last block that the slab's rows see, and at most N keys of it: computes its scores and turns them into
    // weights.
    template <int N>
    DEVICE void first_block(const TileWork& tile, const SlabWork& work, typename C::Slab queries,
                            OnlineSoftmax& softmax) {
        await_keys();
        take_turn();
        wgmma_fence();
        start_scores<N>(queries);
        pass_turn();
        wgmma_wait<0>();
        pin_registers(first_scores<N>());
        release_keys();
        mask<N>(tile, work, work.blocks - 1);
        float rescale[2];
        softmax.update(first_scores<N>(), problem.scale_log2, rescale);
        // Zero the unused weights; left undefined, they raise register pressure until ptxas serialises the wgmmas.
#pragma unroll
        for (int i = N / 2; i < BLOCK_N / 2; ++i) scores[i] = 0.0f;
        round_weights();
    }

    // Attends with one slab of a tile. The scores of a block are started before the output of the block before is
    // waited for, so its exponentials run under that gemm.
    DEVICE void attend(const TileWork& tile, const SlabWork& work, typename C::Slab queries, OnlineSoftmax& softmax) {
        for (int block = tile.blocks - 1; block >= work.blocks; --block) skip_block();
        if (work.blocks == 0) return;
        // The diagonal's block often shows half of its keys at most; for a short response that may be half of all there
        // is. Then both of its gemms are half as wide. The second of them runs in the first round of the loop.
        bool half = work.last_slot() % BLOCK_N < BLOCK_N / 2;
        if (half) {
            first_block<BLOCK_N / 2>(tile, work, queries, softmax);
        } else {
            first_block<BLOCK_N>(tile, work, queries, softmax);
        }
#pragma unroll
        for (int i = 0; i < E / 2; ++i) out[i] = 0.0f;
        float rescale[2];
        if (work.blocks > 1) await_keys();
        for (int block = work.blocks - 2; block >= 0; --block) {
            take_turn();
            pin_operands();
            wgmma_fence();
            start_scores<BLOCK_N>(queries);
            await_values();
            start_output(half);
            half = false;
            pass_turn();
            wgmma_wait<1>();
            pin_registers(scores);
            release_keys();
            mask<BLOCK_N>(tile, work, block);
            softmax.update(scores, problem.scale_log2, rescale);
            pin_registers(scores);
            // This wait stands here and not at the loop's head, because it also keeps the exponentials above the wait
            // that follows: without a branch between the two, ptxas sinks them below it, where no gemm overlaps them.
            // (The pin does the same for the compiler before ptxas. tests/compiled/sass.rs checks the outcome.)
            if (block > 0) await_keys();
            wgmma_wait<0>();
            pin_registers(out);
            release_values();
#pragma unroll
            for (int i = 0; i < E / 2; ++i) out[i] *= rescale[i / 2 % 2];
            round_weights();
        }
        await_values();
        pin_operands();
        start_output(half);
        wgmma_wait<0>();
        pin_registers(out);
        release_values();
    }

    // Stores the output, divided by the sums. It goes through the slab's own queries, which no gemm needs any more, so
    // that a store covers whole lines. A warp stages and stores its own 16 rows.
    DEVICE void store(bf16* out_rows, float* lse, const TileWork& tile, const SlabWork& work, typename C::Slab staging,
                      const OnlineSoftmax& softmax) {
        const int lane = int(lane_id()), warp_row = int(threadIdx.x) % kWarpgroupThreads / 32 * 16;
        const float factors[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
#pragma unroll
        for (int i = 0; i < E / 2; ++i) out[i] *= factors[i / 2 % 2];
#pragma unroll
        for (int step = 0; step < E / 16; ++step) {
            uint32_t values[4];
            accumulators_to_operand(values, out, step);
            stmatrix_x4(staging.address(warp_row + lane % 16, 2 * step + lane / 16), values);
        }
        __syncwarp();
        constexpr int kRowChunks = E / kChunkValues, kRowsAtOnce = 32 / kRowChunks, kAccesses = 16 / kRowsAtOnce;
        const int row = warp_row + lane / kRowChunks, chunk = lane % kRowChunks;
        uint4 chunks[kAccesses];
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) chunks[i] = load_shared_128(staging.address(row + i * kRowsAtOnce, chunk));
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            const int64_t to =
                problem.packing.position(row + i * kRowsAtOnce, work.first_row, work.last_row, tile.first_head);
            if (to >= 0) store_128(out_rows + to * E + chunk * kChunkValues, chunks[i]);
        }
        if (lane % 4 == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t to = problem.packing.position(warp_row + lane / 4 + 8 * half, work.first_row,
                                                            work.last_row, tile.first_head);
                if (to >= 0) lse[to] = softmax.lse(half, problem.scale_log2);
            }
        }
    }
};

DEVICE TileWork load_work(uint32_t address) {
    const uint4 low = load_shared_128(address), high = load_shared_128(address + 16);
    return {int(low.x), int(low.y), int(low.z), int(low.w), int(high.x), int(high.y), int(high.z), 0};
}

template <int E>
DEVICE void consume(bf16* out, float* lse, const Shared<E>& shared, const Problem& problem) {
    using C = Config<E>;
    // The shuffle tells the compiler that the number is uniform, so that descriptors stay in uniform registers.
    const int index = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0) - 1;
    Consumer<E> consumer{shared, problem, index, {}, {}, {}, {}, {}};
    const typename C::QueryRing ring = shared.query_ring();
    typename C::QueryCursor query;
    // The first turn is consumer 0's, and the last consumer passes it on.
    if (consumer.index == C::kConsumers - 1) consumer.pass_turn();
    for (;;) {
        mbarrier_wait(ring.full(query.stage), query.parity);
        const TileWork tile = load_work(shared.work(query.stage));
        if (tile.blocks == 0) break;
        const SlabWork work(tile, problem, consumer.index, C::BLOCK_N);
        const typename C::Slab queries = shared.slab(query.stage, consumer.index);
        OnlineSoftmax softmax;
        consumer.attend(tile, work, queries, softmax);
        if (work.blocks != 0) {
            softmax.finish();
            consumer.store(out, lse, tile, work, queries, softmax);
        }
        // TMA will overwrite the queries; this fence orders the thread's own accesses before that.
        fence_proxy_async();
        __syncwarp();
        if (lane_id() == 0) mbarrier_arrive(ring.empty(query.stage));
        query.advance();
    }
    // Takes the turn that the very last pass_turn gave.
    if (consumer.index == 0) consumer.take_turn();
}

template <int E>
__global__ void __launch_bounds__(Config<E>::kThreads, 1)
    attention_forward_sm90_kernel(bf16* out, float* lse, const uint32_t* spans, const __grid_constant__ TensorMaps maps,
                                  const __grid_constant__ Problem problem) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const Shared<E> shared{shared_address(raw)};
    prepare<E>(shared, problem);
    if (threadIdx.x < kWarpgroupThreads) {
        setmaxnreg_decrease<Config<E>::kProducerRegisters>();
        if (threadIdx.x < 32) produce<E>(shared, maps, problem, spans);
    } else {
        setmaxnreg_increase<Config<E>::kConsumerRegisters>();
        consume<E>(out, lse, shared, problem);
    }
#endif
}

template <int E>
mmpo_status encode_maps(TensorMaps& maps, const bf16* qkv, int rows, const Problem& problem) {
    const uint64_t heads = uint64_t(problem.heads + 2 * problem.kv_heads), width = heads * E;
    if (const mmpo_status error =
            encode_head_map(&maps.queries, qkv, uint64_t(rows), heads, E, problem.slab_tokens, problem.packing.heads)) {
        return error;
    }
    const auto key_map = [&](CUtensorMap& map, uint32_t box_rows) {
        return encode_tensor_map_2d(&map, qkv, uint64_t(rows), width, width, box_rows, kPanelColumns,
                                    Swizzle::bytes_128);
    };
    if (const mmpo_status error = key_map(maps.key_block, Config<E>::BLOCK_N)) return error;
    return key_map(maps.key_seam, kSeamRows);
}

template <int E>
mmpo_status launch(bf16* out, float* lse, const bf16* qkv, const uint32_t* spans, const uint32_t* host_spans, int rows,
                   Problem problem, cudaStream_t stream) {
    using C = Config<E>;
    const typename C::Cut cut{C::kConsumers * problem.slab_tokens};
    problem.count = count_tiles(cut, host_spans, problem.pairs, problem.packing.groups);
    if (problem.count.tiles == 0) return kSuccess;
    TensorMaps maps;
    if (const mmpo_status error = encode_maps<E>(maps, qkv, rows, problem)) return error;
    const int blocks = min(problem.count.tiles, multiprocessors());
    return LAUNCH(attention_forward_sm90_kernel<E>, dim3(unsigned(blocks)), dim3(C::kThreads), Shared<E>::kBytes,
                  stream, out, lse, spans, maps, problem);
}

}  // namespace

extern "C" mmpo_status MMPO_EXPORT(attention_forward_sm90)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv,
                                                           const uint32_t* spans, const uint32_t* host_spans,
                                                           int32_t pairs, int32_t rows, int32_t heads, int32_t kv_heads,
                                                           int32_t head_size, float scale, mmpo_stream stream) {
    if (rows == 0 || pairs == 0 || heads == 0) return kSuccess;
    // The softmax compares unscaled scores, whose order must be that of the scaled ones.
    if (!(scale > 0.0f)) return kInvalidValue;
    const HeadPacking packing = pack_heads(heads, kv_heads, kSlabRows);
    Problem problem{};
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.packing = packing;
    problem.slab_tokens = kSlabRows / packing.heads;
    problem.scale_log2 = scale * kLog2E;
    problem.pairs = pairs;
    switch (head_size) {
        case 64:
            return launch<64>(out, lse, qkv, spans, host_spans, rows, problem, stream);
        case 128:
            return launch<128>(out, lse, qkv, spans, host_spans, rows, problem, stream);
        default:
            return kInvalidValue;
    }
}
