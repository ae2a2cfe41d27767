// Happens-before between warps, kept as one clock a warp; see order.h.
#include "order.h"

#include <algorithm>

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
    actors_ = blocks * (warps + 1);
    chunks_per_block_ = (shared_end + kChunk - 1) / kChunk;
    now_ = 1;
    const std::vector<Time> never(actors_, 0);
    clocks_.assign(actors_, Clock{never, never, never});
    chunks_.assign(size_t(blocks) * chunks_per_block_, Chunk{});
    initialised_.clear();
}

std::string Orders::name(uint32_t actor) const {
    const uint32_t warp = actor % (warps_ + 1);
    std::string text = warp == warps_ ? "a copy" : "warp " + std::to_string(warp);
    if (actors_ > warps_ + 1) text += " of the cluster's block " + std::to_string(actor / (warps_ + 1));
    return text;
}

void Orders::generic(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool write) {
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        const uint16_t mask = touched(at, address, bytes);
        if (c.copying && (c.write_mask & mask) != 0) {
            fail("%s shared memory at %#x that a copy under way will write: no wait stands between",
                 write ? "writes" : "reads", address);
        }
        if ((c.write_mask & mask) != 0 && !seen(actor, c.writer, c.write_time)) {
            fail("race: %s shared memory at %#x, which %s wrote with no barrier between", write ? "writes" : "reads",
                 address, name(c.writer).c_str());
        }
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
        c.read_mask[0] = c.read_mask[1] = 0;
    }
}

void Orders::async_read(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, const char* what) {
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
        const int slot = c.read_time[0] <= c.read_time[1] ? 0 : 1;
        c.reader[slot] = uint8_t(actor);
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

void Orders::copy_lands(uint32_t actor, uint32_t block, uint32_t address, uint32_t bytes, bool async_proxy) {
    tick();
    const uint32_t by = async_proxy ? async_actor(block) : actor;
    if (async_proxy) clocks_[by].seen[by] = now_;
    for (uint32_t at = address / kChunk; at * kChunk < address + bytes; ++at) {
        Chunk& c = chunk(block, at);
        c.copying = false;
        c.async_write = async_proxy;
        c.writer = uint8_t(by);
        c.write_time = now_;
    }
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

void Orders::release(uint32_t actor, Clock& to) {
    clocks_[actor].seen[actor] = now_;
    to.join(clocks_[actor]);
    tick();
}

void Orders::release_barriers(uint32_t actor, Clock& to) { join_times(to.barriers, clocks_[actor].barriers); }

void Orders::acquire(uint32_t actor, const Clock& from) {
    tick();
    clocks_[actor].join(from);
}

void Orders::release_async(uint32_t block, Clock& to) {
    const uint32_t actor = async_actor(block);
    if (to.seen.size() < actors_) to.seen.resize(actors_, 0);
    to.seen[actor] = std::max(to.seen[actor], clocks_[actor].seen[actor]);
    tick();
}

}  // namespace ptx
