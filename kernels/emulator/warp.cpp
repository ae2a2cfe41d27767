// Warp collectives: the last lane to arrive does the work for all. Also ldmatrix, stmatrix and mma.sync.
#include <algorithm>

#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

// Calls `work(warp)` once, when every lane of `mask` has arrived with the same collective. `aligned` instructions must
// be the same one in the program, too.
template <class Work>
inline void collective(Collective kind, uint32_t mask, void* arguments, bool aligned, Site site, Work work) {
    Thread& thread = self();
    Warp& warp = running->warps[thread.warp];
    const uint32_t bit = 1u << thread.lane;
    const char* name = collective_name(kind);
    if ((mask & bit) == 0) fail(site, "%s: the calling lane is not in its own mask %08x", name, mask);
    if ((mask & ~warp.alive) != 0)
        fail(site, "%s: mask %08x names lanes that have exited (alive: %08x)", name, mask, warp.alive);
    warp.slots[thread.lane] = {arguments, mask, kind, site};
    warp.arrived |= bit;
    if ((warp.arrived & mask) != mask) return wait_for(WaitFor::warp, uint32_t(kind), mask, site);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const CollectiveSlot& slot = warp.slots[lane];
        const bool elsewhere = aligned && (slot.site.line != site.line || slot.site.file != site.file);
        if (slot.kind != kind || slot.mask != mask || elsewhere)
            fail(site, "divergent collective: %s with mask %08x here, while lane %d is at %s with mask %08x at %s:%d",
                 name, mask, lane, collective_name(slot.kind), slot.mask, file_name(slot.site), slot.site.line);
    }
    ++running->counters.collectives;
    work(warp);
    warp.arrived &= ~mask;
    warp.runnable |= mask;
    for (uint32_t lanes = mask & ~bit; lanes != 0; lanes &= lanes - 1)
        warp.threads[__builtin_ctz(lanes)]->wait.what = WaitFor::nothing;
}

template <class Visit>
inline void each_lane(uint32_t mask, Visit visit) {
    for (; mask != 0; mask &= mask - 1) visit(__builtin_ctz(mask));
}

}  // namespace

const char* collective_name(Collective kind) {
    switch (kind) {
        case Collective::sync:
            return "__syncwarp";
        case Collective::shuffle:
            return "shfl.sync";
        case Collective::vote:
            return "vote.sync";
        case Collective::elect:
            return "elect.sync";
        case Collective::reduce:
            return "redux.sync";
        case Collective::ldmatrix:
            return "ldmatrix";
        case Collective::stmatrix:
            return "stmatrix";
        case Collective::mma:
            return "mma.sync";
        default:
            return "setmaxnreg";
    }
}

void warp_sync(uint32_t mask, Site site) {
    collective(Collective::sync, mask, nullptr, false, site, [&](Warp& warp) {
        if (kChecked) race_join_warp(warp.threads, mask);
    });
}

namespace {
struct ShuffleLane {
    uint64_t value, result;
    Shuffle kind;
    int argument, width;

    // The lane that `lane` reads: its own where the source lies outside the segment.
    int source(int lane) const {
        const int first = lane & ~(width - 1);
        switch (kind) {
            case Shuffle::index:
                return first + (argument & (width - 1));
            case Shuffle::up:
                return lane - argument < first ? lane : lane - argument;
            case Shuffle::down:
                return lane + argument >= first + width ? lane : lane + argument;
            default:
                return (lane ^ argument) >= first + width ? lane : lane ^ argument;
        }
    }
};
}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int argument, int width, Site site) {
    ShuffleLane mine{value, 0, kind, argument, width};
    collective(Collective::shuffle, mask, &mine, false, site, [&](Warp& warp) {
        each_lane(mask, [&](int lane) {
            ShuffleLane& reader = *static_cast<ShuffleLane*>(warp.slots[lane].arguments);
            const int source = reader.source(lane);
            if ((mask >> source & 1u) == 0)
                fail(site, "shfl.sync: lane %d reads lane %d, which is not in mask %08x", lane, source, mask);
            reader.result = static_cast<ShuffleLane*>(warp.slots[source].arguments)->value;
        });
    });
    return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
    struct Lane {
        bool predicate;
        uint32_t result;
    } mine{predicate, 0};
    collective(Collective::vote, mask, &mine, false, site, [&](Warp& warp) {
        uint32_t votes = 0;
        each_lane(mask, [&](int lane) {
            votes |= uint32_t(static_cast<Lane*>(warp.slots[lane].arguments)->predicate) << lane;
        });
        each_lane(mask, [&](int lane) { static_cast<Lane*>(warp.slots[lane].arguments)->result = votes; });
    });
    return mine.result;
}

