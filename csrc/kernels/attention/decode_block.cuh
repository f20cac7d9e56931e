// What a block of decode works on: its share of the call, its shared memory, its way through the
// keys.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "kernels/attention/decode_splits.cuh"
#include "kernels/attention/decode_tiles.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/sequence.cuh"

namespace exafuse {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * ptx::kWarpSize;
static_assert(kKeyTile % (kDecodeWarps * kDecodeTileKeys) == 0 && kSmallestSplit % kKeyTile == 0);

// A column of a block: what it sees, and where its result goes.
struct Column {
  KeyRange seen;
  int64_t out;  // element offset in out, or row of the partial results
  int64_t lse;
};

// T: dtype; kCols: head dimension padded; kColumnTiles: columns, by eights.
template <class T, int kCols, int kColumnTiles>
struct DecodeShared {
  static constexpr int kColumns = kColumnTiles * 8;
  // 64 KiB of copies in flight a block at most: three blocks fit an SM of an H100, two one of an
  // A100, one any GPU since.
  static constexpr int kStages = kCols == 64 ? 4 : 2;
  using KeyTile = SharedTile<T, kDecodeTileKeys, kCols>;
  static constexpr int kQueryRows = (kColumns + 15) / 16 * 16;  // fragments come in pairs
  using QueryTile = SharedTile<T, kQueryRows, kCols>;
  static constexpr int kRing = kStages * 2 * KeyTile::kElements;  // k and v of one warp
  static_assert(kRing * sizeof(T) >= kColumns * kCols * sizeof(float));

  T* rings;    // [kDecodeWarps, kStages, 2, kDecodeTileKeys, kCols]; at the end, results [column,
               // dim]
  T* queries;  // [columns, kCols]
  Column* columns;    // [kColumns]
  float* max_scores;  // [kDecodeWarps, kColumns]
  float* sums;        // [kDecodeWarps, kColumns]

  template <class Arena>
  static constexpr DecodeShared take_from(Arena& arena) {
    return {arena.template take<T, kDecodeWarps * kRing>(),
            arena.template take<T, QueryTile::kElements>(), arena.template take<Column, kColumns>(),
            arena.template take<float, kDecodeWarps * kColumns>(),
            arena.template take<float, kDecodeWarps * kColumns>()};
  }

  // Where a warp leaves its result for a column: pairs of dims, no two lanes in one bank.
  __device__ __forceinline__ float* result(int warp_id, int column, int dim) const {
    return reinterpret_cast<float*>(rings + warp_id * kRing) + column * kCols +
           (dim ^ ((column >> 1 & 3) * 8));
  }
};

// The part of one block: some columns of a kv head, one split of a sequence's keys.
struct BlockWork {
  int sequence;
  int kv_head;
  int split;  // counted from the sequence's first
  int column_block;

  // Blocks that read the same keys are neighbours, then those that read the same slots.
  __device__ __forceinline__ explicit BlockWork(const DecodeParams& p) {
    unsigned index = blockIdx.x;
    column_block = static_cast<int>(index % static_cast<unsigned>(p.column_blocks));
    index /= static_cast<unsigned>(p.column_blocks);
    kv_head = static_cast<int>(index % static_cast<unsigned>(p.call.num_kv_heads));
    index /= static_cast<unsigned>(p.call.num_kv_heads);
    split = static_cast<int>(index % static_cast<unsigned>(p.max_splits));
    sequence = static_cast<int>(index / static_cast<unsigned>(p.max_splits));
  }
};

// Where a warp's tiles of keys and values lie, one after the other. Positions go up by `kStep`;
// only where a page or the ring ends must the place be looked up.
template <class T, int kStep>
class KeyCursor {
 public:
  const T* k = nullptr;  // row 0 of the tile
  const T* v = nullptr;

  __device__ __forceinline__ void seek(const AttentionParams& call, const Sequence& sequence,
                                       int kv_head, int position) {
    k = static_cast<const T*>(call.k) + sequence.key_offset(call.k_strides, position, kv_head);
    v = static_cast<const T*>(call.v) + sequence.key_offset(call.v_strides, position, kv_head);
    steps_ = INT32_MAX;
    if (call.ring || call.block_table != nullptr) {
      steps_ = (call.slots - position % call.slots + kStep - 1) / kStep;
    }
  }

  // `position` is that of the next tile.
  __device__ __forceinline__ void advance(const AttentionParams& call, const Sequence& sequence,
                                          int kv_head, int position) {
    if (--steps_ > 0) {
      k += kStep * call.k_strides.row;
      v += kStep * call.v_strides.row;
    } else {
      seek(call, sequence, kv_head, position);
    }
  }

 private:
  int steps_ = 0;  // to the end of the page, the ring or everything
};

}  // namespace exafuse
