// Every host function of the extension that computes gradients, with its contract. What ops.h says
// is common to all holds here too, but for this: an output shares memory with no other tensor, for
// autograd may have kept any of them. Gradients are summed in fp32 (fp64 for fp32 tensors) and
// rounded once.
//
// The gradient of a weight that many rows share is summed in two steps: each part of the rows into
// a row of the workspace, then those in order. How many parts there are follows from the shapes
// alone, so the bits are the same in every run, on every GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor.h"

namespace exafuse {

// Gradients of x and weight for rms_norm, and for rms_norm_add, whose residual has the gradient
// `grad` itself. The mean square of a row is computed anew: the row is read anyway.
//   grad         [..., hidden]   of the result
//   x            [..., hidden]
//   weight       [hidden]        dtype of x, or fp32
//   grad_x       [..., hidden]
//   grad_weight  [hidden]        dtype of weight; absent: not computed
//   workspace    [bytes / 4] fp32   rms_norm_backward_workspace(...) bytes of any contents; absent
//                                   without grad_weight
void rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Real eps, Tensor grad_x,
                       std::optional<Tensor> grad_weight, std::optional<Tensor> workspace);

// Gradients of the sum (so of x and of residual, which are the same) and of weight for
// add_rms_norm.
//   grad           [..., hidden]   of the normed sum
//   grad_residual  [..., hidden]   of new_residual
//   new_residual   [..., hidden]   the rounded sum
//   weight         [hidden]        dtype of new_residual, or fp32
//   grad_sum       [..., hidden]
//   grad_weight    [hidden]        dtype of weight; absent: not computed
//   workspace      [bytes / 4] fp32   rms_norm_backward_workspace(...) bytes; absent without
//                                     grad_weight
void add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor new_residual, Tensor weight,
                           Real eps, Tensor grad_sum, std::optional<Tensor> grad_weight,
                           std::optional<Tensor> workspace);

// Bytes of workspace that the two calls above need for a gradient of weight; 0 without rows.
// element_size: bytes of an element of x.
int64_t rms_norm_backward_workspace(int64_t num_rows, int64_t hidden, int64_t element_size);

// Gradients of what qk_norm_rope was given, from those of what it returned (no weight = no norm, no
// cos = no rotation). v takes no part in it: with grad_v its gradient is copied to d_v, so that
// d_q, d_k and d_v may be parts of one packed tensor. cos and sin are taken for constants.
// clang-format off
//   grad_q                  [num_tokens, num_heads, head_dim]
//   grad_k, grad_v          [num_tokens, num_kv_heads, head_dim]   grad_v and d_v both, or neither
//   q, k                    as grad_q, grad_k   what the op was given; read where there is a weight
//   q_weight, k_weight      [head_dim]                 dtype of grad_q, or fp32
//   cos, sin                [rows, head_dim / 2]       dtype of grad_q, or fp32
//   positions               [num_tokens] int32         clamped to the table
//   workspace               [bytes / 4] fp32   qk_norm_rope_backward_workspace(...) bytes of any
//                                              contents; absent without d_q_weight and d_k_weight
//   d_q, d_k, d_v           as grad_q, grad_k, grad_v
//   d_q_weight, d_k_weight  [head_dim]                 dtype of the weight; absent: not computed
// clang-format on
// head_dim a multiple of 8 up to 128.
void qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, std::optional<Tensor> grad_v,
                           std::optional<Tensor> q, std::optional<Tensor> k,
                           std::optional<Tensor> q_weight, std::optional<Tensor> k_weight,
                           std::optional<Tensor> cos, std::optional<Tensor> sin,
                           std::optional<Tensor> positions, Real eps,
                           std::optional<Tensor> workspace, Tensor d_q, Tensor d_k,
                           std::optional<Tensor> d_v, std::optional<Tensor> d_q_weight,
                           std::optional<Tensor> d_k_weight);

// Bytes of workspace that the call above needs for gradients of weights; 0 without tokens.
// element_size: bytes of an element of grad_q.
int64_t qk_norm_rope_backward_workspace(int64_t num_tokens, int64_t head_dim, int64_t element_size);

// Gradients of gate and up for silu_and_mul.
//   grad       [..., intermediate_size]       of the result
//   gate       [..., 2 * intermediate_size]   gate first, then up; `up` absent
//   or gate, up  [..., intermediate_size]
//   grad_gate, grad_up  as gate and up
void silu_and_mul_backward(Tensor grad, Tensor gate, std::optional<Tensor> up, Tensor grad_gate,
                           std::optional<Tensor> grad_up);

}  // namespace exafuse
