// The decode kernels: a few queries a sequence over a long cache, which is split among blocks.
#pragma once

#include <cstdint>

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// The most queries of a sequence that the decode kernel takes; longer calls are prefill's.
inline constexpr int kMaxDecodeQueries = 16;

// Bytes that launch_decode needs, from what the host knows.
int64_t decode_workspace_bytes(int64_t total_q, int64_t max_seqlen_q, int64_t num_heads,
                               int64_t head_dim, int64_t key_capacity, int64_t window_left);

// Attention of at most kMaxDecodeQueries queries a sequence, then the combination of the splits.
void launch_decode(const AttentionParams& params, float* workspace, Stream stream);

}  // namespace exafuse
