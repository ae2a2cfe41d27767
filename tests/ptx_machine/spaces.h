// Memory spaces: global memory by allocation, and the shared memory of a block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

// Addresses of shared memory start here, so that null is no address. PTX leaves it open where they start.
constexpr uint32_t kSharedStart = 1024;
// A shared address of another block of the cluster carries the block's rank plus one from this bit on.
constexpr uint32_t kRankShift = 24;
// What a block may have on compute capability 8.0 and 9.0 (CUDA C++ Programming Guide, "Compute Capabilities").
constexpr uint32_t kMostShared80 = 163 * 1024;
constexpr uint32_t kMostShared90 = 227 * 1024;

// Who wrote a byte of global memory. The program zeroes every buffer when it makes it, which hides reads of what
// nothing wrote after that; so those zeros have a mark of their own.
constexpr uint8_t kUnwritten = 0, kWritten = 1, kZeroedAtCreation = 2;

// One allocation of global memory, or a launch's parameters.
struct Allocation {
    uint64_t start = 0;
    uint64_t bytes = 0;
    // A byte each: kUnwritten, kWritten or kZeroedAtCreation.
    uint8_t* written = nullptr;
    bool read_only = false;
    // Nothing was done to it yet.
    bool is_new = true;
};

enum class Access : uint8_t { read, write, update };

// All global memory of the process. Its calls may come from several threads.
class GlobalMemory {
public:
    static GlobalMemory& get();
    // Zeroed pages with nothing readable on either side; 0 where there is no memory.
    uint64_t allocate(uint64_t bytes);
    // False for what is no allocation.
    bool free(uint64_t start);
    // Memory of the host that kernels may read, already written: parameters.
    void lend(const void* start, uint64_t bytes);
    void take_back(const void* start);
    // Copies and fills of the host; an error text, or empty. `d` device side.
    std::string host_write(uint64_t d, uint64_t bytes);
    // As host_write, of a fill with zeros.
    std::string host_zero(uint64_t d, uint64_t bytes);
    std::string host_read(uint64_t d, uint64_t bytes);
    std::string host_copy(uint64_t d, uint64_t s, uint64_t bytes);
    // The allocation that holds the range, or null. The pointer lives until the allocation ends.
    const Allocation* find(uint64_t address, uint64_t bytes);
    // What lies around an address, for messages.
    std::string describe(uint64_t address);
};

// Checks one access of global memory by a kernel, and notes what it writes; a fault otherwise.
void check_global(int lane, uint64_t address, uint32_t bytes, Access access);
// Whether kernels that this thread runs from now on may read what was zeroed at creation and written by nobody since.
void allow_creation_zeros(bool allowed);

struct SharedMemory {
    std::vector<uint8_t> bytes;    // from address 0 on
    std::vector<uint8_t> written;  // a byte each
    uint32_t end = 0;

    void resize(uint32_t end_address);
};

}  // namespace ptx
