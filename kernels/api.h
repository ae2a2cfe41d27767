/* The whole C interface between Rust and the kernels: one launcher for each operation of the Device trait.
 *
 * Plain C with no system header but stdint, so that bindgen needs no CUDA headers. `tools/bindings` turns this file
 * into src/device/cuda/bindings/; run `cargo run -p bindings` after a change here.
 *
 * Three builds of every launcher can be linked side by side; MMPO_EXPORT (common/variant.h) gives each its own names.
 *
 * Legend: T tokens of a packed batch, N scored tokens, D hidden width, F MLP width, V vocabulary, H query heads,
 * K key/value heads, E head size. Matrices are row-major, without gaps between rows.
 *
 * Order of arguments: outputs, what is updated, workspace, inputs, sizes, stream. "Assigns" means that the old contents
 * are never read; "accumulates" means +=. Outputs and inputs never overlap unless an operation says "in place".
 *
 * Pointers are device memory, except where a comment says host. A buffer starts on a 256-byte boundary, and a pointer
 * given to a launcher points to the start of one of its rows. So 16-byte accesses are allowed exactly if a row's bytes
 * are a multiple of 16; every launcher also takes widths for which they are not. Sizes may be 0, and the launcher then
 * does nothing. Products of sizes may exceed 32 bits. Arithmetic, statistics and accumulators are f32 unless a comment
 * says otherwise.
 *
 * Launchers queue work on `stream` and return at once: 0 on success, otherwise an error code whose text `error_text`
 * gives. They allocate nothing and never wait. The same inputs give the same bits, launch after launch, except where a
 * comment says otherwise.
 */
#ifndef MMPO_API_H
#define MMPO_API_H

#include <stdint.h>

#include "common/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The bits of a bfloat16: the kernels' own `bf16`, and `half::bf16` in Rust. */
typedef struct mmpo_bf16 {
    uint16_t bits;
} mmpo_bf16;

/* A CUstream, which is the same as a cudaStream_t. NULL on the emulated device, whose launchers return when the work is
 * done. */
typedef struct CUstream_st* mmpo_stream;

/* 0 is success; 1 (as cudaErrorInvalidValue) means a shape or argument that the launcher does not support. */
typedef int32_t mmpo_status;

/* The text of a status, valid until the next call on this thread. On the emulated device it is the report of the last
 * failed launch: what went wrong, in which kernel, block and thread, at which line. Never NULL. */
const char* MMPO_EXPORT(error_text)(mmpo_status status);

/* ---- memory.cu */

/* Assigns 0 to `bytes` bytes, of any alignment. */
mmpo_status MMPO_EXPORT(zero)(void* out, int64_t bytes, mmpo_stream stream);

/* One of the tensors that a launcher takes many of at once: `length` values in device memory. */
typedef struct mmpo_floats {
    float* values;
    int64_t length;
} mmpo_floats;

/* Assigns 0 to all values of all tensors. `tensors` is in host memory and is read during the call only. */
mmpo_status MMPO_EXPORT(zero_all)(const mmpo_floats* tensors, int32_t count, mmpo_stream stream);

/* The types of numbers in a checkpoint. */
enum mmpo_storage { MMPO_STORAGE_F32 = 0, MMPO_STORAGE_F16 = 1, MMPO_STORAGE_BF16 = 2 };

/* Assigns out[length] = source[length], f32 or f16, rounded to nearest even; bf16 is copied, not cast. `source` is
 * aligned to its numbers. */
mmpo_status MMPO_EXPORT(cast_to_bf16)(mmpo_bf16* out, const void* source, int32_t storage, int64_t length,
                                      mmpo_stream stream);

/* ---- accumulate.cu */

/* Accumulates out[length] += source[length]; `out` is f32 or bf16, as `storage` says. A bf16 sum is formed in f32 and
 * rounded to nearest even. Each array is aligned to its numbers. */
mmpo_status MMPO_EXPORT(accumulate)(void* out, const float* source, int32_t storage, int64_t length,
                                    mmpo_stream stream);

/* ---- embedding.cu */

/* Assigns out[T, D] = table[token_ids[T], :]. */
mmpo_status MMPO_EXPORT(embedding_forward)(mmpo_bf16* out, const mmpo_bf16* table, const uint32_t* token_ids,
                                           int32_t rows, int32_t width, mmpo_stream stream);

/* Accumulates dtable[V, D] (f32) += scatter(dout[T, D]). `rows_by_token[T]` lists the rows sorted by token id, and by
 * row within one token. One block sums the rows of a token in that order, so there are no atomics. */
