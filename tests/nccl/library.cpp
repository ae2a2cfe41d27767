// NCCL's C interface for processes of one machine without GPUs, over shared memory. Tests load it in NCCL's place.
//
// It follows NCCL's documented rules: collectives run in the order of their stream; calls inside a group start at
// ncclGroupEnd; a non-blocking communicator answers ncclInProgress, and nothing is on its stream before
// ncclCommGetAsyncError says ncclSuccess; in-place forms lie at rank offsets; after an abort nothing works. Where NCCL
// leaves the outcome undefined (ranks that disagree, buffers that overlap), this library fails, with a text in
// ncclGetLastError.
//
// A null stream is the host's: a blocking call runs there, a non-blocking one runs on the communicator's own thread.
// Any other stream is an `mmpo_emulated_stream`.
//
// Sums are those of a ring: the sum of piece p begins with rank p + 1 and ends with rank p, and bf16 is rounded at each
// addition.
//
// The environment:
// - FAKE_NCCL_COUNTS=FILE: at the end of each communicator a line of JSON is appended, with calls and bytes of each
// kind
//   of collective. Bytes are those of the whole range: of all pieces where it is cut among the ranks.
// - FAKE_NCCL_FAIL=RANK:N: the N-th collective of that rank, from 1, fails in the background.
// - FAKE_NCCL_HANG=RANK:N: the N-th collective of that rank never ends, until the rank aborts it.
// - FAKE_NCCL_SPOIL=RANK:KIND:N: the result of the N-th large collective of that kind comes to that rank as NaN.
// - FAKE_NCCL_DEAF=1: no rank notices that another one died or aborted, as over NVLink. Whoever waits for it hangs
// until
//   it aborts itself.

#include <errno.h>
#include <stdio.h>
#include <sys/random.h>

#include <map>
#include <memory>
#include <vector>

#include "exchange.h"

using namespace fake_nccl;
using ncclComm = Comm;

namespace {

// Bytes of a large collective: weights and gradients are, and what ranks tell each other beside them is not.
constexpr uint64_t kLarge = 1024;

// Does one collective, in the turn of its stream. What goes wrong is found in ncclCommGetAsyncError. The lock of the
// communicator's mutex is held when this begins and when it ends.
void execute(Comm& comm, const Operation& op, bool races, std::unique_lock<std::mutex>& lock) {
    comm.running += 1;
    Result result = comm.failure;
    lock.unlock();
    if (result == kSuccess) {
        try {
            exchange(comm, op, races);
        } catch (const Failure& failure) {
            result = say(failure.result, failure.text);
        }
    }
    lock.lock();
    if (comm.failure == kSuccess) comm.failure = result;
    comm.running -= 1;
    comm.outstanding -= 1;
    comm.changed.notify_all();
}

// Communicators by their handle, so that one that is no more is told from one that is.
struct Registry {
    std::mutex mutex;
    std::map<ncclComm*, std::shared_ptr<Comm>> comms;
    // The memory of the unique ids that this process made, until everyone has it.
    std::map<uint64_t, int> ids;
};

void write_counts(const Comm& comm) {
    const char* path = getenv("FAKE_NCCL_COUNTS");
    if (path == nullptr || *path == 0) return;
    std::string line = "{\"rank\":" + std::to_string(comm.rank) + ",\"ranks\":" + std::to_string(comm.ranks);
    for (int kind = 0; kind < kKinds; ++kind) {
        line += std::string(",\"") + kKindNames[kind] + "\":{\"calls\":" + std::to_string(comm.calls[kind]) +
                ",\"bytes\":" + std::to_string(comm.bytes[kind]) + "}";
    }
    line += "}\n";
    // One write to the end of the file: lines of several ranks do not mix.
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0 || write(file, line.data(), line.size()) != ssize_t(line.size())) perror(path);
    if (file >= 0) close(file);
}

Registry& registry() {
    // Never destroyed: threads of communicators may outlive static objects.
    static Registry* all = [] {
        atexit([] {
            for (const auto& entry : registry().comms) write_counts(*entry.second);
        });
        return new Registry();
    }();
    return *all;
}

std::shared_ptr<Comm> find(ncclComm* handle) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto found = registry().comms.find(handle);
    return found == registry().comms.end() ? nullptr : found->second;
}

