// Gemm on TMA and wgmma (sm_90a): out[M, N] = left[M, K] * right[K, N] with bf16 operands and f32 accumulators, which
// an epilogue then stores or processes. The sizes may be anything, as long as the lines of both operands are multiples
// of 8 values (16 bytes, which tensor maps ask for): copies fill what lies outside an operand with zeros, stores clip
// it.
//
// A block is persistent: it computes one tile of `out` after the other. Its warpgroups have roles:
//
//   producer     one thread fills a ring of stages by TMA; a stage holds a slice of BLOCK_K along K of both operands
//   consumers    64 rows of the tile each: wgmma from the stages, then the epilogue on the accumulators
//
// The producer runs ahead into the next tile while consumers are in the epilogue. The epilogue's stores are TMA's as
// well, so the tensor cores wait only while accumulators are converted and written to panels of shared memory.
//
// Two blocks (or four) may form a cluster, with one tile below the other. Both need the same slices of the right
// operand, so each loads half of every slice and multicasts it to both. 128 x 256 tiles then ask L2 for 32 instead of
// 48 bytes per cycle. The price is that a stage is free only when the consumers of both blocks have left it.
#pragma once

#include "gemm_plan_sm90.cuh"
#include "input_dropout.cuh"
#include "low_rank_operands.cuh"
#include "warp_panels.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace gemm_sm90 {

constexpr int BLOCK_K = kSliceDepth;

// A tile shape is BLOCK_M x BLOCK_N of `out`, shared out among kConsumersM * kConsumersN consumers. kStages slices can
// be under way. Each consumer warp has kPanels panels for its epilogue: with two, one is stored while the next is
// written; where memory is left there are more, so that the stores of a tile rarely wait for one another. A block is
// launched with the same number of registers for every warpgroup, and the producer hands most of its own to the
// consumers.
struct SingleBlock {
    static constexpr int kCluster = 1;
};
struct TwoConsumers : SingleBlock {
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};
struct Tile128x256 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 256, kConsumersM = 2, kConsumersN = 1, kStages = 4, kPanels = 2;
};
struct Tile192x192 : SingleBlock {
    static constexpr int BLOCK_M = 192, BLOCK_N = 192, kConsumersM = 3, kConsumersN = 1, kStages = 3, kPanels = 3;
    static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};
struct Tile128x192 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 192, kConsumersM = 2, kConsumersN = 1, kStages = 4, kPanels = 4;
};
struct Tile128x128 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 128, kConsumersM = 2, kConsumersN = 1, kStages = 5, kPanels = 4;
};
// For an `out` of up to 64 columns: the products of low-rank adapters.
struct Tile128x64 : TwoConsumers {
    static constexpr int BLOCK_M = 128, BLOCK_N = 64, kConsumersM = 2, kConsumersN = 1, kStages = 6, kPanels = 4;
};
struct Tile64x128 : TwoConsumers {
    static constexpr int BLOCK_M = 64, BLOCK_N = 128, kConsumersM = 1, kConsumersN = 2, kStages = 6, kPanels = 4;
};

// The same tile, run by clusters of two blocks.
template <class Tile>
struct Paired : Tile {
    static constexpr int kCluster = 2;
};

// By clusters of four: for a right operand that is narrow, and so read anew by every tile.
template <class Tile>
struct Quad : Tile {
    static constexpr int kCluster = 4;
};

// The weight is gate rows followed by as many up rows. Half of a tile's columns come from the gate part and half from
// the same columns of the up part, so that the epilogue has both of each value at hand. In general a tile's columns
// come from kRightParts equal parts of the right operand's columns, the same columns of each, side by side.
struct GatedForwardLines {
    using Operands = GemmOperands;
    static constexpr Line kLeft = Line::depth, kRight = Line::depth;
    static constexpr int kRightParts = 2;
};

// The same order of operands with low-rank parts, whose right operands reach gate or up.
struct AdaptedGatedForwardLines : GatedForwardLines {
    using Operands = ScaledOperands;
};

// A slice of one operand in shared memory: OUTER rows (or columns) of `out` times BLOCK_K. The kShares blocks of a
// cluster each load an equal share of its rows, for all of them.
template <int OUTER, Line kLine, int kShares = 1>
struct Slice {
    static constexpr bool kTransposed = kLine == Line::outer;
    static constexpr int kRows = kTransposed ? BLOCK_K : OUTER, kColumns = kTransposed ? OUTER : BLOCK_K;
    using Panels = PanelTile<kRows, kColumns>;
    static constexpr int kBytes = Panels::kBytes;
    static constexpr int kShareRows = kRows / kShares;
    static_assert(kRows % (8 * kShares) == 0, "whole repetitions of the swizzle");

