// Every inline PTX instruction of the program: one wrapper each, beside its emulated twin. No logic lives here.
//
// Shared addresses are the 32-bit ones of `shared_address`. Instructions marked sm_90 exist only where MMPO_SM90 is
// set; elsewhere their wrapper traps, so that one file compiles for every target. Names follow the PTX ISA.
#pragma once

#include "device.cuh"

// PTX_TWIN(emulated call, asm statement); PTX90_TWIN for instructions of sm_90a.
#if MMPO_EMULATED
#define PTX_TWIN(twin, ...) twin
#define PTX90_TWIN(twin, ...) twin
#elif MMPO_SM90
#define PTX_TWIN(twin, ...) __VA_ARGS__
#define PTX90_TWIN(twin, ...) __VA_ARGS__
#else
#define PTX_TWIN(twin, ...) __VA_ARGS__
#define PTX90_TWIN(twin, ...) __trap()
#endif

namespace mmpo {
inline namespace MMPO_VARIANT {

// ---- registers and numbers

DEVICE uint32_t lane_id() { return PTX_TWIN(emulated::thread_lane(), threadIdx.x & 31u); }

// The address of `pointer` in the block's shared window.
DEVICE uint32_t shared_address(const void* pointer MMPO_SITE) {
    return PTX_TWIN(emulated::shared_address(pointer, site), uint32_t(__cvta_generic_to_shared(pointer)));
}

// Rounds both values to nearest even; `low` goes to bits 0..15.
DEVICE uint32_t pack_bf16x2(float low, float high) {
    uint32_t pair;
    PTX_TWIN(pair = uint32_t(to_bf16(low).bits) | uint32_t(to_bf16(high).bits) << 16,
             asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)));
    return pair;
}

#if MMPO_EMULATED
inline float flush_subnormal(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
#endif

// 2^x with a relative error of about 2^-22. Subnormals are flushed to zero.
DEVICE float exp2_approx(float x) {
    float result;
    PTX_TWIN(result = flush_subnormal(exp2f(flush_subnormal(x))),
             asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x)));
    return result;
}

// log2(x) with an absolute error of about 2^-22 near 1.
DEVICE float log2_approx(float x) {
    float result;
    PTX_TWIN(result = log2f(flush_subnormal(x)), asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x)));
    return result;
}

// 1/x with an error of one unit in the last place.
DEVICE float rcp_approx(float x) {
    float result;
    PTX_TWIN(result = flush_subnormal(1.0f / flush_subnormal(x)),
             asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x)));
    return result;
}

// 1/sqrt(x) with a relative error of about 2^-22.
DEVICE float rsqrt_approx(float x) {
    float result;
    PTX_TWIN(result = 1.0f / sqrtf(flush_subnormal(x)), asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x)));
    return result;
}

// ---- vector accesses

// Loads 16 bytes of global memory, 16-byte aligned.
DEVICE uint4 load_128(const void* source MMPO_SITE) {
    uint4 v;
    PTX_TWIN(emulated::load_vector(&v, source, 16, site),
             asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z),
                          "=r"(v.w) : "l"(source) : "memory"));
    return v;
}

// As load_128, but not kept in L1: for data that no one writes during the kernel and that is read once.
DEVICE uint4 load_128_streaming(const void* source MMPO_SITE) {
    uint4 v;
    PTX_TWIN(emulated::load_vector(&v, source, 16, site),
             asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y),
                          "=r"(v.z), "=r"(v.w) : "l"(source)));
    return v;
}

DEVICE void store_128(void* destination, uint4 v MMPO_SITE) {
    PTX_TWIN(emulated::store_vector(destination, &v, 16, site),
             asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(v.x), "r"(v.y), "r"(v.z),
                          "r"(v.w) : "memory"));
}

// As store_128, but first to be evicted: for outputs larger than L2.
DEVICE void store_128_streaming(void* destination, uint4 v MMPO_SITE) {
    PTX_TWIN(emulated::store_vector(destination, &v, 16, site),
             asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(v.x), "r"(v.y),
                          "r"(v.z), "r"(v.w) : "memory"));
}

