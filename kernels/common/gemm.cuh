// Gemm on mma.sync: tile[M, N] = left[M, K] * right[K, N] with bf16 operands and f32 accumulators, then an epilogue.
//
// A block computes one tile. Slices of BLOCK_K along K pass through kStages buffers in shared memory: cp.async fills
// some while earlier ones are multiplied. An epilogue says what becomes of the finished tile. It is a small struct, of
// which every thread gets a copy, with
//
//   template <class C> void transform(Accumulators<C>&, TileOrigin, unsigned char* shared) const
//     Called by every thread after a barrier; it may use shared memory from C::kStagedBytes to C::kSharedBytes.
//   static constexpr bool kStores
//     Whether the tile, as `transform` leaves it, is written row by row through shared memory by
//   void store(int row, int column, float4 value) const
//     Columns column .. column + 4 of a row of `out`; values of columns past the last one have no meaning.
#pragma once

#include <type_traits>

#include "input_dropout.cuh"
#include "limits.cuh"
#include "low_rank_operands.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm {

constexpr int BLOCK_K = 64;
// Three slices of 128 x 64 of both operands are 96 KiB, just below kSharedLimit.
constexpr int kStages = 3;
// ldmatrix and cp.async move chunks of 16 bytes.
constexpr int kChunk = kVector;
// Rows of tiles that are walked together, so that the blocks running at one time share their right slices in L2.
constexpr int kTileGroup = 8;

// A warp computes 64 x 32 of `out`: 16 mma for 6 ldmatrix, and 64 accumulators per thread.
struct LargeTile {
    static constexpr int BLOCK_M = 128, BLOCK_N = 128, kWarpsM = 2, kWarpsN = 4;
};
// For a gemm that has too few large tiles to occupy the GPU.
struct SmallTile {
    static constexpr int BLOCK_M = 64, BLOCK_N = 64, kWarpsM = 2, kWarpsN = 2;
};
// For an `out` of up to 64 columns, or rows: the narrow operand is read half as often as by small tiles.
struct TallTile {
    static constexpr int BLOCK_M = 128, BLOCK_N = 64, kWarpsM = 2, kWarpsN = 2;
};
struct WideTile {
    static constexpr int BLOCK_M = 64, BLOCK_N = 128, kWarpsM = 2, kWarpsN = 2;
};

// A slice of one operand in shared memory: OUTER rows (or columns) of `out` times BLOCK_K, stored line by line. The
// chunks of a line are permuted by the line's number, so that the eight lines that ldmatrix reads at once lie in
// different banks.
template <int OUTER, Line kLine>
struct Slice {
    static constexpr bool kDepthLines = kLine == Line::depth;
    static constexpr int kLines = kDepthLines ? OUTER : BLOCK_K;
    static constexpr int kChunks = (kDepthLines ? BLOCK_K : OUTER) / kChunk;
    static constexpr int kBytes = kLines * kChunks * 16;

    uint32_t base;  // shared address

    DEVICE uint32_t address(int line, int chunk) const {
        return base + uint32_t(line * kChunks + (chunk ^ (line & 7))) * 16;
    }

    // The length of a line of an operand of these sizes.
    static DEVICE int line_length(int outer_size, int depth_size) { return kDepthLines ? depth_size : outer_size; }

    // Copies the slice that begins at `outer`, `depth` of the operand, with zeros for what lies outside the operand.
    // `stride` values lie between the starts of two lines. `outer` may be negative where it counts lines.
    template <bool kAligned, int THREADS>
    DEVICE void load(const bf16* operand, int outer, int depth, int outer_size, int depth_size, int stride) const {
        const int first_line = kDepthLines ? outer : depth, lines = kDepthLines ? outer_size : depth_size;
        const int first_column = kDepthLines ? depth : outer, columns = kDepthLines ? depth_size : outer_size;
        static_assert(kLines * kChunks % THREADS == 0, "every thread copies as many chunks");
#pragma unroll
        for (int i = 0; i < kLines * kChunks / THREADS; ++i) {
            const int index = i * THREADS + int(threadIdx.x);
            const int line = index / kChunks, chunk = index % kChunks;
            const int column = first_column + chunk * kChunk;
            // Unsigned, so that lines before the first one are outside as well.
            const bool valid = uint32_t(first_line + line) < uint32_t(lines) && column < columns;
            const bf16* source = valid ? operand + int64_t(first_line + line) * stride + column : operand;
            if constexpr (kAligned) {
                cp_async_16(address(line, chunk), source, valid);
            } else {
                store_shared_128(address(line, chunk), gather(source, valid ? columns - column : 0));
            }
        }
    }

