// The log-prob head: hidden[rows, D] and the vocabulary matrix weight[V, D] to lse, the target's log-prob and the
// entropy of each row; and back to the gradient of its logits.
//
//   logits = hidden weight^T
//   lse = log sum_v e^logit     logp = logit[target] - lse     entropy = -sum_v pi_v log pi_v
//   dlogits_v = a * (onehot_v - pi_v) - b * pi_v * (log pi_v + entropy)
//
// All outputs are assigned. Logits exist only as f32 accumulators. The product's epilogue (common/logp_epilogue.cuh)
// turns a tile of them into statistics of its rows, which a second kernel merges in a fixed order. For the backward
// there are two ways:
//
//   main       The epilogue also writes the exponentials relative to a reference of the row, as bf16. A row's dlogits
//              are these times -a e^(reference - lse), once the target's own is replaced. So they are never formed: the
//              factor goes to the rows of hidden (for dweight), and to those of the product (for dhidden). An entropy
//              term has no such factor; with one, references are tiles' largest logits, and dlogits formed in place.
//   recompute  Nothing is kept. The product runs again, and its epilogue writes dlogits.
//
// Why exponentials and not logits: rounding a logit of 20 to bf16 puts its probability off by 6 %, rounding a log-prob
// of -8 by 3 %; an exponential keeps every probability to 2^-9 of its size, whatever its size, the epilogue has it at
// hand, and the backward needs no exponential of its own. The target's gradient a (1 - pi) comes from its f32 log-prob.

#include "common/logp_epilogue.cuh"
#include "common/logp_merge.cuh"
#include "common/product.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

using Logits = product::Order<product::Contiguous::kDepth, product::Contiguous::kDepth>;
using product::LargeTile;
using product::Operands;

// ---- Forward: statistics of a tile

// What the warps of a block tell each other about their columns of its rows.
template <class L>
struct Exchange {
    float largest[L::Tile::kWarpsN][L::Tile::BLOCK_M];
    float sum[L::Tile::kWarpsN][L::Tile::BLOCK_M];
    float weighted[L::Tile::kWarpsN][L::Tile::BLOCK_M];
};

// Writes `values` of rows row + l/4 and row + l/4 + 8 of the tile; a quad agrees on them.
DEVICE void tell(float* of_rows, int row, const float (&values)[2]) {
    if (lane_id() % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) of_rows[row + int(lane_id()) / 4 + 8 * h] = values[h];
}

// kExponentials: those are kept in exponentials[rows, V], four at a time where kAligned.
template <bool kExponentials, bool kAligned>
struct ForwardEpilogue {
    static constexpr bool kStores = kExponentials;

    bf16* exponentials;
    TileStatistics statistics;

    // Rows' statistics need all of their columns, which are those of kWarpsN warps.
    template <class L>
    DEVICE void transform(product::Accumulators<L>& logits, product::TileOrigin origin, unsigned char* shared) const {
        static_assert(L::Tile::BLOCK_N == kStatisticsColumns, "a tile is a row's columns of one reference");
        static_assert(L::kStagedBytes + sizeof(Exchange<L>) <= L::kSharedBytes, "room after the staged tile");
        Exchange<L>& exchange = *reinterpret_cast<Exchange<L>*>(shared + L::kStagedBytes);
        const product::WarpPart part = product::warp_part<L>();
        const int neighbour = part.n / L::WARP_N;
        constexpr int COLUMNS = L::WARP_N;
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i) {
            float largest[2] = {kNoLogit, kNoLogit};
            mask_columns<COLUMNS>(logits[i], origin.n + part.n, statistics.vocab);
            const int row = origin.m + part.m + 16 * i;
            pick_targets<COLUMNS>(statistics, RowTargets(statistics, row), logits[i], row, origin.n + part.n);
            raise_largest<COLUMNS>(largest, logits[i]);
            join_largest(largest);
            tell(exchange.largest[neighbour], part.m + 16 * i, largest);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i) {
            float reference[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reference[h] = block_reference<L>(exchange, origin, part.m + 16 * i + int(lane_id()) / 4 + 8 * h);
            }
            RowSums sums;
            sums.take_in<COLUMNS>(logits[i], reference, statistics.weighted != nullptr);
            sums.join<true>();
            tell(exchange.sum[neighbour], part.m + 16 * i, sums.sum);
            tell(exchange.weighted[neighbour], part.m + 16 * i, sums.weighted);
        }
        __syncthreads();
        write_statistics<L>(exchange, origin);
    }

    DEVICE void store(int row, int column, float4 value) const {
        const float values[4] = {value.x, value.y, value.z, value.w};
        product::store_four_bf16<kAligned>(exponentials, statistics.vocab, row, column, values);
    }

