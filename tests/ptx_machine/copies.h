// What asynchronous copies share.
#pragma once

#include "memory.h"

namespace ptx {

// Notes a copy by the async proxy from global to `bytes` of shared memory at `address` of block `block`, which
// completes `bytes` on the mbarrier there. `move` writes the bytes; it runs when the copy lands.
void start_load(Warp& warp, int lane, Block& block, uint32_t address, uint32_t bytes, uint32_t mbarrier,
                std::function<void()> move);
// Notes a store by the async proxy. `read` takes the source out of shared memory, `write` brings it to global memory.
void start_store(Warp& warp, int lane, uint32_t address, uint32_t bytes, std::function<void()> read,
                 std::function<void()> write);
// Adds an element of this many bytes to global memory: f32 where 4, bf16 where 2.
void add_element(uint64_t address, const uint8_t* value, uint32_t bytes);

}  // namespace ptx