bool elect(uint32_t mask, Site site) {
    collective(Collective::elect, mask, nullptr, true, site, [](Warp&) {});
    return self().lane == uint32_t(__builtin_ctz(mask));
}

namespace {
uint32_t combine(uint32_t a, uint32_t b, Reduce operation, bool is_signed) {
    const bool less = is_signed ? int32_t(a) < int32_t(b) : a < b;
    switch (operation) {
        case Reduce::add:
            return a + b;
        case Reduce::min:
            return less ? a : b;
        case Reduce::max:
            return less ? b : a;
        case Reduce::bit_and:
            return a & b;
        case Reduce::bit_or:
            return a | b;
        default:
            return a ^ b;
    }
}
}  // namespace

uint32_t reduce_u32(uint32_t mask, uint32_t value, Reduce operation, bool is_signed, Site site) {
    uint32_t mine = value;
    collective(Collective::reduce, mask, &mine, false, site, [&](Warp& warp) {
        const int first = __builtin_ctz(mask);
        uint32_t sum = *static_cast<uint32_t*>(warp.slots[first].arguments);
        each_lane(mask & (mask - 1), [&](int lane) {
            sum = combine(sum, *static_cast<uint32_t*>(warp.slots[lane].arguments), operation, is_signed);
        });
        each_lane(mask, [&](int lane) { *static_cast<uint32_t*>(warp.slots[lane].arguments) = sum; });
    });
    return mine;
}

namespace {

// Registers move within what the block was launched with: at most as many a thread as a multiprocessor has for one
// block of its size, in steps of 8. A warpgroup that wants more waits for ever.
void check_register_pool(Site site) {
    constexpr uint32_t kRegisters = 65536, kMost = 255;
    const uint32_t each = std::min(kMost, kRegisters / running->thread_count) / 8 * 8;
    uint32_t wanted = 0;
    for (const Warpgroup& group : running->warpgroups) {
        if (group.registers == 0) return;
        wanted += group.registers * kWarpgroup;
    }
    if (wanted > each * running->thread_count)
        fail(site, "setmaxnreg: the block's warpgroups want %u registers, of %u that it can be launched with", wanted,
             each * running->thread_count);
}

}  // namespace

void set_max_registers(int count, bool, Site site) {
    if (count < 24 || count > 256 || count % 8 != 0)
        fail(site, "setmaxnreg: %d is not a multiple of 8 between 24 and 256", count);
    collective(Collective::setmaxnreg, kAllLanes, nullptr, true, site, [](Warp&) {});
    running->warpgroups[self().linear / kWarpgroup].registers = uint32_t(count);
    check_register_pool(site);
}

// ---- ldmatrix, stmatrix

