// What kernels/common/device.cuh and ptx.cuh ask of the emulated device. Kernels never call this directly.
//
// A `Site` is the source line of the kernel that called a wrapper; error reports print it. Shared addresses are 32-bit
// offsets into the block's shared window, as PTX has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "../common/variant.h"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Site {
    const char* file;
    int line;
};

// The parts of a running thread and block that kernels read.
struct ThreadView {
    uint3 index;
    uint32_t linear;
    uint32_t lane;
    uint32_t warp;
};
struct BlockView {
    uint3 index;
    dim3 threads;
    dim3 blocks;
    uint32_t cluster_rank;
};
extern __thread ThreadView* current_thread;
extern __thread BlockView* current_block;

#if MMPO_CHECKED
// These are not inline, so that reading the emulated device's own variables is not instrumented.
uint3 thread_index();
uint32_t thread_lane();
uint32_t cluster_rank();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
#else
inline uint3 thread_index() { return current_thread->index; }
inline uint32_t thread_lane() { return current_thread->lane; }
inline uint32_t cluster_rank() { return current_block->cluster_rank; }
inline uint3 block_index() { return current_block->index; }
inline dim3 block_size() { return current_block->threads; }
inline dim3 grid_size() { return current_block->blocks; }
#endif

// Shared memory. `static_shared` gives every thread of the block the same array for one declaration (`key`).
unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment, Site);
uint32_t shared_address(const void* pointer, Site);

// Barriers of the block; `threads` 0 means every thread that has not exited.
void barrier_sync(uint32_t id, uint32_t threads, Site);
void barrier_arrive(uint32_t id, uint32_t threads, Site);
// The barrier of every thread of the cluster that has not exited. It orders what came before a fence_mbarrier_init.
void cluster_sync(Site);

// Warp collectives.
enum class Shuffle { index, up, down, butterfly };
enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };
void warp_sync(uint32_t mask, Site);
uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, int argument, int width, Site);
uint32_t ballot(uint32_t mask, bool predicate, Site);
bool elect(uint32_t mask, Site);
uint32_t reduce_u32(uint32_t mask, uint32_t value, Reduce operation, bool is_signed, Site);
void set_max_registers(int count, bool increase, Site);

// Matrix fragments.
void load_matrices(uint32_t* out, int count, bool transposed, uint32_t address, Site);
void store_matrices(uint32_t address, const uint32_t* values, int count, bool transposed, Site);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Site);

// Vector accesses of 4, 8 or 16 bytes, aligned to their size.
void load_vector(void* out, const void* source, int bytes, Site);
void store_vector(void* destination, const void* values, int bytes, Site);
void load_shared(void* out, uint32_t address, int bytes, Site);
void store_shared(uint32_t address, const void* values, int bytes, Site);

// cp.async: `source_bytes` are copied, the rest of `bytes` is zero-filled.
void copy_async(uint32_t destination, const void* source, int bytes, int source_bytes, Site);
void copy_async_commit(Site);
void copy_async_wait(int groups_left, Site);

// mbarrier.
void mbarrier_init(uint32_t address, uint32_t count, Site);
void mbarrier_invalidate(uint32_t address, Site);
void mbarrier_arrive(uint32_t address, uint32_t count, Site);
// Arrives at the mbarrier at the same address of another block of the cluster.
void mbarrier_arrive_at(uint32_t address, uint32_t rank, Site);
void mbarrier_expect_tx(uint32_t address, uint32_t bytes, Site);
bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site);
void fence_mbarrier_init(Site);
void fence_proxy_async(Site);
void fence_proxy_async_global();
void memory_fence();

// TMA.
struct Coordinates {
    int rank;
    int at[3];
    Coordinates(int x, int y) : rank(2), at{x, y, 0} {}
    Coordinates(int x, int y, int z) : rank(3), at{x, y, z} {}
};
enum class BulkStore { assign, add };
void tensor_load(uint32_t destination, const void* map, Coordinates, uint32_t mbarrier, Site);
// Loads to the same addresses of the blocks whose ranks are bits of `ranks`.
void tensor_load_multicast(uint32_t destination, const void* map, Coordinates, uint32_t mbarrier, uint32_t ranks, Site);
void tensor_store(const void* map, uint32_t source, Coordinates, BulkStore, Site);
void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Site);
void bulk_store(void* destination, uint32_t source, uint32_t bytes, BulkStore, Site);
void bulk_commit(Site);
void bulk_wait(int groups_left, bool read_only, Site);

// wgmma m64nNk16, bf16 to f32. `a_registers` null means A comes from `a_descriptor`.
struct WgmmaOperands {
    float* d;
    int n;
    const uint32_t* a_registers;
    uint64_t a_descriptor;
    uint64_t b_descriptor;
    bool accumulate;
    bool a_transposed;
    bool b_transposed;
};
void wgmma(const WgmmaOperands&, Site);
void wgmma_fence(Site);
void wgmma_commit(Site);
void wgmma_wait(int groups_left, Site);

// Atomics on 4 or 8 bytes. `replace` stores `next` if `seen` is still there, else updates `seen`.
uint64_t atomic_load(const void* pointer, int bytes, Site);
bool atomic_replace(void* pointer, uint64_t& seen, uint64_t next, int bytes);

// Turns of blocks at a counter in global memory: see ptx.cuh.
void wait_for_turn(const uint32_t* counter, uint32_t turn, Site);
void pass_turn(uint32_t* counter, uint32_t turn, Site);

// Host side.
int set_memory(void* destination, int value, size_t bytes);
int copy_memory(void* destination, const void* source, size_t bytes);
int multiprocessors();

using Entry = void (*)(const void* arguments);
struct Geometry {
    dim3 grid, block;
    size_t shared_bytes;
    unsigned cluster;  // blocks side by side along x that run together
};
int run_grid(const char* kernel, const Geometry&, Entry, const void* arguments, size_t size);

// Runs `kernel` over the grid. Arguments are converted once, as a CUDA launch does, and copied for every thread.
template <class... Parameters, class... Arguments>
int launch(const char* name, const Geometry& geometry, void (*kernel)(Parameters...), Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    };
    const Call call{kernel, {std::forward<Arguments>(arguments)...}};
    const Entry entry = [](const void* context) {
        const Call& call = *static_cast<const Call*>(context);
        std::apply(call.kernel, call.arguments);
    };
    return run_grid(name, geometry, entry, &call, sizeof call);
}

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a register holds at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
