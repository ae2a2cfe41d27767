// Walks an entry's statements and turns each instruction into the function that executes it and the places of its
// operands. PTX ISA 9.0, chapter "Instruction Operands".
#include "decode.h"

#include <algorithm>
#include <set>

#include "registers.h"

namespace ptx {
namespace {

const OpcodeTable& opcodes() {
    static const OpcodeTable table = [] {
        OpcodeTable filled;
        for (const auto add :
             {add_arithmetic, add_logic, add_comparisons, add_conversions, add_control, add_memory, add_warp_operations,
              add_matrices, add_barriers, add_mbarriers, add_clusters, add_copies, add_wgmma}) {
            add(filled);
        }
        return filled;
    }();
    return table;
}

// PTX ISA 9.0, chapter "Special Registers".
const std::map<std::string, Preset::Kind>& special_registers() {
    using Kind = Preset::Kind;
    static const std::map<std::string, Kind> known{{"%tid.x", Kind::tid_x},
                                                   {"%tid.y", Kind::tid_y},
                                                   {"%tid.z", Kind::tid_z},
                                                   {"%ctaid.x", Kind::ctaid_x},
                                                   {"%ctaid.y", Kind::ctaid_y},
                                                   {"%ctaid.z", Kind::ctaid_z},
                                                   {"%ntid.x", Kind::ntid_x},
                                                   {"%ntid.y", Kind::ntid_y},
                                                   {"%ntid.z", Kind::ntid_z},
                                                   {"%nctaid.x", Kind::nctaid_x},
                                                   {"%nctaid.y", Kind::nctaid_y},
                                                   {"%nctaid.z", Kind::nctaid_z},
                                                   {"%cluster_ctarank", Kind::cluster_rank},
                                                   {"%laneid", Kind::lane}};
    return known;
}

uint32_t align_up(uint32_t value, uint32_t alignment) { return (value + alignment - 1) / alignment * alignment; }

class Decoder final : public Operands {
public:
    Decoder(const ModuleText& module, const EntryText& text)
        : module_(module), text_(text), entry_(std::make_unique<Entry>()) {
        entry_->name = text.name;
        entry_->file = module.name;
        entry_->most_threads = text.most_threads;
        registers_ = place_registers(text, entry_->register_bytes, entry_->predicates);
        entry_->virtual_registers = uint32_t(registers_.size());
    }

    std::unique_ptr<Entry> run() {
        place_parameters();
        place_shared();
        place_labels();
        Scopes scopes(registers_);
        scopes_ = &scopes;
        for (const Statement& s : text_.statements) {
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
                    instruction(s);
                    break;
            }
        }
        end_of_entry();
        return std::move(entry_);
    }

    uint32_t value(const std::string& name, uint32_t bytes, bool exact) override {
        const int64_t number = scopes_->find(name);
        if (number >= 0) {
            const Register& r = registers_[size_t(number)];
            if (r.bytes != bytes && (exact || r.bytes < bytes)) {
                throw Unknown("`" + name + "` has " + std::to_string(r.bytes) + " bytes, not " + std::to_string(bytes));
            }
            current_->named.push_back(uint32_t(number));
            return r.slot;
        }
        return preset(name, bytes);
    }

    uint32_t width(const std::string& name) override {
        const int64_t number = scopes_->find(name);
        return number >= 0 ? registers_[size_t(number)].bytes : 0;
    }

    bool is_predicate(const std::string& name) override { return scopes_->find(name) >= 0 && width(name) == 0; }

    uint32_t predicate(const std::string& name) override {
        const int64_t number = scopes_->find(name);
        if (number < 0 || registers_[size_t(number)].bytes != 0) throw Unknown("`" + name + "` is no predicate");
        return registers_[size_t(number)].slot;
    }

    std::vector<uint32_t> list(const std::string& text, uint32_t bytes, bool exact) override {
        std::string inside = trim(text);
        if (!inside.empty() && inside[0] == '{') inside = inside.substr(1, inside.size() - 2);
        std::vector<uint32_t> found;
        for (const std::string& name : split_outside_brackets(inside, ',')) found.push_back(value(name, bytes, exact));
        return found;
    }

    uint32_t address(const std::string& text, uint32_t bytes, int64_t& offset) override {
        if (text.size() < 2 || text[0] != '[' || text.back() != ']') throw Unknown("`" + text + "` is no address");
        std::string inside = trim(text.substr(1, text.size() - 2));
        offset = 0;
        const size_t plus = inside.find('+');
        if (plus != std::string::npos) {
            offset = std::stoll(inside.substr(plus + 1), nullptr, 0);
            inside = trim(inside.substr(0, plus));
        }
        return value(inside, bytes, true);
    }

    uint32_t address_width(const std::string& text) override {
        if (text.size() < 2) return 0;
        const std::string inside = text.substr(1, text.size() - 2);
        return width(trim(inside.substr(0, inside.find('+'))));
    }

    uint32_t label(const std::string& name) override {
        const auto found = labels_.find(name);
        if (found == labels_.end()) throw Unknown("no label `" + name + "`");
        return found->second;
    }

private:
    void place_parameters() {
        for (const ParameterText& p : text_.parameters) {
            const uint32_t offset = align_up(entry_->parameter_bytes, p.alignment);
            entry_->parameters.push_back({p.name, p.bytes, offset});
            entry_->parameter_bytes = offset + p.bytes;
        }
    }

