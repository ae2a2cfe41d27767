// layouts [CASE...]
//
// Runs the emulated device's own cases, all of them if none is named, on a GPU of compute capability 9.0: whatever fails here
// and passes there is a misreading of the PTX ISA that kernel and emulated device may share. Exit code 1 if any fails.
//
// Each case has a process of its own: a fault in a kernel ends a process's use of the GPU, and a misread barrier never returns.
// Several run at once, because most of a process's time goes into its start.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

extern "C" {
const char* mmpo_test_name(int number);
bool mmpo_test_run(const char* name, bool bug, char* out, size_t capacity);
}

namespace {

constexpr unsigned kSecondsPerCase = 15;
constexpr size_t kAtOnce = 8;

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

pid_t start(const char* name) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(run_case(name));
    return child;
}

// Whether the case of a process that came to an end has passed; a case that failed has said so itself.
bool passed(const char* name, int status) {
    if (WIFSIGNALED(status)) {
        const bool late = WTERMSIG(status) == SIGALRM;
        printf("FAILED %s: ended by signal %d%s\n", name, WTERMSIG(status), late ? ", because it did not come to an end" : "");
        return false;
    }
    if (WEXITSTATUS(status) != 0) return false;
    printf("ok %s\n", name);
    return true;
}

// Runs all cases, and returns how many passed.
size_t run_all(const std::vector<std::string>& names) {
    std::map<pid_t, std::string> running;
    size_t next = 0, good = 0;
    while (next < names.size() || !running.empty()) {
        if (next < names.size() && running.size() < kAtOnce) {
            const std::string& name = names[next++];
            const pid_t child = start(name.c_str());
            if (child > 0) {
                running[child] = name;
            } else {
                printf("FAILED %s: cannot start a process\n", name.c_str());
            }
            continue;
        }
        int status = 0;
        const pid_t child = wait(&status);
        if (child < 0) break;
        good += passed(running[child].c_str(), status);
        running.erase(child);
    }
    return good;
}

}  // namespace

int main(int count, char** arguments) {
    std::vector<std::string> names(arguments + 1, arguments + count);
    if (names.empty()) {
        for (int i = 0; const char* name = mmpo_test_name(i); ++i) names.push_back(name);
    }
    const size_t good = run_all(names);
    printf("%zu of %zu cases are as on the emulated device\n", good, names.size());
    return good == names.size() ? 0 : 1;
}
