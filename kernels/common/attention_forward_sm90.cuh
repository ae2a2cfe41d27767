// The plan of Hopper's attention forward: tiles, registers, shared memory, and what its warps tell one another.
#pragma once

#include "attention_schedule.cuh"
#include "hopper.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace attention_forward_sm90 {

// A slab is the part of a tile that one consumer warpgroup has: the rows of one wgmma.
constexpr int kSlabRows = kWgmmaRows;
// At the seam, where the prompt's keys meet the response's own, a key block is assembled from copies of this many rows.
// With 16 rows there are at most 8 copies a panel, and a gap of at most 15 slots.
constexpr int kSeamRows = 16;

// How the work is cut.
struct ForwardTiles {
    int consumers;     // warpgroups, each with one slab of a tile
    int block_n;       // keys of a block
    int key_stages;    // key blocks in flight, and as many value blocks
    int query_stages;  // tiles whose queries are in flight; output leaves through the same memory
    int producer_registers, consumer_registers;

    constexpr int threads() const { return (consumers + 1) * kWarpgroupThreads; }
    constexpr int shared_bytes(int head_size) const {
        const int queries = query_stages * consumers * kSlabRows * head_size * 2;
        return queries + 2 * key_stages * block_n * head_size * 2;
    }
};

// A consumer thread's registers: scores block_n / 2, the same in bf16 (the operand of the next gemm) block_n / 4,
// output E / 2, and about 30 more. With the producer's they must fit into a multiprocessor's 64 Ki.
//
//   E = 64   registers       64 + 32 + 32 + 30 = 158: three warpgroups at 160. A wider block would not fit. Three slabs
//                            instead of two read keys and values once for 192 rows.
//            shared memory   queries 2 * 24, keys and values 4 * 2 * 16: 176 KiB. There are four key stages, because a
//                            short pair's tile has few blocks and those of the next tile should be under way.
//   E = 128  registers       64 + 32 + 64 + 30 = 190: two warpgroups at 232
//            shared memory   queries 2 * 32, keys and values 2 * 2 * 32: 192 KiB. A third key stage of 64 KiB does not
//                            fit beside the second stage of queries.
//
// block_n is 128 in both: a wgmma of 64 x 128 reads shared memory (6 KiB in 64 cycles) well below its bandwidth, which
// would bound one of 64 x 64. With two query stages, a tile's first copies run under the tile before.
constexpr ForwardTiles forward_tiles(int head_size) {
    return head_size == 64 ? ForwardTiles{3, 128, 4, 2, 32, 160} : ForwardTiles{2, 128, 2, 2, 40, 232};
}

constexpr bool fits(int head_size) {
    const ForwardTiles tiles = forward_tiles(head_size);
    const int registers = tiles.producer_registers + tiles.consumers * tiles.consumer_registers;
    return registers * kWarpgroupThreads <= kMultiprocessorRegisters &&
           tiles.shared_bytes(head_size) + 1024 <= kSharedLimitSm90;
}
static_assert(fits(64) && fits(128), "a block has the multiprocessor to itself, and no more than that");

// Named barriers; 0 is __syncthreads'.
enum class NamedBarrier : uint32_t { turn = 1 /* and the next ones: one for each consumer */ };

struct Problem {
    int heads, kv_heads;
    HeadPacking packing;
    int slab_tokens;
    float scale_log2;  // scale * log2(e): scores in base 2
    int pairs;
    TileCount count;
};

// What the consumers must know of a tile, as the producer leaves it in shared memory. `blocks` = 0 says that there are
// no more tiles.
struct alignas(16) TileWork {
    int blocks;               // key blocks that the tile's last row sees
    int first_row;            // of the tile
    int last_row;             // end of the sequence
    int first_slot;           // of the tile's first row
    int gap_first, gap_last;  // slots
    int first_head;
    int unused;
};

// The constants of one head size.
template <int E>
struct Config {
    static constexpr ForwardTiles kTiles = forward_tiles(E);
    static constexpr int kConsumers = kTiles.consumers;
    static constexpr int BLOCK_N = kTiles.block_n;
    static constexpr int kThreads = kTiles.threads();
    static constexpr int kProducerRegisters = kTiles.producer_registers;
    static constexpr int kConsumerRegisters = kTiles.consumer_registers;

    using Cut = TileCut<BLOCK_N, kSeamRows>;
    using Slab = PanelTile<kSlabRows, E>;
    using Keys = PanelTile<BLOCK_N, E>;  // or values
    using QueryRing = StageRing<kTiles.query_stages>;
    using KeyRing = StageRing<kTiles.key_stages>;
    using QueryCursor = StageCursor<kTiles.query_stages>;
    using KeyCursor = StageCursor<kTiles.key_stages>;
};

// Where things lie in shared memory: queries, keys, values, the tiles' descriptions, then the rings' mbarriers.
template <int E>
struct Shared {
    using C = Config<E>;
    static constexpr int kKeys = C::kTiles.query_stages * C::kConsumers * C::Slab::kBytes;
    static constexpr int kValues = kKeys + C::kTiles.key_stages * C::Keys::kBytes;
    static constexpr int kWork = kValues + C::kTiles.key_stages * C::Keys::kBytes;
    static constexpr int kQueryRing = kWork + C::kTiles.query_stages * int(sizeof(TileWork));
    static constexpr int kKeyRing = kQueryRing + C::QueryRing::kBytes;
    static constexpr int kValueRing = kKeyRing + C::KeyRing::kBytes;
    static constexpr int kBytes = kValueRing + C::KeyRing::kBytes;

    uint32_t base;

    DEVICE typename C::Slab slab(int stage, int index) const {
        return {base + uint32_t((stage * C::kConsumers + index) * C::Slab::kBytes)};
    }
    DEVICE typename C::Keys keys(int stage) const { return {base + uint32_t(kKeys + stage * C::Keys::kBytes)}; }
    DEVICE typename C::Keys values(int stage) const { return {base + uint32_t(kValues + stage * C::Keys::kBytes)}; }
    DEVICE uint32_t work(int stage) const { return base + uint32_t(kWork + stage * int(sizeof(TileWork))); }
    DEVICE typename C::QueryRing query_ring() const { return {base + kQueryRing}; }
    DEVICE typename C::KeyRing key_ring() const { return {base + kKeyRing}; }
    DEVICE typename C::KeyRing value_ring() const { return {base + kValueRing}; }
};

// Initialises the mbarriers, and zeros the slabs' rows that no token fills: TMA never writes them, and gemms read them.
template <int E>
DEVICE void prepare(const Shared<E>& shared, const Problem& problem) {
    using C = Config<E>;
    if (threadIdx.x == 0) {
        // Each consumer warp arrives: for keys and values once its gemm is done, for queries once it has stored.
        constexpr int kWarps = C::kConsumers * kWarpgroupThreads / 32;
        shared.query_ring().init(kWarps);
        shared.key_ring().init(kWarps);
        shared.value_ring().init(kWarps);
        fence_mbarrier_init();
    }
    const int used = problem.slab_tokens * problem.packing.heads, chunks = (kSlabRows - used) * (E / kChunkValues);
    for (int i = int(threadIdx.x); i < chunks * C::kTiles.query_stages * C::kConsumers; i += C::kThreads) {
        const int row = used + i % chunks / (E / kChunkValues), chunk = i % chunks % (E / kChunkValues);
        store_shared_128(shared.slab(0, i / chunks).address(row, chunk), uint4{0, 0, 0, 0});
    }
    fence_proxy_async();
    __syncthreads();
}

}  // namespace attention_forward_sm90
}  // namespace MMPO_VARIANT
}  // namespace mmpo
