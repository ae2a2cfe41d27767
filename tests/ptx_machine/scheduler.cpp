// Runs a grid: clusters one after another, their warps in turns, the lanes of a warp together where they stand
// together.
//
// Lanes that part are executed from the lowest instruction on, so that they meet again where the compiler's layout
// joins them; whoever waits in a loop gives others their turn.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace ptx {

void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Fault{text, -1};
}

void fail_lane(int lane, const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Fault{text, lane};
}

// SplitMix64 (Steele, Lea, Flood 2014).
uint32_t Launch::random() {
    uint64_t z = random_state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return uint32_t((z ^ (z >> 31)) >> 32);
}

bool Launch::lands_late() {
    return options.landing == Landing::late || (options.landing == Landing::random && random() % 2 == 0);
}

namespace {

// Instructions of one turn, where no seed decides.
constexpr uint32_t kTurn = 1 << 20;
// Rounds over all warps in which nothing that another could wait for happens, before another cluster starts, and before
// it is a deadlock.
constexpr uint64_t kIdleBeforeMore = 20;
constexpr uint64_t kIdleBeforeDeadlock = 2000;
// Clusters that a GPU certainly runs at the same time: it has more multiprocessors.
constexpr size_t kMostResident = 8;
// A warp that executes so many instructions runs without end.
constexpr uint64_t kMostSteps = uint64_t(1) << 32;

class Turn {
public:
    Turn(Launch& launch, Warp& warp) : launch_(launch), warp_(warp), code_(launch.entry->code.data()) {}

    // One turn of the warp.
    void run() {
        launch_.running = &warp_;
        for (Split& split : warp_.others) split.yielded = false;
        select();
        uint32_t left = launch_.options.seed != 0 ? 1 + launch_.random() % 300 : kTurn;
        while (left-- > 0 && step()) {
        }
    }

private:
    // False where the turn ends.
    bool step() {
        const Instruction& i = code_[warp_.pc];
        Mask lanes = warp_.active;
        if (i.guard >= 0) {
            const Mask guard = warp_.predicates[uint32_t(i.guard)];
            lanes &= i.guard_negated ? ~guard : guard;
            if (lanes == 0) return advance();
        }
        warp_.lanes = lanes;
        ++warp_.steps;
        if (warp_.products_pending != 0 && !i.named.empty()) check_registers(i);
        switch (i.execute(warp_, i)) {
            case Step::next:
                return advance();
            case Step::jumped:
                return warp_.others.empty() || select();
            case Step::gathering:
                return gather(lanes);
            case Step::blocked:
                return false;
            case Step::again:
                return false;
            case Step::yielded:
                return yield();
            case Step::exited:
                return exit(lanes);
        }
        return false;
    }

    bool advance() {
        ++warp_.pc;
        return warp_.pc != warp_.stop || select();
    }

    // What a wgmma under way reads and writes is nobody else's until its wait; other products may add to it.
    void check_registers(const Instruction& i) {
        if (i.text.find("wgmma") != std::string::npos) return;
        for (const uint32_t number : i.named) {
            if (warp_.in_flight[number] != 0) fail("uses a register of a wgmma under way: wgmma.wait_group is missing");
        }
    }

    // The lanes wait here for others; those that the guard excludes go on.
    bool gather(Mask lanes) {
        if (lanes != warp_.active) warp_.others.push_back({warp_.active & ~lanes, warp_.pc + 1});
        warp_.others.push_back({lanes, warp_.pc, true});
        warp_.active = 0;
        return select();
    }

    bool yield() {
        ++warp_.pc;
        if (warp_.others.empty()) return false;
        warp_.others.push_back({warp_.active, warp_.pc, false, true});
        warp_.active = 0;
        return select();
    }

    bool exit(Mask lanes) {
        finish_copies(warp_, lanes);
        warp_.live &= ~lanes;
        warp_.active &= ~lanes;
        warp_.block->cluster->progress++;
        if (warp_.live == 0) {
            finish_products(warp_);
            warp_.state = Warp::State::exited;
            warp_exits_barriers(warp_);
            complete_cluster_barrier(*warp_.block->cluster);
            return false;
        }
        // Whoever waits for all lanes that are left may have them now.
        for (Split& split : warp_.others) split.gathering = false;
        if (warp_.active != 0) return advance();
        return select();
    }

