// The arithmetic of matrix instructions, apart from where their operands lie.
#pragma once

#include "machine.h"

namespace ptx {

// Depth of one mma.m16n8k16 and of one wgmma, in values.
constexpr int kDepth = 16;

inline float bf16_value(uint32_t bits) {
    const uint32_t wide = bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// c[rows, columns] += a[rows, 16] * b[16, columns]; the arrays have no gaps. `a` and `b` hold bf16 values.
//
// Rounding::f32 adds the products one after another to an f32, which PTX allows. The others do what Xie et al.,
// "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (arXiv 2511.10909), measured for bf16 on
// Ampere and Hopper: the exact products and the accumulator are aligned to the largest exponent among them (of a
// product the sum of its factors' exponents, for subnormals and zeros that of the smallest normal number), each is cut
// off F bits below that exponent's place, the rest is added exactly, and the sum is cut off to an f32. Ampere's
// m16n8k16 takes 8 products at a time with F = 24; Hopper takes 16 with F = 25, by mma and by wgmma.
void multiply_add(float* c, const float* a, const float* b, int rows, int columns, Rounding rounding);

}  // namespace ptx
