// The log-prob head: hidden[rows, D] and the vocabulary matrix weight[V, D] to lse, the target's log-prob and the
// entropy of each row; and back to the gradient of its logits.
//
//   logits = hidden weight^T
//   lse = log sum_v e^logit     logp = logit[target] - lse     entropy = -sum_v pi_v log pi_v
//   dlogits_v = a * (onehot_v - pi_v) - b * pi_v * (log pi_v + entropy)
//
// All outputs are assigned. Logits exist only as f32 accumulators. The gemm's epilogue (common/logp_epilogue.cuh) turns
// a tile of them into statistics of its rows, which a second kernel merges in a fixed order. The backward has two
// modes:
//
//   main       The epilogue also writes the exponentials of the logits relative to a reference of the row, as bf16.
//              Once the target's own value is replaced, a row's dlogits are these exponentials times
//              -a e^(reference - lse). So dlogits are never formed: the factor is applied to the rows of hidden (for
//              dweight) and to the rows of the result (for dhidden). With an entropy term there is no such factor. Then
//              references are the tiles' largest logits, and dlogits are formed in place.
//   recompute  Nothing is kept. The gemm runs again, and its epilogue writes dlogits.
//
// Why exponentials are kept and not logits: rounding a logit of 20 to bf16 changes its probability by up to 6 %,
// rounding a log-prob of -8 by up to 3 %. An exponential keeps every probability to 2^-9 of its size, the epilogue has
// it at hand, and the backward needs no exponential of its own. The target's gradient a (1 - pi) comes from its f32
// log-prob.

#include "common/gemm.cuh"
#include "common/logp_epilogue.cuh"
#include "common/logp_merge.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

// ---- forward: statistics of a tile

// What the warps of a block tell each other about the block's rows, each about its own columns.
template <class C>
struct Exchange {
    float largest[C::Tile::kWarpsN][C::Tile::BLOCK_M];
    float sum[C::Tile::kWarpsN][C::Tile::BLOCK_M];
    float weighted[C::Tile::kWarpsN][C::Tile::BLOCK_M];
};

// Writes `values`, on which a quad of lanes agrees, for rows row + l/4 and row + l/4 + 8 of the tile.
DEVICE void share(float* of_rows, int row, const float (&values)[2]) {
    if (lane_id() % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) of_rows[row + int(lane_id()) / 4 + 8 * h] = values[h];
}

// kExponentials: exponentials are kept in exponentials[rows, V], stored four at a time where kAligned.
template <bool kExponentials, bool kAligned>
struct ForwardEpilogue {
    static constexpr bool kStores = kExponentials;

    bf16* exponentials;
    TileStatistics statistics;

    // A row's statistics need all of its columns in the tile, which kWarpsN warps share.
    template <class C>
    DEVICE void transform(gemm::Accumulators<C>& logits, gemm::TileOrigin origin, unsigned char* shared) const {
        static_assert(C::Tile::BLOCK_N == kStatisticsColumns, "a tile is a row's columns of one reference");
        static_assert(C::kStagedBytes + sizeof(Exchange<C>) <= C::kSharedBytes, "room after the staged tile");
        Exchange<C>& exchange = *reinterpret_cast<Exchange<C>*>(shared + C::kStagedBytes);
        const gemm::WarpPart part = gemm::warp_part<C>();
        const int warp_column = part.n / C::WARP_N;
        constexpr int COLUMNS = C::WARP_N;
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i) {
            float largest[2] = {kNoLogit, kNoLogit};
            mask_columns<COLUMNS>(logits[i], origin.n + part.n, statistics.vocab);
            const int row = origin.m + part.m + 16 * i;
            pick_targets<COLUMNS>(statistics, RowTargets(statistics, row), logits[i], row, origin.n + part.n);
            raise_largest<COLUMNS>(largest, logits[i]);
            reduce_largest(largest);
            share(exchange.largest[warp_column], part.m + 16 * i, largest);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i) {
            float reference[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reference[h] = block_reference<C>(exchange, origin, part.m + 16 * i + int(lane_id()) / 4 + 8 * h);
            }
            RowSums sums;
            sums.exponentiate<COLUMNS>(logits[i], reference, statistics.weighted != nullptr);
            sums.reduce<true>();
            share(exchange.sum[warp_column], part.m + 16 * i, sums.sum);
            share(exchange.weighted[warp_column], part.m + 16 * i, sums.weighted);
        }
        __syncthreads();
        write_statistics<C>(exchange, origin);
    }

    DEVICE void store(int row, int column, float4 value) const {
        const float values[4] = {value.x, value.y, value.z, value.w};
        gemm::store_four_bf16<kAligned>(exponentials, statistics.vocab, row, column, values);
    }

