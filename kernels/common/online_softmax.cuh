// The running softmax of flash attention, in base 2, over accumulators of mma.sync or wgmma. A lane holds two rows, the
// upper and the lower one. Its registers 4j and 4j + 1 are columns 8j + 2 * (lane % 4) and the next one of the upper
// row; registers 4j + 2 and 4j + 3 are the same columns of the lower row.
#pragma once

#include "attention_tiles.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Sets scores of the upper (half 0) or lower (half 1) row to -inf where `hidden` holds for the column, counted from 2 *
// (lane % 4) on.
template <int kScores, class Hidden>
DEVICE void mask_scores(float (&scores)[kScores], int half, Hidden hidden) {
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (hidden(8 * j + e)) scores[4 * j + 2 * half + e] = -INFINITY;
        }
    }
}

// The running softmax of a lane's two rows.
struct OnlineSoftmax {
    float maximum[2] = {-INFINITY, -INFINITY};  // of unscaled scores
    float sum[2] = {0.0f, 0.0f};                // of this lane's columns only, until finish

    // Replaces scores by exp2(scale * (score - maximum)), and sets `rescale` to the factors by which the results of
    // earlier blocks must be multiplied. The scale is folded into one multiply-add a score; it must be positive.
    template <int kScores>
    DEVICE void update(float (&scores)[kScores], float scale, float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = maximum[half];
#pragma unroll
            for (int j = 0; j < kScores / 4; ++j) {
                highest = fmaxf(highest, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // A row that has seen no key yet has the maximum -inf; 0 in its place avoids inf - inf.
            const float base = highest == -INFINITY ? 0.0f : highest * scale;
            rescale[half] = exp2_approx(__fmaf_rn(maximum[half], scale, -base));
            maximum[half] = highest;
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
                for (int i = 4 * j + 2 * half; i < 4 * j + 2 * half + 2; ++i) {
                    scores[i] = exp2_approx(__fmaf_rn(scores[i], scale, -base));
                    added += scores[i];
                }
            }
            sum[half] = sum[half] * rescale[half] + added;
        }
    }

    // Adds up the sums of the row's four lanes.
    DEVICE void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
            sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
        }
    }

    // logsumexp of the row's scaled scores, natural log. Valid after finish.
    DEVICE float lse(int half, float scale) const { return maximum[half] * scale * kLn2 + logf(sum[half]); }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
