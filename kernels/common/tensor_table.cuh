// Many tensors in one launch. A table of tensors is passed as a kernel parameter. Each tensor has blocks of its own,
// side by side in the grid, and a block finds its tensor by a search. A model has hundreds of tensors, most of them so
// small that launching a kernel for each would cost more than the work.
#pragma once

#include "launch.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// A kernel's parameters have 4096 bytes on every GPU; 56 are left for those beside the table.
constexpr size_t kTableBytes = 4096 - 56;

// `Tensor` has a `length`, in values.
template <class Tensor>
struct TensorTable {
    static constexpr int kCapacity = int(kTableBytes / (sizeof(Tensor) + sizeof(unsigned)));

    Tensor tensors[kCapacity];
    // The first block of each tensor, ascending; beyond any grid in unused places. Stored apart from the tensors, so
    // that a search reads only a few lines of the constant cache.
    unsigned first_blocks[kCapacity];

    // The tensor of the calling block: the last one that does not start after it. Every block takes the same steps, and
    // all threads of a block read the same places.
    DEVICE int find() const {
        int tensor = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2) {
            const int next = tensor + step;
            if (next < kCapacity && first_blocks[next] <= blockIdx.x) tensor = next;
        }
        return tensor;
    }

    // The first value of the calling block in its tensor.
    template <int kBlockValues>
    DEVICE int64_t first_value(int tensor) const {
        return int64_t(blockIdx.x - first_blocks[tensor]) * kBlockValues;
    }
};

// Calls `launch(table, blocks)` until all of `tensors` have had their blocks, each of `block_values` values. The table
// has a `Row` for each, made from the tensor: a launcher leaves out what its kernel does not read, so that a table
// holds more. Tensors without values are skipped.
template <class Row, class Tensor, class Launch>
mmpo_status launch_tables_of(const Tensor* tensors, int count, int64_t block_values, Launch launch) {
    using Table = TensorTable<Row>;
    static_assert(sizeof(Table) <= kTableBytes && Table::kCapacity <= 256, "a parameter, found in eight steps");
    for (int next = 0; next < count;) {
        Table table{};
        int held = 0;
        unsigned blocks = 0;
        for (; next < count && held < Table::kCapacity; ++next) {
            if (tensors[next].length == 0) continue;
            table.tensors[held] = Row(tensors[next]);
            table.first_blocks[held++] = blocks;
            blocks += unsigned(ceil_div(tensors[next].length, block_values));
        }
        if (held == 0) break;
        for (; held < Table::kCapacity; ++held) table.first_blocks[held] = UINT32_MAX;
        if (const mmpo_status status = launch(table, blocks)) return status;
    }
    return kSuccess;
}

template <class Tensor, class Launch>
mmpo_status launch_tables(const Tensor* tensors, int count, int64_t block_values, Launch launch) {
    return launch_tables_of<Tensor>(tensors, count, block_values, launch);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
