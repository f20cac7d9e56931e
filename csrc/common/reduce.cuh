// Sums over the threads of a row, and the norm made of them. The tree depends on the number of
// threads alone, never on how many rows share a block or a launch, so a row's result is the same
// bits in every batch.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <type_traits>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace exafuse {

// The sum over segments of `lanes` neighbouring lanes (a power of two up to 32), in every lane. All
// 32 lanes of the warp call.
template <class Value>
__device__ __forceinline__ Value lanes_sum(Value value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += ptx::shfl_xor(value, offset);
  return value;
}

// The sum over a one-dimensional block of whole warps, in every thread. `warp_sums` holds one value
// per warp; a second call needs other memory, or a barrier before it.
template <class Value>
__device__ __forceinline__ Value block_sum(Value value, Value* warp_sums) {
  const int warp_id = static_cast<int>(threadIdx.x) / ptx::kWarpSize;
  const int lane_id = static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / ptx::kWarpSize;
  value = lanes_sum(value, ptx::kWarpSize);
  if (lane_id == 0) warp_sums[warp_id] = value;
  ptx::sync_threads();
  return lanes_sum(lane_id < num_warps ? warp_sums[lane_id] : Value(0), ptx::kWarpSize);
}

// The sum of the squares of a vector's elements, each multiplied by `scale` first.
template <class T, int kCount>
__device__ __forceinline__ Compute<T> sum_of_squares(const Vec<T, kCount>& vec, Compute<T> scale) {
  Compute<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Compute<T> x = vec.get(i) * scale;
    sum = ptx::fma(x, x, sum);
  }
  return sum;
}

// 1 / sqrt(mean(x^2) + eps) of a row of `count` elements, in every thread of the row.
// `row_sum(scale, attempt)` is a collective that yields the sum of (scale * x)^2 over the whole
// row; `any` tells whether a condition holds in some row of those that must call it together.
//
// bf16 reaches 3e38, whose square no fp32 holds. Such a row is summed again, scaled by a power of
// two; rows that must come along do so unscaled and arrive at the same bits as before.
template <class T, class RowSum, class Any>
__device__ __forceinline__ Compute<T> inverse_rms(int count, Compute<T> eps, RowSum row_sum,
                                                  Any any) {
  Compute<T> scale = 1;
  Compute<T> sum = row_sum(scale, 0);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const bool overflows = std::isinf(sum);
    if (any(overflows)) {
      if (overflows) scale = 0x1p-80f;
      sum = row_sum(scale, 1);
    }
  }
  return scale / std::sqrt(sum / static_cast<Compute<T>>(count) + eps * scale * scale);
}

}  // namespace exafuse
