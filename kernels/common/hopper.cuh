// What Hopper kernels share: tiles in shared memory as TMA leaves them, their wgmma descriptors, and the ring of stages
// between a producer warp and consumer warpgroups.
//
// A tile of ROWS x COLUMNS bf16 values lies in panels of 64 columns, the 128 bytes that the widest swizzle spans:
//
//   panel p at p * ROWS * 128, row r of it at r * 128, its 16-byte chunk c at (c ^ (r & 7)) * 16
//
// So eight rows of one chunk column fall into eight different groups of banks, for TMA, ldmatrix and wgmma alike. Tiles
// start on a multiple of 1024 bytes, the length after which the pattern repeats.
#pragma once

#include "tensor_map.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kWarpgroupThreads = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
// Depth of one wgmma, in values.
constexpr int kWgmmaDepth = 16;

template <int ROWS, int COLUMNS>
struct PanelTile {
    static_assert(ROWS % 8 == 0 && COLUMNS % kPanelColumns == 0, "whole repetitions of the swizzle");
    static constexpr int kPanels = COLUMNS / kPanelColumns;
    static constexpr int kPanelBytes = ROWS * kPanelRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;

    // Address of the 16-byte chunk that holds columns 8 * chunk .. 8 * chunk + 8 of a row.
    static DEVICE uint32_t address(uint32_t tile, int row, int chunk) {
        return tile + uint32_t(chunk / 8 * kPanelBytes + row * kPanelRowBytes + ((chunk ^ row) & 7) * 16);
    }

    // Starts the copy of rows row.. and columns column.. of a matrix whose map (128-byte swizzle) has boxes
    // [ROWS, 64]; kBytes complete on `mbarrier`. Call in one thread.
    static DEVICE void load(uint32_t tile, const CUtensorMap* map, int column, int row, uint32_t mbarrier MMPO_SITE) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            tma_load_2d(tile + panel * kPanelBytes, map, column + panel * kPanelColumns, row, mbarrier MMPO_PASS_SITE);
        }
    }

    // An operand whose outer index runs over the tile's rows from `row` (a multiple of 8) on, and whose depth is
    // columns 16 * step .. of it ("K-major").
    static DEVICE uint64_t depth_in_columns(uint32_t tile, int row, int step) {
        const int panel = step / 4;
        return wgmma_descriptor(tile, 16, 1024, Swizzle::bytes_128,
                                uint32_t(panel * kPanelBytes + row * kPanelRowBytes + step % 4 * 32));
    }

    // An operand whose outer index runs over the tile's columns from `column` (a multiple of 64) on, and whose depth is
    // rows 16 * step .. of it ("MN-major": pass it as transposed).
    static DEVICE uint64_t depth_in_rows(uint32_t tile, int column, int step) {
        const int panel = column / kPanelColumns;
        return wgmma_descriptor(tile, kPanelBytes, 1024, Swizzle::bytes_128,
                                uint32_t(panel * kPanelBytes + step * kWgmmaDepth * kPanelRowBytes));
    }
};

// The A operand of depth step `step` from accumulators of an earlier product, rounded to bf16: wgmma's accumulators of
// 16 columns hold the same rows and columns in each lane as its A registers.
template <int kCount>
DEVICE void accumulators_to_operand(uint32_t (&a)[4], const float (&d)[kCount], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack_bf16x2(d[8 * step + 2 * i], d[8 * step + 2 * i + 1]);
}

// Stages of shared memory that a producer fills and consumers empty, in turn. Two mbarriers a stage: `full` counts the
// producer and the bytes of its copies, `empty` one arrival a consumer.
template <int kStages>
struct StageRing {
    static constexpr int kBytes = 2 * kStages * int(sizeof(uint64_t));

    uint32_t barriers;  // shared address, 8-byte aligned

    DEVICE uint32_t full(int stage) const { return barriers + uint32_t(stage) * 8; }
    DEVICE uint32_t empty(int stage) const { return barriers + uint32_t(kStages + stage) * 8; }

    // Call in one thread; fence_mbarrier_init and a __syncthreads follow.
    DEVICE void init(int consumers) const {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), uint32_t(consumers));
        }
    }
};

// Where one side of a ring stands. Each side keeps its own, and both advance through the same stages.
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
