// Which keys a query of a packed pair sees, said as plain causal attention; and how query heads share a tile.
//
// A pair is two causal sequences of queries: `prompt | chosen`, and `rejected`, which sees the prompt before its own
// keys. The keys of a sequence are numbered in slots, the prompt's first, so that the query in slot s sees slots 0 .. s
// and no others: one rule for every row, and blocks of keys are cut from the slots, across the seam of prompt and
// rejected too. What no query sees (chosen x rejected) has no slots, so it costs nothing.
#pragma once

#include "attention_tiles.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct CausalSequence {
    int first_row;   // row of the first query and of its own key
    int length;      // queries
    int shared_row;  // row of slot 0, where keys are shared
    int shared;      // slots 0 .. shared hold the prompt's keys for a rejected response; 0 otherwise
    int own_slot;    // slot of the first query's own key; no query sees shared .. own_slot, less than a granule

    HOST_DEVICE int row_of(int slot) const { return slot < own_slot ? shared_row + slot : first_row + slot - own_slot; }
};

// Sequence `index` (0, 1) of the pair at `span`; own keys start at a multiple of kGranule slots, the fewest rows that a
// kernel can copy at once.
template <int kGranule>
HOST_DEVICE CausalSequence causal_sequence(const uint32_t* span, int index) {
    const int start = int(span[0]), prompt = int(span[1]), chosen = int(span[2]);
    if (index == 0) return {start, prompt + chosen, start, 0, 0};
    return {start + prompt + chosen, int(span[3]), start, prompt, (prompt + kGranule - 1) / kGranule * kGranule};
}

// Query heads that share a key/value head share its tiles: row r of a tile is token r / heads, head r % heads. So keys
// and values are read once for all of them, and the tail of a short sequence wastes a fraction of a token's rows rather
// than of a tile's.
struct HeadPacking {
    int heads;         // that share a tile; divides H / K
    int groups;        // of heads, H / heads
    uint32_t inverse;  // 2^16 / heads, rounded up

    // Exact for a row below 256; heads are at most 64.
    HOST_DEVICE int token(int row) const { return int(uint32_t(row) * inverse >> 16); }

    // Index in [T, H] of a row of a tile that starts at token first_row and head first_head; -1 from token last_row on.
    HOST_DEVICE int64_t position(int row, int first_row, int last_row, int first_head) const {
        const int offset = token(row);
        if (first_row + offset >= last_row) return -1;
        return (int64_t(first_row) + offset) * (int64_t(heads) * groups) + first_head + row - offset * heads;
    }
};

// The most heads whose whole tokens leave at most four of 64 rows idle: reading keys and values once instead of `heads`
// times is worth more than those.
inline HeadPacking head_packing(int heads, int kv_heads) {
    const int group = heads / kv_heads;
    int packed = 1;
    for (int candidate = 2; candidate <= group && candidate <= 64; ++candidate) {
        if (group % candidate == 0 && 64 / candidate * candidate >= 60) packed = candidate;
    }
    return {packed, heads / packed, uint32_t((65536 + packed - 1) / packed)};
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
