// Finds kernels in the PTX, checks launches as the driver would, and runs them.
#include "launch.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "decode.h"

namespace ptx {

const Device kDeviceTable[kDevices] = {{"sm_90a", 9, 0, kMostShared90, Rounding::hopper},
                                       {"sm_80", 8, 0, kMostShared80, Rounding::ampere}};

namespace {

// Where the text of an entry lies in a module's.
std::pair<size_t, size_t> entry_range(const std::string& text, const std::string& name) {
    const size_t start = text.find(".entry " + name + "(");
    if (start == std::string::npos) return {0, 0};
    const size_t end = text.find(".entry ", start + 7);
    return {start, end == std::string::npos ? text.size() : end};
}

// Whether a mangled name holds every word of `words`.
bool holds_all(const std::string& name, const std::string& words) {
    std::istringstream rest(words);
    for (std::string word; rest >> word;) {
        if (name.find(word) == std::string::npos) return false;
    }
    return true;
}

std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// The parameters of a launch, aligned as kernels expect, readable while it runs.
class ParameterBlock {
public:
    ParameterBlock(const Entry& entry, void** arguments) : bytes_(entry.parameter_bytes + 256) {
        start_ = bytes_.data() + (128 - reinterpret_cast<uint64_t>(bytes_.data()) % 128) % 128;
        for (size_t k = 0; k < entry.parameters.size(); ++k) {
            memcpy(start_ + entry.parameters[k].offset, arguments[k], entry.parameters[k].bytes);
        }
        GlobalMemory::get().lend(start_, std::max(1u, entry.parameter_bytes));
    }
    ~ParameterBlock() { GlobalMemory::get().take_back(start_); }
    ParameterBlock(const ParameterBlock&) = delete;
    ParameterBlock& operator=(const ParameterBlock&) = delete;
    uint8_t* start() { return start_; }

private:
    std::vector<uint8_t> bytes_;
    uint8_t* start_;
};

}  // namespace

Machine& Machine::get() {
    static Machine machine;
    return machine;
}

// A process that is asked to leaves what it launched.
Machine::~Machine() {
    const char* const path = std::getenv("MMPO_FAST_PTX_LAUNCHES");
    if (path == nullptr) return;
    std::ofstream file(path, std::ios::app);
    file << launches();
}

std::string Machine::open(const std::string& folder) {
    const std::lock_guard lock(mutex_);
    std::error_code error;
    for (const auto& found : std::filesystem::directory_iterator(folder, error)) {
        const std::string file = found.path().filename().string();
        for (int device = 0; device < kDevices; ++device) {
            const std::string ending = std::string(".") + kDeviceTable[device].target + ".ptx";
            if (file.size() <= ending.size() || file.substr(file.size() - ending.size()) != ending) continue;
            auto module = std::make_unique<Module>();
            module->file = file;
            module->target = kDeviceTable[device].target;
            module->text = read_file(found.path());
            for (size_t at = module->text.find(".entry "); at != std::string::npos;
                 at = module->text.find(".entry ", at + 7)) {
                const std::string name = trim(module->text.substr(at + 7, module->text.find('(', at) - at - 7));
                entries_[device][name].module = module.get();
            }
            modules_.push_back(std::move(module));
        }
    }
    return modules_.empty() ? "no PTX in " + folder : "";
}

void Machine::configure(const Options& options) {
    const std::lock_guard lock(mutex_);
    options_ = options;
}

std::string Machine::edit(const std::string& entry, const std::string& from, const std::string& to, int occurrence) {
    const std::lock_guard lock(mutex_);
    int edits = 0;
    for (auto& entries : entries_) {
        for (auto& [name, known] : entries) {
            if (!holds_all(name, entry)) continue;
            Module& module = *known.module;
            std::string text = module.edited.empty() ? module.text : module.edited;
            auto [start, end] = entry_range(text, name);
            int seen = 0;
            for (size_t at = text.find(from, start); at < end; at = text.find(from, at)) {
                ++seen;
                if (occurrence != 0 && seen != occurrence) {
                    at += from.size();
                    continue;
                }
                text.replace(at, from.size(), to);
                at += to.size();
                end += to.size() - from.size();
                ++edits;
            }
            module.edited = std::move(text);
            module.parsed.reset();
            for (auto& all : entries_) {
                for (auto& [other, its] : all) {
                    if (its.module == &module) its.entry.reset();
                }
            }
        }
    }
    return edits != 0 ? "" : "no `" + from + "` in an entry whose name holds `" + entry + "`";
}

void Machine::restore() {
    const std::lock_guard lock(mutex_);
    for (auto& module : modules_) {
        if (module->edited.empty()) continue;
        module->edited.clear();
        module->parsed.reset();
        for (auto& entries : entries_) {
            for (auto& [name, known] : entries) {
                if (known.module == module.get()) known.entry.reset();
            }
        }
    }
}

std::string Machine::launches() {
    const std::lock_guard lock(mutex_);
    std::ostringstream lines;
    for (const auto& entries : entries_) {
        for (const auto& [name, known] : entries) {
            lines << known.module->target << ' ' << known.module->file << ' ' << name << ' ' << known.launches << '\n';
        }
    }
    return lines.str();
}

Machine::Known* Machine::find(int device, const std::string& name) {
    const auto found = entries_[device].find(name);
    return found == entries_[device].end() ? nullptr : &found->second;
}

std::shared_ptr<const Entry> Machine::ready(Known& known, const std::string& name) {
    if (known.entry != nullptr) return known.entry;
    Module& module = *known.module;
    if (module.parsed == nullptr) {
        module.parsed = std::make_unique<ModuleText>(
            parse_module(module.file, module.edited.empty() ? module.text : module.edited));
    }
    for (const EntryText& entry : module.parsed->entries) {
        if (entry.name == name) known.entry = decode(*module.parsed, entry);
    }
    return known.entry;
}

void Machine::launch(int device, const std::string& name, Dim3 grid, Dim3 block, void** arguments,
                     uint32_t dynamic_shared, uint32_t cluster_size) {
    Launch launch;
    std::shared_ptr<const Entry> entry;
    {
        const std::lock_guard lock(mutex_);
        Known* const known = find(device, name);
        if (known == nullptr) throw Fault{std::string("no PTX for ") + kDeviceTable[device].target + " of " + name, -1};
        try {
            entry = ready(*known, name);
        } catch (const std::exception& error) {
            throw Fault{std::string("cannot decode the PTX: ") + error.what() + "\n  kernel " + name, -1};
        }
        ++known->launches;
        launch.options = options_;
    }
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || blocks == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) {
        throw Fault{"invalid configuration: a grid of " + std::to_string(blocks) + " blocks of " +
                        std::to_string(threads) + " threads",
                    -1};
    }
    if (threads > entry->most_threads) throw Fault{"more threads than .maxntid of " + name, -1};
    if (grid.x % cluster_size != 0 || cluster_size > 8) throw Fault{"a grid that is no whole number of clusters", -1};
    if (entry->static_shared + dynamic_shared > kDeviceTable[device].most_shared)
        throw Fault{"more shared memory than a block can have: " + name, -1};
    ParameterBlock parameters(*entry, arguments);
    launch.entry = entry.get();
    launch.grid = grid;
    launch.block = block;
    launch.dynamic_shared = dynamic_shared;
    launch.cluster_size = cluster_size;
    launch.parameters = parameters.start();
    allow_creation_zeros(launch.options.creation_zeros);
    launch.rounding = launch.options.measured_rounding ? kDeviceTable[device].rounding : Rounding::f32;
    run(launch);
}

}  // namespace ptx