namespace {

struct MatrixLane {
    uint32_t* loaded;
    const uint32_t* stored;
    uint32_t address;
    bool transposed;
};

// Passes beyond the first that 8 rows of 16 bytes take: rows in the same 4 of the 32 banks exclude one another.
uint64_t matrix_conflicts(const uint32_t (&rows)[8]) {
    uint64_t most = 1;
    for (int i = 0; i < 8; ++i) {
        uint64_t same_banks = 0;
        for (int j = 0; j < 8; ++j) {
            const bool repeated = std::find(rows, rows + j, rows[j]) != rows + j;
            if (!repeated && (rows[j] ^ rows[i]) / 16 % 8 == 0) ++same_banks;
        }
        most = std::max(most, same_banks);
    }
    return most - 1;
}

// Lane l holds elements (l/4, 2(l%4)) and the one to its right, or the two mirrored at the diagonal.
void move_matrix(Warp& warp, int matrix, bool store) {
    uint32_t rows[8];
    uint16_t* storage[8];
    for (int i = 0; i < 8; ++i) {
        rows[i] = static_cast<MatrixLane*>(warp.slots[8 * matrix + i].arguments)->address;
        storage[i] = reinterpret_cast<uint16_t*>(running->shared + (rows[i] - kSharedBase));
    }
    running->counters.matrix_bank_conflicts += matrix_conflicts(rows);
    ++running->counters.matrix_rows_moved;
    for (int lane = 0; lane < 32; ++lane) {
        const MatrixLane& values = *static_cast<MatrixLane*>(warp.slots[lane].arguments);
        const int row = lane / 4, column = 2 * (lane % 4);
        uint16_t* low = values.transposed ? storage[column] + row : storage[row] + column;
        uint16_t* high = values.transposed ? storage[column + 1] + row : storage[row] + column + 1;
        if (store) {
            *low = uint16_t(values.stored[matrix]);
            *high = uint16_t(values.stored[matrix] >> 16);
        } else {
            values.loaded[matrix] = uint32_t(*low) | uint32_t(*high) << 16;
        }
    }
}

void move_matrices(MatrixLane mine, int count, bool store, Site site) {
    const Collective kind = store ? Collective::stmatrix : Collective::ldmatrix;
    if (self().lane < uint32_t(8 * count)) {
        shared_storage(mine.address, 16, 16, collective_name(kind), site);
        if (kChecked) check_shared(self(), mine.address - kSharedBase, 16, store, site);
    }
    collective(kind, kAllLanes, &mine, true, site, [&](Warp& warp) {
        for (int matrix = 0; matrix < count; ++matrix) move_matrix(warp, matrix, store);
    });
}

}  // namespace

void load_matrices(uint32_t* out, int count, bool transposed, uint32_t address, Site site) {
    move_matrices({out, nullptr, address, transposed}, count, false, site);
}

void store_matrices(uint32_t address, const uint32_t* values, int count, bool transposed, Site site) {
    move_matrices({nullptr, values, address, transposed}, count, true, site);
}

// ---- mma.sync

namespace {

typedef float Float8 __attribute__((vector_size(32)));

float low_half(uint32_t pair) { return from_bits<float>(pair << 16); }
float high_half(uint32_t pair) { return from_bits<float>(pair & 0xffff0000u); }

struct MmaLane {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

struct MmaTile {
    alignas(32) float a[16][16];
    alignas(32) float b[16][8];
    alignas(32) float d[16][8];

    // PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
    void gather(const MmaLane& lane, int row, int column) {
        for (int half = 0; half < 4; ++half) {
            float* to = &a[row + 8 * (half % 2)][column + 8 * (half / 2)];
            to[0] = low_half(lane.a[half]);
            to[1] = high_half(lane.a[half]);
        }
        for (int half = 0; half < 2; ++half) {
            b[column + 8 * half][row] = low_half(lane.b[half]);
            b[column + 8 * half + 1][row] = high_half(lane.b[half]);
        }
        memcpy(&d[row][column], lane.d, 8);
        memcpy(&d[row + 8][column], lane.d + 2, 8);
    }

    void multiply() {
        for (int row = 0; row < 16; row += 4) {
            Float8 sums[4];
            memcpy(sums, d[row], sizeof sums);
            for (int k = 0; k < 16; ++k) {
                Float8 values;
                memcpy(&values, b[k], sizeof values);
                for (int i = 0; i < 4; ++i) sums[i] += a[row + i][k] * values;
            }
            memcpy(d[row], sums, sizeof sums);
        }
    }

    void scatter(const MmaLane& lane, int row, int column) const {
        memcpy(lane.d, &d[row][column], 8);
        memcpy(lane.d + 2, &d[row + 8][column], 8);
    }
};

}  // namespace

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    MmaLane mine{d, a, b};
    collective(Collective::mma, kAllLanes, &mine, true, site, [](Warp& warp) {
        MmaTile tile;
        const auto lane_values = [&](int lane) -> const MmaLane& {
            return *static_cast<MmaLane*>(warp.slots[lane].arguments);
        };
        for (int lane = 0; lane < 32; ++lane) tile.gather(lane_values(lane), lane / 4, 2 * (lane % 4));
        tile.multiply();
        for (int lane = 0; lane < 32; ++lane) tile.scatter(lane_values(lane), lane / 4, 2 * (lane % 4));
        ++running->counters.mma_operations;
        running->counters.mma_flops += 2 * 16 * 8 * 16;
    });
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
