// The log-prob head behind its product: logits[rows, V] (f32 accumulators) become lse, the target's log-prob, the
// entropy and bf16 probabilities; later those become dlogits in place.
//
//   lse = log sum_v e^logit     logp = logit[target] - lse     entropy = -sum_v pi_v log pi_v
//   dlogits_v = a * (onehot_v - pi_v) - b * pi_v * (log pi_v + entropy)
//
// All outputs are assigned. What is kept for the backward is neither a logit nor a log-prob: rounding a logit of 20 to
// bf16 puts its probability off by 6 %, rounding a log-prob of -8 by 3 %. It is pi where pi <= 1/2, and pi - 1 (with
// its sign set) above: 2 bytes that keep both pi and 1 - pi, the target's own gradient, to 2^-9 of their size.

#include <cfloat>

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

// ---- Forward: one block a row, two walks over it.
//
// A row of 128256 f32 logits is 501 KiB, more than a multiprocessor holds, so it is read twice. One block of 1024
// threads fills a multiprocessor's share of the 50 MB L2 (26 MB of rows of V = 49152 are under way on an H100, 68 MB of
// V = 128256). The second walk goes backwards, so that it starts with what was read last, and its stores are the first
// to be evicted: all of a short row and about half of a long one comes from L2.
constexpr int kRowThreads = 1024;
// 16 f32 values a thread are under way, 64 KiB a multiprocessor: what its 64 registers a thread have room for.
constexpr int kVectorsAtOnce = 2;
constexpr int kStep = kRowThreads * kVector;

// Below this, e^x is 0 in f32; a bound that keeps 0 * -inf out of the entropy.
constexpr float kLeastExponent = -200.0f;

// Running softmax statistics: the largest logit, sum of e^(logit - largest), and sum of e^(..) * (logit - largest).
struct Softmax {
    float largest;
    float sum;
    float weighted;
};

// The statistics of no logits. Finite, so that differences of two of these are.
DEVICE Softmax no_logits() { return Softmax{-FLT_MAX, 0.0f, 0.0f}; }

// The same statistics relative to a larger `largest`.
template <bool kEntropy>
DEVICE Softmax rescale(Softmax softmax, float largest) {
    const float difference = fmaxf(softmax.largest - largest, kLeastExponent);
    const float factor = __expf(difference);
    if constexpr (kEntropy) softmax.weighted = (softmax.weighted + softmax.sum * difference) * factor;
    softmax.sum *= factor;
    softmax.largest = largest;
    return softmax;
}

template <bool kEntropy>
DEVICE Softmax merge(Softmax a, Softmax b) {
    const float largest = fmaxf(a.largest, b.largest);
    a = rescale<kEntropy>(a, largest);
    b = rescale<kEntropy>(b, largest);
    return Softmax{largest, a.sum + b.sum, a.weighted + b.weighted};
}

// Takes in up to kVectorsAtOnce vectors; one rescaling for all of them. NaN logits end in `sum`.
template <bool kEntropy, bool kVectorized>
DEVICE void take_in(Softmax& softmax, const float* row, int first, int vocab) {
    float values[kVectorsAtOnce][kVector];
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) load8<kVectorized>(values[v], row, first + v * kStep, vocab);
    float largest = softmax.largest;
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            // Columns beyond the row read as 0; only here does that matter.
            if (first + v * kStep + i >= vocab) values[v][i] = -FLT_MAX;
            largest = fmaxf(largest, values[v][i]);
        }
    }
    softmax = rescale<kEntropy>(softmax, largest);
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float difference = values[v][i] - largest;
            const float weight = __expf(difference);
            softmax.sum += weight;
            if constexpr (kEntropy) softmax.weighted += weight * fmaxf(difference, kLeastExponent);
        }
    }
}

