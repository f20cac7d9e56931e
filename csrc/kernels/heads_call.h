// The arguments that qk_norm_rope, qk_norm_rope_cache and apply_rope share, and their checks.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/tensor.h"

namespace exafuse {

// A part of a projection [num_tokens, heads * head_dim] as [num_tokens, heads, head_dim].
class HeadsView {
 public:
  HeadsView(const Tensor& projection, int64_t first_head, int64_t num_heads, int64_t head_dim)
      : shape_{projection.size(0), num_heads, head_dim},
        strides_{projection.stride(0), head_dim * projection.stride(1), projection.stride(1)},
        tensor_(projection) {
    tensor_.data = projection.data_as<char>() +
                   first_head * head_dim * projection.stride(1) * size_bytes(projection.dtype);
    tensor_.ndim = 3;
  }

  // Points into this object.
  Tensor tensor() const {
    Tensor tensor = tensor_;
    tensor.shape = shape_.data();
    tensor.strides = strides_.data();
    return tensor;
  }

 private:
  std::array<int64_t, 3> shape_;
  std::array<int64_t, 3> strides_;
  Tensor tensor_;
};

struct Heads {
  HeadsView q;
  HeadsView k;
  HeadsView v;
};

// The three parts of a packed projection (k and v absent), or of three projections.
inline Heads split_heads(const Tensor& q, const std::optional<Tensor>& k,
                         const std::optional<Tensor>& v, Count q_heads, Count kv_heads) {
  const int64_t num_heads = check_count("num_heads", q_heads);
  const int64_t num_kv_heads = check_count("num_kv_heads", kv_heads);
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    fail("num_heads", "a positive multiple of num_kv_heads",
         std::to_string(num_heads) + " heads over " + std::to_string(num_kv_heads) + " kv heads");
  }
  if (k.has_value() != v.has_value()) {
    throw std::invalid_argument("k, v: expected both or neither");
  }
  const auto check_projection = [](const char* name, const Tensor& tensor, int64_t heads) {
    check_is_tensor(name, tensor);
    if (tensor.ndim != 2 || tensor.size(1) % heads != 0) {
      fail(name, "(num_tokens, " + std::to_string(heads) + " heads * head_dim)",
           to_string(tensor.shape, tensor.ndim));
    }
    return tensor.size(1) / heads;
  };
  if (!k.has_value()) {
    const int64_t head_dim = check_projection("qkv", q, num_heads + 2 * num_kv_heads);
    return {HeadsView(q, 0, num_heads, head_dim), HeadsView(q, num_heads, num_kv_heads, head_dim),
            HeadsView(q, num_heads + num_kv_heads, num_kv_heads, head_dim)};
  }
  const int64_t head_dim = check_projection("q", q, num_heads);
  check_shape("k", *k, {q.size(0), num_kv_heads * head_dim});
  check_shape("v", *v, {q.size(0), num_kv_heads * head_dim});
  return {HeadsView(q, 0, num_heads, head_dim), HeadsView(*k, 0, num_kv_heads, head_dim),
          HeadsView(*v, 0, num_kv_heads, head_dim)};
}

// One call of any of the three ops.
struct HeadsCall {
  Tensor q;                      // [num_tokens, num_heads, head_dim]
  Tensor k;                      // [num_tokens, num_kv_heads, head_dim]
  std::optional<Tensor> v = {};  // [num_tokens, num_kv_heads, head_dim]
  const std::optional<Tensor>& q_weight;
  const std::optional<Tensor>& k_weight;
  const std::optional<Tensor>& cos;
  const std::optional<Tensor>& sin;
  const std::optional<Tensor>& positions;
  Real eps = {};
  const Tensor& q_out;
  const Tensor& k_out;                   // or the cache of k
  const Tensor* v_out = nullptr;         // or the cache of v; null where v stays
  const Tensor* slot_mapping = nullptr;  // makes k_out and v_out caches

  bool to_cache() const { return slot_mapping != nullptr; }
  const char* k_out_name() const { return to_cache() ? "k_cache" : "k_out"; }
  const char* v_out_name() const { return to_cache() ? "v_cache" : "v_out"; }

  // visit(name, tensor) for every tensor that is read.
  template <class Visit>
  void for_each_input(Visit visit) const {
    visit("q", q);
    visit("k", k);
    if (v.has_value()) visit("v", *v);
    if (q_weight.has_value()) visit("q_weight", *q_weight);
    if (k_weight.has_value()) visit("k_weight", *k_weight);
    if (cos.has_value()) {
      visit("cos", *cos);
      visit("sin", *sin);
      visit("positions", *positions);
    }
    if (slot_mapping != nullptr) visit("slot_mapping", *slot_mapping);
  }

  // visit(name, tensor, replaced) for every tensor that is written; `replaced` is the input that it
  // may be, or null.
  template <class Visit>
  void for_each_output(Visit visit) const {
    visit("q_out", q_out, &q);
    visit(k_out_name(), k_out, to_cache() ? nullptr : &k);
    if (v_out != nullptr) visit(v_out_name(), *v_out, to_cache() ? nullptr : &*v);
  }
};

