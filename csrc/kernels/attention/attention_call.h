// The arguments of the attention ops: their checks, and the AttentionParams made of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/softmax.cuh"
#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// What flash_attn_with_kvcache has beside the rest.
struct CacheArguments {
  const std::optional<Tensor>& k;
  const std::optional<Tensor>& v;
  const std::optional<Tensor>& cache_seqlens;
  const std::optional<Tensor>& cache_batch_idx;
  const std::optional<Tensor>& cache_leftpad;
  const std::optional<Tensor>& block_table;
  bool ring;
};

// One call of any of the ops: k and v are tensors of keys or caches.
struct AttentionCall {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  Real softmax_scale;
  Count window_left;
  Count window_right;
  const Tensor& out;
  const std::optional<Tensor>& lse;
  const Tensor* cu_seqlens_q = nullptr;
  const Tensor* cu_seqlens_k = nullptr;
  std::optional<Count> max_seqlen_q = {};
  const CacheArguments* cache = nullptr;
  const char* k_name = "k";
  const char* v_name = "v";

  // visit(name, tensor, dtype) for every table of numbers on the device.
  template <class Visit>
  void for_each_table(Visit visit) const {
    if (cu_seqlens_q != nullptr) visit("cu_seqlens_q", *cu_seqlens_q);
    if (cu_seqlens_k != nullptr) visit("cu_seqlens_k", *cu_seqlens_k);
    if (cache == nullptr) return;
    if (cache->cache_seqlens.has_value()) visit("cache_seqlens", *cache->cache_seqlens);
    if (cache->cache_batch_idx.has_value()) visit("cache_batch_idx", *cache->cache_batch_idx);
    if (cache->cache_leftpad.has_value()) visit("cache_leftpad", *cache->cache_leftpad);
    if (cache->block_table.has_value()) visit("block_table", *cache->block_table);
  }

  // visit(name, tensor) for every tensor of q's dtype that is read.
  template <class Visit>
  void for_each_input(Visit visit) const {
    visit("q", q);
    visit(k_name, k);
    visit(v_name, v);
    if (cache != nullptr && cache->k.has_value()) {
      visit("k", *cache->k);
      visit("v", *cache->v);
    }
  }

  template <class Visit>
  void for_each_output(Visit visit) const {
    visit("out", out);
    if (lse.has_value()) visit("lse", *lse);
    if (cache != nullptr && cache->k.has_value()) {
      visit(k_name, k);
      visit(v_name, v);
    }
  }
};

inline int check_int(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    fail(name, "from " + std::to_string(low) + " to " + std::to_string(high),
         std::to_string(value));
  }
  return static_cast<int>(value);
}

// Positions and sizes stay below this, so that sums of two of them fit 32 bits.
inline constexpr int64_t kMaxTokens = int64_t{1} << 30;

inline float check_scale(Real scale) {
  if (scale.wrong_type != nullptr) fail_type("softmax_scale", "a number", scale.wrong_type);
  if (!(scale.value > 0) || !std::isfinite(scale.value)) {
    fail("softmax_scale", "a finite number > 0", std::to_string(scale.value));
  }
  return static_cast<float>(scale.value * static_cast<double>(kLog2E));
}