    Panels tile;

    // The length of a line of an operand of these sizes.
    static int line_length(int outer_size, int depth_size) { return kTransposed ? outer_size : depth_size; }

    // A tensor map of the operand, whose lines begin `stride` values apart.
    static mmpo_status encode(CUtensorMap* map, const bf16* operand, int outer_size, int depth_size, int stride) {
        const uint64_t rows = uint64_t(kTransposed ? depth_size : outer_size);
        return encode_tensor_map_2d(map, operand, rows, uint64_t(line_length(outer_size, depth_size)), uint64_t(stride),
                                    kShareRows, kPanelColumns, Swizzle::bytes_128);
    }
    // Starts the copy of the slice at `outer`, `depth`, or of this block's share of it. `rank`: of the block in its
    // cluster.
    DEVICE void load(const CUtensorMap* map, int outer, int depth, uint32_t mbarrier, int rank) const {
        const int column = kTransposed ? outer : depth, row = kTransposed ? depth : outer;
        if constexpr (kShares == 1) {
            tile.load(map, column, row, mbarrier);
        } else {
            const int first = rank * kShareRows;
#pragma unroll
            for (int panel = 0; panel < Panels::kPanels; ++panel) {
                tma_load_2d_multicast(tile.panel(panel) + uint32_t(first * kPanelRowBytes), map,
                                      column + panel * kPanelColumns, row + first, mbarrier, (1 << kShares) - 1);
            }
        }
    }
    // The operand of one wgmma: depth 16 * step .., outer index from `outer` (a multiple of 64) on.
    DEVICE uint64_t operand(int outer, int step) const {
        if constexpr (kTransposed)
            return tile.depth_in_rows(outer, step);
        else
            return tile.depth_in_columns(outer, step);
    }
};

// The constants of one tile shape and operand order.
template <class TileShape, class LineOrder>
struct Config {
    using Tile = TileShape;
    using Lines = LineOrder;
    using Left = Slice<Tile::BLOCK_M, Lines::kLeft>;
    using Right = Slice<Tile::BLOCK_N, Lines::kRight>;
    using RightPart = Slice<Tile::BLOCK_N / Lines::kRightParts, Lines::kRight, Tile::kCluster>;
    static_assert(Lines::kRightParts == 1 || !Right::kTransposed, "parts of a slice lie below each other");
    using Ring = StageRing<Tile::kStages>;
    using Cursor = StageCursor<Tile::kStages>;
    using Panels = WarpPanels<Tile::kPanels>;
    static constexpr int kConsumers = Tile::kConsumersM * Tile::kConsumersN;  // warpgroups
    static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / kWarp;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
    static constexpr int CONSUMER_N = Tile::BLOCK_N / Tile::kConsumersN;
    static_assert(Tile::BLOCK_M == kWgmmaRows * Tile::kConsumersM, "a consumer has the rows of one wgmma");
    static constexpr int kStageBytes = Left::kBytes + Right::kBytes;

    // A thread's part of a consumer's accumulators.
    using Accumulators = float[CONSUMER_N / 2];
};

// Where things lie in shared memory: stages, panels, then the ring's mbarriers.
template <class C>
struct Shared {
    static constexpr int kPanels = C::Tile::kStages * C::kStageBytes;
    static constexpr int kRing = kPanels + C::kConsumerWarps * C::Panels::kBytes;
    static constexpr int kBytes = kRing + C::Ring::kBytes;
    static_assert(kBytes <= kSharedLimitSm90, "fewer stages or panels");

    uint32_t base;

    // The left slice of a stage, which the right one follows.
    DEVICE uint32_t stage(int index) const { return base + uint32_t(index * C::kStageBytes); }
    DEVICE typename C::Ring ring() const { return {base + kRing}; }
    DEVICE typename C::Panels panels(int consumer_warp) const {
        return {base + uint32_t(kPanels + consumer_warp * C::Panels::kBytes)};
    }
};

