// The attention ops over tensors of keys: one sequence a batch row, or packed one after the other.

#include "common/launch.h"
#include "common/tensor.h"
#include "kernels/attention/attention_call.h"
#include "kernels/attention/prefill.h"
#include "ops.h"

namespace exafuse {
namespace {

void run_attention(const AttentionCall& call) {
  const AttentionParams params = check_attention_call(call);
  if (call.out.numel() == 0 || params.batch == 0 || params.seqlen_q == 0) return;
  const DeviceGuard guard(call.q.device);
  launch_prefill(params, false, call.q.stream());
}

}  // namespace

void flash_attn_func(Tensor q, Tensor k, Tensor v, Real softmax_scale, Count window_left,
                     Count window_right, Tensor out, std::optional<Tensor> lse) {
  run_attention({.q = q,
                 .k = k,
                 .v = v,
                 .softmax_scale = softmax_scale,
                 .window_left = window_left,
                 .window_right = window_right,
                 .out = out,
                 .lse = lse});
}

void flash_attn_varlen_func(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                            Count max_seqlen_q, Real softmax_scale, Count window_left,
                            Count window_right, Tensor out, std::optional<Tensor> lse) {
  run_attention({.q = q,
                 .k = k,
                 .v = v,
                 .softmax_scale = softmax_scale,
                 .window_left = window_left,
                 .window_right = window_right,
                 .out = out,
                 .lse = lse,
                 .cu_seqlens_q = &cu_seqlens_q,
                 .cu_seqlens_k = &cu_seqlens_k,
                 .max_seqlen_q = max_seqlen_q});
}

}  // namespace exafuse
