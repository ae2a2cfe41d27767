// Arithmetic of integers and floating-point numbers. PTX ISA 9.0, sections 9.7.1 (integers) and 9.7.3 (floating point).
#include <cmath>
#include <limits>

#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

// ---- add, sub, mul, div, rem, min, max, neg, abs. Integers wrap; floats round to nearest even.

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return T(uint64_t(a) + uint64_t(b));
        else
            return a + b;
    }
};
struct Subtract {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return T(uint64_t(a) - uint64_t(b));
        else
            return a - b;
    }
};
// mul.lo of integers: the low half of the product.
struct Multiply {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return T(uint64_t(a) * uint64_t(b));
        else
            return a * b;
    }
};
// mul.hi: the high half.
struct MultiplyHigh {
    template <class T>
    T operator()(T a, T b) const {
        using Wide =
            std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                               std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
        return T(Wide(a) * Wide(b) >> (8 * sizeof(T)));
    }
};
// mul.wide: the whole product in twice the width.
template <class Wide>
struct MultiplyWide {
    template <class T>
    Wide operator()(T a, T b) const {
        return Wide(a) * Wide(b);
    }
};
// Division by zero gives all ones: PTX leaves the value open, machines do that.
struct Divide {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>) {
            if (b == 0) return T(-1);
            if (std::is_signed_v<T> && b == T(-1)) return T(0 - uint64_t(a));
            return T(a / b);
        } else {
            return a / b;
        }
    }
};
struct Remainder {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == T(-1)) return 0;
        return T(a % b);
    }
};
// The number, where the other operand is NaN.
struct Minimum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return a < b ? a : b;
        else
            return std::isnan(a) ? b : std::isnan(b) ? a : (a < b || (a == b && std::signbit(a))) ? a : b;
    }
};
struct Maximum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return a > b ? a : b;
        else
            return std::isnan(a) ? b : std::isnan(b) ? a : (a > b || (a == b && std::signbit(b))) ? a : b;
    }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        if constexpr (std::is_integral_v<T>)
            return T(0 - uint64_t(a));
        else
            return -a;
    }
};
struct Absolute {
    template <class T>
    T operator()(T a) const {
        if constexpr (std::is_integral_v<T>)
            return a < 0 ? T(0 - uint64_t(a)) : a;
        else
            return std::fabs(a);
    }
};

template <class F>
void decode_number(Operands& operands, const InstructionText& text, Instruction& out) {
    decode_same_type(operands, text, out);
    for (const char* unknown : {"ftz", "sat", "rz", "rm", "rp", "cc", "NaN"}) {
        if (has(text, unknown)) throw Unknown(std::string("`.") + unknown + "` is not known here");
    }
    out.execute = for_number(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &binary<T, T, T, F>;
    });
}

void decode_remainder(Operands& operands, const InstructionText& text, Instruction& out) {
    decode_same_type(operands, text, out);
    out.execute = for_integer(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &binary<T, T, T, Remainder>;
    });
}

template <class Narrow, class Wide>
Execute multiply_wide() {
    return &binary<Wide, Narrow, Narrow, MultiplyWide<Wide>>;
}

void decode_multiply(Operands& operands, const InstructionText& text, Instruction& out) {
    const std::string& type = text.parts.back();
    if (!has(text, "wide")) {
        if (!has(text, "hi")) return decode_number<Multiply>(operands, text, out);
        decode_same_type(operands, text, out);
        out.execute = for_integer(type, [](auto zero) -> Execute {
            using T = decltype(zero);
            return &binary<T, T, T, MultiplyHigh>;
        });
        return;
    }
    expect_operands(text, 3);
    const uint32_t bytes = type_bytes(type);
    out.operands[0] = operands.value(text.operands[0], 2 * bytes);
    for (int k = 1; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.execute = type == "s16"   ? multiply_wide<int16_t, int32_t>()
                  : type == "u16" ? multiply_wide<uint16_t, uint32_t>()
                  : type == "s32" ? multiply_wide<int32_t, int64_t>()
                  : type == "u32" ? multiply_wide<uint32_t, uint64_t>()
                                  : nullptr;
}

template <class F>
void decode_one(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.execute = for_number(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &unary<T, T, F>;
    });
}

// mad.lo: a * b + c, the low half. fma: rounded once (9.7.3.6); .rm towards minus infinity.
struct MultiplyAddLow {
    template <class T>
    T operator()(T a, T b, T c) const {
        return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
    }
};
template <class W>
struct MultiplyAddWide {
    template <class T, class C>
    W operator()(T a, T b, C c) const {
        return W(uint64_t(W(a) * W(b)) + uint64_t(c));
    }
};
struct FusedMultiplyAdd {
    float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
    double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
};
struct FusedMultiplyAddDown {
    float operator()(float a, float b, float c) const {
        // The product is exact in double; a double sum of such numbers may round, so the remainder decides.
        const double product = double(a) * double(b), sum = product + double(c);
        const double back = sum - product, lost = (product - (sum - back)) + (double(c) - back);
        const float rounded = float(sum);
        const bool above = double(rounded) > sum || (double(rounded) == sum && lost < 0);
        return above ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
    }
};

void decode_multiply_add(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 4);
    const std::string& type = text.parts.back();
    const uint32_t bytes = type_bytes(type);
    const bool wide = has(text, "wide");
    out.operands[0] = operands.value(text.operands[0], wide ? 2 * bytes : bytes);
    for (int k = 1; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.operands[3] = operands.value(text.operands[3], wide ? 2 * bytes : bytes);
    if (text.parts[0] == "fma") {
        if (has(text, "ftz") || has(text, "sat") || has(text, "rz") || has(text, "rp")) return;
        if (has(text, "rm")) {
            if (type == "f32") out.execute = &ternary<float, float, float, FusedMultiplyAddDown>;
            return;
        }
        out.execute = for_float(type, [](auto zero) -> Execute {
            using T = decltype(zero);
            return &ternary<T, T, T, FusedMultiplyAdd>;
        });
    } else if (wide) {
        if (type == "s32") out.execute = &ternary<int64_t, int32_t, int64_t, MultiplyAddWide<int64_t>>;
        if (type == "u32") out.execute = &ternary<uint64_t, uint32_t, uint64_t, MultiplyAddWide<uint64_t>>;
    } else if (has(text, "lo")) {
        out.execute = for_integer(type, [](auto zero) -> Execute {
            using T = decltype(zero);
            return &ternary<T, T, T, MultiplyAddLow>;
        });
    }
}

}  // namespace

void add_arithmetic(OpcodeTable& table) {
    table["add"] = &decode_number<Add>;
    table["sub"] = &decode_number<Subtract>;
    table["mul"] = &decode_multiply;
    table["mad"] = table["fma"] = &decode_multiply_add;
    table["div"] = &decode_number<Divide>;
    table["rem"] = &decode_remainder;
    table["min"] = &decode_number<Minimum>;
    table["max"] = &decode_number<Maximum>;
    table["neg"] = &decode_one<Negate>;
    table["abs"] = &decode_one<Absolute>;
}

}  // namespace ptx
