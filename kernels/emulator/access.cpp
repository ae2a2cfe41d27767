// Loads and stores of kernels: those that go through wrappers in both variants, and in the checked one all others,
// which the compiler's instrumentation hands over (see compile.rs).
#include <link.h>

#include <algorithm>

#include "block.h"
#include "device.h"
#include "memory.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

enum class Space { global, shared, own_stack, parameters, other_stack, program, host };

// Whether the address is in the program itself or a library: constant tables are.
bool in_program(uintptr_t address) {
    struct Query {
        uintptr_t address;
        bool found;
    } query{address, false};
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* context) {
            Query& query = *static_cast<Query*>(context);
            for (int i = 0; i < object->dlpi_phnum; ++i) {
                const auto& segment = object->dlpi_phdr[i];
                if (segment.p_type == PT_LOAD &&
                    query.address - (object->dlpi_addr + segment.p_vaddr) < segment.p_memsz)
                    query.found = true;
            }
            return int(query.found);
        },
        &query);
    return query.found;
}

Space classify(const Thread& thread, uintptr_t address) {
    const Block& block = *running;
    if (GlobalMemory::instance().owns(address)) return Space::global;
    if (address - uintptr_t(block.shared - kSharedGuard) < kSharedLimit + 2 * kSharedGuard) return Space::shared;
    const uintptr_t bottom = uintptr_t(block.stacks.bottom(thread.linear));
    if (address - bottom < StackSlab::kBytes) return Space::own_stack;
    if (address - uintptr_t(block.arguments) < block.argument_bytes) return Space::parameters;
    if (block.stacks.contains(address)) return Space::other_stack;
    return in_program(address) ? Space::program : Space::host;
}

