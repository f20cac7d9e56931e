// The new keys and values of a call, written to the cache before attention reads it.
#pragma once

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// Writes k and v [batch, seqlen_new, num_kv_heads, head_dim] to the cache that `params` describes,
// the i-th token of sequence b at position cache_seqlens[b] + i. Dropped are tokens behind the end
// of the cache, and all of a sequence of negative length.
void launch_append_kv(const AttentionParams& params, const Tensor& k, const Tensor& v,
                      const Tensor& k_cache, const Tensor& v_cache, Stream stream);

}  // namespace exafuse
