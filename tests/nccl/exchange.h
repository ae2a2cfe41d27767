// The memory that the ranks of a communicator share, and how they exchange values through it. `library.cpp` is the
// interface.

#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "emulated_stream.h"

namespace fake_nccl {

// The numbers of nccl.h.
enum Result : int {
    kSuccess = 0,
    kSystemError = 2,
    kInvalidArgument = 4,
    kInvalidUsage = 5,
    kRemoteError = 6,
    kInProgress = 7,
};
constexpr int kUint8 = 1, kFloat32 = 7, kBfloat16 = 9, kSum = 0;
constexpr int kVersion = 22703;
constexpr unsigned kConfigMagic = 0xcafebeef;

enum Kind : int { kAllReduce, kReduceScatter, kAllGather, kReduce, kBroadcast, kKinds };
constexpr const char* kKindNames[kKinds] = {"all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast"};

constexpr int kMaxRanks = 64;
// Bytes that a rank shows the others at once; small enough that tests run through several of them.
constexpr size_t kChunk = 256 << 10;
// A waiting rank looks this often whether it still makes sense to wait.
constexpr long kLookNanoseconds = 10'000'000;

// What the ranks of a collective must agree on.
struct Agreement {
    int kind, type, operation, root;
    uint64_t count;

    bool operator==(const Agreement& other) const {
        return kind == other.kind && type == other.type && operation == other.operation && root == other.root &&
               count == other.count;
    }
    std::string text() const {
        return std::string(kKindNames[kind]) + " of " + std::to_string(count) + " values of type " +
               std::to_string(type) + ", root " + std::to_string(root);
    }
};

enum State : int { kAbsent, kJoined, kLeft, kAborted };

struct Slot {
    // Barriers that the rank has come to; others wait on it as a futex.
    std::atomic<uint32_t> phase;
    std::atomic<int> state;
    Agreement agreement;
};

// The memory that all ranks of a communicator share; it begins as zeros.
struct Shared {
    std::atomic<uint64_t> secret;
    std::atomic<int> ranks;
    Slot slots[kMaxRanks];
    alignas(4096) uint8_t areas[kMaxRanks][kChunk];
};

struct Operation {
    Agreement agreement;
    const uint8_t* send;
    uint8_t* receive;
    size_t size;
};

struct Failure {
    Result result;
    std::string text;
};

// NCCL keeps one text for the process.
inline std::mutex last_error_mutex;
inline std::string last_error_text;

inline Result say(Result result, const std::string& text) {
    std::lock_guard<std::mutex> lock(last_error_mutex);
    last_error_text = text;
    return result;
}

inline bool is_set(const char* name) {
    const char* value = getenv(name);
    return value != nullptr && *value != 0 && strcmp(value, "0") != 0;
}

struct Comm {
    int rank = 0, ranks = 0;
    bool blocking = true;
    // This communicator's own descriptor. Its lock on byte `rank` ends with the process, however that ends.
    int file = -1;
    Shared* shared = nullptr;
    std::atomic<bool> aborted{false};

    std::mutex mutex;
    std::condition_variable changed;
    Result failure = kSuccess;
    bool joined = false;
    // Collectives of the emulated stream that are not on it yet, and how often the state was asked for since.
    std::vector<std::pair<Operation, mmpo_emulated_stream*>> undelivered;
    int polls = 0;
    // Collectives that are queued or running.
    int outstanding = 0, running = 0;
    bool finalized = false;
    std::deque<Operation> work;
    std::thread worker;
    bool stopping = false;
    uint64_t calls[kKinds] = {}, bytes[kKinds] = {};

    ~Comm() {
        if (shared != nullptr) {
            int expected = kJoined;
            shared->slots[rank].state.compare_exchange_strong(expected, kLeft);
            munmap(shared, sizeof(Shared));
        }
        if (file >= 0) close(file);
    }
};

inline void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
    timespec timeout = {0, kLookNanoseconds};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &timeout, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, kMaxRanks, nullptr, nullptr, 0);
}

inline struct flock byte_lock(int rank) {
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    return lock;
}

