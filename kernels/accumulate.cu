// Adding one flat array to another: out[length] += source[length], source f32, out f32 or bf16. Accumulates.
//
// It forms sums over micro-batches that are kept in another type or another place than what is added to them. A bf16
// sum is formed in f32 and rounded to nearest even.

#include "common/vector.cuh"

namespace {

// Vectors of a thread: 128 bytes of loads under way for f32 sums, 96 for bf16 ones.
constexpr int kVectors = 4;
constexpr int kBlockValues = kBlock * kVectorF32 * kVectors;

template <bool kVectorized, class Sum>
DEVICE void add_values(Sum* out, const float* source, int count) {
    float sums[kVectors][kVectorF32], terms[kVectors][kVectorF32];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        const int column = (v * kBlock + int(threadIdx.x)) * kVectorF32;
        load4<kVectorized>(sums[v], out, column, count);
        load4<kVectorized>(terms[v], source, column, count);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) sums[v][i] += terms[v][i];
        store4<kVectorized>(out, (v * kBlock + int(threadIdx.x)) * kVectorF32, count, sums[v]);
    }
}

// `kVectorized` promises that both arrays start on a boundary of their four values. The last block may have a tail.
template <bool kVectorized, class Sum>
__global__ void __launch_bounds__(kBlock)
    accumulate_kernel(Sum* __restrict__ out, const float* __restrict__ source, int64_t length) {
    const int64_t start = int64_t(blockIdx.x) * kBlockValues;
    const int count = int(min(length - start, int64_t(kBlockValues)));
    if (kVectorized && count % kVectorF32 == 0) {
        add_values<true>(out + start, source + start, count);
    } else {
        add_values<false>(out + start, source + start, count);
    }
}

template <class Sum>
mmpo_status launch_sum(Sum* out, const float* source, int64_t length, mmpo_stream stream) {
    const unsigned blocks = unsigned(ceil_div(length, kBlockValues));
    // Four bf16 values are one access of 8 bytes.
    const bool aligned = vector_aligned(source) && reinterpret_cast<uintptr_t>(out) % (kVectorF32 * sizeof(Sum)) == 0;
    return aligned
               ? LAUNCH((accumulate_kernel<true, Sum>), blocks, kBlock, 0, cuda_stream(stream), out, source, length)
               : LAUNCH((accumulate_kernel<false, Sum>), blocks, kBlock, 0, cuda_stream(stream), out, source, length);
}

}  // namespace

mmpo_status MMPO_EXPORT(accumulate)(void* out, const float* source, int32_t storage, int64_t length,
                                    mmpo_stream stream) {
    if (length == 0) return kSuccess;
    switch (storage) {
        case MMPO_STORAGE_F32:
            return launch_sum(static_cast<float*>(out), source, length, stream);
        case MMPO_STORAGE_BF16:
            return launch_sum(static_cast<bf16*>(out), source, length, stream);
        default:
            return kInvalidValue;
    }
}
