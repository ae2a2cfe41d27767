// Runs a case of this variant by name; compiled once a variant.
#include "harness.h"

// The name of a case by its number; null after the last.
extern "C" const char* MMPO_EXPORT(test_name)(int number) {
    for (const auto& entry : mmpo::test::cases()) {
        if (number-- == 0) return entry.first.c_str();
    }
    return nullptr;
}

// Writes the outcome, cut to `capacity` bytes; false if there is no such case.
extern "C" bool MMPO_EXPORT(test_run)(const char* name, bool bug, char* out, size_t capacity) {
    const auto& cases = mmpo::test::cases();
    const auto found = cases.find(name);
    if (found == cases.end()) return false;
    std::string outcome = found->second(bug);
#if !MMPO_EMULATED
    mmpo::test::check("the last kernel", cudaDeviceSynchronize());
    // It explains wrong data, and is none itself.
    if (!mmpo::test::first_error().empty()) outcome = mmpo::test::first_error();
#endif
    snprintf(out, capacity, "%s", outcome.c_str());
    return true;
}
