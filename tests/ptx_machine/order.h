// Who has seen what: happens-before between the warps of a cluster, and from it data races in shared memory and missing
// fences between the generic and the async proxy.
//
// The unit is a warp (an actor); every block also has an actor for asynchronous copies, and one for the products of
// each warpgroup, which read their operands. Time is one counter of the cluster. `seen[w][a]` is the time up to which
// everything that actor a did happens before what warp w does next (PTX ISA 9.0, "Memory Consistency Model: Causality
// Order"). Barriers join these clocks. `fenced` is the same for accesses that are also visible to the async proxy,
// because a proxy fence stood on the way (same chapter, "Proxy").
//
// Lanes of one warp are told apart by the lane that wrote or read each byte since the lanes last met: at bar.warp.sync,
// or where the warp acquires something. A meeting of some lanes counts as one of all, shuffles and votes as none (PTX
// ISA 9.0, "bar.warp.sync": it alone orders memory).
//
// What it cannot see: races between lanes after a meeting that not all of them took part in, and races in global
// memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

using Time = uint32_t;

// Who of a warp makes an access: the byte at offset k of it is that of lane `first + k / bytes_each`.
struct Lanes {
    uint8_t first = 0;
    uint32_t bytes_each = 1;
};
// In a lane's place: no lane that another could race with (an atomic), and the warp as a whole (ldmatrix, stmatrix).
constexpr uint8_t kNoLane = 0xff;
constexpr uint8_t kWholeWarp = 0xfe;

// What a synchronisation hands on: a time for each actor, by both proxies, and for initialised mbarriers.
struct Clock {
    std::vector<Time> seen, fenced, barriers;
    void join(const Clock& other);
};

// Who touched the bytes of one 16-byte chunk last.
struct Chunk {
    Time write_time = 0;
    Time read_time[2] = {0, 0};
    uint16_t write_mask = 0;
    uint16_t read_mask[2] = {0, 0};
    uint8_t writer = 0;
    uint8_t reader[2] = {0, 0};
    // Whether the last write was the async proxy's, or an atomic's.
    bool async_write = false, atomic_write = false;
    // A copy is on its way to these bytes.
    bool copying = false;
};
constexpr uint32_t kChunk = 16;

class Orders {
public:
    // `warps` of each of `blocks`; `shared_end` of each block.
    void start(uint32_t blocks, uint32_t warps, uint32_t shared_end);
    uint32_t warp_actor(uint32_t block, uint32_t warp) const { return block * block_actors_ + warp; }
    uint32_t async_actor(uint32_t block) const { return block * block_actors_ + warps_; }
    uint32_t product_actor(uint32_t block, uint32_t warpgroup) const { return async_actor(block) + 1 + warpgroup; }

    // A warp's generic access to its own or another block's shared memory; a fault where it races.
    void generic(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool write, Lanes lanes);
    // The async proxy reads on behalf of a warp: a store by TMA for one of its lanes, an operand of wgmma for kNoLane.
    // The reader is the warp, or the products of its warpgroup.
    void async_read(uint32_t actor, uint32_t reader, uint32_t block, uint32_t address, uint32_t bytes, const char* what,
                    uint8_t lane);
    // The time up to which products have read their operands now.
    Time products_read() { return now_++; }
    // A warp has waited for products that had read their operands by that time.
    void products_seen(uint32_t actor, uint32_t products, Time time);
    // A copy by the async proxy, or cp.async, is asked for: nobody may still use the bytes.
    void copy_begins(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy);
    // It has landed; the actor's `lane` has seen it where it is a cp.async of its own, otherwise who waits for the
    // mbarrier will.
    void copy_lands(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy, uint8_t lane);

    // The warp's generic accesses so far become visible to the async proxy.
    void proxy_fence(uint32_t actor);
    // The warp's initialised mbarriers so far become visible to the async proxy and the cluster.
    void barrier_fence(uint32_t actor);
    void barrier_initialised(uint32_t actor, uint32_t block, uint32_t address);
    // Whether the mbarrier's initialisation is visible to the async proxy from where the actor stands.
    void barrier_used_by_async(uint32_t actor, uint32_t block, uint32_t address);
    // The same for an arrival or a wait of the actor itself.
    void barrier_used(uint32_t actor, uint32_t block, uint32_t address);

    // What a warp releases to others, and acquires.
    void release(uint32_t actor, Clock& to);
    void acquire(uint32_t actor, const Clock& from);
    // The lanes of the warp have seen what each other did.
    void lanes_meet(uint32_t actor);
    // Only the initialisation of mbarriers, as barrier.cluster.arrive.relaxed after fence.mbarrier_init.
    void release_barriers(uint32_t actor, Clock& to);
    // What the copies of a block have done so far.
    void release_async(uint32_t block, Clock& to);
    void tick() { ++now_; }

private:
    struct Initialised {
        uint32_t block, address, actor;
        Time time;
    };
    Chunk& chunk(uint32_t block, uint32_t index) { return chunks_[block * chunks_per_block_ + index]; }
    bool seen(uint32_t actor, uint32_t by, Time time) const { return by == actor || clocks_[actor].seen[by] >= time; }
    bool fenced(uint32_t actor, uint32_t by, Time time) const { return clocks_[actor].fenced[by] >= time; }
    std::string name(uint32_t actor) const;
    // Faults where lanes of the actor race for bytes of chunk `index`, and notes which lanes they are now.
    void between_lanes(uint32_t actor, uint32_t block, uint32_t index, uint32_t address, uint32_t bytes, bool write,
                       Lanes lanes);

    uint32_t warps_ = 0, block_actors_ = 0, actors_ = 0, chunks_per_block_ = 0;
    Time now_ = 1;
    std::vector<Clock> clocks_;
    std::vector<Chunk> chunks_;
    // For each byte of the chunks, the lane that wrote it last, and the one that read it last; valid where the chunk
    // says that it was the asking warp, since that warp's lanes last met, whose times are in `met_`.
    std::vector<uint8_t> writer_lanes_, reader_lanes_;
    std::vector<Time> met_;
    std::vector<Initialised> initialised_;
};

}  // namespace ptx