// Distinct 32-byte sectors that a warp's access touches.
uint64_t count_sectors(const WarpAccess& access) {
    std::vector<uint64_t> sectors;
    for (int lane = 0; lane < 32; ++lane) {
        if ((access.lanes >> lane & 1u) == 0) continue;
        for (uint64_t sector = access.address[lane] / 32; sector <= (access.address[lane] + access.bytes - 1) / 32;
             ++sector)
            sectors.push_back(sector);
    }
    std::sort(sectors.begin(), sectors.end());
    return uint64_t(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
}

// The passes over shared memory that lanes [first, first + count) need: the most distinct words that any of the 32
// banks must deliver.
uint64_t count_wavefronts(const WarpAccess& access, int first, int count) {
    std::vector<uint64_t> words[32];
    for (int lane = first; lane < first + count; ++lane) {
        if ((access.lanes >> lane & 1u) == 0) continue;
        for (uint64_t word = access.address[lane] / 4; word <= (access.address[lane] + access.bytes - 1) / 4; ++word) {
            std::vector<uint64_t>& bank = words[word % 32];
            if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    return most;
}

void count_access(Counters& counters, const WarpAccess& access) {
    if (!access.shared) {
        (access.write ? counters.global_store_sectors : counters.global_load_sectors) += count_sectors(access);
        return;
    }
    // A pass moves at most 128 bytes: 32 lanes of 4 bytes, 16 of 8, or 8 of 16.
    const int lanes = access.bytes >= 16 ? 8 : access.bytes == 8 ? 16 : 32;
    for (int first = 0; first < 32; first += lanes) {
        const uint64_t wavefronts = count_wavefronts(access, first, lanes);
        counters.shared_wavefronts += wavefronts;
        counters.shared_wavefronts_ideal += wavefronts != 0;
    }
}

// Joins the lanes' accesses by one source line, each lane's n-th pass over it, into one access of the warp.
void trace(Thread& thread, uintptr_t address, uint32_t bytes, bool write, bool shared, Site site) {
    const uint64_t line = PackedSite(site).bits() << 1 | uint64_t(write);
    const uint32_t visit = thread.visits[line]++;
    WarpTrace& open = running->traces[thread.warp];
    const auto found = open.try_emplace({line, visit}).first;
    WarpAccess& access = found->second;
    access.lanes |= 1u << thread.lane;
    access.address[thread.lane] = address;
    access.bytes = uint8_t(std::min(bytes, 255u));
    access.write = write;
    access.shared = shared;
    if (access.lanes != running->warps[thread.warp].alive) return;
    count_access(running->counters, access);
    open.erase(found);
}

void check_local(Thread& thread, uintptr_t address, uint32_t bytes, bool write, Site site) {
    const char* what = watched_accumulator(thread, address, bytes, write);
    if (what != nullptr)
        fail(site, "%s %s before the wgmma.wait_group that completes it", write ? "overwrites" : "reads", what);
}

void check_access(uintptr_t address, uint32_t bytes, bool write, Site site) {
    Thread& thread = self();
    Counters& counters = running->counters;
    const Space space = classify(thread, address);
    switch (space) {
        case Space::own_stack:
            return check_local(thread, address, bytes, write, site);
        case Space::global:
            check_global(thread, address, bytes, write, site);
            check_block_order(thread, address, bytes, write, site);
            (write ? counters.global_store_bytes : counters.global_load_bytes) += bytes;
            break;
        case Space::shared: {
            const uint32_t offset = uint32_t(address - uintptr_t(running->shared));
            // An offset before the start has wrapped round.
            if (offset > kSharedLimit || offset + bytes > kSharedLimit)
                fail(site, "%s %u bytes at shared offset %d, out of bounds", write ? "writes" : "reads", bytes,
                     int(offset));
            check_shared(thread, offset, bytes, write, site);
            ++(write ? counters.shared_stores : counters.shared_loads);
            break;
        }
        case Space::parameters:
            if (write) fail(site, "writes to the kernel's parameters");
            return;
        case Space::other_stack:
            fail(site, "%s the local memory of another thread", write ? "writes" : "reads");
        case Space::program:
            if (write)
                fail(site, "writes %u bytes at %p, a constant or variable of the program", bytes,
                     reinterpret_cast<void*>(address));
            return;
        case Space::host:
            fail(site, "%s %u bytes at %p, which is no memory of the device", write ? "writes" : "reads", bytes,
                 reinterpret_cast<void*>(address));
    }
    if (options.trace_accesses != 0) trace(thread, address, bytes, write, space == Space::shared, site);
}

void check_vector(const void* pointer, int bytes, const char* what, Site site) {
    if (uintptr_t(pointer) % size_t(bytes) != 0) fail(site, "%s of %d bytes at %p is misaligned", what, bytes, pointer);
}

}  // namespace

void finish_traces(Block& block) {
    for (const WarpTrace& trace : block.traces) {
        for (const auto& [key, access] : trace) count_access(block.counters, access);
    }
}

void load_vector(void* out, const void* source, int bytes, Site site) {
    check_vector(source, bytes, "load", site);
    if (kChecked) check_access(uintptr_t(source), uint32_t(bytes), false, site);
    running->counters.vector_load_bytes += uint64_t(bytes);
    memcpy(out, source, size_t(bytes));
}

void store_vector(void* destination, const void* values, int bytes, Site site) {
    check_vector(destination, bytes, "store", site);
    if (kChecked) check_access(uintptr_t(destination), uint32_t(bytes), true, site);
    running->counters.vector_store_bytes += uint64_t(bytes);
    memcpy(destination, values, size_t(bytes));
}

void load_shared(void* out, uint32_t address, int bytes, Site site) {
    const unsigned char* from = shared_storage(address, uint32_t(bytes), uint32_t(bytes), "ld.shared", site);
    if (kChecked) check_access(uintptr_t(from), uint32_t(bytes), false, site);
    memcpy(out, from, size_t(bytes));
}

void store_shared(uint32_t address, const void* values, int bytes, Site site) {
    unsigned char* to = shared_storage(address, uint32_t(bytes), uint32_t(bytes), "st.shared", site);
    if (kChecked) check_access(uintptr_t(to), uint32_t(bytes), true, site);
    memcpy(to, values, size_t(bytes));
}

// Atomics are ordered among themselves, so only bounds and initialisation are looked at.
uint64_t atomic_load(const void* pointer, int bytes, Site site) {
    check_vector(pointer, bytes, "atomic", site);
    const uintptr_t address = uintptr_t(pointer);
    const Space space = classify(self(), address);
    if (space != Space::global && space != Space::shared)
        fail(site, "atomic on %p, which is neither global nor shared memory", pointer);
    if (kChecked && space == Space::global) {
        running->uses_global_atomics = true;
        check_global(self(), address, size_t(bytes), false, site);
    }
    if (kChecked && space == Space::shared)
        require_shared_written(self(), uint32_t(address - uintptr_t(running->shared)), uint32_t(bytes), site);
    if (bytes == 8) return __atomic_load_n(static_cast<const uint64_t*>(pointer), __ATOMIC_RELAXED);
    return __atomic_load_n(static_cast<const uint32_t*>(pointer), __ATOMIC_RELAXED);
}

bool atomic_replace(void* pointer, uint64_t& seen, uint64_t next, int bytes) {
    if (bytes == 8)
        return __atomic_compare_exchange_n(static_cast<uint64_t*>(pointer), &seen, next, false, __ATOMIC_ACQ_REL,
                                           __ATOMIC_RELAXED);
    uint32_t low = uint32_t(seen);
    const bool replaced = __atomic_compare_exchange_n(static_cast<uint32_t*>(pointer), &low, uint32_t(next), false,
                                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    seen = low;
    return replaced;
}

#if MMPO_CHECKED
uint3 thread_index() { return current_thread->index; }
uint32_t thread_lane() { return current_thread->lane; }
uint32_t cluster_rank() { return current_block->cluster_rank; }
uint3 block_index() { return current_block->index; }
dim3 block_size() { return current_block->threads; }
dim3 grid_size() { return current_block->blocks; }
#endif

void memory_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo

#if MMPO_CHECKED

// What instrumented kernels call. compile.rs renames the compiler's `__tsan_*` (g++), `__asan_*` (clang) and
// `__ubsan_*` calls to these and adds the source line in the argument registers after their own: the third and fourth
// for most.
using namespace mmpo::emulated;

namespace {
void instrumented(const void* address, size_t bytes, bool write, const char* file, int line) {
    if (current_thread != nullptr && bytes != 0)
        check_access(uintptr_t(address), uint32_t(bytes), write, Site{file, line});
}
}  // namespace

#define MMPO_ACCESS(name, bytes, write)                                                             \
    extern "C" void mmpo_checked_access_##name(void* address, size_t, int line, const char* file) { \
        instrumented(address, bytes, write, file, line);                                            \
    }
#define MMPO_ACCESSES(bytes)                         \
    MMPO_ACCESS(read##bytes, bytes, false)           \
    MMPO_ACCESS(write##bytes, bytes, true)           \
    MMPO_ACCESS(unaligned_read##bytes, bytes, false) \
    MMPO_ACCESS(unaligned_write##bytes, bytes, true) \
    MMPO_ACCESS(volatile_read##bytes, bytes, false)  \
    MMPO_ACCESS(volatile_write##bytes, bytes, true)  \
    MMPO_ACCESS(load##bytes##_noabort, bytes, false) \
    MMPO_ACCESS(store##bytes##_noabort, bytes, true)
MMPO_ACCESSES(1)
MMPO_ACCESSES(2)
MMPO_ACCESSES(4)
MMPO_ACCESSES(8)
MMPO_ACCESSES(16)

extern "C" {

void mmpo_checked_access_loadN_noabort(void* address, size_t bytes, int line, const char* file) {
    instrumented(address, bytes, false, file, line);
}
void mmpo_checked_access_storeN_noabort(void* address, size_t bytes, int line, const char* file) {
    instrumented(address, bytes, true, file, line);
}
void mmpo_checked_access_handle_no_return() {}

void mmpo_checked_access_init() {}
void mmpo_checked_access_func_entry(void*) {}
void mmpo_checked_access_func_exit() {}

void mmpo_checked_access_read_range(void* address, size_t bytes, int line, const char* file) {
    instrumented(address, bytes, false, file, line);
}
void mmpo_checked_access_write_range(void* address, size_t bytes, int line, const char* file) {
    instrumented(address, bytes, true, file, line);
}

// Blocks that kernels copy or fill. Launchers do so too, hence the real work is done here.
void* mmpo_checked_access_memcpy(void* to, const void* from, size_t bytes, int line, const char* file) {
    instrumented(from, bytes, false, file, line);
    instrumented(to, bytes, true, file, line);
    return memcpy(to, from, bytes);
}
void* mmpo_checked_access_memmove(void* to, const void* from, size_t bytes, int line, const char* file) {
    instrumented(from, bytes, false, file, line);
    instrumented(to, bytes, true, file, line);
    return memmove(to, from, bytes);
}
void* mmpo_checked_access_memset(void* to, int value, size_t bytes, int line, const char* file) {
    instrumented(to, bytes, true, file, line);
    return memset(to, value, bytes);
}

// The guard of a function's static variable, in a launcher.
uint8_t mmpo_checked_access_atomic8_load(const volatile uint8_t* address, int) {
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

}  // extern "C"

#endif