mmpo_status MMPO_EXPORT(embedding_backward)(float* dtable, const mmpo_bf16* dout, const uint32_t* token_ids,
                                            const uint32_t* rows_by_token, int32_t rows, int32_t width,
                                            mmpo_stream stream);

/* ---- rms_norm.cu */

/* Assigns out[rows, D] = x * rstd * weight[D] and rstd[rows] = rsqrt(mean(x^2) + epsilon). */
mmpo_status MMPO_EXPORT(rms_norm_forward)(mmpo_bf16* out, float* rstd, const mmpo_bf16* x, const mmpo_bf16* weight,
                                          int32_t rows, int32_t width, float epsilon, mmpo_stream stream);

/* Assigns sum[rows, D] = x + delta (rounded to bf16), then out and rstd as rms_norm_forward of the rounded sum. */
mmpo_status MMPO_EXPORT(add_rms_norm_forward)(mmpo_bf16* sum, mmpo_bf16* out, float* rstd, const mmpo_bf16* x,
                                              const mmpo_bf16* delta, const mmpo_bf16* weight, int32_t rows,
                                              int32_t width, float epsilon, mmpo_stream stream);

/* Assigns sum[length] = x + delta. All three start on 16-byte boundaries. */
mmpo_status MMPO_EXPORT(add)(mmpo_bf16* sum, const mmpo_bf16* x, const mmpo_bf16* delta, int64_t length,
                             mmpo_stream stream);

/* The bytes of `workspace` that rms_norm_backward needs for these sizes. A pure function on the host. */
int64_t MMPO_EXPORT(rms_norm_backward_workspace)(int32_t rows, int32_t width);

/* Accumulates dx[rows, D] += rstd * (g - x * rstd^2 * mean(g * x)) with g = dout * weight, and
 * dweight[D] (f32) += the sum over rows of dout * x * rstd, unless dweight is NULL. Blocks leave partial sums in
 * `workspace`, which a second kernel adds in a fixed order. */
mmpo_status MMPO_EXPORT(rms_norm_backward)(mmpo_bf16* dx, float* dweight, void* workspace, const mmpo_bf16* dout,
                                           const mmpo_bf16* x, const mmpo_bf16* weight, const float* rstd, int32_t rows,
                                           int32_t width, mmpo_stream stream);

/* ---- rope.cu */

enum mmpo_rope_direction { MMPO_ROPE_FORWARD = 0, MMPO_ROPE_BACKWARD = 1 };

/* Rotates the H query and K key heads of qkv[T, (H + 2K) * E] in place. Pairs are (i, i + E/2), as in Hugging Face
 * checkpoints. table[.., E] (f32) holds E/2 cosines, then E/2 sines, of each position. Backward is the inverse. */
mmpo_status MMPO_EXPORT(rope)(mmpo_bf16* qkv, const float* table, const uint32_t* positions, int32_t rows,
                              int32_t heads, int32_t kv_heads, int32_t head_size, int32_t direction,
                              mmpo_stream stream);

/* ---- swiglu.cu */

/* Assigns out[T, F] = silu(gate) * up, where a row of gate_up[T, 2F] is F gate values, then F up values. */
mmpo_status MMPO_EXPORT(swiglu_forward)(mmpo_bf16* out, const mmpo_bf16* gate_up, int32_t rows, int32_t width,
                                        mmpo_stream stream);

/* Assigns dgate_up[T, 2F] from dout[T, F]. */
mmpo_status MMPO_EXPORT(swiglu_backward)(mmpo_bf16* dgate_up, const mmpo_bf16* dout, const mmpo_bf16* gate_up,
                                         int32_t rows, int32_t width, mmpo_stream stream);

/* ---- linear.cu: gemms on mma.sync, of any sizes; real GPUs use cuBLASLt if it is installed */

/* Assigns out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T + bias[outputs]; bias may be NULL. */
mmpo_status MMPO_EXPORT(linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                        const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                        mmpo_stream stream);

/* Assigns dx[rows, inputs] = dout[rows, outputs] * weight[outputs, inputs]. */
mmpo_status MMPO_EXPORT(linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                               int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream);

/* As linear_backward_input, but accumulates in f32:
 * dx[rows, inputs] (f32) += dout[rows, outputs] * weight[outputs, inputs]. */
mmpo_status MMPO_EXPORT(linear_backward_input_f32)(float* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                   int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream);

/* Accumulates dweight[outputs, inputs] (f32) += dout[rows, outputs]^T * x[rows, inputs]. */
mmpo_status MMPO_EXPORT(linear_backward_weight)(float* dweight, const mmpo_bf16* dout, const mmpo_bf16* x, int32_t rows,
                                                int32_t inputs, int32_t outputs, mmpo_stream stream);

