// What both attention backward kernels share: the tiles of queries that see a tile of keys, the order in which a row of
// dQ receives its terms, and the small kernels before and after the main one.
//
//   prepare  forms delta[T, H] = row sums of dout * out, and lse in base 2, tile by tile; sets turns (or sums) to zero;
//            lists the key tiles
//   main     a block owns a tile of keys of one key/value head and forms S, dP, dV, dK and its term of dQ (5 gemms)
//   finish   rounds dQ's f32 sums to bf16
//
// Query heads that share keys share tiles: row r of a tile of queries is token r / packed, head r % packed. Such a
// group of heads is a pack. dK and dV need the sum over the heads anyway, and a short response fills its tiles.
//
// The order of dQ. Blocks that own different keys add to the same rows of dQ, and an f32 sum depends on the order of
// its terms. So each (tile of queries, pack) has a counter of turns. The tile of keys on the diagonal assigns its term,
// then its neighbour towards the first key adds, and so on. Rejected queries then take the prompt's tiles, again
// descending. A block walks its queries upwards from its own diagonal, so at any moment the blocks of one sequence are
// at tiles of queries that are a few apart, and the block that another one waits for has already been at the tile.
// (With an ascending order all blocks would wait for the first one at every step.) Blocks take tiles of keys by
// tickets, in an order in which each waits only for earlier tickets, so a block never waits for one that has not
// started.
//
// The cost of that order is measured against kernels in which blocks add as they come (AnyOrder); nothing else differs.
#pragma once

#include "attention_mask.cuh"
#include "attention_tiles.cuh"
#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// dQ receives its terms in turns: the same bits every time.
struct FixedOrder {
    static constexpr bool kTurns = true;
};

// dQ receives its terms as blocks come to them, into sums that prepare has cleared.
struct AnyOrder {
    static constexpr bool kTurns = false;
};

struct BackwardProblem {
    bf16* dqkv;
    const bf16* dout;
    const bf16* out;
    const float* lse;
    const bf16* qkv;
    const uint32_t* spans;
    int pairs, rows, heads, kv_heads, head_size;
    float scale;
    HeadPacking packing;
    int tile_tokens;  // of a tile of queries: BLOCK_M / packing.heads

    // Packs that share a key/value head.
    HOST_DEVICE int packs() const { return packing.groups / kv_heads; }
    HOST_DEVICE int64_t stride() const { return int64_t(heads + 2 * kv_heads) * head_size; }
    HOST_DEVICE int64_t out_stride() const { return int64_t(heads) * head_size; }
    HOST_DEVICE int query_column(int head) const { return head * head_size; }
    HOST_DEVICE int key_column(int kv_head) const { return (heads + kv_head) * head_size; }
    HOST_DEVICE int value_column(int kv_head) const { return key_column(kv_heads + kv_head); }
};

// The problem of a launcher with these arguments, in tiles of block_m packed rows.
inline BackwardProblem backward_problem(bf16* dqkv, const bf16* dout, const bf16* out, const float* lse,
                                        const bf16* qkv, const uint32_t* spans, int pairs, int rows, int heads,
                                        int kv_heads, int head_size, float scale, int block_m) {
    BackwardProblem problem{};
    problem.dqkv = dqkv;
    problem.dout = dout;
    problem.out = out;
    problem.lse = lse;
    problem.qkv = qkv;
    problem.spans = spans;
    problem.pairs = pairs;
    problem.rows = rows;
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.head_size = head_size;
    problem.scale = scale;
    problem.packing = pack_heads(heads, kv_heads, block_m);
    problem.tile_tokens = block_m / problem.packing.heads;
    return problem;
}

// A tile of keys for a block to own; `tile` is its number as find_row_tile counts. Includes the span: loading it
// separately would add another dependent load at block start, which no other resident block can hide.
struct alignas(16) KeyTileEntry {
    Span span;
    uint32_t pair, tile;
};

// ---- numbers of tiles
//
// Tile t of a sequence gets the number (first row of the sequence) / (rows of a tile) + (index of the sequence) + t.
// Numbers are unique, need no table, and skip at most two for each pair.

constexpr int64_t tile_numbers(int64_t rows, int64_t pairs, int64_t tile_rows) {
    return rows / tile_rows + kSequences * pairs;
}

