// What the window kernel of vision_attn reads: its segment, and q and k on their way into
// fragments.
//
// q never goes through shared memory. The sum over the head dimension may run in any order if q and
// k agree on it, so within 16 columns a lane holds four neighbouring ones where the fragment has
// two and two: it loads them in one access, finds both elements of each pair in its own registers,
// and k is stored in that order. Both halves of a head are padded to half of the tile's columns.
#pragma once

#include <bit>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "common/vec.cuh"
#include "kernels/attention/sequence.cuh"
#include "kernels/attention/vision.h"
#include "kernels/attention/vision_rotation.cuh"

namespace exafuse {

inline constexpr int kWindowThreads = 128;  // of a block

// The tokens of a segment, and how many of its rows are wanted.
struct Segment {
  int begin;
  int length;
  int rows;

  // Of a row, or of the last one for the rows behind it.
  __device__ __forceinline__ int64_t token(int row) const {
    return int64_t{begin} + (row < length ? row : length - 1);
  }
};

__device__ __forceinline__ Segment segment_of(const VisionParams& p, int index) {
  const int begin = clamp_to(p.cu_seqlens[index], 0, p.num_tokens);
  const int end = clamp_to(p.cu_seqlens[index + 1], begin, p.num_tokens);
  const int length = end - begin < kMaxWindow ? end - begin : kMaxWindow;
  return {begin, length, length < p.max_seqlen ? length : p.max_seqlen};
}

// `pair`, or 0 for one behind the last.
__device__ __forceinline__ int inside(int pair, int half) { return pair < half ? pair : 0; }

template <bool kWide, class T>
__device__ __forceinline__ Angles<T> angles_of(const VisionParams& p, int64_t token, int pair) {
  return Angles<T>::template load<kWide>(p.cos + token * p.cos_stride + pair,
                                         p.sin + token * p.sin_stride + pair);
}

template <class T, int kTile>
using WindowTile = SharedTile<T, kMaxWindow, kTile>;

// Writes four columns of k, group `group` of its row, where the fragments of operand b want them.
template <class T, int kTile>
__device__ __forceinline__ void store_group(const WindowTile<T, kTile>& tile, int row, int group,
                                            const Vec<T, kPairs>& vec) {
  const auto units = std::bit_cast<uint2>(vec);
  const int chunk = group / 4 * 2;
  reinterpret_cast<uint32_t*>(tile.chunk(row, chunk))[group % 4] = units.x;
  reinterpret_cast<uint32_t*>(tile.chunk(row, chunk + 1))[group % 4] = units.y;
}

// Rotated keys of the window. Rows behind its end repeat its last one, since their scores are
// masked; columns behind head_dim are zero.
template <bool kWide, class T, int kTile>
__device__ __forceinline__ void load_keys(const VisionParams& p, Segment segment, const T* k,
                                          const WindowTile<T, kTile>& tile) {
  constexpr int kGroups = kTile / 2 / kPairs;
  static_assert(kMaxWindow * kGroups % kWindowThreads == 0);
  const int half = p.head_dim / 2;
#pragma unroll 4
  for (int i = 0; i < kMaxWindow * kGroups / kWindowThreads; ++i) {
    const unsigned index = i * kWindowThreads + threadIdx.x;
    const auto row = static_cast<int>(index / kGroups);
    const auto group = static_cast<int>(index % kGroups);
    const int64_t token = segment.token(row);
    const int pair = inside(group * kPairs, half);
    auto pairs = PairVec<T>::template load<kWide>(k + token * p.token_stride, half, pair)
                     .rotated(angles_of<kWide, T>(p, token, pair));
    if (group * kPairs >= half) pairs = PairVec<T>::zero();
    store_group<T, kTile>(tile, row, group, pairs.first);
    store_group<T, kTile>(tile, row, group + kGroups, pairs.second);
  }
}

// 16 rows of a q head in a warp: a lane has rows lane / 4 and lane / 4 + 8, of every 16 columns the
// four from 4 * (lane % 4) on. Rows behind the window's end repeat its last one; columns behind
// head_dim repeat others, since those of k are zero.
template <class T, int kTile>
class QueryRows {
 public:
  static constexpr int kSteps = kTile / 16;

  template <bool kWide>
  __device__ __forceinline__ void load(const VisionParams& p, Segment segment, const T* head,
                                       int first_row) {
    const int half = p.head_dim / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = head + segment.token(first_row + lane_row(i)) * p.token_stride;
#pragma unroll
      for (int step = 0; step < kSteps / 2; ++step) {
        pairs_[i][step] = PairVec<T>::template load<kWide>(row, half, inside(pair_of(step), half));
      }
    }
  }

  // The rotated rows as operand a.
  template <bool kWide>
  __device__ __forceinline__ void rotate(const VisionParams& p, Segment segment, int first_row,
                                         uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t token = segment.token(first_row + lane_row(i));
#pragma unroll
      for (int step = 0; step < kSteps / 2; ++step) {
        const int pair = inside(pair_of(step), p.head_dim / 2);
        const auto pairs = pairs_[i][step].rotated(angles_of<kWide, T>(p, token, pair));
        const auto first = std::bit_cast<uint2>(pairs.first);
        const auto second = std::bit_cast<uint2>(pairs.second);
        a[step][i] = first.x;
        a[step][i + 2] = first.y;
        a[step + kSteps / 2][i] = second.x;
        a[step + kSteps / 2][i + 2] = second.y;
      }
    }
  }

 private:
  __device__ __forceinline__ static int lane_row(int i) {
    return static_cast<int>(threadIdx.x % ptx::kWarpSize / 4) + 8 * i;
  }

  __device__ __forceinline__ static int pair_of(int step) {
    return step * 16 + static_cast<int>(threadIdx.x % 4) * kPairs;
  }

  PairVec<T> pairs_[2][kSteps / 2];
};

}  // namespace exafuse
