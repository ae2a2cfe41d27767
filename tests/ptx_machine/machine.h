// The machine that executes PTX: what all of its parts share.
//
// A warp executes one instruction for all of its lanes at once. A register is therefore an array of 32 values, and an
// instruction a small function that loops over the lanes that are active. Lanes that part at a branch become splits of
// the warp, which join again where they meet.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "order.h"
#include "spaces.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr int kWarpgroupWarps = 4;
// One bit per lane.
using Mask = uint32_t;
constexpr Mask kAllLanes = 0xffffffffu;

struct Warp;
struct Block;
struct Cluster;
struct Launch;
struct Instruction;

// What an instruction leaves its warp to do.
enum class Step : uint8_t {
    next,       // go on with the next instruction
    jumped,     // the program counters are set
    gathering,  // wait until more lanes of the warp stand at this instruction
    blocked,    // the warp waits; whoever ends the wait moves it on
    again,      // execute this instruction again in the warp's next turn
    yielded,    // go on with the next instruction, in the next turn if other lanes have work
    exited,     // the active lanes are done
};
using Execute = Step (*)(Warp&, const Instruction&);

// An instruction as it is executed: the function, and where its operands lie in a warp's register file.
struct Instruction {
    Execute execute = nullptr;
    // Index of the predicate that guards it, or -1.
    int32_t guard = -1;
    bool guard_negated = false;
    bool is_branch = false;
    // Byte offsets of registers, or indices of predicates; what each means is the function's to know.
    std::array<uint32_t, 6> operands{};
    // Bytes of a lane's value in the registers of `operands`, where an instruction allows several.
    std::array<uint8_t, 6> widths{};
    // Added to the address operand.
    int64_t offset = 0;
    // Constants of the instruction: a branch's target, a width, flags.
    int64_t constant = 0;
    int64_t flags = 0;
    // Registers of operands in braces.
    std::vector<uint32_t> list, list2;
    std::vector<uint8_t> list_widths;
    // Virtual registers that it names, by number, for the check of registers that a wgmma still uses.
    std::vector<uint32_t> named;
    uint32_t line = 0;
    std::string text;
    // `file:line` of the .cu source, where nvcc said so.
    std::string source;
};

struct Parameter {
    std::string name;
    uint32_t bytes = 0;
    uint32_t offset = 0;
};

// A value that every thread of a launch finds in a register slot: a constant, or a special register.
struct Preset {
    enum class Kind : uint8_t {
        constant,
        tid_x,
        tid_y,
        tid_z,
        ctaid_x,
        ctaid_y,
        ctaid_z,
        ntid_x,
        ntid_y,
        ntid_z,
        nctaid_x,
        nctaid_y,
        nctaid_z,
        cluster_rank,
        lane,
        parameter,
        dynamic_shared
    };
    uint32_t slot = 0;
    uint8_t bytes = 4;
    Kind kind = Kind::constant;
    uint64_t value = 0;
};

// A kernel, ready to run.
struct Entry {
    std::string name;
    std::string file;
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes = 0;
    std::vector<Instruction> code;
    std::vector<Preset> presets;
    uint32_t register_bytes = 0;
    uint32_t predicates = 0;
    // Virtual registers, as Instruction::named numbers them.
    uint32_t virtual_registers = 0;
    // Bytes of statically declared shared memory, from kSharedStart on, and the alignment of the dynamic part.
    uint32_t static_shared = 0;
    uint32_t most_threads = 1024;
};

// A finding: ends the launch. `text` says what is wrong; where is added by the scheduler.
struct Fault {
    std::string text;
    int lane = -1;
};

#if defined(__GNUC__)
[[gnu::format(printf, 1, 2)]]
#endif
[[noreturn]] void
fail(const char* format, ...);
#if defined(__GNUC__)
[[gnu::format(printf, 2, 3)]]
#endif
[[noreturn]] void
fail_lane(int lane, const char* format, ...);

// Lanes of a warp that stand at one instruction.
struct Split {
    Mask lanes = 0;
    uint32_t pc = 0;
    // Waits for other lanes of the warp to come to the same instruction.
    bool gathering = false;
    // Had its turn, in which it found nothing to do but wait.
    bool yielded = false;
};

// A cp.async on its way.
struct CopyRequest {
    uint32_t destination;
    uint32_t size;   // bytes written
    uint32_t valid;  // of those, bytes read from `source`; the rest are zeros
    uint64_t source;
};

// A store of the async proxy on its way: first its source in shared memory is read, later global memory is written.
struct BulkStore {
    std::function<void()> read, write;
    bool was_read = false;
};

// What one lane asked for since its last commit, and its committed groups, oldest first.
template <class Request>
struct LaneGroups {
    std::vector<Request> open;
    std::vector<std::vector<Request>> groups;
};

// A wgmma under way: one warp's 16 rows of it.
struct PendingProduct {
    const Instruction* instruction = nullptr;
    uint64_t a_descriptor = 0, b_descriptor = 0;
    bool accumulate = false;
    // Computed already, by a warp of the warpgroup that waited for it earlier.
    bool done = false;
};