// The number of a sequence's first tile.
DEVICE int tile_number(int sequence_first, int pair, bool rejected, int tile_rows) {
    return sequence_first / tile_rows + kSequences * pair + int(rejected);
}

// The number of tiles of `rows` rows in all pairs of the host's table.
inline int64_t all_row_tiles(const uint32_t* host_spans, int pairs, int rows) {
    int64_t tiles = 0;
    for (int pair = 0; pair < pairs; ++pair) {
        const uint32_t* span = host_spans + 4 * int64_t(pair);
        tiles += ceil_div(int64_t(span[1]) + span[2], rows) + ceil_div(span[3], rows);
    }
    return tiles;
}

// The workspace of a backward pass with tiles of BLOCK_M queries and BLOCK_N keys. An entry is a (tile of queries,
// pack).
struct BackwardWorkspace {
    float* dq;              // [entries, BLOCK_M * E] in fragments: see dq_fragment
    float* statistics;      // [entries, 2, BLOCK_M]: lse in base 2, then delta
    uint32_t* turns;        // [entries]
    uint32_t* next_ticket;  // [1]
    KeyTileEntry* key_tiles;

    static int64_t bytes(int64_t rows, int64_t pairs, int heads, int kv_heads, int head_size, int block_m,
                         int block_n) {
        const HeadPacking packing = pack_heads(heads, kv_heads, block_m);
        const int64_t entries = tile_numbers(rows, pairs, block_m / packing.heads) * packing.groups;
        return entries * block_m * (head_size + 2) * int64_t(sizeof(float)) + ceil_div(entries + 1, 4) * 16 +
               tile_numbers(rows, pairs, block_n) * int64_t(sizeof(KeyTileEntry));
    }

    BackwardWorkspace(void* start, const BackwardProblem& problem, int block_m) {
        const int64_t entries = tile_numbers(problem.rows, problem.pairs, problem.tile_tokens) * problem.packing.groups;
        dq = static_cast<float*>(start);
        statistics = dq + entries * block_m * problem.head_size;
        turns = reinterpret_cast<uint32_t*>(statistics + entries * block_m * 2);
        next_ticket = turns + entries;
        key_tiles = reinterpret_cast<KeyTileEntry*>(turns + ceil_div(entries + 1, 4) * 4);
    }
};

// ---- the queries that see a tile of keys

// One step of a block's walk: a tile of queries that see some of its keys.
struct QueryTile {
    int first;      // first token; the tile ends early where its sequence does
    int number;     // see tile_number
    uint32_t turn;  // of this block at the tile's rows of dQ
    // Some query sees each of the block's first `keys` keys, and none sees a later one. Gemms leave those out.
    int keys;
    // Whether these are rejected queries on the prompt's keys. Such queries see all of the first `keys` keys.
    bool rejected_on_prompt;
    // Whether a boundary of the mask runs through keys x queries.
    bool crosses;
};

// The tiles of queries that see a tile of keys: first those of its own sequence, ascending from the diagonal; then, for
// keys of the prompt, those of the rejected response. A tile that holds only chosen keys has none of the latter.
template <int BLOCK_N>
struct QueryWalk {
    int steps;
    int tokens, packed;   // of a tile of queries: its tokens, and the rows of each token
    int first_key, keys;  // of the tile of keys
    int prompt_keys;      // how many of its keys are the prompt's
    int own_first, own_number, own_steps, own_last;
    int rejected_first, rejected_number, rejected_last;
    int key_tile, prompt_tiles;  // the tile's place in its sequence, and tiles that hold prompt keys

    DEVICE QueryWalk(const Span& span, int pair, const RowTile& tile, int tile_tokens, int packed_heads) {
        tokens = tile_tokens;
        packed = packed_heads;
        first_key = tile.first;
        keys = tile.last - tile.first;
        key_tile = (tile.first - tile.sequence_first) / BLOCK_N;
        prompt_tiles = (span.prompt + BLOCK_N - 1) / BLOCK_N;
        prompt_keys = tile.rejected ? 0 : min(keys, span.start + span.prompt - tile.first);
        const int diagonal = (tile.first - tile.sequence_first) / tokens;
        own_first = tile.sequence_first + diagonal * tokens;
        own_last = tile.sequence_last;
        own_number = tile_number(tile.sequence_first, pair, tile.rejected, tokens) + diagonal;
        own_steps = (own_last - own_first + tokens - 1) / tokens;
        rejected_first = span.start + span.prompt + span.chosen;
        rejected_last = rejected_first + span.rejected;
        rejected_number = tile_number(rejected_first, pair, true, tokens);
        steps = own_steps + (prompt_keys > 0 ? (span.rejected + tokens - 1) / tokens : 0);
    }

