#include "race.h"

#include <algorithm>
#include <cstdio>

#include "device.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

// An epoch is a unit and its time in 32 bits: 12 bits hold the units of a cluster, 20 its barriers.
constexpr uint32_t kUnitBits = 12;
static_assert(kMostUnits == 1u << kUnitBits, "a unit's number fits");
uint32_t epoch(uint32_t unit, uint32_t time) { return time << kUnitBits | unit; }
uint32_t unit_of(uint32_t epoch) { return epoch & ((1u << kUnitBits) - 1); }
uint32_t time_of(uint32_t epoch) { return epoch >> kUnitBits; }

bool known_to(uint32_t epoch, const std::vector<uint32_t>& clock) { return time_of(epoch) <= clock[unit_of(epoch)]; }

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    uint32_t* a = into.data();
    const uint32_t* b = from.data();
    for (size_t i = 0, n = from.size(); i < n; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
}

std::string name_unit(uint32_t unit) {
    const uint32_t rank = unit / running->units();
    const std::string where = rank == running->cluster_rank ? "" : " of the cluster's block " + std::to_string(rank);
    unit %= running->units();
    if (unit < running->thread_count) return "thread " + std::to_string(unit) + where;
    unit -= running->thread_count;
    if (unit < Block::kLoadUnits) return "an asynchronous load" + where;
    return "wgmma of warpgroup " + std::to_string(unit - Block::kLoadUnits) + where;
}

std::string name_site(Site site) { return std::string(file_name(site)) + ":" + std::to_string(site.line); }

// An access that is being compared with earlier ones.
struct Comparison {
    const Thread& observer;
    uint32_t epoch;
    SharedAccess access;
    Site site;
};

void report_race(const Comparison& now, uint32_t cell_offset, const char* problem, const char* earlier, uint32_t other,
                 PackedSite other_site) {
    const PackedSite here(now.site);
    const uint3 block = running->index;
    char text[600];
    snprintf(text, sizeof text,
             "%s, block (%u, %u, %u), %s: %s in shared memory at offset %u: %s by %s, %s by %s at %s", running->kernel,
             block.x, block.y, block.z, name_site(now.site).c_str(), problem, cell_offset,
             now.access.write ? "write" : "read", name_unit(unit_of(now.epoch)).c_str(), earlier,
             name_unit(unit_of(other)).c_str(), name_site(other_site.unpack()).c_str());
    Launch::current().record_once({here.bits(), other_site.bits()}, text);
}

void compare_with_write(const Comparison& now, const SharedCell& cell, uint8_t bytes, uint32_t offset) {
    if (cell.write == 0 || (cell.write_bytes & bytes) == 0) return;
    const bool ordered = known_to(cell.write, now.observer.clock.seen);
    if (!ordered && unit_of(cell.write) != unit_of(now.epoch)) {
        report_race(now, offset, "race", "not ordered after the write", cell.write, cell.write_site);
    } else if (ordered && now.access.proxy == Proxy::async && !cell.write_is_async &&
               !known_to(cell.write, now.observer.clock.fenced)) {
        report_race(now, offset, "missing fence.proxy.async", "after the ordinary write", cell.write, cell.write_site);
    }
}

void compare_with_reads(const Comparison& now, const SharedCell& cell, uint8_t bytes, uint32_t offset) {
    for (int i = 0; i < cell.reads; ++i) {
        const uint32_t other = cell.read[i];
        if ((cell.read_bytes[i] & bytes) == 0 || unit_of(other) == unit_of(now.epoch) ||
            known_to(other, now.observer.clock.seen))
            continue;
        return report_race(now, offset, "race", "not ordered after the read", other, cell.read_site[i]);
    }
}

void remember_write(const Comparison& now, SharedCell& cell, uint8_t bytes) {
    cell.write_bytes = cell.write == now.epoch ? cell.write_bytes | bytes : bytes;
    cell.write = now.epoch;
    cell.write_is_async = now.access.proxy == Proxy::async;
    cell.write_site = PackedSite(now.site);
    if (bytes == 0xf) cell.reads = 0;
}