    // Drops values of the chunks that this thread's `load` of the slice copied, once they have arrived. Lines of the
    // operand lie back to back and have `width` values. One chunk after the other: the four hashes of a chunk keep a
    // warp busy, and those of all chunks would take registers from the accumulators.
    template <bool kAligned, int THREADS>
    DEVICE void drop(const Dropout& dropout, int outer, int depth, int width) const {
        const int first_line = kDepthLines ? outer : depth, first_column = kDepthLines ? depth : outer;
        const int chunk = int(threadIdx.x) % kChunks;
        static_assert(THREADS % kChunks == 0, "a thread has the same chunk of every line that it copies");
#pragma unroll 1
        for (int line = int(threadIdx.x) / kChunks; line < kLines; line += THREADS / kChunks) {
            const int64_t place = int64_t(first_line + line) * width + first_column + chunk * kChunk;
            dropout.zero_dropped<kAligned>(address(line, chunk), place);
        }
    }

    // Up to eight values from an address of any alignment, followed by zeros.
    static DEVICE uint4 gather(const bf16* source, int count) {
        uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
            if (i < count) pairs[i / 2] |= uint32_t(source[i].bits) << 16 * (i % 2);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }

    // Four 8 x 8 matrices of the slice, outer index `outer` .. +16 and depth `depth` .. +16. The two values of a
    // register are neighbours along K. Matrix i holds outer half `i & 1` and depth half `i >> 1`: the left operand of
    // an mma.
    DEVICE void left_fragment(uint32_t (&r)[4], int outer, int depth) const {
        const int lane = int(lane_id()), row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        fragment(r, outer + 8 * low + (kDepthLines ? row : 0), depth + 8 * high + (kDepthLines ? 0 : row));
    }
    // The same with the halves exchanged: registers 0 and 1 are the right operand of columns `outer` .. +8, registers 2
    // and 3 that of the eight columns after them.
    DEVICE void right_fragment(uint32_t (&r)[4], int outer, int depth) const {
        const int lane = int(lane_id()), row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        fragment(r, outer + 8 * high + (kDepthLines ? row : 0), depth + 8 * low + (kDepthLines ? 0 : row));
    }

private:
    DEVICE void fragment(uint32_t (&r)[4], int outer, int depth) const {
        if constexpr (kDepthLines)
            ldmatrix_x4(r, address(outer, depth / kChunk));
        else
            ldmatrix_x4_trans(r, address(depth, outer / kChunk));
    }
};

// The constants of one tile shape and operand order.
template <class TileShape, class Lines>
struct Config {
    using Tile = TileShape;
    using Operands = typename Lines::Operands;
    using Left = Slice<Tile::BLOCK_M, Lines::kLeft>;
    using Right = Slice<Tile::BLOCK_N, Lines::kRight>;
    static constexpr int kThreads = Tile::kWarpsM * Tile::kWarpsN * kWarp;
    // A warp's part of the tile, in rows and columns, and in mma of 16 x 8.
    static constexpr int WARP_M = Tile::BLOCK_M / Tile::kWarpsM, WARP_N = Tile::BLOCK_N / Tile::kWarpsN;
    static constexpr int kMmaM = WARP_M / 16, kMmaN = WARP_N / 8;
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
    // The finished tile is staged in the memory of the slices, and the epilogue may use what lies after it. Eight more
    // floats in each staged row put the rows that a warp writes at once into different banks.
    static constexpr int kStagedPitch = Tile::BLOCK_N + 8;
    static constexpr int kStagedBytes = Tile::BLOCK_M * kStagedPitch * int(sizeof(float));
    static constexpr int kSharedBytes = kStages * kStageBytes > kStagedBytes ? kStages* kStageBytes : kStagedBytes;
    static_assert(kSharedBytes <= kSharedLimit, "a block fits into every GPU");
};

// Where the block's tile lies in `out`.
struct TileOrigin {
    int m, n;
};

