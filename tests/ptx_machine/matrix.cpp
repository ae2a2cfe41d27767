// mma, ldmatrix and stmatrix. PTX ISA 9.0, section 9.7.14 (warp-level matrix instructions): "Matrix Fragments for
// mma.m16n8k16 with floating point type", "ldmatrix", "stmatrix".
#include "decode.h"
#include "matrix_arithmetic.h"
#include "memory.h"
#include "warp.h"

namespace ptx {
namespace {

// list: d0..d3, a0..a3, b0, b1, c0..c3. With g = lane / 4 and q = lane % 4:
//   a_i: row g + 8 (i % 2), columns 2q + 8 (i / 2) and the next;  b_i: rows 2q + 8i and the next, column g;
//   c_i, d_i: row g + 8 (i / 2), column 2q + i % 2.
Step multiply_accumulate(Warp& warp, const Instruction& i) {
    if (!whole_warp(warp)) return Step::gathering;
    float a[16 * kDepth], b[kDepth * 8], c[16 * 8];
    const auto word = [&](size_t operand, int lane) { return warp.values<uint32_t>(i.list[operand])[lane]; };
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int k = 0; k < 4; ++k) {
            const uint32_t pair = word(size_t(4 + k), lane);
            float* const at = a + (g + k % 2 * 8) * kDepth + 2 * q + k / 2 * 8;
            at[0] = bf16_value(pair & 0xffff);
            at[1] = bf16_value(pair >> 16);
            c[(g + k / 2 * 8) * 8 + 2 * q + k % 2] = warp.values<float>(i.list[size_t(10 + k)])[lane];
        }
        for (int k = 0; k < 2; ++k) {
            const uint32_t pair = word(size_t(8 + k), lane);
            b[(2 * q + 8 * k) * 8 + g] = bf16_value(pair & 0xffff);
            b[(2 * q + 8 * k + 1) * 8 + g] = bf16_value(pair >> 16);
        }
    }
    multiply_add(c, a, b, 16, 8, launch_of(warp).rounding);
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, q = lane % 4;
        for (int k = 0; k < 4; ++k)
            warp.values<float>(i.list[size_t(k)])[lane] = c[(g + k / 2 * 8) * 8 + 2 * q + k % 2];
    }
    return Step::next;
}

void decode_multiply_accumulate(Operands& operands, const InstructionText& text, Instruction& out) {
    if (text.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") return;
    expect_operands(text, 4);
    const size_t counts[4] = {4, 4, 2, 4};
    for (size_t k = 0; k < 4; ++k) {
        const std::vector<uint32_t> registers = operands.list(text.operands[k], 4);
        if (registers.size() != counts[k]) throw Unknown("an operand has another number of registers");
        out.list.insert(out.list.end(), registers.begin(), registers.end());
    }
    out.execute = &multiply_accumulate;
}

// Lanes 8m .. 8m+7 name the rows of matrix m; lane l gets, or gives, row l / 4, columns 2 (l % 4) and the next; of the
// transposed matrix where `kTransposed`.
template <int kCount, bool kTransposed>
Step load_matrices(Warp& warp, const Instruction& i) {
    if (!whole_warp(warp)) return Step::gathering;
    uint16_t m[kCount][8][8];
    for (int lane = 0; lane < 8 * kCount; ++lane) {
        const auto address = uint32_t(lane_address(warp, i, 1, lane));
        memcpy(m[lane / 8][lane % 8], generic_shared(warp, lane, address, 16, 16, Access::read, {kWholeWarp, 16}).bytes,
               16);
    }
    for (int k = 0; k < kCount; ++k) {
        uint32_t* const d = warp.values<uint32_t>(i.list[size_t(k)]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            d[lane] = kTransposed ? uint32_t(m[k][column][row]) | uint32_t(m[k][column + 1][row]) << 16
                                  : uint32_t(m[k][row][column]) | uint32_t(m[k][row][column + 1]) << 16;
        }
    }
    return Step::next;
}

template <int kCount, bool kTransposed>
Step store_matrices(Warp& warp, const Instruction& i) {
    if (!whole_warp(warp)) return Step::gathering;
    uint16_t m[kCount][8][8];
    for (int k = 0; k < kCount; ++k) {
        const uint32_t* const s = warp.values<uint32_t>(i.list[size_t(k)]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            (kTransposed ? m[k][column][row] : m[k][row][column]) = uint16_t(s[lane]);
            (kTransposed ? m[k][column + 1][row] : m[k][row][column + 1]) = uint16_t(s[lane] >> 16);
        }
    }
    for (int lane = 0; lane < 8 * kCount; ++lane) {
        const auto address = uint32_t(lane_address(warp, i, 1, lane));
        memcpy(generic_shared(warp, lane, address, 16, 16, Access::write, {kWholeWarp, 16}).bytes,
               m[lane / 8][lane % 8], 16);
    }
    warp.block->cluster->progress++;
    return Step::next;
}

template <bool kLoads, bool kTransposed>
Execute by_count(size_t count) {
    if constexpr (kLoads) {
        return count == 1   ? &load_matrices<1, kTransposed>
               : count == 2 ? &load_matrices<2, kTransposed>
               : count == 4 ? &load_matrices<4, kTransposed>
                            : nullptr;
    } else {
        return count == 1   ? &store_matrices<1, kTransposed>
               : count == 2 ? &store_matrices<2, kTransposed>
               : count == 4 ? &store_matrices<4, kTransposed>
                            : nullptr;
    }
}

template <bool kLoads>
void decode_matrices(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 2);
    if (!has(text, "m8n8") || text.parts.back() != "b16" || !has(text, "sync") || !has(text, "aligned")) return;
    const std::string& address = text.operands[kLoads ? 1 : 0];
    const uint32_t width = operands.address_width(address);
    out.widths[1] = uint8_t(width != 0 ? width : 4);
    out.operands[1] = operands.address(address, out.widths[1], out.offset);
    out.list = operands.list(text.operands[kLoads ? 0 : 1], 4);
    const size_t count = has(text, "x4") ? 4 : has(text, "x2") ? 2 : 1;
    if (out.list.size() != count) throw Unknown("another number of registers than of matrices");
    out.execute = has(text, "trans") ? by_count<kLoads, true>(count) : by_count<kLoads, false>(count);
}

}  // namespace

void add_matrices(OpcodeTable& table) {
    table["mma"] = &decode_multiply_accumulate;
    table["ldmatrix"] = &decode_matrices<true>;
    table["stmatrix"] = &decode_matrices<false>;
}

}  // namespace ptx
