// Matrix products on TMA and wgmma (sm_90a): out[M, N] = left[M, K] * right[K, N], bf16 in, f32 accumulators, whatever
// an epilogue makes of them. Any sizes, as long as the lines of both operands are multiples of 8 values (16 bytes,
// which tensor maps ask for): copies fill what lies outside with zeros, stores clip it.
//
// A block is persistent and takes tiles of `out` in turn. Its warpgroups have roles:
//
//   producer     one thread fills a ring of stages, each a slice of BLOCK_K along K of both operands, by TMA
//   consumers    64 rows each of the tile: wgmma from the stages, then the epilogue on the accumulators
//
// The producer runs ahead into the next tile while consumers are in the epilogue, and the epilogue's stores are TMA's,
// so that of it only the conversion of accumulators to panels of shared memory keeps the tensor cores waiting.
//
// Two blocks may form a cluster, with tiles one below the other: each loads half of every slice of the right operand,
// which both need, and multicasts it to both. 128 x 256 tiles then ask L2 for 32 instead of 48 bytes a cycle. The price
// is that a stage is free only when the consumers of both blocks have left it.
#pragma once

#include <type_traits>

#include "product_plan.cuh"
#include "warp_panels.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace hopper {

constexpr int BLOCK_K = kSliceDepth;
// What a block may have of a multiprocessor's 228 KiB.
constexpr int kMostSharedBytes = 227 * 1024;

// Tiles: BLOCK_M x BLOCK_N of `out`, cut among kConsumersM * kConsumersN consumers; kStages slices under way; kPanels a
// warp for its epilogue (two let one leave while the next is written; more where memory is left, so that a tile's
// stores rarely wait for one another). Registers: 65536 are shared out evenly at first; the producer gives most of its
// up.
struct Alone {
    static constexpr int kCluster = 1;
};
struct TwoConsumers : Alone {
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};
struct Tile128x256 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 256, kConsumersM = 2, kConsumersN = 1, kStages = 4, kPanels = 2;
};
struct Tile192x192 : Alone {
    static constexpr int BLOCK_M = 192, BLOCK_N = 192, kConsumersM = 3, kConsumersN = 1, kStages = 3, kPanels = 3;
    static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};
struct Tile128x192 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 192, kConsumersM = 2, kConsumersN = 1, kStages = 4, kPanels = 4;
};
struct Tile128x128 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 128, kConsumersM = 2, kConsumersN = 1, kStages = 5, kPanels = 4;
};
struct Tile64x128 : TwoConsumers {
    static constexpr int BLOCK_M = 64, BLOCK_N = 128, kConsumersM = 1, kConsumersN = 2, kStages = 6, kPanels = 4;
};

// By two blocks of a cluster.
template <class Tile>
struct Paired : Tile {
    static constexpr int kCluster = 2;
};

// Which index of an operand's matrix runs along memory: K, or the one that also indexes `out`.
enum class Line { depth, outer };

// A slice of one operand in shared memory: OUTER rows (or columns) of `out` times BLOCK_K, by kShares blocks of a
// cluster that each load as many of its rows, for all of them.
template <int OUTER, Line kLine, int kShares = 1>
struct Slice {
    static constexpr bool kTransposed = kLine == Line::outer;
    static constexpr int kRows = kTransposed ? BLOCK_K : OUTER, kColumns = kTransposed ? OUTER : BLOCK_K;
    using Panels = PanelTile<kRows, kColumns>;
    static constexpr int kBytes = Panels::kBytes;
    static constexpr int kShareRows = kRows / kShares;
    static_assert(kRows % (8 * kShares) == 0, "whole repetitions of the swizzle");