    // Variables of the module count where the entry names them; the dynamic part follows all others.
    void place_shared() {
        uint32_t end = kSharedStart;
        const auto place = [&](const SharedVariable& v) {
            end = align_up(end, v.alignment);
            variables_[v.name] = end;
            end += v.bytes;
        };
        const auto named = [&](const std::string& name) {
            return std::any_of(text_.statements.begin(), text_.statements.end(), [&](const Statement& s) {
                return s.kind == Statement::Kind::instruction && s.text.find(name) != std::string::npos;
            });
        };
        for (const SharedVariable& v : module_.shared) {
            if (v.bytes != 0 && named(v.name)) place(v);
        }
        for (const Statement& s : text_.statements) {
            if (s.kind == Statement::Kind::directive && s.text.rfind(".shared", 0) == 0) place(parse_shared(s.text));
        }
        for (const SharedVariable& v : module_.shared) {
            if (v.bytes == 0 && named(v.name)) place(v);
        }
        entry_->static_shared = end - kSharedStart;
    }

    void place_labels() {
        uint32_t pc = 0;
        for (const Statement& s : text_.statements) {
            if (s.kind == Statement::Kind::label) labels_[s.text] = pc;
            if (s.kind == Statement::Kind::instruction) ++pc;
        }
    }

    void instruction(const Statement& s) {
        Instruction instruction;
        instruction.line = s.line;
        instruction.text = s.text;
        const auto file = module_.files.find(s.source_file);
        if (s.source_line != 0 && file != module_.files.end()) {
            instruction.source = file->second + ":" + std::to_string(s.source_line);
        }
        current_ = &instruction;
        try {
            const InstructionText text = parse_instruction(s.text);
            if (!text.guard.empty()) {
                instruction.guard = int32_t(predicate(text.guard));
                instruction.guard_negated = text.guard_negated;
            }
            const auto known = opcodes().find(text.parts[0]);
            if (known == opcodes().end()) throw Unknown("an instruction that this machine does not know");
            known->second(*this, text, instruction);
            if (instruction.execute == nullptr)
                throw Unknown("a form of `" + text.parts[0] + "` that this machine does not know");
        } catch (const std::exception& error) {
            throw Unknown(module_.name + ":" + std::to_string(s.line) + ": `" + s.text.substr(0, 200) +
                          "`: " + error.what());
        }
        entry_->code.push_back(std::move(instruction));
    }

    void end_of_entry() {
        Instruction end;
        end.text = "(end of the entry)";
        end.execute = [](Warp&, const Instruction&) { return Step::exited; };
        entry_->code.push_back(std::move(end));
    }

    // Constants, special registers and addresses of variables have a place of their own for the whole launch.
    uint32_t preset(const std::string& name, uint32_t bytes) {
        Preset wanted;
        wanted.bytes = uint8_t(bytes);
        const auto special = special_registers().find(name);
        if (special != special_registers().end()) {
            wanted.kind = special->second;
        } else if (const auto variable = variables_.find(name); variable != variables_.end()) {
            wanted.value = variable->second;
        } else if (const Parameter* parameter = find_parameter(name)) {
            wanted.kind = Preset::Kind::parameter;
            wanted.value = parameter->offset;
        } else {
            wanted.value = number(name);
        }
        for (const Preset& known : entry_->presets) {
            if (known.kind == wanted.kind && known.value == wanted.value && known.bytes == wanted.bytes)
                return known.slot;
        }
        wanted.slot = entry_->register_bytes;
        entry_->register_bytes += bytes * kLanes;
        entry_->presets.push_back(wanted);
        return wanted.slot;
    }

    const Parameter* find_parameter(const std::string& name) const {
        for (const Parameter& p : entry_->parameters) {
            if (p.name == name) return &p;
        }
        return nullptr;
    }

    // PTX ISA 9.0, "Constants": 0f and 0d are the bits of a float, everything else an integer.
    static uint64_t number(const std::string& name) {
        if (name.size() > 2 && name[0] == '0' &&
            (name[1] == 'f' || name[1] == 'F' || name[1] == 'd' || name[1] == 'D')) {
            return std::stoull(name.substr(2), nullptr, 16);
        }
        const bool negative = !name.empty() && name[0] == '-';
        size_t used = 0;
        const uint64_t value = std::stoull(negative ? name.substr(1) : name, &used, 0);
        if (used + negative < name.size() && name.substr(used + negative) != "U")
            throw Unknown("unknown operand `" + name + "`");
        return negative ? 0 - value : value;
    }

    const ModuleText& module_;
    const EntryText& text_;
    std::unique_ptr<Entry> entry_;
    std::vector<Register> registers_;
    Scopes* scopes_ = nullptr;
    Instruction* current_ = nullptr;
    std::map<std::string, uint32_t> variables_, labels_;
};

}  // namespace

bool has(const InstructionText& text, const char* part) {
    return std::find(text.parts.begin(), text.parts.end(), part) != text.parts.end();
}

void expect_operands(const InstructionText& text, size_t count) {
    if (text.operands.size() != count) throw Unknown("takes " + std::to_string(count) + " operands");
}

void decode_same_type(Operands& operands, const InstructionText& text, Instruction& out) {
    expect_operands(text, 3);
    const uint32_t bytes = type_bytes(text.parts.back());
    for (int k = 0; k < 3; ++k) out.operands[k] = operands.value(text.operands[k], bytes);
}

std::unique_ptr<Entry> decode(const ModuleText& module, const EntryText& entry) { return Decoder(module, entry).run(); }

}  // namespace ptx
