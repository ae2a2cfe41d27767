// Products of a warpgroup. PTX ISA 9.0, section 9.7.15, "Asynchronous Warpgroup Level Matrix Instructions": shared
// memory matrix layout, matrix descriptor format, wgmma.fence, .mma_async, .commit_group, .wait_group.
//
// Warp w of the four computes rows 16w .. 16w+15, from its own registers and from shared memory. A group of products is
// the whole warpgroup's, though: it is complete when the products of all four warps are, and whichever warp waits for
// it first waits for all of them. That all four ask for the same is compared when they exit.
#include "decode.h"
#include "matrix_arithmetic.h"
#include "memory.h"
#include "tensor_map.h"
#include "warp.h"

namespace ptx {
namespace {

constexpr uint32_t kRows = 64;
constexpr uint32_t kMostColumns = 256;

// "Matrix Descriptor Format": an operand in shared memory.
struct Descriptor {
    uint32_t start, leading, stride, swizzle;

    explicit Descriptor(uint64_t bits)
        : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)), swizzle(kSwizzles[bits >> 62]) {
        if ((bits >> 49 & 7) != 0) fail("a matrix descriptor with a base offset, which this machine does not know");
    }
    static uint32_t field(uint64_t bits, int from) { return uint32_t(bits >> from & 0x3fff) << 4; }
    static constexpr uint32_t kSwizzles[4] = {0, 128, 64, 32};

    // The 16 bytes that hold 8 values of row `r` (of M or N) from depth `k` on, K-major; k a multiple of 8.
    uint32_t depth_chunk(uint32_t r, uint32_t k) const {
        const uint32_t row_bytes = swizzle == 0 ? 16 : swizzle;
        const uint32_t along_depth = swizzle == 0 ? k / 8 * leading : k * 2;
        return swizzled(start + r / 8 * stride + r % 8 * row_bytes + along_depth, swizzle);
    }
    // The 16 bytes that hold 8 rows from `r` on at depth `k`, MN-major; r a multiple of 8.
    uint32_t row_chunk(uint32_t r, uint32_t k) const {
        if (swizzle == 0) return start + r / 8 * stride + k % 8 * 16 + k / 8 * leading;
        const uint32_t across = swizzle / 2;
        return swizzled(start + r % across * 2 + r / across * leading + k % 8 * swizzle + k / 8 * stride, swizzle);
    }
};

// Eight bf16 values of shared memory, as the async proxy reads them.
void read_chunk(Warp& warp, uint32_t address, float (&values)[8]) {
    const SharedRange at = shared_range(warp, -1, address, 16, 16);
    check_written(at, 16, -1);
    Orders& orders = warp.block->cluster->orders;
    const uint32_t products = orders.product_actor(warp.block->rank, warp.index / kWarpgroupWarps);
    orders.async_read(warp.actor, products, at.block->rank, at.address, 16, "wgmma", kNoLane);
    uint16_t bits[8];
    memcpy(bits, at.bytes, sizeof bits);
    for (int k = 0; k < 8; ++k) values[k] = bf16_value(bits[k]);
}

// An operand's `rows` from `first` on, to `out[row * row_step + k * depth_step]`.
void read_operand(Warp& warp, const Descriptor& d, bool transposed, uint32_t first, uint32_t rows, float* out,
                  uint32_t row_step, uint32_t depth_step) {
    float values[8];
    if (transposed) {
        for (uint32_t k = 0; k < kDepth; ++k) {
            for (uint32_t r = 0; r < rows; r += 8) {
                read_chunk(warp, d.row_chunk(first + r, k), values);
                for (uint32_t e = 0; e < 8; ++e) out[(r + e) * row_step + k * depth_step] = values[e];
            }
        }
        return;
    }
    for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t k = 0; k < kDepth; k += 8) {
            read_chunk(warp, d.depth_chunk(first + r, k), values);
            for (uint32_t e = 0; e < 8; ++e) out[r * row_step + (k + e) * depth_step] = values[e];
        }
    }
}

