// Flash attention forward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask and packed
// query heads). On Hopper attention_forward_sm90.cu runs in its place.
//
//   out[T, H * E] = softmax(scale * q k^T + mask) v        bf16, assigned
//   lse[T, H]     = logsumexp of the masked, scaled scores  f32, natural log, assigned
//
// q, k, v are columns of qkv[T, (H + 2K) * E]; query head h reads key/value head h / (H / K). A block takes one tile of
// packed rows, tokens x the query heads that share a key/value head, and walks the key blocks that they see from the
// diagonal backwards; scores stay in registers, softmax is online and in base 2. Tensor cores: mma.sync, so every GPU
// from sm_80 on.
#include "common/attention_schedule.cuh"
#include "common/online_softmax.cuh"

namespace {

// Rows of one mma.
constexpr int kMmaRows = 16;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// How a block of the grid is cut.
struct ForwardTiles {
    int row_tiles;   // of 16 rows, a warp
    int block_n;     // keys of a block
    int ring_tiles;  // key or value tiles in shared memory: one in use, the others arriving
    int blocks;      // that should share a multiprocessor

    constexpr int block_m() const { return kWarps * row_tiles * kMmaRows; }
    constexpr int shared_bytes(int head_size) const { return (block_m() + ring_tiles * block_n) * head_size * 2; }
};

// Two row tiles a warp: an ldmatrix of 16 keys (4 cycles of shared memory) then feeds four mma (8 cycles of an A100's
// tensor cores); with one row tile shared memory would be as busy as they are.
//   E = 64:  registers: scores 64, output 64, queries 32 and about 60, so two blocks of at most 255 fit.
//            Shared memory: queries 16, four tiles of 8: 48 KiB, two blocks even in the 100 KiB of sm_86.
//   E = 128: registers: scores 64, output 128, queries from shared memory, so two blocks of 255 fit.
//            Shared memory: queries 32, three tiles of 16: 80 KiB, two blocks in sm_80's 164 KiB, one in sm_86's 100.
// 64 keys a block: 128 would double the scores' registers, which then spill beside either output.
constexpr ForwardTiles forward_tiles(int head_size) {
    return head_size == 64 ? ForwardTiles{2, 64, 4, 2} : ForwardTiles{2, 64, 3, 2};
}

constexpr int kSmallestShared = 99 * 1024;  // that one block may have, of all GPUs from sm_80 on: sm_86, sm_89, sm_120
static_assert(forward_tiles(64).shared_bytes(64) <= kSmallestShared &&
                  forward_tiles(128).shared_bytes(128) <= kSmallestShared,
              "a block fits into every GPU");

template <int E>
struct Config {
    static constexpr ForwardTiles kTiles = forward_tiles(E);
    static constexpr int kRowTiles = kTiles.row_tiles;
    static constexpr int kWarpRows = kRowTiles * kMmaRows;
    static constexpr int BLOCK_M = kTiles.block_m();
    static constexpr int BLOCK_N = kTiles.block_n;
    static constexpr int kRing = kTiles.ring_tiles;
    static constexpr int kBlocks = kTiles.blocks;
    static constexpr int kSharedBytes = kTiles.shared_bytes(E);
    static constexpr bool kQueriesInRegisters = E == 64;