    // A map of the operand, whose lines lie back to back.
    static int encode(CUtensorMap* map, const bf16* operand, int outer_size, int depth_size) {
        const uint64_t rows = uint64_t(kTransposed ? depth_size : outer_size);
        const uint64_t columns = uint64_t(kTransposed ? outer_size : depth_size);
        return encode_tensor_map_2d(map, operand, rows, columns, columns, kShareRows, kPanelColumns,
                                    Swizzle::bytes_128);
    }
    // `rank`: of the block in its cluster.
    static DEVICE void load(uint32_t slice, const CUtensorMap* map, int outer, int depth, uint32_t mbarrier, int rank) {
        const int column = kTransposed ? outer : depth, row = kTransposed ? depth : outer;
        if constexpr (kShares == 1) {
            Panels::load(slice, map, column, row, mbarrier);
        } else {
            const int first = rank * kShareRows;
#pragma unroll
            for (int panel = 0; panel < Panels::kPanels; ++panel) {
                tma_load_2d_multicast(slice + uint32_t(panel * Panels::kPanelBytes + first * kPanelRowBytes), map,
                                      column + panel * kPanelColumns, row + first, mbarrier, (1 << kShares) - 1);
            }
        }
    }
    // The operand of one wgmma: depth 16 * step .., outer index from `outer` (a multiple of 64) on.
    static DEVICE uint64_t operand(uint32_t slice, int outer, int step) {
        if constexpr (kTransposed)
            return Panels::depth_in_rows(slice, outer, step);
        else
            return Panels::depth_in_columns(slice, outer, step);
    }
};

// The three products of a linear layer x[T, I] -> out[T, O] with weight[O, I]; none needs a transposed copy. A tile's
// columns come from kRightParts equal parts of the right operand's columns, the same of each, side by side.
struct OneRightPart {
    static constexpr int kRightParts = 1;
};
struct ForwardLines : OneRightPart {  // x, weight
    static constexpr Line kLeft = Line::depth, kRight = Line::depth;
};
struct BackwardInputLines : OneRightPart {  // dout, weight
    static constexpr Line kLeft = Line::depth, kRight = Line::outer;
};
struct BackwardWeightLines : OneRightPart {  // dout, x
    static constexpr Line kLeft = Line::outer, kRight = Line::outer;
};
// A weight of gate rows, then as many up rows: half a tile's columns are of the one, half the same columns of the
// other.
struct GatedForwardLines {
    static constexpr Line kLeft = Line::depth, kRight = Line::depth;
    static constexpr int kRightParts = 2;
};

template <class Tile, class Lines>
struct Layout {
    using Left = Slice<Tile::BLOCK_M, Lines::kLeft>;
    using Right = Slice<Tile::BLOCK_N, Lines::kRight>;
    using RightPart = Slice<Tile::BLOCK_N / Lines::kRightParts, Lines::kRight, Tile::kCluster>;
    static_assert(Lines::kRightParts == 1 || !Right::kTransposed, "parts of a slice lie below each other");
    using Ring = StageRing<Tile::kStages>;
    using Panels = WarpPanels<Tile::kPanels>;
    static constexpr int kConsumers = Tile::kConsumersM * Tile::kConsumersN;
    static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / kWarp;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
    static constexpr int CONSUMER_N = Tile::BLOCK_N / Tile::kConsumersN;
    static_assert(Tile::BLOCK_M == 64 * Tile::kConsumersM, "a consumer's products have 64 rows");
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
    // Shared memory: stages, panels, then the ring's mbarriers.
    static constexpr int kPanelsAt = Tile::kStages * kStageBytes;
    static constexpr int kRingAt = kPanelsAt + kConsumerWarps * Panels::kBytes;
    static constexpr int kSharedBytes = kRingAt + Ring::kBytes;
    static_assert(kSharedBytes <= kMostSharedBytes, "fewer stages or panels");
};

// Division of numbers below 2^31 by one that the host knows: a product and two shifts. The device's own division is a
// chain of some hundred cycles, and consumers would begin each tile with five of them.
struct Divisor {
    uint32_t multiplier, shift;

