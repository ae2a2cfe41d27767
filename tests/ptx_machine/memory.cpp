// Loads, stores and atomics. PTX ISA 9.0, sections 9.7.9 (ld, st) and 9.7.13 (atom, red); chapter "State Spaces".
#include "memory.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "decode.h"

namespace ptx {

SharedRange shared_range(Warp& warp, int lane, uint32_t address, uint32_t bytes, uint32_t alignment) {
    Block* block = warp.block;
    uint32_t at = address;
    if (address >> kRankShift) {
        const uint32_t rank = (address >> kRankShift) - 1;
        if (rank >= block->cluster->blocks.size()) fail_lane(lane, "the cluster has no block of rank %u", rank);
        block = block->cluster->blocks[rank].get();
        if (block->live_threads() == 0) {
            fail_lane(lane, "the cluster's block %u has exited, and its shared memory with it", rank);
        }
        at = address & ((1u << kRankShift) - 1);
    }
    if (at % alignment != 0)
        fail_lane(lane, "misaligned: shared address %#x, %u bytes need a multiple of %u", at, bytes, alignment);
    if (at < kSharedStart || at > block->shared.end || bytes > block->shared.end - at) {
        fail_lane(lane, "out of bounds: %u bytes at shared address %#x, the block has %#x to %#x", bytes, at,
                  kSharedStart, block->shared.end);
    }
    return {block, at, block->shared.bytes.data() + at};
}

void check_written(const SharedRange& range, uint32_t bytes, int lane) {
    if (memchr(range.block->shared.written.data() + range.address, 0, bytes) != nullptr) {
        fail_lane(lane, "reads shared memory that nothing wrote: %u bytes at %#x", bytes, range.address);
    }
}

void mark_written(const SharedRange& range, uint32_t bytes) {
    memset(range.block->shared.written.data() + range.address, 1, bytes);
}

SharedRange generic_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes, uint32_t alignment, Access access,
                           Lanes lanes) {
    const SharedRange range = shared_range(warp, lane, address, bytes, alignment);
    if (access != Access::write) check_written(range, bytes, lane);
    // Atomics of several lanes may meet at one place.
    if (access == Access::update) lanes.first = kNoLane;
    warp.block->cluster->orders.generic(warp.actor, range.block->rank, range.address, bytes, access != Access::read,
                                        lanes);
    if (access != Access::read) mark_written(range, bytes);
    return range;
}