    // cp.async copies row by row: no gap is needed where prompt and own keys meet.
    using Cut = TileCut<BLOCK_N, 1>;
};

struct Problem {
    const bf16* qkv;
    int64_t stride;  // values of a row of qkv
    int heads, kv_heads;
    HeadPacking packing;
    float scale_log2;  // scale * log2(e): scores in base 2
};

// A tile of packed rows, and what its rows see.
struct TileWork {
    CausalSequence sequence;
    int first_token;          // of the sequence
    int first_row, last_row;  // tokens
    int first_head, kv_head;
    int last_slot;  // of the last token
};

// The tile of the calling block, the pair's last ones (which see most) first; false where the pair has fewer.
template <int E>
DEVICE bool find_work(TileWork& out, const Problem& problem, const uint32_t* spans) {
    const typename Config<E>::Cut cut{Config<E>::BLOCK_M / problem.packing.heads};
    const int pair = int(blockIdx.y), group = int(blockIdx.x);
    int tile = int(blockIdx.z);
    for (int index = kSequences - 1; index >= 0; --index) {
        const CausalSequence sequence = cut.sequence(spans, kSequences * pair + index);
        const int tiles = cut.tiles(sequence);
        if (tile >= tiles) {
            tile -= tiles;
            continue;
        }
        out.sequence = sequence;
        out.first_token = (tiles - 1 - tile) * cut.tile_tokens;
        const int tokens = min(cut.tile_tokens, sequence.length - out.first_token);
        out.first_row = sequence.first_row + out.first_token;
        out.last_row = out.first_row + tokens;
        out.first_head = group * problem.packing.heads;
        out.kv_head = out.first_head / (problem.heads / problem.kv_heads);
        out.last_slot = sequence.own_slot + out.first_token + tokens - 1;
        return true;
    }
    return false;
}

// ---- copies

// Copies the tile's packed rows; those without a token become zeros.
template <int E>
DEVICE void load_queries(uint32_t tile, const Problem& problem, const TileWork& work) {
    constexpr int kChunks = E / kChunkValues;
#pragma unroll
    for (int i = 0; i < Config<E>::BLOCK_M * kChunks / kThreads; ++i) {
        const int index = int(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
        const int token = problem.packing.token(row), head = work.first_head + row - token * problem.packing.heads;
        const bool valid = work.first_row + token < work.last_row;
        const int64_t source_row = valid ? work.first_row + token : work.first_row;
        cp_async_16(tile_address<E>(tile, row, chunk),
                    problem.qkv + source_row * problem.stride + head * E + chunk * kChunkValues, valid);
    }
}

// Copies the keys (or values, by `column`) of slots first ..; those past the tile's last slot become zeros.
template <int E>
DEVICE void load_slots(uint32_t tile, const Problem& problem, const TileWork& work, int first, int column) {
    constexpr int kChunks = E / kChunkValues;
    // Two at a time: with all addresses at once, the accumulators of E = 128 would spill.
#pragma unroll 2
    for (int i = 0; i < Config<E>::BLOCK_N * kChunks / kThreads; ++i) {
        const int index = int(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
        const bool valid = first + row <= work.last_slot;
        const int64_t source_row = work.sequence.row_of(valid ? first + row : work.last_slot);
        cp_async_16(tile_address<E>(tile, row, chunk),
                    problem.qkv + source_row * problem.stride + column + chunk * kChunkValues, valid);
    }
}

// Key and value tiles of the blocks, from the last one backwards, through a ring: keys, values, keys, values, ..
template <int E>
struct TileRing {
    using C = Config<E>;
    const Problem& problem;
    const TileWork& work;
    uint32_t tiles;  // shared address
    int blocks;
    int started = 0, start_slot = 0, use_slot = 0;

    // The next tile, if there is one; a group of its own in any case, so that waits can count.
    DEVICE void start() {
        const int block = blocks - 1 - started / 2, kind = started % 2;
        if (block >= 0) {
            const int column = (problem.heads + work.kv_head + kind * problem.kv_heads) * E;
            load_slots<E>(tiles + uint32_t(start_slot * kTileBytes<C::BLOCK_N, E>), problem, work, block * C::BLOCK_N,
                          column);
        }
        cp_async_commit();
        ++started;
        start_slot = start_slot + 1 == C::kRing ? 0 : start_slot + 1;
    }

    // Waits for the tile after the one that the last call gave, whose place is filled again.
    DEVICE uint32_t next() {
        cp_async_wait<C::kRing - 2>();
        __syncthreads();
        start();
        const uint32_t tile = tiles + uint32_t(use_slot * kTileBytes<C::BLOCK_N, E>);
        use_slot = use_slot + 1 == C::kRing ? 0 : use_slot + 1;
        return tile;
    }
};

// ---- a warp's rows

template <int kCount>
DEVICE float (&quad(float (&values)[kCount], int index))[4] {
    return *reinterpret_cast<float (*)[4]>(&values[4 * index]);
}

template <int E>
struct WarpRows {
    using C = Config<E>;
    static constexpr int BLOCK_N = C::BLOCK_N;
    float scores[C::kRowTiles][BLOCK_N / 2];
    float out[C::kRowTiles][E / 2];
    uint32_t queries[C::kQueriesInRegisters ? E / 16 : 1][C::kRowTiles][4];
    OnlineSoftmax softmax[C::kRowTiles];
    uint32_t query_tile;  // shared address
    int row;              // first of the tile's rows

    DEVICE WarpRows(uint32_t query_tile) : query_tile(query_tile), row(int(threadIdx.x) / 32 * C::kWarpRows) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
            for (int i = 0; i < E / 2; ++i) out[m][i] = 0.0f;
    }

    DEVICE void load_queries(int slot, int step) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) load_a<E>(queries[slot][m], query_tile, row + m * kMmaRows, step);
    }

