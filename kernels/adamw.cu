// One AdamW update (Loshchilov and Hutter 2019; the order of operations is PyTorch's) of many tensors: clip, update,
// rounding of the states and of the weight in one pass, in which every byte moves once.
//
// Moments are f32, bf16, or 8-bit by blocks of 256 values (common/dynamic_map.cuh). The weight is bf16(master) with an
// f32 master copy, whole or as the 16 bits that the weight lacks of it, or is its own master copy, rounded
// stochastically (common/stochastic.cuh). All of them are updated in place. The moments of this update move the weight
// before they are rounded themselves. Clipping costs nothing: every gradient is multiplied by the factor that
// grad_norm.cu left in norm[1]. Gradients are f32 or bf16.
//
// A warp works on whole vectors of its own: 128 values, or the 256 of a quantised block, so that 8-bit moments need no
// barrier but that of the table of decades.

#include "common/dynamic_map.cuh"
#include "common/stochastic.cuh"
#include "common/tensor_table.cuh"
#include "common/vector.cuh"

namespace {

// The state of one value.
struct State {
    float weight, first, second;
};

DEVICE State update(State old, float gradient, const mmpo_adamw_step& step) {
    State now;
    now.first = step.beta1 * old.first + step.rest1 * gradient;
    now.second = step.beta2 * old.second + step.rest2 * gradient * gradient;
    const float denominator = sqrtf(now.second) * step.root_correction + step.epsilon;
    now.weight = step.decay * old.weight - step.step_size * now.first / denominator;
    return now;
}

// What a warp is given of a tensor: a lane's vector v is the values at(v) .. at(v) + 4 of it. `length` ends them only
// in kernels that are not vectorized.
template <int kVectors>
struct WarpPart {
    static constexpr int kValues = kVectors * kWarp * kVectorF32;

    int64_t start;
    int64_t length;

    DEVICE int64_t at(int vector) const { return start + (vector * kWarp + int(lane_id())) * kVectorF32; }
    // How many of a vector's values there are.
    DEVICE int count(int vector) const { return int(max(min(length - at(vector), int64_t(kVectorF32)), int64_t(0))); }
    DEVICE bool is_whole() const { return start + kValues <= length; }
};

template <int kVectors>
using Values = float[kVectors][kVectorF32];

// ---- moments

// Moments that are kept as they are, in f32 or bf16.
template <class Value>
struct PlainMoments {
    static constexpr int kVectors = 1;
    static constexpr bool kNeedsDecades = false;

    Value* first;
    Value* second;

    explicit PlainMoments(const mmpo_adamw_tensor& tensor)
        : first(static_cast<Value*>(tensor.first_moment)), second(static_cast<Value*>(tensor.second_moment)) {}
    PlainMoments() = default;

    DEVICE bool aligned() const { return vector_aligned(first, second); }

    template <bool kVectorized>
    DEVICE void load(Values<kVectors>& firsts, Values<kVectors>& seconds, WarpPart<kVectors> part,
                     const DecadeTable&) const {
        load4<kVectorized>(firsts[0], first + part.at(0), 0, part.count(0));
        load4<kVectorized>(seconds[0], second + part.at(0), 0, part.count(0));
    }

    template <bool kVectorized>
    DEVICE void store(const Values<kVectors>& firsts, const Values<kVectors>& seconds, WarpPart<kVectors> part,
                      const DecadeTable&) const {
        store4<kVectorized>(first + part.at(0), 0, part.count(0), firsts[0]);
        store4<kVectorized>(second + part.at(0), 0, part.count(0), seconds[0]);
    }
};

struct F32Moments : PlainMoments<float> {
    using PlainMoments::PlainMoments;
};

struct Bf16Moments : PlainMoments<bf16> {
    using PlainMoments::PlainMoments;
};

// Loads four codes; those that are not there are `zero`.
template <bool kVectorized>
DEVICE uint32_t load_codes(const uint8_t* codes, int count, uint32_t zero) {
    if constexpr (kVectorized) {
        return *reinterpret_cast<const uint32_t*>(codes);
    } else {
        uint32_t packed = 0;
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) packed |= (i < count ? uint32_t(codes[i]) : zero) << 8 * i;
        return packed;
    }
}

template <bool kVectorized>
DEVICE void store_codes(uint8_t* codes, int count, uint32_t packed) {
    if constexpr (kVectorized) {
        *reinterpret_cast<uint32_t*>(codes) = packed;
    } else {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) {
            if (i < count) codes[i] = uint8_t(packed >> 8 * i);
        }
    }
}

struct EightBitMoments {
    static constexpr int kVectors = 2;
    static constexpr bool kNeedsDecades = true;
    static_assert(WarpPart<kVectors>::kValues == kQuantizedBlock, "a warp has one block");