inline void check_attention_shapes(const AttentionCall& call, AttentionParams& params) {
  Dim batch{"batch"};
  Dim num_heads{"num_heads"};
  Dim num_kv_heads{"num_kv_heads"};
  Dim head_dim{"head_dim"};
  Dim seqlen_q{call.cu_seqlens_q != nullptr ? "total_q" : "seqlen_q"};
  Dim rows{call.cache != nullptr ? "rows" : "batch"};
  Dim slots{call.cu_seqlens_k != nullptr ? "total_k"
            : call.cache != nullptr      ? "slots"
                                         : "seqlen_k"};
  if (call.cu_seqlens_q != nullptr) {
    check_shape("q", call.q, {seqlen_q, num_heads, head_dim});
    check_is_tensor("cu_seqlens_q", *call.cu_seqlens_q);
    if (call.cu_seqlens_q->ndim != 1 || call.cu_seqlens_q->size(0) < 1) {
      fail("cu_seqlens_q", "(batch + 1,)",
           to_string(call.cu_seqlens_q->shape, call.cu_seqlens_q->ndim));
    }
    batch.value = call.cu_seqlens_q->size(0) - 1;
  } else {
    check_shape("q", call.q, {batch, seqlen_q, num_heads, head_dim});
  }
  if (call.cu_seqlens_k != nullptr) {
    check_shape(call.k_name, call.k, {slots, num_kv_heads, head_dim});
    check_shape(call.v_name, call.v, {slots, num_kv_heads, head_dim});
    check_shape("cu_seqlens_k", *call.cu_seqlens_k, {batch.value + 1});
  } else {
    const bool by_batch = call.cache == nullptr || !(call.cache->cache_batch_idx.has_value() ||
                                                     call.cache->block_table.has_value());
    Dim& first = by_batch ? batch : rows;
    check_shape(call.k_name, call.k, {first, slots, num_kv_heads, head_dim});
    check_shape(call.v_name, call.v, {first, slots, num_kv_heads, head_dim});
  }
  check_multiple("head_dim", head_dim.value, 8, kMaxHeadDim);
  if (num_heads.value < 1 || num_kv_heads.value < 1 || num_heads.value % num_kv_heads.value != 0) {
    fail("num_heads", "a positive multiple of num_kv_heads",
         std::to_string(num_heads.value) + " heads over " + std::to_string(num_kv_heads.value) +
             " kv heads");
  }
  if (call.cu_seqlens_q != nullptr) {
    check_shape("out", call.out, {seqlen_q, num_heads, head_dim});
    if (call.lse.has_value()) check_shape("lse", *call.lse, {num_heads, seqlen_q});
  } else {
    check_shape("out", call.out, {batch, seqlen_q, num_heads, head_dim});
    if (call.lse.has_value()) check_shape("lse", *call.lse, {batch, num_heads, seqlen_q});
  }

  params.batch = check_int("batch", batch.value, 0, kMaxTokens);
  params.num_heads = check_int("num_heads", num_heads.value, 1, kMaxTokens);
  params.num_kv_heads = static_cast<int>(num_kv_heads.value);
  params.gqa_group_size = params.num_heads / params.num_kv_heads;
  params.head_dim = static_cast<int>(head_dim.value);
  params.seqlen_q = check_int(seqlen_q.name, seqlen_q.value, 0, kMaxTokens);
  params.total_q = params.seqlen_q;
  if (call.max_seqlen_q.has_value()) {
    const int64_t longest = check_count("max_seqlen_q", *call.max_seqlen_q);
    if (call.cu_seqlens_q != nullptr) {
      if (longest < 0) fail("max_seqlen_q", "at least 0", std::to_string(longest));
      params.seqlen_q = static_cast<int>(std::min<int64_t>(longest, params.total_q));
    }
  }
  const int size = check_int(slots.name, slots.value, 0, kMaxTokens);
  if (call.cu_seqlens_k != nullptr) {
    params.total_k = size;
  } else {
    params.slots = size;
    params.key_rows = check_int("rows", call.k.size(0), 0, kMaxTokens);
  }
}

inline void check_cache(const AttentionCall& call, AttentionParams& params) {
  const CacheArguments& cache = *call.cache;
  const Dim batch{"batch", params.batch};
  const auto check_batch = [&](const char* name, const std::optional<Tensor>& tensor) {
    Dim dim = batch;
    if (tensor.has_value()) check_shape(name, *tensor, {dim});
  };
  check_batch("cache_seqlens", cache.cache_seqlens);
  check_batch("cache_batch_idx", cache.cache_batch_idx);
  check_batch("cache_leftpad", cache.cache_leftpad);
  if (cache.block_table.has_value()) {
    Dim dim = batch;
    Dim max_pages{"max_pages"};
    check_shape("block_table", *cache.block_table, {dim, max_pages});
    params.max_pages = check_int("max_pages", max_pages.value, 0, kMaxTokens);
    if (cache.cache_batch_idx.has_value()) {
      fail("cache_batch_idx", "None with block_table, which names the pages itself", "a tensor");
    }
    if (cache.ring) fail("ring", "False with block_table: pages are no ring", "True");
    if (params.slots % kKeyTile != 0) {
      fail(call.k_name, "pages of a multiple of " + std::to_string(kKeyTile) + " slots",
           std::to_string(params.slots));
    }
    if (params.key_capacity() > kMaxTokens) {
      fail("block_table", "at most 2^30 slots in all pages of a sequence",
           std::to_string(params.key_capacity()));
    }
  }
  if (cache.k.has_value() != cache.v.has_value()) {
    throw std::invalid_argument("k, v: expected both or neither");
  }
  if (cache.k.has_value()) {
    Dim seqlen_new{"seqlen_new"};
    Dim dim = batch;
    Dim num_kv_heads{"num_kv_heads", params.num_kv_heads};
    Dim head_dim{"head_dim", params.head_dim};
    check_shape("k", *cache.k, {dim, seqlen_new, num_kv_heads, head_dim});
    check_shape("v", *cache.v, {dim, seqlen_new, num_kv_heads, head_dim});
    if (!cache.cache_seqlens.has_value()) {
      fail("cache_seqlens", "int32 (batch,) when k and v are appended", "None");
    }
    params.appended = check_int("seqlen_new", seqlen_new.value, 0, kMaxTokens);
  }
  if (cache.ring) {
    const int64_t needed = int64_t{params.window.left} + std::max(params.seqlen_q, params.appended);
    if (params.window.left < 0 || params.slots < needed || params.slots % kKeyTile != 0 ||
        params.slots == 0) {
      fail("ring",
           "a bounded left window and at least left + max_seqlen_q = " + std::to_string(needed) +
               " slots, a multiple of " + std::to_string(kKeyTile),
           "window_left=" + std::to_string(params.window.left) +
               ", slots=" + std::to_string(params.slots));
    }
  }
  params.ring = cache.ring;
}

