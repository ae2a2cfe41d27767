#include "device.h"

#include "memory.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

Options options{MMPO_EMULATOR_ASYNC_LATE, MMPO_EMULATOR_SCHEDULE_ORDERED, 1, 0, 0, 0};

namespace {

constexpr size_t kFindings = 8;

// Leaked on purpose: worker threads may still use them while the process ends.
struct Shared {
    std::mutex launching;
    std::mutex guard;
    std::vector<std::unique_ptr<Block>> blocks;
    Counters counters{};
    Launch* launch = nullptr;
    uint32_t launches = 0;
};
Shared& shared() {
    static Shared* state = new Shared();
    return *state;
}

std::string& last_error() {
    static thread_local std::string text;
    return text;
}

}  // namespace

int set_last_error(Error error, std::string text) {
    last_error() = std::move(text);
    return error;
}
const char* last_error_text() { return last_error().c_str(); }

Launch::Launch(const char* kernel) : exclusive_(shared().launching), kernel_(kernel), number_(++shared().launches) {
    shared().launch = this;
}
Launch::~Launch() { shared().launch = nullptr; }
Launch& Launch::current() { return *shared().launch; }

int Launch::refuse(std::string text) {
    return set_last_error(kInvalidConfiguration, std::string(kernel_) + ": " + text);
}

void Launch::record(std::string text) {
    stopped_ = true;
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty()) error_ = std::move(text);
}

void Launch::record_once(std::pair<uint64_t, uint64_t> key, const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (found_.size() >= kFindings || !found_.insert(key).second) return;
    findings_ += (findings_.empty() ? "" : "\n") + text;
}

int Launch::finish() {
    Counters launched{};
    launched.launches = 1;
    add_counters(launched);
    std::string text = findings_;
    if (!error_.empty()) text += (text.empty() ? "" : "\n") + error_;
    if (!kChecked) {
        const std::string damage = GlobalMemory::instance().verify_guards();
        if (!damage.empty()) text += (text.empty() ? "" : "\n") + std::string(kernel_) + " " + damage;
    }
    return text.empty() ? int(kSuccess) : set_last_error(kLaunchFailure, std::move(text));
}

void Launch::enter() {
    std::lock_guard<std::mutex> lock(turns_);
    ++active_;
}

void Launch::leave() {
    std::lock_guard<std::mutex> lock(turns_);
    --active_;
    wake_others();
}

void Launch::turn_passed() {
    std::lock_guard<std::mutex> lock(turns_);
    wake_others();
}

void Launch::wake_others() {
    ++events_;
    asleep_ = 0;
    event_.notify_all();
}

bool Launch::await_others(const std::function<bool()>& ready) {
    std::unique_lock<std::mutex> lock(turns_);
    while (!ready()) {
        if (++asleep_ == active_) return false;
        event_.wait(lock, [this, seen = events_] { return events_ != seen; });
    }
    return true;
}

std::unique_ptr<Block> take_block() {
    std::lock_guard<std::mutex> lock(shared().guard);
    if (shared().blocks.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(shared().blocks.back());
    shared().blocks.pop_back();
    return block;
}

void give_block(std::unique_ptr<Block> block) {
    add_counters(block->counters);
    block->counters = {};
    std::lock_guard<std::mutex> lock(shared().guard);
    shared().blocks.push_back(std::move(block));
}

void add_counters(const Counters& more) {
    static_assert(sizeof(Counters) % sizeof(uint64_t) == 0, "counters are summed as an array");
    std::lock_guard<std::mutex> lock(shared().guard);
    const uint64_t* from = reinterpret_cast<const uint64_t*>(&more);
    uint64_t* to = reinterpret_cast<uint64_t*>(&shared().counters);
    for (size_t i = 0; i < sizeof(Counters) / sizeof(uint64_t); ++i) to[i] += from[i];
}

Counters read_counters() {
    std::lock_guard<std::mutex> lock(shared().guard);
    return shared().counters;
}

void reset_counters() {
    std::lock_guard<std::mutex> lock(shared().guard);
    shared().counters = {};
}

int multiprocessors() { return options.multiprocessors > 0 ? options.multiprocessors : 4; }

int set_memory(void* destination, int value, size_t bytes) {
    if (bytes == 0) return kSuccess;
    GlobalMemory& memory = GlobalMemory::instance();
    const std::string complaint = memory.complaint(uintptr_t(destination), bytes);
    if (!complaint.empty()) return set_last_error(kInvalidValue, "memset of " + complaint);
    memset(destination, value, bytes);
    memory.mark_written(uintptr_t(destination), bytes);
    return kSuccess;
}

int copy_memory(void* destination, const void* source, size_t bytes) {
    if (bytes == 0) return kSuccess;
    GlobalMemory& memory = GlobalMemory::instance();
    const std::string to = memory.complaint(uintptr_t(destination), bytes);
    if (!to.empty()) return set_last_error(kInvalidValue, "copy to " + to);
    const std::string from = memory.complaint(uintptr_t(source), bytes);
    if (!from.empty()) return set_last_error(kInvalidValue, "copy from " + from);
    memmove(destination, source, bytes);
    // What was never written stays so in the copy.
    if (kChecked) memmove(memory.shadow(uintptr_t(destination)), memory.shadow(uintptr_t(source)), bytes);
    return kSuccess;
}

}  // namespace emulated
}  // namespace MMPO_VARIANT
}  // namespace mmpo

