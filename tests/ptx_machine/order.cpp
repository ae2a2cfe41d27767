// Happens-before between warps, kept as one clock per warp; see order.h.
#include "order.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

void join_times(std::vector<Time>& into, const std::vector<Time>& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// Bits of the bytes of one chunk that an access of `bytes` at `address` touches.
uint16_t touched(uint32_t chunk, uint32_t address, uint32_t bytes) {
    const uint32_t start = chunk * kChunk;
    const uint32_t first = address > start ? address - start : 0;
    const uint32_t last = std::min(address + bytes - start, kChunk);
    return uint16_t((0xffffu >> (kChunk - (last - first))) << first);
}

}  // namespace

void Clock::join(const Clock& other) {
    join_times(seen, other.seen);
    join_times(fenced, other.fenced);
    join_times(barriers, other.barriers);
}

void Orders::start(uint32_t blocks, uint32_t warps, uint32_t shared_end) {
    warps_ = warps;
    block_actors_ = warps + 1 + (warps + kWarpgroupWarps - 1) / kWarpgroupWarps;
    actors_ = blocks * block_actors_;
    chunks_per_block_ = (shared_end + kChunk - 1) / kChunk;
    now_ = 1;
    const std::vector<Time> never(actors_, 0);
    clocks_.assign(actors_, Clock{never, never, never});
    chunks_.assign(size_t(blocks) * chunks_per_block_, Chunk{});
    writer_lanes_.assign(chunks_.size() * kChunk, kNoLane);
    reader_lanes_.assign(chunks_.size() * kChunk, kNoLane);
    met_.assign(actors_, 0);
    initialised_.clear();
}

std::string Orders::name(uint32_t actor) const {
    const uint32_t warp = actor % block_actors_;
    std::string text = warp < warps_    ? "warp " + std::to_string(warp)
                       : warp == warps_ ? "a copy"
                                        : "a wgmma of warpgroup " + std::to_string(warp - warps_ - 1);
    if (actors_ > block_actors_) text += " of the cluster's block " + std::to_string(actor / block_actors_);
    return text;
}

void Orders::between_lanes(uint32_t actor, uint32_t block, uint32_t index, uint32_t address, uint32_t bytes, bool write,
                           Lanes lanes) {
    const Chunk& c = chunk(block, index);
    const size_t start = (size_t(block) * chunks_per_block_ + index) * kChunk;
    uint8_t *const writers = writer_lanes_.data() + start, *const readers = reader_lanes_.data() + start;
    const Time met = met_[actor];
    const bool own_write = c.writer == actor && !c.async_write && c.write_mask != 0 && c.write_time > met;
    const int slot = c.reader[0] == actor && c.read_mask[0] != 0 ? 0 : 1;
    const bool own_read = c.reader[slot] == actor && c.read_mask[slot] != 0 && c.read_time[slot] > met;
    if (write && !own_write) memset(writers, kNoLane, kChunk);
    if (!own_read) memset(readers, kNoLane, kChunk);
    const uint32_t first = std::max(address, index * kChunk), end = std::min(address + bytes, (index + 1) * kChunk);
    for (uint32_t at = first; at < end;) {
        const uint32_t part = (at - address) / lanes.bytes_each;
        const uint32_t part_end = std::min(end, address + (part + 1) * lanes.bytes_each);
        const uint8_t lane = lanes.first >= kWholeWarp ? lanes.first : uint8_t(lanes.first + part);
        const int of = lane < kLanes ? int(lane) : -1;
        for (; at < part_end; ++at) {
            const uint32_t b = at % kChunk;
            const uint8_t writer = writers[b], reader = readers[b];
            if (own_write && (c.write_mask >> b & 1) != 0 && writer != kNoLane && writer != lane) {
                fail_lane(of,
                          "race between lanes: %s shared memory at %#x, which %s of its warp wrote with no "
                          "bar.warp.sync between",
                          write ? "writes" : "reads", at,
                          writer == kWholeWarp ? "stmatrix" : ("lane " + std::to_string(writer)).c_str());
            }
            if (!write) {
                if (lane != kWholeWarp) readers[b] = reader == kNoLane || reader == lane ? lane : kWholeWarp;
                continue;
            }
            if (own_read && lane != kWholeWarp && (c.read_mask[slot] >> b & 1) != 0 && reader != kNoLane &&
                reader != lane) {
                fail_lane(of,
                          "race between lanes: writes shared memory at %#x, which another lane of its warp reads with "
                          "no bar.warp.sync between",
                          at);
            }
            writers[b] = lane;
        }
    }
}

