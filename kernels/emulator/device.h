// State of the emulated device that outlives a launch, and the launch under way.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "block.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

// Numbers as the CUDA runtime has them.
enum Error {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kInvalidConfiguration = 9,
    kIllegalAddress = 700,
    kLaunchFailure = 719,
};

// Keeps `text` for the calling host thread's last_error, and returns `error`.
int set_last_error(Error error, std::string text);
const char* last_error_text();

// One launch at a time; a second host thread waits in the constructor.
class Launch {
public:
    explicit Launch(const char* kernel);
    ~Launch();
    static Launch& current();

    int refuse(std::string text);
    // The first text stops the launch; later ones, from blocks already running, are dropped.
    void record(std::string text);
    // Records a finding that does not stop the launch: one text for each key, and a limited number in all.
    void record_once(std::pair<uint64_t, uint64_t> key, const std::string& text);
    uint32_t number() const { return number_; }
    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
    // Adds up the counters, verifies guard bytes; 0 or an error code.
    int finish();

    // A host thread says that it runs blocks of this launch, and that it takes no more.
    void enter();
    void leave();
    // Sleeps until `ready()`, which is called again after every turn that some block passes. False if all running
    // blocks wait, so that none can pass a turn.
    bool await_others(const std::function<bool()>& ready);
    void turn_passed();

private:
    std::unique_lock<std::mutex> exclusive_;
    const char* kernel_;
    uint32_t number_;
    std::atomic<bool> stopped_{false};
    std::mutex mutex_;
    std::string error_, findings_;
    std::set<std::pair<uint64_t, uint64_t>> found_;

    // Turns of blocks. `asleep_` of the `active_` host threads have looked at their counters since the last event.
    void wake_others();
    std::mutex turns_;
    std::condition_variable event_;
    uint64_t events_ = 0;
    int active_ = 0, asleep_ = 0;
};

// Blocks are kept between launches for their stacks and storage.
std::unique_ptr<Block> take_block();
void give_block(std::unique_ptr<Block>);

void add_counters(const Counters&);
Counters read_counters();
void reset_counters();

// Checked variant: counts the traced accesses that some lanes of their warp never made.
void finish_traces(Block&);

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo
