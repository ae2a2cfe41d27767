// The state of a running block, and of the cluster it is in: threads, warps, barriers and asynchronous units. Internal
// to the emulated device.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "context.h"
#include "emulator_api.h"
#include "interface.h"
#include "race.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

constexpr bool kChecked = MMPO_CHECKED != 0;
// Shared-window address of the first byte of dynamic shared memory: sm_90 keeps the first KiB for itself.
constexpr uint32_t kSharedBase = 1024;
constexpr size_t kSharedLimit = 232448;
constexpr size_t kSharedGuard = 1024;  // on either side, so that a near miss is told from a wild pointer
constexpr uint8_t kFreshByte = 0xff;   // fills memory that nothing has written: NaN in f32 and bf16
constexpr uint32_t kMaxThreads = 1024;
// What every GPU with clusters takes; more must be asked for.
constexpr uint32_t kMostClusterBlocks = 8;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kWarpgroup = 128;

using Counters = mmpo_emulator_counters;
using Options = mmpo_emulator_options;
extern Options options;

enum class Collective : uint8_t { sync, shuffle, vote, elect, reduce, ldmatrix, stmatrix, mma, setmaxnreg };
enum class WaitFor : uint8_t { nothing, warp, barrier, mbarrier, wgmma, turn, cluster };

struct Wait {
    WaitFor what = WaitFor::nothing;
    // The collective, the barrier, the mbarrier's address, the wgmma to be completed, or the turn.
    uint32_t id = 0;
    uint32_t detail = 0;  // the mask or the parity
    Site site{};
    const uint32_t* counter = nullptr;  // of the turn
};

// Operations committed in groups and waited for by the number of groups that may remain.
template <class Operation>
struct GroupQueue {
    std::vector<Operation> operations;
    std::vector<size_t> group_ends;
    size_t finished = 0;

    void commit() { group_ends.push_back(operations.size()); }
    // Operations [finished, due) must complete when `groups_left` groups may remain.
    size_t due(int groups_left) const {
        return group_ends.size() <= size_t(groups_left) ? finished
                                                        : group_ends[group_ends.size() - 1 - size_t(groups_left)];
    }
    bool drained() const { return finished == operations.size(); }
    void clear() {
        operations.clear();
        group_ends.clear();
        finished = 0;
    }
};

struct CopyAsync {
    uint32_t destination;
    const void* source;
    int bytes, source_bytes;
    bool landed;
    Site site;
};

// The decoded form of a CUtensorMap, stored in its opaque bytes.
struct TensorMap {
    uint32_t magic;
    uint8_t rank, element_bytes, swizzle, type;
    uint64_t base;
    uint64_t sizes[3];
    uint64_t strides[2];
    uint32_t box[3];

    uint32_t box_bytes() const { return element_bytes * box[0] * box[1] * box[2]; }
    uint32_t row_bytes() const { return element_bytes * box[0]; }
};
static_assert(sizeof(TensorMap) <= 128, "must fit the driver's type");

// A store under way from shared memory: a tensor box, or `bulk_bytes` to plain memory.
struct TensorStore {
    TensorMap map;
    void* bulk_destination;
    uint32_t bulk_bytes;
    uint32_t source;
    Coordinates at;
    BulkStore kind;
    bool landed;
    Site site;

    uint32_t bytes() const { return bulk_destination != nullptr ? bulk_bytes : map.box_bytes(); }
};

struct Thread;
struct Block;

// A load under way to shared memory: a tensor box, or `bulk_bytes` of plain memory.
struct BulkLoad {
    TensorMap map;
    const void* bulk_source;
    uint32_t bulk_bytes;
    uint32_t destination, mbarrier;
    Coordinates at;
    Thread* issuer;
    uint32_t unit, tick;  // the asynchronous unit's identity and time in the race checker
    bool repeated;        // another block of the cluster gets the same box: it is read from global memory once
    Site site;

    uint32_t bytes() const { return bulk_source != nullptr ? bulk_bytes : map.box_bytes(); }
};

// Registers that a wgmma under way reads or writes: `sequence` is the operation that must be waited for.
struct WatchedRegisters {
    uintptr_t begin, end;
    uint64_t sequence;
    bool accumulator;
};

struct WgmmaState {
    uint64_t issued = 0, waited = 0;
    std::vector<uint64_t> groups;
    bool fenced = false;
    std::vector<WatchedRegisters> watched;
};

struct Thread : ThreadView {
    Block* block = nullptr;
    uint32_t unit = 0;  // identity in the race checker
    Context context;
    Wait wait;
    GroupQueue<CopyAsync> copies;
    GroupQueue<TensorStore> stores;
    bool turn_unfenced = false;  // a turn has come, and no fence.proxy.async.global since
    WgmmaState wgmma;
    ClockPair clock;
    std::unordered_map<uint64_t, uint32_t> visits;  // how often each source line was passed, for the access trace
};

struct CollectiveSlot {
    void* arguments;
    uint32_t mask;
    Collective kind;
    Site site;
};

struct Warp {
    uint32_t runnable = 0, alive = 0, arrived = 0;
    CollectiveSlot slots[32];
    Thread* threads[32];
};

struct NamedBarrier {
    uint32_t arrived = 0;
    uint32_t expected = 0;  // kEveryone: all live threads
    std::vector<Thread*> waiters;
    ClockPair clock;
    static constexpr uint32_t kEveryone = ~0u;
};