    DEVICE QueryTile tile(int step) const {
        if (step < own_steps) return own_tile(step);
        return rejected_tile(step - own_steps);
    }

    // The first row of a tile that sees the `key`-th key of the block; all rows after it do too. (Rows past the
    // sequence's end also count as seeing the key; their infinite lse zeroes their weights.)
    DEVICE int first_seeing(const QueryTile& tile, int key) const {
        if (key >= tile.keys) return tokens * packed;
        return tile.rejected_on_prompt ? 0 : (first_key + key - tile.first) * packed;
    }

private:
    // Tile number `index` of its own sequence, from the diagonal on.
    DEVICE QueryTile own_tile(int index) const {
        const int first = own_first + index * tokens, last = min(first + tokens, own_last);
        QueryTile tile;
        tile.first = first;
        tile.number = own_number + index;
        tile.turn = uint32_t((last - 1 - first_key) / BLOCK_N);
        tile.keys = min(keys, last - first_key);
        tile.rejected_on_prompt = false;
        tile.crosses = first < first_key + BLOCK_N - 1;
        return tile;
    }

    // Tile number `index` of the rejected response, for keys of the prompt.
    DEVICE QueryTile rejected_tile(int index) const {
        const int first = rejected_first + index * tokens, last = min(first + tokens, rejected_last);
        const int own_terms = (last - 1 - rejected_first) / BLOCK_N + 1;
        QueryTile tile;
        tile.first = first;
        tile.number = rejected_number + index;
        tile.turn = uint32_t(own_terms + prompt_tiles - 1 - key_tile);
        tile.keys = prompt_keys;
        tile.rejected_on_prompt = true;
        tile.crosses = prompt_keys < BLOCK_N;
        return tile;
    }
};

// ---- tickets

// What a block works on.
struct OwnedKeys {
    int pair, kv_head;
    Span span;
    RowTile keys;
};

// Takes the next tile of keys. All threads of a block call this; `ticket` is one word of shared memory. The key/value
// heads of a tile have neighbouring tickets, so blocks of one head that wait for one another start kv_heads tickets
// apart.
template <int BLOCK_N>
DEVICE OwnedKeys take_keys(const BackwardProblem& problem, const BackwardWorkspace& workspace, uint32_t* ticket) {
    if (threadIdx.x == 0) *ticket = atomicAdd(workspace.next_ticket, 1u);
    __syncthreads();
    const int taken = int(*ticket);
    const KeyTileEntry entry = workspace.key_tiles[taken / problem.kv_heads];
    OwnedKeys owned{int(entry.pair), taken % problem.kv_heads, entry.span, {}};
    find_row_tile(owned.keys, owned.span, int(entry.tile), BLOCK_N);
    return owned;
}

// ---- fragments

