// What the attention kernels share: which rows a tile holds and sees, tiles in shared memory for mma.sync, and their
// fragments.
//
// A span of spans[pairs, 4] is start, P, C, R: the rows `prompt | chosen | rejected` of one pair. A row sees its prompt
// and the rows of its own part up to itself. So a prompt or chosen row sees one range, every row of its pair up to
// itself. A rejected row sees two: the prompt, and its own part up to itself.
#pragma once

#include "device.cuh"
#include "limits.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// What one cp.async copies, and one ldmatrix reads of a matrix row: 16 bytes, or 8 bf16 values.
constexpr int kChunkBytes = 16;
constexpr int kChunkValues = 8;
// Rows of one mma.
constexpr int kMmaRows = 16;

struct Span {
    int start, prompt, chosen, rejected;
};

DEVICE Span load_span(const uint32_t* spans, int pair) {
    const uint32_t* row = spans + 4 * int64_t(pair);
    return {int(row[0]), int(row[1]), int(row[2]), int(row[3])};
}

// The rows of a pair as two causal sequences: `prompt | chosen`, which sees only itself, and `rejected`, which also
// sees the prompt. Tiles are cut within a sequence, so prompt and chosen rows may share a tile.
constexpr int kSequences = 2;

// Rows [first, last) of one sequence of a pair.
struct RowTile {
    int first, last;
    int sequence_first, sequence_last;
    bool rejected;
};

// Finds tile number `tile` of a pair, in tiles of `rows` rows. Tiles are counted through the pair's sequences, and none
// reaches across their boundary. False after the pair's last tile.
DEVICE bool find_row_tile(RowTile& out, const Span& span, int tile, int rows) {
    int first = span.start;
    const int lengths[kSequences] = {span.prompt + span.chosen, span.rejected};
#pragma unroll
    for (int sequence = 0; sequence < kSequences; ++sequence) {
        const int tiles = (lengths[sequence] + rows - 1) / rows;
        if (tile < tiles) {
            out.sequence_first = first;
            out.sequence_last = first + lengths[sequence];
            out.first = first + tile * rows;
            out.last = min(out.first + rows, out.sequence_last);
            out.rejected = sequence == 1;
            return true;
        }
        tile -= tiles;
        first += lengths[sequence];
    }
    return false;
}

// The most tiles of `rows` rows that any pair of the host's table has: the first dimension of a grid.
inline int most_row_tiles(const uint32_t* host_spans, int pairs, int rows) {
    int most = 0;
    for (int pair = 0; pair < pairs; ++pair) {
        const uint32_t* span = host_spans + 4 * int64_t(pair);
        const int lengths[kSequences] = {int(span[1] + span[2]), int(span[3])};
        int tiles = 0;
        for (const int length : lengths) tiles += (length + rows - 1) / rows;
        most = tiles > most ? tiles : most;
    }
    return most;
}

// ---- tiles in shared memory

// ROWS rows of E bf16 values. The 16-byte chunks of a row are exchanged by the row's low three bits, so that the eight
// rows that ldmatrix reads at once fall into eight different groups of banks.
template <int ROWS, int E>
struct SharedTile {
    static constexpr int kBytes = ROWS * E * 2;

    uint32_t base;  // shared address, a multiple of a row's bytes

    DEVICE uint32_t address(int row, int chunk) const {
        return base + uint32_t(row) * (E * 2) + uint32_t(chunk ^ (row & 7)) * kChunkBytes;
    }
};

// Starts copying rows first .. first + ROWS of a matrix with `stride` values per row. Rows from `limit` on become
// zeros.
template <int THREADS, int ROWS, int E>
DEVICE void load_tile_async(SharedTile<ROWS, E> tile, const bf16* source, int64_t stride, int first, int limit) {
    constexpr int kChunks = E / kChunkValues;
    static_assert(ROWS * kChunks % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * kChunks / THREADS; ++i) {
        const int index = int(threadIdx.x) + i * THREADS;
        const int row = index / kChunks, chunk = index % kChunks;
        const bool valid = first + row < limit;
        const int64_t source_row = valid ? first + row : first;
        cp_async_16(tile.address(row, chunk), source + source_row * stride + chunk * kChunkValues, valid);
    }
}

// What to xor to the address of a row's chunk 0 or 1 for the address of chunk 2 * step or the one after it. This works
// because chunks are exchanged by xor, and it lets one register hold a lane's address for every step.
DEVICE uint32_t depth_offset(int step) { return uint32_t(2 * step * kChunkBytes); }