// Why there is no point in waiting for the rank; empty where there is.
inline std::string gone(const Comm& comm, int rank, bool left_too) {
    static const bool deaf = is_set("FAKE_NCCL_DEAF");
    if (deaf) return "";
    std::string name = "rank " + std::to_string(rank);
    switch (comm.shared->slots[rank].state.load()) {
        case kLeft:
            return left_too ? name + " left the communicator" : "";
        case kAborted:
            return name + " aborted the communicator";
        case kAbsent:
            return "";
    }
    struct flock lock = byte_lock(rank);
    // A lock of the own open file is no obstacle, so the own rank would look dead.
    if (rank == comm.rank || fcntl(comm.file, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK) return "";
    // It may have left between the two looks.
    return comm.shared->slots[rank].state.load() == kJoined ? name + " died" : "";
}

// Waits until all ranks have come here.
inline void barrier(Comm& comm) {
    Slot* slots = comm.shared->slots;
    uint32_t phase = slots[comm.rank].phase.fetch_add(1) + 1;
    futex_wake(slots[comm.rank].phase);
    for (int rank = 0; rank < comm.ranks; ++rank) {
        auto reached = [&](uint32_t seen) { return int32_t(seen - phase) >= 0; };
        for (uint32_t seen = slots[rank].phase; !reached(seen); seen = slots[rank].phase) {
            if (comm.aborted) throw Failure{kInvalidUsage, "the communicator was aborted"};
            for (int other = 0; other < comm.ranks; ++other) {
                std::string why = gone(comm, other, other == rank);
                if (!why.empty() && !reached(slots[other].phase)) throw Failure{kRemoteError, why};
            }
            futex_wait(slots[rank].phase, seen);
        }
    }
}

inline float widen(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline uint16_t round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// out[0..n] = the sum over the ranks of what their areas hold from byte `offset` on, beginning with rank `first`.
inline void add_up(const Comm& comm, int type, void* out, size_t offset, size_t n, int first) {
    for (int turn = 0; turn < comm.ranks; ++turn) {
        const uint8_t* area = comm.shared->areas[(first + turn) % comm.ranks] + offset;
        if (turn == 0) {
            memcpy(out, area, n * (type == kFloat32 ? 4 : 2));
        } else if (type == kFloat32) {
            auto sums = static_cast<float*>(out);
            auto values = reinterpret_cast<const float*>(area);
            for (size_t i = 0; i < n; ++i) sums[i] += values[i];
        } else {
            auto sums = static_cast<uint16_t*>(out);
            auto values = reinterpret_cast<const uint16_t*>(area);
            for (size_t i = 0; i < n; ++i) sums[i] = round_to_bf16(widen(sums[i]) + widen(values[i]));
        }
    }
}

// Values [base, base + n) of the operation, from this rank to its area.
inline void show(const Comm& comm, const Operation& op, size_t base, size_t n, bool races) {
    uint8_t* area = comm.shared->areas[comm.rank];
    const Agreement& what = op.agreement;
    if (what.kind == kBroadcast && what.root != comm.rank) return;
    int pieces = what.kind == kReduceScatter ? comm.ranks : 1;
    for (int piece = 0; piece < pieces; ++piece) {
        memcpy(area + piece * n * op.size, op.send + (piece * what.count + base) * op.size, n * op.size);
    }
    if (races) memset(area, 0xff, pieces * n * op.size);
}

// The result of the same values, from all areas to this rank.
inline void take(const Comm& comm, const Operation& op, size_t base, size_t n, bool races) {
    const Agreement& what = op.agreement;
    const size_t ranks = comm.ranks;
    uint8_t* out = op.receive + base * op.size;
    switch (what.kind) {
        case kAllReduce:
            for (size_t piece = 0; piece < ranks; ++piece) {
                size_t begin = std::max(base, what.count * piece / ranks);
                size_t end = std::min(base + n, what.count * (piece + 1) / ranks);
                if (begin >= end) continue;
                size_t offset = (begin - base) * op.size;
                add_up(comm, what.type, out + offset, offset, end - begin, int((piece + 1) % ranks));
            }
            break;
        case kReduceScatter:
            add_up(comm, what.type, out, comm.rank * n * op.size, n, (comm.rank + 1) % comm.ranks);
            break;
        case kReduce:
            if (what.root != comm.rank) return;
            add_up(comm, what.type, out, 0, n, (what.root + 1) % comm.ranks);
            break;
        case kBroadcast:
            memcpy(out, comm.shared->areas[what.root], n * op.size);
            break;
        case kAllGather:
            for (size_t rank = 0; rank < ranks; ++rank) {
                uint8_t* place = out + rank * what.count * op.size;
                memcpy(place, comm.shared->areas[rank], n * op.size);
                if (races) memset(place, 0xff, n * op.size);
            }
            break;
    }
    if (races) memset(out, 0xff, n * op.size);
}

inline void exchange(Comm& comm, const Operation& op, bool races) {
    comm.shared->slots[comm.rank].agreement = op.agreement;
    barrier(comm);
    for (int rank = 0; rank < comm.ranks; ++rank) {
        const Agreement& other = comm.shared->slots[rank].agreement;
        if (other == op.agreement) continue;
        throw Failure{kInvalidUsage, "ranks disagree: rank " + std::to_string(comm.rank) + " calls " +
                                         op.agreement.text() + "; rank " + std::to_string(rank) + " calls " +
                                         other.text()};
    }
    barrier(comm);
    size_t step = kChunk / op.size / (op.agreement.kind == kReduceScatter ? comm.ranks : 1);
    for (size_t base = 0; base < op.agreement.count; base += step) {
        size_t n = std::min<size_t>(step, op.agreement.count - base);
        show(comm, op, base, n, races);
        barrier(comm);
        take(comm, op, base, n, races);
        barrier(comm);
    }
}

}  // namespace fake_nccl
