// What the log-prob head does to logits while they are accumulators in registers: the same for the mma.sync product and
// Hopper's.
//
// Functions on `d` are called by a whole warp for 16 rows x COLUMNS columns of accumulators: lane l holds
// d[4j + 2h + e], row `row + l/4 + 8h`, column `column + 8j + 2(l%4) + e`. A row lies in the four lanes of a quad.
//
// Exponents are of base 2 in here: 2^(log2(e) * logit - reference) is one fma and one ex2, and the exponent is rounded
// once. A row's reference is log2(e) times its largest logit within kStatisticsColumns columns.
#pragma once

#include <cfloat>

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Columns of a row that share a reference. More of them would make fewer statistics, which are 12 bytes beside 256 of
// exponentials, but a block of the portable product has no more.
constexpr int kStatisticsColumns = 128;

// What the forward leaves of each row and kStatisticsColumns columns, [tiles, rows] each, so that a block writes whole
// lines; and of each row.
struct TileStatistics {
    float* reference;
    // Sum of 2^exponent over the columns, with exponent = log2(e) * logit - reference.
    float* sum;
    // Sum of 2^exponent * exponent; NULL where no entropy is wanted.
    float* weighted;
    // [rows] the target's logit.
    float* target_logit;
    const uint32_t* targets;
    int rows;
    int vocab;

    // Cuts `workspace` up. The references come first: logp_head_backward reads them there.
    static TileStatistics of(void* workspace, const uint32_t* targets, int rows, int vocab, bool entropy) {
        float* const reference = static_cast<float*>(workspace);
        const int64_t values = tiles(vocab) * rows;
        return {reference,
                reference + values,
                entropy ? reference + 2 * values : nullptr,
                reference + 3 * values,
                targets,
                rows,
                vocab};
    }

    static int64_t tiles(int vocab) { return ceil_div(vocab, kStatisticsColumns); }

    static int64_t workspace_bytes(int rows, int vocab) {
        return (3 * tiles(vocab) + 1) * rows * int64_t(sizeof(float));
    }
};

// Stands for a logit beyond the vocabulary: its exponential is 0, and so is that times the finite exponent.
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

// The lane whose rows' target lies in these columns writes its logit.
template <int COLUMNS>
DEVICE void pick_targets(const TileStatistics& statistics, const float (&d)[COLUMNS / 2], int row, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int own_row = row + int(lane_id()) / 4 + 8 * h;
        if (own_row >= statistics.rows) continue;
        const int offset = int(statistics.targets[own_row]) - column - int(lane_id()) % 4 * 2;
        if (offset < 0 || offset >= COLUMNS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (offset == 8 * j + e) statistics.target_logit[own_row] = d[4 * j + 2 * h + e];
            }
        }
    }
}

// A value of each of a lane's two rows, joined with those of the quad's other lanes; all four get the same bits.
template <class Join>
DEVICE void join_quad(float (&values)[2], Join join) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        values[h] = join(values[h], __shfl_xor_sync(0xffffffffu, values[h], 1));
        values[h] = join(values[h], __shfl_xor_sync(0xffffffffu, values[h], 2));
    }
}

// The references of these columns alone. NaN is left to the sums.
template <int COLUMNS>
DEVICE void row_references(float (&reference)[2], const float (&d)[COLUMNS / 2]) {
    float largest[2] = {d[0], d[2]};
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], d[i]);
    join_quad(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int h = 0; h < 2; ++h) reference[h] = largest[h] * kLog2E;
}

template <int COLUMNS, bool kEntropy>
DEVICE void exponentials(float (&d)[COLUMNS / 2], float (&sum)[2], float (&weighted)[2], const float (&reference)[2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) {
        const int h = i / 2 % 2;
        const float exponent = fmaf(d[i], kLog2E, -reference[h]);
        d[i] = exp2_approx(exponent);
        sum[h] += d[i];
        if constexpr (kEntropy) weighted[h] = fmaf(d[i], exponent, weighted[h]);
    }
}

// Replaces logits by their exponentials, and assigns the rows' sums over these columns.
template <int COLUMNS>
DEVICE void row_exponentials(float (&d)[COLUMNS / 2], float (&sum)[2], float (&weighted)[2],
                             const float (&reference)[2], bool entropy) {
    sum[0] = sum[1] = weighted[0] = weighted[1] = 0.0f;
    const auto add = [](float a, float b) { return a + b; };
    if (entropy) {
        exponentials<COLUMNS, true>(d, sum, weighted, reference);
        join_quad(weighted, add);
    } else {
        exponentials<COLUMNS, false>(d, sum, weighted, reference);
    }
    join_quad(sum, add);
}

// ---- Gradients

// What dlogits are made of, [rows] each. dentropy and entropy are NULL together.
struct GradientInputs {
    const uint32_t* targets;
    const float* lse;
    const float* logp;
    const float* dlogp;
    const float* dentropy;
    const float* entropy;
    int rows;
};

// The same of one row, as `gradient` wants it:
//   -a pi - b pi (log pi + entropy) = -pi (constant + slope log2 pi)
struct RowGradient {
    float lse;  // times log2 e
    float constant;
    float slope;
    int target;
    // At the target: a (1 - pi) - b pi (log pi + entropy), from the log-prob itself. 1 - pi by way of a rounded
    // probability, or even of a logit minus lse, would lose a target that the model is sure of.
    float at_target;

    DEVICE RowGradient(const GradientInputs& inputs, int row) {
        const float a = inputs.dlogp[row], logp = inputs.logp[row];
        const float b = inputs.dentropy != nullptr ? inputs.dentropy[row] : 0.0f;
        const float entropy = inputs.entropy != nullptr ? inputs.entropy[row] : 0.0f;
        lse = inputs.lse[row] * kLog2E;
        constant = fmaf(b, entropy, a);
        slope = b * kLn2;
        target = int(inputs.targets[row]);
        at_target = -a * expm1f(logp) - b * expf(logp) * (logp + entropy);
    }

    // Of any other logit, from its probability and the logarithm of that.
    DEVICE float elsewhere(float probability, float log2_probability) const {
        return -probability * fmaf(slope, log2_probability, constant);
    }
};

// Replaces logits by their gradient. Rows past the last and columns past the vocabulary are left without meaning.
template <int COLUMNS>
DEVICE void logits_to_gradient(float (&d)[COLUMNS / 2], const GradientInputs& inputs, int row, int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int own_row = row + int(lane_id()) / 4 + 8 * h;
        if (own_row >= inputs.rows) continue;
        const RowGradient gradient(inputs, own_row);
        const int offset = gradient.target - column - int(lane_id()) % 4 * 2;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& value = d[4 * j + 2 * h + e];
                const float exponent = fmaf(value, kLog2E, -gradient.lse);
                value = gradient.elsewhere(exp2_approx(exponent), exponent);
                if (offset == 8 * j + e) value = gradient.at_target;
            }
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