// Blocks walk down kTileGroup rows of tiles before they step to the next column.
template <class Tile>
DEVICE TileOrigin tile_origin(int shape_m, int shape_n) {
    const int tiles_m = (shape_m + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
    const int tiles_n = (shape_n + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
    const int group_tiles = kTileGroup * tiles_n;
    const int group = int(blockIdx.x) / group_tiles, within = int(blockIdx.x) % group_tiles;
    const int rows = min(kTileGroup, tiles_m - group * kTileGroup);
    return {(group * kTileGroup + within % rows) * Tile::BLOCK_M, within / rows * Tile::BLOCK_N};
}

// The first row and column of the warp's part of the tile.
struct WarpPart {
    int m, n;
};

template <class C>
DEVICE WarpPart warp_part() {
    const int warp = int(threadIdx.x) / kWarp;
    return {warp / C::Tile::kWarpsN * C::WARP_M, warp % C::Tile::kWarpsN * C::WARP_N};
}

// In lane l, accumulators[i][4j + 2h + e] belongs to row 16i + l/4 + 8h and column 8j + 2(l%4) + e of the warp's part.
template <class C>
using Accumulators = float[C::kMmaM][4 * C::kMmaN];

// accumulators += this warp's part of left * right, for one slice of each.
template <class C>
DEVICE void multiply_slices(Accumulators<C>& accumulators, typename C::Left left, typename C::Right right,
                            WarpPart part) {
#pragma unroll
    for (int depth = 0; depth < BLOCK_K; depth += 16) {
        uint32_t a[C::kMmaM][4], b[C::kMmaN / 2][4];
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i) left.left_fragment(a[i], part.m + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < C::kMmaN / 2; ++j) right.right_fragment(b[j], part.n + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i)
#pragma unroll
            for (int j = 0; j < C::kMmaN; ++j) {
                const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma_m16n8k16(reinterpret_cast<float (&)[4]>(accumulators[i][4 * j]), a[i], pair);
            }
    }
}

// Applies the operands' `finish` to the accumulators.
template <class C, bool kAligned>
DEVICE void finish_parts(Accumulators<C>& accumulators, const typename C::Operands& operands, TileOrigin origin) {
    const WarpPart part = warp_part<C>();
    const int row = origin.m + part.m + int(lane_id()) / 4, column = int(lane_id()) % 4 * 2;
    operands.template finish<kAligned>([&](const auto& visit) {
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i)
#pragma unroll
            for (int j = 0; j < C::kMmaN; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* const pair = accumulators[i] + 4 * j + 2 * half;
                    visit(pair[0], pair[1], row + 16 * i + 8 * half, origin.n + part.n + 8 * j, column);
                }
    });
}

// Drops values of what this thread copied of the slices at `depth`.
template <class C, bool kAligned>
DEVICE void drop_input(typename C::Left left, typename C::Right right, const typename C::Operands& operands,
                       TileOrigin origin, int depth) {
    if constexpr (C::Operands::kLeft)
        left.template drop<kAligned, C::kThreads>(operands.dropout, origin.m, depth, operands.width());
    else
        right.template drop<kAligned, C::kThreads>(operands.dropout, origin.n, depth, operands.width());
}

// The main loop: kStages - 1 slices are under way while one is multiplied. The slices of low-rank parts come first.
template <class C, bool kAligned>
DEVICE void multiply_tile(Accumulators<C>& accumulators, uint32_t shared, const typename C::Operands& operands,
                          TileOrigin origin) {
    using Operands = typename C::Operands;
    const WarpPart part = warp_part<C>();
    const TileColumns<1> columns{origin.n, C::Tile::BLOCK_N, 0};
    int part_slices = 0;
    if constexpr (kHasParts<Operands>) part_slices = operands.part_slices(columns);
    const int slices = part_slices + (operands.shape_k + BLOCK_K - 1) / BLOCK_K;
    const auto load = [&](int slice) {
        const uint32_t stage = shared + uint32_t(slice % kStages * C::kStageBytes);
        const typename C::Left left{stage};
        const typename C::Right right{stage + C::Left::kBytes};
        if constexpr (kHasParts<Operands>) {
            operands.visit_slice(slice, columns, [&](const LowRankPart& part, int depth) {
                left.template load<kAligned, C::kThreads>(part.left, origin.m, depth, operands.shape_m, part.depth,
                                                          part.left_stride);
                right.template load<kAligned, C::kThreads>(part.right, origin.n - part.first, depth, part.columns,
                                                           part.depth, C::Right::line_length(part.columns, part.depth));
            });
        }
        if (slice >= part_slices && slice < slices) {
            const int depth = (slice - part_slices) * BLOCK_K;
            const int left_line = C::Left::line_length(operands.shape_m, operands.shape_k);
            const int right_line = C::Right::line_length(operands.shape_n, operands.shape_k);
            left.template load<kAligned, C::kThreads>(operands.left, origin.m, depth, operands.shape_m,
                                                      operands.shape_k, left_stride(operands, left_line));
            right.template load<kAligned, C::kThreads>(operands.right, origin.n, depth, operands.shape_n,
                                                       operands.shape_k, right_stride(operands, right_line));
        }
        // Commit empty groups as well, so that the number of groups left says which slice has arrived.
        cp_async_commit();
    };
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) load(slice);
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<kStages - 2>();
        if constexpr (kDropsInput<Operands>) {
            const uint32_t arrived = shared + uint32_t(slice % kStages * C::kStageBytes);
            drop_input<C, kAligned>({arrived}, {arrived + C::Left::kBytes}, operands, origin, slice * BLOCK_K);
        }
        // After this, every thread's copies have arrived and every warp is done with the stage that is filled next.
        __syncthreads();
        load(slice + kStages - 1);
        const uint32_t stage = shared + uint32_t(slice % kStages * C::kStageBytes);
        multiply_slices<C>(accumulators, {stage}, {stage + C::Left::kBytes}, part);
        if constexpr (kHasParts<Operands>) {
            if (slice + 1 == part_slices) finish_parts<C, kAligned>(accumulators, operands, origin);
        }
    }
    cp_async_wait<0>();
}

