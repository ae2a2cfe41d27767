// RMSNorm (Zhang and Sennrich 2019) over rows [rows, D], with the residual add that precedes it, and its gradient.
//
//   rstd = 1 / sqrt(mean(x^2) + epsilon)      out = x * rstd * weight
//
// The forwards assign all outputs; the backward accumulates dx and dweight. A row is read once, because a group of
// warps holds it in registers between computing its statistics and using them. So the bytes moved are the fewest
// possible.

#include "common/partials.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

// How a row is shared out: kWarps warps work on it, and each lane holds kVectors vectors.
template <int kWarpsOfRow, int kVectorsOfLane, bool kVectorizedRows>
struct RowLayout {
    static constexpr int kWarps = kWarpsOfRow;
    static constexpr int kVectors = kVectorsOfLane;
    static constexpr bool kVectorized = kVectorizedRows;
    // Columns between two vectors of a thread.
    static constexpr int kStride = kWarps * kWarp * kVector;
    using Group = RowGroup<kWarps>;
    // The backward holds four arrays. With eight vectors per lane, or with single accesses that each need an address,
    // it takes some 200 registers, which leaves room for one block only.
    static constexpr int kMinBlocks = kVectorized && kVectors <= 4 ? 2 : 1;
};
// The widest row that a layout can hold.
template <class Layout>
constexpr int kMaxWidth = Layout::kStride * Layout::kVectors;

using OneWarp = RowLayout<1, 4, true>;
using TwoWarps = RowLayout<2, 4, true>;
using FourWarps = RowLayout<4, 4, true>;
using EightWarps = RowLayout<8, 4, true>;
using EightWarpsWide = RowLayout<8, 8, true>;
using SingleValues = RowLayout<8, 4, false>;

// Calls `launch` with the layout for rows of `width`. It may be up to 16384, or up to 8192 if a row's bytes are not a
// multiple of 16. Four vectors per lane keep 64 bytes of each input under way and still leave room for a second block.
// The fewest warps with which that is possible need no barriers (D = 576, 960), or cheap ones (2048, 4096).
template <class Launch>
mmpo_status with_row_layout(int width, Launch launch) {
    if (!vector_rows(width)) return width <= kMaxWidth<SingleValues> ? launch(SingleValues{}) : kInvalidValue;
    if (width <= kMaxWidth<OneWarp>) return launch(OneWarp{});
    if (width <= kMaxWidth<TwoWarps>) return launch(TwoWarps{});
    if (width <= kMaxWidth<FourWarps>) return launch(FourWarps{});
    if (width <= kMaxWidth<EightWarps>) return launch(EightWarps{});
    return width <= kMaxWidth<EightWarpsWide> ? launch(EightWarpsWide{}) : kInvalidValue;
}

template <class Layout>
DEVICE void load_row(uint4 (&packed)[Layout::kVectors], const bf16* row, int first, int width) {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        packed[v] = load8<Layout::kVectorized>(row, first + v * Layout::kStride, width);
    }
}

// ---- forward

// Forms x + delta, rounded to bf16 as it is stored, so that the norm sees what the backward will read.
template <class Layout>
DEVICE void add_residual(uint4 (&packed)[Layout::kVectors], bf16* sum_row, const bf16* delta_row, int first,
                         int width) {
    uint4 deltas[Layout::kVectors];
    load_row<Layout>(deltas, delta_row, first, width);
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        float values[kVector], delta[kVector];
        unpack8(values, packed[v]);
        unpack8(delta, deltas[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += delta[i];
        packed[v] = pack8(values);
        store8<Layout::kVectorized>(sum_row, first + v * Layout::kStride, width, packed[v]);
    }
}

template <class Layout>
DEVICE float sum_of_squares(const uint4 (&packed)[Layout::kVectors]) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        float values[kVector];
        unpack8(values, packed[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += values[i] * values[i];
    }
    return sum;
}

template <class Layout>
DEVICE void store_normalized(bf16* out_row, const uint4 (&packed)[Layout::kVectors], const bf16* weight, float row_rstd,
                             int first, int width) {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        const int column = first + v * Layout::kStride;
        float values[kVector], scale[kVector];
        unpack8(values, packed[v]);
        unpack8(scale, load8<Layout::kVectorized>(weight, column, width));
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] *= row_rstd * scale[i];
        store8<Layout::kVectorized>(out_row, column, width, pack8(values));
    }
}