DEVICE uint4 load_shared_128(uint32_t address MMPO_SITE) {
    uint4 v;
    PTX_TWIN(emulated::load_shared(&v, address, 16, site),
             asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z),
                          "=r"(v.w) : "r"(address) : "memory"));
    return v;
}

DEVICE float2 load_shared_f32x2(uint32_t address MMPO_SITE) {
    float2 v;
    PTX_TWIN(emulated::load_shared(&v, address, 8, site),
             asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory"));
    return v;
}

DEVICE void store_shared_128(uint32_t address, uint4 v MMPO_SITE) {
    PTX_TWIN(emulated::store_shared(address, &v, 16, site),
             asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
                          "r"(v.w) : "memory"));
}

DEVICE void store_shared_64(uint32_t address, uint2 v MMPO_SITE) {
    PTX_TWIN(emulated::store_shared(address, &v, 8, site),
             asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory"));
}

DEVICE void store_shared_32(uint32_t address, uint32_t v MMPO_SITE) {
    PTX_TWIN(emulated::store_shared(address, &v, 4, site),
             asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"));
}

DEVICE void store_shared_16(uint32_t address, uint16_t v MMPO_SITE) {
    PTX_TWIN(emulated::store_shared(address, &v, 2, site),
             asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory"));
}

// ---- matrix fragments

// Load and store 8x8 matrices of 16-bit values. Lanes 8i..8i+7 give the addresses of the rows of matrix i, 16-byte
// aligned.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address MMPO_SITE) {
    PTX_TWIN(emulated::load_matrices(r, 4, false, address, site),
             asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                          "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory"));
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address MMPO_SITE) {
    PTX_TWIN(emulated::load_matrices(r, 4, true, address, site),
             asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                          "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory"));
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address MMPO_SITE) {
    PTX_TWIN(emulated::load_matrices(r, 2, false, address, site),
             asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                          "=r"(r[1]) : "r"(address) : "memory"));
}

DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t address MMPO_SITE) {
    PTX_TWIN(emulated::load_matrices(r, 2, true, address, site),
             asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                          "=r"(r[1]) : "r"(address) : "memory"));
}

// sm_90. The inverse of ldmatrix.
DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4] MMPO_SITE) {
    PTX90_TWIN(emulated::store_matrices(address, r, 4, false, site),
               asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                            "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}

DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4] MMPO_SITE) {
    PTX90_TWIN(emulated::store_matrices(address, r, 4, true, site),
               asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                            "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}

DEVICE void stmatrix_x2(uint32_t address, const uint32_t (&r)[2] MMPO_SITE) {
    PTX90_TWIN(emulated::store_matrices(address, r, 2, false, site),
               asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]),
                            "r"(r[1]) : "memory"));
}

DEVICE void stmatrix_x2_trans(uint32_t address, const uint32_t (&r)[2] MMPO_SITE) {
    PTX90_TWIN(emulated::store_matrices(address, r, 2, true, site),
               asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]),
                            "r"(r[1]) : "memory"));
}

// d[16, 8] += a[16, 16] * b[16, 8], bf16 operands, f32 accumulators.
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] MMPO_SITE) {
    PTX_TWIN(emulated::mma_m16n8k16_bf16(d, a, b, site),
             asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                          "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                          "r"(b[1])));
}

// ---- asynchronous copies, sm_80

// Copies 16 bytes from global to shared memory, both 16-byte aligned. Where not `valid`, writes zeros instead; `source`
// is not read then, but must still be an address inside the allocation.
DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid MMPO_SITE) {
    PTX_TWIN(emulated::copy_async(destination, source, 16, valid ? 16 : 0, site),
             asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                          "r"(valid ? 16 : 0) : "memory"));
}