    static Divisor of(int64_t divisor) {
        uint32_t shift = 0;
        while (int64_t(1) << shift < divisor) ++shift;
        return {uint32_t(ceil_div(int64_t(1) << (31 + shift), divisor)), shift};
    }
    DEVICE int quotient(int number) const { return int(uint64_t(uint32_t(number)) * multiplier >> 31 >> shift); }
};

// What a kernel is told. An epilogue is a struct with
//
//   template <int kCount, class Panels>
//   DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const;
//
// which every consumer warp calls once a tile with 16 rows x 2 * kCount columns of accumulators, from `row` and
// `column` of `out` on, in wgmma's layout (ptx_wgmma.cuh); they may lie outside of `out`, in part or wholly. `panels`
// is the warp's own way to global memory (warp_panels.cuh). Of a split product, part s is called with rows s *
// split_rows further on.
template <class Epilogue>
struct Problem {
    CUtensorMap left, right;
    int tiles_m, tiles_n;  // tiles_m and tile_group in whole clusters
    int splits, tile_group;
    // Slices of a split; the first `longer_splits` have one more.
    int split_slices, longer_splits;
    // Tiles of a split, of a group of rows of tiles, rows of a group, and of the last one if it has fewer.
    Divisor by_tiles, by_group_tiles, by_group_rows, by_last_rows;
    int split_rows;
    int right_part;  // distance between the parts of the right operand
    Epilogue epilogue;
};

// One tile, or the part of it that a split sums.
struct TileWork {
    int m, n, first_slice, end_slice, out_row;
};

// The tiles of a cluster, one below the other, are number `index` of all.
template <class Tile, class Epilogue>
DEVICE TileWork tile_work(const Problem<Epilogue>& problem, int index, int rank) {
    const int split = problem.by_tiles.quotient(index), tile = index - split * problem.tiles_m * problem.tiles_n;
    const int group = problem.by_group_tiles.quotient(tile), first_row = group * problem.tile_group;
    const int within = tile - first_row * problem.tiles_n;
    const bool whole = first_row + problem.tile_group <= problem.tiles_m;
    const int rows = whole ? problem.tile_group : problem.tiles_m - first_row;
    const int column = (whole ? problem.by_group_rows : problem.by_last_rows).quotient(within);
    const int m = ((first_row + within - column * rows) * Tile::kCluster + rank) * Tile::BLOCK_M;
    const int first_slice = split * problem.split_slices + min(split, problem.longer_splits);
    const int slices = problem.split_slices + (split < problem.longer_splits ? 1 : 0);
    return {m, column * Tile::BLOCK_N, first_slice, first_slice + slices, m + split * problem.split_rows};
}

template <class Tile>
DEVICE int rank_in_cluster() {
    return Tile::kCluster == 1 ? 0 : int(cluster_rank());
}

// Calls `visit` with each of the block's tiles. Producer and consumers walk the same ones.
template <class Tile, class Epilogue, class Visit>
DEVICE void each_tile(const Problem<Epilogue>& problem, const Visit& visit) {
    const int count = problem.tiles_m * problem.tiles_n * problem.splits, rank = rank_in_cluster<Tile>();
    const int step = int(gridDim.x) / Tile::kCluster;
    for (int index = int(blockIdx.x) / Tile::kCluster; index < count; index += step) {
        visit(tile_work<Tile>(problem, index, rank));
    }
}

#if MMPO_SM90

template <class Tile>
DEVICE void sync_cluster() {
    if constexpr (Tile::kCluster == 1)
        __syncthreads();
    else
        cluster_sync();
}

