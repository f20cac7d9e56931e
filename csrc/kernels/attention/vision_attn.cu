// The attention of a vision transformer: rotation of q and k by the angles of their token, then
// attention without a mask inside each segment. Segments are windows of an image, of at most 64
// tokens, which one launch handles whole; or frames of any length, for which one launch writes the
// rotated q and k to a buffer, and the kernels of long sequences read them there.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/launch.h"
#include "kernels/attention/attention_call.h"
#include "kernels/attention/prefill.h"
#include "kernels/attention/vision.h"
#include "kernels/heads_call.h"
#include "ops.h"

namespace exafuse {
namespace {

struct VisionCall {
  const Tensor& qkv;
  const Tensor& cos;
  const Tensor& sin;
  const Tensor& cu_seqlens;
  const std::optional<Tensor>& workspace;
  const Tensor& out;

  // visit(name, tensor) for every tensor that is read.
  template <class Visit>
  void for_each_input(Visit visit) const {
    visit("qkv", qkv);
    visit("cos", cos);
    visit("sin", sin);
    visit("cu_seqlens", cu_seqlens);
  }

  template <class Visit>
  void for_each_output(Visit visit) const {
    visit("out", out);
    if (workspace.has_value()) visit("workspace", *workspace);
  }
};

void check_shapes(const VisionCall& call, const Tensor& q) {
  Dim num_tokens{"num_tokens", q.size(0)};
  Dim num_heads{"num_heads", q.size(1)};
  Dim head_dim{"head_dim", q.size(2)};
  check_multiple("head_dim", head_dim.value, 8, kMaxHeadDim);
  check_shape("cos", call.cos, {num_tokens, head_dim.value / 2});
  check_shape("sin", call.sin, {num_tokens, head_dim.value / 2});
  check_is_tensor("cu_seqlens", call.cu_seqlens);
  if (call.cu_seqlens.ndim != 1 || call.cu_seqlens.size(0) < 1) {
    fail("cu_seqlens", "(segments + 1,)", to_string(call.cu_seqlens.shape, call.cu_seqlens.ndim));
  }
  check_shape("out", call.out, {num_tokens, num_heads, head_dim});
}

void check_workspace(const VisionCall& call, int64_t bytes) {
  if (bytes == 0 && !call.workspace.has_value()) return;
  if (!call.workspace.has_value()) {
    fail("workspace", "fp32 (" + std::to_string(bytes / 4) + ",)", "None");
  }
  Dim elements{"bytes / 4"};
  check_shape("workspace", *call.workspace, {elements});
  if (elements.value < bytes / 4) {
    fail("workspace", "at least " + std::to_string(bytes / 4) + " elements",
         std::to_string(elements.value));
  }
}

void check_memory(const VisionCall& call) {
  check_dtype("qkv", call.qkv, {DType::kBFloat16, DType::kFloat16});
  check_dtype("cos", call.cos, {DType::kFloat32});
  check_dtype("sin", call.sin, {DType::kFloat32});
  check_dtype("cu_seqlens", call.cu_seqlens, {DType::kInt32});
  check_dtype("out", call.out, {call.qkv.dtype});
  if (call.workspace.has_value()) check_dtype("workspace", *call.workspace, {DType::kFloat32});

  const auto check_layout = [](const char* name, const Tensor& tensor) {
    check_last_stride(name, tensor);
    check_alignment(name, tensor);
  };
  call.for_each_input(check_layout);
  call.for_each_output(check_layout);
  call.for_each_output(check_writable);
  call.for_each_output([&](const char* output_name, const Tensor& output) {
    const auto check_apart = [&](const char* name, const Tensor& tensor) {
      if (&tensor != &output) check_disjoint(output_name, output, name, tensor);
    };
    call.for_each_input(check_apart);
    call.for_each_output(check_apart);
  });

  check_device("qkv", call.qkv);
  const auto check_same_device = [&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, call.qkv.device);
  };
  call.for_each_input(check_same_device);
  call.for_each_output(check_same_device);
}

// Attention over whole frames, by what `rotated` holds: q and k of every token, without gaps.
AttentionParams frame_attention(const VisionParams& vision, void* rotated, bool wide) {
  AttentionParams params;
  const int64_t q_columns = int64_t{vision.num_heads} * vision.head_dim;
  const int64_t row = q_columns + int64_t{vision.num_kv_heads} * vision.head_dim;
  params.q = rotated;
  params.k = static_cast<char*>(rotated) + q_columns * size_bytes(vision.dtype);
  params.v = vision.v;
  params.out = vision.out;
  params.q_strides = {.row = row, .head = vision.head_dim};
  params.k_strides = params.q_strides;
  params.v_strides = {.row = vision.token_stride, .head = vision.head_dim};
  params.out_strides = {.row = vision.out_token_stride, .head = vision.out_head_stride};
  params.batch = vision.segments;
  params.num_heads = vision.num_heads;
  params.num_kv_heads = vision.num_kv_heads;
  params.gqa_group_size = vision.gqa_group_size;
  params.head_dim = vision.head_dim;
  params.seqlen_q = vision.max_seqlen;
  params.total_q = vision.num_tokens;
  params.cu_seqlens_q = vision.cu_seqlens;
  params.cu_seqlens_k = vision.cu_seqlens;
  params.total_k = vision.num_tokens;
  params.scale_log2 = vision.scale_log2;
  params.wide = wide;
  params.out_wide = vision.out_wide;
  params.dtype = vision.dtype;
  return params;
}

}  // namespace

