// Launch geometry and what every launcher needs: how work is cut into blocks, and the checks that choose a kernel.
#pragma once

#include "device.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kWarp = 32;
// Threads of a block where nothing speaks for another number: eight warps hide each other's latency, and a
// multiprocessor's 2048 threads divide by it.
constexpr int kBlock = 256;
constexpr int kBlockWarps = kBlock / kWarp;
// Values of one vector: 16 bytes of bf16, the widest access a thread can make.
constexpr int kVector = 8;
// The same of f32.
constexpr int kVectorF32 = 4;

constexpr mmpo_status kSuccess = 0;
// cudaErrorInvalidValue, by which error_text names it.
constexpr mmpo_status kInvalidValue = 1;

HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline cudaStream_t cuda_stream(mmpo_stream stream) { return static_cast<cudaStream_t>(stream); }

// Whether rows of `width` bf16 (or f32) values, back to back from a 16-byte boundary, all start on one.
inline bool vector_rows(int width) { return width % kVector == 0; }

// Whether 16-byte accesses are allowed at all of `pointers`.
template <class... Pointers>
HOST_DEVICE bool vector_aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// ---- Matrices by warp tiles: a warp owns kVectors vectors a lane of one row, so a block needs no barrier, rows of any
// width keep all lanes busy but in a row's last tile, and kVectors loads of 16 bytes are under way in each lane.

// Columns of a warp tile.
template <int kVectors>
constexpr int kTileColumns = kVectors * kWarp * kVector;

struct WarpTile {
    int row;
    // First column of this lane's vector 0; vector v starts kVectorStride * v further on.
    int column;
};
// Columns between two vectors of a lane: neighbouring lanes touch neighbouring 16 bytes.
constexpr int kVectorStride = kWarp * kVector;

// Blocks that cover `rows` x `width` with warp tiles.
template <int kVectors>
unsigned warp_tile_blocks(int rows, int width) {
    return unsigned(ceil_div(rows * ceil_div(width, kTileColumns<kVectors>), kBlockWarps));
}

// The tile of the calling warp; its row is past the end in warps that are left over.
template <int kVectors>
DEVICE WarpTile warp_tile(int width) {
    const unsigned tiles = unsigned(ceil_div(width, kTileColumns<kVectors>));
    const unsigned warp = blockIdx.x * kBlockWarps + threadIdx.x / kWarp;
    return WarpTile{int(warp / tiles), int(warp % tiles) * kTileColumns<kVectors> + int(lane_id()) * kVector};
}

// ---- Flat arrays: a thread owns one vector.

template <int kValues = kVector>
unsigned flat_blocks(int64_t length) {
    return unsigned(ceil_div(length, int64_t(kBlock) * kValues));
}

// First value of the calling thread's vector.
template <int kValues = kVector>
DEVICE int64_t flat_index() {
    return (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kValues;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
