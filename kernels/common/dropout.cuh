// Dropout as a function of a key and a value's place, so that no mask is kept: forward and backward, and a run that is
// resumed, drop the same values.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct Dropout {
    uint64_t key;
    uint32_t threshold;
    float keep_scale;

    // SplitMix64 (Steele, Lea and Flood 2014) at a position of the stream named by the key.
    DEVICE uint64_t hash(uint64_t counter) const {
        uint64_t bits = key + (counter + 1) * 0x9E3779B97F4A7C15ull;
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
        return bits ^ (bits >> 31);
    }

    // The value with this row-major index, dropped or scaled.
    DEVICE float operator()(float value, int64_t index) const {
        const uint32_t half = uint32_t(hash(uint64_t(index) / 2) >> 32 * (index % 2));
        return half < threshold ? 0.0f : value * keep_scale;
    }

    // Whether two neighbours are kept, of which the first has this even index: bits 0 and 1. They share one hash.
    DEVICE uint32_t kept_pair(int64_t index) const {
        const uint64_t bits = hash(uint64_t(index) / 2);
        return (uint32_t(bits) < threshold ? 0u : 1u) | (uint32_t(bits >> 32) < threshold ? 0u : 2u);
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