    uint8_t* first;
    uint8_t* second;
    float* first_scales;
    float* second_scales;

    explicit EightBitMoments(const mmpo_adamw_tensor& tensor)
        : first(static_cast<uint8_t*>(tensor.first_moment)),
          second(static_cast<uint8_t*>(tensor.second_moment)),
          first_scales(tensor.first_scales),
          second_scales(tensor.second_scales) {}
    EightBitMoments() = default;

    DEVICE bool aligned() const { return vector_aligned(first, second); }

    template <bool kVectorized>
    DEVICE void load(Values<kVectors>& firsts, Values<kVectors>& seconds, WarpPart<kVectors> part,
                     const DecadeTable& decades) const {
        uint32_t packed[2][kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            packed[0][v] = load_codes<kVectorized>(first + part.at(v), part.count(v), DynamicMap<true>::kZeroCode);
            packed[1][v] = load_codes<kVectorized>(second + part.at(v), part.count(v), DynamicMap<false>::kZeroCode);
        }
        // One lane loads each scale, and all get it.
        const int64_t block = part.start / kQuantizedBlock;
        float scale = 0.0f;
        if (lane_id() < 2) scale = (lane_id() == 0 ? first_scales : second_scales)[block];
        const float first_scale = __shfl_sync(0xffffffffu, scale, 0);
        const float second_scale = __shfl_sync(0xffffffffu, scale, 1);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kVectorF32; ++i) {
                firsts[v][i] = DynamicMap<true>::decode(packed[0][v] >> 8 * i & 0xffu, decades) * first_scale;
                seconds[v][i] = DynamicMap<false>::decode(packed[1][v] >> 8 * i & 0xffu, decades) * second_scale;
            }
        }
    }

    template <bool kVectorized>
    DEVICE void store(const Values<kVectors>& firsts, const Values<kVectors>& seconds, WarpPart<kVectors> part,
                      const DecadeTable& decades) const {
        const float first_scale = block_scale(firsts), second_scale = block_scale(seconds);
        const float first_inverse = first_scale == 0.0f ? 0.0f : 1.0f / first_scale;
        const float second_inverse = second_scale == 0.0f ? 0.0f : 1.0f / second_scale;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            uint32_t packed_firsts = 0, packed_seconds = 0;
#pragma unroll
            for (int i = 0; i < kVectorF32; ++i) {
                packed_firsts |= DynamicMap<true>::encode(firsts[v][i] * first_inverse, decades) << 8 * i;
                packed_seconds |= DynamicMap<false>::encode(seconds[v][i] * second_inverse, decades) << 8 * i;
            }
            store_codes<kVectorized>(first + part.at(v), part.count(v), packed_firsts);
            store_codes<kVectorized>(second + part.at(v), part.count(v), packed_seconds);
        }
        const int64_t block = part.start / kQuantizedBlock;
        if (lane_id() == 0) first_scales[block] = first_scale;
        if (lane_id() == 1) second_scales[block] = second_scale;
    }

    // The largest absolute value of the warp's block; 0 where that is no normal f32. As numbers that are not negative
    // are ordered as their bits are, with NaN above all, the largest is found among integers.
    DEVICE static float block_scale(const Values<kVectors>& values) {
        uint32_t largest = 0;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kVectorF32; ++i) largest = max(largest, __float_as_uint(values[v][i]) & 0x7fffffffu);
        }
        largest = __reduce_max_sync(0xffffffffu, largest);
        return largest < 0x00800000u ? 0.0f : __uint_as_float(largest);
    }
};

// ---- weights

struct MasterWeights {
    bf16* weight;
    float* master;

    explicit MasterWeights(const mmpo_adamw_tensor& tensor) : weight(tensor.weight), master(tensor.master) {}
    MasterWeights() = default;

    DEVICE bool aligned() const { return vector_aligned(weight, master); }

    template <bool kVectorized>
    DEVICE void load(float (&values)[kVectorF32], int64_t at, int count) const {
        load4<kVectorized>(values, master + at, 0, count);
    }

    template <bool kVectorized>
    DEVICE void store(const float (&values)[kVectorF32], int64_t at, int count, const mmpo_adamw_step&) const {
        store4<kVectorized>(master + at, 0, count, values);
        store4<kVectorized>(weight + at, 0, count, values);
    }
};

// The master copy is the weight and 16 bits more: src/optimizer/master.rs explains it.
struct SplitWeights {
    static constexpr uint32_t kMiddle = 0x8000u;

    bf16* weight;
    uint16_t* remainder;

    explicit SplitWeights(const mmpo_adamw_tensor& tensor) : weight(tensor.weight), remainder(tensor.remainder) {}
    SplitWeights() = default;

