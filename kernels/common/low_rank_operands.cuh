// The operands of a frozen gemm with what low-rank adapters add to it (LoRA, Hu et al. 2021):
//
//   out[M, N] = left[M, K] * right[K, N] + finish(sum of parts)
//
// A part is a product of small depth, part.left[M, r] * part.right[r, columns], which reaches the columns `first` ..
// `first` + `columns` of `out`. A tile begins with the slices of the parts that have columns in it, `finish` scales or
// drops their sum in the accumulators, and the frozen product is added on top. So the adapter costs as many bytes and
// operations as a frozen gemm that is deeper by r, and no pass over `out` of its own.
#pragma once

#include <type_traits>

#include "dropout.cuh"
#include "gemm_operands.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Query, key and value.
constexpr int kMostParts = 3;
// Depth of a slice in both cores.
constexpr int kPartSliceDepth = 64;

// The columns of `out` that a tile has: kRuns runs of `width`, whose starts lie `distance` apart.
template <int kRuns>
struct TileColumns {
    int first, width, distance;

    HOST_DEVICE bool meets(int begin, int end) const {
        bool meets = false;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
            const int start = first + run * distance;
            meets |= start < end && start + width > begin;
        }
        return meets;
    }
};

struct LowRankPart {
    const bf16* left;   // [M, depth], rows `left_stride` values apart
    const bf16* right;  // [columns, depth] or [depth, columns], as the gemm's own right operand
    int left_stride, depth, first, columns;
    float scale;

    // Slices of this part in a tile.
    template <int kRuns>
    HOST_DEVICE int slices(const TileColumns<kRuns>& tile) const {
        return tile.meets(first, first + columns) ? (depth + kPartSliceDepth - 1) / kPartSliceDepth : 0;
    }
};

struct LowRankOperands : GemmOperands {
    LowRankPart parts[kMostParts];
    int count;

    LowRankOperands(GemmOperands operands) : GemmOperands(operands), parts{}, count(0) {}

    // Slices of all parts in a tile.
    template <int kRuns>
    HOST_DEVICE int part_slices(const TileColumns<kRuns>& tile) const {
        int slices = 0;
#pragma unroll
        for (int i = 0; i < kMostParts; ++i)
            if (i < count) slices += parts[i].slices(tile);
        return slices;
    }

    // Calls `visit(part, depth)` with the part that the tile's slice number `slice` belongs to, and its first depth.
    template <int kRuns, class Visit>
    DEVICE void visit_slice(int slice, const TileColumns<kRuns>& tile, const Visit& visit) const {
        int first = 0;
#pragma unroll
        for (int i = 0; i < kMostParts; ++i) {
            if (i >= count) return;
            const int slices = parts[i].slices(tile);
            if (slice >= first && slice < first + slices) visit(parts[i], (slice - first) * kPartSliceDepth);
            first += slices;
        }
    }
};

// Finishes the sum of the parts by the factor of each part's columns. `each` calls its argument with all pairs of
// neighbouring values that a thread holds: (low, high, row, group, column), in columns `group` + `column` and the one
// after it; `group` is a multiple of 8 and the same in all lanes. kAligned: parts begin and end on multiples of 8, and
// rows of `out` have a multiple of 8 values.
struct ScaledOperands : LowRankOperands {
    using LowRankOperands::LowRankOperands;

    template <bool kAligned, class Each>
    DEVICE void finish(const Each& each) const {
#pragma unroll
        for (int i = 0; i < kMostParts; ++i) {
            if (i >= count || parts[i].scale == 1.0f) continue;
            const auto inside = [&](int column) {
                return uint32_t(column - parts[i].first) < uint32_t(parts[i].columns);
            };
            each([&](float& low, float& high, int, int group, int column) {
                if (inside(kAligned ? group : group + column)) low *= parts[i].scale;
                if (inside(kAligned ? group : group + column + 1)) high *= parts[i].scale;
            });
        }
    }
};

// Drops values of the sum of the parts, those that a mask over `out` drops.
struct DroppedOperands : LowRankOperands {
    Dropout dropout;

    DroppedOperands(GemmOperands operands, Dropout dropout = {}) : LowRankOperands(operands), dropout(dropout) {}

    template <bool kAligned, class Each>
    DEVICE void finish(const Each& each) const {
        if (dropout.threshold == 0) return;
        each([&](float& low, float& high, int row, int group, int column) {
            const int64_t index = int64_t(row) * shape_n + group + column;
            low = dropout(low, index);
            high = dropout(high, index + 1);
        });
    }
};

template <class Operands>
constexpr bool kHasParts = std::is_base_of<LowRankOperands, Operands>::value;

// An order of operands with parts.
struct AdaptedForwardLines : ForwardLines {
    using Operands = ScaledOperands;
};
struct AdaptedBackwardInputLines : BackwardInputLines {
    using Operands = DroppedOperands;
};

// As lines_aligned, of the parts as well.
template <class Lines>
bool parts_aligned(const typename Lines::Operands& operands) {
    bool aligned = lines_aligned<Lines>(operands);
    for (int i = 0; i < operands.count; ++i) {
        const LowRankPart& part = operands.parts[i];
        aligned = aligned && vector_rows(part.depth) && vector_rows(part.left_stride) && vector_rows(part.first) &&
                  vector_rows(part.columns) && vector_aligned(part.left, part.right);
    }
    return aligned;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