    // Makes the runnable split with the lowest instruction the running one, joined with all that stand there. False
    // where every split has yielded: they go on in the next turn.
    bool select() {
        std::vector<Split>& others = warp_.others;
        if (others.empty()) {
            warp_.stop = UINT32_MAX;
            return warp_.active != 0;
        }
        if (warp_.active != 0) others.push_back({warp_.active, warp_.pc});
        join();
        auto chosen = others.end();
        for (auto split = others.begin(); split != others.end(); ++split) {
            if (split->gathering || split->yielded) continue;
            if (chosen == others.end() || split->pc < chosen->pc) chosen = split;
        }
        const bool found = chosen != others.end();
        if (!found) {
            chosen = std::find_if(others.begin(), others.end(), [](const Split& split) { return !split.gathering; });
            if (chosen == others.end()) stuck();
        }
        warp_.active = chosen->lanes;
        warp_.pc = chosen->pc;
        others.erase(chosen);
        warp_.stop = UINT32_MAX;
        for (const Split& split : others) {
            if (split.pc > warp_.pc) warp_.stop = std::min(warp_.stop, split.pc);
        }
        return found;
    }

    void join() {
        std::vector<Split>& others = warp_.others;
        std::sort(others.begin(), others.end(), [](const Split& a, const Split& b) { return a.pc < b.pc; });
        size_t kept = 0;
        for (size_t k = 1; k < others.size(); ++k) {
            if (others[k].pc != others[kept].pc) {
                others[++kept] = others[k];
                continue;
            }
            others[kept].lanes |= others[k].lanes;
            others[kept].gathering = false;
            others[kept].yielded &= others[k].yielded;
        }
        others.resize(kept + 1);
    }

    [[noreturn]] void stuck() {
        std::string where;
        for (const Split& split : warp_.others) {
            char text[200];
            snprintf(text, sizeof text, "\n    lanes %#x at line %u: %.100s", split.lanes, code_[split.pc].line,
                     code_[split.pc].text.c_str());
            where += text;
        }
        throw Fault{"deadlock: the lanes of a warp wait for one another at different instructions" + where, -1};
    }

    Launch& launch_;
    Warp& warp_;
    const Instruction* code_;
};

// The register files of the blocks that run, kept from one to the next.
class RegisterFiles {
public:
    uint8_t* take(size_t bytes) {
        if (!unused_.empty()) {
            uint8_t* const file = unused_.back();
            unused_.pop_back();
            return file;
        }
        files_.emplace_back(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
        memset(files_.back().get(), 0xa5, bytes);
        return files_.back().get();
    }
    void give_back(uint8_t* file) { unused_.push_back(file); }

private:
    std::vector<std::unique_ptr<uint8_t, decltype(&std::free)>> files_;
    std::vector<uint8_t*> unused_;
};

template <class T>
void fill(Warp& warp, uint32_t slot, uint64_t value) {
    std::fill_n(warp.values<T>(slot), kLanes, T(value));
}

class Grid {
public:
    explicit Grid(Launch& launch) : launch_(launch) {
        threads_ = launch.block.x * launch.block.y * launch.block.z;
        clusters_ = launch.grid.x * launch.grid.y * launch.grid.z / launch.cluster_size;
        launch.random_state = launch.options.seed * 7919 + 17;
    }