DEVICE void cp_async_commit(MMPO_SITE_ONLY) {
    PTX_TWIN(emulated::copy_async_commit(site), asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Waits until at most `kGroupsLeft` of this thread's newest groups have not finished.
template <int kGroupsLeft>
DEVICE void cp_async_wait(MMPO_SITE_ONLY) {
    PTX_TWIN(emulated::copy_async_wait(kGroupsLeft, site),
             asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory"));
}

// ---- named barriers

// Barrier `id` (1..15; 0 is __syncthreads') for `threads` threads, a multiple of 32.
DEVICE void bar_sync(uint32_t id, uint32_t threads MMPO_SITE) {
    PTX_TWIN(emulated::barrier_sync(id, threads, site),
             asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

DEVICE void bar_arrive(uint32_t id, uint32_t threads MMPO_SITE) {
    PTX_TWIN(emulated::barrier_arrive(id, threads, site),
             asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// ---- mbarriers, sm_90

DEVICE void mbarrier_init(uint32_t address, uint32_t count MMPO_SITE) {
    PTX90_TWIN(emulated::mbarrier_init(address, count, site),
               asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory"));
}

DEVICE void mbarrier_invalidate(uint32_t address MMPO_SITE) {
    PTX90_TWIN(emulated::mbarrier_invalidate(address, site),
               asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(address) : "memory"));
}

// Makes initialised mbarriers visible to the async proxy and to the cluster; a __syncthreads or cluster_sync follows.
DEVICE void fence_mbarrier_init(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::fence_mbarrier_init(site), asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

DEVICE void mbarrier_arrive(uint32_t address MMPO_SITE) {
    PTX90_TWIN(emulated::mbarrier_arrive(address, 1, site),
               asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory"));
}

// Arrives at the mbarrier at the same address of block `rank` of the cluster. This tells the other block that the
// thread no longer uses shared memory that the other block's copies will overwrite. It does not make ordinary stores
// visible there: `.release.cluster` would, at the price of a fence of the whole GPU at every arrival.
DEVICE void mbarrier_arrive_at(uint32_t address, uint32_t rank MMPO_SITE) {
    PTX90_TWIN(emulated::mbarrier_arrive_at(address, rank, site),
               asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                            "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(address),
                            "r"(rank) : "memory"));
}

// Arrives if `arrives`, without a branch. Compilers would have to keep the accumulators of running wgmmas across a
// branch.
DEVICE void mbarrier_arrive_if(uint32_t address, bool arrives MMPO_SITE) {
    PTX90_TWIN(
        arrives ? emulated::mbarrier_arrive(address, 1, site) : void(),
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(address),
            "r"(int(arrives)) : "memory"));
}

DEVICE void mbarrier_expect_tx(uint32_t address, uint32_t bytes MMPO_SITE) {
    PTX90_TWIN(
        emulated::mbarrier_expect_tx(address, bytes, site),
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(bytes) : "memory"));
}

DEVICE void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes MMPO_SITE) {
    PTX90_TWIN(
        (emulated::mbarrier_expect_tx(address, bytes, site), emulated::mbarrier_arrive(address, 1, site)),
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory"));
}

DEVICE bool mbarrier_test_wait(uint32_t address, uint32_t parity MMPO_SITE) {
    uint32_t done = 0;
    PTX90_TWIN(
        done = emulated::mbarrier_test_wait(address, parity, site),
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(
                done) : "r"(address),
            "r"(parity) : "memory"));
    return done != 0;
}

// May return false after a hardware-defined time although nothing is wrong, so call it in a loop, or use mbarrier_wait.
DEVICE bool mbarrier_try_wait(uint32_t address, uint32_t parity MMPO_SITE) {
    uint32_t done = 0;
    PTX90_TWIN(
        done = emulated::mbarrier_try_wait(address, parity, site),
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(
                done) : "r"(address),
            "r"(parity) : "memory"));
    return done != 0;
}

// Waits until the phase with this parity is complete: parity 0 for the first phase, then alternating.
DEVICE void mbarrier_wait(uint32_t address, uint32_t parity MMPO_SITE) {
    while (!mmpo::mbarrier_try_wait(address, parity MMPO_PASS_SITE)) {
    }
}

// Orders this thread's earlier ordinary accesses of shared memory before later ones of the async proxy (TMA, wgmma).
DEVICE void fence_proxy_async(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::fence_proxy_async(site), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// The same for global memory: orders another block's accesses before later ones of the async proxy.
DEVICE void fence_proxy_async_global() {
    PTX90_TWIN(emulated::fence_proxy_async_global(), asm volatile("fence.proxy.async.global;" :: : "memory"));
}

// ---- turns between blocks
//
// A counter in global memory, zero before the launch, orders what blocks do to the memory that it guards: turn 0, then
// turn 1, and so on. A block that waits keeps its place on the GPU, so it may wait only for blocks that are certain to
// have started. Give out work by tickets (an atomic counter), and let a ticket depend only on earlier ones.

#if !MMPO_EMULATED
DEVICE uint32_t load_acquire(const uint32_t* source) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(source) : "memory");
    return v;
}

DEVICE void store_release(uint32_t* destination, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(destination), "r"(v) : "memory");
}
#endif

// Waits until the counter stands at `turn`. Call in one thread; a barrier then orders the block's other threads.
DEVICE void wait_for_turn(const uint32_t* counter, uint32_t turn MMPO_SITE) {
#if MMPO_EMULATED
    emulated::wait_for_turn(counter, turn, site);
#else
    while (load_acquire(counter) != turn) __nanosleep(32);
#endif
}

// Lets the next turn begin. Call in one thread, after a barrier that follows the accesses of the block's other threads,
// and after bulk_wait<0> if the thread stored in bulk.
DEVICE void pass_turn(uint32_t* counter, uint32_t turn MMPO_SITE) {
    PTX_TWIN(emulated::pass_turn(counter, turn, site), store_release(counter, turn + 1));
}

// ---- tensor memory accelerator, sm_90

DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
    PTX90_TWIN((void)map, asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

// Copies a box of `map` at element coordinates (x, y[, z]) to 128-byte aligned shared memory. The bytes complete on
// `mbarrier`.
DEVICE void tma_load_2d(uint32_t destination, const CUtensorMap* map, int x, int y, uint32_t mbarrier MMPO_SITE) {
    PTX90_TWIN(emulated::tensor_load(destination, map, emulated::Coordinates(x, y), mbarrier, site),
               asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
                            "l"(map), "r"(x), "r"(y), "r"(mbarrier) : "memory"));
}

DEVICE void tma_load_3d(uint32_t destination, const CUtensorMap* map, int x, int y, int z,
                        uint32_t mbarrier MMPO_SITE) {
    PTX90_TWIN(emulated::tensor_load(destination, map, emulated::Coordinates(x, y, z), mbarrier, site),
               asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                            "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(destination),
                            "l"(map), "r"(x), "r"(y), "r"(z), "r"(mbarrier) : "memory"));
}

// As tma_load_2d, to the same address of every block of the cluster whose rank is a bit of `ranks`. In each of them the
// bytes complete on the mbarrier at the same address.
DEVICE void tma_load_2d_multicast(uint32_t destination, const CUtensorMap* map, int x, int y, uint32_t mbarrier,
                                  uint16_t ranks MMPO_SITE) {
    PTX90_TWIN(
        emulated::tensor_load_multicast(destination, map, emulated::Coordinates(x, y), mbarrier, ranks, site),
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(destination),
            "l"(map), "r"(x), "r"(y), "r"(mbarrier), "h"(ranks) : "memory"));
}

