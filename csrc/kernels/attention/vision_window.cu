// Attention inside windows of at most 64 tokens, rotation included, in one launch:
//
//   out = softmax(rotated(q) rotated(k)^T * softmax_scale) v     within each segment
//
// A block takes one window and one kv head. It brings k (rotated) and v into shared memory once;
// then its warps share out the q heads of that kv head, 16 rows at a time. A window's scores fit
// the registers of a warp, 16 x 64, so softmax is one pass: no running maximum, nothing rescaled.

#include <bit>
#include <cstdint>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "common/softmax.cuh"
#include "common/vec.cuh"
#include "kernels/attention/vision.h"
#include "kernels/attention/vision_window.cuh"

namespace exafuse {
namespace {

inline constexpr int kWarps = kWindowThreads / ptx::kWarpSize;
inline constexpr int kQueryRows = 16;              // of a warp at a time
inline constexpr int kKeyTiles = kMaxWindow / 8;   // 8 keys are the columns of one product
inline constexpr int kKeySteps = kMaxWindow / 16;  // 16 keys are the depth of one product
inline constexpr int kOutChunks = 4;               // chunks of the output made at a time

// --- kernel -------------------------------------------------------------------------------------

template <class T, int kTile>
struct WindowScratch {
  T* k;
  T* v;

  template <class Arena>
  static constexpr WindowScratch take_from(Arena& arena) {
    return {arena.template take<T, kMaxWindow * kTile>(),
            arena.template take<T, kMaxWindow * kTile>()};
  }
};

// The scores of 16 rows with every key of the window.
template <class T, int kTile>
__device__ __forceinline__ void multiply_keys(const WindowTile<T, kTile>& k,
                                              const uint32_t (&q)[kTile / 16][4],
                                              float (&scores)[kKeyTiles][4]) {
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
  }
#pragma unroll
  for (int key_step = 0; key_step < kKeySteps; ++key_step) {
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      uint32_t first[2];
      uint32_t second[2];
      k.load_b(first, second, key_step * 16, step * 2);
      float (&low)[4] = scores[2 * key_step];
      float (&high)[4] = scores[2 * key_step + 1];
      ptx::mma_m16n8k16<T>(low, q[step], first, low);
      ptx::mma_m16n8k16<T>(high, q[step], second, high);
    }
  }
}

// Scores become weights; gives back 1 / their sum for the lane's two rows. The keys from `length`
// on weigh nothing. A row sees at least one key, so one whose scores are all -inf, or one of them
// +inf or NaN, is NaN, as 0 / 0 and inf / inf are.
__device__ __forceinline__ void weigh(float (&scores)[kKeyTiles][4], int length, float scale_log2,
                                      float (&inverse)[2]) {
  const int first_key = static_cast<int>(threadIdx.x % 4) * 2;
  float maximum[2] = {kMasked, kMasked};
  if (length < kMaxWindow) {
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i * 8 + first_key + j % 2 >= length) scores[i][j] = kMasked;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) maximum[j / 2] = ptx::max(maximum[j / 2], scores[i][j]);
  }
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    maximum[i] = ptx::max(maximum[i], ptx::shfl_xor(maximum[i], 1));
    maximum[i] = ptx::max(maximum[i], ptx::shfl_xor(maximum[i], 2));
    maximum[i] *= scale_log2;
  }
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i][j] = softmax_term(scores[i][j], scale_log2, maximum[j / 2]);
      sum[j / 2] += scores[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += ptx::shfl_xor(sum[i], 1);
    sum[i] += ptx::shfl_xor(sum[i], 2);
    // A row whose scores are all -inf gives 0, as one that sees no key.
    inverse[i] = sum[i] == 0.0f ? 0.0f : ptx::rcp(sum[i]);
  }
}

// Among four neighbouring lanes, word j of lane i becomes word i of lane j.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&w)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const bool high = threadIdx.x % 4 >= 2;
  const uint32_t from_low = ptx::shfl_xor(odd ? w[0] : w[1], 1);
  const uint32_t from_high = ptx::shfl_xor(odd ? w[2] : w[3], 1);
  const uint32_t x[4] = {odd ? from_low : w[0], odd ? w[1] : from_low, odd ? from_high : w[2],
                         odd ? w[3] : from_high};
  const uint32_t first = ptx::shfl_xor(high ? x[0] : x[2], 2);
  const uint32_t second = ptx::shfl_xor(high ? x[1] : x[3], 2);
  return high ? uint4{first, second, x[2], x[3]} : uint4{x[0], x[1], first, second};
}

// Weights times v, normalised and written, 32 columns at a time.
template <class T, int kTile>
__device__ __forceinline__ void multiply_values(const VisionParams& p,
                                                const WindowTile<T, kTile>& v,
                                                const float (&weights)[kKeyTiles][4],
                                                const float (&inverse)[2], Segment segment,
                                                int head, int first_row) {
  const int lane_id = static_cast<int>(threadIdx.x % ptx::kWarpSize);
  uint32_t a[kKeySteps][4];
#pragma unroll
  for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = weights[2 * step + i / 2];
      a[step][i] = ptx::pack2<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int first_chunk = 0; first_chunk < WindowTile<T, kTile>::kChunks;
       first_chunk += kOutChunks) {
    if (first_chunk * kChunkElements >= p.head_dim) break;
    float out[kOutChunks][4] = {};
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < kOutChunks; i += 2) {
        uint32_t first[2];
        uint32_t second[2];
        v.load_b_trans(first, second, step * 16, first_chunk + i);
        ptx::mma_m16n8k16<T>(out[i], a[step], first, out[i]);
        ptx::mma_m16n8k16<T>(out[i + 1], a[step], second, out[i + 1]);
      }
    }
    const int chunk = first_chunk + lane_id % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t words[kOutChunks];