    // Call once the queries have arrived.
    DEVICE void keep_queries() {
        if constexpr (C::kQueriesInRegisters) {
#pragma unroll
            for (int step = 0; step < E / 16; ++step) load_queries(step, step);
        }
    }

    // scores = queries * keys^T.
    DEVICE void score(uint32_t keys) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) scores[m][i] = 0.0f;
#pragma unroll
        for (int step = 0; step < E / 16; ++step) {
            const int slot = C::kQueriesInRegisters ? step : 0;
            if constexpr (!C::kQueriesInRegisters) load_queries(0, step);
#pragma unroll
            for (int n = 0; n < BLOCK_N / 8; n += 2) {
                uint32_t b[2][2];
                load_b_transposed<E>(b, keys, n * 8, step);
#pragma unroll
                for (int m = 0; m < C::kRowTiles; ++m) {
                    mma_m16n8k16(quad(scores[m], n), queries[slot][m], b[0]);
                    mma_m16n8k16(quad(scores[m], n + 1), queries[slot][m], b[1]);
                }
            }
        }
    }

    // Hides the keys after each row's own; needed only in blocks that reach past the warp's first row.
    DEVICE void mask(const HeadPacking& packing, int first_slot, int block_first) {
        if (block_first + BLOCK_N - 1 <= first_slot + packing.token(row)) return;
        const int lane = int(lane_id());
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int own = first_slot + packing.token(row + m * kMmaRows + lane / 4 + 8 * half);
                const int limit = own - block_first - lane % 4 * 2;
                mask_scores(scores[m], half, [=](int column) { return column > limit; });
            }
        }
    }

    DEVICE void update_softmax(float scale_log2) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
            float rescale[2];
            softmax[m].update(scores[m], scale_log2, rescale);
#pragma unroll
            for (int i = 0; i < E / 2; ++i) out[m][i] *= rescale[i / 2 % 2];
        }
    }

    // out += weights * values; the scores hold the weights.
    DEVICE void accumulate(uint32_t values) {
#pragma unroll
        for (int k = 0; k < BLOCK_N / 8; k += 2) {
            uint32_t a[C::kRowTiles][4];
#pragma unroll
            for (int m = 0; m < C::kRowTiles; ++m) {
                accumulators_to_a(a[m], quad(scores[m], k), quad(scores[m], k + 1));
            }
#pragma unroll
            for (int step = 0; step < E / 16; ++step) {
                uint32_t b[2][2];
                load_b<E>(b, values, k * 8, step);
#pragma unroll
                for (int m = 0; m < C::kRowTiles; ++m) {
                    mma_m16n8k16(quad(out[m], 2 * step), a[m], b[0]);
                    mma_m16n8k16(quad(out[m], 2 * step + 1), a[m], b[1]);
                }
            }
        }
    }

    // Output, divided by the sums, through the warp's own queries in shared memory, so that a store covers whole lines.
    DEVICE void store(bf16* out_rows, float* lse, const Problem& problem, const TileWork& work) {
        const int lane = int(lane_id());
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
            softmax[m].finish();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float factor = 1.0f / softmax[m].sum[half];
                const int staged = row + m * kMmaRows + lane / 4 + 8 * half;
#pragma unroll
                for (int n = 0; n < E / 8; ++n) {
                    const float* values = &out[m][4 * n + 2 * half];
                    store_shared_32(tile_address<E>(query_tile, staged, n) + uint32_t(lane) % 4 * 4,
                                    pack_bf16x2(values[0] * factor, values[1] * factor));
                }
                const int64_t to = problem.packing.position(staged, work.first_row, work.last_row, work.first_head);
                if (lane % 4 == 0 && to >= 0) lse[to] = softmax[m].lse(half, problem.scale_log2);
            }
        }
        __syncwarp();
        constexpr int kRowChunks = E / kChunkValues;
