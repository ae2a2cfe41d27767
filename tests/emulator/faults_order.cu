// Planted faults of ordering on every GPU: barriers, collectives, races, cp.async. `// FAULT name` marks the line a report
// must name.
#include "harness.h"

using namespace mmpo::test;

namespace {

constexpr int kThreads = 64;

__global__ void reverse_kernel(float* out, bool sync) {
    DYNAMIC_SHARED(raw);
    float* shared = reinterpret_cast<float*>(raw);
    shared[threadIdx.x] = float(threadIdx.x);
    if (sync) __syncthreads();
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];  // FAULT missing_syncthreads
}

CASE(missing_syncthreads) {
    DeviceArray<float> out(kThreads);
    std::vector<float> expected = iota(kThreads);
    for (int i = 0; i < kThreads; ++i) expected[size_t(i)] = float(kThreads - 1 - i);
    return outcome(LAUNCH(reverse_kernel, dim3(1), dim3(kThreads), kThreads * 4, nullptr, out.data(), !bug), out, expected);
}

// The write of the second round must wait for the reads of the first.
__global__ void reuse_kernel(float* out, bool sync) {
    DYNAMIC_SHARED(raw);
    float* shared = reinterpret_cast<float*>(raw);
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        shared[threadIdx.x] = float(threadIdx.x);  // FAULT write_after_read
        __syncthreads();
        sum += shared[(threadIdx.x + 32) % kThreads];  // FAULT write_after_read
        if (sync) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

CASE(write_after_read) {
    DeviceArray<float> out(kThreads);
    std::vector<float> expected(kThreads);
    for (int i = 0; i < kThreads; ++i) expected[size_t(i)] = float(2 * ((i + 32) % kThreads));
    return outcome(LAUNCH(reuse_kernel, dim3(1), dim3(kThreads), kThreads * 4, nullptr, out.data(), !bug), out, expected);
}

__global__ void overwrite_kernel(float* out, bool sync) {
    SHARED_ARRAY(float, shared, kThreads);
    shared[threadIdx.x] = float(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
    if (sync) __syncthreads();
    shared[threadIdx.x] = -1.0f;  // FAULT overwritten_too_soon
}

CASE(overwritten_too_soon) {
    DeviceArray<float> out(kThreads);
    std::vector<float> expected(kThreads);
    for (int i = 0; i < kThreads; ++i) expected[size_t(i)] = float((i + 32) % kThreads);
    return outcome(LAUNCH(overwrite_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), !bug), out, expected);
}

__global__ void two_writers_kernel(float* out, bool one) {
    SHARED_ARRAY(float, total, 1);
    if (threadIdx.x % 32 == 0 && (threadIdx.x == 0 || !one)) total[0] = 1.0f + float(threadIdx.x);  // FAULT two_writers
    __syncthreads();
    out[threadIdx.x] = total[0];
}

CASE(two_writers) {
    DeviceArray<float> out(kThreads);
    return outcome(LAUNCH(two_writers_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), !bug), out, std::vector<float>(kThreads, 1.0f));
}

__global__ void exchange_in_warp_kernel(float* out, bool sync) {
    SHARED_ARRAY(float, shared, 32);
    shared[threadIdx.x] = float(threadIdx.x);
    if (sync) __syncwarp();
    out[threadIdx.x] = shared[threadIdx.x ^ 1];  // FAULT missing_syncwarp
}

CASE(missing_syncwarp) {
    DeviceArray<float> out(32);
    std::vector<float> expected(32);
    for (int i = 0; i < 32; ++i) expected[size_t(i)] = float(i ^ 1);
    return outcome(LAUNCH(exchange_in_warp_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), !bug), out, expected);
}

__global__ void exited_lane_kernel(float* out, bool leave) {
    if (leave && threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, float(threadIdx.x), 0);  // FAULT exited_lane
}

CASE(exited_lane) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(exited_lane_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug), out, iota(32));
}

__global__ void divergent_kernel(float* out, bool diverge) {
    float value = float(threadIdx.x);
    if (!diverge || threadIdx.x < 16)
        value = __shfl_sync(0xffffffffu, value, int(threadIdx.x));
    else
        value = float(__ballot_sync(0xffffffffu, true));  // FAULT divergent_collective
    out[threadIdx.x] = value;
}

CASE(divergent_collective) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(divergent_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug), out, iota(32));
}

