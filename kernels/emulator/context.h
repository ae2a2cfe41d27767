// Switching between the stacks of emulated threads, which all run inside one host thread at a time.
#pragma once

#include "interface.h"

#if !defined(__x86_64__)
#error "the emulated device switches stacks in x86-64 assembly"
#endif

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

// A suspended flow of control: its callee-saved registers lie on its stack.
struct Context {
    void* stack_pointer = nullptr;
};

// About 40 million switches a second where swapcontext, with its two system calls, manages one million.
void switch_context(Context& from, const Context& to);

// `entry` starts on the stack that ends at `top` and must never return.
Context make_context(char* top, void (*entry)());

// Stacks for the threads of one block, each below a page that faults.
class StackSlab {
public:
    static constexpr size_t kThreads = 1024;
    static constexpr size_t kBytes = MMPO_CHECKED ? 256 * 1024 : 128 * 1024;

    StackSlab();
    ~StackSlab();
    StackSlab(const StackSlab&) = delete;
    StackSlab& operator=(const StackSlab&) = delete;
    bool valid() const { return base_ != nullptr; }
    char* bottom(size_t thread) const;
    char* top(size_t thread) const;
    // Whether the address is in a stack, or in a page below one.
    bool contains(uintptr_t address) const;

private:
    char* base_ = nullptr;
};

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
