// Shuffles, votes, reductions, conversions, barriers and atomics in their right use.
#include <cmath>

#include "harness.h"

using namespace mmpo::test;

namespace {

// ------------------------------------------------------------------------------------------------------------ shuffles

enum ShuffleKind { kIndex, kUp, kDown, kXor };

__global__ void shuffle_kernel(int* out, int kind, int argument, int width) {
    const int lane = int(threadIdx.x);
    int value = 100 + lane;
    if (kind == kIndex) value = __shfl_sync(0xffffffffu, value, argument, width);
    if (kind == kUp) value = __shfl_up_sync(0xffffffffu, value, unsigned(argument), width);
    if (kind == kDown) value = __shfl_down_sync(0xffffffffu, value, unsigned(argument), width);
    if (kind == kXor) value = __shfl_xor_sync(0xffffffffu, value, argument, width);
    out[lane] = value;
}

// "shfl.sync" of the ISA: a lane whose source lies outside its segment keeps its own value.
int shuffle_source(int lane, int kind, int argument, int width) {
    const int segment = lane / width * width, within = lane % width;
    switch (kind) {
        case kIndex: return segment + argument % width;
        case kUp: return within - argument >= 0 ? lane - argument : lane;
        case kDown: return within + argument < width ? lane + argument : lane;
        default: return (lane ^ argument) < segment + width ? lane ^ argument : lane;
    }
}

CASE(shuffles) {
    DeviceArray<int> out(32);
    for (int kind = kIndex; kind <= kXor; ++kind) {
        for (int width = 2; width <= 32; width *= 2) {
            for (int argument = 0; argument < 32; argument += 3) {
                std::vector<int> expected(32);
                for (int lane = 0; lane < 32; ++lane) expected[size_t(lane)] = 100 + shuffle_source(lane, kind, argument, width);
                const std::string problem = outcome(LAUNCH(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, out.data(), kind, argument, width), out, expected);
                if (!problem.empty()) return "kind " + std::to_string(kind) + ", width " + std::to_string(width) + ": " + problem;
            }
        }
    }
    return "";
}

// ------------------------------------------------------------------------------------------------ votes and reductions

__global__ void vote_kernel(unsigned* out) {
    const unsigned lane = threadIdx.x;
    unsigned* mine = out + lane * 8;
    mine[0] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    mine[1] = unsigned(__any_sync(0xffffffffu, lane == 7)) + 2u * unsigned(__all_sync(0xffffffffu, lane < 32));
    mine[2] = __reduce_add_sync(0xffffffffu, lane);
    mine[3] = unsigned(__reduce_min_sync(0xffffffffu, int(lane) - 16));
    mine[4] = __reduce_max_sync(0xffffffffu, lane - 16u);
    mine[5] = __reduce_and_sync(0xffffffffu, lane | 0x40u);
    mine[6] = __reduce_or_sync(0xffffffffu, lane);
    mine[7] = __reduce_xor_sync(0xffffffffu, 1u << lane);
}

CASE(votes_and_reductions) {
    DeviceArray<unsigned> out(256);
    std::vector<unsigned> expected;
    for (int lane = 0; lane < 32; ++lane) {
        const unsigned values[8] = {0x49249249u, 3u, 496u, unsigned(-16), unsigned(-1), 0x40u, 31u, 0xffffffffu};
        expected.insert(expected.end(), values, values + 8);
    }
    return outcome(LAUNCH(vote_kernel, dim3(1), dim3(32), 0, nullptr, out.data()), out, expected);
}

// The two halves of a warp take different branches, each with a mask of its own.
__global__ void half_masks_kernel(int* out) {
    const int lane = int(threadIdx.x);
    int value = 0;
    if (lane < 16) value = __shfl_sync(0x0000ffffu, lane, 3);
    else value = __shfl_sync(0xffff0000u, lane, 20);
    __syncwarp();
    out[lane] = value;
}

CASE(half_masks) {
    DeviceArray<int> out(32);
    std::vector<int> expected(32, 3);
    for (size_t i = 16; i < 32; ++i) expected[i] = 20;
    return outcome(LAUNCH(half_masks_kernel, dim3(1), dim3(32), 0, nullptr, out.data()), out, expected);
}

// --------------------------------------------------------------------------------------------------------- conversions

__global__ void pack_kernel(uint32_t* out, const float* in) { out[threadIdx.x] = pack_bf16x2(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]); }