private:
    template <class C>
    DEVICE float block_reference(const Exchange<C>& exchange, gemm::TileOrigin origin, int row) const {
        float largest = exchange.largest[0][row];
#pragma unroll
        for (int warp = 1; warp < C::Tile::kWarpsN; ++warp) largest = fmaxf(largest, exchange.largest[warp][row]);
        return statistics.reference_of(origin.m + row, largest);
    }

    // One thread a row.
    template <class C>
    DEVICE void write_statistics(const Exchange<C>& exchange, gemm::TileOrigin origin) const {
        static_assert(C::kThreads >= C::Tile::BLOCK_M, "a thread for each row");
        const int row = int(threadIdx.x);
        if (row >= C::Tile::BLOCK_M || origin.m + row >= statistics.rows) return;
        float sum = 0.0f, weighted = 0.0f;
#pragma unroll
        for (int warp = 0; warp < C::Tile::kWarpsN; ++warp) {
            sum += exchange.sum[warp][row];
            weighted += exchange.weighted[warp][row];
        }
        const int64_t index = int64_t(origin.n / kStatisticsColumns) * statistics.rows + origin.m + row;
        statistics.reference[index] = block_reference<C>(exchange, origin, row);
        statistics.sum[index] = sum;
        if (statistics.weighted != nullptr) statistics.weighted[index] = weighted;
    }
};

template <bool kExponentials, bool kAlignedLoads, bool kAlignedStores>
mmpo_status launch_statistics(bf16* exponentials, const TileStatistics& statistics, const GemmOperands& operands,
                              mmpo_stream stream) {
    const ForwardEpilogue<kExponentials, kAlignedStores> epilogue{exponentials, statistics};
    return gemm::launch_tiles<gemm::LargeTile, ForwardLines, kAlignedLoads>(operands, epilogue, stream);
}

mmpo_status launch_statistics(bf16* exponentials, const TileStatistics& statistics, const GemmOperands& operands,
                              mmpo_stream stream) {
    const bool loads = lines_aligned<ForwardLines>(operands);
    const bool stores = vector_rows(statistics.vocab) && vector_aligned(exponentials);
    if (exponentials == nullptr) {
        return loads ? launch_statistics<false, true, true>(nullptr, statistics, operands, stream)
                     : launch_statistics<false, false, true>(nullptr, statistics, operands, stream);
    }
    if (!loads) return launch_statistics<true, false, false>(exponentials, statistics, operands, stream);
    return stores ? launch_statistics<true, true, true>(exponentials, statistics, operands, stream)
                  : launch_statistics<true, true, false>(exponentials, statistics, operands, stream);
}

// ---- backward in place: dlogits overwrite exponentials

constexpr int kBackwardVectors = 4;

template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    logp_head_backward_kernel(bf16* exponentials, const float* __restrict__ references, GradientInputs inputs,
                              int vocab) {
    const WarpTile tile = warp_tile<kBackwardVectors>(vocab);
    if (tile.row >= inputs.rows) return;
    bf16* const row = exponentials + int64_t(tile.row) * vocab;
    uint4 packed[kBackwardVectors];
    float shift[kBackwardVectors];
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        const int column = tile.column + v * kVectorStride;
        packed[v] = load8<kVectorized>(row, column, vocab);
        // A lane's eight columns share a reference.
        const int64_t index = int64_t(column / kStatisticsColumns) * inputs.rows + tile.row;
        shift[v] = column < vocab ? references[index] : 0.0f;
    }
    const RowGradient gradient(inputs, tile.row);
