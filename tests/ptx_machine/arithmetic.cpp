// Integer, floating-point, logic and comparison instructions. PTX ISA 9.0, sections 9.7.1 (integer arithmetic), 9.7.3
// (floating point), 9.7.6 (comparison and selection), 9.7.8 (logic and shift).
#include <cmath>
#include <limits>

#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

// ---- 9.7.1 and 9.7.3: add, sub, mul, div, rem, min, max, neg, abs. Integers wrap; floats round to nearest even.

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
// Of a number and a NaN, the number.
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

void decode_two(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
}

template <class F>
void decode_number(Operands& operands, const InstructionText& text, Instruction& out) {
    decode_two(operands, text, out);
    for (const char* unknown : {"ftz", "sat", "rz", "rm", "rp", "cc", "NaN"}) {
        if (has(text, unknown)) throw Unknown(std::string("`.") + unknown + "` is not known here");
    }
    out.execute = for_number(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &binary<T, T, T, F>;
    });
}

void decode_remainder(Operands& operands, const InstructionText& text, Instruction& out) {
    decode_two(operands, text, out);
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
        decode_two(operands, text, out);
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

// ---- 9.7.8: and, or, xor, not, shl, shr. Shifts by the width or more give zero, or the sign.

struct And {
    template <class T>
    T operator()(T a, T b) const {
        return T(a & b);
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return T(a | b);
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return T(a ^ b);
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return T(~a);
    }
};
struct ShiftLeft {
    template <class T>
    T operator()(T a, uint32_t by) const {
        return by >= 8 * sizeof(T) ? T(0) : T(Unsigned<T>(a) << by);
    }
};
struct ShiftRight {
    template <class T>
    T operator()(T a, uint32_t by) const {
        const uint32_t most = 8 * sizeof(T) - 1;
        if (by > most) return std::is_signed_v<T> ? T(a >> most) : T(0);
        return T(a >> by);
    }
};

template <class F>
Step predicate_logic(Warp& warp, const Instruction& i) {
    set_predicate(warp, i.operands[0], F{}(warp.predicates[i.operands[1]], warp.predicates[i.operands[2]]));
    return Step::next;
}
Step predicate_not(Warp& warp, const Instruction& i) {
    set_predicate(warp, i.operands[0], ~warp.predicates[i.operands[1]]);
    return Step::next;
}

template <class F>
void decode_logic(Operands& operands, const InstructionText& text, Instruction& out) {
    if (text.parts.back() == "pred") {
        expect_operands(text, 3);
        for (int k = 0; k < 3; ++k) out.operands[k] = operands.predicate(text.operands[k]);
        out.execute = &predicate_logic<F>;
        return;
    }
    decode_two(operands, text, out);
    out.execute = for_integer(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &binary<T, T, T, F>;
    });
}

void decode_not(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    if (text.parts.back() == "pred") {
        for (int k = 0; k < 2; ++k) out.operands[k] = operands.predicate(text.operands[k]);
        out.execute = &predicate_not;
        return;
    }
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.execute = for_integer(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &unary<T, T, Not>;
    });
}

template <class F>
void decode_shift(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.operands[2] = operands.value(text.operands[2], 4);
    out.execute = for_integer(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &binary<T, T, uint32_t, F>;
    });
}

// shf.l.wrap, shf.r.wrap and .clamp of 32 bits: the funnel shift of b:a.
template <bool kLeft, bool kClamp>
struct FunnelShift {
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t by) const {
        const uint32_t n = kClamp ? (by > 32 ? 32 : by) : by & 31;
        const uint64_t both = uint64_t(b) << 32 | a;
        return kLeft ? uint32_t((both << n) >> 32) : uint32_t(both >> n);
    }
};

