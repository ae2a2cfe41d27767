// layouts [CASE...]
//
// Runs the emulated device's own cases, all of them if none is named, on a GPU of compute capability 9.0: whatever fails here
// and passes there is a misreading of the PTX ISA that kernel and emulated device may share. Exit code 1 if any fails.
//
// Each case has a process of its own: a fault in a kernel ends a process's use of the GPU, and a misread barrier never returns.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

extern "C" {
const char* mmpo_test_name(int number);
bool mmpo_test_run(const char* name, bool bug, char* out, size_t capacity);
}

namespace {

constexpr unsigned kSecondsPerCase = 60;

// Runs one case in this process: prints what went wrong, and returns the exit code.
int run_case(const char* name) {
    char outcome[4096] = "";
    alarm(kSecondsPerCase);
    if (!mmpo_test_run(name, false, outcome, sizeof outcome)) snprintf(outcome, sizeof outcome, "there is no such case");
    if (outcome[0] == 0) return 0;
    printf("FAILED %s: %s\n", name, outcome);
    fflush(stdout);
    return 1;
}

bool passes(const char* name) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(run_case(name));
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) {
        printf("FAILED %s: cannot start a process\n", name);
        return false;
    }
    if (WIFSIGNALED(status)) {
        const bool late = WTERMSIG(status) == SIGALRM;
        printf("FAILED %s: ended by signal %d%s\n", name, WTERMSIG(status), late ? ", because it did not come to an end" : "");
        return false;
    }
    if (WEXITSTATUS(status) != 0) return false;
    printf("ok %s\n", name);
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> names(arguments + 1, arguments + count);
    if (names.empty()) {
        for (int i = 0; const char* name = mmpo_test_name(i); ++i) names.push_back(name);
    }
    size_t passed = 0;
    for (const std::string& name : names) passed += passes(name.c_str());
    printf("%zu of %zu cases are as on the emulated device\n", passed, names.size());
    return passed == names.size() ? 0 : 1;
}
