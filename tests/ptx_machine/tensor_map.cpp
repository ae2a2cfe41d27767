// The tensor memory accelerator. PTX ISA 9.0, chapter "Tensors" (boxes, bounds, swizzling modes) and section 9.7.9,
// "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor"; CUDA Driver API, "cuTensorMapEncodeTiled". What the 128 bytes
// of a map hold is the driver's secret: here they are the numbers themselves.
#include "tensor_map.h"

#include <algorithm>

#include "copies.h"

namespace ptx {
namespace {

constexpr int kMostRank = 3;
constexpr uint64_t kMark = 0x70616d2d78747022ull;

struct TensorMap {
    uint64_t mark;
    uint64_t base;
    uint64_t sizes[kMostRank];    // elements
    uint64_t strides[kMostRank];  // bytes
    uint32_t box[kMostRank];      // elements
    uint32_t rank;
    uint32_t element_bytes;
    uint32_t swizzle_bytes;

    uint32_t box_bytes() const { return box[0] * box[1] * box[2] * element_bytes; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

TensorMap read_map(int lane, uint64_t address, uint32_t rank) {
    if (address % 64 != 0)
        fail_lane(lane, "misaligned: a tensor map at %#llx", static_cast<unsigned long long>(address));
    check_global(lane, address, sizeof(CUtensorMap), Access::read);
    TensorMap map;
    memcpy(&map, reinterpret_cast<const void*>(address), sizeof map);
    if (map.mark != kMark) fail_lane(lane, "no tensor map at %#llx", static_cast<unsigned long long>(address));
    if (map.rank != rank) fail_lane(lane, "a copy of %u dimensions with a tensor map of %u", rank, map.rank);
    return map;
}

struct Coordinates {
    int32_t at[kMostRank] = {0, 0, 0};
};

// Calls `f(offset in the box, global address, bytes that exist before, bytes that exist)` for each row of the box along
// dimension 0: of its box[0] elements, those inside the tensor lie side by side. Rows outside have none.
template <class F>
void each_row(const TensorMap& map, const Coordinates& c, F f) {
    const int64_t inside_from = std::max<int64_t>(0, -int64_t(c.at[0]));
    const int64_t inside_to = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - c.at[0]);
    uint32_t offset = 0;
    for (uint32_t z = 0; z < map.box[2]; ++z) {
        for (uint32_t y = 0; y < map.box[1]; ++y, offset += map.box[0] * map.element_bytes) {
            const int64_t row = int64_t(c.at[1]) + y, plane = int64_t(c.at[2]) + z;
            const bool exists = row >= 0 && row < int64_t(map.sizes[1]) && plane >= 0 &&
                                plane < int64_t(map.sizes[2]) && inside_to > inside_from;
            const uint64_t start = map.base + uint64_t(row) * map.strides[1] + uint64_t(plane) * map.strides[2] +
                                   uint64_t(c.at[0] + inside_from) * map.element_bytes;
            f(offset, exists ? start : 0, uint32_t(exists ? inside_from : 0) * map.element_bytes,
              uint32_t(exists ? inside_to - inside_from : 0) * map.element_bytes);
        }
    }
}

// A row of a box in shared memory: 16-byte chunks, each at its own place.
template <class F>
void each_chunk(const TensorMap& map, uint32_t start, uint32_t offset, F f) {
    const uint32_t bytes = map.box[0] * map.element_bytes;
    for (uint32_t at = 0; at < bytes; at += 16) f(at, swizzled(start + offset + at, map.swizzle_bytes));
}

std::vector<uint8_t> row_buffer(const TensorMap& map) { return std::vector<uint8_t>(map.box[0] * map.element_bytes); }

void move_in(const TensorMap& map, const Coordinates& c, Block& block, uint32_t start) {
    std::vector<uint8_t> row = row_buffer(map);
    each_row(map, c, [&](uint32_t offset, uint64_t from, uint32_t before, uint32_t bytes) {
        std::fill(row.begin(), row.end(), uint8_t(0));
        if (bytes != 0) {
            check_global(-1, from, bytes, Access::read);
            memcpy(row.data() + before, reinterpret_cast<const void*>(from), bytes);
        }
        each_chunk(map, start, offset,
                   [&](uint32_t at, uint32_t to) { memcpy(block.shared.bytes.data() + to, row.data() + at, 16); });
    });
}

// The box as it lies in shared memory, in order.
std::vector<uint8_t> take_out(const TensorMap& map, const Block& block, uint32_t start) {
    std::vector<uint8_t> box(map.box_bytes());
    for (uint32_t offset = 0; offset < box.size(); offset += map.box[0] * map.element_bytes) {
        each_chunk(map, start, offset, [&](uint32_t at, uint32_t from) {
            memcpy(box.data() + offset + at, block.shared.bytes.data() + from, 16);
        });
    }
    return box;
}

void move_out(const TensorMap& map, const Coordinates& c, const std::vector<uint8_t>& box, bool adds) {
    each_row(map, c, [&](uint32_t offset, uint64_t to, uint32_t before, uint32_t bytes) {
        if (bytes == 0) return;
        check_global(-1, to, bytes, adds ? Access::update : Access::write);
        const uint8_t* const from = box.data() + offset + before;
        if (!adds) {
            memcpy(reinterpret_cast<void*>(to), from, bytes);
            return;
        }
        for (uint32_t at = 0; at < bytes; at += map.element_bytes) add_element(to + at, from + at, map.element_bytes);
    });
}

Coordinates coordinates(Warp& warp, const Instruction& i, int lane) {
    Coordinates c;
    for (size_t k = 0; k < i.list.size(); ++k) c.at[k] = warp.values<int32_t>(i.list[k])[lane];
    return c;
}

void check_tile(int lane, uint32_t address) {
    if (address % 128 != 0)
        fail_lane(lane, "misaligned: a tensor copy at shared address %#x needs a multiple of 128", address);
}

// operands: -, destination, map, mbarrier, ranks (where `flags`); list: coordinates; `constant`: dimensions.
Step tensor_load(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const auto destination = warp.values<uint32_t>(i.operands[1])[lane];
        const auto mbarrier = warp.values<uint32_t>(i.operands[3])[lane];
        const TensorMap map = read_map(lane, warp.values<uint64_t>(i.operands[2])[lane], uint32_t(i.constant));
        const Coordinates c = coordinates(warp, i, lane);
        check_tile(lane, destination);
        Cluster& cluster = *warp.block->cluster;
        const uint32_t ranks = i.flags ? warp.values<uint16_t>(i.operands[4])[lane] : 1u << warp.block->rank;
        if (ranks == 0 || ranks >> cluster.blocks.size() != 0) {
            fail_lane(lane, "a copy to blocks %#x of a cluster of %zu", ranks, cluster.blocks.size());
        }
        each_lane(ranks, [&](int rank) {
            Block& block = *cluster.blocks[size_t(rank)];
            const uint32_t start = shared_range(block.warps[0], lane, destination, map.box_bytes(), 128).address;
            start_load(warp, lane, block, start, map.box_bytes(), mbarrier,
                       [map, c, start, to = &block] { move_in(map, c, *to, start); });
        });
    });
    return Step::next;
}

// operands: -, map, source; list: coordinates; `constant`: dimensions; `flags` is 1 to add.
Step tensor_store(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const auto source = warp.values<uint32_t>(i.operands[2])[lane];
        const TensorMap map = read_map(lane, warp.values<uint64_t>(i.operands[1])[lane], uint32_t(i.constant));
        const Coordinates c = coordinates(warp, i, lane);
        const bool adds = i.flags == 1;
        check_tile(lane, source);
        Block* const block = warp.block;
        const uint32_t start = shared_range(warp, lane, source, map.box_bytes(), 128).address;
        const auto kept = std::make_shared<std::vector<uint8_t>>();
        start_store(
            warp, lane, start, map.box_bytes(), [=] { *kept = take_out(map, *block, start); },
            [=] { move_out(map, c, *kept, adds); });
    });
    return Step::next;
}