/* ---- linear_sm90.cu: the same on wgmma and TMA
 *
 * Inputs and outputs must be multiples of 8, and arrays must start on 16-byte boundaries. Otherwise the launcher
 * returns status 1, and linear.cu's must be used. `tile` is the number of a tile shape, or MMPO_PLANNED_TILE. */

#define MMPO_PLANNED_TILE (-1)

/* The number of tile shapes. */
int32_t MMPO_EXPORT(gemm_tiles_sm90)(void);

mmpo_status MMPO_EXPORT(linear_forward_sm90)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                             const mmpo_bf16* bias, int32_t rows, int32_t inputs, int32_t outputs,
                                             int32_t tile, mmpo_stream stream);

/* Assigns gate_up[rows, 2F] = x[rows, inputs] * weight[2F, inputs]^T + bias[2F], then out[rows, F] as swiglu_forward of
 * it. bias may be NULL. F is `width`, a multiple of 8 too. */
mmpo_status MMPO_EXPORT(linear_swiglu_forward_sm90)(mmpo_bf16* out, mmpo_bf16* gate_up, const mmpo_bf16* x,
                                                    const mmpo_bf16* weight, const mmpo_bf16* bias, int32_t rows,
                                                    int32_t inputs, int32_t width, mmpo_stream stream);

mmpo_status MMPO_EXPORT(linear_backward_input_sm90)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                    int32_t rows, int32_t inputs, int32_t outputs, int32_t tile,
                                                    mmpo_stream stream);

/* The bytes of `workspace` that the launcher of this name needs for these sizes: 0, unless it splits the depth
 * (outputs, or rows) and keeps partial sums. Pure functions on the host. */
int64_t MMPO_EXPORT(linear_backward_input_f32_sm90_workspace)(int32_t rows, int32_t inputs, int32_t outputs,
                                                              int32_t tile);
int64_t MMPO_EXPORT(linear_backward_weight_sm90_workspace)(int32_t rows, int32_t inputs, int32_t outputs, int32_t tile);

mmpo_status MMPO_EXPORT(linear_backward_input_f32_sm90)(float* dx, void* workspace, const mmpo_bf16* dout,
                                                        const mmpo_bf16* weight, int32_t rows, int32_t inputs,
                                                        int32_t outputs, int32_t tile, mmpo_stream stream);

mmpo_status MMPO_EXPORT(linear_backward_weight_sm90)(float* dweight, void* workspace, const mmpo_bf16* dout,
                                                     const mmpo_bf16* x, int32_t rows, int32_t inputs, int32_t outputs,
                                                     int32_t tile, mmpo_stream stream);

/* How a gemm out[M, N] of depth K is cut: into tiles block_m x block_n, by clusters of 1 or 2 blocks whose tiles lie
 * one below the other; the depth into `splits` parts; tile_group rows of tiles are walked together. `efficiency`
 * estimates the share of an H100's tensor-core time that does useful work. */
typedef struct mmpo_gemm_plan {
    int32_t block_m;
    int32_t block_n;
    int32_t cluster;
    int32_t splits;
    int32_t tile_group;
    double efficiency;
} mmpo_gemm_plan;

/* A pure function on the host. may_split is 0 or 1: whether the depth may be split. Returns zeros for a tile that does
 * not exist. */
mmpo_gemm_plan MMPO_EXPORT(gemm_plan_sm90)(int32_t shape_m, int32_t shape_n, int32_t shape_k, int32_t may_split,
                                           int32_t tile);

/* ---- linear_bias.cu */

/* The bytes of `workspace` that linear_bias_backward needs for these sizes. A pure function on the host. */
int64_t MMPO_EXPORT(linear_bias_backward_workspace)(int32_t rows, int32_t outputs);

/* Accumulates dbias[outputs] (f32) += the column sums of dout[rows, outputs], in a fixed order. */
mmpo_status MMPO_EXPORT(linear_bias_backward)(float* dbias, void* workspace, const mmpo_bf16* dout, int32_t rows,
                                              int32_t outputs, mmpo_stream stream);

/* ---- low_rank.cu: what a low-rank adapter (LoRA) adds to a linear layer, on mma.sync
 *
 * `out` and `dout` have rows of out_width values and `inner` and `dinner` rows of inner_width, of which the module's
 * `outputs` or `rank` values begin at the address that is given. b is [outputs, rank]. */

/* Assigns inner[rows, inner_width] = keep_scale * dropped * a[inner_width, inputs]^T, where `dropped` is x[rows,
 * inputs] with 0 where 32 bits of the hash of `key` and the value's index lie below `threshold`. The hash is SplitMix64
 * at position index / 2; an even index has its low half, an odd one its high half. The sums are multiplied in f32. */