private:
    template <class L>
    DEVICE float block_reference(const Exchange<L>& exchange, product::TileOrigin origin, int row) const {
        float largest = exchange.largest[0][row];
#pragma unroll
        for (int warp = 1; warp < L::Tile::kWarpsN; ++warp) largest = fmaxf(largest, exchange.largest[warp][row]);
        return statistics.reference_of(origin.m + row, largest);
    }

    // A thread a row.
    template <class L>
    DEVICE void write_statistics(const Exchange<L>& exchange, product::TileOrigin origin) const {
        static_assert(L::kThreads >= L::Tile::BLOCK_M, "a thread for each row");
        const int row = int(threadIdx.x);
        if (row >= L::Tile::BLOCK_M || origin.m + row >= statistics.rows) return;
        float sum = 0.0f, weighted = 0.0f;
#pragma unroll
        for (int warp = 0; warp < L::Tile::kWarpsN; ++warp) {
            sum += exchange.sum[warp][row];
            weighted += exchange.weighted[warp][row];
        }
        const int64_t index = int64_t(origin.n / kStatisticsColumns) * statistics.rows + origin.m + row;
        statistics.reference[index] = block_reference<L>(exchange, origin, row);
        statistics.sum[index] = sum;
        if (statistics.weighted != nullptr) statistics.weighted[index] = weighted;
    }
};

template <bool kExponentials, bool kAlignedLoads, bool kAlignedStores>
mmpo_status launch_statistics(bf16* exponentials, const TileStatistics& statistics, const Operands& operands,
                              mmpo_stream stream) {
    const ForwardEpilogue<kExponentials, kAlignedStores> epilogue{exponentials, statistics};
    return product::launch_tiles<LargeTile, Logits, kAlignedLoads>(operands, epilogue, stream);
}

mmpo_status launch_statistics(bf16* exponentials, const TileStatistics& statistics, const Operands& operands,
                              mmpo_stream stream) {
    const bool loads = product::lines_aligned<Logits>(operands);
    const bool stores = vector_rows(statistics.vocab) && vector_aligned(exponentials);
    if (exponentials == nullptr) {
        return loads ? launch_statistics<false, true, true>(nullptr, statistics, operands, stream)
                     : launch_statistics<false, false, true>(nullptr, statistics, operands, stream);
    }
    if (!loads) return launch_statistics<true, false, false>(exponentials, statistics, operands, stream);
    return stores ? launch_statistics<true, true, true>(exponentials, statistics, operands, stream)
                  : launch_statistics<true, true, false>(exponentials, statistics, operands, stream);
}

// ---- Backward in place: a warp tile of exponentials becomes dlogits

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
        // The logarithm of what makes probabilities of exponentials.
        const float log2_factor = shift[v] - gradient.lse, factor = exp2_approx(log2_factor);
        const int offset = gradient.target - column;
        float values[kVector];
        unpack8(values, packed[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            // The same for a whole warp: rows without an entropy term form no logarithm. One of 0 would be infinite.
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

// ---- Backward without an entropy term: dlogits are the kept exponentials times a factor a row

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

// ---- Backward without anything kept: the product once more

template <bool kAligned>
struct GradientEpilogue {
    static constexpr bool kStores = true;

    bf16* dlogits;  // [rows, columns]
    GradientInputs inputs;
    int first_column;
    int columns;

    template <class L>
    DEVICE void transform(product::Accumulators<L>& logits, product::TileOrigin origin, unsigned char*) const {
        const product::WarpPart part = product::warp_part<L>();
#pragma unroll
        for (int i = 0; i < L::kMmaM; ++i) {
            const RowGradients gradients(inputs, origin.m + part.m + 16 * i);
            logits_to_gradient<L::WARP_N>(logits[i], gradients, inputs, first_column + origin.n + part.n);
        }
    }

    DEVICE void store(int row, int column, float4 value) const {
        const float values[4] = {value.x, value.y, value.z, value.w};
        product::store_four_bf16<kAligned>(dlogits, columns, row, column, values);
    }
};

template <bool kAlignedLoads, bool kAlignedStores>
mmpo_status launch_gradients(bf16* dlogits, const GradientInputs& inputs, int first_column, const Operands& operands,
                             mmpo_stream stream) {
    const GradientEpilogue<kAlignedStores> epilogue{dlogits, inputs, first_column, operands.shape_n};
    return product::launch_tiles<LargeTile, Logits, kAlignedLoads>(operands, epilogue, stream);
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
    const Operands operands{hidden, weight, rows, vocab, width};
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
    const Operands operands{hidden, weight + int64_t(first_column) * width, rows, columns, width};
    if (!product::lines_aligned<Logits>(operands)) {
        return launch_gradients<false, false>(dlogits, inputs, first_column, operands, stream);
    }
    return vector_rows(columns) && vector_aligned(dlogits)
               ? launch_gradients<true, true>(dlogits, inputs, first_column, operands, stream)
               : launch_gradients<true, false>(dlogits, inputs, first_column, operands, stream);
}