// Merges the lanes' statistics; a fixed tree, and every lane gets the same bits.
template <bool kEntropy>
DEVICE Softmax merge_warp(Softmax softmax) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const Softmax other{__shfl_xor_sync(0xffffffffu, softmax.largest, lanes),
                            __shfl_xor_sync(0xffffffffu, softmax.sum, lanes),
                            __shfl_xor_sync(0xffffffffu, softmax.weighted, lanes)};
        softmax = merge<kEntropy>(softmax, other);
    }
    return softmax;
}

// Every thread gets the row's statistics: each warp merges all warps' results by itself, which needs one barrier.
template <bool kEntropy>
DEVICE Softmax merge_block(Softmax softmax, Softmax* scratch) {
    static_assert(kRowThreads == kWarp * kWarp, "a lane for each warp");
    softmax = merge_warp<kEntropy>(softmax);
    if (lane_id() == 0) scratch[threadIdx.x / kWarp] = softmax;
    __syncthreads();
    return merge_warp<kEntropy>(scratch[lane_id()]);
}

constexpr float kLogHalf = -0.693147181f;

// The kept form of a probability. The sign marks the upper half even where pi - 1 rounds to 0.
DEVICE float encode_probability(float log_prob) {
    return log_prob > kLogHalf ? -fabsf(expm1f(log_prob)) : __expf(log_prob);
}

// From the row's end to its start.
template <bool kVectorized>
DEVICE void store_probabilities(bf16* probabilities, const float* row, float largest, float log_sum, int vocab) {
    for (int start = (vocab - 1) / (kVectorsAtOnce * kStep) * (kVectorsAtOnce * kStep); start >= 0;
         start -= kVectorsAtOnce * kStep) {
        const int first = start + int(threadIdx.x) * kVector;
        float values[kVectorsAtOnce][kVector];
#pragma unroll
        for (int v = 0; v < kVectorsAtOnce; ++v) load8<kVectorized>(values[v], row, first + v * kStep, vocab);
#pragma unroll
        for (int v = 0; v < kVectorsAtOnce; ++v) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[v][i] = encode_probability(values[v][i] - largest - log_sum);
            const int column = first + v * kStep;
            if constexpr (kVectorized) {
                if (column < vocab) store_128_streaming(probabilities + column, pack8(values[v]));
            } else {
                store8<false>(probabilities, column, vocab, pack8(values[v]));
            }
        }
    }
}

template <bool kEntropy, bool kVectorized>
__global__ void __launch_bounds__(kRowThreads)
    logp_head_forward_kernel(float* __restrict__ lse, float* __restrict__ logp, float* __restrict__ entropy,
                             bf16* __restrict__ probabilities, const float* __restrict__ logits,
                             const uint32_t* __restrict__ targets, int vocab) {
    DYNAMIC_SHARED(shared);
    const int row = int(blockIdx.x);
    const float* const row_logits = logits + int64_t(row) * vocab;

    Softmax softmax = no_logits();
    for (int first = int(threadIdx.x) * kVector; first < vocab; first += kVectorsAtOnce * kStep) {
        take_in<kEntropy, kVectorized>(softmax, row_logits, first, vocab);
    }
    softmax = merge_block<kEntropy>(softmax, reinterpret_cast<Softmax*>(shared));
    const float log_sum = logf(softmax.sum);
    if (threadIdx.x == 0) {
        lse[row] = softmax.largest + log_sum;
        logp[row] = row_logits[targets[row]] - softmax.largest - log_sum;
        if constexpr (kEntropy) entropy[row] = log_sum - softmax.weighted / softmax.sum;
    }
    store_probabilities<kVectorized>(probabilities + int64_t(row) * vocab, row_logits, softmax.largest, log_sum, vocab);
}

// ---- Backward: a warp tile of probabilities becomes dlogits.

constexpr int kBackwardVectors = 4;

