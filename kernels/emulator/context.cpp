#include "context.h"

#include <sys/mman.h>

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {
__attribute__((naked, noinline)) void swap_stacks(void** /*save*/, void* /*load*/) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n"
        "mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
        "ret\n");
}
}  // namespace

void switch_context(Context& from, const Context& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

Context make_context(char* top, void (*entry)()) {
    void** stack = reinterpret_cast<void**>(uintptr_t(top) & ~uintptr_t(63));
    *--stack = nullptr;  // where `entry` would return to; also the alignment the ABI wants at a function's start
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    return Context{stack};
}

namespace {
constexpr size_t kPage = 4096;
// An odd number of pages: stacks whose tops agree in their low bits would fight for the same cache sets.
constexpr size_t kStride = StackSlab::kBytes + kPage;
// What a frame too large for the first stack may reach past it.
constexpr size_t kLead = size_t(8) << 20;
constexpr size_t kSlab = kLead + StackSlab::kThreads * kStride;
}  // namespace

StackSlab::StackSlab() {
    void* memory = mmap(nullptr, kSlab, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    base_ = static_cast<char*>(memory);
    mprotect(base_, kLead, PROT_NONE);
    for (size_t i = 0; i < kThreads; ++i) mprotect(base_ + kLead + i * kStride, kPage, PROT_NONE);
}

StackSlab::~StackSlab() {
    if (base_ != nullptr) munmap(base_, kSlab);
}

char* StackSlab::bottom(size_t thread) const { return base_ + kLead + thread * kStride + kPage; }

char* StackSlab::top(size_t thread) const { return bottom(thread) + kBytes - thread % 21 * 192; }

bool StackSlab::contains(uintptr_t address) const { return address - uintptr_t(base_) < kSlab; }

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