#pragma unroll
      for (int j = 0; j < kOutChunks; ++j) {
        words[j] = ptx::pack2<T>(out[j][2 * i] * inverse[i], out[j][2 * i + 1] * inverse[i]);
      }
      const auto vec = std::bit_cast<Vec<T, kChunkElements>>(transpose_quad(words));
      const int row = first_row + lane_id / 4 + 8 * i;
      if (row >= segment.rows || chunk * kChunkElements >= p.head_dim) continue;
      T* address = static_cast<T*>(p.out) + (segment.begin + row) * p.out_token_stride +
                   head * p.out_head_stride + chunk * kChunkElements;
      if (p.out_wide) {
        vec.template store<true>(address);
      } else {
        vec.template store<false>(address);
      }
    }
  }
}

// What a warp works on at a time: 16 rows of one q head.
struct Unit {
  int head = 0;  // of those that share the kv head
  int row_block = 0;

  __device__ __forceinline__ Unit after(int count, int row_blocks) const {
    Unit unit{head, row_block + count};
    while (unit.row_block >= row_blocks) {
      unit.row_block -= row_blocks;
      ++unit.head;
    }
    return unit;
  }
};

template <class T, int kTile>
__global__ void __launch_bounds__(kWindowThreads)
    vision_window_kernel(const __grid_constant__ VisionParams p) {
  SharedArena arena;
  const auto scratch = WindowScratch<T, kTile>::take_from(arena);
  const WindowTile<T, kTile> k_tile(scratch.k);
  const WindowTile<T, kTile> v_tile(scratch.v);
  const int tid = static_cast<int>(threadIdx.x);
  const int kv_head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.num_kv_heads));
  ptx::griddep_wait();

  const Segment segment =
      segment_of(p, static_cast<int>(blockIdx.x / static_cast<unsigned>(p.num_kv_heads)));
  if (segment.rows <= 0) return;
  const int row_blocks = (segment.rows + kQueryRows - 1) / kQueryRows;
  const int first_head = kv_head * p.gqa_group_size;
  const int64_t kv_column = int64_t{kv_head} * p.head_dim;

  QueryRows<T, kTile> queries;
  const auto load_queries = [&](Unit unit) {
    const T* head = static_cast<const T*>(p.q) + int64_t{first_head + unit.head} * p.head_dim;
    if (p.wide) {
      queries.template load<true>(p, segment, head, unit.row_block * kQueryRows);
    } else {
      queries.template load<false>(p, segment, head, unit.row_block * kQueryRows);
    }
  };

  v_tile.template load<kWindowThreads>(
      static_cast<const T*>(p.v) + segment.begin * p.token_stride + kv_column, p.token_stride, 0,
      segment.length, p.head_dim, p.wide, tid);
  ptx::cp_async_commit();
  Unit unit = Unit{}.after(static_cast<int>(threadIdx.x / ptx::kWarpSize), row_blocks);
  if (unit.head < p.gqa_group_size) load_queries(unit);
  const T* k = static_cast<const T*>(p.k) + kv_column;
  if (p.wide) {
    load_keys<true, T, kTile>(p, segment, k, k_tile);
  } else {
    load_keys<false, T, kTile>(p, segment, k, k_tile);
  }
  ptx::griddep_launch_dependents();
  ptx::cp_async_wait<0>();
  ptx::sync_threads();

  while (unit.head < p.gqa_group_size) {
    const int first_row = unit.row_block * kQueryRows;
    uint32_t q[kTile / 16][4];
    if (p.wide) {
      queries.template rotate<true>(p, segment, first_row, q);
    } else {
      queries.template rotate<false>(p, segment, first_row, q);
    }
    const Unit next = unit.after(kWarps, row_blocks);
    if (next.head < p.gqa_group_size) load_queries(next);

    float scores[kKeyTiles][4];
    multiply_keys<T, kTile>(k_tile, q, scores);
    float inverse[2];
    weigh(scores, segment.length, p.scale_log2, inverse);
    multiply_values<T, kTile>(p, v_tile, scores, inverse, segment, first_head + unit.head,
                              first_row);
    unit = next;
  }
}

}  // namespace

// --- host ---------------------------------------------------------------------------------------

void launch_vision_window(const VisionParams& params, Stream stream) {
  const LaunchConfig config{
      .grid = dim3(grid_size(int64_t{params.segments} * params.num_kv_heads)),
      .block = dim3(kWindowThreads),
      .stream = stream,
      .pdl = true,
  };
  dispatch_dtype(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      dispatch_head_dim(params.head_dim, [&](auto tile) {
        constexpr int kTile = decltype(tile)::kValue;
        LaunchConfig sized = config;
        sized.smem_bytes = shared_bytes<WindowScratch<T, kTile>>();
        launch(vision_window_kernel<T, kTile>, sized, params);
      });
    }
  });
}

}  // namespace exafuse
