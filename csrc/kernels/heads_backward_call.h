// The arguments of qk_norm_rope_backward and their checks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/tensor.h"

namespace exafuse {

// What belongs to q, k or v: null where the call has none.
struct HeadsGrads {
  const char* grad_name;
  const Tensor* grad;  // [num_tokens, heads, head_dim], of the op's result
  const char* in_name;
  const Tensor* in;  // [num_tokens, heads, head_dim], what the op was given
  const char* weight_name;
  const Tensor* weight;  // [head_dim]
  const char* out_name;
  const Tensor* out;  // [num_tokens, heads, head_dim], of what the op was given
  const char* weight_grad_name;
  const Tensor* weight_grad;  // [head_dim]

  bool is_present() const { return grad != nullptr; }
};

struct HeadsBackwardCall {
  HeadsGrads q;
  HeadsGrads k;
  HeadsGrads v;
  const Tensor* cos;
  const Tensor* sin;
  const Tensor* positions;
  const Tensor* workspace;
  Real eps;

  int64_t num_tokens() const { return q.grad->size(0); }
  int head_dim() const { return static_cast<int>(q.grad->size(2)); }
  int num_heads() const {
    const int64_t of_v = v.is_present() ? v.grad->size(1) : 0;
    return static_cast<int>(q.grad->size(1) + k.grad->size(1) + of_v);
  }
  bool has_norm() const { return q.weight != nullptr || k.weight != nullptr; }
  bool wants_weights() const { return q.weight_grad != nullptr || k.weight_grad != nullptr; }

  // visit(name, tensor) for every tensor that is read.
  template <class Visit>
  void for_each_input(Visit visit) const {
    for (const HeadsGrads& part : {q, k, v}) {
      if (part.grad != nullptr) visit(part.grad_name, *part.grad);
      if (part.in != nullptr) visit(part.in_name, *part.in);
      if (part.weight != nullptr) visit(part.weight_name, *part.weight);
    }
    if (cos != nullptr) {
      visit("cos", *cos);
      visit("sin", *sin);
      visit("positions", *positions);
    }
  }

  // The same for every tensor that is written.
  template <class Visit>
  void for_each_output(Visit visit) const {
    for (const HeadsGrads& part : {q, k, v}) {
      if (part.out != nullptr) visit(part.out_name, *part.out);
      if (part.weight_grad != nullptr) visit(part.weight_grad_name, *part.weight_grad);
    }
    if (workspace != nullptr) visit("workspace", *workspace);
  }

  template <class Visit>
  void for_each(Visit visit) const {
    for_each_input(visit);
    for_each_output(visit);
  }
};

inline void check_heads_backward_shapes(const HeadsBackwardCall& call) {
  Dim num_tokens{"num_tokens"};
  Dim num_heads{"num_heads"};
  Dim num_kv_heads{"num_kv_heads"};
  Dim head_dim{"head_dim"};
  Dim table_rows{"rows"};
  const auto check_part = [&](const HeadsGrads& part, Dim& heads) {
    check_shape(part.grad_name, *part.grad, {num_tokens, heads, head_dim});
    check_multiple("head_dim", head_dim.value, 8, kMaxHeadDim);
    if (part.weight != nullptr) check_shape(part.weight_name, *part.weight, {head_dim});
    if (part.weight != nullptr && part.in == nullptr) {
      fail(part.in_name, std::string("what the op was given when there is a ") + part.weight_name,
           "None");
    }
    if (part.in != nullptr) check_shape(part.in_name, *part.in, {num_tokens, heads, head_dim});
    check_shape(part.out_name, *part.out, {num_tokens, heads, head_dim});
    if (part.weight_grad != nullptr) {
      if (part.weight == nullptr) {
        fail(part.weight_grad_name, std::string("None without ") + part.weight_name, "a tensor");
      }
      check_shape(part.weight_grad_name, *part.weight_grad, {head_dim});
    }
  };
  check_part(call.q, num_heads);
  check_part(call.k, num_kv_heads);
  if ((call.v.grad != nullptr) != (call.v.out != nullptr)) {
    throw std::invalid_argument("grad_v, d_v: expected both or neither");
  }
  if (call.v.is_present()) check_part(call.v, num_kv_heads);
  if ((call.cos != nullptr) != (call.sin != nullptr)) {
    throw std::invalid_argument("cos, sin: expected both tables or neither");
  }
  if (call.cos != nullptr) {
    if (call.positions == nullptr) {
      fail("positions", "int32 (num_tokens,) when cos and sin are given", "None");
    }
    check_shape("cos", *call.cos, {table_rows, head_dim.value / 2});
    check_shape("sin", *call.sin, {table_rows, head_dim.value / 2});
    check_shape("positions", *call.positions, {num_tokens});
    if (table_rows.value == 0) fail("cos", "at least one row", "none");
  }
  check_eps(call.eps);
}

inline void check_heads_backward_dtypes(const HeadsBackwardCall& call) {
  const DType dtype = call.q.grad->dtype;
  check_float_dtype("grad_q", *call.q.grad);
  for (const HeadsGrads& part : {call.q, call.k, call.v}) {
    if (part.grad != nullptr) check_dtype(part.grad_name, *part.grad, {dtype});
    if (part.in != nullptr) check_dtype(part.in_name, *part.in, {dtype});
    if (part.out != nullptr) check_dtype(part.out_name, *part.out, {dtype});
    if (part.weight != nullptr) {
      check_dtype(part.weight_name, *part.weight, {dtype, DType::kFloat32});
    }
    if (part.weight_grad != nullptr) {
      check_dtype(part.weight_grad_name, *part.weight_grad, {part.weight->dtype});
    }
  }
  if (call.cos != nullptr) {
    check_dtype("cos", *call.cos, {dtype, DType::kFloat32});
    check_dtype("sin", *call.sin, {call.cos->dtype});
    check_dtype("positions", *call.positions, {DType::kInt32});
  }
}

// `bytes`: what the call needs.
inline void check_heads_backward_workspace(const HeadsBackwardCall& call, int64_t bytes) {
  const auto expected = [bytes] {
    return std::to_string(bytes / 4) + " or more elements of float32";
  };
  if (call.workspace == nullptr) {
    if (bytes > 0) fail("workspace", expected(), "None");
    return;
  }
  const Tensor& workspace = *call.workspace;
  check_is_tensor("workspace", workspace);
  if (workspace.ndim != 1 || workspace.size(0) * 4 < bytes) {
    fail("workspace", expected(), to_string(workspace.shape, workspace.ndim));
  }
  check_dtype("workspace", workspace, {DType::kFloat32});
  if (!is_aligned(workspace, 16)) {
    fail("workspace", "data aligned to 16 bytes", "an address that is not");
  }
}

// Layout, overlap, device.
inline void check_heads_backward_memory(const HeadsBackwardCall& call) {
  call.for_each(check_last_stride);
  call.for_each(check_alignment);

  call.for_each_output([&](const char* name, const Tensor& output) {
    check_writable(name, output);
    call.for_each_input([&](const char* input_name, const Tensor& input) {
      check_disjoint(name, output, input_name, input);
    });
    call.for_each_output([&](const char* other_name, const Tensor& other) {
      if (&other != &output) check_disjoint(name, output, other_name, other);
    });
  });

  check_device("grad_q", *call.q.grad);
  call.for_each([&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, call.q.grad->device);
  });
}

}  // namespace exafuse
