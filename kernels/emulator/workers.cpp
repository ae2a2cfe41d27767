#include "workers.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

class Workers {
public:
    void run(const std::function<void()>& work, size_t helpers) {
        if (helpers == 0) return work();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (count_ < helpers) {
                std::thread([this] { serve(); }).detach();
                ++count_;
            }
            work_ = &work;
            wanted_ = busy_ = helpers;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        work_ = nullptr;
    }

private:
    void serve() {
        guard_host_thread();
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ != 0; });
            --wanted_;
            const std::function<void()>& work = *work_;
            lock.unlock();
            work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void()>* work_ = nullptr;
    size_t count_ = 0, wanted_ = 0, busy_ = 0;
};

struct sigaction previous_segv, previous_bus;

// Runs on the alternate stack. In an emulated thread, abandons the block; elsewhere, does what was installed before.
void on_fault(int signal, siginfo_t* info, void* context) {
    if (current_thread != nullptr) {
        if (running->stacks.contains(uintptr_t(info->si_addr)))
            fail(Site{}, "the thread's stack overflows: too many local variables");
        // The processor tells no address for a misaligned vector instruction.
        if (info->si_addr == nullptr) fail(Site{}, "accesses a misaligned vector, or a null pointer");
        fail(Site{}, "accesses %p, which is not memory at all", info->si_addr);
    }
    const struct sigaction& previous = signal == SIGBUS ? previous_bus : previous_segv;
    if ((previous.sa_flags & SA_SIGINFO) != 0) return previous.sa_sigaction(signal, info, context);
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
    // Returning repeats the access, now with the default effect.
    sigaction(signal, &previous, nullptr);
}

void install_fault_handler() {
    struct sigaction action = {};
    action.sa_sigaction = &on_fault;
    // The handler may be left by a context switch, so the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
}

}  // namespace

void guard_host_thread() {
    static std::once_flag installed;
    std::call_once(installed, install_fault_handler);
    static thread_local bool prepared = false;
    if (prepared) return;
    prepared = true;
    stack_t stack = {};
    sigaltstack(nullptr, &stack);
    if ((stack.ss_flags & SS_DISABLE) == 0) return;
    constexpr size_t kBytes = 64 * 1024;
    // Lives as long as the host thread may fault, which is as long as the process.
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    stack.ss_sp = memory;
    stack.ss_size = kBytes;
    stack.ss_flags = 0;
    sigaltstack(&stack, nullptr);
}

void run_on_workers(const std::function<void()>& work, uint64_t pieces) {
    guard_host_thread();
    // Never destroyed: its threads wait until the process ends.
    static Workers* workers = new Workers();
    const uint64_t cores =
        options.host_threads > 0 ? uint64_t(options.host_threads) : std::max(1u, std::thread::hardware_concurrency());
    workers->run(work, size_t(std::min(cores, pieces)) - 1);
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