__global__ void outside_mask_kernel(float* out, int lane) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = __shfl_sync(0xffffu, float(threadIdx.x), lane);  // FAULT shuffle_outside_mask
}

CASE(shuffle_outside_mask) {
    DeviceArray<float> out(16);
    return outcome(LAUNCH(outside_mask_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), bug ? 20 : 3), out, std::vector<float>(16, 3.0f));
}

__global__ void half_barrier_kernel(float* out, bool all) {
    if (all || threadIdx.x < 32) __syncthreads();  // FAULT barrier_deadlock
    if (!all && threadIdx.x >= 32) bar_sync(1, 64);
    out[threadIdx.x] = float(threadIdx.x);
}

CASE(barrier_deadlock) {
    DeviceArray<float> out(kThreads);
    return outcome(LAUNCH(half_barrier_kernel, dim3(1), dim3(kThreads), 0, nullptr, out.data(), !bug), out, iota(kThreads));
}

// One warp produces, another consumes, a third has nothing to do with it.
__global__ void named_barrier_kernel(float* out, uint32_t consumer_count) {
    SHARED_ARRAY(float, shared, 32);
    const uint32_t t = threadIdx.x;
    if (t < 32) {
        shared[t] = float(t);
        bar_arrive(1, 64);
    } else if (t < 64) {
        bar_sync(1, consumer_count);  // FAULT named_barrier_count
        out[t - 32] = shared[t - 32];
    }
}

CASE(named_barrier_count) {
    DeviceArray<float> out(32);
    return outcome(LAUNCH(named_barrier_kernel, dim3(1), dim3(96), 0, nullptr, out.data(), bug ? 96u : 64u), out, iota(32));
}

struct CopyFaults {
    bool commit, wait, sync;
};
__global__ void copy_async_kernel(float* out, const float* in, CopyFaults keep) {
    DYNAMIC_SHARED(raw);
    const float* shared = reinterpret_cast<const float*>(raw);
    cp_async_16(shared_address(raw) + threadIdx.x * 16, in + threadIdx.x * 4, true);  // FAULT missing_copy_wait missing_copy_commit
    if (keep.commit) cp_async_commit();
    if (keep.wait) cp_async_wait<0>();
    if (keep.sync) __syncthreads();
    for (int i = 0; i < 4; ++i) out[i * kThreads + threadIdx.x] = shared[i * kThreads + threadIdx.x];  // FAULT missing_copy_sync
}

std::string run_copy_async(CopyFaults keep) {
    DeviceArray<float> in(iota(4 * kThreads)), out(4 * kThreads);
    return outcome(LAUNCH(copy_async_kernel, dim3(1), dim3(kThreads), 16 * kThreads, nullptr, out.data(), in.data(), keep), out, iota(4 * kThreads));
}

CASE(missing_copy_wait) { return run_copy_async({true, !bug, true}); }
CASE(missing_copy_commit) { return run_copy_async({!bug, true, true}); }
CASE(missing_copy_sync) { return run_copy_async({true, true, !bug}); }

// Two stages in flight: waiting for all but two groups instead of all but one reads the stage still under way.
__global__ void pipelined_copy_kernel(float* out, const float* in, int stages, bool lax) {
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    const auto load = [&](int stage) {
        cp_async_16(shared + uint32_t(stage % 2) * 512 + threadIdx.x * 16, in + stage * 128 + threadIdx.x * 4, true);
        cp_async_commit();
    };
    load(0);
    float sum = 0.0f;
    for (int stage = 0; stage < stages; ++stage) {
        if (stage + 1 < stages) load(stage + 1);
        if (stage + 1 == stages) cp_async_wait<0>();
        else if (lax) cp_async_wait<2>();
        else cp_async_wait<1>();
        __syncwarp();
        const float* tile = reinterpret_cast<const float*>(raw) + stage % 2 * 128;
        for (int i = 0; i < 4; ++i) sum += tile[i * 32 + threadIdx.x];
        __syncwarp();
    }
    out[threadIdx.x] = sum;
}

CASE(lax_copy_wait) {
    constexpr int kStages = 4;
    DeviceArray<float> in(iota(kStages * 128)), out(32);
    std::vector<float> expected(32, 0.0f);
    for (int i = 0; i < kStages * 128; ++i) expected[size_t(i % 32)] += float(i);
    return outcome(LAUNCH(pipelined_copy_kernel, dim3(1), dim3(32), 1024, nullptr, out.data(), in.data(), kStages, bug), out, expected);
}

