// The stream of the emulated device, as src/device/cuda/backend_emulated.rs declares it (`EmulatedStream`): a queue
// that keeps work until something waits for it.

#pragma once

#include <cstdint>

extern "C" {

struct mmpo_emulated_stream {
    // `kEmulatedStreamMagic`: tells such a stream from anything else that a pointer may lead to.
    uint64_t magic;
    // Puts `run(argument, races)` at the end of the queue, which calls it exactly once, on any thread. `races` is 1
    // where the work is not ordered after everything that the device was given before it: it must move bytes 0xff in
    // place of values.
    void (*enqueue)(mmpo_emulated_stream* stream, void (*run)(void* argument, int races), void* argument);
};

}  // extern "C"

constexpr uint64_t kEmulatedStreamMagic = 0x6d6d706f5f737472;
