// Loops over the lanes of a warp, by which every plain operation is executed.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "machine.h"

namespace ptx {

// d[lane] = f(lane) for the active lanes. A full warp's loop has no condition, so that compilers make vectors of it.
template <class D, class F>
inline void for_lanes(const Warp& warp, D* d, F f) {
    if (warp.full()) {
#pragma GCC ivdep
        for (int lane = 0; lane < kLanes; ++lane) d[lane] = f(lane);
    } else {
        const Mask lanes = warp.lanes;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (lanes >> lane & 1) d[lane] = f(lane);
        }
    }
}

// operands: d, a.
template <class D, class A, class F>
Step unary(Warp& warp, const Instruction& i) {
    D* const d = warp.values<D>(i.operands[0]);
    const A* const a = warp.values<A>(i.operands[1]);
    for_lanes(warp, d, [=](int lane) { return D(F{}(a[lane])); });
    return Step::next;
}

// operands: d, a, b.
template <class D, class A, class B, class F>
Step binary(Warp& warp, const Instruction& i) {
    D* const d = warp.values<D>(i.operands[0]);
    const A* const a = warp.values<A>(i.operands[1]);
    const B* const b = warp.values<B>(i.operands[2]);
    for_lanes(warp, d, [=](int lane) { return D(F{}(a[lane], b[lane])); });
    return Step::next;
}

// operands: d, a, b, c.
template <class D, class A, class C, class F>
Step ternary(Warp& warp, const Instruction& i) {
    D* const d = warp.values<D>(i.operands[0]);
    const A* const a = warp.values<A>(i.operands[1]);
    const A* const b = warp.values<A>(i.operands[2]);
    const C* const c = warp.values<C>(i.operands[3]);
    for_lanes(warp, d, [=](int lane) { return D(F{}(a[lane], b[lane], c[lane])); });
    return Step::next;
}

// A bit for each lane where `f(lane)` holds.
template <class F>
inline Mask lanes_where(F f) {
    alignas(32) int8_t holds[kLanes];
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) holds[lane] = f(lane) ? -1 : 0;
#if defined(__AVX2__)
    return Mask(_mm256_movemask_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(holds))));
#else
    Mask mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= Mask(holds[lane] & 1) << lane;
    return mask;
#endif
}

inline void set_predicate(Warp& warp, uint32_t index, Mask value) {
    Mask& predicate = warp.predicates[index];
    predicate = (predicate & ~warp.lanes) | (value & warp.lanes);
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// The function for a type by its PTX name: `make(T{})` of the C++ type, nullptr for a name not in the set.
template <class Make>
Execute for_integer(const std::string& type, Make make) {
    if (type == "s16") return make(int16_t{});
    if (type == "u16" || type == "b16") return make(uint16_t{});
    if (type == "s32") return make(int32_t{});
    if (type == "u32" || type == "b32") return make(uint32_t{});
    if (type == "s64") return make(int64_t{});
    if (type == "u64" || type == "b64") return make(uint64_t{});
    return nullptr;
}
template <class Make>
Execute for_float(const std::string& type, Make make) {
    if (type == "f32") return make(float{});
    if (type == "f64") return make(double{});
    return nullptr;
}
template <class Make>
Execute for_number(const std::string& type, Make make) {
    const Execute integer = for_integer(type, make);
    return integer != nullptr ? integer : for_float(type, make);
}

}  // namespace ptx
