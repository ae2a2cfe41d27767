#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>

#include "block.h"
#include "device.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {
constexpr size_t kGuard = 256;
constexpr size_t kAlignment = 256;
constexpr uint8_t kGuardByte = 0xa5;
// Freed memory stays out of use this long, so that a use after free is told from a use of its successor.
constexpr size_t kQuarantineBytes = kChecked ? size_t(64) << 20 : 0;

size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
size_t footprint(size_t bytes) { return rounded(bytes) + 2 * kGuard; }

uint8_t* reserve(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
}
}  // namespace

GlobalMemory& GlobalMemory::instance() {
    static GlobalMemory* memory = new GlobalMemory();
    return *memory;
}

GlobalMemory::GlobalMemory() {
    // This reserves only addresses. If the process may not have so many, a smaller range has to do.
    for (size_t bytes = size_t(64) << 30; bytes >= size_t(256) << 20; bytes /= 2) {
        uint8_t* memory = reserve(bytes);
        if (memory == nullptr) continue;
        if (kChecked && !reserve_shadow(bytes)) {
            munmap(memory, bytes);
            continue;
        }
        base_ = uintptr_t(memory);
        size_ = bytes;
        holes_[base_] = size_;
        return;
    }
}

bool GlobalMemory::reserve_shadow(size_t bytes) {
    static_assert(sizeof(Touch) == 8, "two planes of 8 bytes for each 4");
    uint8_t* memory = reserve(5 * bytes);
    if (memory == nullptr) return false;
    shadow_ = memory;
    writes_ = reinterpret_cast<Touch*>(memory + bytes);
    reads_ = reinterpret_cast<Touch*>(memory + 3 * bytes);
    return true;
}

uintptr_t GlobalMemory::carve(size_t bytes) {
    for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
        if (hole->second < bytes) continue;
        const uintptr_t start = hole->first;
        const size_t rest = hole->second - bytes;
        holes_.erase(hole);
        if (rest != 0) holes_[start + bytes] = rest;
        return start;
    }
    return 0;
}

uintptr_t GlobalMemory::allocate(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (bytes > size_) return 0;
    const uintptr_t start = carve(footprint(bytes));
    if (start == 0) return 0;
    const uintptr_t address = start + kGuard;
    memset(reinterpret_cast<void*>(start), kGuardByte, kGuard);
    memset(reinterpret_cast<void*>(address), kFreshByte, bytes);
    memset(reinterpret_cast<void*>(address + bytes), kGuardByte, rounded(bytes) - bytes + kGuard);
    if (kChecked) memset(shadow(address), SharedShadow::kUnwritten, bytes);
    live_[address] = bytes;
    now_ += bytes;
    peak_ = std::max(peak_, now_);
    return address;
}

bool GlobalMemory::release(uintptr_t address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = live_.find(address);
    if (found == live_.end()) return false;
    const size_t bytes = found->second;
    live_.erase(found);
    now_ -= bytes;
    // Whoever still reads this memory sees NaN.
    memset(reinterpret_cast<void*>(address), kFreshByte, bytes);
    if (kChecked) memset(shadow(address), kFreed, bytes);
    dead_[address] = bytes;
    quarantine_.push_back({address - kGuard, footprint(bytes)});
    quarantined_ += footprint(bytes);
    while (quarantined_ > kQuarantineBytes && !quarantine_.empty()) {
        const Quarantined oldest = quarantine_.front();
        quarantine_.pop_front();
        quarantined_ -= oldest.bytes;
        dead_.erase(oldest.start + kGuard);
        give_back(oldest.start, oldest.bytes);
    }
    return true;
}

void GlobalMemory::give_back(uintptr_t start, size_t bytes) {
    if (kChecked) memset(shadow(start), SharedShadow::kOutside, bytes);
    if (bytes >= size_t(1) << 20) {
        // Whole pages go back to the system, which hands them out again as zeros.
        const uintptr_t first = (start + 4095) & ~uintptr_t(4095), last = (start + bytes) & ~uintptr_t(4095);
        madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
    auto hole = holes_.emplace(start, bytes).first;
    const auto next = std::next(hole);
    if (next != holes_.end() && hole->first + hole->second == next->first) {
        hole->second += next->second;
        holes_.erase(next);
    }
    if (hole != holes_.begin()) {
        const auto previous = std::prev(hole);
        if (previous->first + previous->second == hole->first) {
            previous->second += hole->second;
            holes_.erase(hole);
        }
    }
}

std::string GlobalMemory::describe(uintptr_t address, size_t bytes) const {
    char text[256];
    const auto relative_to = [&](const std::map<uintptr_t, size_t>& allocations, const char* kind) {
        auto after = allocations.upper_bound(address);
        if (after != allocations.begin()) {
            const auto before = std::prev(after);
            const size_t offset = address - before->first;
            if (offset < before->second + kGuard) {
                snprintf(text, sizeof text, "%zu bytes at offset %zu of %s of %zu bytes", bytes, offset, kind,
                         before->second);
                return true;
            }
        }
        if (after != allocations.end() && after->first - address <= kGuard) {
            snprintf(text, sizeof text, "%zu bytes %zu before %s of %zu bytes", bytes, size_t(after->first - address),
                     kind, after->second);
            return true;
        }
        return false;
    };
    if (relative_to(dead_, "a freed allocation") || relative_to(live_, "an allocation")) return text;
    snprintf(text, sizeof text, "%zu bytes at %p, in no allocation", bytes, reinterpret_cast<void*>(address));
    return text;
}

std::string GlobalMemory::complaint(uintptr_t address, size_t bytes) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto after = live_.upper_bound(address);
    if (after != live_.begin()) {
        const auto before = std::prev(after);
        const size_t offset = address - before->first;
        if (offset <= before->second && bytes <= before->second - offset) return "";
    }
    return describe(address, bytes);
}