// One thread: loads slices as stages become free.
template <class Tile, class Lines, class Epilogue>
DEVICE void produce(const Problem<Epilogue>& problem, uint32_t shared) {
    using L = Layout<Tile, Lines>;
    const typename L::Ring ring{shared + L::kRingAt};
    StageCursor<Tile::kStages> cursor;
    const int rank = rank_in_cluster<Tile>();
    prefetch_tensor_map(&problem.left);
    prefetch_tensor_map(&problem.right);
    each_tile<Tile>(problem, [&](const TileWork& work) {
        for (int slice = work.first_slice; slice < work.end_slice; ++slice) {
            const uint32_t stage = shared + uint32_t(cursor.stage * L::kStageBytes), full = ring.full(cursor.stage);
            // Free in all blocks of the cluster, since this one may multicast to all.
            mbarrier_wait(ring.empty(cursor.stage), cursor.parity ^ 1);
            mbarrier_arrive_expect_tx(full, L::kStageBytes);
            L::Left::load(stage, &problem.left, work.m, slice * BLOCK_K, full, rank);
#pragma unroll
            for (int part = 0; part < Lines::kRightParts; ++part) {
                L::RightPart::load(stage + L::Left::kBytes + part * L::RightPart::kBytes, &problem.right,
                                   work.n / Lines::kRightParts + part * problem.right_part, slice * BLOCK_K, full,
                                   rank);
            }
            cursor.advance();
        }
    });
}

// Two consumers that finish a tile together leave the tensor cores idle while both are in the epilogue. So the second
// starts a tile when the products of the first's kLead slices are queued: it still multiplies while the first is in the
// epilogue, and the first is in the next tile while it is. The ring holds the slices between them; where copies do not
// keep up, the first waits and the lead shrinks.
template <class Tile>
struct Lead {
    static constexpr int kLead = Tile::kConsumersM * Tile::kConsumersN == 2 ? Tile::kStages / 2 : 0;
    static constexpr uint32_t kBarrier = 1, kThreads = 2 * kWarpgroupThreads;

    // Whether a tile is so deep that the first consumer, at most a ring ahead, cannot arrive for the next tile before
    // the second has started this one.
    static DEVICE bool wanted(const TileWork& work) {
        return kLead > 0 && work.end_slice - work.first_slice > Tile::kStages;
    }
    static DEVICE void wait(const TileWork& work, int consumer) {
        if (consumer == 1 && wanted(work)) bar_sync(kBarrier, kThreads);
    }
    // Behind the products of `slice`.
    static DEVICE void give(const TileWork& work, int consumer, int slice) {
        if (consumer == 0 && slice + 1 - work.first_slice == kLead && wanted(work)) bar_arrive(kBarrier, kThreads);
    }
};

// A thread's part of a consumer's accumulators.
template <class Tile, class Lines>
using ConsumerPart = float[Layout<Tile, Lines>::CONSUMER_N / 2];

// d = the consumer's part of one tile. The products of one slice are under way while the next is waited for, and a
// stage is given back once those of the next are queued.
template <class Tile, class Lines>
DEVICE void multiply_tile(ConsumerPart<Tile, Lines>& d, StageCursor<Tile::kStages>& cursor, uint32_t shared,
                          const TileWork& work, int consumer) {
    using L = Layout<Tile, Lines>;
    const typename L::Ring ring{shared + L::kRingAt};
    const int outer_m = consumer % Tile::kConsumersM * 64, outer_n = consumer / Tile::kConsumersM * L::CONSUMER_N;
    // Each warp for itself: one may be a slice behind its warpgroup's others.
    const auto release = [&](int stage) {
        if constexpr (Tile::kCluster == 1) {
            if (lane_id() == 0) mbarrier_arrive(ring.empty(stage));
        } else if (lane_id() < Tile::kCluster) {
            mbarrier_arrive_at(ring.empty(stage), lane_id());
        }
    };
    int previous = 0;
    Lead<Tile>::wait(work, consumer);
    for (int slice = work.first_slice; slice < work.end_slice; ++slice) {
        // From one lane, so that the compiler knows it is uniform and keeps descriptors in uniform registers.
        const uint32_t left = __shfl_sync(0xffffffffu, shared + uint32_t(cursor.stage * L::kStageBytes), 0);
        const uint32_t right = left + L::Left::kBytes;
        mbarrier_wait(ring.full(cursor.stage), cursor.parity);
        pin_registers(d);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / kWgmmaDepth; ++step) {
            wgmma_ss<L::CONSUMER_N, L::Left::kTransposed, L::Right::kTransposed>(
                d, L::Left::operand(left, outer_m, step), L::Right::operand(right, outer_n, step),
                slice != work.first_slice || step != 0);
        }
        wgmma_commit();
        Lead<Tile>::give(work, consumer, slice);
        wgmma_wait<1>();
        if (slice != work.first_slice) release(previous);
        previous = cursor.stage;
        cursor.advance();
    }
    wgmma_wait<0>();
    pin_registers(d);
    release(previous);
}

