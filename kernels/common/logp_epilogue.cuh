// What the log-prob head does with logits while they are accumulators in registers, for the gemm on mma.sync and for
// Hopper's alike.
//
// A whole warp calls the functions on `d`, for 16 rows x COLUMNS columns of accumulators. Lane l holds d[4j + 2h + e]
// of row `row + l/4 + 8h` and column `column + 8j + 2(l%4) + e`. So the four lanes of a quad hold a row.
//
// Exponents are of base 2 here: 2^(log2(e) * logit - reference) is one fma and one ex2, and the exponent is rounded
// once. A reference is log2(e) times a logit: the largest one of the row's kStatisticsColumns columns in a tile, or,
// for all tiles of the row, the target's.
#pragma once

#include <cfloat>

#include "launch.cuh"
#include "limits.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Columns of a row that share a reference. With more columns there would be fewer statistics, but those are only 12
// bytes beside 256 of exponentials, and a block of the portable gemm has no more columns.
constexpr int kStatisticsColumns = 128;

// Limit of a row's exponents. Below it their sum stays far below 2^127, the limit of f32 and bf16.
constexpr float kMostExponent = 64.0f;
// 2^kMostExponent: if the sum of exponentials is at most this, so is every term.
constexpr float kMostSum = 0x1p64f;

// What the forward leaves of each tile of a row, which is a run of kStatisticsColumns columns, and of each row. The
// arrays of the tiles are [tiles, rows], so that a block writes whole lines.
struct TileStatistics {
    float* reference;
    // Sum of 2^exponent over the columns, with exponent = log2(e) * logit - reference.
    float* sum;
    // Sum of 2^exponent * exponent; NULL if no entropy is wanted.
    float* weighted;
    // [rows] The target's logit.
    float* target_logit;
    // [rows] The reference that a row's tiles use where they can, see `reference_of`. NULL: each uses its own.
    float* row_reference;
    const uint32_t* targets;
    int rows;
    int vocab;

    // Lays the arrays out in `workspace`. The references come first, because logp_head_backward reads them there.
    static TileStatistics of(void* workspace, const uint32_t* targets, int rows, int vocab, bool entropy,
                             bool row_references) {
        float* const reference = static_cast<float*>(workspace);
        const int64_t values = tiles(vocab) * rows;
        float* const of_rows = reference + 3 * values;
        return {reference,
                reference + values,
                entropy ? reference + 2 * values : nullptr,
                of_rows,
                row_references ? of_rows + rows : nullptr,
                targets,
                rows,
                vocab};
    }

    // The rows' references in the workspace of a forward that had row references.
    static const float* row_references_in(const void* workspace, int rows, int vocab) {
        return static_cast<const float*>(workspace) + 3 * tiles(vocab) * rows + rows;
    }

    static int64_t tiles(int vocab) { return ceil_div(vocab, kStatisticsColumns); }

    static int64_t workspace_bytes(int rows, int vocab) {
        return (3 * tiles(vocab) + 2) * rows * int64_t(sizeof(float));
    }

    // The row's own reference; there must be some. Rows past the last get that of the last.
    DEVICE float reference_of_row(int row) const { return row_reference[min(row, rows - 1)]; }

    // The reference of a tile whose largest logit, times log2(e), is `largest`: the row's, as long as exponentials
    // relative to it stay far from overflow, else `largest`.
    DEVICE float reference_of(int row, float largest) const {
        if (row_reference == nullptr) return largest;
        const float of_row = reference_of_row(row);
        return largest > of_row + kMostExponent ? largest : of_row;
    }
};

// Stands for a logit beyond the vocabulary. Its exponential is 0, and since the value is finite, so is its exponential
// times its exponent.
constexpr float kNoLogit = -1e30f;

template <int COLUMNS>
DEVICE void mask_columns(float (&d)[COLUMNS / 2], int column, int vocab) {
    if (column + COLUMNS <= vocab) return;
    const int first = column + int(lane_id()) % 4 * 2;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (first + 8 * j + e < vocab) continue;
            d[4 * j + e] = kNoLogit;
            d[4 * j + 2 + e] = kNoLogit;
        }
    }
}

// The targets of a lane's two rows; -1 for rows past the last.
struct RowTargets {
    int target[2];

    DEVICE RowTargets(const TileStatistics& statistics, int row) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int own_row = row + int(lane_id()) / 4 + 8 * h;
            target[h] = own_row < statistics.rows ? int(statistics.targets[own_row]) : -1;
        }
    }
};

// Stores the logit of each row's target, from the lane that holds it.
template <int COLUMNS>
DEVICE void pick_targets(const TileStatistics& statistics, const RowTargets& targets, const float (&d)[COLUMNS / 2],
                         int row, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int offset = targets.target[h] - column - int(lane_id()) % 4 * 2;
        if (offset < 0 || offset >= COLUMNS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (offset == 8 * j + e) {
                    statistics.target_logit[row + int(lane_id()) / 4 + 8 * h] = d[4 * j + 2 * h + e];
                }
            }
        }
    }
}