// `[map, {x, y}]`.
void decode_map(Operands& operands, const std::string& text, uint32_t operand, Instruction& out) {
    const std::string inside = text.substr(1, text.size() - 2);
    const size_t comma = inside.find(',');
    if (comma == std::string::npos) throw Unknown("a tensor without coordinates");
    out.operands[operand] = operands.value(trim(inside.substr(0, comma)), 8);
    out.list = operands.list(inside.substr(comma + 1), 4);
}

}  // namespace

CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const uint32_t element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16  ? 2
                                   : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                                                             : 0;
    const uint32_t swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE   ? 0
                                   : swizzle == CU_TENSOR_MAP_SWIZZLE_32B  ? 32
                                   : swizzle == CU_TENSOR_MAP_SWIZZLE_64B  ? 64
                                   : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                                           : 1;
    const auto address = reinterpret_cast<uint64_t>(base);
    if (reinterpret_cast<uint64_t>(out) % 64 != 0 || address % 16 != 0 || rank < 1 || rank > kMostRank ||
        element_bytes == 0 || swizzle_bytes == 1 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    TensorMap map{};
    map.mark = kMark;
    map.base = address;
    map.rank = rank;
    map.element_bytes = element_bytes;
    map.swizzle_bytes = swizzle_bytes;
    for (uint32_t d = 0; d < kMostRank; ++d) {
        map.sizes[d] = d < rank ? sizes[d] : 1;
        map.box[d] = d < rank ? box[d] : 1;
        map.strides[d] = d == 0 ? element_bytes : d < rank ? strides[d - 1] : 0;
        if (map.sizes[d] == 0 || map.sizes[d] > uint64_t(1) << 32 || map.box[d] == 0 || map.box[d] > 256)
            return CUDA_ERROR_INVALID_VALUE;
        if (d < rank && element_strides[d] != 1) return CUDA_ERROR_INVALID_VALUE;
        if (d > 0 && d < rank && (map.strides[d] % 16 != 0 || map.strides[d] >= uint64_t(1) << 40))
            return CUDA_ERROR_INVALID_VALUE;
    }
    const uint32_t inner = map.box[0] * element_bytes;
    if (inner % 16 != 0 || (swizzle_bytes != 0 && inner > swizzle_bytes)) return CUDA_ERROR_INVALID_VALUE;
    memset(out, 0, sizeof *out);
    memcpy(out, &map, sizeof map);
    return CUDA_SUCCESS;
}