Result no_communicator() { return say(kInvalidArgument, "this is no communicator, or it was destroyed or aborted"); }

std::shared_ptr<Comm> forget(ncclComm* handle) {
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto found = registry().comms.find(handle);
    if (found == registry().comms.end()) return nullptr;
    std::shared_ptr<Comm> comm = found->second;
    registry().comms.erase(found);
    return comm;
}

struct Queued {
    std::shared_ptr<Comm> comm;
    Operation operation;
};

void run_queued(void* argument, int races) {
    std::unique_ptr<Queued> queued(static_cast<Queued*>(argument));
    std::unique_lock<std::mutex> lock(queued->comm->mutex);
    execute(*queued->comm, queued->operation, races != 0, lock);
}

void work(Comm* comm) {
    std::unique_lock<std::mutex> lock(comm->mutex);
    for (;;) {
        comm->changed.wait(lock, [&] { return comm->stopping || !comm->work.empty(); });
        if (comm->work.empty()) return;
        Operation operation = comm->work.front();
        comm->work.pop_front();
        execute(*comm, operation, false, lock);
    }
}

void deliver(const std::shared_ptr<Comm>& comm, const Operation& operation, mmpo_emulated_stream* stream) {
    stream->enqueue(stream, run_queued, new Queued{comm, operation});
}

struct Call {
    std::shared_ptr<Comm> comm;
    Operation operation;
    mmpo_emulated_stream* stream;
};

// Whether a fault's variable, RANK:N, names the collective with this number of the rank.
bool is_named(const char* variable, int rank, uint64_t number) {
    const char* value = getenv(variable);
    int named_rank = -1;
    unsigned long long named = 0;
    return value != nullptr && sscanf(value, "%d:%llu", &named_rank, &named) == 2 && named_rank == rank &&
           named == number;
}

// The same for RANK:KIND:N, which counts the large collectives of a kind.
bool is_spoiled(const Comm& comm, int kind) {
    const char* value = getenv("FAKE_NCCL_SPOIL");
    int rank = -1;
    char name[32] = "";
    unsigned long long number = 0;
    return value != nullptr && sscanf(value, "%d:%31[a-z_]:%llu", &rank, name, &number) == 3 && rank == comm.rank &&
           name == std::string(kKindNames[kind]) && number == comm.large[kind];
}

// Counts a collective, and plants the faults that the environment asks for.
void count(Comm& comm, Operation& op) {
    int kind = op.agreement.kind;
    bool cut = kind == kReduceScatter || kind == kAllGather;
    uint64_t bytes = op.agreement.count * op.size * (cut ? comm.ranks : 1), made = 0;
    comm.calls[kind] += 1;
    comm.bytes[kind] += bytes;
    for (uint64_t calls : comm.calls) made += calls;
    if (is_named("FAKE_NCCL_FAIL", comm.rank, made)) {
        comm.failure = say(kSystemError, "FAKE_NCCL_FAIL asked for this failure");
    }
    op.hangs = is_named("FAKE_NCCL_HANG", comm.rank, made);
    if (bytes < kLarge) return;
    comm.large[kind] += 1;
    op.spoiled = is_spoiled(comm, kind);
}

Result start(Call call) {
    Comm& comm = *call.comm;
    std::unique_lock<std::mutex> lock(comm.mutex);
    count(comm, call.operation);
    comm.outstanding += 1;
    if (call.stream != nullptr) {
        if (!comm.blocking) {
            comm.undelivered.emplace_back(call.operation, call.stream);
            comm.polls = 0;
            return kInProgress;
        }
        lock.unlock();
        deliver(call.comm, call.operation, call.stream);
        return kSuccess;
    }
    if (comm.blocking) {
        execute(comm, call.operation, false, lock);
        return comm.failure;
    }
    comm.work.push_back(call.operation);
    if (!comm.worker.joinable()) comm.worker = std::thread(work, &comm);
    comm.changed.notify_all();
    return kInProgress;
}

thread_local int group_depth = 0;
thread_local std::vector<Call> group_calls;
thread_local Result group_result = kSuccess;

