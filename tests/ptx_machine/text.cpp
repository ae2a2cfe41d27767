// Cuts PTX into statements. PTX ISA 9.0, chapters "Syntax" and "Directives".
#include "text.h"

#include <cctype>
#include <sstream>
#include <stdexcept>

namespace ptx {
namespace {

[[noreturn]] void reject(const std::string& module, uint32_t line, const std::string& why) {
    throw std::runtime_error(module + ":" + std::to_string(line) + ": " + why);
}

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

bool is_label(const std::string& text) {
    if (text.empty() || !(std::isalpha(static_cast<unsigned char>(text[0])) || text[0] == '$' || text[0] == '_'))
        return false;
    for (const char c : text) {
        if (!(std::isalnum(static_cast<unsigned char>(c)) || c == '$' || c == '_')) return false;
    }
    return true;
}

// Reads characters and counts lines, comments left out.
class Reader {
public:
    Reader(const std::string& module, const std::string& text) : module_(module), text_(text) {}

    bool at_end() { return skip_comment(), at_ >= text_.size(); }
    uint32_t line() const { return line_; }
    char peek() { return skip_comment(), at_ < text_.size() ? text_[at_] : '\0'; }
    char next() {
        const char c = peek();
        if (c == '\n') ++line_;
        ++at_;
        return c;
    }
    void skip_space() {
        while (!at_end() && std::isspace(static_cast<unsigned char>(peek()))) next();
    }
    bool stands_at(const char* word) { return skip_comment(), text_.compare(at_, std::string(word).size(), word) == 0; }
    std::string rest_of_line() {
        std::string found;
        while (!at_end() && peek() != '\n') found += next();
        return trim(found);
    }
    // Up to one of `ends`, which is left.
    std::string until(const char* ends) {
        std::string found;
        while (!at_end() && std::string(ends).find(peek()) == std::string::npos) found += next();
        return trim(found);
    }
    void skip_braces() {
        int depth = 0;
        do {
            if (at_end()) reject(module_, line_, "a brace is never closed");
            const char c = next();
            depth += c == '{' ? 1 : c == '}' ? -1 : 0;
        } while (depth > 0);
    }

private:
    void skip_comment() {
        while (text_.compare(at_, 2, "//") == 0) {
            while (at_ < text_.size() && text_[at_] != '\n') ++at_;
        }
    }
    const std::string& module_;
    const std::string& text_;
    size_t at_ = 0;
    uint32_t line_ = 1;
};

ParameterText parse_parameter(const std::string& text) {
    ParameterText parameter;
    std::istringstream words(text);
    std::string word, type;
    while (words >> word) {
        if (word == ".param" || word == ".ptr" || word == ".global" || word == ".const" || word == ".shared") continue;
        if (word == ".align") {
            words >> parameter.alignment;
        } else if (word[0] == '.') {
            type = word.substr(1);
        } else {
            parameter.name = word;
        }
    }
    const size_t bracket = parameter.name.find('[');
    parameter.bytes = type_bytes(type);
    // `.align` of a pointer speaks of what it points at.
    if (bracket == std::string::npos) {
        parameter.alignment = parameter.bytes;
    } else {
        parameter.bytes *= uint32_t(std::stoul(parameter.name.substr(bracket + 1)));
        parameter.name.resize(bracket);
    }
    return parameter;
}

class Parser {
public:
    Parser(const std::string& name, const std::string& text) : reader_(name, text) { module_.name = name; }

    ModuleText run() {
        for (reader_.skip_space(); !reader_.at_end(); reader_.skip_space()) top_level();
        return std::move(module_);
    }

private:
    void top_level() {
        if (reader_.stands_at(".version") || reader_.stands_at(".target") || reader_.stands_at(".address_size")) {
            reader_.rest_of_line();
        } else if (reader_.stands_at(".file")) {
            file();
        } else if (reader_.stands_at(".section")) {
            reader_.until("{");
            reader_.skip_braces();
        } else {
            declaration();
        }
    }

    // .file 1 "kernels/rms_norm.cu"
    void file() {
        const std::string text = reader_.rest_of_line();
        const size_t quote = text.find('"');
        if (quote == std::string::npos) return;
        const uint32_t number = uint32_t(std::stoul(text.substr(5)));
        module_.files[number] = text.substr(quote + 1, text.find('"', quote + 1) - quote - 1);
    }

    void declaration() {
        const uint32_t line = reader_.line();
        const std::string text = reader_.until("(;{");
        if (text.find(".entry") != std::string::npos) {
            entry(text);
        } else if (text.find(".shared") != std::string::npos && reader_.peek() == ';') {
            reader_.next();
            module_.shared.push_back(parse_shared(text));
        } else if (starts_with(text, ".pragma") && reader_.peek() == ';') {
            reader_.next();
        } else {
            reject(module_.name, line, "unknown declaration `" + text.substr(0, 80) + "`");
        }
    }

