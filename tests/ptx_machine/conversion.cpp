// mov, cvt, cvta and the approximations. PTX ISA 9.0, sections 9.7.9 (data movement and conversion) and 9.7.3 (rcp,
// sqrt, rsqrt, lg2, ex2). Approximations are rounded results here; the ISA only bounds their error.
#include <cmath>

#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

struct Same {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};

Step move_predicate(Warp& warp, const Instruction& i) {
    set_predicate(warp, i.operands[0], warp.predicates[i.operands[1]]);
    return Step::next;
}

Step set_predicate_constant(Warp& warp, const Instruction& i) {
    set_predicate(warp, i.operands[0], i.constant != 0 ? kAllLanes : 0);
    return Step::next;
}

// mov.b64 d, {low, high} and its inverse.
template <class Half, class Whole>
Step pack(Warp& warp, const Instruction& i) {
    Whole* const d = warp.values<Whole>(i.operands[0]);
    const Half* const low = warp.values<Half>(i.list[0]);
    const Half* const high = warp.values<Half>(i.list[1]);
    for_lanes(warp, d, [=](int lane) { return Whole(Whole(low[lane]) | Whole(high[lane]) << (8 * sizeof(Half))); });
    return Step::next;
}
template <class Half, class Whole>
Step unpack(Warp& warp, const Instruction& i) {
    const Whole* const source = warp.values<Whole>(i.operands[1]);
    Whole kept[kLanes];
    memcpy(kept, source, sizeof kept);
    for (uint32_t k = 0; k < 2; ++k) {
        for_lanes(warp, warp.values<Half>(i.list[k]),
                  [&](int lane) { return Half(kept[lane] >> (8 * sizeof(Half) * k)); });
    }
    return Step::next;
}

void decode_pack(Operands& operands, const InstructionText& text, Instruction& out) {
    const uint32_t bytes = type_bytes(text.parts.back());
    const bool packs = text.operands[1][0] == '{';
    out.list = operands.list(text.operands[packs ? 1 : 0], bytes / 2);
    out.operands[packs ? 0 : 1] = operands.value(text.operands[packs ? 0 : 1], bytes);
    if (out.list.size() != 2) return;
    if (bytes == 8) out.execute = packs ? &pack<uint32_t, uint64_t> : &unpack<uint32_t, uint64_t>;
    if (bytes == 4) out.execute = packs ? &pack<uint16_t, uint32_t> : &unpack<uint16_t, uint32_t>;
}

void decode_move(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    const std::string& type = text.parts.back();
    if (type == "pred") {
        out.operands[0] = operands.predicate(text.operands[0]);
        if (operands.is_predicate(text.operands[1])) {
            out.operands[1] = operands.predicate(text.operands[1]);
            out.execute = &move_predicate;
        } else {
            out.constant = std::stoll(text.operands[1], nullptr, 0);
            out.execute = &set_predicate_constant;
        }
        return;
    }
    if (text.operands[0][0] == '{' || text.operands[1][0] == '{') return decode_pack(operands, text, out);
    const uint32_t bytes = type_bytes(type);
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
    out.execute = bytes == 2   ? &unary<uint16_t, uint16_t, Same>
                  : bytes == 4 ? &unary<uint32_t, uint32_t, Same>
                               : &unary<uint64_t, uint64_t, Same>;
}

// cvta: generic addresses of global memory and of parameters are the addresses themselves; those of shared memory are
// too, because the kernels use them through shared instructions alone.
void decode_address_conversion(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], 8);
    out.execute = &unary<uint64_t, uint64_t, Same>;
}