// A group of warps normalises one row. With kAdd it adds `delta` first, and stores the sum.
template <class Layout, bool kAdd>
__global__ void __launch_bounds__(kBlock)
    rms_norm_forward_kernel(bf16* __restrict__ sum, bf16* __restrict__ out, float* __restrict__ rstd,
                            const bf16* __restrict__ x, const bf16* __restrict__ delta, const bf16* __restrict__ weight,
                            int rows, int width, float epsilon) {
    DYNAMIC_SHARED(shared);
    typename Layout::Group group(reinterpret_cast<float*>(shared));
    const int row = int(blockIdx.x) * Layout::Group::kGroups + group.index;
    if (row >= rows) return;
    const int64_t start = int64_t(row) * width;
    const int first = group.thread * kVector;

    uint4 packed[Layout::kVectors];
    load_row<Layout>(packed, x + start, first, width);
    if constexpr (kAdd) add_residual<Layout>(packed, sum + start, delta + start, first, width);
    const float row_rstd = rsqrtf(group.sum(sum_of_squares<Layout>(packed)) / float(width) + epsilon);
    if (group.thread == 0) rstd[row] = row_rstd;
    store_normalized<Layout>(out + start, packed, weight, row_rstd, first, width);
}

template <bool kAdd>
mmpo_status launch_forward(bf16* sum, bf16* out, float* rstd, const bf16* x, const bf16* delta, const bf16* weight,
                           int rows, int width, float epsilon, mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    return with_row_layout(width, [=](auto layout) {
        using Layout = decltype(layout);
        using Group = typename Layout::Group;
        return LAUNCH((rms_norm_forward_kernel<Layout, kAdd>), unsigned(ceil_div(rows, Group::kGroups)), kBlock,
                      Group::kScratch * sizeof(float), cuda_stream(stream), sum, out, rstd, x, delta, weight, rows,
                      width, epsilon);
    });
}

// ---- add alone

template <bool kVectorized>
DEVICE void add_vector(bf16* sum, const bf16* x, const bf16* delta, int count) {
    float values[kVector], other[kVector];
    const uint4 packed = load8<kVectorized>(x, 0, count);
    unpack8(other, load8<kVectorized>(delta, 0, count));
    unpack8(values, packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += other[i];
    store8<kVectorized>(sum, 0, count, pack8(values));
}

// The pointers lie on 16-byte boundaries.
__global__ void __launch_bounds__(kBlock)
    add_kernel(bf16* __restrict__ sum, const bf16* __restrict__ x, const bf16* __restrict__ delta, int64_t length) {
    const int64_t first = flat_index();
    if (first >= length) return;
    const int64_t left = length - first;
    if (left >= kVector) {
        add_vector<true>(sum + first, x + first, delta + first, kVector);
    } else {
        add_vector<false>(sum + first, x + first, delta + first, int(min(left, int64_t(kVector))));
    }
}

// ---- backward

// Blocks that share out the rows: two on each multiprocessor of an H100. The rows of a block are added up together, so
// this must be a constant, or the bits of dweight would depend on the GPU.
constexpr int kBackwardBlocks = 2 * kPlannedMultiprocessors;

template <class Layout>
int backward_blocks(int rows) {
    return int(min(ceil_div(rows, Layout::Group::kGroups), int64_t(kBackwardBlocks)));
}

// Bytes of shared memory: the groups' scratch, then each group's sums of dweight.
template <class Layout>
size_t backward_shared(int width) {
    using Group = typename Layout::Group;
    const int sums = Group::kGroups > 1 ? Group::kGroups * width : 0;
    return (Group::kScratch + sums) * sizeof(float);
}

// The sum over a thread's values of g * x, with g = dout * weight.
template <class Layout>
DEVICE float dot_gradient(const uint4 (&dout)[Layout::kVectors], const uint4 (&x)[Layout::kVectors], const bf16* weight,
                          int first, int width) {
    float dot = 0.0f;
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        float grad[kVector], value[kVector], scale[kVector];
        unpack8(grad, dout[v]);
        unpack8(value, x[v]);
        unpack8(scale, load8<Layout::kVectorized>(weight, first + v * Layout::kStride, width));
#pragma unroll
        for (int i = 0; i < kVector; ++i) dot += grad[i] * scale[i] * value[i];
    }
    return dot;
}

// dx += rstd * (g - x * pull) with pull = rstd^2 * mean(g * x), and dweight += the thread's share of dout * x * rstd.
template <class Layout>
DEVICE void add_gradients(bf16* dx_row, float (&dweight)[Layout::kVectors][kVector],
                          const uint4 (&old_dx)[Layout::kVectors], const uint4 (&dout)[Layout::kVectors],
                          const uint4 (&x)[Layout::kVectors], const bf16* weight, float row_rstd, float pull, int first,
                          int width) {
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
        const int column = first + v * Layout::kStride;
        float grad[kVector], value[kVector], scale[kVector], dx[kVector];
        unpack8(grad, dout[v]);
        unpack8(value, x[v]);
        unpack8(dx, old_dx[v]);
        unpack8(scale, load8<Layout::kVectorized>(weight, column, width));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            dweight[v][i] += grad[i] * value[i] * row_rstd;
            dx[i] += row_rstd * (grad[i] * scale[i] - value[i] * pull);
        }
        store8<Layout::kVectorized>(dx_row, column, width, pack8(dx));
    }
}

