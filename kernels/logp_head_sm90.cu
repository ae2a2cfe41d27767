// The log-prob head's products on Hopper: common/product_sm90.cuh with the epilogues of common/logp_epilogue.cuh. What
// they compute, and why, is said in logp_head.cu.
//
// A consumer warp holds 16 whole rows of its tile, so that a row's statistics need the four lanes of a quad and no
// barrier. Panels of 64 columns leave by TMA while the next are computed, and the producer runs ahead into the next
// tile.

#include "common/logp_epilogue.cuh"
#include "common/logp_merge.cuh"
#include "common/product_sm90.cuh"

namespace {

using namespace hopper;

// Columns of a panel, and the accumulators a lane holds of them.
constexpr int kColumns = kPanelColumns, kValues = kPanelAccumulatorsBf16;
static_assert(kStatisticsColumns == 2 * kColumns, "two panels share a reference");

// A matrix of bf16 that panels go to: by TMA where its rows start on 16 bytes, else value by value.
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
    DEVICE void store(Panels& panels, const float (&values)[kValues], int row, int column) const {
        if (mapped) {
            write_panel_bf16(panels.acquire(), values);
            panels.send([&](uint32_t panel) { tma_store_2d(&map, panel, column, row); });
        } else {
            store_values(values, row + int(lane_id()) / 4, column + int(lane_id()) % 4 * 2);
        }
    }

private:
    DEVICE void store_values(const float (&values)[kValues], int row, int column) const {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            const int own_row = row + i / 2 % 2 * 8, own_column = column + i / 4 * 8 + i % 2;
            if (own_row < rows && own_column < columns) {
                out[int64_t(own_row) * columns + own_column] = to_bf16(values[i]);
            }
        }
    }
};

// Accumulators `first` .. of a consumer's, as an array of their own.
template <int kCount>
DEVICE void take_panel(float (&values)[kValues], const float (&d)[kCount], int first) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = d[first + i];
}

// Statistics, and exponentials where they are kept.
template <bool kExponentials>
struct ForwardEpilogue {
    PanelTarget exponentials;
    TileStatistics statistics;

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        static_assert(kCount % (2 * kValues) == 0, "whole pairs of panels");
        if (row >= statistics.rows) return;
        const RowTargets targets(statistics, row);
#pragma unroll
        for (int first = 0; first < kCount; first += 2 * kValues) {
            const int x = column + 2 * first;
            if (x >= statistics.vocab) return;
            float reference[2], largest[2] = {kNoLogit, kNoLogit}, values[kValues];
#pragma unroll
            for (int panel = 0; panel < 2; ++panel) {
                take_panel(values, d, first + panel * kValues);
                mask_columns<kColumns>(values, x + panel * kColumns, statistics.vocab);
                pick_targets<kColumns>(statistics, targets, values, row, x + panel * kColumns);
                raise_largest<kColumns>(largest, values);
            }
            join_largest(largest);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reference[h] = statistics.reference_of(row + int(lane_id()) / 4 + 8 * h, largest[h]);
            }
            RowSums sums;
#pragma unroll
            for (int panel = 0; panel < 2; ++panel) {
                take_panel(values, d, first + panel * kValues);
                mask_columns<kColumns>(values, x + panel * kColumns, statistics.vocab);
                sums.take_in<kColumns>(values, reference, statistics.weighted != nullptr);
                if constexpr (kExponentials) {
                    if (x + panel * kColumns < statistics.vocab) {
                        exponentials.store(panels, values, row, x + panel * kColumns);
                    }
                }
            }
            sums.join();
            if (lane_id() % 4 == 0) write_statistics(reference, sums, row + int(lane_id()) / 4, x);
        }
    }

private:
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

// dlogits of columns first_column .. of the vocabulary.
struct GradientEpilogue {
    PanelTarget dlogits;
    GradientInputs inputs;
    int first_column;

    template <int kCount, class Panels>
    DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const {
        if (row >= inputs.rows) return;
        const RowGradients gradients(inputs, row);
#pragma unroll
        for (int first = 0; first < kCount; first += kValues) {
            const int x = column + 2 * first;
            if (x >= dlogits.columns) return;
            float values[kValues];
            take_panel(values, d, first);
            logits_to_gradient<kColumns>(values, gradients, inputs, first_column + x);
            dlogits.store(panels, values, row, x);
        }
    }
};

// In tiles whose consumers hold whole runs of kStatisticsColumns columns.
template <class Epilogue>
mmpo_status launch_logits(const Operands& operands, const Epilogue& epilogue, mmpo_stream stream) {
    const ProductPlan plan = plan_panel_tiles(operands.shape_m, operands.shape_n, operands.shape_k);
    return launch_panel_tiles<ForwardLines>(operands, plan, epilogue, stream);
}

template <bool kExponentials>
mmpo_status launch_forward(bf16* exponentials, const TileStatistics& statistics, const Operands& operands,
                           mmpo_stream stream) {
    ForwardEpilogue<kExponentials> epilogue{{}, statistics};
    if constexpr (kExponentials) {
        const int error = PanelTarget::make(&epilogue.exponentials, exponentials, statistics.rows, statistics.vocab);
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
    const Operands operands{hidden, weight, rows, vocab, width};
    if (!operands_mappable<ForwardLines>(operands)) return kInvalidValue;
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
    const Operands operands{hidden, weight + int64_t(first_column) * width, rows, columns, width};
    if (!operands_mappable<ForwardLines>(operands)) return kInvalidValue;
    GradientEpilogue epilogue{{}, {targets, lse, logp, dlogp, dentropy, entropy, rows}, first_column};
    const int error = PanelTarget::make(&epilogue.dlogits, dlogits, rows, columns);
    return error != kSuccess ? error : launch_logits(operands, epilogue, stream);
}
