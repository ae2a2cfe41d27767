// Loss and per-token coefficients of preference pairs under each objective.
//
// The reference is src/objective, a file for each objective; names are the same. All outputs are assigned. Sums over
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

// LEAST_SURPRISE of src/objective/orpo.rs, in nats.
constexpr double kLeastSurprise = 1e-6;

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
struct PairExchange {
    double logp[kSides];
    double entropy[kSides];
    double entropy_bonus[kSides];
};

// What an objective sees of a pair. `known` is what the host knew beforehand: rhat, or the reference's log-prob sum.
struct PairSums {
    double logp[kSides];
    double length[kSides];
    double known[kSides];
};

// What an objective makes of a pair, before the pair's scale. `slope` is dL/dlogp of each token of a side without the
// entropy term, `entropy_weight` the weight of the side's J_ent in the loss.
struct PairTerms {
    double loss;
    double reward[kSides];
    double slope[kSides];
    double entropy_weight[kSides] = {0.0, 0.0};
    double weight_chosen = 0.0;
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

// ---- Objectives: from a pair's sums to its loss, rewards and slopes

// -logsumexp(s_w, s_l) = log sigmoid(s_w - s_l) - s_w, plus the optional preference term.
DEVICE PairTerms mmpo_terms(const mmpo_objective& objective, const PairSums& pair) {
    const bool mean = objective.length_normalize != 0;
    const double share[kSides] = {mean ? 1.0 / pair.length[0] : 1.0, mean ? 1.0 / pair.length[1] : 1.0};
    const double chosen = pair.logp[0] * share[0] + pair.known[0];
    const double rejected = pair.logp[1] * share[1] + pair.known[1];
    const Logistic weight = logistic(chosen - rejected);
    const double preference = objective.preference_weight;
    const double entropy = -0.5 * double(objective.entropy_weight);
    return PairTerms{weight.log_positive - chosen - preference * weight.log_positive,
                     {chosen, rejected},
                     {share[0] * (-weight.positive - preference * weight.negative),
                      share[1] * (-weight.negative + preference * weight.negative)},
                     {share[0] * entropy, share[1] * entropy},
                     weight.positive};
}

DEVICE PairTerms dpo_terms(const mmpo_objective& objective, const PairSums& pair) {
    const double beta = objective.beta, wrong = objective.label_smoothing;
    const double chosen = beta * (pair.logp[0] - pair.known[0]);
    const double rejected = beta * (pair.logp[1] - pair.known[1]);
    const Logistic preferred = logistic(chosen - rejected);
    const double slope = beta * (wrong * preferred.positive - (1.0 - wrong) * preferred.negative);
    return PairTerms{
        -(1.0 - wrong) * preferred.log_positive - wrong * preferred.log_negative, {chosen, rejected}, {slope, -slope}};
}

DEVICE PairTerms simpo_terms(const mmpo_objective& objective, const PairSums& pair) {
    const double beta = objective.beta;
    const double chosen = beta * pair.logp[0] / pair.length[0], rejected = beta * pair.logp[1] / pair.length[1];
    const Logistic preferred = logistic(chosen - rejected - beta * double(objective.gamma_beta_ratio));
    const double slope = -beta * preferred.negative;
    return PairTerms{-preferred.log_positive, {chosen, rejected}, {slope / pair.length[0], -slope / pair.length[1]}};
}

DEVICE PairTerms sft_terms(const PairSums& pair) {
    return PairTerms{-pair.logp[0], {pair.logp[0], pair.logp[1]}, {-1.0, 0.0}};
}

// (h - 1 / (2 beta))^2, h being the difference of the responses' mean log-ratios.
DEVICE PairTerms ipo_terms(const mmpo_objective& objective, const PairSums& pair) {
    const double beta = objective.beta;
    const double chosen = pair.logp[0] - pair.known[0], rejected = pair.logp[1] - pair.known[1];
    const double gap = chosen / pair.length[0] - rejected / pair.length[1] - 0.5 / beta;
    return PairTerms{
        gap * gap, {beta * chosen, beta * rejected}, {2.0 * gap / pair.length[0], -2.0 * gap / pair.length[1]}};
}

// -m_w - beta * log sigmoid(o_w - o_l), m being a response's mean log-prob, o = m - log(1 - e^m) the logarithm of its
// odds. In the odds m is at most -kLeastSurprise. (Not fmin, which takes a NaN for the other number.)
DEVICE PairTerms orpo_terms(const mmpo_objective& objective, const PairSums& pair) {
    const double beta = objective.beta;
    const double chosen = pair.logp[0] / pair.length[0], rejected = pair.logp[1] / pair.length[1];
    const double bounded_chosen = chosen > -kLeastSurprise ? -kLeastSurprise : chosen;
    const double bounded_rejected = rejected > -kLeastSurprise ? -kLeastSurprise : rejected;
    // 1 - e^m
    const double doubt_chosen = -expm1(bounded_chosen), doubt_rejected = -expm1(bounded_rejected);
    const Logistic preferred =
        logistic((bounded_chosen - log(doubt_chosen)) - (bounded_rejected - log(doubt_rejected)));
    const double pull = beta * preferred.negative;
    return PairTerms{-chosen - beta * preferred.log_positive,
                     {beta * chosen, beta * rejected},
                     {(-pull / doubt_chosen - 1.0) / pair.length[0], pull / doubt_rejected / pair.length[1]}};
}

// max(0, 1 - margin) of DPO's margin. (Not fmax, which takes a NaN for the other number.)
DEVICE PairTerms hinge_terms(const mmpo_objective& objective, const PairSums& pair) {
    const double beta = objective.beta;
    const double chosen = beta * (pair.logp[0] - pair.known[0]);
    const double rejected = beta * (pair.logp[1] - pair.known[1]);
    const double missing = 1.0 - (chosen - rejected);
    const double slope = missing <= 0.0 ? 0.0 : -beta;
    return PairTerms{missing <= 0.0 ? 0.0 : missing, {chosen, rejected}, {slope, -slope}};
}

DEVICE PairTerms pair_terms(const mmpo_objective& objective, const PairSums& pair) {
    switch (objective.kind) {
        case MMPO_OBJECTIVE_MMPO:
            return mmpo_terms(objective, pair);
        case MMPO_OBJECTIVE_DPO:
            return dpo_terms(objective, pair);
        case MMPO_OBJECTIVE_SIMPO:
            return simpo_terms(objective, pair);
        case MMPO_OBJECTIVE_IPO:
            return ipo_terms(objective, pair);
        case MMPO_OBJECTIVE_ORPO:
            return orpo_terms(objective, pair);
        case MMPO_OBJECTIVE_HINGE:
            return hinge_terms(objective, pair);
        default:
            return sft_terms(pair);
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
DEVICE double sum_after(double value) {
    double sum = value;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
        const double other = __shfl_down_sync(0xffffffffu, sum, lanes);
        if (int(lane_id()) + lanes < kWarp) sum += other;
    }
    return sum - value;
}

// J_ent = sum_t [P_t * H_t + H_t], P_t the log-probs before t, is also sum_j logp_j * after_j + sum_t H_t with
// after_j = sum_{t>j} H_t. So one walk from the last token gives both J_ent and its slopes: weight * after_j is added
// to dlogp_j, weight is assigned to dentropy. Every lane gets J_ent.
DEVICE double add_entropy_term(float* dlogp, float* dentropy, const float* logp, const float* entropy, int count,
                               float slope, double weight) {
    const int lane = int(lane_id());
    double bonus = 0.0;
    // Sum of the entropies after the tile of 32 tokens at hand.
    double after_tile = 0.0;
    for (int start = (count - 1) / kWarp * kWarp; start >= 0 && count > 0; start -= kWarp) {
        const int token = start + lane;
        const double token_entropy = token < count ? double(entropy[token]) : 0.0;
        const double after = after_tile + sum_after(token_entropy);
        if (token < count) {
            dlogp[token] = float(double(slope) + weight * after);
            dentropy[token] = float(weight);
            bonus += double(logp[token]) * after + token_entropy;
        }
        after_tile += warp_sum(token_entropy);
    }
    return warp_sum(bonus);
}

// At least 1 block per multiprocessor: without it ptxas aims at 48 registers, and spills.
__global__ void __launch_bounds__(kPairThreads, 1)
    pair_objective_kernel(float* __restrict__ outcomes, float* __restrict__ dlogp, float* __restrict__ dentropy,
                          const float* __restrict__ logp, const float* __restrict__ entropy,
                          const uint32_t* __restrict__ scored, const float* __restrict__ constants, int first_pair,
                          mmpo_objective objective) {
    DYNAMIC_SHARED(shared);
    PairExchange& exchange = *reinterpret_cast<PairExchange*>(shared);
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
        exchange.logp[side] = side_logp;
        exchange.entropy[side] = side_entropy;
        exchange.entropy_bonus[side] = 0.0;
    }
    __syncthreads();

    // What was known of each side, then the pair's weight in the batch's loss.
    const float* const constant = constants + 4 * pair;
    const PairSums sums = {{exchange.logp[0], exchange.logp[1]},
                           {double(max(count[0], 1)), double(max(count[1], 1))},
                           {double(constant[0]), double(constant[1])}};
    const PairTerms terms = pair_terms(objective, sums);
    const double scale = constant[2];

    const float slope = float(scale * of_side(terms.slope, side));
    const double entropy_weight = of_side(terms.entropy_weight, side);
    if (has_entropy && entropy_weight != 0.0) {
        const double bonus = add_entropy_term(dlogp + first, dentropy + first, logp + first, entropy + first, tokens,
                                              slope, scale * entropy_weight);
        if (lane_id() == 0) exchange.entropy_bonus[side] = entropy_weight * bonus;
    } else {
        for (int token = int(lane_id()); token < tokens; token += kWarp) {
            dlogp[first + token] = slope;
            dentropy[first + token] = 0.0f;
        }
    }
    __syncthreads();

    if (threadIdx.x != 0) return;
    float* const outcome = outcomes + kOutcomeWidth * pair;
    outcome[kLoss] = float(terms.loss + exchange.entropy_bonus[0] + exchange.entropy_bonus[1]);
    outcome[kRewardChosen] = float(terms.reward[0]);
    outcome[kRewardRejected] = float(terms.reward[1]);
    outcome[kLogpChosen] = float(sums.logp[0]);
    outcome[kLogpRejected] = float(sums.logp[1]);
    outcome[kWeightChosen] = float(terms.weight_chosen);
    outcome[kEntropyChosen] = float(exchange.entropy[0]);
    outcome[kEntropyRejected] = float(exchange.entropy[1]);
}

}  // namespace

mmpo_status MMPO_EXPORT(pair_objective)(float* outcomes, float* dlogp, float* dentropy, const float* logp,
                                        const float* entropy, const uint32_t* scored, const float* constants,
                                        int32_t first_pair, int32_t pairs, mmpo_objective objective,
                                        mmpo_stream stream) {
    if (pairs == 0) return kSuccess;
    if (objective.kind < 0 || objective.kind >= MMPO_OBJECTIVE_KINDS) return kInvalidValue;
    return LAUNCH(pair_objective_kernel, unsigned(pairs), kPairThreads, sizeof(PairExchange), cuda_stream(stream),
                  outcomes, dlogp, dentropy, logp, entropy, scored, constants, first_pair, objective);
}
