// How gemms on mma.sync that store `out` plainly are launched: the choice of the tile, and the epilogues that several
// files share.
#pragma once

#include "gemm.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm {

// Stores the accumulators as they are; four columns at a time where the derived epilogue is for aligned rows.
struct PlainEpilogue {
    static constexpr bool kStores = true;

    template <class C>
    DEVICE void transform(Accumulators<C>&, TileOrigin, unsigned char*) const {}
};

// Assigns the accumulators plus bias, rounded to bf16.
template <bool kAligned>
struct StoreBf16 : PlainEpilogue {
    bf16* out;
    const bf16* bias;  // [N], or null for none
    int columns;

    StoreBf16(bf16* out, const bf16* bias, int columns) : out(out), bias(bias), columns(columns) {}

    DEVICE void store(int row, int column, float4 value) const {
        float values[4] = {value.x, value.y, value.z, value.w};
        if (bias != nullptr) {
            const int count = min(4, columns - column);
            for (int i = 0; i < count; ++i) values[i] += to_float(bias[column + i]);
        }
        store_four_bf16<kAligned>(out, columns, row, column, values);
    }
};

// Whether rows of `out` of this many columns, `stride` values apart, can be stored four columns at a time.
inline bool stores_aligned(const void* out, int columns, int stride) {
    return vector_rows(columns) && vector_rows(stride) && vector_aligned(out);
}

// In which direction `out` may be narrow: few columns, few rows.
enum class Narrow { no, columns, rows };

// Large tiles read each operand half as often as small ones. Small tiles are for shapes with which large ones would
// leave multiprocessors, or most of a tile, idle. `kNarrow` adds tiles for an `out` that is narrow and long; they are
// taken where they occupy half of the multiprocessors. `aligned`: whether operands and `out` allow 16-byte accesses.
// `epilogue` makes an epilogue for an `out` that does (true_type) or does not (false_type).
template <class Lines, Narrow kNarrow, class MakeEpilogue>
mmpo_status launch_gemm(const typename Lines::Operands& operands, bool aligned, MakeEpilogue epilogue,
                        mmpo_stream stream) {
    const int m = operands.shape_m, n = operands.shape_n;
    if (m == 0 || n == 0 || operands.shape_k == 0) return kSuccess;
    if (!aligned) return launch_tiles<SmallTile, Lines, false>(operands, epilogue(std::false_type()), stream);
    const auto stored = epilogue(std::true_type());
    const auto occupies = [&](int64_t tiles) { return 2 * tiles >= multiprocessors(); };
    if constexpr (kNarrow == Narrow::columns) {
        if (n <= TallTile::BLOCK_N && m > SmallTile::BLOCK_M && occupies(tile_count<TallTile>(operands)))
            return launch_tiles<TallTile, Lines, true>(operands, stored, stream);
    }
    if constexpr (kNarrow == Narrow::rows) {
        if (m <= WideTile::BLOCK_M && n > SmallTile::BLOCK_N && occupies(tile_count<WideTile>(operands)))
            return launch_tiles<WideTile, Lines, true>(operands, stored, stream);
    }
    const bool fits_small = m <= SmallTile::BLOCK_M || n <= SmallTile::BLOCK_N;
    return fits_small || tile_count<LargeTile>(operands) < multiprocessors()
               ? launch_tiles<SmallTile, Lines, true>(operands, stored, stream)
               : launch_tiles<LargeTile, Lines, true>(operands, stored, stream);
}

}  // namespace gemm
}  // namespace MMPO_VARIANT
}  // namespace mmpo
