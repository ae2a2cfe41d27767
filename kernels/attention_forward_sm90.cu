// Flash attention forward for packed pairs `prompt | chosen | rejected`, on Hopper's wgmma and TMA (Dao 2023; warp
// specialisation and the order of products as in Shah et al. 2024, with a shared-prefix mask and packed query heads).
//
//   out[T, H * E] = softmax(scale * q k^T + mask) v        bf16, assigned
//   lse[T, H]     = logsumexp of the masked, scaled scores  f32, natural log, assigned
//
// A block of the persistent grid is one producer warp and two or three consumer warpgroups. The producer walks the
// tiles (common/attention_schedule.cuh) and copies queries, keys and values by TMA into rings of stages; each consumer
// warpgroup owns a slab of 64 packed rows of the tile: tokens x the query heads that share a key/value head. Scores and
// output stay in its registers.
//
// NOTE: rows that TMA reads and no query sees (past a sequence's end, in the gap before a rejected response's own
// keys, past row T, where it fills in zeros) are keys whose weight is exactly 0 and queries whose result is not
// stored. Their values are other rows of the same qkv: a NaN or infinity among them spreads as 0 * infinity does, one
// tile earlier than it would anyway.
#include "common/attention_forward_plan.cuh"
#include "common/online_softmax.cuh"

namespace {

using namespace forward_plan;

// ---- the producer

// Descriptions of qkv for TMA.
struct Maps {
    CUtensorMap queries;    // [T, H + 2K, E] in boxes of a slab's tokens x packed heads x 64
    CUtensorMap key_block;  // [T, (H + 2K) * E] in boxes of BLOCK_N x 64
    CUtensorMap key_seam;   // the same in boxes of kSeamRows x 64
};

// Starts the copy of slots block * BLOCK_N .. of a sequence, columns column ...
template <int E>
DEVICE void load_block(uint32_t tile, const Maps& maps, const CausalSequence& sequence, int block, int column,
                       uint32_t mbarrier) {
    using C = Config<E>;
    const int first = block * C::BLOCK_N;
    if (first < sequence.own_slot && first + C::BLOCK_N > sequence.own_slot) {
        // Pieces start at multiples of kSeamRows, as own_slot is; so each lies on one side of the seam.
#pragma unroll 1
        for (int piece = 0; piece < C::BLOCK_N; piece += kSeamRows) {
            const int row = sequence.row_of(first + piece);
            for (int panel = 0; panel < C::Keys::kPanels; ++panel) {
                tma_load_2d(tile + uint32_t(panel * C::Keys::kPanelBytes + piece * kPanelRowBytes), &maps.key_seam,
                            column + panel * kPanelColumns, row, mbarrier);
            }
        }
        return;
    }
    C::Keys::load(tile, &maps.key_block, column, sequence.row_of(first), mbarrier);
}

template <int E>
struct Producer {
    using C = Config<E>;
    const Shared<E>& shared;
    const Maps& maps;
    const Problem& problem;
    typename C::QueryCursor query;
    typename C::KeyCursor key;