bool overlap(const uint8_t* a, size_t a_bytes, const uint8_t* b, size_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

// Whether the operation's two buffers are apart, or lie as the in-place form has them.
bool well_placed(const Comm& comm, const Operation& op) {
    size_t bytes = op.agreement.count * op.size;
    switch (op.agreement.kind) {
        case kReduceScatter:
            return op.receive == op.send + comm.rank * bytes ||
                   !overlap(op.send, comm.ranks * bytes, op.receive, bytes);
        case kAllGather:
            return op.send == op.receive + comm.rank * bytes ||
                   !overlap(op.send, bytes, op.receive, comm.ranks * bytes);
        default:
            return op.receive == op.send || !overlap(op.send, bytes, op.receive, bytes);
    }
}

size_t size_of(int type) {
    switch (type) {
        case kUint8:
            return 1;
        case kFloat32:
            return 4;
        case kBfloat16:
            return 2;
        default:
            return 0;
    }
}

Result check(const Call& call) {
    const Comm& comm = *call.comm;
    const Agreement& what = call.operation.agreement;
    if (comm.failure != kSuccess) return comm.failure;
    bool busy = !comm.joined || !comm.undelivered.empty() || (call.stream == nullptr && comm.outstanding > 0);
    if (!comm.blocking && busy) {
        return say(kInvalidArgument, "the communicator is used before its last operation returned ncclSuccess");
    }
    bool sums = what.kind == kAllReduce || what.kind == kReduceScatter || what.kind == kReduce;
    if (call.operation.size == 0 || (sums && what.type == kUint8)) {
        return say(kInvalidArgument, "no values of type " + std::to_string(what.type) + " in " + kKindNames[what.kind]);
    }
    if (what.operation != kSum) return say(kInvalidArgument, "the only reduction here is ncclSum");
    if (what.root < 0 || what.root >= comm.ranks) return say(kInvalidArgument, "no rank " + std::to_string(what.root));
    if (call.stream != nullptr && call.stream->magic != kEmulatedStreamMagic) {
        return say(kInvalidArgument, "the stream is not one of the emulated device");
    }
    bool has_buffers = call.operation.send != nullptr && call.operation.receive != nullptr;
    if (what.count > 0 && !has_buffers) return say(kInvalidArgument, "a null buffer");
    if (!well_placed(comm, call.operation)) {
        return say(kInvalidArgument, std::string(kKindNames[what.kind]) +
                                         ": send and receive buffer overlap, and not as the in-place form has them");
    }
    return kSuccess;
}

Result queue(ncclComm* handle, Kind kind, const void* send, void* receive, size_t count, int type, int operation,
             int root, void* stream) {
    std::shared_ptr<Comm> comm = find(handle);
    Result result = kInvalidArgument;
    if (comm == nullptr) {
        no_communicator();
    } else {
        Operation op = {{kind, type, operation, root, count},
                        static_cast<const uint8_t*>(send),
                        static_cast<uint8_t*>(receive),
                        size_of(type)};
        Call call = {comm, op, static_cast<mmpo_emulated_stream*>(stream)};
        {
            std::lock_guard<std::mutex> lock(comm->mutex);
            result = check(call);
        }
        if (result == kSuccess && group_depth == 0) return start(call);
        if (result == kSuccess) group_calls.push_back(call);
    }
    if (group_depth > 0 && group_result == kSuccess) group_result = result;
    return result;
}

int new_memory(uint64_t secret) {
    int file = memfd_create("fake-nccl", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, sizeof(Shared)) != 0) return -1;
    return pwrite(file, &secret, sizeof secret, 0) == ssize_t(sizeof secret) ? file : -1;
}