// Adds the groups' dweight in order, and leaves the block's sum in `partial_row`.
template <class Layout>
DEVICE void store_partial(float* partial_row, float* group_sums, const float (&dweight)[Layout::kVectors][kVector],
                          const typename Layout::Group& group, int first, int width) {
    if constexpr (Layout::Group::kGroups == 1) {
#pragma unroll
        for (int v = 0; v < Layout::kVectors; ++v) {
            store8<Layout::kVectorized>(partial_row, first + v * Layout::kStride, width, dweight[v]);
        }
    } else {
#pragma unroll
        for (int v = 0; v < Layout::kVectors; ++v) {
            const int column = first + v * Layout::kStride;
            if (column >= width) continue;
#pragma unroll
            for (int i = 0; i < kVector; ++i) group_sums[group.index * width + column + i] = dweight[v][i];
        }
        __syncthreads();
        for (int column = int(threadIdx.x); column < width; column += kBlock) {
            float sum = 0.0f;
#pragma unroll
            for (int other = 0; other < Layout::Group::kGroups; ++other) sum += group_sums[other * width + column];
            partial_row[column] = sum;
        }
    }
}

// A group walks over its rows and keeps dweight of its columns in registers. A block leaves one row of `partials`.
template <class Layout>
__global__ void __launch_bounds__(kBlock, Layout::kMinBlocks)
    rms_norm_backward_kernel(bf16* __restrict__ dx, float* __restrict__ partials, const bf16* __restrict__ dout,
                             const bf16* __restrict__ x, const bf16* __restrict__ weight,
                             const float* __restrict__ rstd, int rows, int width) {
    DYNAMIC_SHARED(shared);
    float* const scratch = reinterpret_cast<float*>(shared);
    typename Layout::Group group(scratch);
    const int first = group.thread * kVector;
    const int step = int(gridDim.x) * Layout::Group::kGroups;
    float dweight[Layout::kVectors][kVector] = {};

    for (int row = int(blockIdx.x) * Layout::Group::kGroups + group.index; row < rows; row += step) {
        const int64_t start = int64_t(row) * width;
        uint4 douts[Layout::kVectors], values[Layout::kVectors], old_dx[Layout::kVectors];
        load_row<Layout>(douts, dout + start, first, width);
        load_row<Layout>(values, x + start, first, width);
        load_row<Layout>(old_dx, dx + start, first, width);
        const float row_rstd = rstd[row];
        const float mean = group.sum(dot_gradient<Layout>(douts, values, weight, first, width)) / float(width);
        add_gradients<Layout>(dx + start, dweight, old_dx, douts, values, weight, row_rstd, row_rstd * row_rstd * mean,
                              first, width);
    }
    store_partial<Layout>(partials + int64_t(blockIdx.x) * width, scratch + Layout::Group::kScratch, dweight, group,
                          first, width);
}

}  // namespace

mmpo_status MMPO_EXPORT(rms_norm_forward)(bf16* out, float* rstd, const bf16* x, const bf16* weight, int32_t rows,
                                          int32_t width, float epsilon, mmpo_stream stream) {
    return launch_forward<false>(nullptr, out, rstd, x, nullptr, weight, rows, width, epsilon, stream);
}

mmpo_status MMPO_EXPORT(add_rms_norm_forward)(bf16* sum, bf16* out, float* rstd, const bf16* x, const bf16* delta,
                                              const bf16* weight, int32_t rows, int32_t width, float epsilon,
                                              mmpo_stream stream) {
    return launch_forward<true>(sum, out, rstd, x, delta, weight, rows, width, epsilon, stream);
}

mmpo_status MMPO_EXPORT(add)(bf16* sum, const bf16* x, const bf16* delta, int64_t length, mmpo_stream stream) {
    if (length == 0) return kSuccess;
    if (!vector_aligned(sum, x, delta)) return kInvalidValue;
    return LAUNCH(add_kernel, flat_blocks(length), kBlock, 0, cuda_stream(stream), sum, x, delta, length);
}

int64_t MMPO_EXPORT(rms_norm_backward_workspace)(int32_t rows, int32_t width) {
    // No layout has more blocks than this, whatever the width.
    return min(int64_t(rows), int64_t(kBackwardBlocks)) * width * int64_t(sizeof(float));
}

mmpo_status MMPO_EXPORT(rms_norm_backward)(bf16* dx, float* dweight, void* workspace, const bf16* dout, const bf16* x,
                                           const bf16* weight, const float* rstd, int32_t rows, int32_t width,
                                           mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    float* const partials = static_cast<float*>(workspace);
    return with_row_layout(width, [=](auto layout) {
        using Layout = decltype(layout);
        const int blocks = backward_blocks<Layout>(rows);
        const mmpo_status status =
            LAUNCH(rms_norm_backward_kernel<Layout>, unsigned(blocks), kBlock, backward_shared<Layout>(width),
                   cuda_stream(stream), dx, partials, dout, x, weight, rstd, rows, width);
        // A frozen weight has no gradient: its partial sums stay where they are.
        const bool finished = status != kSuccess || dweight == nullptr;
        return finished ? status : add_partials(dweight, partials, blocks, width, stream);
    });
}