mmpo_status MMPO_EXPORT(low_rank_inner)(mmpo_bf16* inner, const mmpo_bf16* x, const mmpo_bf16* a, int32_t rows,
                                        int32_t inputs, int32_t inner_width, uint64_t key, uint32_t threshold,
                                        float keep_scale, mmpo_stream stream);

/* Accumulates da[inner_width, inputs] (f32) += keep_scale * dinner[rows, inner_width]^T * dropped, as above. */
mmpo_status MMPO_EXPORT(low_rank_inner_backward_weight)(float* da, const mmpo_bf16* dinner, const mmpo_bf16* x,
                                                        int32_t rows, int32_t inputs, int32_t inner_width, uint64_t key,
                                                        uint32_t threshold, float keep_scale, mmpo_stream stream);

/* Accumulates out += scale * inner * b^T, rounded to bf16 after the sum. */
mmpo_status MMPO_EXPORT(low_rank_forward)(mmpo_bf16* out, const mmpo_bf16* inner, const mmpo_bf16* b, int32_t rows,
                                          int32_t rank, int32_t outputs, int32_t out_width, int32_t inner_width,
                                          float scale, mmpo_stream stream);

/* Assigns dinner = scale * dout * b. */
mmpo_status MMPO_EXPORT(low_rank_backward_input)(mmpo_bf16* dinner, const mmpo_bf16* dout, const mmpo_bf16* b,
                                                 int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                 int32_t inner_width, float scale, mmpo_stream stream);

/* Accumulates db[outputs, rank] (f32) += scale * dout^T * inner. */
mmpo_status MMPO_EXPORT(low_rank_backward_weight)(float* db, const mmpo_bf16* dout, const mmpo_bf16* inner,
                                                  int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                  int32_t inner_width, float scale, mmpo_stream stream);

/* Accumulates dx[rows, inputs] += dropout(dout[rows, outputs] * weight[outputs, inputs]), rounded to bf16 after the
 * sum. For `threshold` and `keep_scale` see `low_rank_inner`; a threshold of 0 drops nothing. */
mmpo_status MMPO_EXPORT(linear_backward_input_add)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                   int32_t rows, int32_t inputs, int32_t outputs, uint64_t key,
                                                   uint32_t threshold, float keep_scale, mmpo_stream stream);

/* ---- low_rank_sm90.cu: the same products on Hopper
 *
 * All sizes but `rows` are multiples of 8, and addresses of 16 bytes. */

/* As low_rank_inner; with a threshold of 0 it is a product without dropout, and keep_scale is not used. */
mmpo_status MMPO_EXPORT(low_rank_inner_sm90)(mmpo_bf16* inner, const mmpo_bf16* x, const mmpo_bf16* a, int32_t rows,
                                             int32_t inputs, int32_t inner_width, uint64_t key, uint32_t threshold,
                                             float keep_scale, mmpo_stream stream);

/* The bytes of `workspace` that low_rank_inner_backward_weight_sm90 needs. A pure function on the host. */
int64_t MMPO_EXPORT(low_rank_inner_backward_weight_sm90_workspace)(int32_t rows, int32_t inputs, int32_t inner_width,
                                                                   int32_t tile);

/* As low_rank_inner_backward_weight. Where its tiles are few the rows are summed in parts, which a second kernel adds
 * in order. `tile`: as for linear_sm90.cu, where the shape has 64 or 128 rows and 128 columns; others leave the choice
 * to the plan. */
mmpo_status MMPO_EXPORT(low_rank_inner_backward_weight_sm90)(float* da, void* workspace, const mmpo_bf16* dinner,
                                                             const mmpo_bf16* x, int32_t rows, int32_t inputs,
                                                             int32_t inner_width, uint64_t key, uint32_t threshold,
                                                             float keep_scale, int32_t tile, mmpo_stream stream);

/* As low_rank_backward_input. */
mmpo_status MMPO_EXPORT(low_rank_backward_input_sm90)(mmpo_bf16* dinner, const mmpo_bf16* dout, const mmpo_bf16* b,
                                                      int32_t rows, int32_t rank, int32_t outputs, int32_t out_width,
                                                      int32_t inner_width, float scale, mmpo_stream stream);

/* The bytes of `workspace` that low_rank_backward_weight_sm90 needs. A pure function on the host. */
int64_t MMPO_EXPORT(low_rank_backward_weight_sm90_workspace)(int32_t rows, int32_t rank, int32_t outputs);

/* As low_rank_backward_weight. With few outputs the rows are summed in parts, which a second kernel adds in order. */
mmpo_status MMPO_EXPORT(low_rank_backward_weight_sm90)(float* db, void* workspace, const mmpo_bf16* dout,
                                                       const mmpo_bf16* inner, int32_t rows, int32_t rank,
                                                       int32_t outputs, int32_t out_width, int32_t inner_width,
                                                       float scale, mmpo_stream stream);