// Where a lane's four f32 of a 16 x 8 part of dQ lie in its tile, in the order in which mma and wgmma leave
// accumulators. The parts of a row group are neighbours, and a warp moves one part as 512 contiguous bytes.
template <int E>
DEVICE int dq_fragment(int row_group, int column_group) {
    return ((row_group * (E / 8) + column_group) * 32 + int(lane_id())) * 4;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo

// ---- small kernels
//
// They have no external linkage, because two files compile them for different targets. (nvcc handles only one anonymous
// namespace per file.)
namespace {

constexpr int kGradientThreads = 256;

// The sum over the block of one value per thread. All threads call it; `partials` holds a word for each warp.
DEVICE uint32_t block_sum(uint32_t value, uint32_t* partials) {
    value = __reduce_add_sync(0xffffffffu, value);
    if (lane_id() == 0) partials[threadIdx.x / 32] = value;
    __syncthreads();
    uint32_t sum = 0;
    for (int warp = 0; warp < kGradientThreads / 32; ++warp) sum += partials[warp];
    return sum;
}

// Lists the key tiles of one pair after those of all longer pairs, so that no long pair begins when the others are
// done. Within a pair the rejected response's tiles come first, descending, then those of prompt and chosen,
// descending. This is the order in which dQ receives their terms.
template <int BLOCK_N>
DEVICE void list_key_tiles(KeyTileEntry* key_tiles, const uint32_t* spans, int pairs, int pair, uint32_t* partials) {
    const auto tiles_of = [](const Span& span) {
        return uint32_t((span.prompt + span.chosen + BLOCK_N - 1) / BLOCK_N + (span.rejected + BLOCK_N - 1) / BLOCK_N);
    };
    const auto length_of = [](const Span& span) { return span.prompt + span.chosen + span.rejected; };
    const Span own = load_span(spans, pair);
    uint32_t before = 0;
    for (int i = int(threadIdx.x); i < pairs; i += kGradientThreads) {
        const Span other = load_span(spans, i);
        const int longer = length_of(other) - length_of(own);
        if (longer > 0 || (longer == 0 && i < pair)) before += tiles_of(other);
    }
    before = block_sum(before, partials);
    const uint32_t tiles = tiles_of(own);
    for (uint32_t i = threadIdx.x; i < tiles; i += kGradientThreads)
        key_tiles[before + i] = {own, uint32_t(pair), tiles - 1 - i};
}

// The tile of queries of a block whose grid is (tile of the pair, pack, pair).
struct PreparedTile {
    RowTile queries;
    int64_t entry;  // of the workspace
    int first_head;

    // False after the pair's last tile.
    DEVICE bool find(const BackwardProblem& problem) {
        const int pair = int(blockIdx.z), pack = int(blockIdx.y);
        if (!find_row_tile(queries, load_span(problem.spans, pair), int(blockIdx.x), problem.tile_tokens)) return false;
        const int number = tile_number(queries.sequence_first, pair, queries.rejected, problem.tile_tokens) +
                           (queries.first - queries.sequence_first) / problem.tile_tokens;
        entry = int64_t(number) * problem.packing.groups + pack;
        first_head = pack * problem.packing.heads;
        return true;
    }

    // Index in [T, H] of a row; -1 if it has no query.
    DEVICE int64_t position(const BackwardProblem& problem, int row) const {
        return problem.packing.position(row, queries.first, queries.last, first_head);
    }

    // Index in dqkv of a row of dQ; -1 if it has no query.
    DEVICE int64_t gradient(const BackwardProblem& problem, int row) const {
        const int offset = problem.packing.token(row), token = queries.first + offset;
        if (token >= queries.last) return -1;
        return token * problem.stride() + problem.query_column(first_head + row - offset * problem.packing.heads);
    }
};

// Sets the kValues f32 of a tile of dQ to zero.
template <int kValues>
DEVICE void clear_sums(float* sums) {
    constexpr int kOfThread = 4;  // values of a thread, 16 bytes
    static_assert(kValues % (kGradientThreads * kOfThread) == 0, "whole rounds of the block");
#pragma unroll
    for (int i = 0; i < kValues; i += kGradientThreads * kOfThread)
        store_128(sums + i + int(threadIdx.x) * kOfThread, make_uint4(0, 0, 0, 0));
}

template <int E, int BLOCK_M, int BLOCK_N, class Order>
__global__ void __launch_bounds__(kGradientThreads)
    attention_prepare_kernel(BackwardProblem problem, BackwardWorkspace workspace) {
    SHARED_ARRAY(uint32_t, partials, kGradientThreads / 32);
    const int pair = int(blockIdx.z);
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        if (pair == 0 && threadIdx.x == 0) *workspace.next_ticket = 0;
        list_key_tiles<BLOCK_N>(workspace.key_tiles, problem.spans, problem.pairs, pair, partials);
    }
    PreparedTile tile;
    if (!tile.find(problem)) return;
    if constexpr (Order::kTurns) {
        if (threadIdx.x == 0) workspace.turns[tile.entry] = 0;
    } else {
        clear_sums<BLOCK_M * E>(workspace.dq + tile.entry * (BLOCK_M * E));
    }

    // kLanes lanes share a row, with 16 bytes each.
    constexpr int kLanes = E / kChunkValues, kRowsAtOnce = kGradientThreads / kLanes;
    float* statistics = workspace.statistics + tile.entry * 2 * BLOCK_M;
    const int lane = int(threadIdx.x) % kLanes;
#pragma unroll
    for (int first = 0; first < BLOCK_M; first += kRowsAtOnce) {
        const int row = first + int(threadIdx.x) / kLanes;
        const int64_t position = tile.position(problem, row), index = max(position, int64_t(0));
        const uint4 a = load_128(problem.dout + index * E + lane * kChunkValues);
        const uint4 b = load_128(problem.out + index * E + lane * kChunkValues);
        const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
        float delta = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            delta += low_bf16(left[i]) * low_bf16(right[i]) + high_bf16(left[i]) * high_bf16(right[i]);
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, offset);
        if (lane == 0 && row < BLOCK_M) {
            // A row without a query gets an infinite lse, which makes each of its probabilities exactly zero.
            statistics[row] = position >= 0 ? problem.lse[index] * kLog2E : INFINITY;
            statistics[BLOCK_M + row] = position >= 0 ? delta : 0.0f;
        }
    }
}

