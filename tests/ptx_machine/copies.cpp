// cp.async of one thread, bulk copies of contiguous bytes, and the groups in which threads wait for either. PTX
// ISA 9.0, section 9.7.9.25, "Data Movement and Conversion Instructions: Asynchronous copy".
#include "copies.h"

#include "decode.h"
#include "matrix_arithmetic.h"
#include "mbarrier.h"
#include "tensor_map.h"
#include "warp.h"

namespace ptx {

void start_load(Warp& warp, int lane, Block& block, uint32_t address, uint32_t bytes, uint32_t mbarrier,
                std::function<void()> move) {
    Cluster& cluster = *block.cluster;
    check_copy_barrier(warp, lane, block, mbarrier);
    cluster.orders.copy_begins(warp.actor, block.rank, address, bytes, true);
    const uint32_t actor = warp.actor;
    Block* const to = &block;
    std::function<void()> land = [=, move = std::move(move)] {
        move();
        mark_written({to, address, nullptr}, bytes);
        to->cluster->orders.copy_lands(actor, to->rank, address, bytes, true, kNoLane);
        complete_transactions(*to, mbarrier, bytes);
    };
    if (launch_of(warp).lands_late()) {
        cluster.pending.push_back({block.rank, mbarrier, std::move(land)});
    } else {
        land();
    }
}

void start_store(Warp& warp, int lane, uint32_t address, uint32_t bytes, std::function<void()> read,
                 std::function<void()> write) {
    Block* const block = warp.block;
    const uint32_t actor = warp.actor;
    const auto look = [=] {
        check_written({block, address, nullptr}, bytes, lane);
        block->cluster->orders.async_read(actor, actor, block->rank, address, bytes, "a store of the async proxy",
                                          uint8_t(lane));
    };
    // Now for what is missing now, and again when it reads, for what happens until then.
    look();
    BulkStore store;
    store.read = [=, read = std::move(read)] { look(), read(); };
    store.write = std::move(write);
    if (!launch_of(warp).lands_late()) {
        store.read();
        store.write();
        store.was_read = true;
        store.write = [] {};
    }
    warp.bulk[size_t(lane)].open.push_back(std::move(store));
    block->cluster->progress++;
}

void add_element(uint64_t address, const uint8_t* value, uint32_t bytes) {
    auto* const at = reinterpret_cast<uint8_t*>(address);
    if (bytes == 4) {
        float sum, term;
        memcpy(&sum, at, sizeof sum);
        memcpy(&term, value, sizeof term);
        sum += term;
        memcpy(at, &sum, sizeof sum);
        return;
    }
    uint16_t sum, term;
    memcpy(&sum, at, sizeof sum);
    memcpy(&term, value, sizeof term);
    const float exact = bf16_value(sum) + bf16_value(term);
    uint32_t bits;
    memcpy(&bits, &exact, sizeof bits);
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1);
    sum = uint16_t(bits >> 16);
    memcpy(at, &sum, sizeof sum);
}

namespace {

// ---- cp.async: by the thread that asks, in groups of its own.

void land(Warp& warp, int lane, const CopyRequest& copy) {
    const SharedRange at = shared_range(warp, lane, copy.destination, copy.size, copy.size);
    uint8_t bytes[16] = {};
    if (copy.valid != 0) {
        check_global(lane, copy.source, copy.valid, Access::read);
        memcpy(bytes, reinterpret_cast<const void*>(copy.source), copy.valid);
    }
    memcpy(at.bytes, bytes, copy.size);
    mark_written(at, copy.size);
    warp.block->cluster->orders.copy_lands(warp.actor, at.block->rank, at.address, copy.size, false, uint8_t(lane));
}

// operands: -, destination, source, valid bytes (where `flags`); `constant`: bytes.
Step copy_async(Warp& warp, const Instruction& i) {
    const auto size = uint32_t(i.constant);
    each_lane(warp.lanes, [&](int lane) {
        CopyRequest copy{};
        copy.destination = uint32_t(lane_address(warp, i, 1, lane));
        copy.source = warp.values<uint64_t>(i.operands[2])[lane] + uint64_t(i.list.empty() ? 0 : i.list[0]);
        copy.size = size;
        copy.valid = i.flags ? warp.values<uint32_t>(i.operands[3])[lane] : size;
        if (copy.valid > size) fail_lane(lane, "cp.async of %u bytes reads %u", size, copy.valid);
        const SharedRange at = shared_range(warp, lane, copy.destination, size, size);
        if (copy.source % size != 0)
            fail_lane(lane, "misaligned: cp.async from %#llx", static_cast<unsigned long long>(copy.source));
        if (copy.valid != 0) check_global(lane, copy.source, copy.valid, Access::read);
        warp.block->cluster->orders.copy_begins(warp.actor, at.block->rank, at.address, size, false);
        if (launch_of(warp).lands_late()) {
            warp.copies[size_t(lane)].open.push_back(copy);
        } else {
            land(warp, lane, copy);
        }
    });
    return Step::next;
}

Step commit_copies(Warp& warp, const Instruction&) {
    each_lane(warp.lanes, [&](int lane) {
        LaneGroups<CopyRequest>& groups = warp.copies[size_t(lane)];
        groups.groups.push_back(std::move(groups.open));
        groups.open.clear();
    });
    return Step::next;
}

// `constant`: groups that may stay under way. A wait with work that is in no group yet would be allowed, but waits for
// less than whoever wrote it meant.
Step wait_for_copies(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        LaneGroups<CopyRequest>& groups = warp.copies[size_t(lane)];
        if (!groups.open.empty())
            fail_lane(lane, "waits for groups while a cp.async stands in none: cp.async.commit_group is missing");
        while (groups.groups.size() > size_t(i.constant)) {
            for (const CopyRequest& copy : groups.groups.front()) land(warp, lane, copy);
            groups.groups.erase(groups.groups.begin());
        }
    });
    warp.block->cluster->progress++;
    return Step::next;
}

