// The emulated device's global memory: one reserved range of addresses, allocations between guard bytes, and in the
// checked variant a byte of shadow for every byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>

#include "interface.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

class GlobalMemory {
public:
    // Never destroyed: workers may outlive static destructors.
    static GlobalMemory& instance();

    // 0 on failure. Fresh memory holds 0xff bytes, which read as NaN in f32 and bf16.
    uintptr_t allocate(size_t bytes);
    // False if `address` is not the start of a live allocation.
    bool release(uintptr_t address);

    bool owns(uintptr_t address) const { return address - base_ < size_; }
    // "" if [address, address + bytes) lies inside one live allocation, else what is wrong.
    std::string complaint(uintptr_t address, size_t bytes) const;
    // Names the allocations whose guard bytes were overwritten, and mends them; "" if none.
    std::string verify_guards();

    void use(size_t* now, size_t* peak) const;

    // Shadow, checked variant. One of SharedShadow's states a byte; `release`d memory is kFreed.
    static constexpr uint8_t kFreed = 0x01;
    uint8_t* shadow(uintptr_t address) const { return shadow_ + (address - base_); }
    void mark_written(uintptr_t address, size_t bytes);
    // Which block last wrote, and which read, some of the 4 bytes at an address, and in which launch. Checked variant.
    struct Touch {
        uint32_t launch;
        uint32_t block : 28;
        uint32_t bytes : 4;
    };
    Touch& last_write(uintptr_t address) const { return writes_[(address - base_) / 4]; }
    Touch& last_read(uintptr_t address) const { return reads_[(address - base_) / 4]; }

private:
    GlobalMemory();
    bool reserve_shadow(size_t bytes);
    uintptr_t carve(size_t bytes);
    void give_back(uintptr_t start, size_t bytes);
    std::string overwritten_guard(uintptr_t address, size_t bytes);
    std::string describe(uintptr_t address, size_t bytes) const;

    struct Quarantined {
        uintptr_t start;
        size_t bytes;
    };
    mutable std::mutex mutex_;
    uintptr_t base_ = 0;
    size_t size_ = 0;
    uint8_t* shadow_ = nullptr;
    Touch* writes_ = nullptr;
    Touch* reads_ = nullptr;
    std::map<uintptr_t, size_t> live_;   // start and bytes asked for
    std::map<uintptr_t, size_t> dead_;   // quarantined: start and bytes asked for
    std::map<uintptr_t, size_t> holes_;  // free ranges
    std::deque<Quarantined> quarantine_;
    size_t quarantined_ = 0, now_ = 0, peak_ = 0;
};

// A kernel's access to global memory: bounds, and in the checked variant initialisation. Fails the launch.
struct Thread;
void check_global(Thread&, uintptr_t address, size_t bytes, bool write, Site);

// Finds, in the checked variant, memory that one block writes and another touches in the same launch: its contents then
// depend on the order of blocks. A block that used an atomic in global memory is taken to know what it does.
void check_block_order(Thread&, uintptr_t address, size_t bytes, bool write, Site);

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
