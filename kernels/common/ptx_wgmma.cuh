// The part of ptx.cuh about Hopper's wgmma (sm_90a), the gemm of a warpgroup: d[64, N] (+)= a[64, 16] * b[16, N], bf16
// operands, f32 accumulators.
//
// A kernel must keep this order: wgmma_fence; wgmma...; wgmma_commit; wgmma_wait; and only then read `d` or overwrite
// operands. In lane l of warp w of the warpgroup, d[4j + 2h + e] is row 16w + l/4 + 8h, column 8j + 2(l%4) + e.
#pragma once

#include "ptx.cuh"

// By the number N / 2 of accumulators: their names %0.. in the instruction, and the accumulators as asm outputs.
// clang-format off
#define WGMMA_NAMES_32                                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                            \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_48                                                                                                \
    WGMMA_NAMES_32                                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_64                                                                                                \
    WGMMA_NAMES_48                                                                                                    \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_96                                                                                                \
    WGMMA_NAMES_64                                                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                                \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_128                                                                                               \
    WGMMA_NAMES_96                                                                                                    \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"                    \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_D8(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),       \
        "+f"(d[i + 7])
#define WGMMA_D16(i) WGMMA_D8(i), WGMMA_D8(i + 8)
#define WGMMA_D32 WGMMA_D16(0), WGMMA_D16(16)
#define WGMMA_D48 WGMMA_D32, WGMMA_D16(32)
#define WGMMA_D64 WGMMA_D48, WGMMA_D16(48)
#define WGMMA_D96 WGMMA_D64, WGMMA_D16(64), WGMMA_D16(80)
#define WGMMA_D128 WGMMA_D96, WGMMA_D16(96), WGMMA_D16(112)
#define WGMMA_SS(n, count, a, b, scale, trans_a, trans_b)                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" WGMMA_NAMES_##count "}, "               \
                 "%" #a ", %" #b ", p, 1, 1, %" #trans_a ", %" #trans_b ";\n}"                                        \
                 : WGMMA_D##count                                                                                     \
                 : "l"(a_descriptor), "l"(b_descriptor), "r"(int(accumulate)), "n"(kTransposedA), "n"(kTransposedB))
#define WGMMA_RS(n, count, a0, a1, a2, a3, b, scale, trans_b)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\n"                                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" WGMMA_NAMES_##count "}, "               \
                 "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #trans_b ";\n}"                      \
                 : WGMMA_D##count                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(int(accumulate)),               \
                   "n"(kTransposedB))
// clang-format on

namespace mmpo {
inline namespace MMPO_VARIANT {

// How the 16-byte chunks of a shared tile are permuted, in the numbering of matrix descriptors.
enum class Swizzle { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };

// The matrix descriptor of an operand in shared memory. With swizzling, `stride_bytes` lies between groups of 8 rows
// (K-major) or of 8 k (transposed), and `leading_bytes` between swizzle-wide column groups of a transposed operand
// (K-major ignores it). Without swizzling there are 8x8 cores of 128 bytes, with `leading_bytes` between cores along K
// and `stride_bytes` along M or N. The operand starts `offset` bytes after `address`; if the offset is a constant, the
// descriptors of one tile differ by one addition.
HOST_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                                      uint32_t offset = 0) {
    const uint32_t low = ((address & 0x3ffffu) >> 4 | (leading_bytes & 0x3ffffu) >> 4 << 16) + (offset >> 4);
    const uint32_t high = (stride_bytes & 0x3ffffu) >> 4 | uint32_t(swizzle) << 30;
    return uint64_t(high) << 32 | low;
}

// Orders earlier writes of accumulator and operand registers before the next wgmma of the warpgroup.
DEVICE void wgmma_fence(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::wgmma_fence(site), asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}

DEVICE void wgmma_commit(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::wgmma_commit(site), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}

template <int kGroupsLeft>
DEVICE void wgmma_wait(MMPO_SITE_ONLY) {
    PTX90_TWIN(emulated::wgmma_wait(kGroupsLeft, site),
               asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory"));
}

// Keeps the compiler from moving accesses of these registers across this point, which is a fence or a wait.
template <int kCount>
DEVICE void pin_registers(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : PTX_TWIN("+m", "+f")(d[i])::"memory");
}
template <int kCount>
DEVICE void pin_registers(uint32_t (&a)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : PTX_TWIN("+m", "+r")(a[i])::"memory");
}

// Both operands come from shared memory. `accumulate` = false assigns.
template <int N, bool kTransposedA = false, bool kTransposedB = false>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate MMPO_SITE) {
    static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "widths with an operand list above");
#if MMPO_EMULATED
    emulated::wgmma({d, N, nullptr, a_descriptor, b_descriptor, accumulate, kTransposedA, kTransposedB}, site);
#elif MMPO_SM90
    if constexpr (N == 64) WGMMA_SS(64, 32, 32, 33, 34, 35, 36);
    if constexpr (N == 96) WGMMA_SS(96, 48, 48, 49, 50, 51, 52);
    if constexpr (N == 128) WGMMA_SS(128, 64, 64, 65, 66, 67, 68);
    if constexpr (N == 192) WGMMA_SS(192, 96, 96, 97, 98, 99, 100);
    if constexpr (N == 256) WGMMA_SS(256, 128, 128, 129, 130, 131, 132);
#else
    __trap();
#endif
}

// A comes from registers, which each warp lays out as mma_m16n8k16's A.
template <int N, bool kTransposedB = false>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_descriptor, bool accumulate MMPO_SITE) {
    static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256, "widths with an operand list above");
#if MMPO_EMULATED
    emulated::wgmma({d, N, a, 0, b_descriptor, accumulate, false, kTransposedB}, site);
#elif MMPO_SM90
    if constexpr (N == 64) WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 96) WGMMA_RS(96, 48, 48, 49, 50, 51, 52, 53, 54);
    if constexpr (N == 128) WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (N == 192) WGMMA_RS(192, 96, 96, 97, 98, 99, 100, 101, 102);
    if constexpr (N == 256) WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, 134);
#else
    __trap();
#endif
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