// Divides numbers below 2^31 by one that the host knows, with one multiplication and two shifts. The device's own
// division is a chain of some hundred cycles, and consumers would begin each tile with five of them.
struct Divisor {
    uint32_t multiplier, shift;

    static Divisor of(int64_t divisor) {
        uint32_t shift = 0;
        while (int64_t(1) << shift < divisor) ++shift;
        return {uint32_t(ceil_div(int64_t(1) << (31 + shift), divisor)), shift};
    }
    DEVICE int quotient(int number) const { return int(uint64_t(uint32_t(number)) * multiplier >> 31 >> shift); }
};

// What a problem knows of low-rank parts, which most have not.
struct NoParts {};
template <class Operands>
struct Parts {
    CUtensorMap left_parts[kMostParts], right_parts[kMostParts];
    Operands operands;

    Parts() : left_parts{}, right_parts{}, operands(GemmOperands{}) {}
};
// What it knows of an operand that is dropout(x), with rows of `input_width` values.
struct DroppedInput {
    Dropout dropout;
    int input_width;
};
template <class Lines>
using PartsOf = std::conditional_t<kHasParts<typename Lines::Operands>, Parts<typename Lines::Operands>, NoParts>;
template <class Lines>
using OperandsOf = std::conditional_t<kDropsInput<typename Lines::Operands>, DroppedInput, PartsOf<Lines>>;

// The kernel's parameters. An epilogue is a struct with
//
//   template <int kCount, class Panels>
//   DEVICE void operator()(const float (&d)[kCount], int row, int column, Panels& panels) const;
//
// which every consumer warp calls once per tile. `d` are the accumulators of 16 rows x 2 * kCount columns of `out`,
// from `row` and `column` on, in wgmma's layout (ptx_wgmma.cuh); some or all of them may lie outside `out`. `panels` is
// the warp's own way to global memory (warp_panels.cuh). Where the depth is split, the epilogue sees part s of the sums
// at rows that are s * split_rows further on.
template <class Epilogue, class Operands = NoParts>
struct Problem : Operands {
    CUtensorMap left, right;
    int tiles_m, tiles_n;    // tiles_m counts whole clusters
    int splits, tile_group;  // tile_group: rows of tiles that are walked together, in whole clusters
    // Slices of one split; the first `longer_splits` splits have one more.
    int split_slices, longer_splits;
    // Divisors: tiles of a split; tiles of a group; rows of tiles of a group, and of the last group if it has fewer.
    Divisor by_tiles, by_group_tiles, by_group_rows, by_last_rows;
    int split_rows;
    int right_part;  // distance between the parts of the right operand
    Epilogue epilogue;
};

// One tile of `out`, or one split's part of its sum.
struct TileWork {
    int m, n, first_slice, end_slice, out_row;
};