// The grid is prepare's. A warp writes 16 x 8 values of dQ at a time, and reads four such neighbours at once.
template <int E, int BLOCK_M>
__global__ void __launch_bounds__(kGradientThreads)
    attention_finish_kernel(BackwardProblem problem, BackwardWorkspace workspace) {
    constexpr int kAtOnce = 4, kColumnGroups = E / 8, kWarps = kGradientThreads / 32;
    constexpr int kBatches = BLOCK_M / 16 * kColumnGroups / kAtOnce;
    static_assert(kColumnGroups % kAtOnce == 0 && kBatches % kWarps == 0, "whole batches of one row group a warp");
    PreparedTile tile;
    if (!tile.find(problem)) return;
    const float* dq = workspace.dq + tile.entry * (BLOCK_M * E);
    const int lane = int(lane_id());
#pragma unroll
    for (int batch = int(threadIdx.x) / 32; batch < kBatches; batch += kWarps) {
        const int row_group = batch * kAtOnce / kColumnGroups, column_group = batch * kAtOnce % kColumnGroups;
        uint4 sums[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[i] = load_128(dq + dq_fragment<E>(row_group, column_group + i));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t at = tile.gradient(problem, row_group * 16 + lane / 4 + 8 * half);
            if (at < 0) continue;
            bf16* to = problem.dqkv + at + column_group * 8 + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const float left = __uint_as_float(half == 0 ? sums[i].x : sums[i].z);
                const float right = __uint_as_float(half == 0 ? sums[i].y : sums[i].w);
                *reinterpret_cast<uint32_t*>(to + i * 8) = pack_bf16x2(left * problem.scale, right * problem.scale);
            }
        }
    }
}

// One block for each tile of queries and pack.
inline dim3 query_tile_grid(const BackwardProblem& problem, const uint32_t* host_spans) {
    return dim3(unsigned(most_row_tiles(host_spans, problem.pairs, problem.tile_tokens)),
                unsigned(problem.packing.groups), unsigned(problem.pairs));
}

template <int E, int BLOCK_M, int BLOCK_N, class Order>
mmpo_status launch_prepare(const BackwardProblem& problem, const BackwardWorkspace& workspace,
                           const uint32_t* host_spans, cudaStream_t stream) {
    return LAUNCH((attention_prepare_kernel<E, BLOCK_M, BLOCK_N, Order>), query_tile_grid(problem, host_spans),
                  dim3(kGradientThreads), 0, stream, problem, workspace);
}

template <int E, int BLOCK_M>
mmpo_status launch_finish(const BackwardProblem& problem, const BackwardWorkspace& workspace,
                          const uint32_t* host_spans, cudaStream_t stream) {
    return LAUNCH((attention_finish_kernel<E, BLOCK_M>), query_tile_grid(problem, host_spans), dim3(kGradientThreads),
                  0, stream, problem, workspace);
}

}  // namespace
