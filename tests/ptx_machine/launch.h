// The kernels of a fat binary, by name, and how to launch one.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"
#include "text.h"

namespace ptx {

// A device that the machine pretends to be.
struct Device {
    const char* target;  // as in the names of the PTX files: NAME.sm_80.ptx
    int major, minor;
    uint32_t most_shared;
    Rounding rounding;
};
// Device 0 is Hopper, device 1 Ampere.
constexpr int kDevices = 2;
extern const Device kDeviceTable[kDevices];

// The PTX of all kernels, the settings, and what has been launched. One in a process.
class Machine {
public:
    static Machine& get();

    // Reads every `*.sm_80.ptx` and `*.sm_90a.ptx` of a folder; an error text, or empty.
    std::string open(const std::string& folder);
    void configure(const Options& options);
    // Replaces occurrence number `occurrence` (from 1; 0: all) of `from` by `to` in the text of every entry whose
    // mangled name holds `entry`, until `restore`; an error text if there is none.
    std::string edit(const std::string& entry, const std::string& from, const std::string& to, int occurrence);
    void restore();
    // `target file entry launches`, a line for every entry.
    std::string launches();

    // Runs a kernel by its mangled name; throws Fault.
    void launch(int device, const std::string& name, Dim3 grid, Dim3 block, void** arguments, uint32_t dynamic_shared,
                uint32_t cluster_size);

    ~Machine();

private:
    struct Module {
        std::string file, target, text;
        std::string edited;
        std::unique_ptr<ModuleText> parsed;
    };
    struct Known {
        Module* module = nullptr;
        std::shared_ptr<const Entry> entry;
        uint64_t launches = 0;
    };
    Known* find(int device, const std::string& name);
    std::shared_ptr<const Entry> ready(Known& known, const std::string& name);

    std::mutex mutex_;
    std::vector<std::unique_ptr<Module>> modules_;
    std::map<std::string, Known> entries_[kDevices];
    Options options_;
};

}  // namespace ptx
