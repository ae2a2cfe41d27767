// Eight values at a time, in 16-byte accesses where rows allow them and single values where not; conversions to f32.
//
// Kernels are templates over kVectorized. `true` promises that base and width make every access start on a 16-byte
// boundary and lie either inside the row or outside it as a whole. `false` takes any width. In both cases values beyond
// the row's end read as 0 and are not written, so a kernel needs no code for a row's tail.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// ---- bf16
//
// Values stay packed, two to a register, until they are computed with. That takes half the registers of f32.

// Loads columns column .. column + 8 of `row`.
template <bool kVectorized>
DEVICE uint4 load8(const bf16* row, int column, int width) {
    uint4 packed = make_uint4(0, 0, 0, 0);
    if constexpr (kVectorized) {
        if (column < width) packed = load_128(row + column);
    } else {
        uint32_t bits[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) bits[i] = column + i < width ? row[column + i].bits : 0u;
        packed = make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16,
                            bits[6] | bits[7] << 16);
    }
    return packed;
}

template <bool kVectorized>
DEVICE void store8(bf16* row, int column, int width, uint4 packed) {
    if constexpr (kVectorized) {
        if (column < width) store_128(row + column, packed);
    } else {
        const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (column + i < width) row[column + i] = bf16{uint16_t(pairs[i / 2] >> 16 * (i % 2))};
        }
    }
}

DEVICE void unpack8(float (&values)[kVector], uint4 packed) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = low_bf16(pairs[i]);
        values[2 * i + 1] = high_bf16(pairs[i]);
    }
}

// Rounds to nearest even, and packs.
DEVICE uint4 pack8(const float (&values)[kVector]) {
    return make_uint4(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]),
                      pack_bf16x2(values[4], values[5]), pack_bf16x2(values[6], values[7]));
}

// ---- f32

template <bool kVectorized>
DEVICE void load8(float (&values)[kVector], const float* row, int column, int width) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
    if constexpr (kVectorized) {
        if (column < width) {
            const uint4 halves[2] = {load_128(row + column), load_128(row + column + 4)};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                values[4 * half] = __uint_as_float(halves[half].x);
                values[4 * half + 1] = __uint_as_float(halves[half].y);
                values[4 * half + 2] = __uint_as_float(halves[half].z);
                values[4 * half + 3] = __uint_as_float(halves[half].w);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (column + i < width) values[i] = row[column + i];
        }
    }
}

template <bool kVectorized>
DEVICE void store8(float* row, int column, int width, const float (&values)[kVector]) {
    if constexpr (kVectorized) {
        if (column < width) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                store_128(row + column + 4 * half,
                          make_uint4(__float_as_uint(values[4 * half]), __float_as_uint(values[4 * half + 1]),
                                     __float_as_uint(values[4 * half + 2]), __float_as_uint(values[4 * half + 3])));
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (column + i < width) row[column + i] = values[i];
        }
    }
}

// ---- f32, four values at a time
//
// For arrays that a whole warp reads or writes. If a lane took eight values, each of its two accesses would touch every
// sector of the warp's line and use only half of each.

template <bool kVectorized>
DEVICE void load4(float (&values)[kVectorF32], const float* row, int column, int width) {
    if constexpr (kVectorized) {
        const uint4 packed = column < width ? load_128(row + column) : make_uint4(0, 0, 0, 0);
        values[0] = __uint_as_float(packed.x);
        values[1] = __uint_as_float(packed.y);
        values[2] = __uint_as_float(packed.z);
        values[3] = __uint_as_float(packed.w);
    } else {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) values[i] = column + i < width ? row[column + i] : 0.0f;
    }
}

template <bool kVectorized>
DEVICE void store4(float* row, int column, int width, const float (&values)[kVectorF32]) {
    if constexpr (kVectorized) {
        if (column < width) {
            store_128(row + column, make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                                               __float_as_uint(values[2]), __float_as_uint(values[3])));
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) {
            if (column + i < width) row[column + i] = values[i];
        }
    }
}

// Loads four bf16 values, 8 bytes.
template <bool kVectorized>
DEVICE void load4(float (&values)[kVectorF32], const bf16* row, int column, int width) {
    if constexpr (kVectorized) {
        const uint2 packed = column < width ? *reinterpret_cast<const uint2*>(row + column) : make_uint2(0, 0);
        values[0] = low_bf16(packed.x);
        values[1] = high_bf16(packed.x);
        values[2] = low_bf16(packed.y);
        values[3] = high_bf16(packed.y);
    } else {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) values[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
    }
}

// Stores four values as bf16, 8 bytes.
template <bool kVectorized>
DEVICE void store4(bf16* row, int column, int width, const float (&values)[kVectorF32]) {
    if constexpr (kVectorized) {
        if (column < width) {
            *reinterpret_cast<uint2*>(row + column) =
                make_uint2(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVectorF32; ++i) {
            if (column + i < width) row[column + i] = to_bf16(values[i]);
        }
    }
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