    void entry(const std::string& head) {
        EntryText entry;
        entry.name = trim(head.substr(head.find(".entry") + 6));
        if (reader_.peek() == '(') {
            reader_.next();
            for (const std::string& text : split_outside_brackets(reader_.until(")"), ',')) {
                if (!text.empty()) entry.parameters.push_back(parse_parameter(text));
            }
            reader_.next();
        }
        std::istringstream directives(reader_.until("{"));
        std::string word;
        while (directives >> word) {
            if (word != ".maxntid") continue;
            std::string sizes;
            std::getline(directives, sizes);
            entry.most_threads = 1;
            for (const std::string& size : split_outside_brackets(sizes, ','))
                entry.most_threads *= uint32_t(std::stoul(size));
        }
        reader_.next();
        body(entry);
        module_.entries.push_back(std::move(entry));
    }

    void body(EntryText& entry) {
        for (int depth = 1; depth > 0;) {
            reader_.skip_space();
            if (reader_.at_end()) reject(module_.name, reader_.line(), "an entry without an end");
            const uint32_t line = reader_.line();
            if (reader_.peek() == '{' || reader_.peek() == '}') {
                const bool opens = reader_.next() == '{';
                depth += opens ? 1 : -1;
                if (depth > 0) add(entry, opens ? Statement::Kind::open_scope : Statement::Kind::close_scope, "", line);
            } else if (reader_.stands_at(".loc")) {
                location();
            } else {
                statement(entry, line);
            }
        }
    }

    // .loc 1 35 7, or with `, function_name ..., inlined_at ...` after it.
    void location() {
        std::istringstream words(reader_.rest_of_line().substr(4));
        words >> source_file_ >> source_line_;
    }

    void statement(EntryText& entry, uint32_t line) {
        std::string text;
        int braces = 0;
        for (;;) {
            if (reader_.at_end()) reject(module_.name, line, "a statement without an end");
            const char c = reader_.next();
            braces += c == '{' ? 1 : c == '}' ? -1 : 0;
            if (c == ';' && braces == 0) break;
            // `::` belongs to an opcode, a single colon after a name ends a label.
            if (c == ':' && braces == 0 && reader_.peek() != ':' && (text.empty() || text.back() != ':')) {
                if (is_label(trim(text))) return add(entry, Statement::Kind::label, trim(text), line);
            }
            text += std::isspace(static_cast<unsigned char>(c)) ? ' ' : c;
        }
        text = trim(text);
        if (text.empty()) return;
        add(entry, text[0] == '.' ? Statement::Kind::directive : Statement::Kind::instruction, text, line);
    }

    void add(EntryText& entry, Statement::Kind kind, const std::string& text, uint32_t line) {
        entry.statements.push_back({kind, text, line, source_file_, source_line_});
    }

    Reader reader_;
    ModuleText module_;
    uint32_t source_file_ = 0, source_line_ = 0;
};

}  // namespace

ModuleText parse_module(const std::string& name, const std::string& text) { return Parser(name, text).run(); }

std::string trim(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split_outside_brackets(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char c : text) {
        depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
        if (c == separator && depth == 0) {
            parts.push_back(trim(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trim(part).empty()) parts.push_back(trim(part));
    return parts;
}

InstructionText parse_instruction(const std::string& text) {
    InstructionText instruction;
    std::string rest = text;
    if (rest[0] == '@') {
        const size_t end = rest.find(' ');
        instruction.guard_negated = rest[1] == '!';
        instruction.guard = rest.substr(instruction.guard_negated ? 2 : 1, end - (instruction.guard_negated ? 2 : 1));
        rest = trim(rest.substr(end));
    }
    const size_t end = rest.find(' ');
    instruction.opcode = rest.substr(0, end);
    if (end != std::string::npos) instruction.operands = split_outside_brackets(rest.substr(end), ',');
    instruction.parts = split_outside_brackets(instruction.opcode, '.');
    return instruction;
}

SharedVariable parse_shared(const std::string& text) {
    SharedVariable variable;
    std::istringstream words(text);
    std::string word, type = "b8";
    while (words >> word) {
        if (word == ".align") {
            words >> variable.alignment;
        } else if (word == ".extern" || word == ".shared" || word == ".visible" || word == ".weak" ||
                   word == ".common") {
            continue;
        } else if (word[0] == '.') {
            type = word.substr(1);
        } else {
            variable.name += word;
        }
    }
    const size_t bracket = variable.name.find('[');
    variable.bytes = type_bytes(type);
    if (bracket != std::string::npos) {
        const std::string count = variable.name.substr(bracket + 1);
        variable.bytes *= count[0] == ']' ? 0 : uint32_t(std::stoul(count));
        variable.name.resize(bracket);
    }
    return variable;
}

uint32_t type_bytes(const std::string& type) {
    if (type == "pred") return 0;
    const size_t digits = type.find_first_of("0123456789");
    if (digits == std::string::npos) throw std::runtime_error("unknown type `" + type + "`");
    return uint32_t(std::stoul(type.substr(digits))) / 8;
}

}  // namespace ptx
