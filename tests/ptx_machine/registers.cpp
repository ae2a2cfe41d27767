// Liveness by positions in the text, widened over loops, and a linear scan that hands out places.
#include "registers.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <queue>

#include "machine.h"

namespace ptx {
namespace {

struct Loop {
    uint32_t first, last;
};

bool is_name(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

// Calls `f(name, in_first_operand)` for every word of an instruction after its opcode, and for its guard.
template <class F>
void each_name(const std::string& text, F f) {
    size_t at = 0;
    bool opcode_seen = false, first_operand = true;
    int depth = 0;
    while (at < text.size()) {
        const char c = text[at];
        depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
        if (c == ',' && depth == 0) first_operand = false;
        if (!is_name(c)) {
            ++at;
            continue;
        }
        size_t end = at;
        while (end < text.size() && (is_name(text[end]) || (!opcode_seen && text[end] == ':'))) ++end;
        const std::string word = text.substr(at, end - at);
        const bool guard = at > 0 && (text[at - 1] == '@' || (text[at - 1] == '!' && at > 1 && text[at - 2] == '@'));
        if (guard) {
            f(word, false);
        } else if (!opcode_seen) {
            opcode_seen = true;
        } else {
            f(word, first_operand);
        }
        at = end;
    }
}

bool writes_first_operand(const std::string& text) {
    for (const char* reader :
         {"st.", "bar.", "barrier.", "cp.", "stmatrix", "red.", "bra", "prefetch", "fence", "wgmma", "setmaxnreg",
          "nanosleep", "mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "mbarrier.expect"}) {
        if (text.rfind(reader, 0) == 0) return false;
    }
    return text[0] != '@';
}

// Positions are counted in instructions.
class Liveness {
public:
    explicit Liveness(const EntryText& entry) : entry_(entry) {}

    std::vector<Register> run() {
        labels();
        mentions();
        // A definition that a branch jumps over leaves the value of an earlier round of the loop.
        for (Register& r : registers_) r.whole_loops |= r.definitions != 1 || jumped_over(r);
        widen();
        return std::move(registers_);
    }

private:
    void labels() {
        uint32_t position = 0;
        for (const Statement& s : entry_.statements) {
            if (s.kind == Statement::Kind::label) labels_[s.text] = position;
            if (s.kind == Statement::Kind::instruction) ++position;
        }
        count_ = position;
    }

    void mentions() {
        Scopes scopes(registers_);
        uint32_t position = 0;
        for (const Statement& s : entry_.statements) {
            switch (s.kind) {
                case Statement::Kind::open_scope:
                    scopes.open();
                    break;
                case Statement::Kind::close_scope:
                    scopes.close();
                    break;
                case Statement::Kind::directive:
                    if (s.text.rfind(".reg", 0) == 0) scopes.declare(s.text);
                    break;
                case Statement::Kind::label:
                    break;
                case Statement::Kind::instruction:
                    instruction(scopes, s.text, position++);
                    break;
            }
        }
        // What a wgmma reads and writes stays in use until a wait after it.
        for (const auto& [number, at] : held_) {
            const auto wait = std::lower_bound(waits_.begin(), waits_.end(), at);
            registers_[number].last = std::max(registers_[number].last, wait == waits_.end() ? count_ : *wait);
            registers_[number].whole_loops = true;
        }
    }

    void instruction(const Scopes& scopes, const std::string& text, uint32_t position) {
        const bool writes = writes_first_operand(text);
        const bool product = text.find("wgmma.mma_async") != std::string::npos;
        if (text.find("wgmma.wait_group") != std::string::npos) waits_.push_back(position);
        each_name(text, [&](const std::string& name, bool first_operand) {
            if (const auto label = labels_.find(name); label != labels_.end()) {
                (label->second <= position ? loops_ : skips_).push_back({label->second, position});
            }
            const int64_t number = scopes.find(name);
            if (number < 0) return;
            Register& r = registers_[size_t(number)];
            const bool defines = writes && first_operand;
            if (r.first == UINT32_MAX && !defines) r.whole_loops = true;
            r.first = std::min(r.first, position);
            r.last = std::max(r.last, position);
            r.definitions += defines;
            if (product) held_.push_back({uint32_t(number), position});
        });
    }

    bool jumped_over(const Register& r) const {
        return std::any_of(skips_.begin(), skips_.end(), [&](const Loop& skip) {
            return skip.last < r.first && r.first < skip.first && skip.first <= r.last;
        });
    }

    void widen() {
        for (bool changed = true; changed;) {
            changed = false;
            for (const Loop& loop : loops_) {
                for (Register& r : registers_) {
                    if (r.first > r.last || r.last < loop.first || r.first > loop.last) continue;
                    const uint32_t first = r.whole_loops ? std::min(r.first, loop.first) : r.first;
                    const uint32_t last = r.whole_loops || r.first < loop.first ? std::max(r.last, loop.last) : r.last;
                    changed |= first != r.first || last != r.last;
                    r.first = first;
                    r.last = last;
                }
            }
        }
    }

    const EntryText& entry_;
    uint32_t count_ = 0;
    std::map<std::string, uint32_t> labels_;
    // Backward branches, and forward ones: each by its target and where it stands.
    std::vector<Loop> loops_, skips_;
    std::vector<uint32_t> waits_;
    std::vector<std::pair<uint32_t, uint32_t>> held_;
    std::vector<Register> registers_;
};

}  // namespace

void Scopes::add(const std::string& name, uint8_t bytes) {
    if (next_ == registers_.size()) {
        Register fresh;
        fresh.name = name;
        fresh.bytes = bytes;
        registers_.push_back(fresh);
    }
    scopes_.back()[name] = next_++;
}

void Scopes::declare(const std::string& directive) {
    const std::string rest = trim(directive.substr(4));
    const size_t space = rest.find(' ');
    const auto bytes = uint8_t(type_bytes(rest.substr(1, space - 1)));
    for (const std::string& name : split_outside_brackets(rest.substr(space), ',')) {
        const size_t count = name.find('<');
        if (count == std::string::npos) {
            add(name, bytes);
            continue;
        }
        const unsigned long many = std::stoul(name.substr(count + 1));
        for (unsigned long i = 0; i < many; ++i) add(name.substr(0, count) + std::to_string(i), bytes);
    }
}

int64_t Scopes::find(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
        const auto found = scope->find(name);
        if (found != scope->end()) return found->second;
    }
    return -1;
}

std::vector<Register> place_registers(const EntryText& entry, uint32_t& register_bytes, uint32_t& predicates) {
    std::vector<Register> registers = Liveness(entry).run();
    std::vector<uint32_t> order;
    for (uint32_t i = 0; i < registers.size(); ++i) {
        if (registers[i].first <= registers[i].last) order.push_back(i);
    }
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return registers[a].first < registers[b].first; });
    // By width: places that nobody uses, and those in use by when they end.
    std::map<uint8_t, std::vector<uint32_t>> unused;
    using InUse = std::pair<uint32_t, uint32_t>;
    std::priority_queue<InUse, std::vector<InUse>, std::greater<>> ends;
    register_bytes = 0;
    predicates = 0;
    for (const uint32_t number : order) {
        Register& r = registers[number];
        if (r.bytes == 0) {
            r.slot = predicates++;
            continue;
        }
        while (!ends.empty() && ends.top().first < r.first) {
            const Register& ended = registers[ends.top().second];
            unused[ended.bytes].push_back(ended.slot);
            ends.pop();
        }
        std::vector<uint32_t>& places = unused[r.bytes];
        if (places.empty()) {
            r.slot = register_bytes;
            register_bytes += r.bytes * kLanes;
        } else {
            r.slot = places.back();
            places.pop_back();
        }
        ends.push({r.last, number});
    }
    return registers;
}

}  // namespace ptx
