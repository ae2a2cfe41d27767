// Host threads that wait for launches.
#pragma once

#include <cstdint>
#include <functional>

#include "interface.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

// Runs `work` on the calling thread and on as many others as the options and `pieces` allow; returns when all are done.
void run_on_workers(const std::function<void()>& work, uint64_t pieces);

// Lets a fault of the host's memory management inside an emulated thread end the launch instead of the process.
void guard_host_thread();

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
