// wgmma: the 128 threads of a warpgroup deposit their operands, and the gemm is computed at a wait, or earlier.
#include <algorithm>

#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;
typedef float Float8 __attribute__((vector_size(32)));

// ---- matrix descriptors

// PTX ISA, "Matrix descriptor". `span` is the width of the swizzle pattern in bytes, 16 without one.
struct Descriptor {
    uint32_t start, leading_bytes, stride_bytes, span, mask;

    uint32_t swizzled(uint32_t offset) const {
        const uint32_t address = start + offset;
        return address ^ (address >> 3 & mask);
    }
};

Descriptor decode(uint64_t bits, Site site) {
    static constexpr uint32_t kSpan[] = {16, 128, 64, 32}, kMask[] = {0, 0x70, 0x30, 0x10};
    const int mode = int(bits >> 62);
    const Descriptor descriptor{uint32_t(bits & 0x3fff) << 4, uint32_t(bits >> 16 & 0x3fff) << 4,
                                uint32_t(bits >> 32 & 0x3fff) << 4, kSpan[mode], kMask[mode]};
    if ((bits >> 49 & 7) != 0)
        fail(site, "wgmma: a descriptor's base offset is not modelled; align tiles to the swizzle pattern");
    if ((descriptor.start >> 3 & descriptor.mask) != 0)
        fail(site,
             "wgmma: the operand at shared 0x%x does not start at a row of the %u-byte swizzle pattern that is a "
             "multiple of 8",
             descriptor.start, descriptor.span);
    return descriptor;
}

// The 16-byte chunk with elements (row, k..k+7), or (row..row+7, k) of a transposed operand. `row` is along M or N.
uint32_t chunk_address(const Descriptor& d, bool transposed, uint32_t row, uint32_t k) {
    if (!transposed) {
        if (d.mask != 0) return d.swizzled(row % 8 * d.span + row / 8 * d.stride_bytes + k * 2);
        return d.start + row % 8 * 16 + row / 8 * d.stride_bytes + k / 8 * d.leading_bytes;
    }
    if (d.mask == 0) return d.start + row / 8 * d.stride_bytes + k % 8 * 16 + k / 8 * d.leading_bytes;
    const uint32_t columns = d.span / 2;
    return d.swizzled(row % columns * 2 + row / columns * d.leading_bytes + k % 8 * d.span + k / 8 * d.stride_bytes);
}

template <class Visit>
void each_chunk(const Descriptor& descriptor, bool transposed, uint32_t rows, Visit visit) {
    const uint32_t row_step = transposed ? 8 : 1, k_step = transposed ? 1 : 8;
    for (uint32_t row = 0; row < rows; row += row_step) {
        for (uint32_t k = 0; k < uint32_t(kDepth); k += k_step)
            visit(row, k, chunk_address(descriptor, transposed, row, k));
    }
}

// Widens an operand to f32: `out[row * row_stride + k * k_stride]`.
void read_operand(uint64_t bits, bool transposed, uint32_t rows, float* out, uint32_t row_stride, uint32_t k_stride,
                  Site site) {
    const Descriptor descriptor = decode(bits, site);
    each_chunk(descriptor, transposed, rows, [&](uint32_t row, uint32_t k, uint32_t address) {
        uint16_t values[8];
        memcpy(values, shared_storage(address, 16, 16, "wgmma operand", site), 16);
        if (kChecked) require_shared_written(self(), address - kSharedBase, 16, site);
        float* to = out + row * row_stride + k * k_stride;
        for (uint32_t i = 0; i < 8; ++i)
            to[i * (transposed ? row_stride : k_stride)] = from_bits<float>(uint32_t(values[i]) << 16);
    });
}

// ---- gemms

// PTX ISA, "D fragment of wgmma m64nNk16": thread t holds rows 16(t/32) + (t%32)/4 and 8 further, in pairs of columns.
template <class Move>
void each_accumulator_pair(float* tile, int columns, float* const* d, Move move) {
    for (int thread = 0; thread < int(kWarpgroup); ++thread) {
        const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
        for (int j = 0; j < columns / 8; ++j) {
            float* at = tile + row * columns + 8 * j + column;
            move(at, d[thread] + 4 * j);
            move(at + 8 * columns, d[thread] + 4 * j + 2);
        }
    }
}

void gather_register_operand(const WgmmaOperation& operation, float* a) {
    for (int thread = 0; thread < int(kWarpgroup); ++thread) {
        const int row = thread / 32 * 16 + thread % 32 / 4, k = 2 * (thread % 4);
        for (int half = 0; half < 4; ++half) {
            const uint32_t pair = operation.a[thread][half];
            float* to = a + (row + 8 * (half % 2)) * kDepth + k + 8 * (half / 2);
            to[0] = from_bits<float>(pair << 16);
            to[1] = from_bits<float>(pair & 0xffff0000u);
        }
    }
}

