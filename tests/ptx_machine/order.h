// Who has seen what: happens-before between the warps of a cluster, and from it data races in shared memory and missing
// fences between the generic and the async proxy.
//
// The unit is a warp (an actor); every block also has an actor for asynchronous copies. Time is one counter of the
// cluster. `seen[w][a]` is the time up to which everything that actor a did happens before what warp w does next (PTX
// ISA 9.0, "Memory Consistency Model: Causality Order"). Barriers join these clocks. `fenced` is the same for accesses
// that are also visible to the async proxy, because a proxy fence stood on the way (same chapter, "Proxy").
//
// What it cannot see: races between lanes of one warp, and races in global memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

using Time = uint32_t;

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
    // Whether the last write was the async proxy's.
    bool async_write = false;
    // A copy is on its way to these bytes.
    bool copying = false;
};
constexpr uint32_t kChunk = 16;

class Orders {
public:
    // `warps` of each of `blocks`; `shared_end` of each block.
    void start(uint32_t blocks, uint32_t warps, uint32_t shared_end);
    uint32_t warp_actor(uint32_t block, uint32_t warp) const { return block * (warps_ + 1) + warp; }
    uint32_t async_actor(uint32_t block) const { return block * (warps_ + 1) + warps_; }

    // A warp's generic access to its own or another block's shared memory; a text where it races.
    void generic(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool write);
    // The async proxy reads (a store by TMA, an operand of wgmma) on behalf of a warp.
    void async_read(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, const char* what);
    // A copy by the async proxy, or cp.async, is asked for: nobody may still use the bytes.
    void copy_begins(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy);
    // It has landed; `actor` has seen it where it is a cp.async of its own, otherwise who waits for the mbarrier will.
    void copy_lands(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy);

    // The warp's generic accesses so far become visible to the async proxy.
    void proxy_fence(uint32_t actor);
    // The warp's initialised mbarriers so far become visible to the async proxy and the cluster.
    void barrier_fence(uint32_t actor);
    void barrier_initialised(uint32_t actor, uint32_t block, uint32_t address);
    // Whether the mbarrier's initialisation is visible to the async proxy from where the actor stands.
    void barrier_used_by_async(uint32_t actor, uint32_t block, uint32_t address);

    // What a warp releases to others, and acquires.
    void release(uint32_t actor, Clock& to);
    void acquire(uint32_t actor, const Clock& from);
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

    uint32_t warps_ = 0, actors_ = 0, chunks_per_block_ = 0;
    Time now_ = 1;
    std::vector<Clock> clocks_;
    std::vector<Chunk> chunks_;
    std::vector<Initialised> initialised_;
};

}  // namespace ptx
