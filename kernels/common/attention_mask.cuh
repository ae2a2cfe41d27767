// Which keys a query of a packed pair sees, expressed as plain causal attention; and how query heads share a tile.
//
// A pair is two causal sequences of queries: `prompt | chosen`, and `rejected`, which sees the prompt before its own
// keys. The keys of a sequence are numbered in slots, the prompt's first, such that the query in slot s sees slots 0 ..
// s and no others. One rule thus holds for every row, and blocks of keys are cut from the slots, also across the seam
// where the prompt's keys meet the rejected response's own. Keys that a sequence never sees (chosen x rejected) have no
// slots in it, so they cost nothing.
#pragma once

#include "attention_tiles.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

struct CausalSequence {
    int first_row;   // row of the first query, and of its own key
    int length;      // queries
    int shared_row;  // row of slot 0, where shared keys begin
    int shared;      // slots 0 .. shared hold the prompt's keys for a rejected response; 0 for the other sequence
    int own_slot;    // slot of the first query's own key; slots shared .. own_slot are a gap that no query sees

    HOST_DEVICE int row_of(int slot) const { return slot < own_slot ? shared_row + slot : first_row + slot - own_slot; }
};

// Sequence `index` (0 or 1) of the pair at `span`. Own keys start at a multiple of kGranule slots, where kGranule is
// the number of rows that one copy of the kernel moves at least; so the gap is shorter than that.
template <int kGranule>
HOST_DEVICE CausalSequence causal_sequence(const uint32_t* span, int index) {
    const int start = int(span[0]), prompt = int(span[1]), chosen = int(span[2]);
    if (index == 0) return {start, prompt + chosen, start, 0, 0};
    return {start + prompt + chosen, int(span[3]), start, prompt, (prompt + kGranule - 1) / kGranule * kGranule};
}

// Query heads that share a key/value head share its tiles: row r of a tile is token r / heads, head r % heads. So keys
// and values are read once for all of them, and the tail of a short sequence wastes less than one tile.
struct HeadPacking {
    int heads;         // that share a tile; divides H / K
    int groups;        // of such heads, H / heads
    uint32_t inverse;  // 2^16 / heads, rounded up

    // The token of a row, row / heads. Exact for rows and heads below 256.
    HOST_DEVICE int token(int row) const { return int(uint32_t(row) * inverse >> 16); }

    // Index in [T, H] of a row of a tile that starts at token first_row and head first_head; -1 from token last_row on.
    HOST_DEVICE int64_t position(int row, int first_row, int last_row, int first_head) const {
        const int offset = token(row);
        if (first_row + offset >= last_row) return -1;
        return (int64_t(first_row) + offset) * (int64_t(heads) * groups) + first_head + row - offset * heads;
    }
};

// Packs the most query heads whose whole tokens leave at most a sixteenth of `rows` rows idle. Reading keys and values
// once instead of `heads` times is worth more than those rows.
inline HeadPacking pack_heads(int heads, int kv_heads, int rows) {
    const int group = heads / kv_heads;
    int packed = 1;
    for (int candidate = 2; candidate <= group && candidate <= rows; ++candidate) {
        if (group % candidate == 0 && rows % candidate <= rows / 16) packed = candidate;
    }
    return {packed, heads / packed, uint32_t((65536 + packed - 1) / packed)};
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