/* ---- adapted_linear.cu, adapted_linear_sm90.cu: frozen linear layers whose gemms go on to low-rank adapters
 *
 * `tile` of the functions for Hopper: as for linear_sm90.cu, where the shape has 128 rows and 128 or 256 columns;
 * others leave the choice to the plan. There ranks are multiples of 8 and arrays begin on 16 bytes. */

/* A module's adapter: it adds scale * inner[rows, rank] * b[outputs, rank]^T to columns first .. first + outputs of the
 * layer's output. Rows of inner lie inner_width values apart. */
typedef struct mmpo_low_rank_part {
    const mmpo_bf16* inner;
    const mmpo_bf16* b;
    int32_t inner_width;
    int32_t rank;
    int32_t first;
    int32_t outputs;
    float scale;
} mmpo_low_rank_part;

/* Assigns out[rows, outputs] = x[rows, inputs] * weight[outputs, inputs]^T + bias[outputs] + what `count` adapters add,
 * at most 3; bias may be NULL. `parts` is in host memory and is read during the call only. */
mmpo_status MMPO_EXPORT(adapted_linear_forward)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                                const mmpo_bf16* bias, const mmpo_low_rank_part* parts, int32_t count,
                                                int32_t rows, int32_t inputs, int32_t outputs, mmpo_stream stream);
mmpo_status MMPO_EXPORT(adapted_linear_forward_sm90)(mmpo_bf16* out, const mmpo_bf16* x, const mmpo_bf16* weight,
                                                     const mmpo_bf16* bias, const mmpo_low_rank_part* parts,
                                                     int32_t count, int32_t rows, int32_t inputs, int32_t outputs,
                                                     int32_t tile, mmpo_stream stream);

/* The same for gate_up[rows, 2 * width], and assigns out[rows, width] = silu(gate) * up. */
mmpo_status MMPO_EXPORT(adapted_linear_swiglu_forward_sm90)(mmpo_bf16* out, mmpo_bf16* gate_up, const mmpo_bf16* x,
                                                            const mmpo_bf16* weight, const mmpo_bf16* bias,
                                                            const mmpo_low_rank_part* parts, int32_t count,
                                                            int32_t rows, int32_t inputs, int32_t width, int32_t tile,
                                                            mmpo_stream stream);

/* Assigns dx[rows, inputs] = dout[rows, outputs] * weight[outputs, inputs] + dropout(dinner[rows, inner_width] *
 * a[inner_width, inputs]). For `key`, `threshold` and `keep_scale` see `low_rank_inner`; a threshold of 0 drops
 * nothing. */
mmpo_status MMPO_EXPORT(adapted_linear_backward_input)(mmpo_bf16* dx, const mmpo_bf16* dout, const mmpo_bf16* weight,
                                                       const mmpo_bf16* dinner, const mmpo_bf16* a, int32_t rows,
                                                       int32_t inputs, int32_t outputs, int32_t inner_width,
                                                       uint64_t key, uint32_t threshold, float keep_scale,
                                                       mmpo_stream stream);
mmpo_status MMPO_EXPORT(adapted_linear_backward_input_sm90)(mmpo_bf16* dx, const mmpo_bf16* dout,
                                                            const mmpo_bf16* weight, const mmpo_bf16* dinner,
                                                            const mmpo_bf16* a, int32_t rows, int32_t inputs,
                                                            int32_t outputs, int32_t inner_width, uint64_t key,
                                                            uint32_t threshold, float keep_scale, int32_t tile,
                                                            mmpo_stream stream);

/* ---- attention_forward.cu, attention_backward.cu, attention_decode.cu
 *
 * A row of qkv[T, (H + 2K) * E] is H query heads, K key heads, K value heads; query head h reads key/value head
 * h / (H / K). A span of spans[pairs, 4] is start, P, C, R: rows start .. start+P are the prompt, then C rows of the
 * chosen and R rows of the rejected response. A row attends to its prompt and to the rows of its own part up to itself;
 * a chosen row never sees a rejected one, nor the other way round. P, C and R may be 0. Spans tile 0 .. T in order.
 * `host_spans` is the same table in host memory, which launchers read during the call to size their grid.
 * Head sizes are 64 and 128; others return status 1. */

/* Assigns out[T, H * E] and lse[T, H] (natural log, of scaled scores). */
mmpo_status MMPO_EXPORT(attention_forward)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv, const uint32_t* spans,
                                           const uint32_t* host_spans, int32_t pairs, int32_t rows, int32_t heads,
                                           int32_t kv_heads, int32_t head_size, float scale, mmpo_stream stream);

