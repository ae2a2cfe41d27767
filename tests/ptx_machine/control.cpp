// Control flow and instructions without an effect here. PTX ISA 9.0, sections 9.7.12 (control flow), 9.7.13 (membar,
// fence), 9.7.19 (miscellaneous).
#include "decode.h"

namespace ptx {
namespace {

// bra: lanes that do not take it become a split of their own.
Step branch(Warp& warp, const Instruction& i) {
    if (warp.lanes != warp.active) {
        warp.others.push_back({warp.active & ~warp.lanes, warp.pc + 1});
        warp.active = warp.lanes;
    }
    warp.pc = uint32_t(i.constant);
    return Step::jumped;
}

void decode_branch(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 1);
    out.constant = operands.label(text.operands[0]);
    out.is_branch = true;
    out.execute = &branch;
}

void decode_exit(Operands&, const InstructionText&, Instruction& out) {
    out.execute = [](Warp&, const Instruction&) { return Step::exited; };
}

void decode_trap(Operands&, const InstructionText&, Instruction& out) {
    out.execute = [](Warp&, const Instruction&) -> Step { fail("the kernel traps"); };
}

void decode_nothing(Operands&, const InstructionText&, Instruction& out) {
    out.execute = [](Warp&, const Instruction&) { return Step::next; };
}

// nanosleep: others get their turn.
void decode_sleep(Operands&, const InstructionText&, Instruction& out) {
    out.execute = [](Warp&, const Instruction&) { return Step::yielded; };
}

Step proxy_fence(Warp& warp, const Instruction&) {
    warp.block->cluster->orders.proxy_fence(warp.actor);
    return Step::next;
}
Step mbarrier_fence(Warp& warp, const Instruction&) {
    warp.block->cluster->orders.barrier_fence(warp.actor);
    return Step::next;
}

// fence.proxy.async orders the generic and the async proxy, for shared memory where it says so or names no space;
// fence.mbarrier_init makes initialised mbarriers visible. Other fences order one thread's accesses, which are in order
// here.
void decode_fence(Operands& operands, const InstructionText& text, Instruction& out) {
    decode_nothing(operands, text, out);
    if (has(text, "mbarrier_init")) {
        out.execute = &mbarrier_fence;
    } else if (has(text, "proxy")) {
        if (!has(text, "async")) throw Unknown("a fence of a proxy that this machine does not know");
        if (!has(text, "global")) out.execute = &proxy_fence;
    }
}

}  // namespace

void add_control(OpcodeTable& table) {
    table["bra"] = &decode_branch;
    table["ret"] = table["exit"] = &decode_exit;
    table["trap"] = &decode_trap;
    table["nanosleep"] = &decode_sleep;
    table["fence"] = &decode_fence;
    table["membar"] = table["prefetch"] = table["prefetchu"] = &decode_nothing;
    // Registers have no number here.
    table["setmaxnreg"] = &decode_nothing;
}

}  // namespace ptx