inline void check_attention_memory(const AttentionCall& call) {
  check_dtype("q", call.q, {DType::kBFloat16, DType::kFloat16});
  call.for_each_input(
      [&](const char* name, const Tensor& tensor) { check_dtype(name, tensor, {call.q.dtype}); });
  check_dtype("out", call.out, {call.q.dtype});
  if (call.lse.has_value()) check_dtype("lse", *call.lse, {DType::kFloat32});
  call.for_each_table(
      [](const char* name, const Tensor& tensor) { check_dtype(name, tensor, {DType::kInt32}); });

  const auto check_layout = [](const char* name, const Tensor& tensor) {
    check_last_stride(name, tensor);
    check_alignment(name, tensor);
  };
  call.for_each_input(check_layout);
  call.for_each_table(check_layout);
  call.for_each_output(check_layout);
  call.for_each_output(check_writable);
  call.for_each_output([&](const char* output_name, const Tensor& output) {
    const auto check_apart = [&](const char* name, const Tensor& tensor) {
      if (&tensor != &output) check_disjoint(output_name, output, name, tensor);
    };
    call.for_each_input(check_apart);
    call.for_each_table(check_apart);
    call.for_each_output(check_apart);
  });

  check_device("q", call.q);
  const auto check_same_device = [&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, call.q.device);
  };
  call.for_each_input(check_same_device);
  call.for_each_table(check_same_device);
  call.for_each_output(check_same_device);
}

// Strides of [batch, row, head, head_dim], or of [row, head, head_dim] where packed.
// The stride of a dimension of one element may be anything, also what is not aligned: 0 instead.
inline AttentionStrides strides_of(const Tensor& tensor) {
  const auto stride = [&](int dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; };
  return {tensor.ndim == 4 ? stride(0) : 0, stride(-3), stride(-2)};
}

// Checks every argument of a call and says what the kernels need of it.
inline AttentionParams check_attention_call(const AttentionCall& call) {
  AttentionParams params;
  check_attention_shapes(call, params);
  params.window.left =
      check_int("window_left", check_count("window_left", call.window_left), -1, kMaxTokens);
  params.window.right =
      check_int("window_right", check_count("window_right", call.window_right), -1, kMaxTokens);
  params.scale_log2 = check_scale(call.softmax_scale);
  if (call.cache != nullptr) check_cache(call, params);
  check_attention_memory(call);

  params.dtype = call.q.dtype;
  params.q = call.q.data;
  params.k = call.k.data;
  params.v = call.v.data;
  params.out = call.out.data;
  params.q_strides = strides_of(call.q);
  params.k_strides = strides_of(call.k);
  params.v_strides = strides_of(call.v);
  params.out_strides = strides_of(call.out);
  if (call.lse.has_value()) {
    params.lse = call.lse->data_as<float>();
    params.lse_strides = {call.lse->ndim == 3 ? call.lse->stride(0) : 0, call.lse->stride(-1),
                          call.lse->stride(-2)};
  }
  const auto table = [](const Tensor& tensor) { return tensor.data_as<const int32_t>(); };
  if (call.cu_seqlens_q != nullptr) params.cu_seqlens_q = table(*call.cu_seqlens_q);
  if (call.cu_seqlens_k != nullptr) params.cu_seqlens_k = table(*call.cu_seqlens_k);
  if (call.cache != nullptr) {
    const CacheArguments& cache = *call.cache;
    if (cache.cache_seqlens.has_value()) params.cache_seqlens = table(*cache.cache_seqlens);
    if (cache.cache_batch_idx.has_value()) params.cache_batch_idx = table(*cache.cache_batch_idx);
    if (cache.cache_leftpad.has_value()) params.cache_leftpad = table(*cache.cache_leftpad);
    if (cache.block_table.has_value()) {
      params.block_table = table(*cache.block_table);
      params.block_table_stride = cache.block_table->stride(0);
    }
  }
  params.wide = is_aligned(call.q, 16) && is_aligned(call.k, 16) && is_aligned(call.v, 16);
  params.out_wide = is_aligned(call.out, 16);
  return params;
}

}  // namespace exafuse
