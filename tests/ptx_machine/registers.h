// Where the registers of an entry lie: PTX has any number of them, of which few hold a value at the same time, so they
// share places in a warp's register file. A small file stays in the processor's cache.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "text.h"

namespace ptx {

struct Register {
    std::string name;
    uint8_t bytes = 4;  // 0: a predicate
    // Place in the register file, or index of the predicate.
    uint32_t slot = 0;
    // Positions of the first and last instruction between which it holds a value; `first` past `last` if never named.
    uint32_t first = UINT32_MAX, last = 0;
    uint32_t definitions = 0;
    // Its first mention reads it, or a wgmma uses it: then it lives as long as the loops around it.
    bool whole_loops = false;
};

// The registers that are in scope while an entry's statements are walked in order. Two walks give the same numbers.
class Scopes {
public:
    explicit Scopes(std::vector<Register>& registers) : registers_(registers) { open(); }
    void open() { scopes_.emplace_back(); }
    void close() { scopes_.pop_back(); }
    // `.reg .b32 %r<10>` or `.reg .pred p, q`; the second walk declares what is there.
    void declare(const std::string& directive);
    // Number of a register, or -1.
    int64_t find(const std::string& name) const;

private:
    void add(const std::string& name, uint8_t bytes);
    std::vector<Register>& registers_;
    std::vector<std::unordered_map<std::string, uint32_t>> scopes_;
    uint32_t next_ = 0;
};

// All registers with their places; `register_bytes` and `predicates` are what they take in all.
std::vector<Register> place_registers(const EntryText& entry, uint32_t& register_bytes, uint32_t& predicates);

}  // namespace ptx
