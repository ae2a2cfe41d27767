// The logistic function, as every kernel of SwiGLU computes it: their results must agree to the bit.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// An exponential that is flushed to zero would vanish beside 1 anyway.
DEVICE float sigmoid(float x) {
    constexpr float kLog2E = 1.44269504f;
    return rcp_approx(1.0f + exp2_approx(-kLog2E * x));
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
