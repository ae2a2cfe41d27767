// What the emulator's test cases share: device arrays, and a registry of cases by name.
//
// A case is a host function in a .cu file that launches kernels and returns "" or what went wrong. Case files are compiled
// like kernel files: for both variants of the emulated device, and, but for planted faults and counters, by nvcc
// (tools/gpu/build_layouts.sh), so that the emulated device's reading of the PTX ISA can be compared with a GPU.
#pragma once

#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "common/tensor_map.cuh"
#if MMPO_EMULATED
#include "emulator/emulator_api.h"
#endif

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace test {

// The last launch's report, "" if it was fine.
inline std::string device_error(int error) {
    if (error == 0) return "";
#if MMPO_EMULATED
    return MMPO_EXPORT(last_error)();
#else
    return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

#if !MMPO_EMULATED
// The first CUDA error of a case, "" if there is none: what goes wrong inside a kernel shows at a later call.
inline std::string& first_error() {
    static std::string text;
    return text;
}
inline void check(const char* call, cudaError_t error) {
    if (error != cudaSuccess && first_error().empty()) first_error() = std::string(call) + ": " + cudaGetErrorString(error);
}
#endif

// An allocation of its own, so that running past its end is found.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t count) : count_(count) {
#if MMPO_EMULATED
        MMPO_EXPORT(malloc)(reinterpret_cast<void**>(&data_), count * sizeof(T));
#else
        check("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)));
        // As on the emulated device: what no kernel writes is NaN, or -1.
        check("cudaMemset", cudaMemset(data_, 0xff, count * sizeof(T)));
#endif
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) { upload(values); }
    ~DeviceArray() { release(); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    void upload(const std::vector<T>& values) {
#if MMPO_EMULATED
        MMPO_EXPORT(upload)(data_, values.data(), values.size() * sizeof(T));
#else
        check("upload", cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
#endif
    }
    std::vector<T> download() const {
        std::vector<T> values(count_);
#if MMPO_EMULATED
        MMPO_EXPORT(download)(values.data(), data_, count_ * sizeof(T));
#else
        check("a kernel, or the download after it", cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
#endif
        return values;
    }
    // Keeps the address, as a bug would.
    void release() {
        if (freed_) return;
        freed_ = true;
#if MMPO_EMULATED
        MMPO_EXPORT(free)(data_);
#else
        check("cudaFree", cudaFree(data_));
#endif
    }
    T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    size_t count_;
    bool freed_ = false;
};

// `bug`: whether the case plants its fault.
using Case = std::string (*)(bool bug);
inline std::map<std::string, Case>& cases() {
    static std::map<std::string, Case> registry;
    return registry;
}
struct Register {
    Register(const char* name, Case run) { cases()[name] = run; }
};

// "" if equal, else the first difference.
template <class T>
std::string compare(const std::vector<T>& found, const std::vector<T>& expected) {
    for (size_t i = 0; i < expected.size(); ++i) {
        if (!(found[i] == expected[i]))
            return "wrong data: element " + std::to_string(i) + " is " + std::to_string(found[i]) + ", not " + std::to_string(expected[i]);
    }
    return "";
}

// The report of a launch, or of the comparison if it was fine.
template <class T>
std::string outcome(int error, const DeviceArray<T>& found, const std::vector<T>& expected) {
    return error != 0 ? device_error(error) : compare(found.download(), expected);
}

inline std::vector<float> iota(size_t count) {
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = float(i);
    return values;
}

}  // namespace test
}  // namespace MMPO_VARIANT
}  // namespace mmpo

// `CASE(name) { ... }` defines and registers a case; its body sees `bug`.
#define CASE(name)                                                        \
    std::string case_##name([[maybe_unused]] bool bug);                   \
    const ::mmpo::test::Register register_##name(#name, &case_##name);    \
    std::string case_##name([[maybe_unused]] bool bug)
