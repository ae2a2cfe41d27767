// Attention of one new token over the cache, for generation: out[1, H * E], the query in the cache's last row over rows
// 0 .. length. A row of the cache is a row of qkv: H query heads, K key heads, K value heads.
//
// Assigns out. With one query, keys and values are read once and cannot be reused, so the time is that of reading
// them. The rows are split into chunks that blocks read side by side (flash decoding, Dao et al. 2023). Each block
// leaves its softmax statistics and its weighted sum of values in f32; a second kernel merges the chunks in order.

#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace {

// Rows of a chunk. At 2312 rows, the paper's longest, 9 to 32 heads make 171 to 608 blocks: enough to fill an H100.
constexpr int kChunk = 128;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Rows that a team loads at once; its sums are rescaled once for all of them.
constexpr int kRowsAtOnce = 4;

// The cache's sizes, and what follows from them.
struct CacheShape {
    int length;
    int heads;
    int kv_heads;
    HOST_DEVICE int64_t row_width(int head_size) const { return int64_t(heads + 2 * kv_heads) * head_size; }
    HOST_DEVICE int chunks() const { return int(ceil_div(length, kChunk)); }
};

// Workspace: values[chunks, H, E], then largest[chunks, H], then sum[chunks, H].
struct Partials {
    float* values;
    float* largest;
    float* sum;
};

Partials partials_of(void* workspace, int chunks, int heads, int head_size) {
    float* const values = static_cast<float*>(workspace);
    float* const largest = values + int64_t(chunks) * heads * head_size;
    return Partials{values, largest, largest + int64_t(chunks) * heads};
}

// The softmax over the rows seen so far: the largest score (log2), the sum of 2^(score - largest), and a thread's eight
// columns of the weighted sum of values.
struct State {
    float largest;
    float sum;
    float values[kVector];
};

// 2^(from - to), and 0 if no rows have been seen yet (`from` is -infinity), whatever `to` is.
DEVICE float decay(float from, float to) { return from == -INFINITY ? 0.0f : exp2_approx(from - to); }

DEVICE void rescale(State& state, float largest) {
    const float factor = decay(state.largest, largest);
    state.sum *= factor;
#pragma unroll
    for (int i = 0; i < kVector; ++i) state.values[i] *= factor;
    state.largest = largest;
}

// A team is the E / 8 lanes that together read a row's key (or value) head in one access; neighbouring lanes read
// neighbouring 16 bytes.
template <int kHeadSize>
struct Team {
    static constexpr int kLanes = kHeadSize / kVector;
    static constexpr int kCount = kThreads / kLanes;
};

// Scores (log2) of the rows `first + i * kCount`, -infinity past `end`. Every lane of the team gets them.
template <int kHeadSize>
DEVICE void score_rows(float (&scores)[kRowsAtOnce], const uint4 (&keys)[kRowsAtOnce], const float (&query)[kVector],
                       int first, int end) {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
        float key[kVector];
        unpack8(key, keys[i]);
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kVector; ++j) dot += query[j] * key[j];
#pragma unroll
        for (int lanes = Team<kHeadSize>::kLanes / 2; lanes > 0; lanes /= 2) {
            dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        }
        scores[i] = first + i * Team<kHeadSize>::kCount < end ? dot : -INFINITY;
    }
}

// Adds rows to the state, given their scores and their values (`rows`).
DEVICE void take_in(State& state, const float (&scores)[kRowsAtOnce], const uint4 (&rows)[kRowsAtOnce]) {
    float largest = state.largest;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) largest = fmaxf(largest, scores[i]);
    rescale(state, largest);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
        const float weight = decay(scores[i], largest);
        float value[kVector];
        unpack8(value, rows[i]);
        state.sum += weight;
#pragma unroll
        for (int j = 0; j < kVector; ++j) state.values[j] += weight * value[j];
    }
}

// Merges the teams of a warp; lanes with the same columns end with the same state.
template <int kHeadSize>
DEVICE void merge_teams(State& state) {
#pragma unroll
    for (int lanes = Team<kHeadSize>::kLanes; lanes < kWarp; lanes *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, state.largest, lanes);
        rescale(state, fmaxf(state.largest, other));
        state.sum += __shfl_xor_sync(0xffffffffu, state.sum, lanes);
#pragma unroll
        for (int i = 0; i < kVector; ++i) state.values[i] += __shfl_xor_sync(0xffffffffu, state.values[i], lanes);
    }
}

// Shared memory of a block: the warps' states.
template <int kHeadSize>
struct WarpStates {
    float values[kWarps][kHeadSize];
    float largest[kWarps];
    float sum[kWarps];

    // Call in all lanes of a warp once its teams are merged.
    DEVICE void put(const State& state, int column) {
        const int warp = int(threadIdx.x) / kWarp;
        if (int(lane_id()) < Team<kHeadSize>::kLanes) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) values[warp][column + i] = state.values[i];
        }
        if (lane_id() == 0) {
            largest[warp] = state.largest;
            sum[warp] = state.sum;
        }
    }
};

