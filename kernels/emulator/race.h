// Happens-before in shared memory, by vector clocks; and which bytes were ever written. Checked variant.
//
// Every thread, bulk-load unit and warpgroup's asynchronous unit of a block has a clock. A barrier, collective or
// mbarrier joins the clocks of those it orders. Each 4-byte cell of shared memory remembers its last write and the
// reads since; an access that does not happen after them is a race. The async proxy (TMA, wgmma) also needs ordinary
// writes to follow a fence.proxy.async, which `fenced` tracks.
#pragma once

#include <cstdint>
#include <vector>

#include "interface.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

struct Thread;
struct Block;

// Units that a cluster may have, so that epochs can name them.
constexpr uint32_t kMostUnits = 4096;

struct ClockPair {
    std::vector<uint32_t> seen;    // the time of every unit that happens before now
    std::vector<uint32_t> fenced;  // likewise, what the async proxy may rely on

    void reset(size_t units);
    void join(const ClockPair&);
};

// A source line in 8 bytes.
class PackedSite {
public:
    PackedSite() = default;
    explicit PackedSite(Site site) : bits_(uint64_t(uintptr_t(site.file)) | uint64_t(site.line & 0xffff) << 48) {}
    Site unpack() const {
        return {reinterpret_cast<const char*>(uintptr_t(bits_ & 0xffffffffffffull)), int(bits_ >> 48)};
    }
    uint64_t bits() const { return bits_; }

private:
    uint64_t bits_ = 0;
};

struct SharedCell {
    static constexpr int kReads = 4;
    uint32_t write = 0;  // epoch: unit and its time
    uint8_t write_bytes = 0;
    bool write_is_async = false;
    uint8_t reads = 0;
    uint8_t read_bytes[kReads];
    uint32_t read[kReads];
    PackedSite write_site;
    PackedSite read_site[kReads];
};

// What is known about every byte of a block's shared memory.
struct SharedShadow {
    static constexpr uint8_t kOutside = 0, kUnwritten = 0x80, kWritten = 0xc0;
    std::vector<uint8_t> state;
    std::vector<SharedCell> cells;

    void reset(uint32_t dynamic_bytes);
    void open(uint32_t offset, uint32_t bytes);
};

enum class Proxy : uint8_t { generic, async };

struct SharedAccess {
    uint32_t offset;
    uint32_t bytes;
    bool write;
    Proxy proxy;
    bool remember;  // false: only compare with earlier accesses
};

// Compares an access by `unit` at `time` with earlier ones. `observer` is the thread whose clock decides what is
// earlier.
void race_access(Thread& observer, uint32_t unit, uint32_t time, SharedAccess, Site);
// The same for an access by a thread itself.
void race_access(Thread&, SharedAccess, Site);

void race_release(ClockPair& to, Thread& from);
void race_acquire(Thread& to, const ClockPair& from);
// Makes what the threads of the mask have done so far happen before whatever any of them does next.
void race_join_warp(Thread* const* threads, uint32_t mask);

// Bounds and initialisation of shared bytes, as offsets from the start of dynamic shared memory.
void check_shared(Thread&, uint32_t offset, uint32_t bytes, bool write, Site);
// Fails if any of the bytes was never written.
void require_shared_written(Thread&, uint32_t offset, uint32_t bytes, Site);
void mark_shared_written(uint32_t offset, uint32_t bytes);

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