void Orders::generic(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool write, Lanes lanes) {
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        const uint16_t mask = touched(at, address, bytes);
        if (c.copying && (c.write_mask & mask) != 0) {
            fail("%s shared memory at %#x that a copy under way will write: no wait stands between",
                 write ? "writes" : "reads", address);
        }
        const bool atomics = c.atomic_write && lanes.first == kNoLane;
        if ((c.write_mask & mask) != 0 && !seen(actor, c.writer, c.write_time) && !atomics) {
            fail("race: %s shared memory at %#x, which %s wrote with no barrier between", write ? "writes" : "reads",
                 address, name(c.writer).c_str());
        }
        between_lanes(actor, block, at, address, bytes, write, lanes);
        if (!write) {
            const int slot = c.reader[0] == actor && c.read_mask[0] != 0   ? 0
                             : c.reader[1] == actor && c.read_mask[1] != 0 ? 1
                             : c.read_time[0] <= c.read_time[1]            ? 0
                                                                           : 1;
            if (c.reader[slot] != actor) c.read_mask[slot] = 0;
            c.reader[slot] = uint8_t(actor);
            c.read_time[slot] = now_;
            c.read_mask[slot] |= mask;
            continue;
        }
        for (int slot = 0; slot < 2; ++slot) {
            if ((c.read_mask[slot] & mask) != 0 && !seen(actor, c.reader[slot], c.read_time[slot])) {
                fail("race: writes shared memory at %#x, which %s reads with no barrier between", address,
                     name(c.reader[slot]).c_str());
            }
        }
        if (c.writer == actor && c.write_time != 0 && !c.async_write) {
            c.write_mask |= mask;
        } else {
            c.write_mask = mask;
        }
        c.writer = uint8_t(actor);
        c.write_time = now_;
        c.async_write = false;
        c.atomic_write = lanes.first == kNoLane;
        c.read_mask[0] = c.read_mask[1] = 0;
    }
}

void Orders::async_read(uint32_t actor, uint32_t reader, uint32_t block, uint32_t address, uint32_t bytes,
                        const char* what, uint8_t lane) {
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        const uint16_t mask = touched(at, address, bytes);
        if (c.copying && (c.write_mask & mask) != 0) {
            fail("%s reads shared memory at %#x that a copy under way will write: no wait stands between", what,
                 address);
        }
        if ((c.write_mask & mask) != 0 && !seen(actor, c.writer, c.write_time)) {
            fail("race: %s reads shared memory at %#x, which %s wrote with no barrier between", what, at * kChunk,
                 name(c.writer).c_str());
        }
        if ((c.write_mask & mask) != 0 && !c.async_write && !fenced(actor, c.writer, c.write_time)) {
            fail("missing fence.proxy.async: %s reads shared memory at %#x, which %s wrote by ordinary stores", what,
                 at * kChunk, name(c.writer).c_str());
        }
        if (lane != kNoLane) between_lanes(actor, block, at, address, bytes, false, {lane, bytes});
        const int slot = c.reader[0] == reader              ? 0
                         : c.reader[1] == reader            ? 1
                         : c.read_time[0] <= c.read_time[1] ? 0
                                                            : 1;
        c.reader[slot] = uint8_t(reader);
        c.read_time[slot] = now_;
        c.read_mask[slot] = 0xffff;
    }
}