template <class D>
struct Convert {
    template <class S>
    D operator()(S a) const {
        return D(a);
    }
};
// cvt.rni: to the nearest integer, halves to even. Saturates integers.
template <class D>
struct ToNearest {
    template <class S>
    D operator()(S a) const {
        const S rounded = std::nearbyint(a);
        if constexpr (std::is_floating_point_v<D>)
            return D(rounded);
        else if (std::isnan(rounded))
            return 0;
        else if (rounded >= S(std::numeric_limits<D>::max()))
            return std::numeric_limits<D>::max();
        else if (rounded <= S(std::numeric_limits<D>::min()))
            return std::numeric_limits<D>::min();
        else
            return D(rounded);
    }
};
// cvt.rzi: towards zero.
template <class D>
struct TowardsZero {
    template <class S>
    D operator()(S a) const {
        return ToNearest<D>{}(std::trunc(a));
    }
};
// cvt.sat.f32.f32: to [0, 1], a NaN to zero.
struct Saturate {
    float operator()(float a) const { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
};

uint32_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
// cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half.
struct ToBf16Pair {
    uint32_t operator()(float a, float b) const { return round_to_bf16(a) << 16 | round_to_bf16(b); }
};

template <class S>
Execute convert_from(const std::string& to) {
    return for_number(to, [](auto zero) -> Execute {
        using D = decltype(zero);
        return &unary<D, S, Convert<D>>;
    });
}

// Between integers a source may lie in a wider register, whose low bits count; so may the destination, extended.
template <class D, class S, class DR, class SR>
Step convert_wide(Warp& warp, const Instruction& i) {
    DR* const d = warp.values<DR>(i.operands[0]);
    const SR* const a = warp.values<SR>(i.operands[1]);
    for_lanes(warp, d, [=](int lane) { return DR(D(S(a[lane]))); });
    return Step::next;
}

template <class D, class S>
Execute convert_registers(uint32_t destination, uint32_t source) {
    using SignedOrNot2 = std::conditional_t<std::is_signed_v<D>, int16_t, uint16_t>;
    using SignedOrNot4 = std::conditional_t<std::is_signed_v<D>, int32_t, uint32_t>;
    using SignedOrNot8 = std::conditional_t<std::is_signed_v<D>, int64_t, uint64_t>;
    const auto from = [&](auto register_type) -> Execute {
        using DR = decltype(register_type);
        if (source == 2) return &convert_wide<D, S, DR, uint16_t>;
        if (source == 4) return &convert_wide<D, S, DR, uint32_t>;
        return &convert_wide<D, S, DR, uint64_t>;
    };
    if (destination == 2) return from(SignedOrNot2{});
    if (destination == 4) return from(SignedOrNot4{});
    return from(SignedOrNot8{});
}

template <class Make>
Execute for_small_integer(const std::string& type, Make make) {
    if (type == "s8") return make(int8_t{});
    if (type == "u8" || type == "b8") return make(uint8_t{});
    return for_integer(type, make);
}

bool is_float(const std::string& type) { return type[0] == 'f'; }

void decode_convert(Operands& operands, const InstructionText& text, Instruction& out) {
    const std::string& from = text.parts.back();
    const std::string& to = text.parts[text.parts.size() - 2];
    if (to == "bf16x2" && from == "f32" && has(text, "rn") && text.parts.size() == 4) {
        expect_operands(text, 3);
        for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], 4);
        out.execute = &binary<uint32_t, float, float, ToBf16Pair>;
        return;
    }
    expect_operands(text, 2);
    if (!is_float(to) && !is_float(from)) {
        const uint32_t destination = operands.width(text.operands[0]);
        const uint32_t source = std::max(operands.width(text.operands[1]), type_bytes(from) < 2 ? 2 : type_bytes(from));
        out.operands[0] = operands.value(text.operands[0], destination);
        out.operands[1] = operands.value(text.operands[1], source);
        out.execute = for_small_integer(to, [&](auto to_zero) {
            using D = decltype(to_zero);
            return for_small_integer(from, [&](auto from_zero) {
                using S = decltype(from_zero);
                return convert_registers<D, S>(destination, source);
            });
        });
        return;
    }
    out.operands[0] = operands.value(text.operands[0], type_bytes(to));
    out.operands[1] = operands.value(text.operands[1], type_bytes(from));
    if (has(text, "ftz")) return;
    if (has(text, "sat")) {
        if (to == "f32" && from == "f32") out.execute = &unary<float, float, Saturate>;
    } else if (has(text, "rni") || has(text, "rzi")) {
        const bool nearest = has(text, "rni");
        out.execute = for_number(to, [&](auto zero) -> Execute {
            using D = decltype(zero);
            return for_float(from, [&](auto source) -> Execute {
                using S = decltype(source);
                return nearest ? &unary<D, S, ToNearest<D>> : &unary<D, S, TowardsZero<D>>;
            });
        });
    } else if (!has(text, "rz") && !has(text, "rm") && !has(text, "rp")) {
        if (from == "f32")
            out.execute = is_float(to) ? convert_from<float>(to) : nullptr;
        else if (from == "f64")
            out.execute = is_float(to) ? convert_from<double>(to) : nullptr;
        else
            out.execute = for_integer(from, [&](auto zero) { return convert_from<decltype(zero)>(to); });
    }
}

// ---- approximations of f32; .ftz flushes subnormal inputs and results to zero of the same sign.

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

struct Exp2 {
    float operator()(float a) const { return std::exp2(a); }
};
struct Log2 {
    float operator()(float a) const { return std::log2(a); }
};
struct Reciprocal {
    template <class T>
    T operator()(T a) const {
        return T(1) / a;
    }
};
struct SquareRoot {
    template <class T>
    T operator()(T a) const {
        return std::sqrt(a);
    }
};
struct ReciprocalRoot {
    float operator()(float a) const { return float(1.0 / std::sqrt(double(a))); }
};
template <class F>
struct Flushed {
    float operator()(float a) const { return flush(F{}(flush(a))); }
};

template <class F>
void decode_approximation(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    const std::string& type = text.parts.back();
    for (int k = 0; k < 2; ++k) out.operands[k] = operands.value(text.operands[k], type_bytes(type));
    if (type == "f32") out.execute = has(text, "ftz") ? &unary<float, float, Flushed<F>> : &unary<float, float, F>;
    if constexpr (std::is_same_v<F, Reciprocal> || std::is_same_v<F, SquareRoot>) {
        if (type == "f64") out.execute = &unary<double, double, F>;
    }
}

}  // namespace

void add_conversions(OpcodeTable& table) {
    table["mov"] = &decode_move;
    table["cvta"] = &decode_address_conversion;
    table["cvt"] = &decode_convert;
    table["ex2"] = &decode_approximation<Exp2>;
    table["lg2"] = &decode_approximation<Log2>;
    table["rcp"] = &decode_approximation<Reciprocal>;
    table["sqrt"] = &decode_approximation<SquareRoot>;
    table["rsqrt"] = &decode_approximation<ReciprocalRoot>;
}

}  // namespace ptx