namespace {

enum class Space : uint8_t { global, shared, parameter };

// Where the lanes' accesses lie side by side, one check covers them.
bool side_by_side(Warp& warp, const Instruction& i, uint32_t bytes) {
    if (!warp.full()) return false;
    const uint64_t first = lane_address(warp, i, 1, 0);
    for (int lane = 1; lane < kLanes; ++lane) {
        if (lane_address(warp, i, 1, lane) != first + uint64_t(lane) * bytes) return false;
    }
    return true;
}

// Calls `f(lane, bytes of memory)` for each active lane, after all checks.
template <bool kShared, class F>
void each_access(Warp& warp, const Instruction& i, uint32_t bytes, Access access, F f) {
    const bool together = side_by_side(warp, i, bytes);
    const uint64_t first = together ? lane_address(warp, i, 1, 0) : 0;
    if constexpr (kShared) {
        if (together && first % bytes == 0) {
            const SharedRange range =
                generic_shared(warp, 0, uint32_t(first), bytes * kLanes, bytes, access, {0, bytes});
            for (int lane = 0; lane < kLanes; ++lane) f(lane, range.bytes + uint32_t(lane) * bytes);
            return;
        }
        each_lane(warp.lanes, [&](int lane) {
            const auto address = uint32_t(lane_address(warp, i, 1, lane));
            f(lane, generic_shared(warp, lane, address, bytes, bytes, access, {uint8_t(lane), bytes}).bytes);
        });
    } else {
        if (together && first % bytes == 0 && GlobalMemory::get().find(first, bytes * kLanes) != nullptr) {
            check_global(0, first, bytes * kLanes, access);
            auto* start = reinterpret_cast<uint8_t*>(first);
            for (int lane = 0; lane < kLanes; ++lane) f(lane, start + uint32_t(lane) * bytes);
            return;
        }
        each_lane(warp.lanes, [&](int lane) {
            const uint64_t address = lane_address(warp, i, 1, lane);
            if (address % bytes != 0) {
                fail_lane(lane, "misaligned: global address %#llx, %u bytes", static_cast<unsigned long long>(address),
                          bytes);
            }
            check_global(lane, address, bytes, access);
            f(lane, reinterpret_cast<uint8_t*>(address));
        });
    }
}

// A value goes to a register that may be wider than its type, extended by its sign or by zeros.
template <class T>
void set_register(Warp& warp, uint32_t slot, uint32_t width, int lane, T value) {
    if constexpr (std::is_floating_point_v<T>) {
        warp.values<T>(slot)[lane] = value;
    } else {
        const int64_t wide = int64_t(value);
        if (width == 2)
            warp.values<uint16_t>(slot)[lane] = uint16_t(wide);
        else if (width == 4)
            warp.values<uint32_t>(slot)[lane] = uint32_t(wide);
        else
            warp.values<uint64_t>(slot)[lane] = uint64_t(wide);
    }
}

template <class T, int kCount, bool kShared>
Step load(Warp& warp, const Instruction& i) {
    T values[kLanes][kCount];
    each_access<kShared>(warp, i, sizeof(T) * kCount, Access::read,
                         [&](int lane, const uint8_t* memory) { memcpy(values[lane], memory, sizeof values[lane]); });
    each_lane(warp.lanes, [&](int lane) {
        for (int k = 0; k < kCount; ++k) set_register<T>(warp, i.list[k], i.list_widths[k], lane, values[lane][k]);
    });
    // Whoever waits for another block asks again and again by such loads.
    return i.flags != 0 ? Step::yielded : Step::next;
}

// What a lane stores.
template <class T, int kCount>
std::array<T, kCount> stored_values(const Warp& warp, const Instruction& i, int lane) {
    std::array<T, kCount> values;
    // The low bytes of a register come first.
    for (size_t k = 0; k < kCount; ++k) {
        memcpy(&values[k], warp.registers + i.list[k] + uint32_t(lane) * i.list_widths[k], sizeof(T));
    }
    return values;
}

// Two lanes of one store to global memory that write different values to one place: PTX leaves open which one stays.
// Orders does this for shared memory.
template <class T, int kCount>
void check_lanes_differ(Warp& warp, const Instruction& i) {
    std::array<std::pair<uint64_t, int>, kLanes> places;
    size_t count = 0;
    bool ascending = true;
    each_lane(warp.lanes, [&](int lane) {
        places[count] = {lane_address(warp, i, 1, lane), lane};
        ascending &= count == 0 || places[count].first > places[count - 1].first;
        ++count;
    });
    if (ascending) return;
    std::sort(places.begin(), places.begin() + std::ptrdiff_t(count));
    for (size_t k = 1; k < count; ++k) {
        const auto [address, lane] = places[k];
        const auto [before, other] = places[k - 1];
        if (address != before) continue;
        const auto values = stored_values<T, kCount>(warp, i, lane), others = stored_values<T, kCount>(warp, i, other);
        if (memcmp(values.data(), others.data(), sizeof values) != 0) {
            fail_lane(lane, "race between lanes: lane %d stores another value to the same place, %s", other,
                      GlobalMemory::get().describe(address).c_str());
        }
    }
}

template <class T, int kCount, bool kShared>
Step store(Warp& warp, const Instruction& i) {
    if constexpr (!kShared) check_lanes_differ<T, kCount>(warp, i);
    each_access<kShared>(warp, i, sizeof(T) * kCount, Access::write, [&](int lane, uint8_t* memory) {
        const std::array<T, kCount> values = stored_values<T, kCount>(warp, i, lane);
        memcpy(memory, values.data(), sizeof values);
    });
    warp.block->cluster->progress++;
    return Step::next;
}

template <class T, bool kShared, bool kLoads>
Execute by_count(size_t count) {
    if constexpr (kLoads) {
        return count == 1   ? &load<T, 1, kShared>
               : count == 2 ? &load<T, 2, kShared>
               : count == 4 ? &load<T, 4, kShared>
                            : nullptr;
    } else {
        return count == 1   ? &store<T, 1, kShared>
               : count == 2 ? &store<T, 2, kShared>
               : count == 4 ? &store<T, 4, kShared>
                            : nullptr;
    }
}

template <bool kShared, bool kLoads>
Execute by_type(const std::string& type, size_t count) {
    if (type == "u8" || type == "b8") return by_count<uint8_t, kShared, kLoads>(count);
    if (type == "s8") return by_count<int8_t, kShared, kLoads>(count);
    if (type == "u16" || type == "b16") return by_count<uint16_t, kShared, kLoads>(count);
    if (type == "s16") return by_count<int16_t, kShared, kLoads>(count);
    if (type == "u32" || type == "b32") return by_count<uint32_t, kShared, kLoads>(count);
    if (type == "s32") return by_count<int32_t, kShared, kLoads>(count);
    if (type == "u64" || type == "b64") return by_count<uint64_t, kShared, kLoads>(count);
    if (type == "s64") return by_count<int64_t, kShared, kLoads>(count);
    if (type == "f32") return by_count<float, kShared, kLoads>(count);
    if (type == "f64") return by_count<double, kShared, kLoads>(count);
    return nullptr;
}

Space space_of(const InstructionText& text) {
    for (const std::string& part : text.parts) {
        if (part.rfind("shared", 0) == 0) return Space::shared;
        if (part == "param") return Space::parameter;
        if (part == "global" || part == "const") return Space::global;
    }
    throw Unknown("an access through a generic address");
}

void decode_address(Operands& operands, const std::string& text, Space space, Instruction& out) {
    const uint32_t width = operands.address_width(text);
    out.widths[1] = uint8_t(width != 0 ? width : space == Space::shared ? 4 : 8);
    out.operands[1] = operands.address(text, out.widths[1], out.offset);
}

template <bool kLoads>
void decode_access(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    const Space space = space_of(text);
    const std::string& list = text.operands[kLoads ? 0 : 1];
    decode_address(operands, text.operands[kLoads ? 1 : 0], space, out);
    const std::string& type = text.parts.back();
    const uint32_t bytes = type_bytes(type);
    const size_t count = has(text, "v4") ? 4 : has(text, "v2") ? 2 : 1;
    const std::string inside = list[0] == '{' ? list.substr(1, list.size() - 2) : list;
    for (const std::string& name : split_outside_brackets(inside, ',')) {
        const uint32_t width = operands.width(name);
        const uint32_t used = width == 0 ? std::max(bytes, 2u) : width;
        out.list.push_back(operands.value(name, used));
        out.list_widths.push_back(uint8_t(used));
    }
    if (out.list.size() != count) throw Unknown("the vector has another length");
    out.flags = has(text, "acquire") || has(text, "volatile");
    out.execute = space == Space::shared ? by_type<true, kLoads>(type, count) : by_type<false, kLoads>(type, count);
}

// ---- atom and red. A launch runs on one thread, so each operation is whole.

struct Plus {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>)
            return T(uint64_t(a) + uint64_t(b));
        else
            return a + b;
    }
};
struct Least {
    template <class T>
    T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};
