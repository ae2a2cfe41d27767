// Matrix products on mma.sync: out[M, N] = left[M, K] * right[K, N], bf16 in, f32 accumulators.
//
// The three products of a linear layer x[T, I] -> out[T, O] with weight[O, I]:
//
//   product          left                 right                  out
//   forward          x[T, I]              weight[O, I], by rows  bf16 assigned (+ bias), or f32 assigned
//   backward_input   dout[T, O]           weight[O, I]           bf16 assigned
//   backward_weight  dout[T, O], by rows  x[T, I]                f32 accumulated
//
// A block computes one tile of `out`. Slices of BLOCK_K along K pass through kStages buffers in shared memory, filled
// by cp.async while earlier ones are multiplied. This runs where cuBLASLt is missing, and on the emulated device.

#include "common/launch.cuh"

namespace {

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

// Which index of an operand's matrix runs along memory: K, or the one that also indexes `out`.
enum class Contiguous { kDepth, kOuter };
enum class Store { kBf16, kF32, kAddF32 };

struct Forward {
    static constexpr Contiguous kLeft = Contiguous::kDepth, kRight = Contiguous::kDepth;
    static constexpr Store kStore = Store::kBf16;
};
struct ForwardF32 : Forward {
    static constexpr Store kStore = Store::kF32;
};
struct BackwardInput {
    static constexpr Contiguous kLeft = Contiguous::kDepth, kRight = Contiguous::kOuter;
    static constexpr Store kStore = Store::kBf16;
};
struct BackwardWeight {
    static constexpr Contiguous kLeft = Contiguous::kOuter, kRight = Contiguous::kOuter;
    static constexpr Store kStore = Store::kAddF32;
};

struct Problem {
    void* out;
    const bf16* left;
    const bf16* right;
    const bf16* bias;  // [N], or null
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

