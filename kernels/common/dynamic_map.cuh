// The 8-bit numbers of block-wise quantised moments: bitsandbytes' dynamic map (Dettmers et al. 2022). The same
// operations as in src/optimizer/dynamic_map.rs, which explains them: both give the same codes and the same values.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Values that share a scale: a warp quantises a block, eight values per lane.
constexpr int kQuantizedBlock = 256;

// 0, the upper ends of the decades from 1e-6 to 1, and a place for the entry 1, which stands alone above them.
constexpr int kDecades = 9;

DEVICE float decade_scale(int decade) {
    const float lower = decade == 0 ? 0.0f : decade == 1 ? 1e-6f : decade == 2 ? 1e-5f : decade == 3 ? 1e-4f : 1e-3f;
    const float upper = decade == 5 ? 1e-2f : decade == 6 ? 1e-1f : decade == 7 ? 1.0f : 10.0f;
    return decade < 5 ? lower : upper;
}

DEVICE float decade_inverse(int decade) {
    const float lower = decade == 0 ? 0.0f : decade == 1 ? 1e6f : decade == 2 ? 1e5f : decade == 3 ? 1e4f : 1e3f;
    const float upper = decade == 5 ? 1e2f : decade == 6 ? 1e1f : decade == 7 ? 1.0f : 0.1f;
    return decade < 5 ? lower : upper;
}

// Both for every decade, in shared memory: lanes read any of nine neighbouring words, each in a bank of its own, where
// constant memory would serve one address at a time.
struct DecadeTable {
    const float* scales;
    const float* inverses;
};

// Every thread of the block calls it, with room for 2 * kDecades values.
DEVICE DecadeTable fill_decades(float* shared) {
    if (int(threadIdx.x) < kDecades) {
        shared[threadIdx.x] = decade_scale(int(threadIdx.x));
        shared[kDecades + threadIdx.x] = decade_inverse(int(threadIdx.x));
    }
    __syncthreads();
    return DecadeTable{shared, shared + kDecades};
}

// Where entries of one decade give way to those of the next: to the first decade from 0, from decade to decade, and to
// the entry 1. Each lies halfway between the two entries beside it, except that a second moment above 0 never becomes
// 0.
constexpr float decade_threshold(bool is_signed, int decade) {
    double power = 1e-6, entries = is_signed ? 1.0 : 2.0;
    if (decade == 0) return is_signed ? float(1e-6 * (0.05 + 0.225)) : 1.17549435e-38f;
    if (decade == 7) return float(1.0 - 0.225 / (entries * 64.0));
    for (int i = 0; i < decade; ++i) {
        power *= 10.0;
        entries *= 2.0;
    }
    return float(power * (0.1 + 0.18 / entries));
}
template <bool kSigned, int kDecade>
constexpr float kDecadeThreshold = decade_threshold(kSigned, kDecade);

// The first moment's map, with 127 negative entries, 0, 127 positive ones and 1, or the second moment's, with 0, 254
// positive entries and 1.
template <bool kSigned>
struct DynamicMap {
    static constexpr uint32_t kZeroCode = kSigned ? 127 : 0;

    // A decade's places begin at a power of two: the exponent of a place names the decade, its mantissa where in the
    // decade the entry lies.
    DEVICE static float entry(uint32_t place, const DecadeTable& decades) {
        const uint32_t bits = __float_as_uint(float(place) + 0.5f);
        const int decade = int(bits >> 23) - 127 + (kSigned ? 1 : 0);
        const float mantissa = __uint_as_float((bits & 0x007fffffu) | 0x3f800000u);
        return fminf(decades.scales[decade] * fmaf(0.9f, mantissa - 1.0f, 0.1f), 1.0f);
    }

    DEVICE static float decode(uint32_t code, const DecadeTable& decades) {
        if constexpr (kSigned) {
            const int place = int(code) - 127;
            const float magnitude = entry(uint32_t(place < 0 ? -place : place), decades);
            return place < 0 ? -magnitude : magnitude;
        } else {
            return entry(code + 1, decades);
        }
    }

    // The place of the entry nearest to a value of 0..1.
    DEVICE static uint32_t place(float value, const DecadeTable& decades) {
        const int decade = reached<0>(value) + reached<1>(value) + reached<2>(value) + reached<3>(value) +
                           reached<4>(value) + reached<5>(value) + reached<6>(value) + reached<7>(value);
        const int entries = int((1u << decade) >> (kSigned ? 1 : 0));
        // The part of 0.1..1, of as many as there are entries, that the value lies in.
        const float part = fmaf(value * decades.inverses[decade], 1.0f / 0.9f, -1.0f / 9.0f) * float(entries);
        return uint32_t(entries + max(min(int(part), entries - 1), 0));
    }

    template <int kDecade>
    DEVICE static int reached(float value) {
        return value >= kDecadeThreshold<kSigned, kDecade> ? 1 : 0;
    }

    DEVICE static uint32_t encode(float value, const DecadeTable& decades) {
        if constexpr (kSigned) {
            const int found = int(place(fabsf(value), decades));
            // There is no entry -1: the lowest is -0.993.
            return uint32_t(value < 0.0f ? 127 - min(found, 127) : 127 + found);
        } else {
            return place(value, decades) - 1;
        }
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