CASE(bf16_rounding) {
    // Value and its bf16: exact, tie to even down and up, above a tie, largest finite to infinity, subnormal, NaN, signs.
    const float infinity = INFINITY;
    const std::vector<float> values = {1.0f, 1.00390625f, 1.01171875f, 1.00390637f, 3.4e38f, 9.2e-41f, NAN, -0.0f, -1.01171875f, infinity};
    const std::vector<uint16_t> bits = {0x3f80, 0x3f80, 0x3f82, 0x3f81, 0x7f80, 0x0001, 0x7fff, 0x8000, 0xbf82, 0x7f80};
    DeviceArray<float> in(values);
    DeviceArray<uint32_t> out(values.size() / 2);
    std::vector<uint32_t> expected;
    for (size_t i = 0; i < bits.size(); i += 2) expected.push_back(uint32_t(bits[i]) | uint32_t(bits[i + 1]) << 16);
    return outcome(LAUNCH(pack_kernel, dim3(1), dim3(unsigned(values.size() / 2)), 0, nullptr, out.data(), in.data()), out, expected);
}

__global__ void approximation_kernel(float* out, const float* in, int count) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    out[4 * i] = exp2_approx(in[i]);
    out[4 * i + 1] = log2_approx(in[i]);
    out[4 * i + 2] = rcp_approx(in[i]);
    out[4 * i + 3] = rsqrt_approx(in[i]);
}

CASE(approximations) {
    std::vector<float> values;
    for (int i = 0; i < 300; ++i) values.push_back(0.01f * std::pow(1.04f, float(i)));
    DeviceArray<float> in(values), out(4 * values.size());
    if (const int error = LAUNCH(approximation_kernel, dim3(3), dim3(128), 0, nullptr, out.data(), in.data(), int(values.size()))) return device_error(error);
    const std::vector<float> found = out.download();
    for (size_t i = 0; i < values.size(); ++i) {
        const double x = values[i], expected[4] = {std::exp2(x), std::log2(x), 1.0 / x, 1.0 / std::sqrt(x)};
        for (size_t k = 0; k < 4; ++k) {
            if (std::isinf(float(expected[k])) && std::isinf(found[4 * i + k])) continue;
            const double error = std::fabs(found[4 * i + k] - expected[k]), limit = 3e-7 * (std::fabs(expected[k]) + (k == 1 ? 1.0 : 0.0));
            if (!(error <= limit)) return "function " + std::to_string(k) + " of " + std::to_string(x) + " is " + std::to_string(found[4 * i + k]);
        }
    }
    return "";
}

// ------------------------------------------------------------------------------------------------- barriers and atomics

// Two producer warps and two consumer warps hand a buffer to and fro through named barriers.
__global__ void hand_over_kernel(float* out, int rounds) {
    SHARED_ARRAY(float, buffer, 64);
    const uint32_t t = threadIdx.x % 64;
    float sum = 0.0f;
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x < 64) {
            if (round > 0) bar_sync(2, 128);
            buffer[t] = float(round * 64) + float(t);
            bar_arrive(1, 128);
        } else {
            bar_sync(1, 128);
            sum += buffer[63 - t];
            if (round + 1 < rounds) bar_arrive(2, 128);
        }
    }
    if (threadIdx.x >= 64) out[t] = sum;
}

CASE(named_barriers) {
    constexpr int kRounds = 5;
    DeviceArray<float> out(64);
    std::vector<float> expected(64, 0.0f);
    for (int t = 0; t < 64; ++t) {
        for (int round = 0; round < kRounds; ++round) expected[size_t(t)] += float(round * 64 + 63 - t);
    }
    return outcome(LAUNCH(hand_over_kernel, dim3(1), dim3(128), 0, nullptr, out.data(), kRounds), out, expected);
}

__global__ void atomics_kernel(int* counters, float* sum, unsigned long long* large) {
    atomicAdd(&counters[0], 1);
    atomicMax(&counters[1], int(blockIdx.x * blockDim.x + threadIdx.x));
    atomicAdd(sum, 0.5f);
    atomicAdd(large, 1ull << 33);
    if (threadIdx.x == 0) atomicExch(&counters[2], 9);
    atomicCAS(&counters[3], 4, 5);
}

CASE(atomics) {
    DeviceArray<int> counters(std::vector<int>{0, 0, 0, 4});
    DeviceArray<float> sum(std::vector<float>{0.0f});
    DeviceArray<unsigned long long> large(std::vector<unsigned long long>{0});
    const int error = LAUNCH(atomics_kernel, dim3(8), dim3(64), 0, nullptr, counters.data(), sum.data(), large.data());
    std::string problem = outcome(error, counters, std::vector<int>{512, 511, 9, 5});
    if (problem.empty()) problem = compare(sum.download(), std::vector<float>{256.0f});
    return problem.empty() ? compare(large.download(), std::vector<unsigned long long>{512ull << 33}) : problem;
}

