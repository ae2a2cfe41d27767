// The order in which a persistent grid works through the tiles of all pairs: the longest first.
//
// A tile's cost is its level, the number of key blocks that it sees. Work is sorted by level, descending, without a
// table: the tiles of a sequence that see exactly `level` blocks are a range in closed form, so position i of the order
// is found by adding up the sizes of those ranges. Block c of a grid of n takes position c of the first n positions,
// position n - 1 - c of the next n, and so on alternately (0 1 2 3, 7 6 5 4, 8 9 ..). This snake gives all blocks
// nearly the same sum of costs, and the same tiles in every run: there is no counter in global memory and nothing to
// reset, and results do not depend on timing.
//
// NOTE: within a level, the head groups of a sequence are neighbours, and so are the tiles of one head group. Blocks
// that run side by side therefore read the same keys and values at nearly the same time, from L2.
#pragma once

#include "attention_mask.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// How sequences are cut: tiles of tile_tokens queries, keys in blocks of BLOCK_N slots. kGranule: see causal_sequence.
template <int BLOCK_N, int kGranule>
struct TileCut {
    int tile_tokens;

    HOST_DEVICE static CausalSequence sequence(const uint32_t* spans, int index) {
        return causal_sequence<kGranule>(spans + 4 * int64_t(index / kSequences), index % kSequences);
    }

    HOST_DEVICE int tiles(const CausalSequence& sequence) const {
        return (sequence.length + tile_tokens - 1) / tile_tokens;
    }

    // Number of key blocks up to the one that holds slot `last_slot`, which are those that its query sees.
    HOST_DEVICE static int blocks(int last_slot) { return last_slot / BLOCK_N + 1; }

    // Number of tiles of the sequence that see at most `level` blocks; they are its first ones.
    HOST_DEVICE int tiles_up_to(const CausalSequence& sequence, int level) const {
        const int room = level * BLOCK_N - sequence.own_slot;
        if (sequence.length <= room) return tiles(sequence);
        return room <= 0 ? 0 : room / tile_tokens;
    }
};

// What the host counts for a launch.
struct TileCount {
    int tiles = 0;   // of all sequences and head groups
    int levels = 0;  // the most key blocks that a tile sees
};

template <class Cut>
TileCount count_tiles(const Cut& cut, const uint32_t* host_spans, int pairs, int groups) {
    TileCount count;
    for (int index = 0; index < kSequences * pairs; ++index) {
        const CausalSequence sequence = Cut::sequence(host_spans, index);
        if (sequence.length == 0) continue;
        const int levels = Cut::blocks(sequence.own_slot + sequence.length - 1);
        count.tiles += cut.tiles(sequence) * groups;
        count.levels = levels > count.levels ? levels : count.levels;
    }
    return count;
}

// One tile of the order: tile number `tile` of the sequence, for head group `group`.
struct ScheduledTile {
    CausalSequence sequence;
    int tile, group;
};

// Walks the tiles of the calling block. Every lane of a warp calls it.
template <class Cut>
struct TileWalk {
    Cut cut;
    const uint32_t* spans;
    int sequences, groups, tiles;
    int level;
    int chunk = 0;   // of 32 sequences, one a lane
    int passed = 0;  // tiles of the order before this level's part in this chunk
    int round = 0;

    DEVICE TileWalk(const Cut& cut, const uint32_t* spans, int pairs, int groups, const TileCount& count)
        : cut(cut),
          spans(spans),
          sequences(kSequences * pairs),
          groups(groups),
          tiles(count.tiles),
          level(count.levels) {}

    // False after the last tile.
    DEVICE bool next(ScheduledTile& out) {
        const int column = int(round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
        const int position = round++ * int(gridDim.x) + column;
        if (position >= tiles) return false;
        for (;;) {
            int first = 0, count = 0;
            const int index = chunk * 32 + int(lane_id());
            if (index < sequences) {
                const CausalSequence sequence = Cut::sequence(spans, index);
                first = cut.tiles_up_to(sequence, level - 1);
                count = cut.tiles_up_to(sequence, level) - first;
            }
            const int end = passed + inclusive_sum(count * groups);
            const uint32_t beyond = __ballot_sync(0xffffffffu, position < end);
            if (beyond != 0) {
                const int owner = __ffs(int(beyond)) - 1;
                const int rest = __shfl_sync(0xffffffffu, position - (end - count * groups), owner);
                const int width = __shfl_sync(0xffffffffu, count, owner);
                out.sequence = Cut::sequence(spans, chunk * 32 + owner);
                out.group = rest / width;
                out.tile = __shfl_sync(0xffffffffu, first, owner) + rest % width;
                return true;
            }
            passed = __shfl_sync(0xffffffffu, end, 31);
            if (++chunk * 32 >= sequences) {
                chunk = 0;
                --level;
            }
        }
    }

    static DEVICE int inclusive_sum(int value) {
        const int lane = int(lane_id());
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, value, distance);
            value += lane >= distance ? other : 0;
        }
        return value;
    }
};

}  // namespace MMPO_VARIANT
}  // namespace mmpo
