// Tiles of keys, by number: tile t holds the keys from t * kKeys on, whatever the sequence.
#pragma once

#include "common/mask.cuh"

namespace exafuse {

// Numbers of tiles, from begin to before end.
struct TileRange {
  int begin = 0;
  int end = 0;

  __device__ __forceinline__ bool contains(int tile) const { return tile >= begin && tile < end; }
  __device__ __forceinline__ bool empty() const { return end <= begin; }
};

// Of all queries between two, whose ranges of keys are given: the tiles that any of them sees a key
// of, and the tiles of which each sees every key.
template <int kKeys>
__device__ __forceinline__ TileRange tiles_of_any(const KeyRange& first, const KeyRange& last) {
  if (last.end <= first.begin) return {0, 0};
  return {first.begin / kKeys, (last.end - 1) / kKeys + 1};
}
template <int kKeys>
__device__ __forceinline__ TileRange tiles_of_all(const KeyRange& first, const KeyRange& last) {
  return {last.begin / kKeys + (last.begin % kKeys != 0 ? 1 : 0), first.end / kKeys};
}

}  // namespace exafuse