// Keeps the reads that are concurrent with this one; if they are too many, a random selection of them.
void remember_read(const Comparison& now, SharedCell& cell, uint8_t bytes) {
    int kept = 0;
    for (int i = 0; i < cell.reads; ++i) {
        const bool superseded =
            unit_of(cell.read[i]) == unit_of(now.epoch) || known_to(cell.read[i], now.observer.clock.seen);
        if (superseded && (cell.read_bytes[i] & ~bytes) == 0) continue;
        cell.read[kept] = cell.read[i];
        cell.read_bytes[kept] = cell.read_bytes[i];
        cell.read_site[kept] = cell.read_site[i];
        ++kept;
    }
    const int slot = kept < SharedCell::kReads ? kept : int(running->random() % SharedCell::kReads);
    cell.reads = uint8_t(std::min(kept + 1, SharedCell::kReads));
    cell.read[slot] = now.epoch;
    cell.read_bytes[slot] = bytes;
    cell.read_site[slot] = PackedSite(now.site);
}

}  // namespace

void ClockPair::reset(size_t units) {
    seen.assign(units, 0);
    fenced.assign(units, 0);
}

void ClockPair::join(const ClockPair& other) {
    emulated::join(seen, other.seen);
    emulated::join(fenced, other.fenced);
}

void SharedShadow::reset(uint32_t dynamic_bytes) {
    state.assign(kSharedLimit, kOutside);
    std::fill_n(state.begin(), dynamic_bytes, kUnwritten);
    cells.assign((dynamic_bytes + 3) / 4, SharedCell());
}

void SharedShadow::open(uint32_t offset, uint32_t bytes) {
    std::fill_n(state.begin() + offset, bytes, kUnwritten);
    if (cells.size() < (offset + bytes + 3) / 4) cells.resize((offset + bytes + 3) / 4);
}

void race_access(Thread& observer, uint32_t unit, uint32_t time, SharedAccess access, Site site) {
    const Comparison now{observer, epoch(unit, time), access, site};
    const uint32_t end = access.offset + access.bytes;
    for (uint32_t offset = access.offset & ~3u; offset < end; offset += 4) {
        const uint32_t first = offset < access.offset ? access.offset - offset : 0, last = std::min(4u, end - offset);
        const uint8_t bytes = uint8_t(((1u << last) - 1) & ~((1u << first) - 1));
        SharedCell& cell = running->shadow.cells[offset / 4];
        compare_with_write(now, cell, bytes, offset);
        if (access.write) compare_with_reads(now, cell, bytes, offset);
        if (!access.remember) continue;
        if (access.write)
            remember_write(now, cell, bytes);
        else
            remember_read(now, cell, bytes);
    }
}

void race_access(Thread& thread, SharedAccess access, Site site) {
    race_access(thread, thread.unit, thread.clock.seen[thread.unit], access, site);
}

void race_release(ClockPair& to, Thread& from) {
    to.join(from.clock);
    ++from.clock.seen[from.unit];
}

void race_acquire(Thread& to, const ClockPair& from) { to.clock.join(from); }

void race_join_warp(Thread* const* threads, uint32_t mask) {
    ClockPair joined;
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) race_release(joined, *threads[__builtin_ctz(lanes)]);
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) race_acquire(*threads[__builtin_ctz(lanes)], joined);
}

void fence_proxy_async(Site) {
    if (!kChecked) return;
    ClockPair& clock = self().clock;
    clock.fenced = clock.seen;
    ++clock.seen[self().unit];
}

void check_shared(Thread& thread, uint32_t offset, uint32_t bytes, bool write, Site site) {
    uint8_t* state = running->shadow.state.data() + offset;
    for (uint32_t i = 0; i < bytes; ++i) {
        if (state[i] == SharedShadow::kOutside)
            fail_for(
                thread, site,
                "%s %u bytes at shared offset %u, out of bounds: the block has %u bytes of dynamic shared memory%s",
                write ? "writes" : "reads", bytes, offset, running->dynamic_bytes,
                running->static_arrays.empty() ? "" : " and arrays after it");
    }
    if (!write) require_shared_written(thread, offset, bytes, site);
    race_access(thread, {offset, bytes, write, Proxy::generic, true}, site);
    if (write) mark_shared_written(offset, bytes);
}

void require_shared_written(Thread& thread, uint32_t offset, uint32_t bytes, Site site) {
    const uint8_t* state = running->shadow.state.data() + offset;
    for (uint32_t i = 0; i < bytes; ++i) {
        if (state[i] != SharedShadow::kWritten)
            fail_for(thread, site, "reads shared offset %u, which nothing has written", offset + i);
    }
}

void mark_shared_written(uint32_t offset, uint32_t bytes) {
    std::fill_n(running->shadow.state.begin() + offset, bytes, SharedShadow::kWritten);
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