void decode_funnel(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 4);
    for (int k = 0; k < 4; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    const bool left = has(text, "l"), clamp = has(text, "clamp");
    out.execute = left ? (clamp ? &ternary<uint32_t, uint32_t, uint32_t, FunnelShift<true, true>>
                                : &ternary<uint32_t, uint32_t, uint32_t, FunnelShift<true, false>>)
                       : (clamp ? &ternary<uint32_t, uint32_t, uint32_t, FunnelShift<false, true>>
                                : &ternary<uint32_t, uint32_t, uint32_t, FunnelShift<false, false>>);
}

// lop3: any function of three bits, bit 4a + 2b + c of the table.
Step lop3(Warp& warp, const Instruction& i) {
    uint32_t* const d = warp.values<uint32_t>(i.operands[0]);
    const uint32_t* const a = warp.values<uint32_t>(i.operands[1]);
    const uint32_t* const b = warp.values<uint32_t>(i.operands[2]);
    const uint32_t* const c = warp.values<uint32_t>(i.operands[3]);
    const auto table = uint32_t(i.constant);
    for_lanes(warp, d, [=](int lane) {
        uint32_t result = 0;
        for (uint32_t k = 0; k < 8; ++k) {
            if (table >> k & 1) {
                result |= (k & 4 ? a[lane] : ~a[lane]) & (k & 2 ? b[lane] : ~b[lane]) & (k & 1 ? c[lane] : ~c[lane]);
            }
        }
        return result;
    });
    return Step::next;
}

void decode_lop3(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 5);
    for (int k = 0; k < 4; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.constant = std::stoll(text.operands[4], nullptr, 0);
    out.execute = &lop3;
}

// ---- 9.7.1: popc, clz, brev, bfind, bfe, bfi; 9.7.9: prmt.

struct CountOnes {
    uint32_t operator()(uint32_t a) const { return uint32_t(__builtin_popcount(a)); }
};
struct CountZeros {
    uint32_t operator()(uint32_t a) const { return a == 0 ? 32 : uint32_t(__builtin_clz(a)); }
};
struct Reverse {
    uint32_t operator()(uint32_t a) const {
        uint32_t r = 0;
        for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
        return r;
    }
};
// bfind.shiftamt.u32: by how much to shift left to bring the highest one to the top.
struct ShiftToTop {
    uint32_t operator()(uint32_t a) const { return a == 0 ? 0xffffffffu : uint32_t(__builtin_clz(a)); }
};
struct HighestOne {
    uint32_t operator()(uint32_t a) const { return a == 0 ? 0xffffffffu : 31 - uint32_t(__builtin_clz(a)); }
};

template <class F>
void decode_bits(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    if (type_bytes(text.parts.back()) != 4) return;
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.execute = &unary<uint32_t, uint32_t, F>;
}

void decode_find(Operands& operands, const InstructionText& text, Instruction& out) {
    if (text.parts.back() == "s32") return;
    return has(text, "shiftamt") ? decode_bits<ShiftToTop>(operands, text, out)
                                 : decode_bits<HighestOne>(operands, text, out);
}

template <class T>
Step insert_bits(Warp& warp, const Instruction& i) {
    T* const d = warp.values<T>(i.operands[0]);
    const T* const a = warp.values<T>(i.operands[1]);
    const T* const b = warp.values<T>(i.operands[2]);
    const uint32_t* const position = warp.values<uint32_t>(i.operands[3]);
    const uint32_t* const length = warp.values<uint32_t>(i.operands[4]);
    constexpr uint32_t kBits = 8 * sizeof(T);
    for_lanes(warp, d, [=](int lane) {
        const uint32_t from = position[lane] & 255, count = length[lane] & 255;
        if (from >= kBits || count == 0) return b[lane];
        const T ones = count >= kBits ? T(-1) : T((T(1) << count) - 1);
        return T((b[lane] & ~T(ones << from)) | T((a[lane] & ones) << from));
    });
    return Step::next;
}