/* The same on wgmma and TMA, for compute capability 9.0. `scale` must be positive. */
mmpo_status MMPO_EXPORT(attention_forward_sm90)(mmpo_bf16* out, float* lse, const mmpo_bf16* qkv, const uint32_t* spans,
                                                const uint32_t* host_spans, int32_t pairs, int32_t rows, int32_t heads,
                                                int32_t kv_heads, int32_t head_size, float scale, mmpo_stream stream);

/* The bytes of `workspace` that attention_backward needs for these sizes. A pure function on the host. */
int64_t MMPO_EXPORT(attention_backward_workspace)(int32_t rows, int32_t pairs, int32_t heads, int32_t kv_heads,
                                                  int32_t head_size);

/* Assigns dqkv[T, (H + 2K) * E] from dout and what attention_forward left. If `any_order` is not 0, dQ receives its
 * terms as blocks come to it, and its last bits may differ from launch to launch. This is to measure what the order
 * costs. */
mmpo_status MMPO_EXPORT(attention_backward)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                            const mmpo_bf16* out, const float* lse, const mmpo_bf16* qkv,
                                            const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                            int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                            float scale, int32_t any_order, mmpo_stream stream);

/* The same on wgmma and TMA, for compute capability 9.0, and its workspace. */
int64_t MMPO_EXPORT(attention_backward_sm90_workspace)(int32_t rows, int32_t pairs, int32_t heads, int32_t kv_heads,
                                                       int32_t head_size);
mmpo_status MMPO_EXPORT(attention_backward_sm90)(mmpo_bf16* dqkv, void* workspace, const mmpo_bf16* dout,
                                                 const mmpo_bf16* out, const float* lse, const mmpo_bf16* qkv,
                                                 const uint32_t* spans, const uint32_t* host_spans, int32_t pairs,
                                                 int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_size,
                                                 float scale, int32_t any_order, mmpo_stream stream);

/* The bytes of `workspace` that attention_decode needs for any length up to `length`. A pure function on the host. */
int64_t MMPO_EXPORT(attention_decode_workspace)(int32_t length, int32_t heads, int32_t kv_heads, int32_t head_size);

/* For generation: assigns out[1, H * E], the attention of the query in row length - 1 of `cache` over rows 0 .. length.
 * The rows of `cache` are laid out as those of qkv. */
mmpo_status MMPO_EXPORT(attention_decode)(mmpo_bf16* out, void* workspace, const mmpo_bf16* cache, int32_t length,
                                          int32_t heads, int32_t kv_heads, int32_t head_size, float scale,
                                          mmpo_stream stream);

/* ---- gather_rows.cu */

/* Assigns out[N, D] = hidden[scored_rows[N], :]. */
mmpo_status MMPO_EXPORT(gather_rows)(mmpo_bf16* out, const mmpo_bf16* hidden, const uint32_t* scored_rows,
                                     int32_t scored, int32_t width, mmpo_stream stream);

/* Assigns dhidden[T, D]: for each row, the sum of dout[N, D] over the scored tokens that the row predicts.
 * row_scores[T, 2] lists these, with UINT32_MAX for none; rows that predict nothing get 0. */
mmpo_status MMPO_EXPORT(gather_rows_backward)(mmpo_bf16* dhidden, const mmpo_bf16* dout, const uint32_t* row_scores,
                                              int32_t rows, int32_t width, mmpo_stream stream);

/* ---- logp_head.cu */

/* The bytes of `workspace` that logp_head_forward needs for these sizes. A pure function on the host. */
int64_t MMPO_EXPORT(logp_head_workspace)(int32_t rows, int32_t vocab);

/* From the logits hidden[rows, D] * weight[V, D]^T, which are f32 and never in memory, assigns lse[rows],
 * logp[rows] = logits[targets] - lse and entropy[rows] = -sum_v pi_v log pi_v. entropy is NULL if it is not wanted.
 *
 * exponentials[rows, V] is for the backward, together with what is left in `workspace`. With entropies it holds
 * e^(logit - the row's largest logit of the 128 columns around it). Without them it holds e^(logit - reference) with
 * one reference for the row, and at the target a value that makes the row equal to its dlogits but for one factor, see
 * logp_head_scale_hidden. exponentials may be NULL: then nothing is kept, and logp_head_dlogits forms the logits again.
 */
mmpo_status MMPO_EXPORT(logp_head_forward)(float* lse, float* logp, float* entropy, mmpo_bf16* exponentials,
                                           void* workspace, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                           const uint32_t* targets, int32_t rows, int32_t width, int32_t vocab,
                                           mmpo_stream stream);