// d[64, columns] += a[64, 16] * b[16, columns]; `columns` is a multiple of 16.
void multiply(float* d, const float* a, const float* b, int columns) {
    for (int row = 0; row < kRows; row += 4) {
        for (int column = 0; column < columns; column += 16) {
            Float8 sums[4][2];
            for (int i = 0; i < 4; ++i) memcpy(sums[i], d + (row + i) * columns + column, sizeof sums[i]);
            for (int k = 0; k < kDepth; ++k) {
                Float8 values[2];
                memcpy(values, b + k * columns + column, sizeof values);
                for (int i = 0; i < 4; ++i) {
                    const float scale = a[(row + i) * kDepth + k];
                    sums[i][0] += scale * values[0];
                    sums[i][1] += scale * values[1];
                }
            }
            for (int i = 0; i < 4; ++i) memcpy(d + (row + i) * columns + column, sums[i], sizeof sums[i]);
        }
    }
}

bool same_accumulators(const WgmmaOperation& a, const WgmmaOperation& b) {
    return a.operands.n == b.operands.n && memcmp(a.d, b.d, sizeof a.d) == 0;
}

// Executes the operations before number `end`. Accumulators are written back only after a run of operations that share
// them.
void execute(Warpgroup& group, uint64_t end) {
    std::vector<float>& scratch = running->wgmma_scratch;
    scratch.resize(size_t(kRows * kMaxColumns + kRows * kDepth + kDepth * kMaxColumns));
    float* d = scratch.data();
    float* a = d + kRows * kMaxColumns;
    float* b = a + kRows * kDepth;
    while (group.done < end) {
        const WgmmaOperation& first = group.queue[group.done - group.first];
        const int columns = first.operands.n;
        bool loaded = false;
        for (; group.done < end; ++group.done) {
            const WgmmaOperation& operation = group.queue[group.done - group.first];
            if (!same_accumulators(operation, first)) break;
            const WgmmaOperands& operands = operation.operands;
            if (!operands.accumulate)
                std::fill_n(d, kRows * columns, 0.0f);
            else if (!loaded)
                each_accumulator_pair(d, columns, first.d,
                                      [](float* tile, float* registers) { memcpy(tile, registers, 8); });
            loaded = true;
            if (operands.a_registers != nullptr)
                gather_register_operand(operation, a);
            else
                read_operand(operands.a_descriptor, operands.a_transposed, kRows, a, kDepth, 1, operation.site);
            read_operand(operands.b_descriptor, operands.b_transposed, uint32_t(columns), b, 1, uint32_t(columns),
                         operation.site);
            multiply(d, a, b, columns);
            ++running->counters.wgmma_operations;
            running->counters.wgmma_flops += uint64_t(2) * kRows * kDepth * uint64_t(columns);
        }
        each_accumulator_pair(d, columns, first.d, [](float* tile, float* registers) { memcpy(registers, tile, 8); });
    }
    size_t kept = 0;
    for (Thread* waiter : group.waiters) {
        if (waiter->wait.id <= group.done)
            make_runnable(*waiter);
        else
            group.waiters[kept++] = waiter;
    }
    group.waiters.resize(kept);
}

// Checks the reads of operands for races. They belong to the warpgroup's asynchronous unit, and last until the wait.
void race_operands(Thread& thread, const WgmmaOperation& operation, uint64_t sequence) {
    const uint32_t unit = running->warpgroup_unit(thread.linear / kWarpgroup), time = uint32_t(sequence) + 1;
    const auto read = [&](uint64_t bits, bool transposed, uint32_t rows) {
        each_chunk(decode(bits, operation.site), transposed, rows, [&](uint32_t, uint32_t, uint32_t address) {
            shared_storage(address, 16, 16, "wgmma operand", operation.site);
            race_access(thread, unit, time, {address - kSharedBase, 16, false, Proxy::async, true}, operation.site);
        });
    };
    const WgmmaOperands& operands = operation.operands;
    if (operands.a_registers == nullptr) read(operands.a_descriptor, operands.a_transposed, kRows);
    read(operands.b_descriptor, operands.b_transposed, uint32_t(operands.n));
}

bool same_instruction(const WgmmaOperation& operation, const WgmmaOperands& operands, Site site) {
    const WgmmaOperands& first = operation.operands;
    return first.n == operands.n && first.a_descriptor == operands.a_descriptor &&
           first.b_descriptor == operands.b_descriptor && first.accumulate == operands.accumulate &&
           (first.a_registers != nullptr) == (operands.a_registers != nullptr) &&
           first.a_transposed == operands.a_transposed && first.b_transposed == operands.b_transposed &&
           operation.site.line == site.line && operation.site.file == site.file;
}