// One element's gradient; `kept` as encode_probability left it. `b` is the same for a whole warp, so rows without an
// entropy term never form a logarithm.
DEVICE float logit_gradient(float kept, bool is_target, float a, float b, float entropy) {
    const bool upper = __float_as_uint(kept) >> 31 != 0;
    const float prob = upper ? 1.0f + kept : kept;
    const float other = upper ? -kept : 1.0f - kept;
    float gradient = is_target ? a * other : -a * prob;
    // pi log pi vanishes with pi.
    if (b != 0.0f && prob != 0.0f) gradient -= b * prob * ((upper ? log1pf(kept) : __logf(prob)) + entropy);
    return gradient;
}

template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    logp_head_backward_kernel(bf16* probabilities, const uint32_t* __restrict__ targets,
                              const float* __restrict__ dlogp, const float* __restrict__ dentropy,
                              const float* __restrict__ entropy, int rows, int vocab) {
    const WarpTile tile = warp_tile<kBackwardVectors>(vocab);
    if (tile.row >= rows) return;
    bf16* const row = probabilities + int64_t(tile.row) * vocab;
    uint4 packed[kBackwardVectors];
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        packed[v] = load8<kVectorized>(row, tile.column + v * kVectorStride, vocab);
    }
    const int target = int(targets[tile.row]);
    const float a = dlogp[tile.row];
    const float b = dentropy != nullptr ? dentropy[tile.row] : 0.0f;
    const float row_entropy = dentropy != nullptr ? entropy[tile.row] : 0.0f;
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        const int column = tile.column + v * kVectorStride;
        float values[kVector];
        unpack8(values, packed[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            values[i] = logit_gradient(values[i], column + i == target, a, b, row_entropy);
        }
        store8<kVectorized>(row, column, vocab, pack8(values));
    }
}

template <bool kEntropy>
mmpo_status launch_forward(float* lse, float* logp, float* entropy, bf16* probabilities, const float* logits,
                           const uint32_t* targets, int rows, int vocab, mmpo_stream stream) {
    const size_t shared_bytes = kRowThreads / kWarp * sizeof(Softmax);
    return vector_rows(vocab)
               ? LAUNCH((logp_head_forward_kernel<kEntropy, true>), unsigned(rows), kRowThreads, shared_bytes,
                        cuda_stream(stream), lse, logp, entropy, probabilities, logits, targets, vocab)
               : LAUNCH((logp_head_forward_kernel<kEntropy, false>), unsigned(rows), kRowThreads, shared_bytes,
                        cuda_stream(stream), lse, logp, entropy, probabilities, logits, targets, vocab);
}

}  // namespace

mmpo_status MMPO_EXPORT(logp_head_forward)(float* lse, float* logp, float* entropy, bf16* probabilities,
                                           const float* logits, const uint32_t* targets, int32_t rows, int32_t vocab,
                                           mmpo_stream stream) {
    if (rows == 0 || vocab == 0) return kSuccess;
    return entropy != nullptr
               ? launch_forward<true>(lse, logp, entropy, probabilities, logits, targets, rows, vocab, stream)
               : launch_forward<false>(lse, logp, entropy, probabilities, logits, targets, rows, vocab, stream);
}

mmpo_status MMPO_EXPORT(logp_head_backward)(bf16* probabilities, const uint32_t* targets, const float* dlogp,
                                            const float* dentropy, const float* entropy, int32_t rows, int32_t vocab,
                                            mmpo_stream stream) {
    if (rows == 0 || vocab == 0) return kSuccess;
    if ((dentropy == nullptr) != (entropy == nullptr)) return kInvalidValue;
    const unsigned blocks = warp_tile_blocks<kBackwardVectors>(rows, vocab);
    return vector_rows(vocab) ? LAUNCH(logp_head_backward_kernel<true>, blocks, kBlock, 0, cuda_stream(stream),
                                       probabilities, targets, dlogp, dentropy, entropy, rows, vocab)
                              : LAUNCH(logp_head_backward_kernel<false>, blocks, kBlock, 0, cuda_stream(stream),
                                       probabilities, targets, dlogp, dentropy, entropy, rows, vocab);
}