    // The description of a tile, and its queries; slabs that hold no token are left out.
    DEVICE void start_tile(const ScheduledTile& scheduled) {
        const int tile_tokens = C::kSlabs * problem.slab_tokens, first_token = scheduled.tile * tile_tokens;
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
                tma_load_3d(shared.slab(query.stage, slab) + uint32_t(panel * C::Slab::kPanelBytes), &maps.queries,
                            panel * kPanelColumns, work.first_head, work.first_row + slab * problem.slab_tokens,
                            ring.full(query.stage));
            }
        }
        query.advance();
    }

    // From the diagonal backwards, as consumers take them.
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
DEVICE void produce(const Shared<E>& shared, const Maps& maps, const Problem& problem, const uint32_t* spans) {
    using C = Config<E>;
    const typename C::Cut cut{C::kSlabs * problem.slab_tokens};
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

// The part of a tile that one consumer warpgroup works on.
struct SlabWork {
    int first_row, last_row;  // tokens
    int first_slot;           // of first_row
    int blocks;               // key blocks that its rows see; 0 where no token is left for it

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
    int slab;                          // this warpgroup's number
    typename C::KeyCursor key, value;  // the next key block, and the next value block
    float scores[BLOCK_N / 2];
    uint32_t weights[BLOCK_N / 16][4];  // exp2(scores) in bf16, the A operand of the second product
    float out[E / 2];

    // NOTE: ping-pong. Warpgroups issue their products in turns, so that one's exponentials run under the others'
    // products instead of all waiting for the tensor cores and then all for the special function units. At E = 128 a
    // block of a slab is 1024 cycles of products and 512 of exponentials, at E = 64 as many of both: there it pays
    // most. Every warpgroup takes as many turns in a tile, also for blocks that it skips.
    DEVICE void take_turn() const { bar_sync(uint32_t(Barrier::turn) + slab, 2 * kWarpgroupThreads); }
    DEVICE void pass_turn() const {
        bar_arrive(uint32_t(Barrier::turn) + (slab + 1) % C::kSlabs, 2 * kWarpgroupThreads);
    }

    // Products that a wait has seen finish have read their operands: the stage may be filled again. A warp's wait
    // speaks for that warp, so each of them arrives.
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

    // scores = queries * keys^T, of the first N keys; weights and output of earlier blocks may still be in use by the
    // tensor cores.
    template <int N>
    DEVICE void start_scores(uint32_t queries) {
        const uint32_t keys = shared.keys(key.stage);
#pragma unroll
        for (int step = 0; step < E / kWgmmaDepth; ++step) {
            wgmma_ss<N>(first_scores<N>(), C::Slab::depth_in_columns(queries, 0, step),
                        C::Keys::depth_in_columns(keys, 0, step), step != 0);
        }
        wgmma_commit();
    }

    // out += weights * values, of the first N keys.
    template <int N>
    DEVICE void start_output() {
        const uint32_t values = shared.values(value.stage);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / kWgmmaDepth; ++step) {
            wgmma_rs<E, true>(out, weights[step], C::Keys::depth_in_rows(values, 0, step), true);
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

    // Keeps the compiler from writing the next products' register operands after the fence that follows.
    DEVICE void pin_operands() {
        pin_registers(out);
#pragma unroll
        for (int step = 0; step < BLOCK_N / kWgmmaDepth; ++step) pin_registers(weights[step]);
    }

    // A block that only other warpgroups' rows see.
    DEVICE void skip_block() {
        await_keys();
        await_values();
        // Behind the barrier: a lane that had not waited yet could miss the phase.
        take_turn();
        pass_turn();
        release_keys();
        release_values();
    }

    // The token of this lane's upper (0) or lower (1) row, counted from the slab's first.
    DEVICE int token(int half) const {
        return problem.packing.token(int(threadIdx.x) % kWarpgroupThreads / 32 * 16 + int(lane_id()) / 4 + 8 * half);
    }

    // Sets scores of keys after a row's own, and of the gap, to -inf. Blocks before a slab's first slot without a gap
    // need neither.
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

    // The last block that the slab's rows see, of which they see at most N keys: its scores, as weights.
    template <int N>
    DEVICE void first_block(const TileWork& tile, const SlabWork& work, uint32_t queries, OnlineSoftmax& softmax) {
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

    // One slab of a tile. The scores of a block are started before the output of the block before is waited for: its
    // exponentials run under that product.
    DEVICE void attend(const TileWork& tile, const SlabWork& work, uint32_t queries, OnlineSoftmax& softmax) {
        for (int block = tile.blocks - 1; block >= work.blocks; --block) skip_block();
        if (work.blocks == 0) return;
        // Half a block is often enough for the diagonal: for a short response half of all there is. Both products of it
        // are then half as wide; the second one in the loop's first round.
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
            // Here and not at the loop's head, because it also keeps the exponentials before the wait that follows:
            // with no branch between them ptxas sinks them below it, where no product overlaps them. (The pin does
            // the same for the compiler before ptxas; tests/compiled/sass.rs looks at the outcome.)
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

    // Output, divided by the sums, through the slab's own queries, which no product needs any more, so that a store
    // covers whole lines. A warp stages and stores its own 16 rows.
    DEVICE void store(bf16* out_rows, float* lse, const TileWork& tile, const SlabWork& work, uint32_t staging,
                      const OnlineSoftmax& softmax) {
        const int lane = int(lane_id()), warp_row = int(threadIdx.x) % kWarpgroupThreads / 32 * 16;
        const float factors[2] = {1.0f / softmax.sum[0], 1.0f / softmax.sum[1]};
#pragma unroll
        for (int i = 0; i < E / 2; ++i) out[i] *= factors[i / 2 % 2];
#pragma unroll
        for (int step = 0; step < E / 16; ++step) {
            uint32_t values[4];
            accumulators_to_operand(values, out, step);
            stmatrix_x4(C::Slab::address(staging, warp_row + lane % 16, 2 * step + lane / 16), values);
        }
        __syncwarp();
        constexpr int kRowChunks = E / kChunkValues, kRowsAtOnce = 32 / kRowChunks, kAccesses = 16 / kRowsAtOnce;
        const int row = warp_row + lane / kRowChunks, chunk = lane % kRowChunks;
        uint4 chunks[kAccesses];
#pragma unroll
        for (int i = 0; i < kAccesses; ++i)
            chunks[i] = load_shared_128(C::Slab::address(staging, row + i * kRowsAtOnce, chunk));
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
    // From one lane, so that the compiler knows it is uniform and keeps descriptors in uniform registers.
    const int slab = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0) - 1;
    Consumer<E> consumer{shared, problem, slab, {}, {}, {}, {}, {}};
    const typename C::QueryRing ring = shared.query_ring();
    typename C::QueryCursor query;
    // The first turn is warpgroup 0's.
    if (consumer.slab == C::kSlabs - 1) consumer.pass_turn();
    for (;;) {
        mbarrier_wait(ring.full(query.stage), query.parity);
        const TileWork tile = load_work(shared.work(query.stage));
        if (tile.blocks == 0) break;
        const SlabWork work(tile, problem, consumer.slab, C::BLOCK_N);
        const uint32_t queries = shared.slab(query.stage, consumer.slab);
        OnlineSoftmax softmax;
        consumer.attend(tile, work, queries, softmax);
        if (work.blocks != 0) {
            softmax.finish();
            consumer.store(out, lse, tile, work, queries, softmax);
        }
        // Queries are next written by TMA: this thread's accesses of them come before that.
        fence_proxy_async();
        __syncwarp();
        if (lane_id() == 0) mbarrier_arrive(ring.empty(query.stage));
        query.advance();
    }
    // Takes what the last turn of all passed on.
    if (consumer.slab == 0) consumer.take_turn();
}

template <int E>
__global__ void __launch_bounds__(Config<E>::kThreads, 1)
    attention_forward_kernel(bf16* out, float* lse, const uint32_t* spans, const __grid_constant__ Maps maps,
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
int encode_maps(Maps& maps, const bf16* qkv, int rows, const Problem& problem) {
    const uint64_t heads = uint64_t(problem.heads + 2 * problem.kv_heads), width = heads * E;
    const TensorMapShape queries{3,
                                 {E, heads, uint64_t(rows)},
                                 {E * sizeof(bf16), width * sizeof(bf16)},
                                 {kPanelColumns, uint32_t(problem.packing.heads), uint32_t(problem.slab_tokens)},
                                 Swizzle::bytes_128};
    if (const int error = encode_tensor_map(&maps.queries, qkv, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, queries)) {
        return error;
    }
    const auto key_map = [&](CUtensorMap& map, uint32_t box_rows) {
        return encode_tensor_map_2d(&map, qkv, uint64_t(rows), width, width, box_rows, kPanelColumns,
                                    Swizzle::bytes_128);
    };
    if (const int error = key_map(maps.key_block, Config<E>::BLOCK_N)) return error;
    return key_map(maps.key_seam, kSeamRows);
}

template <int E>
int launch(bf16* out, float* lse, const bf16* qkv, const uint32_t* spans, const uint32_t* host_spans, int rows,
           Problem problem, cudaStream_t stream) {
    using C = Config<E>;
    const typename C::Cut cut{C::kSlabs * problem.slab_tokens};
    problem.count = count_tiles(cut, host_spans, problem.pairs, problem.packing.groups);
    if (problem.count.tiles == 0) return 0;
    Maps maps;
    if (const int error = encode_maps<E>(maps, qkv, rows, problem)) return error;
    const int blocks = min(problem.count.tiles, multiprocessors());
    return LAUNCH(attention_forward_kernel<E>, dim3(unsigned(blocks)), dim3(C::kThreads), Shared<E>::kBytes, stream,
                  out, lse, spans, maps, problem);
}

}  // namespace

extern "C" mmpo_status MMPO_EXPORT(attention_forward_sm90)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv,
                                                           const uint32_t* spans, const uint32_t* host_spans,
                                                           int32_t pairs, int32_t rows, int32_t heads, int32_t kv_heads,
                                                           int32_t head_size, float scale, mmpo_stream stream) {
    if (rows == 0 || pairs == 0 || heads == 0) return 0;
    // The softmax works on unscaled scores, so their order must be that of the scaled ones.
    if (!(scale > 0.0f)) return 1;
    const HeadPacking packing = head_packing(heads, kv_heads);
    const Problem problem{heads, kv_heads, packing, kSlabRows / packing.heads, scale * kLog2E, pairs, {}};
    switch (head_size) {
        case 64:
            return launch<64>(out, lse, qkv, spans, host_spans, rows, problem, stream);
        case 128:
            return launch<128>(out, lse, qkv, spans, host_spans, rows, problem, stream);
        default:
            return 1;
    }
}
