// PTX as text: a module cut into entries, an entry into statements. Nothing is interpreted here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

struct Statement {
    enum class Kind { open_scope, close_scope, label, directive, instruction } kind;
    std::string text;  // without `;` or `:`
    uint32_t line = 0;
    // Index into ModuleText::files and the line of it, from the last .loc; 0 where there is none.
    uint32_t source_file = 0, source_line = 0;
};

struct SharedVariable {
    std::string name;
    uint32_t bytes = 0;  // 0: the dynamic part
    uint32_t alignment = 1;
};

struct ParameterText {
    std::string name;
    uint32_t bytes = 0;
    uint32_t alignment = 1;
};

struct EntryText {
    std::string name;
    std::vector<ParameterText> parameters;
    // .maxntid's product, or 1024.
    uint32_t most_threads = 1024;
    std::vector<Statement> statements;
};

struct ModuleText {
    std::string name;
    std::vector<EntryText> entries;
    std::vector<SharedVariable> shared;
    std::map<uint32_t, std::string> files;
};

// Throws a std::runtime_error that names the line.
ModuleText parse_module(const std::string& name, const std::string& text);

// `@%p1 bra.uni $L__BB0_2` as its parts.
struct InstructionText {
    std::string guard;  // without `@` and `!`
    bool guard_negated = false;
    std::string opcode;
    std::vector<std::string> parts;     // of the opcode, cut at its dots
    std::vector<std::string> operands;  // cut at commas outside brackets
};
InstructionText parse_instruction(const std::string& text);

std::string trim(const std::string& text);
std::vector<std::string> split_outside_brackets(const std::string& text, char separator);

// Name, size and alignment of `.shared .align 4 .b8 name[128]`, with or without .extern before it.
SharedVariable parse_shared(const std::string& text);
// Bytes of `b32`, `f64`, ..; `pred` is 0.
uint32_t type_bytes(const std::string& type);

}  // namespace ptx