struct Warp {
    Block* block = nullptr;
    uint32_t index = 0;
    uint32_t actor = 0;
    uint8_t* registers = nullptr;
    std::vector<Mask> predicates;
    // Lanes that exist, and those of them that have not exited.
    Mask exists = 0, live = 0;
    // The split that runs, and the lanes that its present instruction executes for.
    Mask active = 0;
    Mask lanes = 0;
    uint32_t pc = 0;
    std::vector<Split> others;
    uint32_t stop = UINT32_MAX;

    enum class State : uint8_t { running, at_barrier, exited } state = State::running;
    uint32_t barrier = 0;
    uint64_t cluster_phase = 0;
    bool cluster_arrived = false;
    uint64_t steps = 0;

    std::array<LaneGroups<CopyRequest>, kLanes> copies;
    std::array<LaneGroups<BulkStore>, kLanes> bulk;

    // wgmma: whether a fence stands between now and the last change of registers, products since the last commit,
    // groups.
    bool wgmma_fenced = false;
    std::vector<PendingProduct> products;
    std::vector<std::vector<PendingProduct>> product_groups;
    // How many groups this warp has waited for; `product_groups` are those that follow. For each group ever committed,
    // the time by which its operands have been read, or 0.
    size_t groups_waited = 0;
    std::vector<Time> group_read_times;
    // Products since the last commit and in groups, together, and how many of them use each virtual register.
    uint32_t products_pending = 0;
    std::vector<uint16_t> in_flight;
    // A hash over all wgmma instructions so far, to compare the warps of a warpgroup.
    uint64_t product_history = 0;

    template <class T>
    T* values(uint32_t slot) {
        return reinterpret_cast<T*>(registers + slot);
    }
    bool full() const { return lanes == kAllLanes; }
    const Instruction& instruction() const;
};

// bar.sync and bar.arrive: PTX ISA 9.0, "Parallel Synchronization: bar{.cta}".
struct NamedBarrier {
    uint32_t arrived = 0;
    uint32_t expected = 0;
    bool all_threads = false;
    Clock clock;
};

// An mbarrier object. PTX ISA 9.0, "mbarrier: Contents": what its 8 bytes hold is opaque, so it is kept here.
struct Mbarrier {
    uint32_t phase = 0;  // parity of the phase under way
    uint32_t expected = 0, pending = 0;
    int64_t transactions = 0;
    // What arrivals of the phase under way release, and what completed phases have released.
    Clock arrivals, completed;
};

// Copies on their way to a block's shared memory that complete on an mbarrier.
struct PendingCopy {
    uint32_t rank;
    uint32_t mbarrier;
    std::function<void()> land;
};

struct Block {
    Cluster* cluster = nullptr;
    uint32_t rank = 0;
    uint32_t x = 0, y = 0, z = 0;
    uint32_t threads = 0;
    std::vector<Warp> warps;
    uint8_t* registers = nullptr;
    SharedMemory shared;
    std::array<NamedBarrier, 16> barriers;
    std::map<uint32_t, Mbarrier> mbarriers;

    uint32_t live_threads() const;
};

struct Cluster {
    Launch* launch = nullptr;
    std::vector<std::unique_ptr<Block>> blocks;
    // barrier.cluster.
    uint32_t arrived = 0;
    uint64_t phase = 0;
    Clock barrier_clock, barrier_clock_done;
    std::vector<PendingCopy> pending;
    Orders orders;
    // Grows with whatever another warp could be waiting for.
    uint64_t progress = 0;

    uint32_t live_threads() const;
};

// When asynchronous operations take effect.
enum class Landing : uint8_t { late, early, random };
// How matrix instructions round.
enum class Rounding : uint8_t { f32, ampere, hopper };

struct Options {
    Landing landing = Landing::late;
    // 0: warps in order. Otherwise their order and the length of their turns, and what lands when, follow from it.
    uint64_t seed = 0;
    // Rounding of tensor cores as measured, instead of f32.
    bool measured_rounding = false;
    // Whether a buffer's creation, which zeroes it, counts as a write.
    bool creation_zeros = true;
};

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
    const Entry* entry = nullptr;
    Dim3 grid, block;
    uint32_t dynamic_shared = 0;
    uint32_t cluster_size = 1;
    uint8_t* parameters = nullptr;
    Options options;
    Rounding rounding = Rounding::f32;
    uint64_t random_state = 0;
    // The warp that executes, for messages.
    Warp* running = nullptr;

    uint32_t random();
    // Whether what is asked for now lands only when it must.
    bool lands_late();
};

inline Launch& launch_of(Warp& warp) { return *warp.block->cluster->launch; }
inline const Instruction& Warp::instruction() const { return block->cluster->launch->entry->code[pc]; }

// Calls `f(lane)` for every lane of the mask.
template <class F>
inline void each_lane(Mask mask, F f) {
    for (; mask != 0; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Runs the whole grid; throws a Fault with all of its text.
void run(Launch& launch);

// What lanes that exit leave under way: bulk stores complete, anything else is a fault.
void finish_copies(Warp& warp, Mask lanes);
void finish_products(Warp& warp);
// bar.sync of all threads counts those that are left.
void warp_exits_barriers(Warp& warp);
void complete_cluster_barrier(Cluster& cluster);

}  // namespace ptx