void decode_insert(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 5);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 5; ++k) out.operands[k] = operands.value(text.operands[k], k < 3 ? bytes : 4);
    out.execute = bytes == 8 ? &insert_bits<uint64_t> : &insert_bits<uint32_t>;
}

template <class T>
Step extract_bits(Warp& warp, const Instruction& i) {
    T* const d = warp.values<T>(i.operands[0]);
    const T* const a = warp.values<T>(i.operands[1]);
    const uint32_t* const position = warp.values<uint32_t>(i.operands[2]);
    const uint32_t* const length = warp.values<uint32_t>(i.operands[3]);
    constexpr uint32_t kBits = 8 * sizeof(T);
    for_lanes(warp, d, [=](int lane) {
        const uint32_t from = position[lane] & 255, count = length[lane] & 255;
        const uint32_t top = std::min(from + count - 1, kBits - 1);
        const bool sign = std::is_signed_v<T> && count != 0 && (Unsigned<T>(a[lane]) >> top & 1) != 0;
        Unsigned<T> result = sign ? Unsigned<T>(-1) : 0;
        for (uint32_t k = 0; k < count && k < kBits && from + k < kBits; ++k) {
            const Unsigned<T> bit = Unsigned<T>(a[lane]) >> (from + k) & 1;
            result = Unsigned<T>((result & ~(Unsigned<T>(1) << k)) | bit << k);
        }
        return T(result);
    });
    return Step::next;
}

void decode_extract(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 4);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 4; ++k) out.operands[k] = operands.value(text.operands[k], k < 2 ? bytes : 4);
    out.execute = for_integer(text.parts.back(), [](auto zero) -> Execute {
        using T = decltype(zero);
        return &extract_bits<T>;
    });
}

// prmt.b32: four bytes picked of eight; bit 3 of a selector spreads the byte's sign.
struct PermuteBytes {
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t selectors) const {
        const uint64_t bytes = uint64_t(b) << 32 | a;
        uint32_t result = 0;
        for (int k = 0; k < 4; ++k) {
            const uint32_t selector = selectors >> (4 * k) & 15;
            uint32_t byte = uint32_t(bytes >> (8 * (selector & 7))) & 255;
            if (selector & 8) byte = byte & 128 ? 255 : 0;
            result |= byte << (8 * k);
        }
        return result;
    }
};