    void run() {
        uint64_t idle = 0;
        while (!resident_.empty() || next_ < clusters_) {
            if (next_ < clusters_ &&
                (resident_.empty() || (idle > kIdleBeforeMore && resident_.size() < kMostResident))) {
                start(next_++);
                idle = 0;
            }
            bool progress = false;
            for (size_t k = 0; k < resident_.size();) {
                progress |= round(*resident_[k]);
                if (resident_[k]->live_threads() == 0) {
                    finish(*resident_[k]);
                    resident_.erase(resident_.begin() + std::ptrdiff_t(k));
                    progress = true;
                } else {
                    ++k;
                }
            }
            idle = progress ? 0 : idle + 1;
            if (idle > kIdleBeforeDeadlock) deadlock();
        }
    }

private:
    // Every warp of the cluster gets a turn; whether anything happened that another could wait for.
    bool round(Cluster& cluster) {
        const uint64_t before = cluster.progress;
        std::vector<Warp*> order;
        for (const auto& block : cluster.blocks) {
            for (Warp& warp : block->warps) order.push_back(&warp);
        }
        if (launch_.options.seed != 0) {
            for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[launch_.random() % k]);
        }
        for (Warp* warp : order) {
            if (warp->state != Warp::State::running) continue;
            const uint64_t steps = warp->steps;
            Turn(launch_, *warp).run();
            // Whoever only waits executes few instructions.
            if (warp->steps - steps > 1000 || (launch_.options.seed != 0 && warp->steps - steps > 20))
                ++cluster.progress;
            if (warp->steps > kMostSteps) fail("runs without end");
        }
        if (launch_.options.landing == Landing::random && !cluster.pending.empty() && launch_.random() % 4 == 0)
            land_any(cluster);
        return cluster.progress != before;
    }

    void land_any(Cluster& cluster) {
        const size_t chosen = launch_.random() % cluster.pending.size();
        const std::function<void()> land = std::move(cluster.pending[chosen].land);
        cluster.pending.erase(cluster.pending.begin() + std::ptrdiff_t(chosen));
        land();
    }

    void start(uint32_t index) {
        const Entry& entry = *launch_.entry;
        auto cluster = std::make_unique<Cluster>();
        cluster->launch = &launch_;
        const uint32_t warps = (threads_ + kLanes - 1) / kLanes;
        const uint32_t end = kSharedStart + entry.static_shared + launch_.dynamic_shared;
        cluster->orders.start(launch_.cluster_size, warps, end);
        for (uint32_t rank = 0; rank < launch_.cluster_size; ++rank) {
            auto block = std::make_unique<Block>();
            const uint32_t number = index * launch_.cluster_size + rank;
            block->cluster = cluster.get();
            block->rank = rank;
            block->x = number % launch_.grid.x;
            block->y = number / launch_.grid.x % launch_.grid.y;
            block->z = number / launch_.grid.x / launch_.grid.y;
            block->threads = threads_;
            block->shared.resize(end);
            block->registers = files_.take(size_t(warps) * entry.register_bytes);
            block->warps.resize(warps);
            for (uint32_t w = 0; w < warps; ++w) start(*block, w);
            cluster->blocks.push_back(std::move(block));
        }
        resident_.push_back(std::move(cluster));
    }

    void start(Block& block, uint32_t index) {
        const Entry& entry = *launch_.entry;
        Warp& warp = block.warps[index];
        warp.block = &block;
        warp.index = index;
        warp.actor = block.cluster->orders.warp_actor(block.rank, index);
        warp.registers = block.registers + size_t(index) * entry.register_bytes;
        warp.predicates.assign(entry.predicates, 0);
        const uint32_t lanes = std::min<uint32_t>(kLanes, threads_ - index * kLanes);
        warp.exists = warp.live = warp.active = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
        for (const Preset& preset : entry.presets) set(warp, preset);
    }