void vision_attn(Tensor qkv, Count num_heads, Count num_kv_heads, Tensor cos, Tensor sin,
                 Tensor cu_seqlens, Count max_seqlen, Real softmax_scale,
                 std::optional<Tensor> workspace, Tensor out) {
  const Heads heads = split_heads(qkv, std::nullopt, std::nullopt, num_heads, num_kv_heads);
  const Tensor q = heads.q.tensor();
  const VisionCall call{qkv, cos, sin, cu_seqlens, workspace, out};
  check_shapes(call, q);

  VisionParams params;
  params.num_tokens = check_int("num_tokens", q.size(0), 0, kMaxTokens);
  params.segments = check_int("segments", cu_seqlens.size(0) - 1, 0, kMaxTokens);
  params.num_heads = check_int("num_heads", num_heads.value, 1, kMaxTokens);
  params.num_kv_heads = static_cast<int>(num_kv_heads.value);
  params.gqa_group_size = params.num_heads / params.num_kv_heads;
  params.head_dim = static_cast<int>(q.size(2));
  const int64_t longest = check_count("max_seqlen", max_seqlen);
  if (longest < 0) fail("max_seqlen", "at least 0", std::to_string(longest));
  params.max_seqlen = static_cast<int>(std::min<int64_t>(longest, params.num_tokens));
  params.scale_log2 = check_scale(softmax_scale);
  check_workspace(call, vision_attn_workspace(params.num_tokens, params.num_heads,
                                              params.num_kv_heads, params.head_dim, longest));
  check_memory(call);

  params.q = heads.q.tensor().data;
  params.k = heads.k.tensor().data;
  params.v = heads.v.tensor().data;
  params.cos = cos.data_as<const float>();
  params.sin = sin.data_as<const float>();
  params.cu_seqlens = cu_seqlens.data_as<const int32_t>();
  params.out = out.data;
  params.token_stride = qkv.stride(0);
  params.cos_stride = cos.stride(0);
  params.sin_stride = sin.stride(0);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.wide = is_aligned(qkv, 16) && is_aligned(cos, 16) && is_aligned(sin, 16);
  params.out_wide = is_aligned(out, 16);
  params.dtype = qkv.dtype;
  if (params.num_tokens == 0 || params.segments == 0 || params.max_seqlen == 0) return;

  const DeviceGuard guard(qkv.device);
  const Stream stream = qkv.stream();
  if (longest <= kMaxWindow) {
    launch_vision_window(params, stream);
    return;
  }
  const bool wide = params.wide && is_aligned(*workspace, 16);
  launch_vision_rope(params, workspace->data, wide, stream);
  launch_prefill(frame_attention(params, workspace->data, wide), false, stream);
}

int64_t vision_attn_workspace(int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, int64_t max_seqlen) {
  if (max_seqlen <= kMaxWindow) return 0;
  return num_tokens * (num_heads + num_kv_heads) * head_dim * size_bytes(DType::kBFloat16);
}

}  // namespace exafuse