// ---- bulk copies of contiguous bytes.

void check_bulk(int lane, uint64_t global, uint32_t shared, uint32_t bytes) {
    if (global % 16 != 0 || shared % 16 != 0 || bytes % 16 != 0 || bytes == 0) {
        fail_lane(lane,
                  "misaligned: a bulk copy of %u bytes between %#llx and shared address %#x needs multiples of 16",
                  bytes, static_cast<unsigned long long>(global), shared);
    }
}

// operands: -, destination, source, bytes, mbarrier.
Step bulk_load(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const auto destination = warp.values<uint32_t>(i.operands[1])[lane];
        const auto source = warp.values<uint64_t>(i.operands[2])[lane];
        const auto bytes = warp.values<uint32_t>(i.operands[3])[lane];
        const auto mbarrier = warp.values<uint32_t>(i.operands[4])[lane];
        check_bulk(lane, source, destination, bytes);
        const SharedRange to = shared_range(warp, lane, destination, bytes, 16);
        check_global(lane, source, bytes, Access::read);
        start_load(warp, lane, *to.block, to.address, bytes, mbarrier,
                   [=] { memcpy(to.bytes, reinterpret_cast<const void*>(source), bytes); });
    });
    return Step::next;
}

// operands: -, destination, source, bytes; `flags` is 1 to add f32 values.
Step bulk_store(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        const auto destination = warp.values<uint64_t>(i.operands[1])[lane];
        const auto source = warp.values<uint32_t>(i.operands[2])[lane];
        const auto bytes = warp.values<uint32_t>(i.operands[3])[lane];
        const bool adds = i.flags == 1;
        check_bulk(lane, destination, source, bytes);
        const SharedRange from = shared_range(warp, lane, source, bytes, 16);
        check_global(lane, destination, bytes, adds ? Access::update : Access::write);
        const auto kept = std::make_shared<std::vector<uint8_t>>(bytes);
        start_store(
            warp, lane, from.address, bytes, [=] { memcpy(kept->data(), from.bytes, bytes); },
            [=] {
                if (!adds)
                    memcpy(reinterpret_cast<void*>(destination), kept->data(), bytes);
                else
                    for (uint32_t at = 0; at < bytes; at += 4) add_element(destination + at, kept->data() + at, 4);
            });
    });
    return Step::next;
}

Step commit_stores(Warp& warp, const Instruction&) {
    each_lane(warp.lanes, [&](int lane) {
        LaneGroups<BulkStore>& groups = warp.bulk[size_t(lane)];
        groups.groups.push_back(std::move(groups.open));
        groups.open.clear();
    });
    return Step::next;
}

void read_source(BulkStore& store) {
    if (!store.was_read) store.read();
    store.was_read = true;
}

// `constant`: groups that may stay under way; `flags` is 1 for .read, which waits for the sources alone.
Step wait_for_stores(Warp& warp, const Instruction& i) {
    each_lane(warp.lanes, [&](int lane) {
        std::vector<std::vector<BulkStore>>& groups = warp.bulk[size_t(lane)].groups;
        if (!warp.bulk[size_t(lane)].open.empty())
            fail_lane(lane,
                      "waits for groups while a bulk store stands in none: cp.async.bulk.commit_group is missing");
        const size_t done = groups.size() > size_t(i.constant) ? groups.size() - size_t(i.constant) : 0;
        for (size_t group = 0; group < done; ++group) {
            for (BulkStore& store : groups[group]) {
                read_source(store);
                if (i.flags == 0) store.write();
            }
        }
        if (i.flags == 0) groups.erase(groups.begin(), groups.begin() + std::ptrdiff_t(done));
    });
    warp.block->cluster->progress++;
    return Step::next;
}

