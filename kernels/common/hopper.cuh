// What Hopper kernels share: tiles in shared memory as TMA leaves them, their wgmma descriptors, and the ring of stages
// through which a producer warp hands data to consumer warpgroups.
//
// A tile of ROWS x COLUMNS bf16 values is stored as panels of 64 columns. A panel's row is 128 bytes, which is what the
// widest swizzle spans:
//
//   panel p at p * ROWS * 128, row r of it at r * 128, its 16-byte chunk c at (c ^ (r & 7)) * 16
//
// So eight rows of one chunk column fall into eight different groups of banks, whether TMA, ldmatrix or wgmma accesses
// them. The pattern repeats every 1024 bytes, and tiles start on a multiple of that.
#pragma once

#include "limits.cuh"
#include "tensor_map.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kWarpgroupThreads = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
// Rows of one wgmma, and its depth in values.
constexpr int kWgmmaRows = 64;
constexpr int kWgmmaDepth = 16;

template <int ROWS, int COLUMNS>
struct PanelTile {
    static_assert(ROWS % 8 == 0 && COLUMNS % kPanelColumns == 0, "whole repetitions of the swizzle");
    static constexpr int kPanels = COLUMNS / kPanelColumns;
    static constexpr int kPanelBytes = ROWS * kPanelRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;

    uint32_t base;  // shared address, a multiple of 1024

    DEVICE uint32_t panel(int index) const { return base + uint32_t(index * kPanelBytes); }

    // Address of the 16-byte chunk that holds columns 8 * chunk .. 8 * chunk + 8 of a row.
    DEVICE uint32_t address(int row, int chunk) const {
        return base + uint32_t(chunk / 8 * kPanelBytes + row * kPanelRowBytes + ((chunk ^ row) & 7) * 16);
    }

    // Starts the copy of ROWS x COLUMNS values of a matrix, from `row` and `column` on. The map has the 128-byte
    // swizzle and boxes [ROWS, 64]; kBytes complete on `mbarrier`. Call in one thread.
    DEVICE void load(const CUtensorMap* map, int column, int row, uint32_t mbarrier MMPO_SITE) const {
#pragma unroll
        for (int index = 0; index < kPanels; ++index) {
            tma_load_2d(panel(index), map, column + index * kPanelColumns, row, mbarrier MMPO_PASS_SITE);
        }
    }

    // The wgmma operand whose outer index runs over the tile's rows from `row` (a multiple of 8) on and whose depth is
    // the 16 columns from 16 * step on ("K-major").
    DEVICE uint64_t depth_in_columns(int row, int step) const {
        const int panel = step / 4;
        return wgmma_descriptor(base, 16, 1024, Swizzle::bytes_128,
                                uint32_t(panel * kPanelBytes + row * kPanelRowBytes + step % 4 * 32));
    }

    // The wgmma operand whose outer index runs over the tile's columns from `column` (a multiple of 64) on and whose
    // depth is the 16 rows from 16 * step on ("MN-major": pass it as transposed).
    DEVICE uint64_t depth_in_rows(int column, int step) const {
        const int panel = column / kPanelColumns;
        return wgmma_descriptor(base, kPanelBytes, 1024, Swizzle::bytes_128,
                                uint32_t(panel * kPanelBytes + step * kWgmmaDepth * kPanelRowBytes));
    }
};

// Encodes the tensor map of an array [tokens, heads, head_size] of bf16 for copies of packed heads: boxes of box_tokens
// x box_heads x 64 columns, one panel of a tile whose rows are those tokens x heads.
inline mmpo_status encode_head_map(CUtensorMap* out, const bf16* base, uint64_t tokens, uint64_t heads, int head_size,
                                   int box_tokens, int box_heads) {
    const uint64_t head_bytes = uint64_t(head_size) * sizeof(bf16);
    TensorMapShape shape{};
    shape.rank = 3;
    shape.sizes[0] = uint64_t(head_size);
    shape.sizes[1] = heads;
    shape.sizes[2] = tokens;
    shape.strides_bytes[0] = head_bytes;
    shape.strides_bytes[1] = heads * head_bytes;
    shape.box[0] = kPanelColumns;
    shape.box[1] = uint32_t(box_heads);
    shape.box[2] = uint32_t(box_tokens);
    shape.swizzle = Swizzle::bytes_128;
    return encode_tensor_map(out, base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, shape);
}

// The A operand of depth step `step`, made of an earlier wgmma's accumulators by rounding to bf16. In each lane,
// wgmma's accumulators of 16 columns cover the same rows and columns as its A registers.
template <int kCount>
DEVICE void accumulators_to_operand(uint32_t (&a)[4], const float (&d)[kCount], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack_bf16x2(d[8 * step + 2 * i], d[8 * step + 2 * i + 1]);
}

// A ring of stages of shared memory, which a producer fills and consumers empty in the same order. Each stage has two
// mbarriers: `full` counts the producer's arrival and the bytes of its copies, `empty` the consumers' arrivals.
template <int kStages>
struct StageRing {
    static constexpr int kBytes = 2 * kStages * int(sizeof(uint64_t));

    uint32_t barriers;  // shared address, 8-byte aligned

    DEVICE uint32_t full(int stage) const { return barriers + uint32_t(stage) * 8; }
    DEVICE uint32_t empty(int stage) const { return barriers + uint32_t(kStages + stage) * 8; }

    // `arrivals`: how many consumers' arrivals free a stage. Call in one thread; fence_mbarrier_init and a
    // __syncthreads must follow.
    DEVICE void init(int arrivals) const {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), uint32_t(arrivals));
        }
    }
};

// Where one side of a ring stands. Each side keeps its own cursor, and both advance through the same stages.
template <int kStages>
struct StageCursor {
    int stage = 0;
    // Parity of the phase that a consumer waits for on `full`. A producer waits on `empty` with the opposite parity, so
    // that its first round through the ring finds every stage free.
    uint32_t parity = 0;

    DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