#pragma unroll
    for (int v = 0; v < kBackwardVectors; ++v) {
        const int column = tile.column + v * kVectorStride;
        // log2 of the factor that makes a probability of an exponential.
        const float log2_factor = shift[v] - gradient.lse, factor = exp2_approx(log2_factor);
        const int offset = gradient.target - column;
        float values[kVector];
        unpack8(values, packed[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            // The branch is the same for a whole warp: rows without an entropy term form no logarithm. The logarithm of
            // 0 would be infinite.
            const float log2_probability =
                gradient.slope != 0.0f && values[i] != 0.0f ? log2_approx(values[i]) + log2_factor : 0.0f;
            values[i] = gradient.of(values[i] * factor, log2_probability);
        }
        if (offset >= 0 && offset < kVector) {
            const float at_target = target_gradient(inputs, tile.row);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (offset == i) values[i] = at_target;
            }
        }
        store8<kVectorized>(row, column, vocab, pack8(values));
    }
}

// ---- backward without an entropy term
//
// The dlogits of a row are its kept exponentials times a factor.

template <bool kVectorized>
DEVICE void load_values(float (&values)[kVector], const bf16* row, int column, int width) {
    unpack8(values, load8<kVectorized>(row, column, width));
}
template <bool kVectorized>
DEVICE void load_values(float (&values)[kVector], const float* row, int column, int width) {
    load8<kVectorized>(values, row, column, width);
}

template <bool kVectorized, class Input>
__global__ void __launch_bounds__(kBlock)
    scale_rows_kernel(bf16* __restrict__ out, const Input* __restrict__ x, const float* __restrict__ references,
                      const float* __restrict__ lse, const float* __restrict__ dlogp, int rows, int width) {
    const WarpTile tile = warp_tile<1>(width);
    if (tile.row >= rows) return;
    const int64_t first = int64_t(tile.row) * width;
    float values[kVector];
    load_values<kVectorized>(values, x + first, tile.column, width);
    const float factor = -dlogp[tile.row] * exp2_approx(fmaf(-lse[tile.row], kLog2E, references[tile.row]));
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= factor;
    store8<kVectorized>(out + first, tile.column, width, pack8(values));
}

template <class Input>
mmpo_status scale_rows(bf16* out, const Input* x, const void* workspace, const float* lse, const float* dlogp, int rows,
                       int width, int vocab, mmpo_stream stream) {
    if (rows == 0 || width == 0) return kSuccess;
    const float* const references = TileStatistics::row_references_in(workspace, rows, vocab);
    const unsigned blocks = warp_tile_blocks<1>(rows, width);
    return vector_rows(width) ? LAUNCH((scale_rows_kernel<true, Input>), blocks, kBlock, 0, cuda_stream(stream), out, x,
                                       references, lse, dlogp, rows, width)
                              : LAUNCH((scale_rows_kernel<false, Input>), blocks, kBlock, 0, cuda_stream(stream), out,
                                       x, references, lse, dlogp, rows, width);
}

// ---- backward with nothing kept: the gemm runs once more

template <bool kAligned>
struct GradientEpilogue {
    static constexpr bool kStores = true;

    bf16* dlogits;  // [rows, columns]
    GradientInputs inputs;
    int first_column;
    int columns;

    template <class C>
    DEVICE void transform(gemm::Accumulators<C>& logits, gemm::TileOrigin origin, unsigned char*) const {
        const gemm::WarpPart part = gemm::warp_part<C>();
#pragma unroll
        for (int i = 0; i < C::kMmaM; ++i) {
            const RowGradients gradients(inputs, origin.m + part.m + 16 * i);
            logits_to_gradient<C::WARP_N>(logits[i], gradients, inputs, first_column + origin.n + part.n);
        }
    }

    DEVICE void store(int row, int column, float4 value) const {
        const float values[4] = {value.x, value.y, value.z, value.w};
        gemm::store_four_bf16<kAligned>(dlogits, columns, row, column, values);
    }
};

template <bool kAlignedLoads, bool kAlignedStores>
mmpo_status launch_gradients(bf16* dlogits, const GradientInputs& inputs, int first_column,
                             const GemmOperands& operands, mmpo_stream stream) {
    const GradientEpilogue<kAlignedStores> epilogue{dlogits, inputs, first_column, operands.shape_n};
    return gemm::launch_tiles<gemm::LargeTile, ForwardLines, kAlignedLoads>(operands, epilogue, stream);
}

}  // namespace

