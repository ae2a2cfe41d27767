// From statements to instructions that can be executed.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"
#include "text.h"

namespace ptx {

// What is asked of the machine that it does not know: the text of the statement is added by the decoder.
struct Unknown : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Gives an instruction's operands their places, by the names of one entry.
class Operands {
public:
    virtual ~Operands() = default;
    // The register, constant, special register or address of a variable, as a value of `bytes`; a register may be wider
    // where `exact` is false.
    virtual uint32_t value(const std::string& text, uint32_t bytes, bool exact = true) = 0;
    // Its width where it is a register; 0 otherwise.
    virtual uint32_t width(const std::string& text) = 0;
    virtual uint32_t predicate(const std::string& text) = 0;
    virtual bool is_predicate(const std::string& text) = 0;
    // The registers of `{a, b}`.
    virtual std::vector<uint32_t> list(const std::string& text, uint32_t bytes, bool exact = true) = 0;
    // `[register+offset]`: the register's place as an address of `bytes`, and the offset.
    virtual uint32_t address(const std::string& text, uint32_t bytes, int64_t& offset) = 0;
    // Bytes of the register in `[register+offset]`; 0 where it is a variable or a number.
    virtual uint32_t address_width(const std::string& text) = 0;
    virtual uint32_t label(const std::string& name) = 0;
};

// Fills an instruction in from its text.
using Decode = void (*)(Operands&, const InstructionText&, Instruction&);
// Opcode, up to its first dot, to the function that knows its variants.
using OpcodeTable = std::map<std::string, Decode>;

// Each file of instructions adds its own.
void add_arithmetic(OpcodeTable& table);
void add_logic(OpcodeTable& table);
void add_comparisons(OpcodeTable& table);
void add_conversions(OpcodeTable& table);
void add_control(OpcodeTable& table);
void add_memory(OpcodeTable& table);
void add_warp_operations(OpcodeTable& table);
void add_matrices(OpcodeTable& table);
void add_barriers(OpcodeTable& table);
void add_mbarriers(OpcodeTable& table);
void add_clusters(OpcodeTable& table);
void add_copies(OpcodeTable& table);
void add_wgmma(OpcodeTable& table);

// Decodes one entry; throws Unknown with file, line and text.
std::unique_ptr<Entry> decode(const ModuleText& module, const EntryText& entry);

bool has(const InstructionText& text, const char* part);
// Throws Unknown unless there are `count` operands.
void expect_operands(const InstructionText& text, size_t count);
// The places of d, a and b, all of the type that the opcode ends in.
void decode_same_type(Operands& operands, const InstructionText& text, Instruction& out);

}  // namespace ptx
