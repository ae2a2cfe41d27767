// The logistic function as every SwiGLU kernel computes it, because their results must agree to the bit.
#pragma once

#include "launch.cuh"
#include "limits.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// An exponential small enough to be flushed to zero would vanish beside 1 anyway.
DEVICE float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-kLog2E * x)); }

}  // namespace MMPO_VARIANT
}  // namespace mmpo