void decode_tensor_copy(Operands& operands, const InstructionText& text, Instruction& out) {
    const std::string& name = text.opcode;
    std::string rest;
    for (const char* start : {"cp.async.bulk.tensor.", "cp.reduce.async.bulk.tensor."}) {
        if (name.rfind(start, 0) == 0) rest = name.substr(std::string(start).size());
    }
    if (rest.size() < 3 || rest[1] != 'd') return;
    out.constant = rest[0] - '0';
    const std::string form = rest.substr(3);
    const std::string loads = "shared::cluster.global.tile.mbarrier::complete_tx::bytes";
    int64_t offset = 0;
    if (form == loads || form == loads + ".multicast::cluster") {
        out.flags = form == loads ? 0 : 1;
        expect_operands(text, 3 + size_t(out.flags));
        out.operands[1] = operands.address(text.operands[0], 4, offset);
        decode_map(operands, text.operands[1], 2, out);
        out.operands[3] = operands.address(text.operands[2], 4, offset);
        if (out.flags) out.operands[4] = operands.value(text.operands[3], 2);
        out.execute = &tensor_load;
    } else if (form == "global.shared::cta.tile.bulk_group" || form == "global.shared::cta.add.tile.bulk_group") {
        expect_operands(text, 2);
        decode_map(operands, text.operands[0], 1, out);
        out.operands[2] = operands.address(text.operands[1], 4, offset);
        out.flags = has(text, "add") ? 1 : 0;
        out.execute = &tensor_store;
    }
    if (out.list.size() != size_t(out.constant)) throw Unknown("another number of coordinates than dimensions");
    if (offset != 0) throw Unknown("an offset in an address that takes none here");
}

}  // namespace ptx
