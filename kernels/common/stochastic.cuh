// Stochastic rounding to bf16 by random bits that are a function of where and when they are used:
// src/optimizer/rounding.rs explains it, and draws the same.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// Philox4x32-10 (Salmon et al. 2011).
DEVICE uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xd2511f53u, counter.x), low0 = 0xd2511f53u * counter.x;
        const uint32_t high1 = __umulhi(0xcd9e8d57u, counter.z), low1 = 0xcd9e8d57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + 0x9e3779b9u, key.y + 0xbb67ae85u);
    }
    return counter;
}

// The random bits of four neighbouring elements, 16 each, the first in the low half of x.
DEVICE uint2 rounding_bits(uint64_t group, uint32_t tensor, uint32_t step, uint2 seed) {
    const uint4 words = philox(make_uint4(uint32_t(group), uint32_t(group >> 32), tensor, step), seed);
    return make_uint2(words.x, words.y);
}

// Adds the 16 bits at the end of the f32 and drops what is no bf16. A NaN becomes the canonical one.
DEVICE bf16 round_stochastically(float value, uint32_t random) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
    return bf16{uint16_t((bits + (random & 0xffffu)) >> 16)};
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
