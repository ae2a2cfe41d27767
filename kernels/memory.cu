// Zeroing and converting flat arrays. All outputs are assigned.
//
// zero is the runtime's own memset, which already runs at the speed of memory; zero_all does the same for many tensors
// in one launch. The cast reads the number types of checkpoints but bf16, which is copied as it is.

#include "common/tensor_table.cuh"
#include "common/vector.cuh"

namespace {

// The exact value of an IEEE half. Shifted into the fields of an f32 it is 2^112 times too small, subnormals included.
DEVICE float half_to_float(uint32_t bits) {
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const bool finite = (bits & 0x7c00u) != 0x7c00u;
    const float value = finite ? __uint_as_float(magnitude) * 0x1p112f : __uint_as_float(magnitude | 0x7f800000u);
    return (bits & 0x8000u) != 0 ? -value : value;
}

// Loads eight values from `source`, of which `count` exist.
template <int kStorage, bool kVectorized>
DEVICE uint4 load_as_bf16(const void* source, int64_t first, int count) {
    float values[kVector];
    if constexpr (kStorage == MMPO_STORAGE_F32) {
        load8<kVectorized>(values, static_cast<const float*>(source) + first, 0, count);
    } else {
        // Halves are loaded as the 16-bit patterns that they are.
        const uint4 packed = load8<kVectorized>(static_cast<const bf16*>(source) + first, 0, count);
        const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = half_to_float(pairs[i / 2] >> 16 * (i % 2) & 0xffffu);
    }
    return pack8(values);
}

// A thread converts eight values.
template <int kStorage, bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    cast_kernel(bf16* __restrict__ out, const void* __restrict__ source, int64_t length) {
    const int64_t first = flat_index();
    if (first >= length) return;
    const int64_t left = length - first;
    if (kVectorized && left >= kVector) {
        store8<true>(out + first, 0, kVector, load_as_bf16<kStorage, true>(source, first, kVector));
    } else {
        const int count = int(min(left, int64_t(kVector)));
        store8<false>(out + first, 0, count, load_as_bf16<kStorage, false>(source, first, count));
    }
}

template <int kStorage>
mmpo_status launch_cast(bf16* out, const void* source, int64_t length, mmpo_stream stream) {
    return vector_aligned(out, source) ? LAUNCH((cast_kernel<kStorage, true>), flat_blocks(length), kBlock, 0,
                                                cuda_stream(stream), out, source, length)
                                       : LAUNCH((cast_kernel<kStorage, false>), flat_blocks(length), kBlock, 0,
                                                cuda_stream(stream), out, source, length);
}

// Vectors that a thread zeroes.
constexpr int kZeroVectors = 4;
constexpr int kZeroValues = kBlock * kVectorF32 * kZeroVectors;
using ZeroTable = TensorTable<mmpo_floats>;

template <bool kVectorized>
DEVICE void zero_values(float* values, int count) {
    const float zeros[kVectorF32] = {};
#pragma unroll
    for (int v = 0; v < kZeroVectors; ++v) {
        store4<kVectorized>(values, (v * kBlock + int(threadIdx.x)) * kVectorF32, count, zeros);
    }
}

__global__ void __launch_bounds__(kBlock) zero_kernel(const __grid_constant__ ZeroTable table) {
    const int found = table.find();
    const mmpo_floats& tensor = table.tensors[found];
    const int64_t start = table.first_value<kZeroValues>(found);
    const int count = int(min(tensor.length - start, int64_t(kZeroValues)));
    if (vector_aligned(tensor.values) && count % kVectorF32 == 0) {
        zero_values<true>(tensor.values + start, count);
    } else {
        zero_values<false>(tensor.values + start, count);
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(zero)(void* out, int64_t bytes, mmpo_stream stream) {
    if (bytes == 0) return kSuccess;
    return cudaMemsetAsync(out, 0, size_t(bytes), cuda_stream(stream));
}

mmpo_status MMPO_EXPORT(zero_all)(const mmpo_floats* tensors, int32_t count, mmpo_stream stream) {
    return launch_tables(tensors, count, kZeroValues, [=](const ZeroTable& table, unsigned blocks) {
        return LAUNCH(zero_kernel, blocks, kBlock, 0, cuda_stream(stream), table);
    });
}

mmpo_status MMPO_EXPORT(cast_to_bf16)(bf16* out, const void* source, int32_t storage, int64_t length,
                                      mmpo_stream stream) {
    if (length == 0) return kSuccess;
    switch (storage) {
        case MMPO_STORAGE_F32:
            return launch_cast<MMPO_STORAGE_F32>(out, source, length, stream);
        case MMPO_STORAGE_F16:
            return launch_cast<MMPO_STORAGE_F16>(out, source, length, stream);
        default:
            return kInvalidValue;
    }
}
