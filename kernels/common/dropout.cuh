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
    DEVICE float operator()(float value, int64_t index) const { return dropped(index) ? 0.0f : value * keep_scale; }

    DEVICE bool dropped(int64_t index) const {
        return uint32_t(hash(uint64_t(index) / 2) >> 32 * (index % 2)) < threshold;
    }

    // Whether two neighbours are kept, of which the first has this even index: bits 0 and 1. They share one hash.
    DEVICE uint32_t kept_pair(int64_t index) const {
        const uint64_t bits = hash(uint64_t(index) / 2);
        return (uint32_t(bits) < threshold ? 0u : 1u) | (uint32_t(bits >> 32) < threshold ? 0u : 2u);
    }

    // Puts zeros in place of those of eight bf16 neighbours in shared memory that are dropped. `index` is that of the
    // first. kEven: it is even, as in rows of whole vectors, so that two values share a hash. Nothing is read: a thread
    // that has waited for the values, or wrote them, has nothing more to wait for.
    template <bool kEven>
    DEVICE void zero_dropped(uint32_t address, int64_t index) const {
#pragma unroll
        for (int i = 0; i < kVector; i += 2) {
            uint32_t kept;
            if constexpr (kEven)
                kept = kept_pair(index + i);
            else
                kept = (dropped(index + i) ? 0u : 1u) | (dropped(index + i + 1) ? 0u : 2u);
            if (!(kept & 1)) store_shared_16(address + uint32_t(2 * i), 0);
            if (!(kept & 2)) store_shared_16(address + uint32_t(2 * i + 2), 0);
        }
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
