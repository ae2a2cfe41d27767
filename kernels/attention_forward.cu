// Flash attention forward for packed pairs `prompt | chosen | rejected` (Dao 2023, with a shared-prefix mask and packed
// query heads), for any GPU from sm_80 on. Hopper runs attention_forward_sm90.cu instead.
//
//   out[T, H * E] = softmax(scale * q k^T + mask) v        bf16, assigned
//   lse[T, H]     = logsumexp of the masked, scaled scores  f32, natural log, assigned
//
// q, k, v are columns of qkv[T, (H + 2K) * E]; query head h reads key/value head h / (H / K). A block has one tile of
// packed rows (tokens x the query heads that share a key/value head) and walks the key blocks that these rows see, from
// the diagonal backwards. Scores stay in registers; the softmax is online and in base 2. The tensor cores are used
// through mma.sync.
#include "common/attention_schedule.cuh"
#include "common/launch.cuh"
#include "common/online_softmax.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// How the work is cut.
struct ForwardTiles {
    int row_tiles;   // tiles of 16 rows that a warp has
    int block_n;     // keys of a block
    int ring_tiles;  // key or value tiles in shared memory: one in use, the others arriving
    int blocks;      // thread blocks that should share a multiprocessor

    constexpr int block_m() const { return kWarps * row_tiles * kMmaRows; }
    constexpr int shared_bytes(int head_size) const { return (block_m() + ring_tiles * block_n) * head_size * 2; }
};

// Each warp has two row tiles: an ldmatrix of 16 keys (4 cycles of shared memory) then feeds four mma (8 cycles of an
// A100's tensor cores). With one row tile, shared memory would be as busy as the tensor cores.
//
//   E = 64   registers       scores 64, output 64, queries 32, and about 60 more: two blocks of at most 255 fit
//            shared memory   queries 16, four tiles of 8: 48 KiB, two blocks even in the 100 KiB of sm_86
//   E = 128  registers       scores 64, output 128, queries from shared memory: two blocks of 255 fit
//            shared memory   queries 32, three tiles of 16: 80 KiB, two blocks in sm_80's 164 KiB, one in sm_86's 100
//
// A block has 64 keys. With 128 the scores would take twice the registers, and spill beside either output.
constexpr ForwardTiles forward_tiles(int head_size) {
    return head_size == 64 ? ForwardTiles{2, 64, 4, 2} : ForwardTiles{2, 64, 3, 2};
}

static_assert(forward_tiles(64).shared_bytes(64) <= kSharedLimit &&
                  forward_tiles(128).shared_bytes(128) <= kSharedLimit,
              "a block fits into every GPU");

// Rows for which query heads are packed: half a tile, as Hopper's kernel packs them.
constexpr int kPackingRows = 64;

// The constants of one head size.
template <int E>
struct Config {
    static constexpr ForwardTiles kTiles = forward_tiles(E);
    static constexpr int kRowTiles = kTiles.row_tiles;
    static constexpr int kWarpRows = kRowTiles * kMmaRows;
    static constexpr int BLOCK_M = kTiles.block_m();
    static constexpr int BLOCK_N = kTiles.block_n;
    static constexpr int kRing = kTiles.ring_tiles;
    static constexpr int kBlocks = kTiles.blocks;
    static constexpr bool kQueriesInRegisters = E == 64;

    // cp.async copies row by row, so no gap is needed where prompt and own keys meet.
    using Cut = TileCut<BLOCK_N, 1>;

    using Queries = SharedTile<BLOCK_M, E>;
    using Keys = SharedTile<BLOCK_N, E>;  // or values
};

// Where things lie in shared memory: queries, then the ring of key and value tiles.
template <int E>
struct Shared {
    using C = Config<E>;
    static constexpr int kRing = C::Queries::kBytes;
    static constexpr int kBytes = kRing + C::kRing * C::Keys::kBytes;
    static_assert(kBytes == C::kTiles.shared_bytes(E), "as planned");

    uint32_t base;

    DEVICE typename C::Queries queries() const { return {base}; }
    DEVICE typename C::Keys ring_tile(int stage) const { return {base + uint32_t(kRing + stage * C::Keys::kBytes)}; }
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
    int first_token;          // of the tile, counted in its sequence
    int first_row, last_row;  // the tile's tokens, as rows of the batch
    int first_head, kv_head;
    int last_slot;  // of the tile's last token
};

