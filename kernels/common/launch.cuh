// Launch geometry, and what every launcher needs: how work is cut into blocks, and the checks that choose a kernel.
#pragma once

#include "device.cuh"
#include "limits.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

constexpr int kWarp = 32;
// Threads of a block unless there is a reason for another number: eight warps hide each other's latency, and the number
// divides a multiprocessor's 2048 threads.
constexpr int kBlock = 256;
constexpr int kBlockWarps = kBlock / kWarp;
// bf16 values of one vector: 16 bytes, the widest access that a thread can make.
constexpr int kVector = 8;
// The same for f32.
constexpr int kVectorF32 = 4;

constexpr mmpo_status kSuccess = 0;
// cudaErrorInvalidValue, so that error_text can name it.
constexpr mmpo_status kInvalidValue = 1;

HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline cudaStream_t cuda_stream(mmpo_stream stream) { return static_cast<cudaStream_t>(stream); }

// Whether rows of `width` bf16 values that lie back to back, the first on a 16-byte boundary, all start on one.
inline bool vector_rows(int width) { return width % kVector == 0; }

// Whether all of `pointers` allow 16-byte accesses.
template <class... Pointers>
HOST_DEVICE bool vector_aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// ---- matrices, by warp tiles
//
// A warp owns kVectors vectors a lane of one row. So a block needs no barrier, rows of any width leave lanes idle only
// in their last tile, and each lane has kVectors loads of 16 bytes under way.

// Columns of a warp tile.
template <int kVectors>
constexpr int kTileColumns = kVectors * kWarp * kVector;

struct WarpTile {
    int row;
    // First column of this lane's vector 0; vector v starts v * kVectorStride further on.
    int column;
};
// Columns between two vectors of a lane: neighbouring lanes access neighbouring 16 bytes.
constexpr int kVectorStride = kWarp * kVector;

// Blocks that cover `rows` x `width` with warp tiles.
template <int kVectors>
unsigned warp_tile_blocks(int rows, int width) {
    return unsigned(ceil_div(rows * ceil_div(width, kTileColumns<kVectors>), kBlockWarps));
}

// The tile of the calling warp. In warps that are left over, its row is past the end.
template <int kVectors>
DEVICE WarpTile warp_tile(int width) {
    const unsigned tiles = unsigned(ceil_div(width, kTileColumns<kVectors>));
    const unsigned warp = blockIdx.x * kBlockWarps + threadIdx.x / kWarp;
    return WarpTile{int(warp / tiles), int(warp % tiles) * kTileColumns<kVectors> + int(lane_id()) * kVector};
}

// ---- flat arrays: a thread owns one vector

template <int kValues = kVector>
unsigned flat_blocks(int64_t length) {
    return unsigned(ceil_div(length, int64_t(kBlock) * kValues));
}

// The first value of the calling thread's vector.
template <int kValues = kVector>
DEVICE int64_t flat_index() {
    return (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kValues;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