void Orders::copy_begins(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy) {
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        const uint16_t mask = touched(at, address, bytes);
        if (c.copying) fail("two copies at once write shared memory at %#x", at * kChunk);
        if ((c.write_mask & mask) != 0 && !seen(actor, c.writer, c.write_time)) {
            fail("race: a copy overwrites shared memory at %#x, which %s wrote with no barrier between", at * kChunk,
                 name(c.writer).c_str());
        }
        for (int slot = 0; slot < 2; ++slot) {
            if ((c.read_mask[slot] & mask) != 0 && !seen(actor, c.reader[slot], c.read_time[slot])) {
                fail("race: a copy overwrites shared memory at %#x, which %s may still read: no barrier stands between",
                     at * kChunk, name(c.reader[slot]).c_str());
            }
        }
        if (async_proxy && (c.write_mask & mask) != 0 && !c.async_write && c.write_time != 0 &&
            !fenced(actor, c.writer, c.write_time)) {
            fail("missing fence.proxy.async: a copy overwrites shared memory at %#x, which %s wrote by ordinary stores",
                 at * kChunk, name(c.writer).c_str());
        }
        c.copying = true;
        c.writer = uint8_t(async_proxy ? async_actor(block) : actor);
        c.write_mask = 0xffff;
        c.read_mask[0] = c.read_mask[1] = 0;
    }
}

void Orders::copy_lands(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy,
                        uint8_t lane) {
    tick();
    const uint32_t by = async_proxy ? async_actor(block) : actor;
    if (async_proxy) clocks_[by].seen[by] = now_;
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        c.copying = false;
        c.async_write = async_proxy;
        c.atomic_write = false;
        c.writer = uint8_t(by);
        c.write_time = now_;
        if (!async_proxy) memset(&writer_lanes_[(size_t(block) * chunks_per_block_ + at) * kChunk], lane, kChunk);
    }
}

void Orders::products_seen(uint32_t actor, uint32_t products, Time time) {
    clocks_[actor].seen[products] = std::max(clocks_[actor].seen[products], time);
}

void Orders::proxy_fence(uint32_t actor) {
    Clock& clock = clocks_[actor];
    join_times(clock.fenced, clock.seen);
    clock.fenced[actor] = now_;
    clock.barriers[actor] = now_;
    tick();
}

void Orders::barrier_fence(uint32_t actor) {
    clocks_[actor].barriers[actor] = now_;
    tick();
}

void Orders::barrier_initialised(uint32_t actor, uint32_t block, uint32_t address) {
    tick();
    for (Initialised& known : initialised_) {
        if (known.block == block && known.address == address) {
            known.actor = actor;
            known.time = now_;
            return;
        }
    }
    initialised_.push_back({block, address, actor, now_});
}

void Orders::barrier_used_by_async(uint32_t actor, uint32_t block, uint32_t address) {
    for (const Initialised& known : initialised_) {
        if (known.block != block || known.address != address) continue;
        if (clocks_[actor].barriers[known.actor] < known.time) {
            fail(
                "missing fence.mbarrier_init: a copy completes on the mbarrier at %#x, whose initialisation by %s is "
                "not "
                "visible to the async proxy",
                address, name(known.actor).c_str());
        }
    }
}

void Orders::barrier_used(uint32_t actor, uint32_t block, uint32_t address) {
    for (const Initialised& known : initialised_) {
        if (known.block != block || known.address != address) continue;
        if (!seen(actor, known.actor, known.time) && clocks_[actor].barriers[known.actor] < known.time) {
            fail("race: uses the mbarrier at %#x, which %s initialised with no barrier between", address,
                 name(known.actor).c_str());
        }
    }
}

void Orders::release(uint32_t actor, Clock& to) {
    clocks_[actor].seen[actor] = now_;
    to.join(clocks_[actor]);
    tick();
}

void Orders::release_barriers(uint32_t actor, Clock& to) { join_times(to.barriers, clocks_[actor].barriers); }

void Orders::acquire(uint32_t actor, const Clock& from) {
    clocks_[actor].join(from);
    lanes_meet(actor);
}

void Orders::lanes_meet(uint32_t actor) {
    met_[actor] = now_;
    tick();
}

void Orders::release_async(uint32_t block, Clock& to) {
    const uint32_t actor = async_actor(block);
    if (to.seen.size() < actors_) to.seen.resize(actors_, 0);
    to.seen[actor] = std::max(to.seen[actor], clocks_[actor].seen[actor]);
    tick();
}

}  // namespace ptx
