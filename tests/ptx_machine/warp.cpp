// Instructions by which the lanes of a warp exchange values. PTX ISA 9.0, sections 9.7.9.6 (shfl.sync) and 9.7.13
// (vote.sync, redux.sync, bar.warp.sync, elect.sync, activemask).
#include "warp.h"

#include <algorithm>

#include "decode.h"

namespace ptx {

bool gathered(Warp& warp, Mask wanted) {
    if (wanted & warp.exists & ~warp.live)
        fail("waits for lanes %#x, which have exited", wanted & warp.exists & ~warp.live);
    return (wanted & warp.live & ~warp.lanes) == 0;
}

bool whole_warp(Warp& warp) {
    if (warp.exists != kAllLanes) fail("an aligned instruction in a warp of fewer than 32 threads");
    return gathered(warp, kAllLanes);
}

namespace {

// The lanes of `mask` that exist, once all of them are here; 0 while some are not. Calls `f(members)` once for each
// mask that the active lanes name.
template <class F>
Step with_members(Warp& warp, uint32_t mask_slot, F f) {
    const uint32_t* const masks = warp.values<uint32_t>(mask_slot);
    for (Mask left = warp.lanes; left != 0;) {
        const int lane = __builtin_ctz(left);
        const Mask members = masks[lane] & warp.exists;
        if ((members >> lane & 1) == 0) fail_lane(lane, "the membermask %#x lacks the lane itself", masks[lane]);
        if (!gathered(warp, members)) return Step::gathering;
        each_lane(members, [&](int other) {
            if ((masks[other] & warp.exists) != members) fail_lane(other, "lanes name different membermasks");
        });
        left &= ~members;
    }
    for (Mask left = warp.lanes; left != 0;) {
        const Mask members = masks[__builtin_ctz(left)] & warp.exists;
        f(members);
        left &= ~members;
    }
    return Step::next;
}

enum class Shuffle { up, down, butterfly, index };

// operands: d, a, b, c, membermask, p; `constant` is 1 where there is a predicate.
template <Shuffle kMode>
Step shuffle(Warp& warp, const Instruction& i) {
    return with_members(warp, i.operands[4], [&](Mask members) {
        uint32_t source[kLanes], result[kLanes];
        Mask inside = 0;
        memcpy(source, warp.values<uint32_t>(i.operands[1]), sizeof source);
        const uint32_t* const b = warp.values<uint32_t>(i.operands[2]);
        const uint32_t* const c = warp.values<uint32_t>(i.operands[3]);
        each_lane(members, [&](int lane) {
            const int by = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
            const int last = (lane & segment) | (clamp & ~segment & 31), first = lane & segment;
            int from = 0;
            bool valid = false;
            switch (kMode) {
                case Shuffle::up:
                    from = lane - by, valid = from >= last;
                    break;
                case Shuffle::down:
                    from = lane + by, valid = from <= last;
                    break;
                case Shuffle::butterfly:
                    from = lane ^ by, valid = from <= last;
                    break;
                case Shuffle::index:
                    from = first | (by & ~segment & 31), valid = from <= last;
                    break;
            }
            if (!valid) from = lane;
            if ((members >> from & 1) == 0) fail_lane(lane, "shuffles from lane %d, which takes no part", from);
            result[lane] = source[from];
            inside |= Mask(valid) << lane;
        });
        uint32_t* const d = warp.values<uint32_t>(i.operands[0]);
        each_lane(members, [&](int lane) { d[lane] = result[lane]; });
        if (i.constant) warp.predicates[i.operands[5]] = (warp.predicates[i.operands[5]] & ~members) | inside;
    });
}

void decode_shuffle(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 5);
    const std::vector<std::string> results = split_outside_brackets(text.operands[0], '|');
    out.operands[0] = operands.value(results[0], 4);
    if (results.size() == 2) {
        out.constant = 1;
        out.operands[5] = operands.predicate(results[1]);
    }
    for (int k = 1; k < 5; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    out.execute = has(text, "up")     ? &shuffle<Shuffle::up>
                  : has(text, "down") ? &shuffle<Shuffle::down>
                  : has(text, "bfly") ? &shuffle<Shuffle::butterfly>
                  : has(text, "idx")  ? &shuffle<Shuffle::index>
                                      : nullptr;
}

enum class Vote { any, all, uniform, ballot };

// operands: d, predicate, membermask; `constant` is 1 where the predicate is negated.
template <Vote kMode>
Step vote(Warp& warp, const Instruction& i) {
    return with_members(warp, i.operands[2], [&](Mask members) {
        const Mask p = (i.constant ? ~warp.predicates[i.operands[1]] : warp.predicates[i.operands[1]]) & members;
        if constexpr (kMode == Vote::ballot) {
            uint32_t* const d = warp.values<uint32_t>(i.operands[0]);
            each_lane(members, [&](int lane) { d[lane] = p; });
        } else {
            const bool holds = kMode == Vote::any ? p != 0 : kMode == Vote::all ? p == members : p == 0 || p == members;
            Mask& d = warp.predicates[i.operands[0]];
            d = (d & ~members) | (holds ? members : 0);
        }
    });
}

void decode_vote(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    const bool ballot = has(text, "ballot");
    out.operands[0] = ballot ? operands.value(text.operands[0], 4) : operands.predicate(text.operands[0]);
    out.constant = text.operands[1][0] == '!';
    out.operands[1] = operands.predicate(out.constant ? text.operands[1].substr(1) : text.operands[1]);
    out.operands[2] = operands.value(text.operands[2], 4);
    out.execute = ballot             ? &vote<Vote::ballot>
                  : has(text, "any") ? &vote<Vote::any>
                  : has(text, "all") ? &vote<Vote::all>
                  : has(text, "uni") ? &vote<Vote::uniform>
                                     : nullptr;
}

template <class T, class F>
Step reduce(Warp& warp, const Instruction& i) {
    return with_members(warp, i.operands[2], [&](Mask members) {
        const T* const a = warp.values<T>(i.operands[1]);
        T result = a[__builtin_ctz(members)];
        each_lane(members & (members - 1), [&](int lane) { result = F{}(result, a[lane]); });
        T* const d = warp.values<T>(i.operands[0]);
        each_lane(members, [&](int lane) { d[lane] = result; });
    });
}

struct Sum {
    template <class T>
    T operator()(T a, T b) const {
        return T(uint32_t(a) + uint32_t(b));
    }
};
struct Smaller {
    template <class T>
    T operator()(T a, T b) const {
        return std::min(a, b);
    }
};
struct Larger {
    template <class T>
    T operator()(T a, T b) const {
        return std::max(a, b);
    }
};
struct Both {
    uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct Either {
    uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct OneOf {
    uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};

void decode_reduce(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], 4);
    const bool is_signed = text.parts.back() == "s32";
    if (has(text, "add")) out.execute = &reduce<uint32_t, Sum>;
    if (has(text, "min")) out.execute = is_signed ? &reduce<int32_t, Smaller> : &reduce<uint32_t, Smaller>;
    if (has(text, "max")) out.execute = is_signed ? &reduce<int32_t, Larger> : &reduce<uint32_t, Larger>;
    if (has(text, "and")) out.execute = &reduce<uint32_t, Both>;
    if (has(text, "or")) out.execute = &reduce<uint32_t, Either>;
    if (has(text, "xor")) out.execute = &reduce<uint32_t, OneOf>;
}

// elect.sync _|p, membermask: true in the lowest member; which one, PTX leaves open.
Step elect(Warp& warp, const Instruction& i) {
    return with_members(warp, i.operands[1], [&](Mask members) {
        Mask& p = warp.predicates[i.operands[0]];
        p = (p & ~members) | (members & -members);
    });
}

void decode_elect(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    const std::vector<std::string> results = split_outside_brackets(text.operands[0], '|');
    if (results.size() != 2 || results[0] != "_") return;
    out.operands[0] = operands.predicate(results[1]);
    out.operands[1] = operands.value(text.operands[1], 4);
    out.execute = &elect;
}

Step active_mask(Warp& warp, const Instruction& i) {
    uint32_t* const d = warp.values<uint32_t>(i.operands[0]);
    each_lane(warp.lanes, [&](int lane) { d[lane] = warp.lanes; });
    return Step::next;
}

void decode_active_mask(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 1);
    out.operands[0] = operands.value(text.operands[0], 4);
    out.execute = &active_mask;
}

Step synchronise(Warp& warp, const Instruction& i) {
    return with_members(warp, i.operands[0], [&](Mask) { warp.block->cluster->orders.lanes_meet(warp.actor); });
}

}  // namespace

void decode_warp_barrier(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 1);
    out.operands[0] = operands.value(text.operands[0], 4);
    out.execute = &synchronise;
}

void add_warp_operations(OpcodeTable& table) {
    table["shfl"] = &decode_shuffle;
    table["vote"] = &decode_vote;
    table["redux"] = &decode_reduce;
    table["elect"] = &decode_elect;
    table["activemask"] = &decode_active_mask;
}

}  // namespace ptx
