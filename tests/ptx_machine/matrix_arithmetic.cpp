// Products of bf16 matrices added to f32, in f32 or as tensor cores have been measured to round.
#include "matrix_arithmetic.h"

#include <algorithm>
#include <cmath>

namespace ptx {
namespace {

constexpr int kMostColumns = 256;

void multiply_add_f32(float* c, const float* a, const float* b, int rows, int columns) {
    for (int row = 0; row < rows; ++row) {
        float* const sums = c + row * columns;
        for (int k = 0; k < kDepth; ++k) {
            const float left = a[row * kDepth + k];
            const float* const right = b + k * columns;
#pragma GCC ivdep
            for (int column = 0; column < columns; ++column) sums[column] += left * right[column];
        }
    }
}

// The exponent of the smallest normal number, which subnormals and zeros have too.
constexpr int32_t kLeastExponent = -126;
// A product with a zero takes no part in choosing the exponent.
constexpr int32_t kNoExponent = -400;

int32_t exponent_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) == 0) return kNoExponent;
    return std::max(int32_t(bits >> 23 & 255), 1) - 127;
}

double power_of_two(int32_t exponent) {
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The f32 next to the value on the side of zero.
float cut_to_f32(double value) {
    if (std::fabs(value) < 0x1p-126) return float(std::trunc(value * 0x1p149) * 0x1p-149);
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= ~((uint64_t(1) << 29) - 1);
    memcpy(&value, &bits, sizeof value);
    return float(value);
}

// One row of sums, `depth` products at a time.
void fused_row(float* sums, const float* a, const float* b, int columns, int depth, int fraction_bits) {
    int32_t largest[kMostColumns];
    double total[kMostColumns], scale[kMostColumns];
    for (int first = 0; first < kDepth; first += depth) {
        for (int column = 0; column < columns; ++column) largest[column] = exponent_of(sums[column]);
        for (int k = first; k < first + depth; ++k) {
            const int32_t left = exponent_of(a[k]);
            for (int column = 0; column < columns; ++column) {
                largest[column] = std::max(largest[column], left + exponent_of(b[k * columns + column]));
            }
        }
        for (int column = 0; column < columns; ++column) {
            // The accumulator's exponent is no less, whatever its value.
            largest[column] = std::max(largest[column], kLeastExponent);
            scale[column] = power_of_two(fraction_bits - largest[column]);
            total[column] = std::trunc(double(sums[column]) * scale[column]);
        }
        for (int k = first; k < first + depth; ++k) {
            const double left = a[k];
            for (int column = 0; column < columns; ++column) {
                total[column] += std::trunc(left * double(b[k * columns + column]) * scale[column]);
            }
        }
        for (int column = 0; column < columns; ++column) {
            sums[column] = cut_to_f32(total[column] * power_of_two(largest[column] - fraction_bits));
        }
    }
}

bool all_finite(const float* values, int count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

}  // namespace

void multiply_add(float* c, const float* a, const float* b, int rows, int columns, Rounding rounding) {
    const bool finite = rounding != Rounding::f32 && all_finite(a, rows * kDepth) && all_finite(b, kDepth * columns) &&
                        all_finite(c, rows * columns);
    // Infinities and NaNs come out the same either way.
    if (!finite) return multiply_add_f32(c, a, b, rows, columns);
    const bool ampere = rounding == Rounding::ampere;
    for (int row = 0; row < rows; ++row) {
        fused_row(c + row * columns, a + row * kDepth, b, columns, ampere ? 8 : 16, ampere ? 24 : 25);
    }
}

}  // namespace ptx