    DEVICE bool aligned() const { return vector_aligned(weight, remainder); }

    template <bool kVectorized>
    DEVICE void load(float (&values)[kVectorF32], int64_t at, int count) const {
        load4<kVectorized>(values, weight + at, 0, count);
        uint32_t lower[kVectorF32];
        load_remainders<kVectorized>(lower, at, count);
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) values[i] = joined(values[i], lower[i]);
    }

    template <bool kVectorized>
    DEVICE void store(const float (&values)[kVectorF32], int64_t at, int count, const mmpo_adamw_step&) const {
        store4<kVectorized>(weight + at, 0, count, values);
        uint32_t lower[kVectorF32];
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) lower[i] = remainder_of(values[i]);
        store_remainders<kVectorized>(lower, at, count);
    }

    // The value whose nearest bf16 value is `weight` and whose lower half is `lower`: above the middle it was rounded
    // up.
    DEVICE static float joined(float weight, uint32_t lower) {
        const uint32_t upper = __float_as_uint(weight) - (lower > kMiddle ? 0x10000u : 0u);
        return __uint_as_float(upper | lower);
    }

    // The middle would not tell which way it was rounded: away from it, to the side of the even upper half.
    DEVICE static uint32_t remainder_of(float value) {
        const uint32_t bits = __float_as_uint(value), lower = bits & 0xffffu;
        const uint32_t beside = (bits >> 16 & 1u) != 0u ? kMiddle + 1 : kMiddle - 1;
        return lower == kMiddle ? beside : lower;
    }

    template <bool kVectorized>
    DEVICE void load_remainders(uint32_t (&lower)[kVectorF32], int64_t at, int count) const {
        if constexpr (kVectorized) {
            const uint2 packed = *reinterpret_cast<const uint2*>(remainder + at);
            lower[0] = packed.x & 0xffffu;
            lower[1] = packed.x >> 16;
            lower[2] = packed.y & 0xffffu;
            lower[3] = packed.y >> 16;
        } else {
#pragma unroll
            for (int i = 0; i < kVectorF32; ++i) lower[i] = i < count ? remainder[at + i] : 0u;
        }
    }

    template <bool kVectorized>
    DEVICE void store_remainders(const uint32_t (&lower)[kVectorF32], int64_t at, int count) const {
        if constexpr (kVectorized) {
            *reinterpret_cast<uint2*>(remainder + at) =
                make_uint2(lower[0] | lower[1] << 16, lower[2] | lower[3] << 16);
        } else {
#pragma unroll
            for (int i = 0; i < kVectorF32; ++i) {
                if (i < count) remainder[at + i] = uint16_t(lower[i]);
            }
        }
    }
};

// Values of the blocks that mmpo_adamw_tensor::first_block counts.
constexpr int kBlockOfPart = 256;

struct StochasticWeights {
    bf16* weight;
    // The tensor's number and the part's place in it, on which the random bits depend.
    uint32_t tensor;
    uint32_t first_block;

    explicit StochasticWeights(const mmpo_adamw_tensor& tensor)
        : weight(tensor.weight), tensor(tensor.tensor), first_block(tensor.first_block) {}
    StochasticWeights() = default;

    DEVICE bool aligned() const { return vector_aligned(weight); }

    template <bool kVectorized>
    DEVICE void load(float (&values)[kVectorF32], int64_t at, int count) const {
        load4<kVectorized>(values, weight + at, 0, count);
    }

    template <bool kVectorized>
    DEVICE void store(const float (&values)[kVectorF32], int64_t at, int count, const mmpo_adamw_step& step) const {
        const uint64_t group = uint64_t(first_block) * (kBlockOfPart / kVectorF32) + uint64_t(at) / kVectorF32;
        const uint2 random = rounding_bits(group, tensor, step.step, make_uint2(step.seed_low, step.seed_high));
        float rounded[kVectorF32];
        rounded[0] = to_float(round_stochastically(values[0], random.x));
        rounded[1] = to_float(round_stochastically(values[1], random.x >> 16));
        rounded[2] = to_float(round_stochastically(values[2], random.y));
        rounded[3] = to_float(round_stochastically(values[3], random.y >> 16));
        // Each is a bf16 already, so that rounding to nearest keeps it.
        store4<kVectorized>(weight + at, 0, count, rounded);
    }
};

// ---- the kernel

template <class Moments, class Weights, class Gradient>
struct Tensor {
    Moments moments;
    Weights weights;
    const Gradient* gradient;
    int64_t length;

    explicit Tensor(const mmpo_adamw_tensor& tensor)
        : moments(tensor),
          weights(tensor),
          gradient(static_cast<const Gradient*>(tensor.gradient)),
          length(tensor.length) {}
    Tensor() = default;