template <class Tile, class Lines, class Epilogue>
DEVICE void consume(const Problem<Epilogue>& problem, uint32_t shared, int consumer) {
    using L = Layout<Tile, Lines>;
    const int warp = int(threadIdx.x) / kWarp % 4;
    const int row = consumer % Tile::kConsumersM * 64 + warp * 16,
              column = consumer / Tile::kConsumersM * L::CONSUMER_N;
    typename L::Panels panels{shared + uint32_t(L::kPanelsAt + (consumer * 4 + warp) * L::Panels::kBytes)};
    StageCursor<Tile::kStages> cursor;
    each_tile<Tile>(problem, [&](const TileWork& work) {
        float d[L::CONSUMER_N / 2];
        multiply_tile<Tile, Lines>(d, cursor, shared, work, consumer);
        problem.epilogue(d, work.out_row + row, work.n + column, panels);
    });
    panels.drain();
}

#endif

template <class Tile, class Lines, class Epilogue>
static __global__ void __launch_bounds__(Layout<Tile, Lines>::kThreads, 1)
    product_kernel(const __grid_constant__ Problem<Epilogue> problem) {
#if MMPO_SM90
    using L = Layout<Tile, Lines>;
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw);
    if (threadIdx.x == 0) {
        typename L::Ring{shared + L::kRingAt}.init(L::kConsumerWarps * Tile::kCluster);
        fence_mbarrier_init();
    }
    sync_cluster<Tile>();
    // The shuffle tells the compiler that a warp has one role.
    const int role = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0);
    if (role == L::kConsumers) {
        setmaxnreg_decrease<Tile::kProducerRegisters>();
        if (threadIdx.x == L::kConsumers * kWarpgroupThreads) produce<Tile, Lines>(problem, shared);
    } else {
        setmaxnreg_increase<Tile::kConsumerRegisters>();
        consume<Tile, Lines>(problem, shared, role);
    }
    // The other block may still multicast into this one, and arrive at its mbarriers.
    if constexpr (Tile::kCluster > 1) sync_cluster<Tile>();
#endif
}

// Operands and sizes, for launchers.
struct Operands {
    const bf16* left;
    const bf16* right;
    int shape_m, shape_n, shape_k;
};

// Rows that each part of a split product has in the array its epilogue writes: whole clusters, so that parts stay
// apart.
inline int64_t split_rows(const ProductPlan& plan, int shape_m) {
    const int64_t rows = int64_t(plan.block_m) * plan.cluster;
    return ceil_div(shape_m, rows) * rows;
}

// Whether tensor maps of the operands exist for Lines.
template <class Lines>
bool operands_mappable(const Operands& operands) {
    const int left_line = Lines::kLeft == Line::depth ? operands.shape_k : operands.shape_m;
    const int right_line = Lines::kRight == Line::depth ? operands.shape_k : operands.shape_n;
    return vector_rows(left_line) && vector_rows(right_line) && vector_aligned(operands.left, operands.right);
}