inline void check_heads_shapes(const HeadsCall& call) {
  Dim num_tokens{"num_tokens"};
  Dim num_heads{"num_heads"};
  Dim num_kv_heads{"num_kv_heads"};
  Dim head_dim{"head_dim"};
  Dim table_rows{"rows"};
  check_shape("q", call.q, {num_tokens, num_heads, head_dim});
  check_shape("k", call.k, {num_tokens, num_kv_heads, head_dim});
  check_multiple("head_dim", head_dim.value, 8, kMaxHeadDim);
  if (call.q_weight.has_value()) check_shape("q_weight", *call.q_weight, {head_dim});
  if (call.k_weight.has_value()) check_shape("k_weight", *call.k_weight, {head_dim});
  if (call.cos.has_value() != call.sin.has_value()) {
    throw std::invalid_argument("cos, sin: expected both tables or neither");
  }
  if (call.cos.has_value()) {
    if (!call.positions.has_value()) {
      fail("positions", "int32 (num_tokens,) when cos and sin are given", "None");
    }
    check_shape("cos", *call.cos, {table_rows, head_dim.value / 2});
    check_shape("sin", *call.sin, {table_rows, head_dim.value / 2});
    check_shape("positions", *call.positions, {num_tokens});
    if (table_rows.value == 0) fail("cos", "at least one row", "none");
  }
  check_shape("q_out", call.q_out, {num_tokens, num_heads, head_dim});
  if (call.to_cache()) {
    Dim cache_rows{"rows"};
    Dim slots{"slots"};
    check_shape("k_cache", call.k_out, {cache_rows, slots, num_kv_heads, head_dim});
    check_shape("v_cache", *call.v_out, {cache_rows, slots, num_kv_heads, head_dim});
    check_shape("slot_mapping", *call.slot_mapping, {num_tokens});
  } else {
    check_shape("k_out", call.k_out, {num_tokens, num_kv_heads, head_dim});
    if (call.v_out != nullptr) {
      check_shape("v_out", *call.v_out, {num_tokens, num_kv_heads, head_dim});
    }
  }
  check_eps(call.eps);
}

inline void check_heads_dtypes(const HeadsCall& call) {
  const DType dtype = call.q.dtype;
  check_float_dtype("q", call.q);
  check_dtype("k", call.k, {dtype});
  if (call.v.has_value()) check_dtype("v", *call.v, {dtype});
  const auto check_this_or_fp32 = [dtype](const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, {dtype, DType::kFloat32});
  };
  if (call.q_weight.has_value()) check_this_or_fp32("q_weight", *call.q_weight);
  if (call.k_weight.has_value()) check_this_or_fp32("k_weight", *call.k_weight);
  if (call.cos.has_value()) {
    check_this_or_fp32("cos", *call.cos);
    check_dtype("sin", *call.sin, {call.cos->dtype});
    check_dtype("positions", *call.positions, {DType::kInt32});
  }
  if (call.to_cache()) check_dtype("slot_mapping", *call.slot_mapping, {DType::kInt64});
  call.for_each_output([dtype](const char* name, const Tensor& tensor, const Tensor*) {
    check_dtype(name, tensor, {dtype});
  });
}

inline void check_heads_memory(const HeadsCall& call) {
  const auto check_layout = [](const char* name, const Tensor& tensor) {
    check_last_stride(name, tensor);
    check_alignment(name, tensor);
  };
  call.for_each_input(check_layout);
  call.for_each_output([&](const char* name, const Tensor& tensor, const Tensor*) {
    check_layout(name, tensor);
    check_writable(name, tensor);
  });
  call.for_each_output([&](const char* name, const Tensor& output, const Tensor* replaced) {
    call.for_each_input([&](const char* input_name, const Tensor& input) {
      if (&input == replaced) {
        check_disjoint_or_same(name, output, input_name, input);
      } else {
        check_disjoint(name, output, input_name, input);
      }
    });
  });
  check_disjoint(call.k_out_name(), call.k_out, "q_out", call.q_out);
  if (call.v_out != nullptr) {
    check_disjoint(call.v_out_name(), *call.v_out, "q_out", call.q_out);
    check_disjoint(call.v_out_name(), *call.v_out, call.k_out_name(), call.k_out);
  }
}

inline void check_heads_call(const HeadsCall& call) {
  check_heads_shapes(call);
  check_heads_dtypes(call);
  check_heads_memory(call);
  check_device("q", call.q);
  call.for_each_input(
      [&](const char* name, const Tensor& tensor) { check_device(name, tensor, call.q.device); });
  call.for_each_output([&](const char* name, const Tensor& tensor, const Tensor*) {
    check_device(name, tensor, call.q.device);
  });
}

}  // namespace exafuse