    DEVICE bool aligned() const { return moments.aligned() && weights.aligned() && vector_aligned(gradient); }
};

template <bool kVectorized, class Moments, class Weights, class Gradient>
DEVICE void update_part(const Tensor<Moments, Weights, Gradient>& tensor, WarpPart<Moments::kVectors> part,
                        float coefficient, const mmpo_adamw_step& step, const DecadeTable& decades) {
    constexpr int kVectors = Moments::kVectors;
    Values<kVectors> gradients, weights, firsts, seconds;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        load4<kVectorized>(gradients[v], tensor.gradient + part.at(v), 0, part.count(v));
        tensor.weights.template load<kVectorized>(weights[v], part.at(v), part.count(v));
    }
    tensor.moments.template load<kVectorized>(firsts, seconds, part, decades);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) {
            const State now =
                update(State{weights[v][i], firsts[v][i], seconds[v][i]}, gradients[v][i] * coefficient, step);
            weights[v][i] = now.weight;
            firsts[v][i] = now.first;
            seconds[v][i] = now.second;
        }
        tensor.weights.template store<kVectorized>(weights[v], part.at(v), part.count(v), step);
    }
    tensor.moments.template store<kVectorized>(firsts, seconds, part, decades);
}

template <class Moments>
constexpr int kBlockValues = kBlockWarps * WarpPart<Moments::kVectors>::kValues;
template <class Moments>
constexpr size_t kSharedBytes = Moments::kNeedsDecades ? 2 * kDecades * sizeof(float) : 0;

template <class Moments, class Weights, class Gradient>
__global__ void __launch_bounds__(kBlock)
    adamw_kernel(const __grid_constant__ TensorTable<Tensor<Moments, Weights, Gradient>> table,
                 const float* __restrict__ norm, mmpo_adamw_step step) {
    DecadeTable decades{};
    if constexpr (Moments::kNeedsDecades) {
        DYNAMIC_SHARED(shared);
        decades = fill_decades(reinterpret_cast<float*>(shared));
    }
    const int found = table.find();
    const Tensor<Moments, Weights, Gradient>& tensor = table.tensors[found];
    const int warp = int(threadIdx.x) / kWarp;
    const WarpPart<Moments::kVectors> part{
        table.template first_value<kBlockValues<Moments>>(found) + warp * WarpPart<Moments::kVectors>::kValues,
        tensor.length};
    if (part.start >= tensor.length) return;
    const float coefficient = norm[1];
    if (part.is_whole() && tensor.aligned()) {
        update_part<true>(tensor, part, coefficient, step, decades);
    } else {
        update_part<false>(tensor, part, coefficient, step, decades);
    }
}

template <class Moments, class Weights, class Gradient>
mmpo_status launch_kernel(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                          mmpo_stream stream) {
    using Row = Tensor<Moments, Weights, Gradient>;
    return launch_tables_of<Row>(tensors, count, kBlockValues<Moments>,
                                 [=](const TensorTable<Row>& table, unsigned blocks) {
                                     return LAUNCH((adamw_kernel<Moments, Weights, Gradient>), blocks, kBlock,
                                                   kSharedBytes<Moments>, cuda_stream(stream), table, norm, step);
                                 });
}

template <class Moments, class Gradient>
mmpo_status launch_moments(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                           mmpo_stream stream) {
    if (tensors[0].master != nullptr) {
        return launch_kernel<Moments, MasterWeights, Gradient>(tensors, count, norm, step, stream);
    }
    if (tensors[0].remainder != nullptr) {
        return launch_kernel<Moments, SplitWeights, Gradient>(tensors, count, norm, step, stream);
    }
    return launch_kernel<Moments, StochasticWeights, Gradient>(tensors, count, norm, step, stream);
}

template <class Gradient>
mmpo_status launch_gradients(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                             int32_t moments, mmpo_stream stream) {
    switch (moments) {
        case MMPO_MOMENTS_F32:
            return launch_moments<F32Moments, Gradient>(tensors, count, norm, step, stream);
        case MMPO_MOMENTS_BF16:
            return launch_moments<Bf16Moments, Gradient>(tensors, count, norm, step, stream);
        case MMPO_MOMENTS_8BIT:
            return launch_moments<EightBitMoments, Gradient>(tensors, count, norm, step, stream);
        default:
            return kInvalidValue;
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(adamw)(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                               int32_t moments, int32_t gradients, mmpo_stream stream) {
    if (count == 0) return kSuccess;
    switch (gradients) {
        case MMPO_STORAGE_F32:
            return launch_gradients<float>(tensors, count, norm, step, moments, stream);
        case MMPO_STORAGE_BF16:
            return launch_gradients<bf16>(tensors, count, norm, step, moments, stream);
        default:
            return kInvalidValue;
    }
}