    // Up to eight values from an address of any alignment, zeros behind them.
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
    // eight behind them.
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

template <class Tile, class Kind>
struct Layout {
    using Left = Slice<Tile::BLOCK_M, Kind::kLeft>;
    using Right = Slice<Tile::BLOCK_N, Kind::kRight>;
    static constexpr int kThreads = Tile::kWarpsM * Tile::kWarpsN * kWarp;
    // What a warp computes, and that in mma of 16 x 8.
    static constexpr int WARP_M = Tile::BLOCK_M / Tile::kWarpsM, WARP_N = Tile::BLOCK_N / Tile::kWarpsN;
    static constexpr int kMmaM = WARP_M / 16, kMmaN = WARP_N / 8;
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
    // The finished tile is staged in the same memory. Eight floats more a row put the rows that a warp writes at once
    // into different banks.
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

template <class Tile, class Kind>
using Accumulators = float[Layout<Tile, Kind>::kMmaM][Layout<Tile, Kind>::kMmaN][4];

// accumulators += this warp's part of one pair of slices.
template <class Tile, class Kind>
DEVICE void multiply_slices(Accumulators<Tile, Kind>& accumulators, uint32_t left, uint32_t right, int warp_m,
                            int warp_n) {
    using L = Layout<Tile, Kind>;
#pragma unroll
    for (int depth = 0; depth < BLOCK_K; depth += 16) {
        uint32_t a[L::kMmaM][4], b[L::kMmaN / 2][4];
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i) L::Left::left_fragment(a[i], left, warp_m + 16 * i, depth);
#pragma unroll
        for (int j = 0; j < L::kMmaN / 2; ++j) L::Right::right_fragment(b[j], right, warp_n + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i)
#pragma unroll
            for (int j = 0; j < L::kMmaN; ++j) {
                const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                mma_m16n8k16(accumulators[i][j], a[i], pair);
            }
    }
}

// The main loop: kStages - 1 slices are under way while one is multiplied.
template <class Tile, class Kind, bool kAligned>
DEVICE void multiply_tile(Accumulators<Tile, Kind>& accumulators, uint32_t shared, const Problem& problem,
                          TileOrigin origin, int warp_m, int warp_n) {
    using L = Layout<Tile, Kind>;
    const int slices = (problem.shape_k + BLOCK_K - 1) / BLOCK_K;
    const auto load = [&](int slice) {
        const uint32_t stage = shared + uint32_t(slice % kStages * L::kStageBytes);
        const int depth = slice * BLOCK_K;
        if (slice < slices) {
            L::Left::template load<kAligned, L::kThreads>(stage, problem.left, origin.m, depth, problem.shape_m,
                                                          problem.shape_k);
            L::Right::template load<kAligned, L::kThreads>(stage + L::Left::kBytes, problem.right, origin.n, depth,
                                                           problem.shape_n, problem.shape_k);
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
        multiply_slices<Tile, Kind>(accumulators, stage, stage + L::Left::kBytes, warp_m, warp_n);
    }
    cp_async_wait<0>();
}

// Lays the warps' accumulators out as rows of f32, so that the stores to `out` are whole lines.
template <class Tile, class Kind>
DEVICE void stage_tile(float* staged, const Accumulators<Tile, Kind>& accumulators, int warp_m, int warp_n) {
    using L = Layout<Tile, Kind>;
    const int row = int(lane_id()) / 4, column = int(lane_id()) % 4 * 2;
#pragma unroll
    for (int i = 0; i < L::kMmaM; ++i)
#pragma unroll
        for (int j = 0; j < L::kMmaN; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* target = staged + (warp_m + 16 * i + 8 * half + row) * L::kStagedPitch + warp_n + 8 * j + column;
                *reinterpret_cast<float2*>(target) =
                    make_float2(accumulators[i][j][2 * half], accumulators[i][j][2 * half + 1]);
            }
}

// Four neighbouring values of one row: bias, rounding, accumulation. `count` of them exist.
template <Store kStore, bool kAligned>
DEVICE void store_four(const Problem& problem, int row, int column, float4 value) {
    const int count = min(4, problem.shape_n - column);
    const int64_t index = int64_t(row) * problem.shape_n + column;
    float values[4] = {value.x, value.y, value.z, value.w};
    if constexpr (kStore == Store::kBf16) {
        bf16* const out = static_cast<bf16*>(problem.out) + index;
        if (problem.bias != nullptr)
            for (int i = 0; i < count; ++i) values[i] += to_float(problem.bias[column + i]);
        if constexpr (kAligned)
            *reinterpret_cast<uint2*>(out) =
                make_uint2(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]));
        else
            for (int i = 0; i < count; ++i) out[i] = to_bf16(values[i]);
    } else {
        float* const out = static_cast<float*>(problem.out) + index;
        constexpr bool kAdd = kStore == Store::kAddF32;
        if constexpr (kAligned) {
            float4* const target = reinterpret_cast<float4*>(out);
            const float4 old = kAdd ? *target : make_float4(0, 0, 0, 0);
            *target = make_float4(old.x + values[0], old.y + values[1], old.z + values[2], old.w + values[3]);
        } else {
            for (int i = 0; i < count; ++i) out[i] = kAdd ? out[i] + values[i] : values[i];
        }
    }
}

template <class Tile, class Kind, bool kAligned>
DEVICE void store_tile(const Problem& problem, const float* staged, TileOrigin origin) {
    using L = Layout<Tile, Kind>;
    constexpr int kFours = Tile::BLOCK_N / 4;
    for (int index = int(threadIdx.x); index < Tile::BLOCK_M * kFours; index += L::kThreads) {
        const int row = index / kFours, column = index % kFours * 4;
        if (origin.m + row >= problem.shape_m || origin.n + column >= problem.shape_n) continue;
        const float4 value = *reinterpret_cast<const float4*>(staged + row * L::kStagedPitch + column);
        store_four<Kind::kStore, kAligned>(problem, origin.m + row, origin.n + column, value);
    }
}

template <class Tile, class Kind, bool kAligned>
__global__ void __launch_bounds__(Layout<Tile, Kind>::kThreads) product_kernel(Problem problem) {
    using L = Layout<Tile, Kind>;
    DYNAMIC_SHARED(raw);
    const int warp = int(threadIdx.x) / kWarp;
    const int warp_m = warp / Tile::kWarpsN * L::WARP_M, warp_n = warp % Tile::kWarpsN * L::WARP_N;
    const TileOrigin origin = tile_origin<Tile>(problem.shape_m, problem.shape_n);

    Accumulators<Tile, Kind> accumulators = {};
    multiply_tile<Tile, Kind, kAligned>(accumulators, shared_address(raw), problem, origin, warp_m, warp_n);

    __syncthreads();  // The staged tile overwrites slices that other warps may still read.
    float* const staged = reinterpret_cast<float*>(raw);
    stage_tile<Tile, Kind>(staged, accumulators, warp_m, warp_n);
    __syncthreads();
    store_tile<Tile, Kind, kAligned>(problem, staged, origin);
}

template <class Tile>
int64_t tile_count(const Problem& problem) {
    const int64_t tiles_m = (problem.shape_m + Tile::BLOCK_M - 1) / Tile::BLOCK_M;
    const int64_t tiles_n = (problem.shape_n + Tile::BLOCK_N - 1) / Tile::BLOCK_N;
    return tiles_m * tiles_n;
}

template <class Tile, class Kind, bool kAligned>
mmpo_status launch_tiles(const Problem& problem, mmpo_stream stream) {
    using L = Layout<Tile, Kind>;
    const int64_t tiles = tile_count<Tile>(problem);
    if (tiles > INT32_MAX) return kInvalidValue;
    return LAUNCH((product_kernel<Tile, Kind, kAligned>), dim3(unsigned(tiles)), dim3(L::kThreads), L::kSharedBytes,
                  cuda_stream(stream), problem);
}

// Large tiles read each operand half as often; small ones are for shapes that would leave multiprocessors, or most of a
// large tile, idle.
template <class Kind>
mmpo_status launch_product(const Problem& problem, mmpo_stream stream) {
    if (problem.shape_m == 0 || problem.shape_n == 0 || problem.shape_k == 0) return kSuccess;
    const int left_line = Kind::kLeft == Contiguous::kDepth ? problem.shape_k : problem.shape_m;
    const int right_line = Kind::kRight == Contiguous::kDepth ? problem.shape_k : problem.shape_n;
    const bool lines_aligned = left_line % kChunk == 0 && right_line % kChunk == 0 && problem.shape_n % kChunk == 0;
    if (!lines_aligned || !vector_aligned(problem.left, problem.right, problem.out))
        return launch_tiles<SmallTile, Kind, false>(problem, stream);
    const bool fits_small = problem.shape_m <= SmallTile::BLOCK_M || problem.shape_n <= SmallTile::BLOCK_N;
    if (fits_small || tile_count<LargeTile>(problem) < multiprocessors()) {
        return launch_tiles<SmallTile, Kind, true>(problem, stream);
    }
    return launch_tiles<LargeTile, Kind, true>(problem, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                        const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                        mmpo_stream stream) {
    return launch_product<Forward>({out, x, weight, bias, rows, outputs, inputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_forward_f32)(float* out, const mmpo_bf16* x, const mmpo_bf16* weight, int32_t rows,
                                            int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_product<ForwardF32>({out, x, weight, nullptr, rows, outputs, inputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                               int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_product<BackwardInput>({dx, dout, weight, nullptr, rows, inputs, outputs}, stream);
}

mmpo_status MMPO_EXPORT(linear_backward_weight)(float* dweight, const mmpo_bf16* dout, const mmpo_bf16* x, int32_t rows,
                                                int32_t inputs, int32_t outputs, mmpo_stream stream) {
    return launch_product<BackwardWeight>({dweight, dout, x, nullptr, outputs, inputs, rows}, stream);
}
