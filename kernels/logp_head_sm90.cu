// The log-prob head's gemms on Hopper: common/gemm_sm90.cuh with the epilogues of common/logp_epilogue.cuh.
// logp_head.cu says what they compute, and why.
//
// A consumer warp holds 16 whole rows of its tile, so a row's statistics need only the four lanes of a quad and no
// barrier. Panels of 64 columns leave by TMA while the next ones are computed, and the producer runs ahead into the
// next tile.

#include "common/logp_epilogue.cuh"
#include "common/logp_merge.cuh"
#include "common/gemm_launch_sm90.cuh"

namespace {

using namespace gemm_sm90;

// Columns of a panel, and the accumulators a lane holds of them.
constexpr int kColumns = kPanelColumns, kValues = kPanelAccumulatorsBf16;
static_assert(kStatisticsColumns == 2 * kColumns, "two panels share a reference");

// A bf16 matrix that panels are stored to: by TMA where its rows start on 16 bytes, otherwise value by value.
struct PanelTarget {
    CUtensorMap map;
    bf16* out;
    int rows, columns;
    bool mapped;

    static mmpo_status make(PanelTarget* target, bf16* out, int rows, int columns) {
        *target = {{}, out, rows, columns, vector_rows(columns) && vector_aligned(out)};
        return target->mapped ? encode_panel_map(&target->map, out, rows, columns) : kSuccess;
    }

    template <class Panels>
    DEVICE void store(Panels& panels, const PanelPairs& pairs, int row, int column) const {
        if (mapped) {
            write_panel_bf16(panels.acquire(), pairs);
            panels.send([&](uint32_t panel) { tma_store_2d(&map, panel, column, row); });
        } else {
            store_values(pairs, row + int(lane_id()) / 4, column + int(lane_id()) % 4 * 2);
        }
    }

private:
    DEVICE void store_values(const PanelPairs& pairs, int row, int column) const {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const int own_row = row + i / 2 % 2 * 8, own_column = column + i / 4 * 8 + i % 2;
            if (own_row < rows && own_column < columns) {
                out[int64_t(own_row) * columns + own_column] = bf16{uint16_t(pairs[i / 2] >> 16 * (i % 2))};
            }
        }
    }
};

// Leaves statistics, and exponentials where they are kept.
template <bool kExponentials>
struct ForwardEpilogue {
    // Accumulators that a lane holds of the columns that share a reference, and their exponentials.
    static constexpr int kTileValues = 2 * kValues;
    using Logits = float[kTileValues];
    using Pairs = PanelPairs[2];

    PanelTarget exponentials;
    TileStatistics statistics;

    template <int kCount, class Panels>
    DEVICE void operator()(float (&d)[kCount], int row, int column, Panels& panels) const {
        static_assert(kCount % kTileValues == 0, "whole pairs of panels");
        if (row >= statistics.rows) return;
        const RowTargets targets(statistics, row);
#pragma unroll
        for (int first = 0; first < kCount; first += kTileValues) {
            const int x = column + 2 * first;
            if (x >= statistics.vocab) return;
            Logits& logits = reinterpret_cast<Logits&>(d[first]);
            mask_columns<kStatisticsColumns>(logits, x, statistics.vocab);
            pick_targets<kStatisticsColumns>(statistics, targets, logits, row, x);
            Pairs pairs;
            float reference[2];
            RowSums sums;
            if (!exponentiate_by_row(pairs, sums, reference, logits, row))
                exponentiate_by_tile(pairs, sums, reference, logits, row);
            if constexpr (kExponentials) {
#pragma unroll
                for (int panel = 0; panel < 2; ++panel) {
                    const int panel_column = x + panel * kColumns;
                    if (panel_column < statistics.vocab) exponentials.store(panels, pairs[panel], row, panel_column);
                }
            }
            if (lane_id() % 4 == 0) write_statistics(reference, sums, row + int(lane_id()) / 4, x);
        }
    }

private:
    // Forms exponentials relative to the rows' references, and their sums. False if rows have no references, or if the
    // reference of one is too far below the tile's logits. The sums show that, so no search for the largest logit is
    // needed.
    DEVICE bool exponentiate_by_row(Pairs& pairs, RowSums& sums, float (&reference)[2], const Logits& logits,
                                    int row) const {
        if constexpr (kExponentials) {
            if (statistics.row_reference == nullptr) return false;
#pragma unroll
            for (int h = 0; h < 2; ++h) reference[h] = statistics.reference_of_row(row + int(lane_id()) / 4 + 8 * h);
            exponentiate<false>(pairs, sums, reference, logits);
            return !__any_sync(0xffffffffu, sums.sum[0] > kMostSum || sums.sum[1] > kMostSum);
        } else {
            return false;
        }
    }

