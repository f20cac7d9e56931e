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

}  // namespace exafuse
