// Softmax over keys that arrive tile by tile. A row keeps the largest score so far and sums
// relative to it; when a larger score comes, what was summed is scaled down.
//
// A tile of which a row sees nothing changes no bit of the row: the largest score stays, the
// rescale is exactly 1, every term exactly 0. Results therefore do not depend on which rows share a
// tile walk.
#pragma once

#include <cmath>
#include <limits>

#include "common/ptx.cuh"

namespace exafuse {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kMasked = -std::numeric_limits<float>::infinity();

// What the exponents of a row are measured from. A row that has seen no key yet has none: 0 makes
// its terms exp2(-inf) = 0 instead of NaN.
__device__ __forceinline__ float softmax_base(float max_score, float scale_log2) {
  return max_score == kMasked ? 0.0f : max_score * scale_log2;
}

// exp(score * scale - base): one multiply-add, one exp2. `scale_log2` > 0 is the softmax scale
// times log2(e); a masked score gives exactly 0.
__device__ __forceinline__ float softmax_term(float score, float scale_log2, float base) {
  return ptx::exp2_ftz(ptx::fma(score, scale_log2, -base));
}

// The factor for what was summed before the largest score rose from `old_max` to `new_max`.
__device__ __forceinline__ float softmax_rescale(float old_max, float new_max, float scale_log2) {
  return old_max == new_max ? 1.0f : ptx::exp2_ftz((old_max - new_max) * scale_log2);
}

// Natural log of the sum of exp(score * scale); -inf for a row that saw no key, or keys whose
// scores are all -inf.
__device__ __forceinline__ float softmax_lse(float max_score, float sum, float scale_log2) {
  if (sum == 0) return kMasked;
  return (ptx::log2(sum) + max_score * scale_log2) * kLn2;
}

}  // namespace exafuse
