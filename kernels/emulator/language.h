// CUDA C++ as host C++: the keywords, built-in variables, vector types and intrinsics that kernels use.
//
// Included by kernels/common/device.cuh in emulated builds. `__shared__` is missing on purpose: kernels declare shared
// memory with SHARED_ARRAY and DYNAMIC_SHARED, so that the emulated device knows its bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "interface.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::mmpo::emulated::thread_index())
#define blockIdx (::mmpo::emulated::block_index())
#define blockDim (::mmpo::emulated::block_size())
#define gridDim (::mmpo::emulated::grid_size())

// The line of the kernel that calls a wrapper, as its last parameter.
#define MMPO_SITE_ONLY ::mmpo::emulated::Site site = {__builtin_FILE(), __builtin_LINE()}
#define MMPO_SITE , MMPO_SITE_ONLY
// Passes a wrapper's own call site on to what it calls.
#define MMPO_PASS_SITE , site

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int warpSize = 32;
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

#if MMPO_CHECKED && defined(__clang__)
// By itself clang splits a copy of a vector into its elements and does not check its alignment. These make the copy one
// access, reported with the line that copies.
#define MMPO_COPIED_WHOLE(vector, element, bytes)                                    \
    typedef element Whole __attribute__((vector_size(bytes), may_alias));            \
    vector() = default;                                                              \
    __attribute__((always_inline, nodebug)) vector(const vector& other) {            \
        *reinterpret_cast<Whole*>(this) = *reinterpret_cast<const Whole*>(&other);   \
    }                                                                                \
    __attribute__((always_inline, nodebug)) vector& operator=(const vector& other) { \
        *reinterpret_cast<Whole*>(this) = *reinterpret_cast<const Whole*>(&other);   \
        return *this;                                                                \
    }
#define MMPO_VECTOR_2(vector, element)                     \
    constexpr vector(element x, element y) : x(x), y(y) {} \
    MMPO_COPIED_WHOLE(vector, element, 8)
#define MMPO_VECTOR_4(vector, element)                                                       \
    constexpr vector(element x, element y, element z, element w) : x(x), y(y), z(z), w(w) {} \
    MMPO_COPIED_WHOLE(vector, element, 16)
#else
#define MMPO_VECTOR_2(vector, element)
#define MMPO_VECTOR_4(vector, element)
#endif

struct alignas(8) float2 {
    float x, y;
    MMPO_VECTOR_2(float2, float)
};
struct alignas(16) float4 {
    float x, y, z, w;
    MMPO_VECTOR_4(float4, float)
};
struct alignas(8) int2 {
    int x, y;
    MMPO_VECTOR_2(int2, int)
};
struct alignas(16) int4 {
    int x, y, z, w;
    MMPO_VECTOR_4(int4, int)
};
struct alignas(8) uint2 {
    unsigned x, y;
    MMPO_VECTOR_2(uint2, unsigned)
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
    MMPO_VECTOR_4(uint4, unsigned)
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Barriers, shuffles and votes.
__forceinline__ void __syncthreads(MMPO_SITE_ONLY) { emulated::barrier_sync(0, 0, site); }
__forceinline__ void __syncwarp(uint32_t mask = 0xffffffffu MMPO_SITE) { emulated::warp_sync(mask, site); }
template <class T>
__forceinline__ T __shfl_sync(uint32_t mask, T value, int lane, int width = 32 MMPO_SITE) {
    return emulated::from_bits<T>(
        emulated::shuffle(mask, emulated::to_bits(value), emulated::Shuffle::index, lane, width, site));
}
template <class T>
__forceinline__ T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32 MMPO_SITE) {
    return emulated::from_bits<T>(
        emulated::shuffle(mask, emulated::to_bits(value), emulated::Shuffle::up, int(delta), width, site));
}
template <class T>
__forceinline__ T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32 MMPO_SITE) {
    return emulated::from_bits<T>(
        emulated::shuffle(mask, emulated::to_bits(value), emulated::Shuffle::down, int(delta), width, site));
}
template <class T>
__forceinline__ T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32 MMPO_SITE) {
    return emulated::from_bits<T>(
        emulated::shuffle(mask, emulated::to_bits(value), emulated::Shuffle::butterfly, lanes, width, site));
}
__forceinline__ uint32_t __ballot_sync(uint32_t mask, bool predicate MMPO_SITE) {
    return emulated::ballot(mask, predicate, site);
}
__forceinline__ int __any_sync(uint32_t mask, bool predicate MMPO_SITE) {
    return emulated::ballot(mask, predicate, site) != 0;
}
__forceinline__ int __all_sync(uint32_t mask, bool predicate MMPO_SITE) {
    return emulated::ballot(mask, predicate, site) == mask;
}
// redux.sync, 32 bits.
__forceinline__ unsigned __reduce_add_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::add, false, site);
}
__forceinline__ int __reduce_add_sync(uint32_t mask, int value MMPO_SITE) {
    return int(emulated::reduce_u32(mask, unsigned(value), emulated::Reduce::add, true, site));
}
__forceinline__ unsigned __reduce_min_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::min, false, site);
}
__forceinline__ int __reduce_min_sync(uint32_t mask, int value MMPO_SITE) {
    return int(emulated::reduce_u32(mask, unsigned(value), emulated::Reduce::min, true, site));
}
__forceinline__ unsigned __reduce_max_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::max, false, site);
}
__forceinline__ int __reduce_max_sync(uint32_t mask, int value MMPO_SITE) {
    return int(emulated::reduce_u32(mask, unsigned(value), emulated::Reduce::max, true, site));
}
__forceinline__ unsigned __reduce_and_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::bit_and, false, site);
}
__forceinline__ unsigned __reduce_or_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::bit_or, false, site);
}
__forceinline__ unsigned __reduce_xor_sync(uint32_t mask, unsigned value MMPO_SITE) {
    return emulated::reduce_u32(mask, value, emulated::Reduce::bit_xor, false, site);
}
inline void __threadfence() { emulated::memory_fence(); }
inline void __threadfence_block() { emulated::memory_fence(); }

