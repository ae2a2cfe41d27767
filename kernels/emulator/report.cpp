// Failures: who did what, where. A failure ends the block by abandoning its threads' stacks, which is allowed because
// kernels own nothing that would need unwinding.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "device.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

namespace {

std::string describe(const Thread* thread, Site site) {
    char text[300];
    const uint3 block = (thread != nullptr ? thread->block : running)->index;
    snprintf(text, sizeof text, "%s, block (%u, %u, %u)", running->kernel, block.x, block.y, block.z);
    std::string result = text;
    if (thread != nullptr) {
        const uint3 index = thread->index;
        snprintf(text, sizeof text, ", thread (%u, %u, %u)", index.x, index.y, index.z);
        result += text;
    }
    if (site.file != nullptr) result += std::string(", ") + file_name(site) + ":" + std::to_string(site.line);
    return result;
}

[[noreturn]] void fail_with(const Thread* thread, Site site, const char* format, va_list arguments) {
    char text[3000];
    vsnprintf(text, sizeof text, format, arguments);
    Launch::current().record(describe(thread, site) + ": " + text);
    running->cluster->failed = true;
    leave_block();
    abort();  // not reached: no one switches back to a failed block's threads
}

std::string describe_wait(const Thread& thread) {
    const Wait& wait = thread.wait;
    char text[300];
    switch (wait.what) {
        case WaitFor::warp:
            snprintf(text, sizeof text, "%s with mask %08x", collective_name(Collective(wait.id)), wait.detail);
            break;
        case WaitFor::barrier: {
            const NamedBarrier& barrier = running->barriers[wait.id];
            const uint32_t expected = barrier.expected == NamedBarrier::kEveryone ? running->live : barrier.expected;
            snprintf(text, sizeof text, "barrier %u, where %u of %u threads have arrived,", wait.id, barrier.arrived,
                     expected);
            break;
        }
        case WaitFor::mbarrier:
            snprintf(text, sizeof text, "parity %u of the mbarrier at shared 0x%x, %s,", wait.detail, wait.id,
                     mbarrier_state(wait.id).c_str());
            break;
        case WaitFor::wgmma:
            snprintf(text, sizeof text, "wgmma.wait_group, which not all of the warpgroup reached,");
            break;
        case WaitFor::turn:
            snprintf(text, sizeof text,
                     "turn %u of the counter at %p, which stands at %u, while no running block can "
                     "move it,",
                     wait.id, static_cast<const void*>(wait.counter), turn_counter(wait.counter));
            break;
        case WaitFor::cluster:
            snprintf(text, sizeof text, "the cluster's barrier, where %u of %u threads have arrived,",
                     running->cluster->arrived, running->cluster->live());
            break;
        case WaitFor::nothing:
            snprintf(text, sizeof text, "nothing");
            break;
    }
    std::string result = text;
    if (wait.site.file != nullptr)
        result += std::string(" at ") + file_name(wait.site) + ":" + std::to_string(wait.site.line);
    return result;
}

}  // namespace

const char* file_name(Site site) {
    if (site.file == nullptr) return "?";
    const char* slash = strrchr(site.file, '/');
    return slash != nullptr ? slash + 1 : site.file;
}

void fail(Site site, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(&self(), site, format, arguments);
}

void fail_for(const Thread& thread, Site site, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(&thread, site, format, arguments);
}

void fail_block(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail_with(nullptr, Site{}, format, arguments);
}

void report_deadlock() {
    const Cluster& cluster = *running->cluster;
    std::map<std::string, std::map<std::pair<uint32_t, uint32_t>, uint32_t>> waits;  // what for -> block, warp -> lanes
    uint32_t exited = 0;
    for (Block* block : cluster.blocks) {
        const Inside inside(*block);
        exited += block->thread_count - block->live;
        for (uint32_t i = 0; i < block->thread_count; ++i) {
            const Thread& thread = thread_at(i);
            if ((block->warps[thread.warp].alive >> thread.lane & 1u) == 0) continue;
            waits[describe_wait(thread)][{block->cluster_rank, thread.warp}] |= 1u << thread.lane;
        }
    }
    std::string text = "deadlock:";
    for (const auto& [what, warps] : waits) {
        text += "\n  waiting for " + what + ":";
        for (const auto& [place, lanes] : warps) {
            text += " warp " + std::to_string(place.second);
            if (cluster.blocks.size() > 1) text += " of the cluster's block " + std::to_string(place.first);
            char who[64];
            snprintf(who, sizeof who, " (lanes %08x)", lanes);
            if (lanes != kAllLanes) text += who;
        }
    }
    if (exited != 0) text += "\n  exited: " + std::to_string(exited) + " threads";
    fail_block("%s", text.c_str());
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
