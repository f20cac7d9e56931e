// Every host function of the extension with its contract; bindings.cpp exports each under its own
// name.
//
// Common to all: tensors may have any strides with last-dimension stride 1, and any alignment
// (16-byte aligned rows are fastest). dtype bf16, fp16 or fp32, computed in fp32 (fp64 for fp32
// tensors), rounded once per output. An output may be exactly the input that it replaces element by
// element; any other overlap is refused. Launches on the caller's stream, never synchronises, never
// allocates: safe inside a CUDA graph. A wrong argument throws std::invalid_argument that names it
// (WrongType if it is no tensor); nothing is launched then.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor.h"

namespace exafuse {

// out = x * rsqrt(mean(x^2) + eps) * weight
//   x       [..., hidden]   hidden a multiple of 8 up to 65536
//   weight  [hidden]        dtype of x, or fp32
//   out     [..., hidden]   may be x
void rms_norm(Tensor x, Tensor weight, Real eps, Tensor out);

// residual_out = x + residual, rounded; out = rms_norm(residual_out): bitwise an addition, then
// rms_norm
//   x, residual        [..., hidden]
//   weight             [hidden]
//   out, residual_out  [..., hidden]   either may be x or residual
void add_rms_norm(Tensor x, Tensor residual, Tensor weight, Real eps, Tensor out,
                  Tensor residual_out);

// out = residual + rms_norm(x), rounded once
//   x, residual  [..., hidden]
//   weight       [hidden]
//   out          [..., hidden]   may be x or residual
void rms_norm_add(Tensor x, Tensor residual, Tensor weight, Real eps, Tensor out);

// Per-head RMSNorm of q and k (no weight = no norm), then rotation of the pairs (i, i + head_dim /
// 2) by the table rows `positions` (no cos = no rotation); nothing is rounded in between. v is
// copied, or left alone without v_out.
// clang-format off
//   q                   [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]   packed, no k, v
//   or q                [num_tokens, num_heads * head_dim]
//      k, v             [num_tokens, num_kv_heads * head_dim]
//   q_weight, k_weight  [head_dim]               dtype of q, or fp32
//   cos, sin            [rows, head_dim / 2]     dtype of q, or fp32
//   positions           [num_tokens] int32       clamped to the table
//   q_out               [num_tokens, num_heads, head_dim]      may be the q part of the input
//   k_out, v_out        [num_tokens, num_kv_heads, head_dim]   may be the k, v part of the input
// clang-format on
// head_dim a multiple of 8 up to 128.
void qk_norm_rope(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Count num_heads,
                  Count num_kv_heads, std::optional<Tensor> q_weight,
                  std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                  std::optional<Tensor> sin, std::optional<Tensor> positions, Real eps,
                  Tensor q_out, Tensor k_out, std::optional<Tensor> v_out);

// The same, with k and v written to the cache.
//   k_cache, v_cache  [rows, slots, num_kv_heads, head_dim]   apart from every other tensor
//   slot_mapping      [num_tokens] int64   row * slots + slot; a token whose number is negative or
//                                          beyond the cache is not written; no number occurs twice
void qk_norm_rope_cache(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Count num_heads,
                        Count num_kv_heads, std::optional<Tensor> q_weight,
                        std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                        std::optional<Tensor> sin, std::optional<Tensor> positions, Real eps,
                        Tensor k_cache, Tensor v_cache, Tensor slot_mapping, Tensor q_out);

// Rotation alone.
//   q, q_out   [num_tokens, num_heads, head_dim]
//   k, k_out   [num_tokens, num_kv_heads, head_dim]
//   cos, sin   [rows, head_dim / 2]
//   positions  [num_tokens] int32
void apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, Tensor q_out,
                Tensor k_out);

// out = silu(gate) * up
//   gate  [..., 2 * intermediate_size]   gate first, then up; `up` absent
//   or gate, up  [..., intermediate_size]
//   out   [..., intermediate_size]   may be gate or up (or that half of the packed input)
void silu_and_mul(Tensor gate, std::optional<Tensor> up, Tensor out);

