// The global gradient norm, in two steps: the norms of fixed parts of each tensor, then the norm of those.
//
// All outputs are assigned. Parts have a fixed size and sums a fixed order, so the norm has the same bits on every GPU.
// Squares are summed in f64, which can hold even the square of the largest f32. One multiply-add and one conversion for
// each value cost less than reading it. Gradients are f32 or bf16; the values of either are summed in the same order.

#include "common/reduce.cuh"
#include "common/tensor_table.cuh"
#include "common/vector.cuh"

namespace {

// Values of a part: 64 KiB, so that even a small model's tensors give each multiprocessor several blocks, while the
// norms of the parts of an 8-billion-parameter model take only 2 MB.
constexpr int kPart = 16384;
// Vectors that a thread loads at once, 64 bytes.
template <class Value>
constexpr int kVectorsAtOnce = 64 / int(kVectorF32 * sizeof(Value));
constexpr int kStep = kBlock * kVectorF32;
static_assert(kPart % (kStep * kVectorsAtOnce<bf16>) == 0, "a part is whole steps");

// One block reads the norms of the parts, so it has as many threads as a block can have.
constexpr int kFinishThreads = 1024;

DEVICE double sum_of_squares(const float (&values)[kVectorF32]) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kVectorF32; ++i) sum += double(values[i]) * double(values[i]);
    return sum;
}

template <bool kVectorized, class Value>
DEVICE double thread_sum(const Value* part, int length) {
    constexpr int kVectors = kVectorsAtOnce<Value>;
    double sum = 0.0;
    for (int first = int(threadIdx.x) * kVectorF32; first < length; first += kVectors * kStep) {
        float values[kVectors][kVectorF32];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) load4<kVectorized>(values[v], part, first + v * kStep, length);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) sum += sum_of_squares(values[v]);
    }
    return sum;
}

template <class Value>
struct Gradient {
    const Value* values;
    int64_t length;

    explicit Gradient(const mmpo_gradient& gradient)
        : values(static_cast<const Value*>(gradient.values)), length(gradient.length) {}
    Gradient() = default;
};

template <class Value>
using Table = TensorTable<Gradient<Value>>;

// A block has one part. All parts of a tensor are aligned if its start is; the last part may have a tail.
template <class Value>
__global__ void __launch_bounds__(kBlock)
    partial_kernel(float* __restrict__ partials, const __grid_constant__ Table<Value> table) {
    DYNAMIC_SHARED(shared);
    const int found = table.find();
    const Gradient<Value>& tensor = table.tensors[found];
    const int64_t start = table.template first_value<kPart>(found);
    const int count = int(min(tensor.length - start, int64_t(kPart)));
    const double sum = vector_aligned(tensor.values) && count % kVectorF32 == 0
                           ? thread_sum<true>(tensor.values + start, count)
                           : thread_sum<false>(tensor.values + start, count);
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
    // Without this case, an infinite norm over an infinite limit would give a NaN although no gradient is one.
    const float ratio = max_norm == INFINITY && norm == norm ? 1.0f : max_norm / (norm + 1e-6f);
    out[0] = norm;
    // Not fminf, which would turn a NaN into 1.
    out[1] = ratio > 1.0f ? 1.0f : ratio;
}

int64_t count_parts(const mmpo_gradient* gradients, int count) {
    int64_t parts = 0;
    for (int i = 0; i < count; ++i) parts += ceil_div(gradients[i].length, kPart);
    return parts;
}

// The norms of the parts of `count` gradients of one type.
template <class Value>
mmpo_status launch_partials(float* partials, const mmpo_gradient* gradients, int count, mmpo_stream stream) {
    int64_t first = 0;
    return launch_tables_of<Gradient<Value>>(gradients, count, kPart, [&](const Table<Value>& table, unsigned blocks) {
        float* const parts = partials + first;
        first += blocks;
        return LAUNCH(partial_kernel<Value>, blocks, kBlock, kBlockWarps * sizeof(double), cuda_stream(stream), parts,
                      table);
    });
}

}  // namespace

int64_t MMPO_EXPORT(gradient_norm_workspace)(const mmpo_gradient* gradients, int32_t count) {
    return count_parts(gradients, count) * int64_t(sizeof(float));
}

// The parts of a tensor follow those of the one before it, however tensors are split into tables and whatever their
// types, so the order of the sum never changes. Without any parts, there is still a norm to assign: 0.
mmpo_status MMPO_EXPORT(gradient_norm)(float* out, void* workspace, const mmpo_gradient* gradients, int32_t count,
                                       float max_norm, mmpo_stream stream) {
    float* const partials = static_cast<float*>(workspace);
    int64_t parts = 0;
    for (int first = 0, next = 0; first < count; first = next) {
        const int32_t storage = gradients[first].storage;
        while (next < count && gradients[next].storage == storage) ++next;
        if (storage != MMPO_STORAGE_F32 && storage != MMPO_STORAGE_BF16) return kInvalidValue;
        const auto launch = storage == MMPO_STORAGE_F32 ? launch_partials<float> : launch_partials<bf16>;
        const mmpo_status status = launch(partials + parts, gradients + first, next - first, stream);
        if (status != kSuccess) return status;
        parts += count_parts(gradients + first, next - first);
    }
    return LAUNCH(finish_kernel, 1u, kFinishThreads, kFinishThreads / kWarp * sizeof(double), cuda_stream(stream), out,
                  partials, parts, max_norm);
}
