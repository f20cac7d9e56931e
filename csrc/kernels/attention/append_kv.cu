// Copies new keys and values to their slots: a vector of 8 elements of k and of v a thread.

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/attention/append_kv.h"
#include "kernels/attention/attention_call.h"
#include "kernels/attention/sequence.cuh"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 256;
inline constexpr int kVector = 8;

// 16-bit elements are copied as they are, whatever they mean.
using Element = __half;

struct AppendParams {
  AttentionParams call;
  const Element* k;  // [batch, seqlen_new, num_kv_heads, head_dim]
  const Element* v;
  Element* k_cache;
  Element* v_cache;
  AttentionStrides k_strides;
  AttentionStrides v_strides;
};

template <bool kWide>
__global__ void __launch_bounds__(kBlockThreads)
    append_kv_kernel(const __grid_constant__ AppendParams p) {
  const AttentionParams& call = p.call;
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();
  int64_t index = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int vectors = call.head_dim / kVector;
  const int dim = static_cast<int>(index % vectors) * kVector;
  index /= vectors;
  const int head = static_cast<int>(index % call.num_kv_heads);
  index /= call.num_kv_heads;
  const int token = static_cast<int>(index % call.appended);
  if (index / call.appended >= call.batch) return;
  const int b = static_cast<int>(index / call.appended);

  const int length = call.cache_seqlens[b];
  const int64_t end = call.ring ? INT32_MAX : call.key_capacity();
  if (length < 0 || int64_t{length} + token >= end) return;
  const Sequence sequence(call, b);
  const int position = length + token;
  const auto copy = [&](const Element* from, const AttentionStrides& from_strides, Element* to,
                        const AttentionStrides& to_strides) {
    const Element* source =
        from + b * from_strides.batch + token * from_strides.row + head * from_strides.head + dim;
    Element* target = to + sequence.key_offset(to_strides, position, head) + dim;
    Vec<Element, kVector>::template load_readonly<kWide>(source).template store<kWide>(target);
  };
  copy(p.k, p.k_strides, p.k_cache, call.k_strides);
  copy(p.v, p.v_strides, p.v_cache, call.v_strides);
}

}  // namespace

void launch_append_kv(const AttentionParams& params, const Tensor& k, const Tensor& v,
                      const Tensor& k_cache, const Tensor& v_cache, Stream stream) {
  const int64_t vectors =
      int64_t{params.batch} * params.appended * params.num_kv_heads * (params.head_dim / kVector);
  if (vectors == 0 || params.key_rows == 0 || params.key_capacity() == 0) return;
  const AppendParams append{
      .call = params,
      .k = k.data_as<const Element>(),
      .v = v.data_as<const Element>(),
      .k_cache = k_cache.data_as<Element>(),
      .v_cache = v_cache.data_as<Element>(),
      .k_strides = strides_of(k),
      .v_strides = strides_of(v),
  };
  const LaunchConfig config{
      .grid = dim3(grid_size((vectors + kBlockThreads - 1) / kBlockThreads)),
      .block = dim3(kBlockThreads),
      .stream = stream,
      .pdl = true,
  };
  const bool wide =
      is_aligned(k, 16) && is_aligned(v, 16) && is_aligned(k_cache, 16) && is_aligned(v_cache, 16);
  if (wide) {
    launch(append_kv_kernel<true>, config, append);
  } else {
    launch(append_kv_kernel<false>, config, append);
  }
}

}  // namespace exafuse
