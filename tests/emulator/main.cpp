// emulator_test VARIANT ASYNC SCHEDULE SEED CASE[!]...
//
// Runs cases one after another in one process, `!` with the planted fault, and prints for each a line `== CASE` and the
// outcome. A fault must not keep the next case from running.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator/emulator_api.h"

extern "C" {
bool mmpo_emulated_test_run(const char* name, bool bug, char* out, size_t capacity);
bool mmpo_checked_test_run(const char* name, bool bug, char* out, size_t capacity);
}

int main(int count, char** arguments) {
    if (count < 6) return 2;
    const bool checked = std::string(arguments[1]) == "checked";
    mmpo_emulator_options options{};
    options.async = atoi(arguments[2]);
    options.schedule = atoi(arguments[3]);
    options.seed = strtoull(arguments[4], nullptr, 10);
    // A random schedule of one host thread is the same in every run.
    options.host_threads = options.schedule;
    options.trace_accesses = 1;
    if ((checked ? mmpo_checked_configure : mmpo_emulated_configure)(&options) != 0) return 2;
    for (int i = 5; i < count; ++i) {
        std::string name = arguments[i];
        const bool bug = name.back() == '!';
        if (bug) name.pop_back();
        char outcome[4096];
        if (!(checked ? mmpo_checked_test_run : mmpo_emulated_test_run)(name.c_str(), bug, outcome, sizeof outcome)) {
            fprintf(stderr, "no case %s\n", name.c_str());
            return 2;
        }
        printf("== %s\n%s\n", arguments[i], outcome);
    }
    return 0;
}
