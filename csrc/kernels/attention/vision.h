// The kernels of vision_attn, and what a call says to them.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace exafuse {

// The longest segment that the window kernel takes; longer ones are frames.
inline constexpr int kMaxWindow = 64;

// q, k and v are parts of one projection [num_tokens, heads * head_dim].
struct VisionParams {
  const void* q = nullptr;  // first head of each part
  const void* k = nullptr;
  const void* v = nullptr;
  const float* cos = nullptr;  // [num_tokens, head_dim / 2]
  const float* sin = nullptr;
  const int32_t* cu_seqlens = nullptr;  // [segments + 1]
  void* out = nullptr;                  // [num_tokens, num_heads, head_dim]
  int64_t token_stride = 0;             // of q, k and v; heads are head_dim apart
  int64_t cos_stride = 0;
  int64_t sin_stride = 0;
  int64_t out_token_stride = 0;
  int64_t out_head_stride = 0;

  int num_tokens = 0;
  int segments = 0;
  int max_seqlen = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int gqa_group_size = 0;
  int head_dim = 0;

  float scale_log2 = 0;   // softmax_scale * log2(e), > 0
  bool wide = false;      // rows of q, k, v, cos and sin start at multiples of 16 bytes
  bool out_wide = false;  // rows of out do
  DType dtype = DType::kOther;
};

// Rotation and attention in one launch, for segments of at most kMaxWindow tokens.
void launch_vision_window(const VisionParams& params, Stream stream);

// Rotated q and k of every token, to `rotated` [num_tokens, num_heads + num_kv_heads, head_dim].
// `wide`: its rows, too, start at multiples of 16 bytes.
void launch_vision_rope(const VisionParams& params, void* rotated, bool wide, Stream stream);

}  // namespace exafuse