// The work number `index` of all; the tiles of a cluster, one below the other, share a number.
template <class Tile, class Problem>
DEVICE TileWork tile_work(const Problem& problem, int index, int rank) {
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
template <class Tile, class Problem, class Visit>
DEVICE void each_tile(const Problem& problem, const Visit& visit) {
    const int count = problem.tiles_m * problem.tiles_n * problem.splits, rank = rank_in_cluster<Tile>();
    const int step = int(gridDim.x) / Tile::kCluster;
    for (int index = int(blockIdx.x) / Tile::kCluster; index < count; index += step) {
        visit(tile_work<Tile>(problem, index, rank));
    }
}

// The columns of `out` that a tile has.
template <class C>
DEVICE TileColumns<C::Lines::kRightParts> tile_columns(const TileWork& work, int right_part) {
    constexpr int kRuns = C::Lines::kRightParts;
    return {work.n / kRuns, C::Tile::BLOCK_N / kRuns, right_part};
}

#if MMPO_SM90

template <class Tile>
DEVICE void sync_cluster() {
    if constexpr (Tile::kCluster == 1)
        __syncthreads();
    else
        cluster_sync();
}

// The producer, one thread: loads slices as stages become free, those of low-rank parts first.
template <class C, class Problem>
DEVICE void produce(const Problem& problem, const Shared<C>& shared) {
    using Tile = typename C::Tile;
    using Lines = typename C::Lines;
    const typename C::Ring ring = shared.ring();
    typename C::Cursor cursor;
    const int rank = rank_in_cluster<Tile>();
    prefetch_tensor_map(&problem.left);
    prefetch_tensor_map(&problem.right);
    // Loads one stage: rows `m` of the left matrix, and columns `n` and as many of each further part of the right one.
    const auto load = [&](const CUtensorMap* left_map, const CUtensorMap* right_map, int m, int n, int depth) {
        const uint32_t stage = shared.stage(cursor.stage), full = ring.full(cursor.stage);
        // Wait until the stage is free in all blocks of the cluster, since this block may multicast to all of them.
        mbarrier_wait(ring.empty(cursor.stage), cursor.parity ^ 1);
        mbarrier_arrive_expect_tx(full, C::kStageBytes);
        typename C::Left{stage}.load(left_map, m, depth, full, rank);
#pragma unroll
        for (int part = 0; part < Lines::kRightParts; ++part) {
            const typename C::RightPart right{stage + C::Left::kBytes + part * C::RightPart::kBytes};
            right.load(right_map, n + part * problem.right_part, depth, full, rank);
        }
        cursor.advance();
    };
    each_tile<Tile>(problem, [&](const TileWork& work) {
        const int n = work.n / Lines::kRightParts;
        if constexpr (kHasParts<typename Lines::Operands>) {
            const auto columns = tile_columns<C>(work, problem.right_part);
#pragma unroll
            for (int i = 0; i < kMostParts; ++i) {
                const LowRankPart& part = problem.operands.parts[i];
                const int slices = i < problem.operands.count ? part.slices(columns) : 0;
                // Columns outside the part lie outside its map, which gives zeros.
                for (int slice = 0; slice < slices; ++slice) {
                    load(&problem.left_parts[i], &problem.right_parts[i], work.m, n - part.first, slice * BLOCK_K);
                }
            }
        }
        for (int slice = work.first_slice; slice < work.end_slice; ++slice)
            load(&problem.left, &problem.right, work.m, n, slice * BLOCK_K);
    });
}

// The lead of the first of two consumers over the second. Two consumers that finish a tile together leave the tensor
// cores idle while both are in the epilogue. So the second starts a tile only when the first has queued the wgmmas of
// kLead slices. It then still multiplies while the first is in the epilogue, and the first multiplies the next tile
// while the second is in its epilogue. The ring holds the slices between the two; where copies do not keep up, the
// first waits for them and the lead shrinks. Consumers that drop values of their common slices keep step instead.
template <class C>
struct Lead {
    using Tile = typename C::Tile;
    static constexpr bool kInStep = kDropsInput<typename C::Lines::Operands>;
    static constexpr int kLead = C::kConsumers == 2 && !kInStep ? Tile::kStages / 2 : 0;
    static constexpr uint32_t kBarrier = 1, kThreads = 2 * kWarpgroupThreads;

    // Whether a tile of so many slices is deep enough for a lead. The first consumer is at most a ring ahead, so in a
    // deeper tile it cannot arrive for the next tile before the second has started this one.
    static DEVICE bool wanted(int slices) { return kLead > 0 && slices > Tile::kStages; }
    static DEVICE void wait(int slices, int consumer) {
        if (consumer == 1 && wanted(slices)) bar_sync(kBarrier, kThreads);
    }
    // Call after queueing the wgmmas of `slice`, counted from the tile's first.
    static DEVICE void give(int slices, int consumer, int slice) {
        if (consumer == 0 && slice + 1 == kLead && wanted(slices)) bar_arrive(kBarrier, kThreads);
    }
};

// Drops values of an arrived stage's slice of x. All consumers take part, and none goes on before the slice is done.
// One chunk after the other: the four hashes of a chunk keep a warp busy, and those of all chunks would take registers
// from the accumulators. Meanwhile the wgmmas of the slice before run.
template <class C, class Problem>
DEVICE void drop_input(const Problem& problem, const TileWork& work, uint32_t stage, int slice) {
    constexpr bool kLeft = C::Lines::Operands::kLeft;
    using Input = std::conditional_t<kLeft, typename C::Left, typename C::Right>;
    using Panels = typename Input::Panels;
    static_assert(Input::kTransposed != kLeft, "rows of the slice are rows of x");
    constexpr int kThreads = C::kConsumers * kWarpgroupThreads, kChunks = Panels::kPanels * kPanelColumns / kVector;
    constexpr uint32_t kBarrier = 2;  // beside that of Lead
    const Panels input{stage + (kLeft ? 0 : C::Left::kBytes)};
    const int depth = slice * BLOCK_K;
    const int first_row = kLeft ? work.m : depth, first_column = kLeft ? depth : work.n;
#pragma unroll 1
    for (int index = int(threadIdx.x); index < Input::kRows * kChunks; index += kThreads) {
        const int row = index / kChunks, chunk = index % kChunks;
        const int64_t place = int64_t(first_row + row) * problem.input_width + first_column + chunk * kVector;
        problem.dropout.template zero_dropped<true>(input.address(row, chunk), place);
    }
    fence_proxy_async();
    bar_sync(kBarrier, kThreads);
}

// Leaves an arrived stage as it is.
struct AsItIs {
    DEVICE void operator()(uint32_t, int) const {}
};

// A consumer's part of a tile: its slices from `slice` on, of `slices` in all.
template <class C>
struct Consumer {
    using Tile = typename C::Tile;

    Shared<C> shared;
    int consumer;
    int slices = 0, slice = 0;

    DEVICE int outer_m() const { return consumer % Tile::kConsumersM * kWgmmaRows; }
    DEVICE int outer_n() const { return consumer / Tile::kConsumersM * C::CONSUMER_N; }

    // Each warp arrives for itself, because it may be one slice later than the other warps of its warpgroup.
    DEVICE void release(int stage) const {
        const typename C::Ring ring = shared.ring();
        if constexpr (Tile::kCluster == 1) {
            if (lane_id() == 0) mbarrier_arrive(ring.empty(stage));
        } else if (lane_id() < Tile::kCluster) {
            mbarrier_arrive_at(ring.empty(stage), lane_id());
        }
    }

    // d (+)= the next `count` slices, at least one. While the wgmmas of one slice run, the consumer waits for the next
    // slice; it gives a stage back once the wgmmas of the next slice are queued. `arrived(stage, i)` is called when
    // slice i of them is in its stage.
    template <class Arrived>
    DEVICE void multiply(typename C::Accumulators& d, typename C::Cursor& cursor, int count, const Arrived& arrived) {
        const typename C::Ring ring = shared.ring();
        int previous = 0;
        for (int i = 0; i < count; ++i, ++slice) {
            // The shuffle tells the compiler that the address is uniform, so that descriptors stay in uniform
            // registers.
            const uint32_t stage = __shfl_sync(0xffffffffu, shared.stage(cursor.stage), 0);
            const typename C::Left left{stage};
            const typename C::Right right{stage + C::Left::kBytes};
            mbarrier_wait(ring.full(cursor.stage), cursor.parity);
            arrived(stage, i);
            pin_registers(d);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < BLOCK_K / kWgmmaDepth; ++step) {
                wgmma_ss<C::CONSUMER_N, C::Left::kTransposed, C::Right::kTransposed>(
                    d, left.operand(outer_m(), step), right.operand(outer_n(), step), slice != 0 || step != 0);
            }
            wgmma_commit();
            Lead<C>::give(slices, consumer, slice);
            wgmma_wait<1>();
            if (i != 0) release(previous);
            previous = cursor.stage;
            cursor.advance();
        }
        wgmma_wait<0>();
        pin_registers(d);
        release(previous);
    }
};