#pragma unroll
        for (int i = 0; i < C::kWarpRows * kRowChunks / 32; ++i) {
            const int staged = row + (i * 32 + lane) / kRowChunks, chunk = (i * 32 + lane) % kRowChunks;
            const int64_t to = problem.packing.position(staged, work.first_row, work.last_row, work.first_head);
            if (to < 0) continue;
            store_128(out_rows + to * E + chunk * kChunkValues,
                      load_shared_128(tile_address<E>(query_tile, staged, chunk)));
        }
    }
};

template <int E>
__global__ void __launch_bounds__(kThreads, Config<E>::kBlocks)
    attention_forward_kernel(bf16* out, float* lse, Problem problem, const uint32_t* spans) {
    using C = Config<E>;
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    TileWork work;
    if (!find_work<E>(work, problem, spans)) return;

    // The queries travel in the first tile's group.
    load_queries<E>(shared, problem, work);
    TileRing<E> ring{problem, work, shared + kTileBytes<C::BLOCK_M, E>, C::Cut::blocks(work.last_slot)};
    for (int i = 0; i < C::kRing - 1; ++i) ring.start();

    WarpRows<E> rows(shared);
    const int first_slot = work.sequence.own_slot + work.first_token;
    // Rows past the sequence's end see what its last row sees.
    const int last_token = problem.packing.token(rows.row + C::kWarpRows - 1);
    const int warp_blocks = C::Cut::blocks(min(first_slot + last_token, work.last_slot));
    for (int block = ring.blocks - 1; block >= 0; --block) {
        const bool visible = block < warp_blocks;
        const uint32_t keys = ring.next();
        if (block == ring.blocks - 1) rows.keep_queries();
        if (visible) {
            rows.score(keys);
            rows.mask(problem.packing, first_slot, block * C::BLOCK_N);
            rows.update_softmax(problem.scale_log2);
        }
        const uint32_t values = ring.next();
        if (visible) rows.accumulate(values);
    }
    rows.store(out, lse, problem, work);
}

template <int E>
int launch(bf16* out, float* lse, const Problem& problem, const uint32_t* spans, const uint32_t* host_spans, int pairs,
           cudaStream_t stream) {
    const typename Config<E>::Cut cut{Config<E>::BLOCK_M / problem.packing.heads};
    int tiles = 0;
    for (int pair = 0; pair < pairs; ++pair) {
        const int count = cut.tiles(cut.sequence(host_spans, kSequences * pair)) +
                          cut.tiles(cut.sequence(host_spans, kSequences * pair + 1));
        tiles = count > tiles ? count : tiles;
    }
    if (tiles == 0) return 0;
    // Blocks start in the order of their index, x fastest: the longest tiles of all pairs first.
    const dim3 grid(unsigned(problem.packing.groups), unsigned(pairs), unsigned(tiles));
    return LAUNCH(attention_forward_kernel<E>, grid, dim3(kThreads), Config<E>::kSharedBytes, stream, out, lse, problem,
                  spans);
}

}  // namespace

extern "C" mmpo_status MMPO_EXPORT(attention_forward)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv,
                                                      const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                      int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                      float scale, mmpo_stream stream) {
    if (rows == 0 || pairs == 0 || heads == 0) return 0;
    // The softmax works on unscaled scores, so their order must be that of the scaled ones.
    if (!(scale > 0.0f)) return 1;
    const int64_t stride = int64_t(heads + 2 * kv_heads) * head_size;
    const Problem problem{qkv, stride, heads, kv_heads, head_packing(heads, kv_heads), scale * kLog2E};
    switch (head_size) {
        case 64:
            return launch<64>(out, lse, problem, spans, host_spans, pairs, stream);
        case 128:
            return launch<128>(out, lse, problem, spans, host_spans, pairs, stream);
        default:
            return 1;
    }
}
