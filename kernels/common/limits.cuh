// Numbers of mathematics and of the hardware that several kernels share.
#pragma once

#include "variant.h"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Bytes of shared memory that one block may use: on every GPU from sm_80 on (sm_86, sm_89 and sm_120 have the least),
// and on sm_90.
constexpr int kSharedLimit = 99 * 1024;
constexpr int kSharedLimitSm90 = 227 * 1024;

// 32-bit registers of one multiprocessor.
constexpr int kMultiprocessorRegisters = 65536;

// Multiprocessors of an H100 or H200 (SXM). Where the cut of the work decides the order of a sum, it is planned for
// this number and not for the GPU at hand, so that every GPU gives the same bits.
constexpr int kPlannedMultiprocessors = 132;

}  // namespace MMPO_VARIANT
}  // namespace mmpo
