// The rotation of vision_attn: pairs (i, i + head_dim / 2) of a head by the angles of its token, in
// fp32, each element rounded once. Four neighbouring pairs are what a thread handles at a time: the
// elements 4 * j to 4 * j + 3 of both halves of the head. head_dim is a multiple of 8, so every
// head falls into whole groups of four.
#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace exafuse {

inline constexpr int kPairs = 4;

// The angles of four pairs.
template <class T>
struct Angles {
  float cos[kPairs];
  float sin[kPairs];

  template <bool kWide>
  __device__ __forceinline__ static Angles load(const float* cos, const float* sin) {
    Angles angles;
    load_as_compute<kWide, T>(cos, /*is_fp32=*/true, 0, angles.cos);
    load_as_compute<kWide, T>(sin, /*is_fp32=*/true, 0, angles.sin);
    return angles;
  }
};

template <class T>
struct PairVec {
  Vec<T, kPairs> first;   // of the first half of the head
  Vec<T, kPairs> second;  // their partners

  __device__ __forceinline__ static PairVec zero() {
    return {Vec<T, kPairs>::zero(), Vec<T, kPairs>::zero()};
  }

  // The pairs from `pair` on of the head at `head`.
  template <bool kWide>
  __device__ __forceinline__ static PairVec load(const T* head, int half, int pair) {
    return {Vec<T, kPairs>::template load_readonly<kWide>(head + pair),
            Vec<T, kPairs>::template load_readonly<kWide>(head + half + pair)};
  }

  template <bool kWide>
  __device__ __forceinline__ void store(T* head, int half, int pair) const {
    first.template store<kWide>(head + pair);
    second.template store<kWide>(head + half + pair);
  }

  __device__ __forceinline__ PairVec rotated(const Angles<T>& angles) const {
    float a[kPairs];
    float b[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      a[i] = ptx::fma(first.get(i), angles.cos[i], -(second.get(i) * angles.sin[i]));
      b[i] = ptx::fma(second.get(i), angles.cos[i], first.get(i) * angles.sin[i]);
    }
    return {Vec<T, kPairs>::rounded(a), Vec<T, kPairs>::rounded(b)};
  }
};

}  // namespace exafuse
