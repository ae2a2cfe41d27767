// Loss and per-token coefficients of preference pairs under MMPO, DPO, SimPO and SFT.
//
// The reference, formula by formula, is src/objective.rs; names are the same. All outputs are assigned. Sums over
// tokens and everything formed from them are f64, as there: a response of 2000 tokens sums to thousands of nats, and
// the softmax weight of a pair depends on the difference of two such sums.

#include "common/reduce.cuh"

namespace {

// A pair is a block of two warps: warp 0 has the chosen response, warp 1 the rejected one. Pairs are few and short
// against the model's work, so the block is small and its order of sums simple.
constexpr int kSides = 2;
constexpr int kPairThreads = kSides * kWarp;
// Loads under way in a lane.
constexpr int kTokensAtOnce = 4;

// f32 values of a row of `outcomes`, as PairOutcome has them.
enum Outcome {
    kLoss,
    kRewardChosen,
    kRewardRejected,
    kLogpChosen,
    kLogpRejected,
    kWeightChosen,
    kEntropyChosen,
    kEntropyRejected,
    kOutcomeWidth
};

// The side's own of two values. (An index known at run time would put the array on the stack.)
template <class T>
DEVICE T of_side(const T (&values)[kSides], int side) {
    return side == 0 ? values[0] : values[1];
}

// What the two warps tell each other.
struct PairSums {
    double logp[kSides];
    double entropy[kSides];
    double entropy_bonus[kSides];
};

// What the objective makes of a pair. `slope` is dL/dlogp of each token of a side, before the entropy term.
struct PairTerms {
    double loss;
    double weight_chosen;
    double slope[kSides];
};

// The logistic function of a margin and of its negative, and their logarithms, from one exponential. A NaN margin makes
// all four NaN.
struct Logistic {
    double positive, negative;
    double log_positive, log_negative;
};

DEVICE Logistic logistic(double margin) {
    const double e = exp(-fabs(margin));
    const double larger = 1.0 / (1.0 + e), smaller = e * larger;
    const double log_larger = -log1p(e), log_smaller = log_larger - fabs(margin);
    return margin >= 0.0 ? Logistic{larger, smaller, log_larger, log_smaller}
                         : Logistic{smaller, larger, log_smaller, log_larger};
}

// ---- Objectives: sequence sums to rewards, their margin to a loss and slopes.

// A token's share of its side's log-prob: 1 in a sum, one over the token count in a mean.
DEVICE double token_share(const mmpo_objective& objective, int tokens) {
    const bool mean = objective.kind == MMPO_OBJECTIVE_SIMPO ||
                      (objective.kind == MMPO_OBJECTIVE_MMPO && objective.length_normalize != 0);
    return mean ? 1.0 / double(max(tokens, 1)) : 1.0;
}

// Reward of a side from its log-prob sum; `constant` is its rhat or reference log-prob.
DEVICE double side_reward(const mmpo_objective& objective, double logp, double share, double constant) {
    switch (objective.kind) {
        case MMPO_OBJECTIVE_MMPO:
            return logp * share + constant;
        case MMPO_OBJECTIVE_DPO:
            return double(objective.beta) * (logp - constant);
        case MMPO_OBJECTIVE_SIMPO:
            return double(objective.beta) * logp * share;
        default:
            return logp;
    }
}

// -logsumexp(s_w, s_l) = log sigmoid(s_w - s_l) - s_w, plus the optional preference term.
DEVICE PairTerms mmpo_terms(const mmpo_objective& objective, double reward_chosen, const Logistic& weight) {
    const double preference = objective.preference_weight;
    return PairTerms{
        weight.log_positive - reward_chosen - preference * weight.log_positive,
        weight.positive,
        {-weight.positive - preference * weight.negative, -weight.negative + preference * weight.negative}};
}

DEVICE PairTerms dpo_terms(const mmpo_objective& objective, const Logistic& preferred) {
    const double wrong = objective.label_smoothing;
    const double slope = double(objective.beta) * (wrong * preferred.positive - (1.0 - wrong) * preferred.negative);
    return PairTerms{-(1.0 - wrong) * preferred.log_positive - wrong * preferred.log_negative, 0.0, {slope, -slope}};
}

DEVICE PairTerms simpo_terms(const mmpo_objective& objective, const Logistic& preferred) {
    const double slope = -double(objective.beta) * preferred.negative;
    return PairTerms{-preferred.log_positive, 0.0, {slope, -slope}};
}

// Slopes are those of the sequence's (mean) log-prob, before the pair's scale and the tokens' share.
DEVICE PairTerms pair_terms(const mmpo_objective& objective, double reward_chosen, double reward_rejected) {
    if (objective.kind == MMPO_OBJECTIVE_SFT) return PairTerms{-reward_chosen, 0.0, {-1.0, 0.0}};
    const double target =
        objective.kind == MMPO_OBJECTIVE_SIMPO ? double(objective.beta) * double(objective.gamma_beta_ratio) : 0.0;
    const Logistic preferred = logistic(reward_chosen - reward_rejected - target);
    switch (objective.kind) {
        case MMPO_OBJECTIVE_MMPO:
            return mmpo_terms(objective, reward_chosen, preferred);
        case MMPO_OBJECTIVE_DPO:
            return dpo_terms(objective, preferred);
        default:
            return simpo_terms(objective, preferred);
    }
}

// ---- Stages of the kernel

// Sum of values[0 .. count] over the warp, in f64; 0 where `values` is NULL.
DEVICE double sum_tokens(const float* values, int count) {
    double sum = 0.0;
    if (values != nullptr) {
#pragma unroll kTokensAtOnce
        for (int token = int(lane_id()); token < count; token += kWarp) sum += double(values[token]);
    }
    return warp_sum(sum);
}

// Sum over the lanes after this one.
DEVICE double sum_behind(double value) {
    double sum = value;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const double other = __shfl_down_sync(0xffffffffu, sum, lanes);
        if (int(lane_id()) + lanes < kWarp) sum += other;
    }
    return sum - value;
}