struct Most {
    template <class T>
    T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};
struct BitOr {
    template <class T>
    T operator()(T a, T b) const {
        return T(a | b);
    }
};
struct BitAnd {
    template <class T>
    T operator()(T a, T b) const {
        return T(a & b);
    }
};
struct Exchange {
    template <class T>
    T operator()(T, T b) const {
        return b;
    }
};

// operands: d, address, b, c. `constant` is 1 where there is a destination.
template <class T, class F, bool kShared>
Step atomic(Warp& warp, const Instruction& i) {
    each_access<kShared>(warp, i, sizeof(T), Access::update, [&](int lane, uint8_t* memory) {
        T old;
        memcpy(&old, memory, sizeof old);
        const T updated = F{}(old, warp.values<T>(i.operands[2])[lane]);
        memcpy(memory, &updated, sizeof updated);
        if (i.constant) warp.values<T>(i.operands[0])[lane] = old;
    });
    warp.block->cluster->progress++;
    return Step::next;
}
template <class T, bool kShared>
Step compare_and_swap(Warp& warp, const Instruction& i) {
    each_access<kShared>(warp, i, sizeof(T), Access::update, [&](int lane, uint8_t* memory) {
        T old;
        memcpy(&old, memory, sizeof old);
        if (old == warp.values<T>(i.operands[2])[lane]) memcpy(memory, &warp.values<T>(i.operands[3])[lane], sizeof(T));
        if (i.constant) warp.values<T>(i.operands[0])[lane] = old;
    });
    warp.block->cluster->progress++;
    return Step::next;
}

template <class T, bool kShared>
Execute atomic_of(const InstructionText& text) {
    if (has(text, "add")) return &atomic<T, Plus, kShared>;
    if (has(text, "min")) return &atomic<T, Least, kShared>;
    if (has(text, "max")) return &atomic<T, Most, kShared>;
    if (has(text, "exch")) return &atomic<T, Exchange, kShared>;
    if constexpr (std::is_integral_v<T>) {
        if (has(text, "or")) return &atomic<T, BitOr, kShared>;
        if (has(text, "and")) return &atomic<T, BitAnd, kShared>;
        if (has(text, "cas")) return &compare_and_swap<T, kShared>;
    }
    return nullptr;
}

template <bool kShared>
Execute atomic_by_type(const InstructionText& text) {
    const std::string& type = text.parts.back();
    if (type == "u32" || type == "b32") return atomic_of<uint32_t, kShared>(text);
    if (type == "s32") return atomic_of<int32_t, kShared>(text);
    if (type == "u64" || type == "b64") return atomic_of<uint64_t, kShared>(text);
    if (type == "s64") return atomic_of<int64_t, kShared>(text);
    if (type == "f32") return atomic_of<float, kShared>(text);
    if (type == "f64") return atomic_of<double, kShared>(text);
    return nullptr;
}

void decode_atomic(Operands& operands, const InstructionText& text, Instruction& out) {
    const bool returns = text.parts[0] == "atom";
    const size_t first = returns ? 1 : 0;
    expect_operands(text, first + (has(text, "cas") ? 3 : 2));
    const uint32_t bytes = type_bytes(text.parts.back());
    out.constant = returns;
    if (returns) out.operands[0] = operands.value(text.operands[0], bytes);
    const Space space = space_of(text);
    decode_address(operands, text.operands[first], space, out);
    for (size_t k = first + 1; k < text.operands.size(); ++k) {
        out.operands[k - first + 1] = operands.value(text.operands[k], bytes);
    }
    out.execute = space == Space::shared ? atomic_by_type<true>(text) : atomic_by_type<false>(text);
}

}  // namespace

void add_memory(OpcodeTable& table) {
    table["ld"] = table["ldu"] = &decode_access<true>;
    table["st"] = &decode_access<false>;
    table["atom"] = table["red"] = &decode_atomic;
}

}  // namespace ptx