    void set(Warp& warp, const Preset& preset) {
        using Kind = Preset::Kind;
        const Block& block = *warp.block;
        if (preset.kind == Kind::tid_x || preset.kind == Kind::tid_y || preset.kind == Kind::tid_z ||
            preset.kind == Kind::lane) {
            uint32_t* const values = warp.values<uint32_t>(preset.slot);
            for (uint32_t lane = 0; lane < kLanes; ++lane) {
                const uint32_t thread = warp.index * kLanes + lane;
                values[lane] = preset.kind == Kind::lane    ? lane
                               : preset.kind == Kind::tid_x ? thread % launch_.block.x
                               : preset.kind == Kind::tid_y ? thread / launch_.block.x % launch_.block.y
                                                            : thread / launch_.block.x / launch_.block.y;
            }
            return;
        }
        uint64_t value = preset.value;
        switch (preset.kind) {
            case Kind::ctaid_x:
                value = block.x;
                break;
            case Kind::ctaid_y:
                value = block.y;
                break;
            case Kind::ctaid_z:
                value = block.z;
                break;
            case Kind::ntid_x:
                value = launch_.block.x;
                break;
            case Kind::ntid_y:
                value = launch_.block.y;
                break;
            case Kind::ntid_z:
                value = launch_.block.z;
                break;
            case Kind::nctaid_x:
                value = launch_.grid.x;
                break;
            case Kind::nctaid_y:
                value = launch_.grid.y;
                break;
            case Kind::nctaid_z:
                value = launch_.grid.z;
                break;
            case Kind::cluster_rank:
                value = block.rank;
                break;
            case Kind::parameter:
                value += reinterpret_cast<uint64_t>(launch_.parameters);
                break;
            default:
                break;
        }
        switch (preset.bytes) {
            case 1:
                fill<uint8_t>(warp, preset.slot, value);
                break;
            case 2:
                fill<uint16_t>(warp, preset.slot, value);
                break;
            case 4:
                fill<uint32_t>(warp, preset.slot, value);
                break;
            default:
                fill<uint64_t>(warp, preset.slot, value);
        }
    }

    void finish(Cluster& cluster) {
        launch_.running = nullptr;
        if (!cluster.pending.empty()) fail("a block ends while a copy to its shared memory is under way");
        for (const auto& block : cluster.blocks) {
            for (uint32_t id = 0; id < block->barriers.size(); ++id) {
                if (block->barriers[id].arrived != 0) {
                    fail("a block ends with %u of %u threads at barrier %u", block->barriers[id].arrived,
                         block->barriers[id].expected, id);
                }
            }
            files_.give_back(block->registers);
        }
    }

    [[noreturn]] void deadlock() {
        launch_.running = nullptr;
        std::string where;
        for (const auto& cluster : resident_) {
            for (const auto& block : cluster->blocks) {
                for (const Warp& warp : block->warps) {
                    if (warp.state == Warp::State::exited || where.size() > 2000) continue;
                    const Instruction& i = warp.instruction();
                    char text[240];
                    snprintf(text, sizeof text, "\n    block (%u, %u, %u) warp %u at line %u: %.100s", block->x,
                             block->y, block->z, warp.index, i.line, i.text.c_str());
                    where += text;
                }
            }
        }
        throw Fault{"deadlock: no warp that is left can go on" + where, -1};
    }

    Launch& launch_;
    uint32_t threads_ = 0, clusters_ = 0, next_ = 0;
    std::vector<std::unique_ptr<Cluster>> resident_;
    RegisterFiles files_;
};

}  // namespace

void run(Launch& launch) {
    // Outlives the handler, which looks at the warp that failed.
    Grid grid(launch);
    try {
        grid.run();
    } catch (const Fault& fault) {
        std::string text = fault.text + "\n  kernel " + launch.entry->name + " (" + launch.entry->file + ")";
        if (const Warp* warp = launch.running) {
            const Block& block = *warp->block;
            const Instruction& i = warp->instruction();
            char where[200];
            const int lane = fault.lane >= 0 ? fault.lane : warp->lanes != 0 ? __builtin_ctz(warp->lanes) : 0;
            snprintf(where, sizeof where, "\n  block (%u, %u, %u), warp %u, thread %u%s", block.x, block.y, block.z,
                     warp->index, warp->index * kLanes + uint32_t(lane), fault.lane >= 0 ? "" : " and others");
            text += where;
            text += "\n  PTX line " + std::to_string(i.line) + ": " + i.text.substr(0, 160);
            if (!i.source.empty()) text += "\n  from " + i.source;
        }
        throw Fault{text, fault.lane};
    }
}

}  // namespace ptx