// J_ent = sum_t [P_t * H_t + H_t], P_t the log-probs before t, is also sum_j logp_j * behind_j + sum_t H_t with
// behind_j = sum_{t>j} H_t. So one walk from the last token gives both J_ent and its slopes: weight * behind_j is added
// to dlogp_j, weight is assigned to dentropy. Every lane gets J_ent.
DEVICE double add_entropy_term(float* dlogp, float* dentropy, const float* logp, const float* entropy, int count,
                               float slope, double weight) {
    const int lane = int(lane_id());
    double bonus = 0.0;
    // Sum of the entropies after the tile of 32 tokens at hand.
    double behind_tile = 0.0;
    for (int start = (count - 1) / kWarp * kWarp; start >= 0 && count > 0; start -= kWarp) {
        const int token = start + lane;
        const double token_entropy = token < count ? double(entropy[token]) : 0.0;
        const double behind = behind_tile + sum_behind(token_entropy);
        if (token < count) {
            dlogp[token] = float(double(slope) + weight * behind);
            dentropy[token] = float(weight);
            bonus += double(logp[token]) * behind + token_entropy;
        }
        behind_tile += warp_sum(token_entropy);
    }
    return warp_sum(bonus);
}

// "1" block a multiprocessor at least: without it ptxas aims at 48 registers, and spills.
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_objective_kernel(float* __restrict__ outcomes, float* __restrict__ dlogp, float* __restrict__ dentropy,
                          const float* __restrict__ logp, const float* __restrict__ entropy,
                          const uint32_t* __restrict__ scored, const float* __restrict__ constants, int first_pair,
                          mmpo_objective objective) {
    DYNAMIC_SHARED(shared);
    PairSums& sums = *reinterpret_cast<PairSums*>(shared);
    const int64_t pair = int64_t(first_pair) + blockIdx.x;
    const int side = int(threadIdx.x) / kWarp;
    const uint32_t* const range = scored + 4 * pair;
    const int count[kSides] = {int(range[1] - range[0]), int(range[3] - range[2])};
    const int tokens = side == 0 ? count[0] : count[1];
    const int64_t first = range[2 * side];
    const bool has_entropy = entropy != nullptr;

    const double side_logp = sum_tokens(logp + first, tokens);
    const double side_entropy = sum_tokens(has_entropy ? entropy + first : nullptr, tokens);
    if (lane_id() == 0) {
        sums.logp[side] = side_logp;
        sums.entropy[side] = side_entropy;
        sums.entropy_bonus[side] = 0.0;
    }
    __syncthreads();

    // rhat or the reference's log-prob of each side, then the pair's weight in the batch's loss.
    const float* const constant = constants + 4 * pair;
    const double share[kSides] = {token_share(objective, count[0]), token_share(objective, count[1])};
    const double reward[kSides] = {side_reward(objective, sums.logp[0], share[0], double(constant[0])),
                                   side_reward(objective, sums.logp[1], share[1], double(constant[1]))};
    const PairTerms terms = pair_terms(objective, reward[0], reward[1]);
    const double side_scale = double(constant[2]) * of_side(share, side);

    // Mean over both responses of J_ent, hence the half.
    const bool entropy_term = has_entropy && objective.kind == MMPO_OBJECTIVE_MMPO && objective.entropy_weight != 0.0f;
    const float slope = float(side_scale * of_side(terms.slope, side));
    if (entropy_term) {
        const double weight = -0.5 * double(objective.entropy_weight);
        const double bonus = add_entropy_term(dlogp + first, dentropy + first, logp + first, entropy + first, tokens,
                                              slope, side_scale * weight);
        if (lane_id() == 0) sums.entropy_bonus[side] = weight * of_side(share, side) * bonus;
    } else {
        for (int token = int(lane_id()); token < tokens; token += kWarp) {
            dlogp[first + token] = slope;
            dentropy[first + token] = 0.0f;
        }
    }
    __syncthreads();

    if (threadIdx.x != 0) return;
    float* const outcome = outcomes + kOutcomeWidth * pair;
    outcome[kLoss] = float(terms.loss + sums.entropy_bonus[0] + sums.entropy_bonus[1]);
    outcome[kRewardChosen] = float(reward[0]);
    outcome[kRewardRejected] = float(reward[1]);
    outcome[kLogpChosen] = float(sums.logp[0]);
    outcome[kLogpRejected] = float(sums.logp[1]);
    outcome[kWeightChosen] = float(terms.weight_chosen);
    outcome[kEntropyChosen] = float(sums.entropy[0]);
    outcome[kEntropyRejected] = float(sums.entropy[1]);
}

}  // namespace

mmpo_status MMPO_EXPORT(pair_objective)(float* outcomes, float* dlogp, float* dentropy, const float* logp,
                                        const float* entropy, const uint32_t* scored, const float* constants,
                                        int32_t first_pair, int32_t pairs, mmpo_objective objective,
                                        mmpo_stream stream) {
    if (pairs == 0) return kSuccess;
    if (objective.kind < MMPO_OBJECTIVE_MMPO || objective.kind > MMPO_OBJECTIVE_SFT) return kInvalidValue;
    return LAUNCH(pair_objective_kernel, unsigned(pairs), kPairThreads, sizeof(PairSums), cuda_stream(stream), outcomes,
                  dlogp, dentropy, logp, entropy, scored, constants, first_pair, objective);
}
