// Rotary positions (Su et al. 2021) on the H query and K key heads of qkv[T, (H + 2K) * E], in place.
//
// The pair (i, i + E/2) of a head is rotated by the angle of its position, as in Hugging Face checkpoints. So the two
// values of a pair lie half a head apart, and both halves are read and written 16 bytes at a time. The backward of a
// rotation is its inverse. Scaling (linear, llama3) is part of the table of angles, not of this kernel. Value heads are
// never touched.
//
// NOTE: this is a kernel of its own rather than part of attention's loads. Attention copies a key for every tile of
// queries that sees it, 2 to 15 times at usual lengths, and by TMA, which bypasses the registers in which it could be
// rotated; and the backward pass needs rotated queries and keys again. The kernel moves 4 (H + K) E bytes per token,
// which takes about a hundredth of the time of that token's gemms (docs/kernels/attention_forward.md). Where it would
// cost nothing is the epilogue of the gemm that makes qkv.

#include "common/vector.cuh"

namespace {

// Heads that a thread rotates with the cosines and sines it has read: their 64 bytes serve 128 bytes of heads, and
// eight loads of 16 bytes are under way. 4 divides H + K for all four models of the paper.
constexpr int kHeads = 4;

// What a thread rotates: the pairs `pair .. pair + 8` of the heads `head .. head + 4` of a row.
struct RopeItem {
    int row, head, pair;
};

struct RopeShape {
    int rows;
    // H + K; these heads lie side by side at the start of a row.
    int turned_heads;
    int head_size;
    int64_t row_width;

    HOST_DEVICE int pair_vectors() const { return int(ceil_div(head_size / 2, kVector)); }
    HOST_DEVICE int head_groups() const { return int(ceil_div(turned_heads, kHeads)); }
    HOST_DEVICE int64_t items() const { return int64_t(rows) * head_groups() * pair_vectors(); }
    // Neighbouring threads have neighbouring vectors of a head; then follow the next heads.
    DEVICE RopeItem item(unsigned number) const {
        const unsigned vectors = unsigned(pair_vectors()), groups = unsigned(head_groups());
        const unsigned group = number / vectors;
        return RopeItem{int(group / groups), int(group % groups) * kHeads, int(number % vectors) * kVector};
    }
};

// Rotates one vector of pairs in place: (a, b) becomes (a cos - b sin, b cos + a sin).
DEVICE void rotate(uint4& low, uint4& high, const float (&cosine)[kVector], const float (&sine)[kVector]) {
    float a[kVector], b[kVector];
    unpack8(a, low);
    unpack8(b, high);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        const float turned = a[i] * cosine[i] - b[i] * sine[i];
        b[i] = b[i] * cosine[i] + a[i] * sine[i];
        a[i] = turned;
    }
    low = pack8(a);
    high = pack8(b);
}

template <bool kVectorized>
__global__ void __launch_bounds__(kBlock)
    rope_kernel(bf16* __restrict__ qkv, const float* __restrict__ table, const uint32_t* __restrict__ positions,
                RopeShape shape, float direction) {
    const unsigned number = blockIdx.x * kBlock + threadIdx.x;
    if (number >= shape.items()) return;
    const RopeItem item = shape.item(number);
    const int half = shape.head_size / 2;
    bf16* const heads = qkv + item.row * shape.row_width + item.head * shape.head_size;

    uint4 low[kHeads], high[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        const int width = item.head + h < shape.turned_heads ? half : 0;
        low[h] = load8<kVectorized>(heads + h * shape.head_size, item.pair, width);
        high[h] = load8<kVectorized>(heads + h * shape.head_size + half, item.pair, width);
    }
    const float* const angles = table + int64_t(positions[item.row]) * shape.head_size;
    float cosine[kVector], sine[kVector];
    load8<kVectorized>(cosine, angles, item.pair, half);
    load8<kVectorized>(sine, angles + half, item.pair, half);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sine[i] *= direction;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        const int width = item.head + h < shape.turned_heads ? half : 0;
        rotate(low[h], high[h], cosine, sine);
        store8<kVectorized>(heads + h * shape.head_size, item.pair, width, low[h]);
        store8<kVectorized>(heads + h * shape.head_size + half, item.pair, width, high[h]);
    }
}

}  // namespace

mmpo_status MMPO_EXPORT(rope)(bf16* qkv, const float* table, const uint32_t* positions, int32_t rows, int32_t heads,
                              int32_t kv_heads, int32_t head_size, int32_t direction, mmpo_stream stream) {
    if (head_size % 2 != 0) return kInvalidValue;
    const RopeShape shape{rows, heads + kv_heads, head_size, int64_t(heads + 2 * kv_heads) * head_size};
    if (shape.items() == 0) return kSuccess;
    if (shape.items() > int64_t(0xffffffffu) - kBlock) return kInvalidValue;
    const float turn = direction == MMPO_ROPE_BACKWARD ? -1.0f : 1.0f;
    const unsigned blocks = unsigned(ceil_div(shape.items(), kBlock));
    return vector_rows(head_size / 2)
               ? LAUNCH(rope_kernel<true>, blocks, kBlock, 0, cuda_stream(stream), qkv, table, positions, shape, turn)
               : LAUNCH(rope_kernel<false>, blocks, kBlock, 0, cuda_stream(stream), qkv, table, positions, shape, turn);
}
