// Attention over a cache: which kernels a call takes.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/launch.h"
#include "kernels/attention/append_kv.h"
#include "kernels/attention/attention_call.h"
#include "kernels/attention/decode.h"
#include "kernels/attention/prefill.h"
#include "ops.h"

namespace exafuse {
namespace {

// The bytes that the call needs must be there, and belong to nobody else.
float* check_workspace(const std::optional<Tensor>& workspace, int64_t bytes,
                       const AttentionCall& call) {
  if (bytes == 0) return nullptr;
  const std::string expected = std::to_string(bytes / 4) + " or more elements";
  if (!workspace.has_value()) fail("workspace", expected + " of float32", "None");
  check_is_tensor("workspace", *workspace);
  if (workspace->ndim != 1 || workspace->size(0) * 4 < bytes) {
    fail("workspace", expected, to_string(workspace->shape, workspace->ndim));
  }
  check_dtype("workspace", *workspace, {DType::kFloat32});
  check_last_stride("workspace", *workspace);
  if (reinterpret_cast<uintptr_t>(workspace->data) % 16 != 0) {
    fail("workspace", "data aligned to 16 bytes",
         "an address that is " + std::to_string(reinterpret_cast<uintptr_t>(workspace->data) % 16) +
             " bytes off");
  }
  const auto check_apart = [&](const char* name, const Tensor& tensor) {
    check_disjoint("workspace", *workspace, name, tensor);
  };
  call.for_each_input(check_apart);
  call.for_each_table(check_apart);
  call.for_each_output(check_apart);
  check_device("workspace", *workspace, call.q.device);
  return workspace->data_as<float>();
}

}  // namespace

void flash_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k,
                             std::optional<Tensor> v, std::optional<Tensor> cache_seqlens,
                             std::optional<Tensor> cache_batch_idx,
                             std::optional<Tensor> cache_leftpad, std::optional<Tensor> block_table,
                             Real softmax_scale, Count window_left, Count window_right,
                             std::optional<Tensor> cu_seqlens_q, Count max_seqlen_q, bool ring,
                             std::optional<Tensor> workspace, Tensor out,
                             std::optional<Tensor> lse) {
  const CacheArguments cache{.k = k,
                             .v = v,
                             .cache_seqlens = cache_seqlens,
                             .cache_batch_idx = cache_batch_idx,
                             .cache_leftpad = cache_leftpad,
                             .block_table = block_table,
                             .ring = ring};
  const AttentionCall call{
      .q = q,
      .k = k_cache,
      .v = v_cache,
      .softmax_scale = softmax_scale,
      .window_left = window_left,
      .window_right = window_right,
      .out = out,
      .lse = lse,
      .cu_seqlens_q = cu_seqlens_q.has_value() ? &*cu_seqlens_q : nullptr,
      .max_seqlen_q = max_seqlen_q,
      .cache = &cache,
      .k_name = "k_cache",
      .v_name = "v_cache",
  };
  const AttentionParams params = check_attention_call(call);
  const int64_t total_q =
      params.cu_seqlens_q != nullptr ? params.total_q : int64_t{params.batch} * params.seqlen_q;
  float* given = check_workspace(
      workspace,
      flash_attn_with_kvcache_workspace(total_q, params.seqlen_q, params.num_heads, params.head_dim,
                                        params.key_capacity(), params.window.left),
      call);

  const Stream stream = q.stream();
  const DeviceGuard guard(q.device);
  if (k.has_value()) launch_append_kv(params, *k, *v, k_cache, v_cache, stream);
  if (params.seqlen_q <= kMaxDecodeQueries) {
    launch_decode(params, given, stream);
  } else {
    launch_prefill(params, true, stream);
  }
}

int64_t flash_attn_with_kvcache_workspace(int64_t total_q, int64_t max_seqlen_q, int64_t num_heads,
                                          int64_t head_dim, int64_t key_capacity,
                                          int64_t window_left) {
  const int64_t longest = std::min(max_seqlen_q, total_q);
  if (longest < 1 || longest > kMaxDecodeQueries) return 0;
  return decode_workspace_bytes(total_q, longest, num_heads, head_dim, key_capacity, window_left);
}

}  // namespace exafuse
