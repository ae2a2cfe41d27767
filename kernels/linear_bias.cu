// The gradient of a linear layer's bias: dbias[outputs] += column sums of dout[rows, outputs].
//
// Accumulates. Blocks sum slices of the rows into `workspace`, and a second kernel adds the slices in order. So the
// bits are the same every time, without atomics. (The bias itself is added by the gemm's epilogue, see linear.cu.)

#include "common/partials.cuh"
#include "common/vector.cuh"

namespace {

// The lanes of a warp have 256 columns, one vector each.
constexpr int kColumns = kTileColumns<1>;
// Rows that a warp loads at once.
constexpr int kRowsAtOnce = 4;
// Least rows of a slice. Shorter slices would write almost as much to the workspace as they read.
constexpr int kMinSliceRows = kBlockWarps * kRowsAtOnce;
// The number of blocks that is aimed at if there are enough rows: eight on each multiprocessor of an H100. It is fixed
// so that the bits do not depend on the GPU.
constexpr int kBlocks = 8 * kPlannedMultiprocessors;

int slice_count(int rows, int outputs) {
    const int64_t most = ceil_div(rows, kMinSliceRows);
    return int(min(most, ceil_div(kBlocks, ceil_div(outputs, kColumns))));
}

// A block has 256 columns and one slice of rows, which its warps take in rotation.
template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    column_sums_kernel(float* __restrict__ partials, const bf16* __restrict__ dout, int rows, int outputs) {
    DYNAMIC_SHARED(shared);
    float (*const warp_sums)[kColumns] = reinterpret_cast<float (*)[kColumns]>(shared);
    const int warp = int(threadIdx.x) / kWarp;
    const int in_tile = int(lane_id()) * kVector;
    const int tile_column = int(blockIdx.x) * kColumns;
    const int slice_rows = int(ceil_div(rows, gridDim.y));
    const int end = min(rows, int(blockIdx.y + 1) * slice_rows);

    float sum[kVector] = {};
    for (int row = int(blockIdx.y) * slice_rows + warp * kRowsAtOnce; row < end; row += kBlockWarps * kRowsAtOnce) {
        uint4 packed[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            packed[i] = load8<kVectorized>(dout + int64_t(row + i) * outputs, tile_column + in_tile,
                                           row + i < end ? outputs : 0);
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            float values[kVector];
            unpack8(values, packed[i]);
#pragma unroll
            for (int j = 0; j < kVector; ++j) sum[j] += values[j];
        }
    }
    // A lane stores two halves of 16 bytes, 32 bytes apart from its neighbour's. Every other group of four lanes stores
    // its upper half first, so that eight lanes at a time cover all banks.
#pragma unroll
    for (int round = 0; round < 2; ++round) {
        const bool upper = (lane_id() / 4 + round) % 2 != 0;
        uint32_t half[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) half[j] = __float_as_uint(upper ? sum[4 + j] : sum[j]);
        store_shared_128(shared_address(&warp_sums[warp][in_tile + (upper ? 4 : 0)]),
                         make_uint4(half[0], half[1], half[2], half[3]));
    }
    __syncthreads();

    static_assert(kColumns == kBlock, "each thread adds up one column");
    const int column = tile_column + int(threadIdx.x);
    if (column >= outputs) return;
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < kBlockWarps; ++other) total += warp_sums[other][threadIdx.x];
    partials[int64_t(blockIdx.y) * outputs + column] = total;
}

}  // namespace

int64_t MMPO_EXPORT(linear_bias_backward_workspace)(int32_t rows, int32_t outputs) {
    if (rows == 0 || outputs == 0) return 0;
    return int64_t(slice_count(rows, outputs)) * outputs * int64_t(sizeof(float));
}

mmpo_status MMPO_EXPORT(linear_bias_backward)(float* dbias, void* workspace, const bf16* dout, int32_t rows,
                                              int32_t outputs, mmpo_stream stream) {
    if (rows == 0 || outputs == 0) return kSuccess;
    float* const partials = static_cast<float*>(workspace);
    const int slices = slice_count(rows, outputs);
    const dim3 grid(unsigned(ceil_div(outputs, kColumns)), unsigned(slices));
    const size_t shared_bytes = kBlockWarps * kColumns * sizeof(float);
    const mmpo_status status = vector_rows(outputs) ? LAUNCH(column_sums_kernel<true>, grid, kBlock, shared_bytes,
                                                             cuda_stream(stream), partials, dout, rows, outputs)
                                                    : LAUNCH(column_sums_kernel<false>, grid, kBlock, shared_bytes,
                                                             cuda_stream(stream), partials, dout, rows, outputs);
    return status != kSuccess ? status : add_partials(dbias, partials, slices, outputs, stream);
}