// Loads A[16, 16]: the tile's rows from `row` on, its columns from 16 * step on.
template <int ROWS, int E>
DEVICE void load_a(uint32_t (&a)[4], SharedTile<ROWS, E> tile, int row, int step) {
    const int lane = int(lane_id());
    ldmatrix_x4(a, tile.address(row + lane % 16, lane / 16) ^ depth_offset(step));
}

// Loads two B[16, 8] for a gemm with the tile's transpose: their columns are 16 rows of the tile from `row` on, their
// depth is its columns from 16 * step on.
template <int ROWS, int E>
DEVICE void load_b_transposed(uint32_t (&b)[2][2], SharedTile<ROWS, E> tile, int row, int step) {
    const int lane = int(lane_id());
    uint32_t r[4];
    ldmatrix_x4(r, tile.address(row + lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ depth_offset(step));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// Loads two B[16, 8] for a gemm with the tile itself: their depth is 16 rows of the tile from `row` on, their columns
// are its columns from 16 * step on.
template <int ROWS, int E>
DEVICE void load_b(uint32_t (&b)[2][2], SharedTile<ROWS, E> tile, int row, int step) {
    const int lane = int(lane_id());
    uint32_t r[4];
    ldmatrix_x4_trans(r, tile.address(row + lane % 16, lane / 16) ^ depth_offset(step));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// ---- gemms of one warp
//
// Accumulators c[columns / 8][4] of 16 rows: a lane holds rows lane / 4 and lane / 4 + 8, and of each group of eight
// columns 2 * (lane % 4) and the next one.

// c[16, 8 * NT] += a_tile[row .., E] * b_tile^T, where b_tile has 8 * NT rows.
template <int E, int NT, int A_ROWS, int B_ROWS>
DEVICE void multiply_transposed(float (&c)[NT][4], SharedTile<A_ROWS, E> a_tile, int row,
                                SharedTile<B_ROWS, E> b_tile) {
#pragma unroll
    for (int step = 0; step < E / 16; ++step) {
        uint32_t a[4];
        load_a(a, a_tile, row, step);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t b[2][2];
            load_b_transposed(b, b_tile, n * 8, step);
            mma_m16n8k16(c[n], a, b[0]);
            mma_m16n8k16(c[n + 1], a, b[1]);
        }
    }
}

// Makes the A operand of the next gemm from the accumulators of 16 columns, rounded to bf16.
DEVICE void accumulators_to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_bf16x2(left[0], left[1]);
    a[1] = pack_bf16x2(left[2], left[3]);
    a[2] = pack_bf16x2(right[0], right[1]);
    a[3] = pack_bf16x2(right[2], right[3]);
}

// c[16, E] += p[16, 8 * KT] * b_tile, where b_tile has 8 * KT rows.
template <int E, int KT, int ROWS>
DEVICE void multiply_from_accumulators(float (&c)[E / 8][4], const float (&p)[KT][4], SharedTile<ROWS, E> b_tile) {
#pragma unroll
    for (int k = 0; k < KT; k += 2) {
        uint32_t a[4];
        accumulators_to_a(a, p[k], p[k + 1]);
#pragma unroll
        for (int step = 0; step < E / 16; ++step) {
            uint32_t b[2][2];
            load_b(b, b_tile, k * 8, step);
            mma_m16n8k16(c[2 * step], a, b[0]);
            mma_m16n8k16(c[2 * step + 1], a, b[1]);
        }
    }
}

template <int NT>
DEVICE void clear(float (&c)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
}

// Stores the 16 rows of a warp's accumulators, times `factor`, to rows from `row` on of a matrix. Rows from `limit` on
// are dropped.
template <int E>
DEVICE void store_rows(bf16* out, int64_t stride, int row, int limit, const float (&c)[E / 8][4], float factor) {
    const int lane = int(lane_id());
    const int top = row + lane / 4, bottom = top + 8;
#pragma unroll
    for (int n = 0; n < E / 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        if (top < limit) {
            *reinterpret_cast<uint32_t*>(out + top * stride + column) = pack_bf16x2(c[n][0] * factor, c[n][1] * factor);
        }
        if (bottom < limit) {
            *reinterpret_cast<uint32_t*>(out + bottom * stride + column) =
                pack_bf16x2(c[n][2] * factor, c[n][3] * factor);
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
