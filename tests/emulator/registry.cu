// Runs a case of this variant by name; compiled once a variant.
#include "harness.h"

// Writes the outcome, cut to `capacity` bytes; false if there is no such case.
extern "C" bool MMPO_EXPORT(test_run)(const char* name, bool bug, char* out, size_t capacity) {
    const auto& cases = mmpo::test::cases();
    const auto found = cases.find(name);
    if (found == cases.end()) return false;
    snprintf(out, capacity, "%s", found->second(bug).c_str());
    return true;
}