// Reduces a value of each of a lane's two rows over the four lanes of the quad, which all get the same bits.
template <class Combine>
DEVICE void reduce_quad(float (&values)[2], Combine combine) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        values[h] = combine(values[h], __shfl_xor_sync(0xffffffffu, values[h], 1));
        values[h] = combine(values[h], __shfl_xor_sync(0xffffffffu, values[h], 2));
    }
}

// Raises `largest` to the largest logits among the lane's. NaN is left for the sums to show.
template <int COLUMNS>
DEVICE void raise_largest(float (&largest)[2], const float (&d)[COLUMNS / 2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], d[i]);
}

// Turns the lanes' largest logits into those of the rows, times log2(e).
DEVICE void reduce_largest(float (&largest)[2]) {
    reduce_quad(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int h = 0; h < 2; ++h) largest[h] *= kLog2E;
}

// A lane's part of the sums of its two rows; `reduce` adds up the parts of the quad.
struct RowSums {
    float sum[2] = {0.0f, 0.0f};
    float weighted[2] = {0.0f, 0.0f};

    // Replaces logits by their exponentials, and adds these to the sums.
    template <int COLUMNS, bool kEntropy>
    DEVICE void exponentiate(float (&d)[COLUMNS / 2], const float (&reference)[2]) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; ++i) {
            const int h = i / 2 % 2;
            const float exponent = fmaf(d[i], kLog2E, -reference[h]);
            d[i] = exp2_approx(exponent);
            sum[h] += d[i];
            if constexpr (kEntropy) weighted[h] = fmaf(d[i], exponent, weighted[h]);
        }
    }
    template <int COLUMNS>
    DEVICE void exponentiate(float (&d)[COLUMNS / 2], const float (&reference)[2], bool entropy) {
        if (entropy)
            exponentiate<COLUMNS, true>(d, reference);
        else
            exponentiate<COLUMNS, false>(d, reference);
    }

    template <bool kEntropy>
    DEVICE void reduce() {
        const auto add = [](float a, float b) { return a + b; };
        reduce_quad(sum, add);
        if constexpr (kEntropy) reduce_quad(weighted, add);
    }
};

// ---- gradients

// The inputs of dlogits, [rows] each. dentropy and entropy are NULL together.
struct GradientInputs {
    const uint32_t* targets;
    const float* lse;
    const float* logp;
    const float* dlogp;
    const float* dentropy;
    const float* entropy;
    int rows;
};

// The same for one row, in the form that logits other than the target's need:
//   -a pi - b pi (log pi + entropy) = -pi (constant + slope log2 pi)
struct RowGradient {
    float lse;  // times log2(e)
    float constant;
    float slope;
    int target;

    // Rows past the last get the values of the last.
    DEVICE RowGradient(const GradientInputs& inputs, int row) {
        row = min(row, inputs.rows - 1);
        const float a = inputs.dlogp[row];
        const float b = inputs.dentropy != nullptr ? inputs.dentropy[row] : 0.0f;
        const float entropy = inputs.entropy != nullptr ? inputs.entropy[row] : 0.0f;
        lse = inputs.lse[row] * kLog2E;
        constant = fmaf(b, entropy, a);
        slope = b * kLn2;
        target = int(inputs.targets[row]);
    }

    DEVICE float of(float probability, float log2_probability) const {
        return -probability * fmaf(slope, log2_probability, constant);
    }
};

// The target's gradient a (1 - pi) - b pi (log pi + entropy), from the log-prob itself. If 1 - pi were formed from a
// rounded probability, or even from a logit minus lse, a target that the model is sure of would lose its gradient.
DEVICE float target_gradient(const GradientInputs& inputs, int row) {
    const float logp = inputs.logp[row];
    const float gradient = -inputs.dlogp[row] * expm1f(logp);
    return inputs.dentropy == nullptr ? gradient
                                      : gradient - inputs.dentropy[row] * expf(logp) * (logp + inputs.entropy[row]);
}

// The gradients' inputs of a lane's two rows, among the 16 that begin at `first`.
struct RowGradients {
    RowGradient of_half[2];
    int row;

    DEVICE RowGradients(const GradientInputs& inputs, int first)
        : of_half{RowGradient(inputs, first + int(lane_id()) / 4), RowGradient(inputs, first + int(lane_id()) / 4 + 8)},
          row(first + int(lane_id()) / 4) {}
};

// Replaces logits by their gradient. Rows past the last and columns past the vocabulary get meaningless numbers.
template <int COLUMNS>
DEVICE void logits_to_gradient(float (&d)[COLUMNS / 2], const RowGradients& gradients, const GradientInputs& inputs,
                               int column) {
    const int first = column + int(lane_id()) % 4 * 2;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) {
        const RowGradient& gradient = gradients.of_half[i / 2 % 2];
        const float exponent = fmaf(d[i], kLog2E, -gradient.lse);
        d[i] = gradient.of(exp2_approx(exponent), exponent);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int offset = gradients.of_half[h].target - first, row = gradients.row + 8 * h;
        if (offset < 0 || offset >= COLUMNS || row >= inputs.rows) continue;
        const float at_target = target_gradient(inputs, row);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (offset == 8 * j + e) d[4 * j + 2 * h + e] = at_target;
            }
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