// ---- decoding

uint32_t address_operand(Operands& operands, const std::string& text, uint32_t bytes) {
    int64_t offset = 0;
    const uint32_t slot = operands.address(text, bytes, offset);
    if (offset != 0) throw Unknown("an offset in an address that takes none here");
    return slot;
}

void decode_copy_async(Operands& operands, const InstructionText& text, Instruction& out) {
    if (!has(text, "global") || text.operands.size() < 3 || text.operands.size() > 4) return;
    const uint32_t width = operands.address_width(text.operands[0]);
    out.widths[1] = uint8_t(width != 0 ? width : 4);
    out.operands[1] = operands.address(text.operands[0], out.widths[1], out.offset);
    int64_t offset = 0;
    out.operands[2] = operands.address(text.operands[1], 8, offset);
    if (offset != 0) out.list.push_back(uint32_t(offset));
    out.constant = std::stoll(text.operands[2]);
    if (out.constant != 4 && out.constant != 8 && out.constant != 16) throw Unknown("copies 4, 8 or 16 bytes");
    if (has(text, "cg") && out.constant != 16) throw Unknown("cp.async.cg copies 16 bytes");
    if (text.operands.size() == 4) {
        out.flags = 1;
        out.operands[3] = operands.value(text.operands[3], 4);
    }
    out.execute = &copy_async;
}

void decode_bulk(Operands& operands, const InstructionText& text, Instruction& out) {
    const std::string& name = text.opcode;
    const bool loads = name == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes";
    const bool adds = name == "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32";
    if (!loads && !adds && name != "cp.async.bulk.global.shared::cta.bulk_group") return;
    expect_operands(text, loads ? 4 : 3);
    out.operands[1] = address_operand(operands, text.operands[0], loads ? 4 : 8);
    out.operands[2] = address_operand(operands, text.operands[1], loads ? 8 : 4);
    out.operands[3] = operands.value(text.operands[2], 4);
    if (loads) out.operands[4] = address_operand(operands, text.operands[3], 4);
    out.flags = adds ? 1 : 0;
    out.execute = loads ? &bulk_load : &bulk_store;
}

void decode_group(const InstructionText& text, Instruction& out) {
    const bool bulk = has(text, "bulk");
    if (has(text, "commit_group")) {
        out.execute = bulk ? &commit_stores : &commit_copies;
    } else if (has(text, "wait_group")) {
        expect_operands(text, 1);
        out.constant = std::stoll(text.operands[0]);
        out.flags = has(text, "read") ? 1 : 0;
        out.execute = bulk ? &wait_for_stores : &wait_for_copies;
    } else if (has(text, "wait_all") && !bulk) {
        out.execute = [](Warp& warp, const Instruction& i) {
            commit_copies(warp, i);
            return wait_for_copies(warp, i);
        };
    }
}

void decode_copy(Operands& operands, const InstructionText& text, Instruction& out) {
    if (has(text, "commit_group") || has(text, "wait_group") || has(text, "wait_all")) return decode_group(text, out);
    if (has(text, "tensor")) return decode_tensor_copy(operands, text, out);
    if (has(text, "bulk")) return decode_bulk(operands, text, out);
    if (text.parts[1] == "async") return decode_copy_async(operands, text, out);
}

}  // namespace

void finish_copies(Warp& warp, Mask lanes) {
    each_lane(lanes, [&](int lane) {
        LaneGroups<CopyRequest>& copies = warp.copies[size_t(lane)];
        bool waiting = !copies.open.empty();
        for (const auto& group : copies.groups) waiting |= !group.empty();
        if (waiting) fail_lane(lane, "exits without waiting for its cp.async copies");
        LaneGroups<BulkStore>& bulk = warp.bulk[size_t(lane)];
        if (!bulk.open.empty()) fail_lane(lane, "exits with bulk stores that no group was committed for");
        for (auto& group : bulk.groups) {
            for (BulkStore& store : group) {
                if (!store.was_read) fail_lane(lane, "exits while a bulk store still reads its shared memory");
                store.write();
            }
        }
        bulk.groups.clear();
    });
}

void add_copies(OpcodeTable& table) { table["cp"] = &decode_copy; }

}  // namespace ptx