template <class Tile, class Lines, class Epilogue>
mmpo_status launch_tiles(const Operands& operands, const ProductPlan& plan, const Epilogue& epilogue,
                         mmpo_stream stream) {
    using L = Layout<Tile, Lines>;
    const int64_t tiles_m = ceil_div(operands.shape_m, Tile::BLOCK_M * Tile::kCluster);
    const int64_t tiles_n = ceil_div(operands.shape_n, Tile::BLOCK_N);
    const int64_t count = tiles_m * tiles_n * plan.splits;
    const int64_t rows = tiles_m * Tile::BLOCK_M * Tile::kCluster;
    if (count > INT32_MAX || rows * plan.splits > INT32_MAX) return kInvalidValue;
    const int64_t slices = ceil_div(operands.shape_k, BLOCK_K);
    const int group = plan.tile_group / Tile::kCluster, last_rows = int(tiles_m % group);
    Problem<Epilogue> problem{{},
                              {},
                              int(tiles_m),
                              int(tiles_n),
                              plan.splits,
                              group,
                              int(slices / plan.splits),
                              int(slices % plan.splits),
                              Divisor::of(tiles_m * tiles_n),
                              Divisor::of(group * tiles_n),
                              Divisor::of(group),
                              Divisor::of(last_rows > 0 ? last_rows : 1),
                              int(rows),
                              operands.shape_n / Lines::kRightParts,
                              epilogue};
    if (const int error = L::Left::encode(&problem.left, operands.left, operands.shape_m, operands.shape_k))
        return error;
    if (const int error = L::RightPart::encode(&problem.right, operands.right, operands.shape_n, operands.shape_k))
        return error;
    const int64_t resident = multiprocessors() / Tile::kCluster > 0 ? multiprocessors() / Tile::kCluster : 1;
    const unsigned blocks = unsigned(count < resident ? count : resident) * Tile::kCluster;
    if constexpr (Tile::kCluster == 1) {
        return LAUNCH((product_kernel<Tile, Lines, Epilogue>), dim3(blocks), dim3(L::kThreads), L::kSharedBytes,
                      cuda_stream(stream), problem);
    } else {
        return LAUNCH_CLUSTERS((product_kernel<Tile, Lines, Epilogue>), Tile::kCluster, dim3(blocks), dim3(L::kThreads),
                               L::kSharedBytes, cuda_stream(stream), problem);
    }
}

// In clusters of one block or two.
template <class Tile, class Lines, class Epilogue>
mmpo_status launch_alone_or_paired(const Operands& operands, const ProductPlan& plan, const Epilogue& epilogue,
                                   mmpo_stream stream) {
    return plan.cluster == 1 ? launch_tiles<Tile, Lines>(operands, plan, epilogue, stream)
                             : launch_tiles<Paired<Tile>, Lines>(operands, plan, epilogue, stream);
}

// Queues one product with the tile that `plan` names. `out` of a split product has splits * split_rows rows.
template <class Lines, class Epilogue>
mmpo_status launch_product(const Operands& operands, const ProductPlan& plan, const Epilogue& epilogue,
                           mmpo_stream stream) {
    if (plan.block_m == 64) return launch_tiles<Tile64x128, Lines>(operands, plan, epilogue, stream);
    if (plan.block_n == 128) return launch_alone_or_paired<Tile128x128, Lines>(operands, plan, epilogue, stream);
    if (plan.block_m == 192) return launch_alone_or_paired<Tile192x192, Lines>(operands, plan, epilogue, stream);
    if (plan.block_n == 192) return launch_alone_or_paired<Tile128x192, Lines>(operands, plan, epilogue, stream);
    return launch_alone_or_paired<Tile128x256, Lines>(operands, plan, epilogue, stream);
}

// As launch_product, for a plan of plan_panel_tiles.
template <class Lines, class Epilogue>
mmpo_status launch_panel_tiles(const Operands& operands, const ProductPlan& plan, const Epilogue& epilogue,
                               mmpo_stream stream) {
    return plan.block_n == 128 ? launch_alone_or_paired<Tile128x128, Lines>(operands, plan, epilogue, stream)
                               : launch_alone_or_paired<Tile128x256, Lines>(operands, plan, epilogue, stream);
}

}  // namespace hopper
}  // namespace MMPO_VARIANT
}  // namespace mmpo