using namespace mmpo::emulated;

extern "C" {

int MMPO_EXPORT(configure)(const mmpo_emulator_options* wanted) {
    if (wanted->async < MMPO_EMULATOR_ASYNC_LATE || wanted->async > MMPO_EMULATOR_ASYNC_RANDOM)
        return set_last_error(kInvalidValue, "configure: async must be 0 (late), 1 (early) or 2 (random)");
    if (wanted->schedule < MMPO_EMULATOR_SCHEDULE_ORDERED || wanted->schedule > MMPO_EMULATOR_SCHEDULE_RANDOM)
        return set_last_error(kInvalidValue, "configure: schedule must be 0 (ordered) or 1 (random)");
    if (wanted->host_threads < 0 || wanted->multiprocessors < 0)
        return set_last_error(kInvalidValue, "configure: host_threads and multiprocessors must not be negative");
    Launch none("configure");
    options = *wanted;
    return kSuccess;
}

int MMPO_EXPORT(malloc)(void** out, size_t bytes) {
    *out = reinterpret_cast<void*>(GlobalMemory::instance().allocate(bytes));
    if (*out != nullptr) return kSuccess;
    return set_last_error(kOutOfMemory,
                          "malloc of " + std::to_string(bytes) + " bytes: the emulated device's memory is used up");
}

int MMPO_EXPORT(free)(void* pointer) {
    if (pointer == nullptr || GlobalMemory::instance().release(uintptr_t(pointer))) return kSuccess;
    return set_last_error(kInvalidValue, "free of a pointer that malloc did not return, or that was freed before");
}

int MMPO_EXPORT(memset)(void* destination, int value, size_t bytes) { return set_memory(destination, value, bytes); }

int MMPO_EXPORT(upload)(void* destination, const void* host_source, size_t bytes) {
    if (bytes == 0) return kSuccess;
    const std::string complaint = GlobalMemory::instance().complaint(uintptr_t(destination), bytes);
    if (!complaint.empty()) return set_last_error(kInvalidValue, "upload to " + complaint);
    memcpy(destination, host_source, bytes);
    GlobalMemory::instance().mark_written(uintptr_t(destination), bytes);
    return kSuccess;
}

int MMPO_EXPORT(download)(void* host_destination, const void* source, size_t bytes) {
    if (bytes == 0) return kSuccess;
    const std::string complaint = GlobalMemory::instance().complaint(uintptr_t(source), bytes);
    if (!complaint.empty()) return set_last_error(kInvalidValue, "download from " + complaint);
    memcpy(host_destination, source, bytes);
    return kSuccess;
}

int MMPO_EXPORT(copy)(void* destination, const void* source, size_t bytes) {
    return copy_memory(destination, source, bytes);
}

int MMPO_EXPORT(synchronize)(void) {
    const std::string damage = GlobalMemory::instance().verify_guards();
    return damage.empty() ? int(kSuccess) : set_last_error(kIllegalAddress, "something " + damage);
}

void MMPO_EXPORT(memory_use)(size_t* now, size_t* peak) { GlobalMemory::instance().use(now, peak); }
void MMPO_EXPORT(counters)(mmpo_emulator_counters* out) { *out = read_counters(); }
void MMPO_EXPORT(reset_counters)(void) { reset_counters(); }
const char* MMPO_EXPORT(last_error)(void) { return last_error_text(); }

}  // extern "C"