void decode_permute(Operands& operands, const InstructionText& text, Instruction& out) {
    if (text.parts.size() != 2) return;
    expect_operands(text, 4);
    for (int k = 0; k < 4; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.execute = &ternary<uint32_t, uint32_t, uint32_t, PermuteBytes>;
}

// ---- 9.7.6: setp, selp. Comparisons with a NaN are false, those that end in u true.

template <class T, class F>
Step compare(Warp& warp, const Instruction& i) {
    const T* const a = warp.values<T>(i.operands[1]);
    const T* const b = warp.values<T>(i.operands[2]);
    const Mask result = lanes_where([=](int lane) { return F{}(a[lane], b[lane]); });
    switch (i.flags) {
        case 0:
            set_predicate(warp, i.operands[0], result);
            break;
        case 1:
            set_predicate(warp, i.operands[0], result & warp.predicates[i.operands[3]]);
            break;
        case 2:
            set_predicate(warp, i.operands[0], result | warp.predicates[i.operands[3]]);
            break;
        default:
            set_predicate(warp, i.operands[0], result ^ warp.predicates[i.operands[3]]);
    }
    return Step::next;
}

#define COMPARISON(name, expression)      \
    struct name {                         \
        template <class T>                \
        bool operator()(T a, T b) const { \
            return expression;            \
        }                                 \
    }
COMPARISON(Equal, a == b);
COMPARISON(NotEqual, a<b || a> b);
COMPARISON(Less, a < b);
COMPARISON(LessEqual, a <= b);
COMPARISON(Greater, a > b);
COMPARISON(GreaterEqual, a >= b);
COMPARISON(EqualUnordered, !(a < b || a > b));
COMPARISON(NotEqualUnordered, !(a == b));
COMPARISON(LessUnordered, !(a >= b));
COMPARISON(LessEqualUnordered, !(a > b));
COMPARISON(GreaterUnordered, !(a <= b));
COMPARISON(GreaterEqualUnordered, !(a < b));
COMPARISON(Ordered, a == a && b == b);
COMPARISON(Unordered, a != a || b != b);
#undef COMPARISON

template <class T>
Execute comparison(const std::string& name) {
    if (name == "eq") return &compare<T, Equal>;
    if (name == "ne") return &compare<T, NotEqual>;
    if (name == "lt" || name == "lo") return &compare<T, Less>;
    if (name == "le" || name == "ls") return &compare<T, LessEqual>;
    if (name == "gt" || name == "hi") return &compare<T, Greater>;
    if (name == "ge" || name == "hs") return &compare<T, GreaterEqual>;
    if constexpr (std::is_floating_point_v<T>) {
        if (name == "equ") return &compare<T, EqualUnordered>;
        if (name == "neu") return &compare<T, NotEqualUnordered>;
        if (name == "ltu") return &compare<T, LessUnordered>;
        if (name == "leu") return &compare<T, LessEqualUnordered>;
        if (name == "gtu") return &compare<T, GreaterUnordered>;
        if (name == "geu") return &compare<T, GreaterEqualUnordered>;
        if (name == "num") return &compare<T, Ordered>;
        if (name == "nan") return &compare<T, Unordered>;
    }
    return nullptr;
}

void decode_set_predicate(Operands& operands, const InstructionText& text, Instruction& out) {
    const std::string& type = text.parts.back();
    const uint32_t bytes = type_bytes(type);
    out.operands[0] = operands.predicate(text.operands.at(0));
    for (int k = 1; k < 3; ++k) out.operands[k] = operands.value(text.operands.at(k), bytes);
    if (has(text, "and") || has(text, "or") || has(text, "xor")) {
        expect_operands(text, 4);
        out.operands[3] = operands.predicate(text.operands[3]);
        out.flags = has(text, "and") ? 1 : has(text, "or") ? 2 : 3;
    } else {
        expect_operands(text, 3);
    }
    if (has(text, "ftz")) return;
    const std::string& name = text.parts[1];
    out.execute = for_number(type, [&](auto zero) { return comparison<decltype(zero)>(name); });
}

template <class T>
Step select(Warp& warp, const Instruction& i) {
    T* const d = warp.values<T>(i.operands[0]);
    const T* const a = warp.values<T>(i.operands[1]);
    const T* const b = warp.values<T>(i.operands[2]);
    const Mask p = warp.predicates[i.operands[3]];
    for_lanes(warp, d, [=](int lane) { return p >> lane & 1 ? a[lane] : b[lane]; });
    return Step::next;
}

void decode_select(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 4);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.operands[3] = operands.predicate(text.operands[3]);
    out.execute = for_number(text.parts.back(), [](auto zero) -> Execute { return &select<decltype(zero)>; });
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
    table["and"] = &decode_logic<And>;
    table["or"] = &decode_logic<Or>;
    table["xor"] = &decode_logic<Xor>;
    table["not"] = &decode_not;
    table["shl"] = &decode_shift<ShiftLeft>;
    table["shr"] = &decode_shift<ShiftRight>;
    table["shf"] = &decode_funnel;
    table["lop3"] = &decode_lop3;
    table["popc"] = &decode_bits<CountOnes>;
    table["clz"] = &decode_bits<CountZeros>;
    table["brev"] = &decode_bits<Reverse>;
    table["bfind"] = &decode_find;
    table["bfi"] = &decode_insert;
    table["bfe"] = &decode_extract;
    table["prmt"] = &decode_permute;
    table["setp"] = &decode_set_predicate;
    table["selp"] = &decode_select;
}

}  // namespace ptx
