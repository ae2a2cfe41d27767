// Matrix products on mma.sync: tile[M, N] = left[M, K] * right[K, N], bf16 in, f32 accumulators, and then an epilogue.
//
// A block computes one tile. Slices of BLOCK_K along K pass through kStages buffers in shared memory, filled by
// cp.async while earlier ones are multiplied. What becomes of the finished tile is the epilogue's: a small struct that
// every thread gets a copy of, with
//
//   template <class L> void transform(Accumulators<L>&, TileOrigin, unsigned char* shared) const
//     Called by every thread after a barrier; shared memory from L::kStagedBytes to L::kSharedBytes is free for it.
//   static constexpr bool kStores
//     Whether the tile, as `transform` leaves it, is written row by row through shared memory:
//   void store(int row, int column, float4 value) const
//     Columns column .. column + 4 of a row that lies inside the product; those past its last column count for
//     nothing.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace product {

constexpr int BLOCK_K = 64;
// Three slices of 128 x 64 for both operands are 96 KiB: the most that sm_86 and sm_89 grant a block is 99.
constexpr int kStages = 3;
// ldmatrix and cp.async move chunks of 16 bytes.
constexpr int kChunk = kVector;
// Rows of tiles that are walked together, so that a wave of blocks shares its right-hand slices in L2.
constexpr int kTileGroup = 8;

// 64 x 32 of `out` a warp: 16 mma for 6 ldmatrix, and 64 accumulators a thread.
struct LargeTile {
    static constexpr int BLOCK_M = 128, BLOCK_N = 128, kWarpsM = 2, kWarpsN = 4;
};
// For products with too few large tiles to occupy the GPU.
struct SmallTile {
    static constexpr int BLOCK_M = 64, BLOCK_N = 64, kWarpsM = 2, kWarpsN = 2;
};

// Which index of an operand's matrix runs along memory: K, or the one that also indexes the tile.
enum class Contiguous { kDepth, kOuter };

// Operands of a product: each by its rows, or transposed.
template <Contiguous kLeftOrder, Contiguous kRightOrder>
struct Order {
    static constexpr Contiguous kLeft = kLeftOrder, kRight = kRightOrder;
};

struct Operands {
    const bf16* left;
    const bf16* right;
    int shape_m, shape_n, shape_k;
};

// A slice of one operand: OUTER rows (or columns) of `out` times BLOCK_K, in lines of the contiguous index. The chunks
// of a line are permuted by the line's number, so that the eight lines that ldmatrix reads at once lie in different
// banks.
template <int OUTER, Contiguous kContiguous>
struct Slice {
    static constexpr bool kDepthLines = kContiguous == Contiguous::kDepth;
    static constexpr int kLines = kDepthLines ? OUTER : BLOCK_K;
    static constexpr int kChunks = (kDepthLines ? BLOCK_K : OUTER) / kChunk;
    static constexpr int kBytes = kLines * kChunks * 16;

    static DEVICE uint32_t offset(int line, int chunk) { return uint32_t(line * kChunks + (chunk ^ (line & 7))) * 16; }

    // Copies the slice that begins at `outer`, `depth` of the operand; zeros stand for what lies outside of it.
    template <bool kAligned, int THREADS>
    static DEVICE void load(uint32_t slice, const bf16* operand, int outer, int depth, int outer_size, int depth_size) {
        const int first_line = kDepthLines ? outer : depth, lines = kDepthLines ? outer_size : depth_size;
        const int first_column = kDepthLines ? depth : outer, columns = kDepthLines ? depth_size : outer_size;
        static_assert(kLines * kChunks % THREADS == 0, "every thread copies as many chunks");
#pragma unroll
        for (int i = 0; i < kLines * kChunks / THREADS; ++i) {
            const int index = i * THREADS + int(threadIdx.x);
            const int line = index / kChunks, chunk = index % kChunks;
            const int column = first_column + chunk * kChunk;
            const bool valid = first_line + line < lines && column < columns;
            const bf16* source = valid ? operand + int64_t(first_line + line) * columns + column : operand;
            if constexpr (kAligned) {
                cp_async_16(slice + offset(line, chunk), source, valid);
            } else {
                store_shared_128(slice + offset(line, chunk), gather(source, valid ? columns - column : 0));
            }
        }
    }

    // Up to eight values from an address of any alignment, zeros after them.
    static DEVICE uint4 gather(const bf16* source, int count) {
        uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
            if (i < count) pairs[i / 2] |= uint32_t(source[i].bits) << 16 * (i % 2);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }

    // Four 8 x 8 matrices for outer `outer` .. +16 and depth `depth` .. +16 of the slice, K along a register's pair.
    // Matrix i holds outer half `i & 1`, depth half `i >> 1` (as the left operand of an mma wants it).
    static DEVICE void left_fragment(uint32_t (&r)[4], uint32_t slice, int outer, int depth) {
        const int lane = int(lane_id()), row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        fragment(r, slice, outer + 8 * low + (kDepthLines ? row : 0), depth + 8 * high + (kDepthLines ? 0 : row));
    }
    // Likewise with the halves exchanged: registers 0, 1 are the right operand of columns `outer` .. +8, 2 and 3 of the
    // eight after them.
    static DEVICE void right_fragment(uint32_t (&r)[4], uint32_t slice, int outer, int depth) {
        const int lane = int(lane_id()), row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        fragment(r, slice, outer + 8 * high + (kDepthLines ? row : 0), depth + 8 * low + (kDepthLines ? 0 : row));
    }

private:
    static DEVICE void fragment(uint32_t (&r)[4], uint32_t slice, int outer, int depth) {
        if constexpr (kDepthLines)
            ldmatrix_x4(r, slice + offset(outer, depth / kChunk));
        else
            ldmatrix_x4_trans(r, slice + offset(depth, outer / kChunk));
    }
};

// How a block computes its tile.
template <class TileSize, class Order>
struct Layout {
    using Tile = TileSize;
    using Left = Slice<Tile::BLOCK_M, Order::kLeft>;
    using Right = Slice<Tile::BLOCK_N, Order::kRight>;
    static constexpr int kThreads = Tile::kWarpsM * Tile::kWarpsN * kWarp;
    // What a warp computes, and that in mma of 16 x 8.
    static constexpr int WARP_M = Tile::BLOCK_M / Tile::kWarpsM, WARP_N = Tile::BLOCK_N / Tile::kWarpsN;
    static constexpr int kMmaM = WARP_M / 16, kMmaN = WARP_N / 8;
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
    // The finished tile is staged in the same memory, and the epilogue may use what lies after it. Eight floats more a
    // row put the rows that a warp writes at once into different banks.
    static constexpr int kStagedPitch = Tile::BLOCK_N + 8;
    static constexpr int kStagedBytes = Tile::BLOCK_M * kStagedPitch * int(sizeof(float));
    static constexpr int kSharedBytes = kStages * kStageBytes > kStagedBytes ? kStages* kStageBytes : kStagedBytes;
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

// The warp's part of the tile: its first row and column in it.
struct WarpPart {
    int m, n;
};

template <class L>
DEVICE WarpPart warp_part() {
    const int warp = int(threadIdx.x) / kWarp;
    return {warp / L::Tile::kWarpsN * L::WARP_M, warp % L::Tile::kWarpsN * L::WARP_N};
}

// Lane l holds, of 16-row block i, accumulators[i][4j + 2h + e]: row 16i + l/4 + 8h, column 8j + 2(l%4) + e of the
// warp's part.
template <class L>
using Accumulators = float[L::kMmaM][4 * L::kMmaN];

// accumulators += this warp's part of one pair of slices.
template <class L>
DEVICE void multiply_slices(Accumulators<L>& accumulators, uint32_t left, uint32_t right, WarpPart part) {
#pragma unroll
    for (int depth = 0; depth < BLOCK_K; depth += 16) {
        uint32_t a[L::kMmaM][4], b[L::kMmaN / 2][4];
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i) L::Left::left_fragment(a[i], left, part.m + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < L::kMmaN / 2; ++j) L::Right::right_fragment(b[j], right, part.n + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i)
#pragma unroll
            for (int j = 0; j < L::kMmaN; ++j) {
                const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma_m16n8k16(reinterpret_cast<float (&)[4]>(accumulators[i][4 * j]), a[i], pair);
            }
    }
}