struct WgmmaOperation {
    WgmmaOperands operands;
    Site site;
    uint32_t threads_in = 0;
    float* d[kWarpgroup];
    const uint32_t* a[kWarpgroup];
};

struct Warpgroup {
    std::deque<WgmmaOperation> queue;  // operations [first, first + queue.size())
    uint64_t first = 0, done = 0;
    std::vector<Thread*> waiters;
    uint32_t registers = 0;  // a thread, by setmaxnreg; 0 before one
};

struct MbarrierClock {
    ClockPair arriving, completed;
    uint32_t unit = 0, tick = 0;
};

// One warp-wide access, gathered lane by lane for the counts of sectors and wavefronts.
struct WarpAccess {
    uint32_t lanes = 0;
    uint8_t bytes = 0;
    bool write = false, shared = false;
    uint64_t address[32];
};
using WarpTrace = std::map<std::pair<uint64_t, uint32_t>, WarpAccess>;

struct StaticShared {
    const void* key;
    uint32_t offset;
};

struct Cluster;

struct Block : BlockView {
    const char* kernel = "";
    Entry entry = nullptr;
    const void* arguments = nullptr;
    size_t argument_bytes = 0;

    Cluster* cluster = nullptr;

    StackSlab stacks;
    std::vector<Thread> pool;
    uint32_t thread_count = 0, warp_count = 0, live = 0;
    std::vector<Warp> warps;
    uint32_t runnable_warps = 0, current_warp = 0;
    uint64_t random_state = 1;
    uint32_t number = 0;  // of the block in its grid
    bool uses_global_atomics = false;

    unsigned char* shared_memory = nullptr;  // with guards
    unsigned char* shared = nullptr;         // kSharedLimit bytes
    uint32_t dynamic_bytes = 0, shared_end = 0;
    std::vector<StaticShared> static_arrays;

    NamedBarrier barriers[16];
    std::vector<Thread*> mbarrier_waiters;
    std::vector<Thread*> turn_waiters;
    std::vector<BulkLoad> loads;
    std::vector<Warpgroup> warpgroups;
    std::vector<float> wgmma_scratch;

    SharedShadow shadow;
    std::map<uint32_t, MbarrierClock> mbarrier_clocks;
    std::vector<WarpTrace> traces;
    Counters counters{};

    Block();
    ~Block();
    uint64_t random();
    // Numbers of units in the race checker. Each block of the cluster has a range of them: its threads, then its
    // bulk-load units, then its warpgroups.
    uint32_t thread_unit(uint32_t linear) const { return cluster_rank * units() + linear; }
    uint32_t load_unit(uint32_t index) const { return thread_unit(thread_count) + index; }
    uint32_t warpgroup_unit(uint32_t index) const { return load_unit(kLoadUnits) + index; }
    uint32_t units() const { return thread_count + kLoadUnits + (thread_count + kWarpgroup - 1) / kWarpgroup; }
    static constexpr uint32_t kLoadUnits = 32;
};

// Blocks that run together, inside one host thread, and reach into each other's shared memory. Most have one.
struct Cluster {
    std::vector<Block*> blocks;  // by rank
    Context host;
    bool failed = false;
    // barrier.cluster
    uint32_t arrived = 0;
    std::vector<Thread*> waiters;
    ClockPair clock;  // what came before a fence_mbarrier_init

    uint32_t live() const;
    uint32_t units() const;  // identities in the race checker
};

extern __thread Block* running;  // the block this host thread is inside of
inline Thread& self() { return *static_cast<Thread*>(current_thread); }
// As long as this object lives, the calling thread acts on another block of its cluster.
class Inside {
public:
    explicit Inside(Block& block) : outer_(running) { running = &block; }
    ~Inside() { running = outer_; }
    Inside(const Inside&) = delete;

private:
    Block* outer_;
};
inline Thread& thread_at(uint32_t linear) { return running->pool[linear]; }

// Scheduler.
void wait_for(WaitFor what, uint32_t id, uint32_t detail, Site, const uint32_t* counter = nullptr);
void make_runnable(Thread&);
void leave_block();

// Sleeps until a turn has come that a thread of this cluster waits for; false if none waits, or none can come any more.
bool await_turns();
// Where the counter of a thread that waits for a turn stands.
uint32_t turn_counter(const uint32_t* counter);

// Shared memory: the storage that a window address stands for, after checking bounds and alignment.
unsigned char* shared_storage(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Site);

// Asynchronous units, driven by the scheduler.
void mbarrier_complete_bytes(const BulkLoad&);
// Fails if all threads of another block have exited: its shared memory is gone.
void require_present(const Block&, const char* what, Site);
void land_one_load();
void check_barrier_after_exit();
void check_cluster_after_exit();
void check_thread_exit(Thread&);
bool early(Block&);  // whether an asynchronous operation issued now takes effect at once

// Names the registers of a wgmma under way that this access would disturb, or read too soon; null if there are none.
// For the checked variant.
const char* watched_accumulator(const Thread&, uintptr_t address, size_t bytes, bool write);

// Reports.
const char* file_name(Site);
[[noreturn]] void fail(Site, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_for(const Thread&, Site, const char* format, ...) __attribute__((format(printf, 3, 4)));
// For what no single thread did.
[[noreturn]] void fail_block(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void report_deadlock();
const char* collective_name(Collective);
std::string mbarrier_state(uint32_t address);

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