// Opens the memory that the id names, which lives in the process that made the id.
Result enter(Comm& comm, const char* id) {
    int process = 0, file = -1;
    unsigned long long secret = 0;
    if (sscanf(id, "fake-nccl %d %d %llx", &process, &file, &secret) != 3) return say(kInvalidArgument, "no unique id");
    std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(file);
    comm.file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (comm.file < 0) return say(kSystemError, "the process that made the unique id is gone");
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, comm.file, 0);
    if (memory == MAP_FAILED) return say(kSystemError, std::string("no shared memory: ") + strerror(errno));
    comm.shared = static_cast<Shared*>(memory);
    if (comm.shared->secret != secret)
        return say(kInvalidArgument, "the unique id is used up: all ranks had joined it");
    int agreed = 0;
    if (!comm.shared->ranks.compare_exchange_strong(agreed, comm.ranks) && agreed != comm.ranks) {
        return say(kInvalidUsage, "ranks disagree: a group of " + std::to_string(agreed) + " ranks, and one of " +
                                      std::to_string(comm.ranks));
    }
    struct flock lock = byte_lock(comm.rank);
    if (fcntl(comm.file, F_OFD_SETLK, &lock) != 0 || comm.shared->slots[comm.rank].state != kAbsent) {
        return say(kInvalidUsage, "two processes are rank " + std::to_string(comm.rank));
    }
    comm.shared->slots[comm.rank].state = kJoined;
    return kSuccess;
}

// Takes note of ranks that came, died or aborted. The caller holds the communicator's mutex.
void look_around(Comm& comm) {
    bool all = true;
    // A collective under way looks itself, and knows better: a rank that disagrees aborts when it has found out.
    bool idle = comm.running == 0 && comm.work.empty();
    for (int rank = 0; rank < comm.ranks && comm.failure == kSuccess; ++rank) {
        all = all && comm.shared->slots[rank].state != kAbsent;
        std::string why = idle ? gone(comm, rank, false) : "";
        if (!why.empty()) comm.failure = say(kRemoteError, why);
    }
    if (!all || comm.joined) return;
    comm.joined = true;
    // The memory stays as long as someone has it mapped.
    std::lock_guard<std::mutex> lock(registry().mutex);
    auto id = registry().ids.find(comm.shared->secret);
    if (id == registry().ids.end()) return;
    close(id->second);
    registry().ids.erase(id);
}

void stop_worker(Comm& comm) {
    {
        std::lock_guard<std::mutex> lock(comm.mutex);
        comm.stopping = true;
        comm.changed.notify_all();
    }
    if (comm.worker.joinable()) comm.worker.join();
}

}  // namespace

extern "C" {

struct ncclUniqueId {
    char internal[128];
};

struct ncclConfig {
    size_t size;
    unsigned magic, version;
    int blocking;
};

int ncclGetVersion(int* version) {
    *version = kVersion;
    return kSuccess;
}

const char* ncclGetErrorString(int result) {
    switch (result) {
        case kSuccess:
            return "no error";
        case kSystemError:
            return "unhandled system error";
        case kInvalidArgument:
            return "invalid argument";
        case kInvalidUsage:
            return "invalid usage";
        case kRemoteError:
            return "remote process exited or there was a network error";
        case kInProgress:
            return "NCCL operation in progress";
        default:
            return "unknown result code";
    }
}

const char* ncclGetLastError(ncclComm*) {
    static thread_local std::string text;
    std::lock_guard<std::mutex> lock(last_error_mutex);
    text = last_error_text;
    return text.c_str();
}

int ncclGetUniqueId(ncclUniqueId* id) {
    uint64_t secret = 0;
    if (getrandom(&secret, sizeof secret, 0) != ssize_t(sizeof secret)) return say(kSystemError, "no random number");
    int file = new_memory(secret);
    if (file < 0) return say(kSystemError, std::string("no shared memory: ") + strerror(errno));
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "fake-nccl %d %d %llx", int(getpid()), file,
             static_cast<unsigned long long>(secret));
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().ids[secret] = file;
    return kSuccess;
}

int ncclCommInitRankConfig(ncclComm** out, int ranks, ncclUniqueId id, int rank, ncclConfig* config) {
    *out = nullptr;
    if (ranks < 1 || ranks > kMaxRanks || rank < 0 || rank >= ranks) {
        return say(kInvalidArgument, "rank " + std::to_string(rank) + " of " + std::to_string(ranks));
    }
    if (config != nullptr && config->magic != kConfigMagic) return say(kInvalidArgument, "no ncclConfig_t");
    auto comm = std::make_shared<Comm>();
    comm->rank = rank;
    comm->ranks = ranks;
    comm->blocking = config == nullptr || config->blocking != 0;
    id.internal[sizeof id.internal - 1] = 0;
    Result result = enter(*comm, id.internal);
    if (result != kSuccess) return result;
    {
        std::lock_guard<std::mutex> lock(registry().mutex);
        registry().comms[comm.get()] = comm;
    }
    *out = comm.get();
    if (!comm->blocking) return kInProgress;
    std::lock_guard<std::mutex> lock(comm->mutex);
    while (!comm->joined && comm->failure == kSuccess) {
        look_around(*comm);
        usleep(500);
    }
    return comm->failure;
}