// The main loop: kStages - 1 slices are under way while one is multiplied.
template <class L, bool kAligned>
DEVICE void multiply_tile(Accumulators<L>& accumulators, uint32_t shared, const Operands& operands, TileOrigin origin) {
    const WarpPart part = warp_part<L>();
    const int slices = (operands.shape_k + BLOCK_K - 1) / BLOCK_K;
    const auto load = [&](int slice) {
        const uint32_t stage = shared + uint32_t(slice % kStages * L::kStageBytes);
        const int depth = slice * BLOCK_K;
        if (slice < slices) {
            L::Left::template load<kAligned, L::kThreads>(stage, operands.left, origin.m, depth, operands.shape_m,
                                                          operands.shape_k);
            L::Right::template load<kAligned, L::kThreads>(stage + L::Left::kBytes, operands.right, origin.n, depth,
                                                           operands.shape_n, operands.shape_k);
        }
        // Empty groups too, so that the count of groups says which slice has arrived.
        cp_async_commit();
    };
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) load(slice);
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<kStages - 2>();
        // Every thread's copies have arrived, and every warp is done with the stage that is filled next.
        __syncthreads();
        load(slice + kStages - 1);
        const uint32_t stage = shared + uint32_t(slice % kStages * L::kStageBytes);
        multiply_slices<L>(accumulators, stage, stage + L::Left::kBytes, part);
    }
    cp_async_wait<0>();
}

// Lays the warps' accumulators out as rows of f32, so that the stores to `out` are whole lines.
template <class L>
DEVICE void stage_tile(float* staged, const Accumulators<L>& accumulators) {
    const WarpPart part = warp_part<L>();
    const int row = int(lane_id()) / 4, column = int(lane_id()) % 4 * 2;
#pragma unroll
    for (int i = 0; i < L::kMmaM; ++i)
#pragma unroll
        for (int j = 0; j < L::kMmaN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* target = staged + (part.m + 16 * i + 8 * half + row) * L::kStagedPitch + part.n + 8 * j + column;
                *reinterpret_cast<float2*>(target) =
                    make_float2(accumulators[i][4 * j + 2 * half], accumulators[i][4 * j + 2 * half + 1]);
            }
}

template <class L, class Epilogue>
DEVICE void store_tile(const Epilogue& epilogue, const float* staged, TileOrigin origin, int shape_m, int shape_n) {
    constexpr int kFours = L::Tile::BLOCK_N / 4;
    for (int index = int(threadIdx.x); index < L::Tile::BLOCK_M * kFours; index += L::kThreads) {
        const int row = index / kFours, column = index % kFours * 4;
        if (origin.m + row >= shape_m || origin.n + column >= shape_n) continue;
        const float4 value = *reinterpret_cast<const float4*>(staged + row * L::kStagedPitch + column);
        epilogue.store(origin.m + row, origin.n + column, value);
    }
}

// For an epilogue's store: four columns of a row of out[.., columns], rounded to bf16.
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

template <class L, bool kAligned, class Epilogue>
__global__ void __launch_bounds__(L::kThreads) product_kernel(Operands operands, Epilogue epilogue) {
    DYNAMIC_SHARED(raw);
    const TileOrigin origin = tile_origin<typename L::Tile>(operands.shape_m, operands.shape_n);
    Accumulators<L> accumulators = {};
    multiply_tile<L, kAligned>(accumulators, shared_address(raw), operands, origin);

    __syncthreads();  // From here on the memory of slices that other warps may still have read is used anew.
    epilogue.template transform<L>(accumulators, origin, raw);
    if constexpr (Epilogue::kStores) {
        float* const staged = reinterpret_cast<float*>(raw);
        stage_tile<L>(staged, accumulators);
        __syncthreads();
        store_tile<L>(epilogue, staged, origin, operands.shape_m, operands.shape_n);
    }
}

template <class Tile>
int64_t tile_count(const Operands& operands) {
    return ceil_div(operands.shape_m, Tile::BLOCK_M) * ceil_div(operands.shape_n, Tile::BLOCK_N);
}

template <class Tile, class Order, bool kAligned, class Epilogue>
mmpo_status launch_tiles(const Operands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    using L = Layout<Tile, Order>;
    const int64_t tiles = tile_count<Tile>(operands);
    if (tiles > INT32_MAX) return kInvalidValue;
    return LAUNCH((product_kernel<L, kAligned, Epilogue>), dim3(unsigned(tiles)), dim3(L::kThreads), L::kSharedBytes,
                  cuda_stream(stream), operands, epilogue);
}

// Whether both operands can be read 16 bytes at a time.
template <class Order>
bool lines_aligned(const Operands& operands) {
    const int left_line = Order::kLeft == Contiguous::kDepth ? operands.shape_k : operands.shape_m;
    const int right_line = Order::kRight == Contiguous::kDepth ? operands.shape_k : operands.shape_n;
    return vector_rows(left_line) && vector_rows(right_line) && vector_aligned(operands.left, operands.right);
}

}  // namespace product
}  // namespace MMPO_VARIANT
}  // namespace mmpo
