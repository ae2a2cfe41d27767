// setp and selp. PTX ISA 9.0, section 9.7.6 (comparison and selection). Comparisons with a NaN are false, those whose
// name ends in u are true.
#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

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

void add_comparisons(OpcodeTable& table) {
    table["setp"] = &decode_set_predicate;
    table["selp"] = &decode_select;
}

}  // namespace ptx