// Attends to the rows that the thread's team takes of one chunk. `keys` and `values` are the thread's columns in row 0.
template <int kHeadSize>
DEVICE State attend_chunk(const float (&query)[kVector], const bf16* keys, const bf16* values, int64_t row_width,
                          int chunk, int end) {
    using Lanes = Team<kHeadSize>;
    const int team = int(threadIdx.x) / Lanes::kLanes;
    State state = {-INFINITY, 0.0f, {}};
    for (int start = chunk * kChunk; start < end; start += kRowsAtOnce * Lanes::kCount) {
        const int first = start + team;
        uint4 key_rows[kRowsAtOnce], value_rows[kRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            // Rows past the end have weight 0; the last row is loaded in their place.
            const int64_t offset = min(first + i * Lanes::kCount, end - 1) * row_width;
            key_rows[i] = load_128(keys + offset);
            value_rows[i] = load_128(values + offset);
        }
        float scores[kRowsAtOnce];
        score_rows<kHeadSize>(scores, key_rows, query, first, end);
        take_in(state, scores, value_rows);
    }
    return state;
}

// A block has one query head and one chunk of rows. The H / K query heads that share a key head are neighbouring
// blocks, so all but the first find the head's keys and values in L2.
template <int kHeadSize>
__global__ void __launch_bounds__(kThreads)
    decode_chunk_kernel(Partials partials, const bf16* __restrict__ cache, CacheShape shape, float scale) {
    DYNAMIC_SHARED(shared);
    WarpStates<kHeadSize>& warps = *reinterpret_cast<WarpStates<kHeadSize>*>(shared);
    using Lanes = Team<kHeadSize>;
    const int head = int(blockIdx.x);
    const int chunk = int(blockIdx.y);
    const int column = int(threadIdx.x) % Lanes::kLanes * kVector;
    const int kv_head = head / (shape.heads / shape.kv_heads);
    const int64_t row_width = shape.row_width(kHeadSize);
    const bf16* const keys = cache + int64_t(shape.heads + kv_head) * kHeadSize + column;
    const bf16* const values = keys + int64_t(shape.kv_heads) * kHeadSize;

    float query[kVector];
    unpack8(query, load_128(cache + int64_t(shape.length - 1) * row_width + head * kHeadSize + column));
#pragma unroll
    for (int i = 0; i < kVector; ++i) query[i] *= scale * kLog2E;

    const int end = min(shape.length, (chunk + 1) * kChunk);
    State state = attend_chunk<kHeadSize>(query, keys, values, row_width, chunk, end);
    merge_teams<kHeadSize>(state);
    warps.put(state, column);
    __syncthreads();

    if (int(threadIdx.x) >= kHeadSize) return;
    float largest = -INFINITY, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) largest = fmaxf(largest, warps.largest[other]);
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
        const float factor = decay(warps.largest[other], largest);
        sum += factor * warps.sum[other];
        value += factor * warps.values[other][threadIdx.x];
    }
    const int64_t slot = int64_t(chunk) * shape.heads + head;
    partials.values[slot * kHeadSize + threadIdx.x] = value;
    if (threadIdx.x == 0) {
        partials.largest[slot] = largest;
        partials.sum[slot] = sum;
    }
}

// A block merges the chunks of one query head, a thread those of one column.
template <int kHeadSize>
__global__ void __launch_bounds__(kHeadSize)
    merge_chunks_kernel(bf16* __restrict__ out, Partials partials, int chunks, int heads) {
    const int head = int(blockIdx.x);
    float largest = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk)
        largest = fmaxf(largest, partials.largest[int64_t(chunk) * heads + head]);
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t slot = int64_t(chunk) * heads + head;
        const float factor = decay(partials.largest[slot], largest);
        sum += factor * partials.sum[slot];
        value += factor * partials.values[slot * kHeadSize + threadIdx.x];
    }
    out[head * kHeadSize + threadIdx.x] = to_bf16(value / sum);
}

template <int kHeadSize>
mmpo_status launch_decode(bf16* out, void* workspace, const bf16* cache, const CacheShape& shape, float scale,
                          mmpo_stream stream) {
    const Partials partials = partials_of(workspace, shape.chunks(), shape.heads, kHeadSize);
    const dim3 grid(unsigned(shape.heads), unsigned(shape.chunks()));
    const mmpo_status status = LAUNCH(decode_chunk_kernel<kHeadSize>, grid, kThreads, sizeof(WarpStates<kHeadSize>),
                                      cuda_stream(stream), partials, cache, shape, scale);
    if (status != kSuccess) return status;
    return LAUNCH(merge_chunks_kernel<kHeadSize>, unsigned(shape.heads), kHeadSize, 0, cuda_stream(stream), out,
                  partials, shape.chunks(), shape.heads);
}

}  // namespace

int64_t MMPO_EXPORT(attention_decode_workspace)(int32_t length, int32_t heads, int32_t kv_heads, int32_t head_size) {
    const CacheShape shape{length, heads, kv_heads};
    return int64_t(shape.chunks()) * heads * (head_size + 2) * int64_t(sizeof(float));
}

mmpo_status MMPO_EXPORT(attention_decode)(bf16* out, void* workspace, const bf16* cache, int32_t length, int32_t heads,
                                          int32_t kv_heads, int32_t head_size, float scale, mmpo_stream stream) {
    if (length == 0 || heads == 0) return kSuccess;
    if (kv_heads == 0 || heads % kv_heads != 0) return kInvalidValue;
    const CacheShape shape{length, heads, kv_heads};
    switch (head_size) {
        case 64:
            return launch_decode<64>(out, workspace, cache, shape, scale, stream);
        case 128:
            return launch_decode<128>(out, workspace, cache, shape, scale, stream);
        default:
            return kInvalidValue;
    }
}
