// Hopper gemms that accumulate into f32, in one sum or in parts of the depth.
#pragma once

#include "gemm_epilogues_sm90.cuh"
#include "vector.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm_sm90 {

// Accumulates out[M, N] += the partial sums of a split gemm, in their order. `part` is the distance between two of
// them.
static __global__ void __launch_bounds__(kBlock)
    add_parts_kernel(float* out, const float* __restrict__ parts, int64_t length, int64_t part, int count) {
    const int64_t index = flat_index<kVectorF32>();
    if (index >= length) return;
    float sum[kVectorF32], term[kVectorF32];
    load4<true>(sum, parts + index, 0, kVectorF32);
#pragma unroll 4
    for (int i = 1; i < count; ++i) {
        load4<true>(term, parts + i * part + index, 0, kVectorF32);
#pragma unroll
        for (int j = 0; j < kVectorF32; ++j) sum[j] += term[j];
    }
    load4<true>(term, out + index, 0, kVectorF32);
#pragma unroll
    for (int j = 0; j < kVectorF32; ++j) term[j] += sum[j];
    store4<true>(out + index, 0, kVectorF32, term);
}

// Bytes of the partial sums of out[M, N]; 0 where the plan does not split the depth.
inline int64_t parts_bytes(const GemmPlan& plan, int shape_m, int shape_n) {
    return plan.splits == 1 ? 0 : plan.splits * split_rows(plan, shape_m) * shape_n * int64_t(sizeof(float));
}

// Accumulates out[M, N] += a gemm that `launch(StoreF32)` queues by the plan: at once, or by way of its parts in
// `workspace`.
template <class Launch>
mmpo_status launch_sum(float* out, float* workspace, int shape_m, int shape_n, const GemmPlan& plan,
                       const Launch& launch, mmpo_stream stream) {
    if (plan.splits == 1) {
        StoreF32 epilogue{{}, shape_m, shape_n, true};
        if (const mmpo_status error = encode_panel_map(&epilogue.out, out, shape_m, shape_n)) return error;
        return launch(epilogue);
    }
    const int64_t rows = split_rows(plan, shape_m), width = shape_n;
    StoreF32 epilogue{{}, int(rows * plan.splits), shape_n, false};
    if (const mmpo_status error = encode_panel_map(&epilogue.out, workspace, rows * plan.splits, width)) return error;
    if (const mmpo_status error = launch(epilogue)) return error;
    const int64_t length = shape_m * width;
    return LAUNCH(add_parts_kernel, flat_blocks<kVectorF32>(length), kBlock, 0, cuda_stream(stream), out, workspace,
                  length, rows * width, plan.splits);
}

}  // namespace gemm_sm90
}  // namespace MMPO_VARIANT
}  // namespace mmpo
