// The attention of a vision transformer: rotation of q and k by the angles of their token, then
// attention without a mask inside each segment. Segments are windows of an image, of at most 64
// tokens, which one launch handles whole.

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/launch.h"
#include "kernels/attention/attention_call.h"
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
  params.max_seqlen = check_int("max_seqlen", check_count("max_seqlen", max_seqlen), 0, kMaxWindow);
  params.scale_log2 = check_scale(softmax_scale);
  check_workspace(call,
                  vision_attn_workspace(params.num_tokens, params.num_heads, params.num_kv_heads,
                                        params.head_dim, params.max_seqlen));
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
  launch_vision_window(params, qkv.stream());
}

int64_t vision_attn_workspace(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }

}  // namespace exafuse
