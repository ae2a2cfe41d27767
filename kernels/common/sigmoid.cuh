// The logistic function, as every kernel of SwiGLU computes it: their results must agree to the bit.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

DEVICE float sigmoid(float x) { return rcp_approx(1.0f + __expf(-x)); }

}  // namespace MMPO_VARIANT
}  // namespace mmpo
