// The global gradient norm, in two steps: the norms of fixed parts of each tensor, then the norm of those.
//
// All outputs are assigned. Parts have a fixed size and sums a fixed order, so the norm has the same bits whatever the
// GPU. Squares are summed in f64, where those of the largest f32 still fit; one multiply-add and one conversion a value
// are cheaper than reading it.

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

// Values of a part: 64 KiB, so that even a small model's tensors give each multiprocessor several blocks, while the
// partial norms of an 8-billion-parameter model take 2 MB.
constexpr int64_t kPart = 16384;
// 64 bytes a thread are under way.
constexpr int kVectorsAtOnce = 4;
constexpr int kStep = kBlock * kVectorF32;
static_assert(kPart % (kStep * kVectorsAtOnce) == 0, "a part is whole steps");

// One block reads the parts' norms: as many threads as a block can have.
constexpr int kFinishThreads = 1024;

DEVICE double sum_of_squares(const float (&values)[kVectorF32]) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kVectorF32; ++i) sum += double(values[i]) * double(values[i]);
    return sum;
}

template <bool kVectorized>
DEVICE double thread_sum(const float* part, int length) {
    double sum = 0.0;
    for (int first = int(threadIdx.x) * kVectorF32; first < length; first += kVectorsAtOnce * kStep) {
        float values[kVectorsAtOnce][kVectorF32];
#pragma unroll
        for (int v = 0; v < kVectorsAtOnce; ++v) load4<kVectorized>(values[v], part, first + v * kStep, length);
#pragma unroll
        for (int v = 0; v < kVectorsAtOnce; ++v) sum += sum_of_squares(values[v]);
    }
    return sum;
}

// A block has one part. `vectorized` holds for the tensor's start, and so for every part's; the last part may have a
// tail.
__global__ void __launch_bounds__(kBlock)
    partial_kernel(float* __restrict__ partials, const float* __restrict__ gradient, int64_t length, bool vectorized) {
    DYNAMIC_SHARED(shared);
    const int64_t start = int64_t(blockIdx.x) * kPart;
    const int count = int(min(length - start, kPart));
    const double sum = vectorized && count % kVectorF32 == 0 ? thread_sum<true>(gradient + start, count)
                                                             : thread_sum<false>(gradient + start, count);
    const double total = block_sum<kBlock>(sum, reinterpret_cast<double*>(shared));
    if (threadIdx.x == 0) partials[blockIdx.x] = float(sqrt(total));
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(float* __restrict__ out, const float* __restrict__ partials, int64_t count, float max_norm) {
    DYNAMIC_SHARED(shared);
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += double(partials[i]) * double(partials[i]);
    const double total = block_sum<kFinishThreads>(sum, reinterpret_cast<double*>(shared));
    if (threadIdx.x != 0) return;
    const float norm = float(sqrt(total));
    // An infinite norm over an infinite limit would be a NaN that no gradient has.
    const float ratio = max_norm == INFINITY && norm == norm ? 1.0f : max_norm / (norm + 1e-6f);
    out[0] = norm;
    // Not fminf, which would turn a NaN into 1.
    out[1] = ratio > 1.0f ? 1.0f : ratio;
}

}  // namespace

int64_t MMPO_EXPORT(gradient_norm_partials)(int64_t length) { return ceil_div(length, kPart); }

mmpo_status MMPO_EXPORT(gradient_norm_partial)(float* partials, const float* gradient, int64_t length,
                                               mmpo_stream stream) {
    if (length == 0) return kSuccess;
    return LAUNCH(partial_kernel, unsigned(ceil_div(length, kPart)), kBlock, kBlockWarps * sizeof(double),
                  cuda_stream(stream), partials, gradient, length, vector_aligned(gradient));
}

// With no partials there is still a norm to assign: 0.
mmpo_status MMPO_EXPORT(gradient_norm_finish)(float* out, const float* partials, int64_t count, float max_norm,
                                              mmpo_stream stream) {
    return LAUNCH(finish_kernel, 1u, kFinishThreads, kFinishThreads / kWarp * sizeof(double), cuda_stream(stream), out,
                  partials, count, max_norm);
}
