// Rotation of q and k for segments that are whole frames: once per token, into a buffer that
// attention then reads as often as its tiles ask for. A block takes one token; its threads are
// columns by heads, and a thread keeps the angles of its columns for all heads that it visits.

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "kernels/attention/vision.h"
#include "kernels/attention/vision_rotation.cuh"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 128;

// --- kernel -------------------------------------------------------------------------------------

struct RopeParams {
  const void* heads;  // [num_tokens, num_heads, head_dim], those of q and k
  void* rotated;      // the same, without gaps
  const float* cos;   // [num_tokens, head_dim / 2]
  const float* sin;
  int64_t token_stride;  // of heads
  int64_t cos_stride;
  int64_t sin_stride;
  int num_heads;
  int head_dim;
};

template <class T, bool kWide>
__global__ void __launch_bounds__(kBlockThreads)
    vision_rope_kernel(const __grid_constant__ RopeParams p) {
  const int64_t token = blockIdx.x;
  const int half = p.head_dim / 2;
  const int pair = static_cast<int>(threadIdx.x) * kPairs;
  const T* heads = static_cast<const T*>(p.heads) + token * p.token_stride;
  T* rotated = static_cast<T*>(p.rotated) + token * p.num_heads * p.head_dim;
  ptx::griddep_wait();

  const auto angles = Angles<T>::template load<kWide>(p.cos + token * p.cos_stride + pair,
                                                      p.sin + token * p.sin_stride + pair);
#pragma unroll 4
  for (int head = static_cast<int>(threadIdx.y); head < p.num_heads;
       head += static_cast<int>(blockDim.y)) {
    const int64_t column = int64_t{head} * p.head_dim;
    PairVec<T>::template load<kWide>(heads + column, half, pair)
        .rotated(angles)
        .template store<kWide>(rotated + column, half, pair);
  }
  ptx::griddep_launch_dependents();
}

}  // namespace

// --- host ---------------------------------------------------------------------------------------

void launch_vision_rope(const VisionParams& params, void* rotated, bool wide, Stream stream) {
  const RopeParams rope{
      .heads = params.q,
      .rotated = rotated,
      .cos = params.cos,
      .sin = params.sin,
      .token_stride = params.token_stride,
      .cos_stride = params.cos_stride,
      .sin_stride = params.sin_stride,
      .num_heads = params.num_heads + params.num_kv_heads,
      .head_dim = params.head_dim,
  };
  const int columns = params.head_dim / 2 / kPairs;
  const int heads = std::min(kBlockThreads / columns, rope.num_heads);
  const LaunchConfig config{
      .grid = dim3(grid_size(params.num_tokens)),
      .block = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(heads)),
      .stream = stream,
      .pdl = true,
  };
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      dispatch_bool(wide, [&](auto is_wide) {
        launch(vision_rope_kernel<T, decltype(is_wide)::kValue>, config, rope);
      });
    }
  });
}

}  // namespace exafuse