/* For use after a forward with entropies. In place, exponentials[rows, V] becomes
 * dlogits = a * (onehot(target) - pi) - b * pi * (log pi + entropy) with a = dlogp[rows], b = dentropy[rows]. */
mmpo_status MMPO_EXPORT(logp_head_backward)(mmpo_bf16* exponentials, const void* workspace, const uint32_t* targets,
                                            const float* lse, const float* logp, const float* dlogp,
                                            const float* dentropy, const float* entropy, int32_t rows, int32_t vocab,
                                            mmpo_stream stream);

/* For use after a forward without entropies. There dlogits[row, :] = factor[row] * exponentials[row, :] with
 * factor = -dlogp * e^(reference - lse). So dweight += exponentials^T * (factor * hidden), and
 * dhidden = factor * (exponentials * weight). These two assign out[rows, D] = factor * hidden, or factor * gradient. */
mmpo_status MMPO_EXPORT(logp_head_scale_hidden)(mmpo_bf16* out, const mmpo_bf16* hidden, const void* workspace,
                                                const float* lse, const float* dlogp, int32_t rows, int32_t width,
                                                int32_t vocab, mmpo_stream stream);

mmpo_status MMPO_EXPORT(logp_head_scale_gradient)(mmpo_bf16* out, const float* gradient, const void* workspace,
                                                  const float* lse, const float* dlogp, int32_t rows, int32_t width,
                                                  int32_t vocab, mmpo_stream stream);

/* Assigns dlogits[rows, columns] for the rows first_column .. first_column + columns of weight[V, D], from logits that
 * it forms again. dentropy and entropy are NULL together: then b = 0. */
mmpo_status MMPO_EXPORT(logp_head_dlogits)(mmpo_bf16* dlogits, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                           const uint32_t* targets, const float* lse, const float* logp,
                                           const float* dlogp, const float* dentropy, const float* entropy,
                                           int32_t rows, int32_t width, int32_t first_column, int32_t columns,
                                           mmpo_stream stream);

/* ---- logp_head_sm90.cu: the same on wgmma and TMA
 *
 * D must be a multiple of 8, and hidden and weight must start on 16-byte boundaries. Otherwise the launcher returns
 * status 1, and logp_head.cu's must be used. Both need the same workspace and leave the same in it. */

mmpo_status MMPO_EXPORT(logp_head_forward_sm90)(float* lse, float* logp, float* entropy, mmpo_bf16* exponentials,
                                                void* workspace, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                                const uint32_t* targets, int32_t rows, int32_t width, int32_t vocab,
                                                mmpo_stream stream);

mmpo_status MMPO_EXPORT(logp_head_dlogits_sm90)(mmpo_bf16* dlogits, const mmpo_bf16* hidden, const mmpo_bf16* weight,
                                                const uint32_t* targets, const float* lse, const float* logp,
                                                const float* dlogp, const float* dentropy, const float* entropy,
                                                int32_t rows, int32_t width, int32_t first_column, int32_t columns,
                                                mmpo_stream stream);

/* ---- pair_objective.cu: src/objective is the reference --------------------------------------------------------- */

/* In the order of ObjectiveKind in src/objective/mod.rs. */
enum mmpo_objective_kind {
    MMPO_OBJECTIVE_MMPO = 0,
    MMPO_OBJECTIVE_DPO = 1,
    MMPO_OBJECTIVE_SIMPO = 2,
    MMPO_OBJECTIVE_SFT = 3,
    MMPO_OBJECTIVE_IPO = 4,
    MMPO_OBJECTIVE_ORPO = 5,
    MMPO_OBJECTIVE_HINGE = 6,
    MMPO_OBJECTIVE_KINDS
};

/* Parameters of an objective under the names of the options; a kind reads those that belong to it. (mmpo's beta is part
 * of its constants already.) */
typedef struct mmpo_objective {
    int32_t kind;
    int32_t length_normalize; /* 0 or 1 */
    float beta;
    float preference_weight;
    float entropy_weight;
    float label_smoothing;
    float gamma_beta_ratio;
} mmpo_objective;

/* For pairs first_pair .. first_pair + pairs: assigns their rows of outcomes[.., 8] (loss, reward_chosen,
 * reward_rejected, logp_chosen, logp_rejected, weight_chosen, entropy_chosen, entropy_rejected) and, for their scored
 * tokens, dlogp[N] = dL/dlogp and dentropy[N] = dL/dentropy (0 where the objective has no entropy term).
 * scored[.., 4]: chosen start, chosen end, rejected start, rejected end, rows of the [N] buffers; a range may be empty.
 * constants[.., 4]: rhat or reference log-prob of chosen and rejected, scale, reserved. The four [N] and three per-pair
 * buffers are given from their start. entropy may be NULL: its sums in outcomes are then 0. Sums are f64. */