// Drops values of a consumer's accumulators. What is kept is found in loops that are not unrolled, 32 values at a time:
// the hashes of a whole tile in flight would take more registers than there are beside the accumulators.
template <class C>
DEVICE void drop_parts(typename C::Accumulators& d, const DroppedOperands& operands, int row, int column) {
    if (operands.dropout.threshold == 0) return;
    constexpr int kWord = 32;
#pragma unroll
    for (int first = 0; first < C::CONSUMER_N / 2; first += kWord) {
        uint32_t kept = 0;
#pragma unroll 1
        for (int pair = 0; pair < kWord / 2; ++pair) {
            const int64_t index = int64_t(row + pair % 2 * 8) * operands.shape_n + column + 2 * first + pair / 2 * 8;
            kept |= operands.dropout.kept_pair(index) << 2 * pair;
        }
#pragma unroll
        for (int i = 0; i < kWord; ++i) {
            float& value = d[first + i];
            value = kept >> i & 1 ? value * operands.dropout.keep_scale : 0.0f;
        }
    }
}

// Applies the operands' `finish` to a consumer's accumulators.
template <class C, class Problem>
DEVICE void finish_parts(typename C::Accumulators& d, const Problem& problem, const TileWork& work,
                         const Consumer<C>& consumer) {
    constexpr int kRuns = C::Lines::kRightParts;
    static_assert(kRuns == 1 || C::Tile::kConsumersN == 1, "a consumer's columns begin with the tile's");
    constexpr int kRunColumns = C::CONSUMER_N / kRuns;
    const int lane = int(lane_id()), warp = int(threadIdx.x) / kWarp % 4;
    const int row = work.m + consumer.outer_m() + warp * 16 + lane / 4;
    const int column = work.n / kRuns + consumer.outer_n();
    if constexpr (std::is_same<typename C::Lines::Operands, DroppedOperands>::value) {
        drop_parts<C>(d, problem.operands, row, column + lane % 4 * 2);
    } else {
        problem.operands.template finish<true>([&](const auto& visit) {
#pragma unroll
            for (int j = 0; j < C::CONSUMER_N / 8; ++j) {
                const int group = column + 8 * j % kRunColumns + 8 * j / kRunColumns * problem.right_part;
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    visit(d[4 * j + 2 * half], d[4 * j + 2 * half + 1], row + 8 * half, group, lane % 4 * 2);
            }
        });
    }
}