// Copies a box from shared memory. Parts outside the tensor are not written. Needs bulk_commit, and a wait before the
// shared memory is reused.
DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t source, int x, int y MMPO_SITE) {
    PTX90_TWIN(
        emulated::tensor_store(map, source, emulated::Coordinates(x, y), emulated::BulkStore::assign, site),
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                     "r"(source), "r"(x), "r"(y) : "memory"));
}

DEVICE void tma_store_3d(const CUtensorMap* map, uint32_t source, int x, int y, int z MMPO_SITE) {
    PTX90_TWIN(
        emulated::tensor_store(map, source, emulated::Coordinates(x, y, z), emulated::BulkStore::assign, site),
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(source), "r"(x), "r"(y), "r"(z) : "memory"));
}

// As the stores, but adds. The order in which several blocks add to one element is not fixed.
DEVICE void tma_reduce_add_2d(const CUtensorMap* map, uint32_t source, int x, int y MMPO_SITE) {
    PTX90_TWIN(
        emulated::tensor_store(map, source, emulated::Coordinates(x, y), emulated::BulkStore::add, site),
        asm volatile(
            "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
            "r"(source), "r"(x), "r"(y) : "memory"));
}

DEVICE void tma_reduce_add_3d(const CUtensorMap* map, uint32_t source, int x, int y, int z MMPO_SITE) {
    PTX90_TWIN(
        emulated::tensor_store(map, source, emulated::Coordinates(x, y, z), emulated::BulkStore::add, site),
        asm volatile(
            "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                map),
            "r"(source), "r"(x), "r"(y), "r"(z) : "memory"));
}