__global__ void zero_fill_kernel(float* out, const float* in, int valid, bool guarded) {
    DYNAMIC_SHARED(raw);
    const bool inside = int(threadIdx.x * 4) < valid;
    cp_async_16(shared_address(raw) + threadIdx.x * 16, in + (inside || !guarded ? threadIdx.x * 4 : 0), inside || !guarded);  // FAULT tail_without_zero_fill
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = reinterpret_cast<const float*>(raw)[i * 32 + threadIdx.x];
}

CASE(tail_without_zero_fill) {
    constexpr int kValid = 100;
    DeviceArray<float> in(iota(kValid)), out(128);
    std::vector<float> expected = iota(128);
    for (size_t i = kValid; i < 128; ++i) expected[i] = 0.0f;
    return outcome(LAUNCH(zero_fill_kernel, dim3(1), dim3(32), 512, nullptr, out.data(), in.data(), kValid, !bug), out, expected);
}

// Each block adds to what the block before it left: right only in ascending order.
__global__ void block_chain_kernel(float* chain, bool depends) {
    const uint32_t b = blockIdx.x;
    chain[b + 1] = depends ? chain[b] + 1.0f : float(b + 1);  // FAULT block_order
}

CASE(block_order) {
    constexpr size_t kBlocks = 64;
    DeviceArray<float> chain(std::vector<float>(kBlocks + 1, 0.0f));
    return outcome(LAUNCH(block_chain_kernel, dim3(kBlocks), dim3(1), 0, nullptr, chain.data(), bug), chain, iota(kBlocks + 1));
}

// Blocks add to the same values in turns, each halving what it finds first: right in one order only. Tickets make a
// block wait for blocks that have started.
struct TurnFaults {
    bool tickets = true, wait = true, late_turn = false, same_turn = false;
};
__global__ void turns_kernel(float* values, uint32_t* counter, uint32_t* next_ticket, TurnFaults form) {
    SHARED_ARRAY(uint32_t, ticket, 1);
    if (threadIdx.x == 0) ticket[0] = form.tickets ? atomicAdd(next_ticket, 1u) : gridDim.x - 1 - blockIdx.x;
    __syncthreads();
    const uint32_t rank = ticket[0], turn = form.same_turn && rank == 3 ? 2 : rank + uint32_t(form.late_turn);
    if (threadIdx.x == 0 && form.wait) wait_for_turn(counter, turn);  // FAULT turn_taken_twice
    __syncthreads();
    values[threadIdx.x] = values[threadIdx.x] * 0.5f + float(rank);
    __syncthreads();
    if (threadIdx.x == 0) pass_turn(counter, turn);  // FAULT turn_without_wait
}

std::string run_turns(TurnFaults form) {
    constexpr uint32_t kBlocks = 40;
    DeviceArray<float> values(std::vector<float>(kThreads, 0.0f));
    DeviceArray<uint32_t> counters(std::vector<uint32_t>(2, 0u));
    float expected = 0.0f;
    for (uint32_t i = 0; i < kBlocks; ++i) expected = expected * 0.5f + float(i);
    return outcome(LAUNCH(turns_kernel, dim3(kBlocks), dim3(kThreads), 0, nullptr, values.data(), counters.data(), counters.data() + 1, form), values,
                   std::vector<float>(kThreads, expected));
}

CASE(turn_too_late) { return run_turns({true, true, bug, false}); }
CASE(turn_taken_twice) { return run_turns({true, true, false, bug}); }
CASE(turn_of_unstarted_block) { return run_turns({!bug, true, false, false}); }
CASE(turn_without_wait) { return run_turns({!bug, !bug, false, false}); }

// The last warp to arrive wins, which is the one that the schedule lets go last.
__global__ void warp_order_kernel(float* out, bool depends) {
    SHARED_ARRAY(int, arrivals, 1);
    if (threadIdx.x == 0) arrivals[0] = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        const int arrival = atomicAdd(&arrivals[0], 1);
        out[threadIdx.x / 32] = float(depends ? arrival : int(threadIdx.x / 32));
    }
}

CASE(warp_order) {
    DeviceArray<float> out(8);
    return outcome(LAUNCH(warp_order_kernel, dim3(1), dim3(256), 0, nullptr, out.data(), bug), out, iota(8));
}

}  // namespace