// Threads that exit early no longer count at __syncthreads.
__global__ void early_exit_kernel(float* out) {
    SHARED_ARRAY(float, total, 1);
    if (threadIdx.x >= 40) return;
    if (threadIdx.x == 0) total[0] = 7.0f;
    __syncthreads();
    out[blockIdx.x * 40 + threadIdx.x] = total[0];
}

CASE(early_exit) {
    DeviceArray<float> out(80);
    return outcome(LAUNCH(early_exit_kernel, dim3(2), dim3(64), 0, nullptr, out.data()), out, std::vector<float>(80, 7.0f));
}

__global__ void index_kernel(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = int(block * threads + thread);
}

CASE(three_dimensions) {
    constexpr size_t kCount = 2 * 3 * 4 * 5 * 6 * 7;
    DeviceArray<int> out(kCount);
    std::vector<int> expected(kCount);
    for (size_t i = 0; i < kCount; ++i) expected[i] = int(i);
    return outcome(LAUNCH(index_kernel, dim3(2, 3, 4), dim3(5, 6, 7), 0, nullptr, out.data()), out, expected);
}

// Blocks that write neighbouring halves of one word do not disturb each other.
__global__ void odd_rows_kernel(bf16* out, const bf16* in, int width) {
    for (int i = int(threadIdx.x); i < width; i += 32) out[int(blockIdx.x) * width + i] = in[i];
}

CASE(odd_rows) {
    constexpr int kRows = 9, kWidth = 77;
    std::vector<bf16> values(kWidth);
    for (int i = 0; i < kWidth; ++i) values[size_t(i)] = to_bf16(float(i));
    DeviceArray<bf16> in(values), out(kRows * kWidth);
    if (const int error = LAUNCH(odd_rows_kernel, dim3(kRows), dim3(32), 0, nullptr, out.data(), in.data(), kWidth)) return device_error(error);
    const std::vector<bf16> found = out.download();
    std::vector<float> result(found.size()), expected(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        result[i] = to_float(found[i]);
        expected[i] = float(i % kWidth);
    }
    return compare(result, expected);
}

#if MMPO_EMULATED
__global__ void nothing_kernel(int) {}

CASE(refused_launches) {
    const dim3 grids[] = {dim3(0), dim3(1, 65536), dim3(1), dim3(1)};
    const dim3 blocks[] = {dim3(32), dim3(32), dim3(1025), dim3(32)};
    const size_t shared[] = {0, 0, 0, 232449};
    for (int i = 0; i < 4; ++i) {
        const int error = LAUNCH(nothing_kernel, grids[i], blocks[i], shared[i], nullptr, i);
        if (error == 0) return "launch " + std::to_string(i) + " was not refused";
        if (device_error(error).find("invalid launch") == std::string::npos) return device_error(error);
    }
    return device_error(LAUNCH(nothing_kernel, dim3(1), dim3(1024), 232448, nullptr, 0));
}

CASE(memory_calls) {
    float host[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    void* memory = nullptr;
    if (MMPO_EXPORT(malloc)(&memory, sizeof host) != 0) return "malloc failed";
    float* device = static_cast<float*>(memory);
    std::string problem;
    if (MMPO_EXPORT(upload)(device, host, sizeof host) != 0) problem = "upload failed";
    if (MMPO_EXPORT(upload)(device + 1, host, sizeof host) == 0) problem = "an upload past the end was accepted";
    if (MMPO_EXPORT(download)(host, device + 4, 4) == 0) problem = "a download past the end was accepted";
    if (MMPO_EXPORT(memset)(device, 0, 20) == 0) problem = "a memset past the end was accepted";
    if (MMPO_EXPORT(copy)(device + 2, device, 8) != 0) problem = "copy failed";
    if (MMPO_EXPORT(download)(host, device, sizeof host) != 0 || host[2] != 1.0f || host[3] != 2.0f) problem = "copy copied something else";
    if (MMPO_EXPORT(free)(device + 1) == 0) problem = "a free in the middle was accepted";
    if (MMPO_EXPORT(free)(device) != 0) problem = "free failed";
    if (MMPO_EXPORT(free)(device) == 0) problem = "a second free was accepted";
    if (MMPO_EXPORT(malloc)(&memory, size_t(1) << 50) == 0) problem = "2^50 bytes were handed out";
    return problem;
}
#endif

}  // namespace
