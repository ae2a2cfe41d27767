// One AdamW update (Loshchilov and Hutter 2019; the order of operations is PyTorch's) of many tensors with f32 states.
//
// Updates master, first_moment and second_moment, and assigns weight = bf16(master). Clipping costs nothing: every
// gradient is multiplied by the factor that grad_norm.cu left in norm[1]. 16 bytes are read and 14 written for each
// value.

#include "common/tensor_table.cuh"
#include "common/vector.cuh"

namespace {

// The state of one value.
struct Moments {
    float master, first, second;
};

DEVICE Moments update(Moments old, float gradient, const mmpo_adamw_step& step) {
    Moments now;
    now.first = step.beta1 * old.first + step.rest1 * gradient;
    now.second = step.beta2 * old.second + step.rest2 * gradient * gradient;
    const float denominator = sqrtf(now.second) * step.root_correction + step.epsilon;
    now.master = step.decay * old.master - step.step_size * now.first / denominator;
    return now;
}

// Updates `count` values, four at most.
template <bool kVectorized>
DEVICE void update_vector(bf16* weight, float* master, float* first_moment, float* second_moment, const float* gradient,
                          int count, float coefficient, const mmpo_adamw_step& step) {
    float masters[kVectorF32], firsts[kVectorF32], seconds[kVectorF32], gradients[kVectorF32];
    load4<kVectorized>(gradients, gradient, 0, count);
    load4<kVectorized>(masters, master, 0, count);
    load4<kVectorized>(firsts, first_moment, 0, count);
    load4<kVectorized>(seconds, second_moment, 0, count);
#pragma unroll
    for (int i = 0; i < kVectorF32; ++i) {
        const Moments now = update(Moments{masters[i], firsts[i], seconds[i]}, gradients[i] * coefficient, step);
        masters[i] = now.master;
        firsts[i] = now.first;
        seconds[i] = now.second;
    }
    store4<kVectorized>(master, 0, count, masters);
    store4<kVectorized>(first_moment, 0, count, firsts);
    store4<kVectorized>(second_moment, 0, count, seconds);
    store4<kVectorized>(weight, 0, count, masters);
}

constexpr int kBlockValues = kBlock * kVectorF32;
using Table = TensorTable<mmpo_adamw_tensor>;

// A thread updates four values, with 64 bytes of loads under way.
__global__ void __launch_bounds__(kBlock)
    adamw_kernel(const __grid_constant__ Table table, const float* __restrict__ norm, mmpo_adamw_step step) {
    const int found = table.find();
    const mmpo_adamw_tensor& tensor = table.tensors[found];
    const int64_t at = table.first_value<kBlockValues>(found) + int(threadIdx.x) * kVectorF32;
    if (at >= tensor.length) return;
    const int64_t left = tensor.length - at;
    const float coefficient = norm[1];
    bf16* const weight = tensor.weight;
    float *const master = tensor.master, *const first = tensor.first_moment, *const second = tensor.second_moment;
    const float* const gradient = tensor.gradient;
    if (left >= kVectorF32 && vector_aligned(weight, master, first, second, gradient)) {
        update_vector<true>(weight + at, master + at, first + at, second + at, gradient + at, kVectorF32, coefficient,
                            step);
    } else {
        update_vector<false>(weight + at, master + at, first + at, second + at, gradient + at,
                             int(min(left, int64_t(kVectorF32))), coefficient, step);
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(adamw)(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                               mmpo_stream stream) {
    return launch_tables(tensors, count, kBlockValues, [=](const Table& table, unsigned blocks) {
        return LAUNCH(adamw_kernel, blocks, kBlock, 0, cuda_stream(stream), table, norm, step);
    });
}