// d = the consumer's part of one tile.
template <class C, class Problem>
DEVICE void multiply_tile(typename C::Accumulators& d, typename C::Cursor& cursor, const Shared<C>& shared,
                          const Problem& problem, const TileWork& work, int index) {
    const int frozen = work.end_slice - work.first_slice;
    int parts = 0;
    if constexpr (kHasParts<typename C::Lines::Operands>)
        parts = problem.operands.part_slices(tile_columns<C>(work, problem.right_part));
    Consumer<C> consumer{shared, index, parts + frozen};
    Lead<C>::wait(consumer.slices, index);
    if constexpr (kHasParts<typename C::Lines::Operands>) {
        if (parts > 0) {
            consumer.multiply(d, cursor, parts, AsItIs{});
            finish_parts<C>(d, problem, work, consumer);
        }
    }
    if constexpr (kDropsInput<typename C::Lines::Operands>) {
        consumer.multiply(d, cursor, frozen,
                          [&](uint32_t stage, int i) { drop_input<C>(problem, work, stage, work.first_slice + i); });
    } else {
        consumer.multiply(d, cursor, frozen, AsItIs{});
    }
}

template <class C, class Problem>
DEVICE void consume(const Problem& problem, const Shared<C>& shared, int consumer) {
    using Tile = typename C::Tile;
    const int warp = int(threadIdx.x) / kWarp % 4;
    const int row = consumer % Tile::kConsumersM * kWgmmaRows + warp * 16,
              column = consumer / Tile::kConsumersM * C::CONSUMER_N;
    typename C::Panels panels = shared.panels(consumer * 4 + warp);
    typename C::Cursor cursor;
    each_tile<Tile>(problem, [&](const TileWork& work) {
        typename C::Accumulators d;
        multiply_tile<C>(d, cursor, shared, problem, work, consumer);
        problem.epilogue(d, work.out_row + row, work.n + column, panels);
    });
    panels.drain();
}

#endif

template <class Tile, class Lines, class Epilogue>
static __global__ void __launch_bounds__(Config<Tile, Lines>::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ Problem<Epilogue, OperandsOf<Lines>> problem) {
#if MMPO_SM90
    using C = Config<Tile, Lines>;
    DYNAMIC_SHARED(raw);
    const Shared<C> shared{shared_address(raw)};
    if (threadIdx.x == 0) {
        shared.ring().init(C::kConsumerWarps * Tile::kCluster);
        fence_mbarrier_init();
    }
    sync_cluster<Tile>();
    // The shuffle tells the compiler that all lanes of a warp have the same role.
    const int role = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroupThreads, 0);
    if (role == C::kConsumers) {
        setmaxnreg_decrease<Tile::kProducerRegisters>();
        if (threadIdx.x == C::kConsumers * kWarpgroupThreads) produce<C>(problem, shared);
    } else {
        setmaxnreg_increase<Tile::kConsumerRegisters>();
        consume<C>(problem, shared, role);
    }
    // The other block may still multicast into this block's shared memory, and arrive at its mbarriers.
    if constexpr (Tile::kCluster > 1) sync_cluster<Tile>();
#endif
}

}  // namespace gemm_sm90
}  // namespace MMPO_VARIANT
}  // namespace mmpo