// list: accumulators; list2: A's registers, if A is in registers. operands: -, A's descriptor, B's descriptor, scale-d.
// `constant`: N; `flags` bit 0: A is transposed, bit 1: B is.
void compute(Warp& warp, const PendingProduct& product) {
    const Instruction& i = *product.instruction;
    const auto columns = uint32_t(i.constant);
    static thread_local float a[16 * kDepth], b[kDepth * kMostColumns], c[16 * kMostColumns];
    if (i.list2.empty()) {
        read_operand(warp, Descriptor(product.a_descriptor), (i.flags & 1) != 0, warp.index % kWarpgroupWarps * 16, 16,
                     a, kDepth, 1);
    } else {
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int k = 0; k < 4; ++k) {
                const uint32_t pair = warp.values<uint32_t>(i.list2[size_t(k)])[lane];
                float* const at = a + (lane / 4 + k % 2 * 8) * kDepth + lane % 4 * 2 + k / 2 * 8;
                at[0] = bf16_value(pair & 0xffff);
                at[1] = bf16_value(pair >> 16);
            }
        }
    }
    read_operand(warp, Descriptor(product.b_descriptor), (i.flags & 2) != 0, 0, columns, b, 1, columns);
    // "Register fragment of D": d_j of a lane is row lane / 4 + 8 (j / 2 % 2), column 8 (j / 4) + 2 (lane % 4) + j % 2.
    const auto place = [&](int lane, uint32_t j) {
        return (uint32_t(lane) / 4 + j / 2 % 2 * 8) * columns + j / 4 * 8 + uint32_t(lane) % 4 * 2 + j % 2;
    };
    for (uint32_t j = 0; j < columns / 2; ++j) {
        const float* const d = warp.values<float>(i.list[j]);
        for (int lane = 0; lane < kLanes; ++lane) c[place(lane, j)] = product.accumulate ? d[lane] : 0.0f;
    }
    multiply_add(c, a, b, 16, int(columns), launch_of(warp).rounding);
    for (uint32_t j = 0; j < columns / 2; ++j) {
        float* const d = warp.values<float>(i.list[j]);
        for (int lane = 0; lane < kLanes; ++lane) d[lane] = c[place(lane, j)];
    }
}

// Computes what is left to compute of a warp's group number `group`, whose registers stay in use until the warp's own
// wait.
void land_group(Warp& warp, size_t group) {
    if (group < warp.groups_waited) return;
    for (PendingProduct& product : warp.product_groups[group - warp.groups_waited]) {
        if (!product.done) compute(warp, product);
        product.done = true;
    }
    Time& read = warp.group_read_times[group];
    if (read == 0) read = warp.block->cluster->orders.products_read();
}

// The four warps of the warpgroup, fewer at the end of a block.
template <class F>
void each_warp_of_group(Warp& warp, F f) {
    const uint32_t first = warp.index / kWarpgroupWarps * kWarpgroupWarps;
    for (uint32_t w = first; w < first + kWarpgroupWarps && w < warp.block->warps.size(); ++w) f(warp.block->warps[w]);
}

// A value that all lanes must agree on.
template <class T>
T same_in_all(Warp& warp, uint32_t slot, const char* what) {
    const T* const values = warp.values<T>(slot);
    for (int lane = 1; lane < kLanes; ++lane) {
        if (values[lane] != values[0]) fail_lane(lane, "the lanes of a warp give wgmma different %s", what);
    }
    return values[0];
}

void check_warpgroup(Warp& warp) {
    const uint32_t first = warp.index / kWarpgroupWarps * kWarpgroupWarps;
    if (warp.block->warps.size() < first + kWarpgroupWarps) fail("wgmma in a block without four whole warps for it");
}

Step fence(Warp& warp, const Instruction&) {
    if (!whole_warp(warp)) return Step::gathering;
    check_warpgroup(warp);
    warp.wgmma_fenced = true;
    return Step::next;
}

Step multiply(Warp& warp, const Instruction& i) {
    if (!whole_warp(warp)) return Step::gathering;
    check_warpgroup(warp);
    if (!warp.wgmma_fenced) fail("wgmma without wgmma.fence: its registers may still be changing");
    PendingProduct product;
    product.instruction = &i;
    if (i.list2.empty()) product.a_descriptor = same_in_all<uint64_t>(warp, i.operands[1], "descriptors of A");
    product.b_descriptor = same_in_all<uint64_t>(warp, i.operands[2], "descriptors of B");
    const Mask accumulate = warp.predicates[i.operands[3]];
    if (accumulate != 0 && accumulate != kAllLanes) fail("the lanes of a warp give wgmma different scale-d");
    product.accumulate = accumulate != 0;
    for (const uint64_t part :
         {uint64_t(warp.pc), product.a_descriptor, product.b_descriptor, uint64_t(product.accumulate)}) {
        warp.product_history = (warp.product_history ^ part) * 0x9E3779B97F4A7C15ull;
    }
    if (warp.in_flight.empty()) warp.in_flight.assign(launch_of(warp).entry->virtual_registers, 0);
    for (const uint32_t number : i.named) ++warp.in_flight[number];
    ++warp.products_pending;
    // All of a warp's products land late, or none: later ones add to what earlier ones leave.
    product.done = launch_of(warp).options.landing == Landing::early;
    if (product.done) compute(warp, product);
    warp.products.push_back(product);
    return Step::next;
}

Step commit(Warp& warp, const Instruction&) {
    if (!whole_warp(warp)) return Step::gathering;
    const bool is_done = launch_of(warp).options.landing == Landing::early;
    Cluster& cluster = *warp.block->cluster;
    warp.group_read_times.push_back(is_done ? cluster.orders.products_read() : 0);
    warp.product_groups.push_back(std::move(warp.products));
    warp.products.clear();
    cluster.progress++;
    return Step::next;
}

