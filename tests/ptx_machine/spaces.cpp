// Global memory by allocation. Each lies alone between pages that nothing may touch, and has a byte of its own for each
// of its bytes that says who wrote it: reading what nothing wrote is a finding.
#include "spaces.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "machine.h"

namespace ptx {
namespace {

constexpr uint64_t kPage = 4096;
// Between two allocations: more than any row that a kernel could overshoot by.
constexpr uint64_t kGap = 1 << 20;

struct Memory {
    std::shared_mutex mutex;
    std::map<uint64_t, Allocation> allocations;
};

Memory& memory() {
    static Memory memory;
    return memory;
}

// The last allocation that this thread's kernel used, and the state of the table that it was found in.
thread_local Allocation last{};
std::atomic<uint64_t> generation{1};
thread_local uint64_t last_generation = 0;
thread_local bool creation_zeros_allowed = true;

uint64_t whole_pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void* reserve(uint64_t bytes, bool usable) {
    void* start = mmap(nullptr, bytes, usable ? PROT_READ | PROT_WRITE : PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? nullptr : start;
}

}  // namespace

GlobalMemory& GlobalMemory::get() {
    static GlobalMemory global;
    return global;
}

uint64_t GlobalMemory::allocate(uint64_t bytes) {
    const uint64_t pages = whole_pages(bytes);
    auto* whole = static_cast<uint8_t*>(reserve(pages + 2 * kGap, false));
    auto* written = static_cast<uint8_t*>(reserve(pages, true));
    if (whole == nullptr || written == nullptr) return 0;
    if (mprotect(whole + kGap, pages, PROT_READ | PROT_WRITE) != 0) return 0;
    const uint64_t start = reinterpret_cast<uint64_t>(whole + kGap);
    const std::unique_lock lock(memory().mutex);
    memory().allocations[start] = Allocation{start, bytes, written, false, true};
    generation++;
    return start;
}

bool GlobalMemory::free(uint64_t start) {
    const std::unique_lock lock(memory().mutex);
    const auto found = memory().allocations.find(start);
    if (found == memory().allocations.end()) return false;
    const uint64_t pages = whole_pages(found->second.bytes);
    munmap(reinterpret_cast<void*>(start - kGap), pages + 2 * kGap);
    munmap(found->second.written, pages);
    memory().allocations.erase(found);
    generation++;
    return true;
}

void GlobalMemory::lend(const void* start, uint64_t bytes) {
    const std::unique_lock lock(memory().mutex);
    const uint64_t address = reinterpret_cast<uint64_t>(start);
    memory().allocations[address] = Allocation{address, bytes, nullptr, true, false};
    generation++;
}

void GlobalMemory::take_back(const void* start) {
    const std::unique_lock lock(memory().mutex);
    memory().allocations.erase(reinterpret_cast<uint64_t>(start));
    generation++;
}

const Allocation* GlobalMemory::find(uint64_t address, uint64_t bytes) {
    if (last_generation == generation && address - last.start < last.bytes &&
        bytes <= last.bytes - (address - last.start)) {
        return &last;
    }
    const std::shared_lock lock(memory().mutex);
    auto after = memory().allocations.upper_bound(address);
    if (after == memory().allocations.begin()) return nullptr;
    const Allocation& candidate = std::prev(after)->second;
    if (address - candidate.start >= candidate.bytes || bytes > candidate.bytes - (address - candidate.start))
        return nullptr;
    last = candidate;
    last_generation = generation;
    return &last;
}

std::string GlobalMemory::describe(uint64_t address) {
    const std::shared_lock lock(memory().mutex);
    char text[200];
    auto after = memory().allocations.upper_bound(address);
    if (after != memory().allocations.begin()) {
        const Allocation& before = std::prev(after)->second;
        if (address - before.start < before.bytes + kGap) {
            snprintf(text, sizeof text, "byte %llu of an allocation of %llu bytes",
                     static_cast<unsigned long long>(address - before.start),
                     static_cast<unsigned long long>(before.bytes));
            return text;
        }
    }
    if (after != memory().allocations.end() && after->second.start - address <= kGap) {
        snprintf(text, sizeof text, "%llu bytes before an allocation of %llu bytes",
                 static_cast<unsigned long long>(after->second.start - address),
                 static_cast<unsigned long long>(after->second.bytes));
        return text;
    }
    snprintf(text, sizeof text, "address %#llx, near no allocation", static_cast<unsigned long long>(address));
    return text;
}

std::string GlobalMemory::host_write(uint64_t d, uint64_t bytes) {
    const Allocation* found = find(d, bytes);
    if (found == nullptr) return "the host writes outside an allocation: " + describe(d);
    memset(found->written + (d - found->start), kWritten, bytes);
    return "";
}

std::string GlobalMemory::host_zero(uint64_t d, uint64_t bytes) {
    const std::string wrong = host_write(d, bytes);
    const std::unique_lock lock(memory().mutex);
    const auto found = memory().allocations.find(d);
    if (found == memory().allocations.end()) return wrong;
    Allocation& allocation = found->second;
    if (allocation.is_new && allocation.bytes == bytes) memset(allocation.written, kZeroedAtCreation, bytes);
    allocation.is_new = false;
    return wrong;
}

std::string GlobalMemory::host_read(uint64_t d, uint64_t bytes) {
    const Allocation* found = find(d, bytes);
    if (found == nullptr) return "the host reads outside an allocation: " + describe(d);
    return "";
}

std::string GlobalMemory::host_copy(uint64_t d, uint64_t s, uint64_t bytes) {
    const Allocation* found = find(s, bytes);
    if (found == nullptr) return "a copy reads outside an allocation: " + describe(s);
    const uint8_t* from = found->written + (s - found->start);
    found = find(d, bytes);
    if (found == nullptr) return "a copy writes outside an allocation: " + describe(d);
    memmove(found->written + (d - found->start), from, bytes);
    return "";
}

void check_global(int lane, uint64_t address, uint32_t bytes, Access access) {
    const Allocation* found = GlobalMemory::get().find(address, bytes);
    if (found == nullptr) {
        fail_lane(lane, "out of bounds: %u bytes at %s", bytes, GlobalMemory::get().describe(address).c_str());
    }
    if (found->read_only) {
        if (access != Access::read) fail_lane(lane, "a write to the launch's parameters");
        return;
    }
    uint8_t* written = found->written + (address - found->start);
    if (access == Access::write) {
        memset(written, kWritten, bytes);
        return;
    }
    if (memchr(written, kUnwritten, bytes) != nullptr) {
        fail_lane(lane, "reads global memory that nothing wrote: %s", GlobalMemory::get().describe(address).c_str());
    }
    if (!creation_zeros_allowed && memchr(written, kZeroedAtCreation, bytes) != nullptr) {
        fail_lane(lane, "reads global memory that nothing wrote since its creation zeroed it: %s",
                  GlobalMemory::get().describe(address).c_str());
    }
    if (access == Access::update) memset(written, kWritten, bytes);
}

void allow_creation_zeros(bool allowed) { creation_zeros_allowed = allowed; }

void SharedMemory::resize(uint32_t end_address) {
    end = end_address;
    // What a kernel finds there is what an earlier block left.
    bytes.assign(end, 0xff);
    written.assign(end, 0);
}

}  // namespace ptx