// Attention: out = softmax(q k^T * softmax_scale) v, each query over the keys that it sees. dtype
// bf16 or fp16. Queries stand at the end of the keys: of n keys, query j of seqlen_q is at position
// n - seqlen_q + j and sees the positions from window_left before to window_right behind it (-1 =
// open; causal = 0 to the right). A query that sees nothing gives 0 and lse -inf. num_heads is a
// multiple of num_kv_heads, head_dim a multiple of 8 up to 128. lse is the natural log of the sum
// of the exponentials. No output overlaps any input.
//   q, out  [batch, seqlen_q, num_heads, head_dim]
//   k, v    [batch, seqlen_k, num_kv_heads, head_dim]
//   lse     [batch, num_heads, seqlen_q] fp32, or absent
void flash_attn_func(Tensor q, Tensor k, Tensor v, Real softmax_scale, Count window_left,
                     Count window_right, Tensor out, std::optional<Tensor> lse);

// The same for sequences of any lengths, packed one after the other.
//   q, out        [total_q, num_heads, head_dim]
//   k, v          [total_k, num_kv_heads, head_dim]
//   cu_seqlens_q  [batch + 1] int32   first row of each sequence; numbers out of range are clamped
//   cu_seqlens_k  [batch + 1] int32
//   lse           [num_heads, total_q] fp32, or absent
// max_seqlen_q: at least the longest sequence of queries; rows beyond it are not written.
void flash_attn_varlen_func(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                            Count max_seqlen_q, Real softmax_scale, Count window_left,
                            Count window_right, Tensor out, std::optional<Tensor> lse);

// The same over a cache. Position p of a row lives in slot p, in slot p % slots of a ring, or in
// page block_table[b, p / slots]. Slots that no query sees may hold anything, NaN included.
// clang-format off
//   q, out            [batch, seqlen_q, num_heads, head_dim], or [total_q, num_heads, head_dim]
//   k_cache, v_cache  [rows, slots, num_kv_heads, head_dim]   rows = batch, or as cache_batch_idx or
//                                                             block_table say
//   k, v              [batch, seqlen_new, num_kv_heads, head_dim]   written behind cache_seqlens
//                                                                   first; beyond the end: dropped
//   cache_seqlens     [batch] int32   tokens seen, without those of k and v; absent: all slots.
//                                     Clamped to the slots unless ring; none = output 0
//   cache_batch_idx   [batch] int32   row of each sequence, clamped
//   cache_leftpad     [batch] int32   first position that exists
//   block_table       [batch, max_pages] int32   pages, clamped; slots is a multiple of 128 then
//   cu_seqlens_q      [batch + 1] int32   with packed q
//   lse               [batch, num_heads, seqlen_q] or [num_heads, total_q] fp32, or absent
//   workspace         [bytes / 4] fp32   flash_attn_with_kvcache_workspace(...) bytes of any
//                                        contents; absent where that is 0
// clang-format on
// ring: slots >= window_left + seqlen_q, a multiple of 128. max_seqlen_q counts with packed q only.
void flash_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k,
                             std::optional<Tensor> v, std::optional<Tensor> cache_seqlens,
                             std::optional<Tensor> cache_batch_idx,
                             std::optional<Tensor> cache_leftpad, std::optional<Tensor> block_table,
                             Real softmax_scale, Count window_left, Count window_right,
                             std::optional<Tensor> cu_seqlens_q, Count max_seqlen_q, bool ring,
                             std::optional<Tensor> workspace, Tensor out,
                             std::optional<Tensor> lse);

// Bytes of workspace that the call above needs; 0: none. key_capacity is slots, times max_pages of
// a block_table; total_q is batch * seqlen_q where q is not packed.
int64_t flash_attn_with_kvcache_workspace(int64_t total_q, int64_t max_seqlen_q, int64_t num_heads,
                                          int64_t head_dim, int64_t key_capacity,
                                          int64_t window_left);

// Rotation of q and k by the row of the table that belongs to the token, rounded to the dtype, then
// attention inside each segment without a mask. dtype bf16 or fp16.
//   qkv         [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
//   cos, sin    [num_tokens, head_dim / 2] fp32
//   cu_seqlens  [segments + 1] int32
//   workspace   [bytes / 4] fp32   vision_attn_workspace(...) bytes of any contents; absent where
//                                  that is 0
//   out         [num_tokens, num_heads, head_dim]
// max_seqlen: at least the longest segment; rows beyond it are not written.
void vision_attn(Tensor qkv, Count num_heads, Count num_kv_heads, Tensor cos, Tensor sin,
                 Tensor cu_seqlens, Count max_seqlen, Real softmax_scale,
                 std::optional<Tensor> workspace, Tensor out);

int64_t vision_attn_workspace(int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, int64_t max_seqlen);

}  // namespace exafuse