// Lays the warps' accumulators out as rows of f32, so that the stores to `out` are whole lines.
template <class C>
DEVICE void stage_tile(float* staged, const Accumulators<C>& accumulators) {
    const WarpPart part = warp_part<C>();
    const int row = int(lane_id()) / 4, column = int(lane_id()) % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::kMmaM; ++i)
#pragma unroll
        for (int j = 0; j < C::kMmaN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* target = staged + (part.m + 16 * i + 8 * half + row) * C::kStagedPitch + part.n + 8 * j + column;
                *reinterpret_cast<float2*>(target) =
                    make_float2(accumulators[i][4 * j + 2 * half], accumulators[i][4 * j + 2 * half + 1]);
            }
}

template <class C, class Epilogue>
DEVICE void store_tile(const Epilogue& epilogue, const float* staged, TileOrigin origin, int shape_m, int shape_n) {
    constexpr int kFours = C::Tile::BLOCK_N / 4;
    for (int index = int(threadIdx.x); index < C::Tile::BLOCK_M * kFours; index += C::kThreads) {
        const int row = index / kFours, column = index % kFours * 4;
        if (origin.m + row >= shape_m || origin.n + column >= shape_n) continue;
        const float4 value = *reinterpret_cast<const float4*>(staged + row * C::kStagedPitch + column);
        epilogue.store(origin.m + row, origin.n + column, value);
    }
}

// For an epilogue's `store`: writes four columns of a row of out[.., columns], rounded to bf16.
template <bool kAligned>
DEVICE void store_four_bf16(bf16* out, int columns, int row, int column, const float (&values)[4]) {
    bf16* const target = out + int64_t(row) * columns + column;
    if constexpr (kAligned) {
        *reinterpret_cast<uint2*>(target) =
            make_uint2(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]));
    } else {
        const int count = min(4, columns - column);
        for (int i = 0; i < count; ++i) target[i] = to_bf16(values[i]);
    }
}

template <class C, bool kAligned, class Epilogue>
__global__ void __launch_bounds__(C::kThreads) gemm_kernel(typename C::Operands operands, Epilogue epilogue) {
    DYNAMIC_SHARED(raw);
    const TileOrigin origin = tile_origin<typename C::Tile>(operands.shape_m, operands.shape_n);
    Accumulators<C> accumulators = {};
    multiply_tile<C, kAligned>(accumulators, shared_address(raw), operands, origin);

    __syncthreads();  // Other warps may still have been reading the slices, whose memory is used anew from here on.
    epilogue.template transform<C>(accumulators, origin, raw);
    if constexpr (Epilogue::kStores) {
        float* const staged = reinterpret_cast<float*>(raw);
        stage_tile<C>(staged, accumulators);
        __syncthreads();
        store_tile<C>(epilogue, staged, origin, operands.shape_m, operands.shape_n);
    }
}

template <class Tile>
int64_t tile_count(const GemmOperands& operands) {
    return ceil_div(operands.shape_m, Tile::BLOCK_M) * ceil_div(operands.shape_n, Tile::BLOCK_N);
}

// kAligned: the operands satisfy lines_aligned.
template <class Tile, class Lines, bool kAligned, class Epilogue>
mmpo_status launch_tiles(const typename Lines::Operands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    using C = Config<Tile, Lines>;
    const int64_t tiles = tile_count<Tile>(operands);
    if (tiles > INT32_MAX) return kInvalidValue;
    return LAUNCH((gemm_kernel<C, kAligned, Epilogue>), dim3(unsigned(tiles)), dim3(C::kThreads), C::kSharedBytes,
                  cuda_stream(stream), operands, epilogue);
}

}  // namespace gemm
}  // namespace MMPO_VARIANT
}  // namespace mmpo
