/* The emulated device's C interface, for the Rust side and for tests. Plain C; both variants, each with its own state.
 *
 *   mmpo_emulated_*   the fast variant: functional tests, `--device emulated`
 *   mmpo_checked_*    the instrumented one: races, bounds, uninitialised memory, coalescing
 *
 * Functions return 0 or an error code; `last_error` has the text, which names the kernel, block, thread and source
 * line. An error ends the launch, never the process, and the device stays usable. Any host thread may call: launches of
 * one variant wait for one another, options and counters are common to all threads, `last_error` is the calling
 * thread's own.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* When asynchronous copies and wgmma take effect. */
enum mmpo_emulator_async {
    MMPO_EMULATOR_ASYNC_LATE = 0,  /* as late as the program allows: a forgotten wait reads old data */
    MMPO_EMULATOR_ASYNC_EARLY = 1, /* at once: a buffer reused too soon is overwritten */
    MMPO_EMULATOR_ASYNC_RANDOM = 2
};

enum mmpo_emulator_schedule {
    MMPO_EMULATOR_SCHEDULE_ORDERED = 0, /* blocks ascending, threads round-robin */
    MMPO_EMULATOR_SCHEDULE_RANDOM = 1   /* blocks permuted, warps and lanes drawn, by the seed */
};

struct mmpo_emulator_options {
    int32_t async;    /* enum mmpo_emulator_async */
    int32_t schedule; /* enum mmpo_emulator_schedule */
    uint64_t seed;
    int32_t host_threads;    /* 0: all cores. 1 makes a random schedule repeatable across blocks */
    int32_t multiprocessors; /* what a persistent kernel is told; 0: 4 */
    int32_t trace_accesses;  /* checked variant: count sectors and bank conflicts of plain loads and stores */
};

/* Sums over all launches since the last reset. */
struct mmpo_emulator_counters {
    uint64_t launches, blocks, switches, collectives, barriers, mbarrier_waits;
    uint64_t mma_operations, mma_flops, wgmma_operations, wgmma_flops;
    uint64_t matrix_rows_moved;     /* 8x8 matrices of ldmatrix and stmatrix */
    uint64_t matrix_bank_conflicts; /* extra passes of ldmatrix and stmatrix */
    uint64_t copy_async_bytes, tensor_load_bytes, tensor_store_bytes;
    uint64_t vector_load_bytes, vector_store_bytes; /* through load_128 and its like, in both variants */
    /* Checked variant only, all loads and stores of kernels. Sectors and wavefronts need `trace_accesses`. */
    uint64_t global_load_bytes, global_store_bytes, global_load_sectors, global_store_sectors;
    uint64_t shared_loads, shared_stores, shared_wavefronts, shared_wavefronts_ideal;
};

#define MMPO_DECLARE_EMULATOR(prefix)                                                                 \
    int prefix##_configure(const struct mmpo_emulator_options* options);                              \
    int prefix##_malloc(void** out, uint64_t bytes);                                                  \
    int prefix##_free(void* pointer);                                                                 \
    int prefix##_memset(void* destination, int value, uint64_t bytes);                                \
    int prefix##_upload(void* destination, const void* host_source, uint64_t bytes);                  \
    int prefix##_download(void* host_destination, const void* source, uint64_t bytes);                \
    int prefix##_copy(void* destination, const void* source, uint64_t bytes);                         \
    /* Verifies the guard bytes around every allocation; launches of the fast variant do so too. */   \
    int prefix##_synchronize(void);                                                                   \
    void prefix##_memory_use(uint64_t* now, uint64_t* peak);                                          \
    void prefix##_counters(struct mmpo_emulator_counters* out);                                       \
    void prefix##_reset_counters(void);                                                               \
    /* Text of this host thread's last failed call, "" if none. Valid until its next failing call. */ \
    const char* prefix##_last_error(void);

MMPO_DECLARE_EMULATOR(mmpo_emulated)
MMPO_DECLARE_EMULATOR(mmpo_checked)

#ifdef __cplusplus
}
#endif
