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

}  // namespace exafuse