void watch(WgmmaState& state, const void* registers, size_t bytes, bool accumulator) {
    const uintptr_t begin = uintptr_t(registers);
    for (WatchedRegisters& known : state.watched) {
        if (known.begin != begin || known.accumulator != accumulator) continue;
        known.sequence = state.issued;
        return;
    }
    state.watched.push_back({begin, begin + bytes, state.issued, accumulator});
}

// Operations that every thread of the warpgroup has waited for are forgotten.
void retire(Warpgroup& group, uint32_t first_thread) {
    uint64_t waited = group.done;
    for (uint32_t i = 0; i < kWarpgroup; ++i) waited = std::min(waited, thread_at(first_thread + i).wgmma.waited);
    for (; group.first < waited; ++group.first) group.queue.pop_front();
}

}  // namespace

void wgmma_fence(Site) { self().wgmma.fenced = true; }

void wgmma(const WgmmaOperands& operands, Site site) {
    Thread& thread = self();
    const uint32_t first_thread = thread.linear / kWarpgroup * kWarpgroup;
    if (first_thread + kWarpgroup > running->thread_count) fail(site, "wgmma: the block has no 4 whole warps here");
    if (!thread.wgmma.fenced) fail(site, "wgmma without a wgmma.fence since the kernel began or last waited");
    Warpgroup& group = running->warpgroups[thread.linear / kWarpgroup];
    const uint64_t sequence = thread.wgmma.issued++;
    if (sequence == group.first + group.queue.size()) group.queue.push_back({operands, site, 0, {}, {}});
    WgmmaOperation& operation = group.queue[sequence - group.first];
    if (!same_instruction(operation, operands, site))
        fail(site, "wgmma: the warpgroup's threads disagree: descriptors %llx and %llx here, %llx and %llx at %s:%d",
             (unsigned long long)operands.a_descriptor, (unsigned long long)operands.b_descriptor,
             (unsigned long long)operation.operands.a_descriptor, (unsigned long long)operation.operands.b_descriptor,
             file_name(operation.site), operation.site.line);
    operation.d[thread.linear % kWarpgroup] = operands.d;
    operation.a[thread.linear % kWarpgroup] = operands.a_registers;
    ++operation.threads_in;
    // One lane of each warp is checked, with what its clock knows of earlier writes.
    if (kChecked && thread.lane == 0) race_operands(thread, operation, sequence);
    if (kChecked) watch(thread.wgmma, operands.d, size_t(operands.n) / 2 * sizeof(float), true);
    if (kChecked && operands.a_registers != nullptr)
        watch(thread.wgmma, operands.a_registers, 4 * sizeof(uint32_t), false);
    if (operation.threads_in == kWarpgroup && early(*running)) execute(group, sequence + 1);
}

void wgmma_commit(Site) { self().wgmma.groups.push_back(self().wgmma.issued); }

void wgmma_wait(int groups_left, Site site) {
    Thread& thread = self();
    WgmmaState& state = thread.wgmma;
    if (state.groups.size() <= size_t(groups_left)) return;
    const uint64_t end = state.groups[state.groups.size() - 1 - size_t(groups_left)];
    Warpgroup& group = running->warpgroups[thread.linear / kWarpgroup];
    if (end > state.waited) {
        if (end > group.done) {
            if (group.queue[end - 1 - group.first].threads_in == kWarpgroup) {
                execute(group, end);
            } else {
                group.waiters.push_back(&thread);
                wait_for(WaitFor::wgmma, uint32_t(end), uint32_t(groups_left), site);
            }
        }
        state.waited = end;
        if (kChecked) {
            uint32_t& seen = thread.clock.seen[running->warpgroup_unit(thread.linear / kWarpgroup)];
            seen = std::max(seen, uint32_t(end));
        }
        if (thread.linear % kWarpgroup == 0) retire(group, thread.linear);
        std::vector<WatchedRegisters>& watched = state.watched;
        const auto complete = [&](const WatchedRegisters& registers) { return registers.sequence <= state.waited; };
        watched.erase(std::remove_if(watched.begin(), watched.end(), complete), watched.end());
    }
    state.fenced = false;
    state.groups.erase(state.groups.begin(), state.groups.end() - groups_left);
}

const char* watched_accumulator(const Thread& thread, uintptr_t address, size_t bytes, bool write) {
    for (const WatchedRegisters& registers : thread.wgmma.watched) {
        if (address + bytes <= registers.begin || address >= registers.end) continue;
        if (registers.accumulator) return "an accumulator of wgmma";
        if (write) return "a register operand of wgmma";
    }
    return nullptr;
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