// Finds the tile of the calling block. A pair's last tiles, which see most keys, come first. False if the pair has
// fewer.
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

// Starts copying the tile's packed rows; rows without a token become zeros.
template <int E>
DEVICE void load_queries(typename Config<E>::Queries tile, const Problem& problem, const TileWork& work) {
    constexpr int kChunks = E / kChunkValues;
#pragma unroll
    for (int i = 0; i < Config<E>::BLOCK_M * kChunks / kThreads; ++i) {
        const int index = int(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
        const int token = problem.packing.token(row), head = work.first_head + row - token * problem.packing.heads;
        const bool valid = work.first_row + token < work.last_row;
        const int64_t source_row = valid ? work.first_row + token : work.first_row;
        cp_async_16(tile.address(row, chunk),
                    problem.qkv + source_row * problem.stride + head * E + chunk * kChunkValues, valid);
    }
}

// Starts copying the keys (or values, by `column`) of the slots from `first` on; those past the tile's last slot become
// zeros.
template <int E>
DEVICE void load_slots(typename Config<E>::Keys tile, const Problem& problem, const TileWork& work, int first,
                       int column) {
    constexpr int kChunks = E / kChunkValues;
    // Two rounds at a time: with all addresses at once, the accumulators of E = 128 would spill.
#pragma unroll 2
    for (int i = 0; i < Config<E>::BLOCK_N * kChunks / kThreads; ++i) {
        const int index = int(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
        const bool valid = first + row <= work.last_slot;
        const int64_t source_row = work.sequence.row_of(valid ? first + row : work.last_slot);
        cp_async_16(tile.address(row, chunk), problem.qkv + source_row * problem.stride + column + chunk * kChunkValues,
                    valid);
    }
}

// Streams the key and value tiles of the key blocks through a ring, from the last block backwards: keys, values, keys,
// values, ..
template <int E>
struct TileRing {
    using C = Config<E>;
    const Problem& problem;
    const TileWork& work;
    const Shared<E>& shared;
    int blocks;
    int started = 0, start_stage = 0, use_stage = 0;

    // Starts the next copy, if there is one. In any case it commits a group, so that waits can count groups.
    DEVICE void start() {
        const int block = blocks - 1 - started / 2, kind = started % 2;
        if (block >= 0) {
            const int column = (problem.heads + work.kv_head + kind * problem.kv_heads) * E;
            load_slots<E>(shared.ring_tile(start_stage), problem, work, block * C::BLOCK_N, column);
        }
        cp_async_commit();
        ++started;
        start_stage = start_stage + 1 == C::kRing ? 0 : start_stage + 1;
    }

    // Waits for the next tile and returns it. The place of the tile that the last call returned is filled again.
    DEVICE typename C::Keys next() {
        cp_async_wait<C::kRing - 2>();
        __syncthreads();
        start();
        const typename C::Keys tile = shared.ring_tile(use_stage);
        use_stage = use_stage + 1 == C::kRing ? 0 : use_stage + 1;
        return tile;
    }
};

// ---- a warp's rows

// Accumulators 4 * index .. 4 * index + 4, which one mma takes.
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
    // All queries as A operands, or those of one depth step.
    uint32_t queries[C::kQueriesInRegisters ? E / 16 : 1][C::kRowTiles][4];
    OnlineSoftmax softmax[C::kRowTiles];
    typename C::Queries query_tile;
    int row;  // the warp's first row in the tile

    DEVICE explicit WarpRows(typename C::Queries query_tile)
        : query_tile(query_tile), row(int(threadIdx.x) / 32 * C::kWarpRows) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
            for (int i = 0; i < E / 2; ++i) out[m][i] = 0.0f;
    }

    DEVICE void load_queries(int slot, int step) {
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) load_a(queries[slot][m], query_tile, row + m * kMmaRows, step);
    }

    // Call once the queries have arrived.
    DEVICE void keep_queries() {
        if constexpr (C::kQueriesInRegisters) {
#pragma unroll
            for (int step = 0; step < E / 16; ++step) load_queries(step, step);
        }
    }

    // scores = queries * keys^T.
    DEVICE void score(typename C::Keys keys) {
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
                load_b_transposed(b, keys, n * 8, step);
#pragma unroll
                for (int m = 0; m < C::kRowTiles; ++m) {
                    mma_m16n8k16(quad(scores[m], n), queries[slot][m], b[0]);
                    mma_m16n8k16(quad(scores[m], n + 1), queries[slot][m], b[1]);
                }
            }
        }
    }

    // Hides the keys after each row's own. Only blocks that reach past the warp's first row have such keys.
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
    DEVICE void accumulate(typename C::Keys values) {
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
                load_b(b, values, k * 8, step);
#pragma unroll
                for (int m = 0; m < C::kRowTiles; ++m) {
                    mma_m16n8k16(quad(out[m], 2 * step), a[m], b[0]);
                    mma_m16n8k16(quad(out[m], 2 * step + 1), a[m], b[1]);
                }
            }
        }
    }

    // Stores the output, divided by the sums. It goes through the warp's own queries in shared memory, so that a store
    // covers whole lines.
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
                    store_shared_32(query_tile.address(staged, n) + uint32_t(lane) % 4 * 4,
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
            store_128(out_rows + to * E + chunk * kChunkValues, load_shared_128(query_tile.address(staged, chunk)));
        }
    }
};