    // The same relative to references that depend on the tile's largest logits.
    DEVICE void exponentiate_by_tile(Pairs& pairs, RowSums& sums, float (&reference)[2], const Logits& logits,
                                     int row) const {
        float largest[2] = {kNoLogit, kNoLogit};
        raise_largest<kStatisticsColumns>(largest, logits);
        reduce_largest(largest);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            reference[h] = statistics.reference_of(row + int(lane_id()) / 4 + 8 * h, largest[h]);
        }
        if (statistics.weighted != nullptr)
            exponentiate<true>(pairs, sums, reference, logits);
        else
            exponentiate<false>(pairs, sums, reference, logits);
    }

    // Leaves the logits as they are: their exponentials take half as many registers.
    template <bool kEntropy>
    static DEVICE void exponentiate(Pairs& pairs, RowSums& sums, const float (&reference)[2], const Logits& logits) {
        sums = RowSums();
#pragma unroll
        for (int j = 0; j < kTileValues / 4; ++j) {
            float values[4] = {logits[4 * j], logits[4 * j + 1], logits[4 * j + 2], logits[4 * j + 3]};
            sums.exponentiate<8, kEntropy>(values, reference);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                pairs[4 * j / kValues][2 * j % (kValues / 2) + h] = pack_bf16x2(values[2 * h], values[2 * h + 1]);
            }
        }
        sums.reduce<kEntropy>();
    }

    DEVICE void write_statistics(const float (&reference)[2], const RowSums& sums, int row, int column) const {
        const int64_t tile = int64_t(column / kStatisticsColumns) * statistics.rows;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (row + 8 * h >= statistics.rows) return;
            const int64_t index = tile + row + 8 * h;
            statistics.reference[index] = reference[h];
            statistics.sum[index] = sums.sum[h];
            if (statistics.weighted != nullptr) statistics.weighted[index] = sums.weighted[h];
        }
    }
};

// Writes dlogits of the vocabulary's columns from first_column on.
struct GradientEpilogue {
    PanelTarget dlogits;
    GradientInputs inputs;
    int first_column;

    template <int kCount, class Panels>
    DEVICE void operator()(float (&d)[kCount], int row, int column, Panels& panels) const {
        if (row >= inputs.rows) return;
        const RowGradients gradients(inputs, row);
#pragma unroll
        for (int first = 0; first < kCount; first += kValues) {
            const int x = column + 2 * first;
            if (x >= dlogits.columns) return;
            float (&values)[kValues] = reinterpret_cast<float (&)[kValues]>(d[first]);
            logits_to_gradient<kColumns>(values, gradients, inputs, first_column + x);
            PanelPairs pairs;
            pack_panel(pairs, values);
            dlogits.store(panels, pairs, row, x);
        }
    }
};

// Uses tiles whose consumers hold whole runs of kStatisticsColumns columns.
template <class Epilogue>
mmpo_status launch_logits(const GemmOperands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    const GemmPlan plan = plan_panel_tiles(operands.shape_m, operands.shape_n, operands.shape_k);
    return launch_panel_tiles<ForwardLines>(operands, plan, epilogue, stream);
}

template <bool kExponentials>
mmpo_status launch_forward(bf16* exponentials, const TileStatistics& statistics, const GemmOperands& operands,
                           mmpo_stream stream) {
    ForwardEpilogue<kExponentials> epilogue{{}, statistics};
    if constexpr (kExponentials) {
        const mmpo_status error =
            PanelTarget::make(&epilogue.exponentials, exponentials, statistics.rows, statistics.vocab);
        if (error != kSuccess) return error;
    }
    return launch_logits(operands, epilogue, stream);
}

}  // namespace

mmpo_status MMPO_EXPORT(logp_head_forward_sm90)(float* lse, float* logp, float* entropy, mmpo_bf16* exponentials,
                                                void* workspace, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                                const uint32_t* targets, int32_t rows, int32_t width, int32_t vocab,
                                                mmpo_stream stream) {
    if (rows == 0 || width == 0 || vocab == 0) return kSuccess;
    const GemmOperands operands{hidden, weight, rows, vocab, width};
    if (!lines_aligned<ForwardLines>(operands)) return kInvalidValue;
    const auto statistics = begin_statistics(exponentials, workspace, targets, rows, vocab, entropy);
    if (const mmpo_status error = target_references(statistics, hidden, weight, width, stream)) return error;
    const mmpo_status status = exponentials != nullptr
                                   ? launch_forward<true>(exponentials, statistics, operands, stream)
                                   : launch_forward<false>(nullptr, statistics, operands, stream);
    if (status != kSuccess) return status;
    return merge_tiles(lse, logp, entropy, exponentials, statistics, stream);
}

mmpo_status MMPO_EXPORT(logp_head_dlogits_sm90)(mmpo_bf16* dlogits, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                                const uint32_t* targets, const float* lse, const float* logp,
                                                const float* dlogp, const float* dentropy, const float* entropy,
                                                int32_t rows, int32_t width, int32_t first_column, int32_t columns,
                                                mmpo_stream stream) {
    if (rows == 0 || width == 0 || columns == 0) return kSuccess;
    if ((dentropy == nullptr) != (entropy == nullptr)) return kInvalidValue;
    const GemmOperands operands{hidden, weight + int64_t(first_column) * width, rows, columns, width};
    if (!lines_aligned<ForwardLines>(operands)) return kInvalidValue;
    GradientEpilogue epilogue{{}, {targets, lse, logp, dlogp, dentropy, entropy, rows}, first_column};
    const mmpo_status error = PanelTarget::make(&epilogue.dlogits, dlogits, rows, columns);
    return error != kSuccess ? error : launch_logits(operands, epilogue, stream);
}