// Atomics.
template <class T, class Update>
__forceinline__ T atomic_update(T* pointer, Update update, emulated::Site site) {
    uint64_t seen = emulated::atomic_load(pointer, sizeof(T), site);
    for (;;) {
        const T old = emulated::from_bits<T>(seen);
        if (emulated::atomic_replace(pointer, seen, emulated::to_bits(update(old)), sizeof(T))) return old;
    }
}
template <class T>
__forceinline__ T atomicAdd(T* pointer, std::common_type_t<T> value MMPO_SITE) {
    return atomic_update(pointer, [=](T old) { return T(old + value); }, site);
}
template <class T>
__forceinline__ T atomicMax(T* pointer, std::common_type_t<T> value MMPO_SITE) {
    return atomic_update(pointer, [=](T old) { return old < value ? value : old; }, site);
}
template <class T>
__forceinline__ T atomicExch(T* pointer, std::common_type_t<T> value MMPO_SITE) {
    return atomic_update(pointer, [=](T) { return value; }, site);
}
template <class T>
__forceinline__ T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value MMPO_SITE) {
    return atomic_update(pointer, [=](T old) { return old == expected ? value : old; }, site);
}

// Arithmetic. glibc declares functions called __expf and so on, hence the macros below.
inline float fast_exp(float x) { return expf(x); }
inline float fast_exp10(float x) { return powf(10.0f, x); }
inline float fast_log(float x) { return logf(x); }
inline float fast_log2(float x) { return log2f(x); }
inline float fast_pow(float x, float y) { return powf(x, y); }
inline float fast_sin(float x) { return sinf(x); }
inline float fast_cos(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __int_as_float(int x) { return emulated::from_bits<float>(uint32_t(x)); }
inline float __uint_as_float(unsigned x) { return emulated::from_bits<float>(x); }
inline int __float_as_int(float x) { return int(uint32_t(emulated::to_bits(x))); }
inline unsigned __float_as_uint(float x) { return unsigned(emulated::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
template <class T>
__forceinline__ T __ldg(const T* pointer) {
    return *pointer;
}
template <class A, class B>
__forceinline__ constexpr std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <class A, class B>
__forceinline__ constexpr std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

// Host calls that launchers make.
inline cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
    return emulated::set_memory(destination, value, bytes);
}
inline cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, int, cudaStream_t) {
    return emulated::copy_memory(destination, source, bytes);
}
constexpr int cudaMemcpyDeviceToDevice = 3;

}  // namespace MMPO_VARIANT
}  // namespace mmpo

#define __expf(x) ::mmpo::fast_exp(x)
#define __exp10f(x) ::mmpo::fast_exp10(x)
#define __logf(x) ::mmpo::fast_log(x)
#define __log2f(x) ::mmpo::fast_log2(x)
#define __powf(x, y) ::mmpo::fast_pow(x, y)
#define __sinf(x) ::mmpo::fast_sin(x)
#define __cosf(x) ::mmpo::fast_cos(x)

// CUDA's names are global, so these are too, but only in the files that include this header, which are kernels.
using namespace mmpo;
