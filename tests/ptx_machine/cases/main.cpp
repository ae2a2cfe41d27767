// cases FOLDER LANDING SEED MEASURED [CASE[!]...]
//
// Runs the emulated device's own cases (tests/emulator) on the PTX machine, which stands where driver and runtime
// stood: those that are named, `!` with the fault that the case plants, or all of them. FOLDER holds their PTX; the
// numbers are those of ptx_machine_configure. Prints `ok NAME` or `FAILED NAME: what` for each.
//
// Each case has a process of its own, because the first error of a process is all that its cases say.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" {
const char* mmpo_test_name(int number);
bool mmpo_test_run(const char* name, bool bug, char* out, size_t capacity);
const char* ptx_machine_open(const char* folder);
void ptx_machine_configure(int landing, uint64_t seed, int measured_rounding, int creation_zeros);
}

namespace {

void run(std::string name) {
    const bool bug = name.back() == '!';
    if (bug) name.pop_back();
    char outcome[4096] = "";
    if (!mmpo_test_run(name.c_str(), bug, outcome, sizeof outcome)) snprintf(outcome, sizeof outcome, "no such case");
    const char* const mark = bug ? "!" : "";
    if (outcome[0] == 0) printf("ok %s%s\n", name.c_str(), mark);
    if (outcome[0] != 0) printf("FAILED %s%s: %s\n", name.c_str(), mark, outcome);
    fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 5) return 2;
    const std::string wrong = ptx_machine_open(arguments[1]);
    if (!wrong.empty()) {
        fprintf(stderr, "%s\n", wrong.c_str());
        return 2;
    }
    ptx_machine_configure(atoi(arguments[2]), strtoull(arguments[3], nullptr, 10), atoi(arguments[4]), 1);
    std::vector<std::string> names(arguments + 5, arguments + count);
    if (names.empty()) {
        for (int number = 0; const char* name = mmpo_test_name(number); ++number) names.push_back(name);
    }
    for (const std::string& name : names) {
        const pid_t child = fork();
        if (child == 0) {
            run(name);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) printf("FAILED %s: ended by signal %d\n", name.c_str(), WTERMSIG(status));
        fflush(stdout);
    }
    return 0;
}