std::string GlobalMemory::overwritten_guard(uintptr_t address, size_t bytes) {
    const auto find_damage = [](uint8_t* begin, uint8_t* end) {
        uint8_t* damaged = std::find_if(begin, end, [](uint8_t byte) { return byte != kGuardByte; });
        const bool found = damaged != end;
        if (found) memset(begin, kGuardByte, size_t(end - begin));
        return found ? damaged : nullptr;
    };
    uint8_t* data = reinterpret_cast<uint8_t*>(address);
    char text[160];
    if (const uint8_t* damaged = find_damage(data - kGuard, data)) {
        snprintf(text, sizeof text, "wrote outside an allocation of %zu bytes, %zu bytes before its start", bytes,
                 size_t(data - damaged));
        return text;
    }
    if (const uint8_t* damaged = find_damage(data + bytes, data + rounded(bytes) + kGuard)) {
        snprintf(text, sizeof text, "wrote outside an allocation of %zu bytes, at offset %zu", bytes,
                 size_t(damaged - data));
        return text;
    }
    return "";
}

std::string GlobalMemory::verify_guards() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string damage;
    for (const auto& [address, bytes] : live_) {
        const std::string text = overwritten_guard(address, bytes);
        if (!text.empty() && damage.size() < 1000) damage += (damage.empty() ? "" : "; ") + text;
    }
    return damage;
}

void GlobalMemory::use(size_t* now, size_t* peak) const {
    std::lock_guard<std::mutex> lock(mutex_);
    *now = now_;
    *peak = peak_;
}

void GlobalMemory::mark_written(uintptr_t address, size_t bytes) {
    if (kChecked) memset(shadow(address), SharedShadow::kWritten, bytes);
}

namespace {
[[noreturn]] void report_global(Thread& thread, uintptr_t address, size_t bytes, bool write, Site site) {
    const char* verb = write ? "writes" : "reads";
    const std::string complaint = GlobalMemory::instance().complaint(address, bytes);
    if (!complaint.empty()) fail_for(thread, site, "%s %s, out of bounds", verb, complaint.c_str());
    fail_for(thread, site, "reads %zu bytes of global memory at %p that nothing has written", bytes,
             reinterpret_cast<void*>(address));
}
}  // namespace

void check_global(Thread& thread, uintptr_t address, size_t bytes, bool write, Site site) {
    GlobalMemory& memory = GlobalMemory::instance();
    if (!memory.owns(address) || !memory.owns(address + bytes - 1)) report_global(thread, address, bytes, write, site);
    if (!kChecked) return;
    uint8_t* state = memory.shadow(address);
    const uint8_t needed = write ? SharedShadow::kUnwritten : SharedShadow::kWritten;
    for (size_t i = 0; i < bytes; ++i) {
        if ((state[i] & needed) != needed) report_global(thread, address, bytes, write, site);
    }
    if (write) memset(state, SharedShadow::kWritten, bytes);
}

namespace {

constexpr uint32_t kSeveralBlocks = (1u << 28) - 1;
using Touch = GlobalMemory::Touch;

bool conflicts(const Touch& earlier, const Touch& mine) {
    return earlier.launch == mine.launch && earlier.block != mine.block && (earlier.bytes & mine.bytes) != 0;
}

// A word of memory remembers one block. Blocks that touch different bytes of it replace one another there, which may
// lose findings but never invents one.
void remember(Touch& word, const Touch& mine, bool by_several) {
    const bool known = word.launch == mine.launch && (word.block == mine.block || by_several);
    const uint32_t bytes = known ? word.bytes | mine.bytes : mine.bytes;
    word = Touch{mine.launch, by_several ? kSeveralBlocks : mine.block, bytes & 0xfu};
}

}  // namespace

void check_block_order(Thread& thread, uintptr_t address, size_t bytes, bool write, Site site) {
    Block& block = *running;
    if (!kChecked || block.uses_global_atomics) return;
    GlobalMemory& memory = GlobalMemory::instance();
    const uintptr_t end = address + bytes;
    for (uintptr_t word = address & ~uintptr_t(3); word < end; word += 4) {
        const uint32_t first = word < address ? uint32_t(address - word) : 0,
                       last = uint32_t(std::min<uintptr_t>(4, end - word));
        const Touch mine{Launch::current().number(), block.number & (kSeveralBlocks - 1),
                         ((1u << last) - (1u << first)) & 0xfu};
        Touch& wrote = memory.last_write(word);
        Touch& read = memory.last_read(word);
        const bool after_write = conflicts(wrote, mine), after_read = write && conflicts(read, mine);
        if (after_write || after_read) {
            const uint32_t shared_bytes = (after_write ? wrote : read).bytes & mine.bytes;
            fail_for(thread, site,
                     "%s global memory at %p that another block %s in the same launch: the result depends on the order "
                     "of blocks",
                     write ? "writes" : "reads", reinterpret_cast<void*>(word + uintptr_t(__builtin_ctz(shared_bytes))),
                     after_write ? "wrote" : "read");
        }
        if (write)
            remember(wrote, mine, false);
        else
            remember(read, mine, conflicts(read, mine));
    }
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
