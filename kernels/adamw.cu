// One AdamW update (Loshchilov and Hutter 2019; the order of operations is PyTorch's) of a tensor with f32 states.
//
// Updates master, first_moment and second_moment, assigns weight = bf16(master). Clipping costs nothing: every gradient
// is multiplied by the coefficient that grad_norm.cu left in norm[1]. A value is 16 bytes read and 14 written.

#include "common/vector.cuh"

namespace {

// One value's state.
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

// Updates `count` values, at most four.
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

// A thread updates four values: 64 bytes of loads under way in each.
template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    adamw_kernel(bf16* __restrict__ weight, float* __restrict__ master, float* __restrict__ first_moment,
                 float* __restrict__ second_moment, const float* __restrict__ gradient, const float* __restrict__ norm,
                 int64_t length, mmpo_adamw_step step) {
    const int64_t at = flat_index<kVectorF32>();
    if (at >= length) return;
    const int64_t left = length - at;
    const float coefficient = norm[1];
    if (kVectorized && left >= kVectorF32) {
        update_vector<true>(weight + at, master + at, first_moment + at, second_moment + at, gradient + at, kVectorF32,
                            coefficient, step);
    } else {
        update_vector<false>(weight + at, master + at, first_moment + at, second_moment + at, gradient + at,
                             int(min(left, int64_t(kVectorF32))), coefficient, step);
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(adamw)(bf16* weight, float* master, float* first_moment, float* second_moment,
                               const float* gradient, const float* norm, int64_t length, mmpo_adamw_step step,
                               mmpo_stream stream) {
    if (length == 0) return kSuccess;
    const unsigned blocks = flat_blocks<kVectorF32>(length);
    return vector_aligned(weight, master, first_moment, second_moment, gradient)
               ? LAUNCH(adamw_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), weight, master, first_moment,
                        second_moment, gradient, norm, length, step)
               : LAUNCH(adamw_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), weight, master, first_moment,
                        second_moment, gradient, norm, length, step);
}