int ncclCommInitRank(ncclComm** out, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(out, ranks, id, rank, nullptr);
}

int ncclCommGetAsyncError(ncclComm* handle, int* state) {
    std::shared_ptr<Comm> comm = find(handle);
    if (comm == nullptr) return no_communicator();
    std::vector<std::pair<Operation, mmpo_emulated_stream*>> ready;
    {
        std::lock_guard<std::mutex> lock(comm->mutex);
        look_around(*comm);
        // The first answer after a call is "in progress": whoever goes on without asking again is found out.
        if (++comm->polls > 1) ready.swap(comm->undelivered);
    }
    for (const auto& [operation, stream] : ready) deliver(comm, operation, stream);
    std::lock_guard<std::mutex> lock(comm->mutex);
    bool host_work = !comm->work.empty() || (comm->worker.joinable() && comm->outstanding > 0);
    bool busy = !comm->joined || !comm->undelivered.empty() || (comm->finalized && comm->outstanding > 0);
    *state = comm->failure != kSuccess ? comm->failure : busy || host_work ? kInProgress : kSuccess;
    return kSuccess;
}

int ncclCommFinalize(ncclComm* handle) {
    std::shared_ptr<Comm> comm = find(handle);
    if (comm == nullptr) return no_communicator();
    std::unique_lock<std::mutex> lock(comm->mutex);
    if (comm->failure != kSuccess) return comm->failure;
    comm->finalized = true;
    if (comm->outstanding == 0) return kSuccess;
    if (!comm->blocking) return kInProgress;
    comm->changed.wait(lock, [&] { return comm->outstanding == 0; });
    return comm->failure;
}

int ncclCommDestroy(ncclComm* handle) {
    std::shared_ptr<Comm> comm = forget(handle);
    if (comm == nullptr) return no_communicator();
    stop_worker(*comm);
    write_counts(*comm);
    return kSuccess;
}

int ncclCommAbort(ncclComm* handle) {
    std::shared_ptr<Comm> comm = forget(handle);
    if (comm == nullptr) return no_communicator();
    comm->aborted = true;
    {
        std::unique_lock<std::mutex> lock(comm->mutex);
        if (comm->failure == kSuccess) comm->failure = kInvalidUsage;
        comm->changed.wait(lock, [&] { return comm->running == 0; });
    }
    stop_worker(*comm);
    comm->shared->slots[comm->rank].state = kAborted;
    write_counts(*comm);
    return kSuccess;
}

int ncclGroupStart() {
    group_depth += 1;
    return kSuccess;
}

int ncclGroupEnd() {
    if (group_depth == 0) return say(kInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth > 0) return kSuccess;
    std::vector<Call> calls;
    calls.swap(group_calls);
    Result result = group_result;
    group_result = kSuccess;
    for (size_t i = 0; i < calls.size() && (result == kSuccess || result == kInProgress); ++i) result = start(calls[i]);
    return result;
}

int ncclAllReduce(const void* send, void* receive, size_t count, int type, int operation, ncclComm* comm,
                  void* stream) {
    return queue(comm, kAllReduce, send, receive, count, type, operation, 0, stream);
}

int ncclReduceScatter(const void* send, void* receive, size_t count, int type, int operation, ncclComm* comm,
                      void* stream) {
    return queue(comm, kReduceScatter, send, receive, count, type, operation, 0, stream);
}

int ncclAllGather(const void* send, void* receive, size_t count, int type, ncclComm* comm, void* stream) {
    return queue(comm, kAllGather, send, receive, count, type, kSum, 0, stream);
}

int ncclReduce(const void* send, void* receive, size_t count, int type, int operation, int root, ncclComm* comm,
               void* stream) {
    return queue(comm, kReduce, send, receive, count, type, operation, root, stream);
}

int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, ncclComm* comm, void* stream) {
    return queue(comm, kBroadcast, send, receive, count, type, kSum, root, stream);
}

}  // extern "C"