template <int E>
__global__ void __launch_bounds__(kThreads, Config<E>::kBlocks)
    attention_forward_kernel(bf16* out, float* lse, Problem problem, const uint32_t* spans) {
    using C = Config<E>;
    DYNAMIC_SHARED(raw);
    const Shared<E> shared{shared_address(raw)};
    TileWork work;
    if (!find_work<E>(work, problem, spans)) return;

    // The queries are part of the first tile's group of copies.
    load_queries<E>(shared.queries(), problem, work);
    TileRing<E> ring{problem, work, shared, C::Cut::blocks(work.last_slot)};
    for (int i = 0; i < C::kRing - 1; ++i) ring.start();

    WarpRows<E> rows(shared.queries());
    const int first_slot = work.sequence.own_slot + work.first_token;
    // Rows past the sequence's end see what its last row sees.
    const int last_token = problem.packing.token(rows.row + C::kWarpRows - 1);
    const int warp_blocks = C::Cut::blocks(min(first_slot + last_token, work.last_slot));
    for (int block = ring.blocks - 1; block >= 0; --block) {
        const bool visible = block < warp_blocks;
        const typename C::Keys keys = ring.next();
        if (block == ring.blocks - 1) rows.keep_queries();
        if (visible) {
            rows.score(keys);
            rows.mask(problem.packing, first_slot, block * C::BLOCK_N);
            rows.update_softmax(problem.scale_log2);
        }
        const typename C::Keys values = ring.next();
        if (visible) rows.accumulate(values);
    }
    rows.store(out, lse, problem, work);
}

template <int E>
mmpo_status launch(bf16* out, float* lse, const Problem& problem, const uint32_t* spans, const uint32_t* host_spans,
                   int pairs, cudaStream_t stream) {
    const typename Config<E>::Cut cut{Config<E>::BLOCK_M / problem.packing.heads};
    int tiles = 0;
    for (int pair = 0; pair < pairs; ++pair) {
        const int count = cut.tiles(cut.sequence(host_spans, kSequences * pair)) +
                          cut.tiles(cut.sequence(host_spans, kSequences * pair + 1));
        tiles = count > tiles ? count : tiles;
    }
    if (tiles == 0) return kSuccess;
    // Blocks start in the order of their index, x fastest, so the longest tiles of all pairs come first.
    const dim3 grid(unsigned(problem.packing.groups), unsigned(pairs), unsigned(tiles));
    return LAUNCH(attention_forward_kernel<E>, grid, dim3(kThreads), Shared<E>::kBytes, stream, out, lse, problem,
                  spans);
}

}  // namespace

extern "C" mmpo_status MMPO_EXPORT(attention_forward)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv,
                                                      const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                      int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                      float scale, mmpo_stream stream) {
    if (rows == 0 || pairs == 0 || heads == 0) return kSuccess;
    // The softmax compares unscaled scores, whose order must be that of the scaled ones.
    if (!(scale > 0.0f)) return kInvalidValue;
    Problem problem{};
    problem.qkv = qkv;
    problem.stride = int64_t(heads + 2 * kv_heads) * head_size;
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.packing = pack_heads(heads, kv_heads, kPackingRows);
    problem.scale_log2 = scale * kLog2E;
    switch (head_size) {
        case 64:
            return launch<64>(out, lse, problem, spans, host_spans, pairs, stream);
        case 128:
            return launch<128>(out, lse, problem, spans, host_spans, pairs, stream);
        default:
            return kInvalidValue;
    }
}