mmpo_status MMPO_EXPORT(pair_objective)(float* outcomes, float* dlogp, float* dentropy, const float* logp,
                                        const float* entropy, const uint32_t* scored, const float* constants,
                                        int32_t first_pair, int32_t pairs, mmpo_objective objective,
                                        mmpo_stream stream);

/* ---- grad_norm.cu */

/* The gradient of a tensor: `length` values in device memory, f32 or bf16 as `storage` says. */
typedef struct mmpo_gradient {
    const void* values;
    int64_t length;
    int32_t storage;
} mmpo_gradient;

/* The bytes of `workspace` that gradient_norm needs for these tensors. A pure function on the host. */
int64_t MMPO_EXPORT(gradient_norm_workspace)(const mmpo_gradient* gradients, int32_t count);

/* Assigns out[0], the l2 norm over all gradients, and out[1] = min(1, max_norm / (out[0] + 1e-6)), the factor by which
 * PyTorch clips. If max_norm is infinite, out[1] = 1. A NaN stays a NaN in both. First the norms of fixed parts of each
 * tensor go to `workspace`, then the norm of these is formed. Sums are f64 and in a fixed order, that of the list.
 * `gradients` is in host memory. */
mmpo_status MMPO_EXPORT(gradient_norm)(float* out, void* workspace, const mmpo_gradient* gradients, int32_t count,
                                       float max_norm, mmpo_stream stream);

/* ---- adamw.cu */

/* The formats of moments: mmpo_adamw_tensor says what lies where. */
enum mmpo_moments { MMPO_MOMENTS_F32 = 0, MMPO_MOMENTS_BF16 = 1, MMPO_MOMENTS_8BIT = 2 };

/* The factors of one AdamW update, computed in f64 on the host, and what random bits depend on. */
typedef struct mmpo_adamw_step {
    float beta1;
    float beta2;
    float rest1;           /* 1 - beta1; formed in f32 it would be off by 5e-5 for 0.999 */
    float rest2;           /* 1 - beta2 */
    float decay;           /* 1 - learning_rate * weight_decay */
    float step_size;       /* learning_rate / (1 - beta1^step) */
    float root_correction; /* 1 / sqrt(1 - beta2^step) */
    float epsilon;
    uint32_t step;     /* number of this update, from 1 */
    uint32_t seed_low; /* of the run: the key of stochastic rounding */
    uint32_t seed_high;
} mmpo_adamw_step;

/* A tensor to update, or a part of one: arrays of `length` values in device memory. The f32 master copy is `master`, or
 * the weight with `remainder`, the 16 bits that it lacks of the copy; both are NULL if the weight is its own. Moments
 * are float[length], mmpo_bf16[length], or 8-bit codes uint8_t[length] with a scale, the largest absolute value, for
 * every 256 of them; both scales are NULL for the other formats. The gradient is float[length] or mmpo_bf16[length]. */
typedef struct mmpo_adamw_tensor {
    mmpo_bf16* weight;
    float* master;
    uint16_t* remainder;
    void* first_moment;
    void* second_moment;
    float* first_scales;
    float* second_scales;
    const void* gradient;
    int64_t length;
    uint32_t tensor;      /* its number in the model, on which the random bits of stochastic rounding depend */
    uint32_t first_block; /* blocks of 256 values that the tensor has before this part, which those bits count */
} mmpo_adamw_tensor;

/* Decoupled weight decay, as PyTorch's, with g = gradient * norm[1] and w the master copy, or weight without one:
 *   first  = beta1 * first + rest1 * g
 *   second = beta2 * second + rest2 * g^2
 *   w      = decay * w - step_size * first / (sqrt(second) * root_correction + epsilon)
 * Updates all arrays of each tensor but the gradient. With a master copy weight = bf16(w), and a
 * `remainder` is the lower half of w, in which 0x8000 becomes 0x8001 or 0x7fff, so that it tells how w was rounded.
 * Without one the new weight is rounded up or down by 16 random bits of Philox4x32-10 at the counter (element / 4,
 * tensor, step) and the key `seed`. Then the moments are rounded to their format. All tensors of a call have moments of
 * the format `moments` and gradients of the type `gradients`, f32 or bf16, and master copies of the same kind.
 * `tensors` is in host memory and is read during the call only. */
mmpo_status MMPO_EXPORT(adamw)(const mmpo_adamw_tensor* tensors, int32_t count, const float* norm, mmpo_adamw_step step,
                               int32_t moments, int32_t gradients, mmpo_stream stream);

#ifdef __cplusplus
}
#endif

#endif