// Copies `bytes` (a multiple of 16) of contiguous memory, 16-byte aligned on both sides.
DEVICE void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier MMPO_SITE) {
    PTX90_TWIN(
        emulated::bulk_load(destination, source, bytes, mbarrier, site),
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         destination),
                     "l"(source), "r"(bytes), "r"(mbarrier) : "memory"));
}

// The other direction. Needs bulk_commit, and a wait before the shared memory is reused.
DEVICE void bulk_store(void* destination, uint32_t source, uint32_t bytes MMPO_SITE) {
    PTX90_TWIN(emulated::bulk_store(destination, source, bytes, emulated::BulkStore::assign, site),
               asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
                            "r"(source), "r"(bytes) : "memory"));
}

// As bulk_store, but adds f32 values to those in place. Subnormal values and sums count as zero.
DEVICE void bulk_add_f32(float* destination, uint32_t source, uint32_t bytes MMPO_SITE) {
    PTX90_TWIN(
        emulated::bulk_store(destination, source, bytes, emulated::BulkStore::add, site),
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
                     "r"(source), "r"(bytes) : "memory"));
}

DEVICE void bulk_commit(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::bulk_commit(site), asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}

// Waits until the writes of all but the newest kGroupsLeft groups are visible to this thread.
template <int kGroupsLeft>
DEVICE void bulk_wait(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::bulk_wait(kGroupsLeft, false, site),
               asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsLeft) : "memory"));
}

// Waits until the sources of all but the newest kGroupsLeft groups have been read, so that shared memory may be reused.
template <int kGroupsLeft>
DEVICE void bulk_wait_read(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::bulk_wait(kGroupsLeft, true, site),
               asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory"));
}

// ---- clusters, sm_90

// The rank of the calling block in its cluster.
DEVICE uint32_t cluster_rank() {
    uint32_t rank = 0;
    PTX90_TWIN(rank = emulated::cluster_rank(), asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
    return rank;
}

// Waits for all threads of the cluster that have not exited. It orders mbarriers that were initialised before
// fence_mbarrier_init, and nothing else: a full release would wait until every store of the block has reached the whole
// GPU. A block must not exit while others may still access its shared memory.
DEVICE void cluster_sync(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::cluster_sync(site), asm volatile("barrier.cluster.arrive.relaxed;\n"
                                                          "barrier.cluster.wait;" :: : "memory"));
}

// ---- warps and warpgroups

// sm_90. True in one lane of a converged warp.
DEVICE bool elect_one(MMPO_SITE_ONLY) {
    uint32_t elected = 0;
    PTX90_TWIN(elected = emulated::elect(0xffffffffu, site),
               asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected)));
    return elected != 0;
}

// sm_90. Gives registers back to the block's pool, or takes some from it, until a thread has kRegisters (a multiple of
// 8). All warps of a warpgroup call it.
template <int kRegisters>
DEVICE void setmaxnreg_decrease(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::set_max_registers(kRegisters, false, site),
               asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

template <int kRegisters>
DEVICE void setmaxnreg_increase(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::set_max_registers(kRegisters, true, site),
               asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo

#include "ptx_wgmma.cuh"
