// Logic, shifts, and bits and bytes picked out of a value. PTX ISA 9.0, sections 9.7.8 (logic and shift), 9.7.1 (popc,
// clz, brev, bfind, bfe, bfi) and 9.7.9 (prmt).
#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

// ---- 9.7.8: and, or, xor, not, shl, shr, shf, lop3. Shifts by the width or more give zero, or the sign.

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
    decode_same_type(operands, text, out);
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

}  // namespace

void add_logic(OpcodeTable& table) {
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
}

}  // namespace ptx