// `constant`: groups that may stay under way.
Step wait(Warp& warp, const Instruction& i) {
    if (!whole_warp(warp)) return Step::gathering;
    if (!warp.products.empty()) fail("waits for groups while a wgmma stands in none: wgmma.commit_group is missing");
    const size_t committed = warp.group_read_times.size(), stay = size_t(i.constant);
    const size_t complete = committed > stay ? committed - stay : 0;
    bool all_here = true;
    each_warp_of_group(warp, [&](const Warp& peer) {
        all_here &= peer.state == Warp::State::exited || peer.group_read_times.size() >= complete;
    });
    if (!all_here) return Step::again;
    Orders& orders = warp.block->cluster->orders;
    const uint32_t products = orders.product_actor(warp.block->rank, warp.index / kWarpgroupWarps);
    for (; warp.groups_waited < complete; ++warp.groups_waited) {
        const size_t group = warp.groups_waited;
        each_warp_of_group(warp, [&](Warp& peer) {
            if (peer.group_read_times.size() <= group) return;
            land_group(peer, group);
            orders.products_seen(warp.actor, products, peer.group_read_times[group]);
        });
        for (const PendingProduct& product : warp.product_groups.front()) {
            for (const uint32_t number : product.instruction->named) --warp.in_flight[number];
            --warp.products_pending;
        }
        warp.product_groups.erase(warp.product_groups.begin());
    }
    if (warp.product_groups.empty()) warp.wgmma_fenced = false;
    return Step::next;
}

void decode_multiply(Operands& operands, const InstructionText& text, Instruction& out) {
    // wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16 d, a, b, scale-d, imm-scale-a, imm-scale-b[, trans-a],
    // trans-b
    if (text.parts.size() != 8 || text.parts[5] != "f32" || text.parts[6] != "bf16" || text.parts[7] != "bf16") return;
    const std::string& shape = text.parts[4];
    if (shape.rfind("m64n", 0) != 0 || shape.size() < 8 || shape.substr(shape.size() - 3) != "k16") return;
    out.constant = std::stoll(shape.substr(4));
    if (out.constant % 8 != 0 || out.constant < 8 || out.constant > int64_t(kMostColumns)) return;
    const bool registers = text.operands.at(1)[0] == '{';
    expect_operands(text, registers ? 7 : 8);
    out.list = operands.list(text.operands[0], 4);
    if (out.list.size() != size_t(out.constant / 2)) throw Unknown("N / 2 accumulators are needed");
    if (registers) {
        out.list2 = operands.list(text.operands[1], 4);
        if (out.list2.size() != 4) throw Unknown("A takes four registers");
    }
    // Only what the product uses while it is under way; descriptors are read at once.
    const std::vector<uint32_t> held = out.named;
    if (!registers) out.operands[1] = operands.value(text.operands[1], 8);
    out.operands[2] = operands.value(text.operands[2], 8);
    out.named = held;
    out.operands[3] = operands.predicate(text.operands[3]);
    if (text.operands[4] != "1" || text.operands[5] != "1") throw Unknown("scales other than 1");
    const bool transposed_a = !registers && text.operands[6] == "1", transposed_b = text.operands.back() == "1";
    out.flags = (transposed_a ? 1 : 0) | (transposed_b ? 2 : 0);
    out.execute = &multiply;
}

void decode_wgmma(Operands& operands, const InstructionText& text, Instruction& out) {
    if (!has(text, "sync") || !has(text, "aligned")) return;
    const std::string& what = text.parts[1];
    if (what == "mma_async") return decode_multiply(operands, text, out);
    if (what == "fence") out.execute = &fence;
    if (what == "commit_group") out.execute = &commit;
    if (what == "wait_group") {
        expect_operands(text, 1);
        out.constant = std::stoll(text.operands[0]);
        out.execute = &wait;
    }
}

}  // namespace

void finish_products(Warp& warp) {
    if (warp.products_pending != 0) fail("exits without waiting for its wgmma products");
    // All that is left of the warpgroup must have asked for the same.
    const uint32_t first = warp.index / kWarpgroupWarps * kWarpgroupWarps;
    for (uint32_t other = first; other < first + kWarpgroupWarps && other < warp.block->warps.size(); ++other) {
        const Warp& peer = warp.block->warps[other];
        if (peer.state == Warp::State::exited && peer.product_history != warp.product_history) {
            fail("the warps of a warpgroup asked for different wgmma products (warps %u and %u)", other, warp.index);
        }
    }
}

void add_wgmma(OpcodeTable& table) { table["wgmma"] = &decode_wgmma; }

}  // namespace ptx