int64_t MMPO_EXPORT(logp_head_workspace)(int32_t rows, int32_t vocab) {
    return TileStatistics::workspace_bytes(rows, vocab);
}

mmpo_status MMPO_EXPORT(logp_head_forward)(float* lse, float* logp, float* entropy, mmpo_bf16* exponentials,
                                           void* workspace, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                           const uint32_t* targets, int32_t rows, int32_t width, int32_t vocab,
                                           mmpo_stream stream) {
    if (rows == 0 || width == 0 || vocab == 0) return kSuccess;
    const auto statistics = begin_statistics(exponentials, workspace, targets, rows, vocab, entropy);
    const GemmOperands operands{hidden, weight, rows, vocab, width};
    if (const mmpo_status error = target_references(statistics, hidden, weight, width, stream)) return error;
    if (const mmpo_status error = launch_statistics(exponentials, statistics, operands, stream)) return error;
    return merge_tiles(lse, logp, entropy, exponentials, statistics, stream);
}

mmpo_status MMPO_EXPORT(logp_head_backward)(mmpo_bf16* exponentials, const void* workspace, const uint32_t* targets,
                                            const float* lse, const float* logp, const float* dlogp,
                                            const float* dentropy, const float* entropy, int32_t rows, int32_t vocab,
                                            mmpo_stream stream) {
    if (rows == 0 || vocab == 0) return kSuccess;
    if (dentropy == nullptr || entropy == nullptr) return kInvalidValue;
    const GradientInputs inputs{targets, lse, logp, dlogp, dentropy, entropy, rows};
    const float* const references = static_cast<const float*>(workspace);
    const unsigned blocks = warp_tile_blocks<kBackwardVectors>(rows, vocab);
    return vector_rows(vocab) ? LAUNCH(logp_head_backward_kernel<true>, blocks, kBlock, 0, cuda_stream(stream),
                                       exponentials, references, inputs, vocab)
                              : LAUNCH(logp_head_backward_kernel<false>, blocks, kBlock, 0, cuda_stream(stream),
                                       exponentials, references, inputs, vocab);
}

mmpo_status MMPO_EXPORT(logp_head_scale_hidden)(mmpo_bf16* out, const mmpo_bf16* hidden, const void* workspace,
                                                const float* lse, const float* dlogp, int32_t rows, int32_t width,
                                                int32_t vocab, mmpo_stream stream) {
    return scale_rows(out, hidden, workspace, lse, dlogp, rows, width, vocab, stream);
}

mmpo_status MMPO_EXPORT(logp_head_scale_gradient)(mmpo_bf16* out, const float* gradient, const void* workspace,
                                                  const float* lse, const float* dlogp, int32_t rows, int32_t width,
                                                  int32_t vocab, mmpo_stream stream) {
    return scale_rows(out, gradient, workspace, lse, dlogp, rows, width, vocab, stream);
}

mmpo_status MMPO_EXPORT(logp_head_dlogits)(mmpo_bf16* dlogits, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                           const uint32_t* targets, const float* lse, const float* logp,
                                           const float* dlogp, const float* dentropy, const float* entropy,
                                           int32_t rows, int32_t width, int32_t first_column, int32_t columns,
                                           mmpo_stream stream) {
    if (rows == 0 || width == 0 || columns == 0) return kSuccess;
    if ((dentropy == nullptr) != (entropy == nullptr)) return kInvalidValue;
    const GradientInputs inputs{targets, lse, logp, dlogp, dentropy, entropy, rows};
    const GemmOperands operands{hidden, weight + int64_t(first_column) * width, rows, columns, width};
    if (!lines_aligned<ForwardLines>(operands)) {
        return launch_gradients<false, false>(dlogits, inputs, first_column, operands, stream);
    }
    return vector_rows(columns) && vector_aligned(dlogits)
               ? launch_gradients<true, true>(dlogits, inputs, first_column, operands, stream)
               : launch_gradients<true, false>(dlogits, inputs, first_column, operands, stream);
}
