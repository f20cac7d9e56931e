// One warp's part of decode: its keys and values on their way into shared memory, and what it has
// found for its columns so far.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "common/softmax.cuh"
#include "common/vec.cuh"

namespace exafuse {

inline constexpr int kDecodeTileKeys = 16;  // of a warp at a time: the rows of an mma

// Starts a warp's copy of a tile whose row 0 is at `source`. Rows before `begin` and from `end` on,
// and columns from head_dim on, become zero and are not read.
template <class T, int kCols>
__device__ __forceinline__ void load_keys(const SharedTile<T, kDecodeTileKeys, kCols>& tile,
                                          const T* source, int64_t row_stride, int begin, int end,
                                          int head_dim, bool wide) {
  constexpr unsigned kChunks = kCols / kChunkElements;
  constexpr unsigned kRowLanes = kChunks % 8 == 0 ? kChunks : 4;  // that read one row together
  constexpr unsigned kRows = ptx::kWarpSize / kRowLanes;
  const unsigned lane_id = threadIdx.x % ptx::kWarpSize;
  const unsigned first_row = lane_id / kRowLanes;
  const unsigned first_chunk = lane_id % kRowLanes;
  const unsigned last_chunk = static_cast<unsigned>(head_dim) / kChunkElements;
  // The address of a chunk that is not read is that of one that may be.
  const T* const first = source;
  source += first_row * row_stride + first_chunk * kChunkElements;
  const unsigned before = first_row - static_cast<unsigned>(begin);
  const unsigned count = end > begin ? static_cast<unsigned>(end - begin) : 0;
  const auto is_valid = [&](unsigned r, unsigned c) {
    return before + r < (first_chunk + c < last_chunk ? count : 0);
  };
  const auto chunk_at = [&](unsigned r, unsigned c) {
    return tile.chunk(static_cast<int>(first_row + r), static_cast<int>(first_chunk + c));
  };
  if (wide) {
#pragma unroll
    for (unsigned r = 0; r < kDecodeTileKeys; r += kRows) {
#pragma unroll
      for (unsigned c = 0; c < kChunks; c += kRowLanes) {
        const bool valid = is_valid(r, c);
        ptx::cp_async_16(ptx::smem_addr(chunk_at(r, c)),
                         valid ? source + c * kChunkElements : first, valid);
      }
      source += kRows * row_stride;
    }
  } else {
#pragma unroll 1
    for (unsigned r = 0; r < kDecodeTileKeys; r += kRows) {
#pragma unroll 1
      for (unsigned c = 0; c < kChunks; c += kRowLanes) {
        auto vec = Vec<T, kChunkElements>::zero();
        if (is_valid(r, c)) {
          vec = Vec<T, kChunkElements>::template load_readonly<false>(source + c * kChunkElements);
        }
        vec.store_shared(chunk_at(r, c));
      }
      source += kRows * row_stride;
    }
  }
}

// Whether one of two packed numbers is infinite or NaN.
template <class T>
__device__ __forceinline__ bool any_non_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// What a warp has found for its columns. Lane l holds columns 2 * (l % 4) and the next of each
// tile of eight, as the accumulators of mma do.
template <class T, int kCols, int kColumnTiles>
struct WarpColumns {
  using Tile = SharedTile<T, kDecodeTileKeys, kCols>;
  static constexpr int kDimTiles = kCols / 16;

  float values[kDimTiles][kColumnTiles][4];  // transposed: [dim, column]
  float max_scores[kColumnTiles][2];
  float sums[kColumnTiles][2];  // over this lane's keys

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        max_scores[n][c] = kMasked;
        sums[n][c] = 0;
      }
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] = 0;
      }
    }
  }

  // Scores of 16 keys: K Q^T.
  template <class QueryTile>
  __device__ __forceinline__ static void score(const Tile& keys, const QueryTile& queries,
                                               float (&scores)[kColumnTiles][4]) {
#pragma unroll
    for (int k = 0; k < kDimTiles; ++k) {
      uint32_t a[4];
      keys.load_a(a, 0, 2 * k);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t b[2][2];
        queries.load_b(b[0], b[1], n * 8, 2 * k);
        ptx::mma_m16n8k16<T>(scores[n], a, b[0], scores[n]);
        if (n + 1 < kColumnTiles) ptx::mma_m16n8k16<T>(scores[n + 1], a, b[1], scores[n + 1]);
      }
    }
  }

  // Turns scores into terms, rounded and transposed as operand b of V^T P^T, and scales what was
  // found before to the new maximum.
  __device__ __forceinline__ void add_scores(const float (&scores)[kColumnTiles][4],
                                             uint32_t (&terms)[kColumnTiles][2], float scale_log2) {
    float factors[kColumnTiles][2];
    bool changed = false;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      float p[4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = ptx::max(scores[n][c], scores[n][c + 2]);
#pragma unroll
        for (int offset = 4; offset < ptx::kWarpSize; offset *= 2) {
          top = ptx::max(top, ptx::shfl_xor(top, offset));
        }
        top = ptx::max(max_scores[n][c], top);
        factors[n][c] = softmax_rescale(max_scores[n][c], top, scale_log2);
        changed = changed || max_scores[n][c] != top;
        max_scores[n][c] = top;
        const float base = softmax_base(top, scale_log2);
        p[c] = softmax_term(scores[n][c], scale_log2, base);
        p[c + 2] = softmax_term(scores[n][c + 2], scale_log2, base);
        sums[n][c] = ptx::fma(sums[n][c], factors[n][c], p[c] + p[c + 2]);
      }
      terms[n][0] = ptx::movmatrix_trans(ptx::pack2<T>(p[0], p[1]));
      terms[n][1] = ptx::movmatrix_trans(ptx::pack2<T>(p[2], p[3]));
    }
    if (!ptx::any(changed)) return;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kDimTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[m][n][i] *= factors[n][i % 2];
      }
    }
  }

  __device__ __forceinline__ void add_values(const Tile& tile,
                                             const uint32_t (&terms)[kColumnTiles][2]) {
#pragma unroll
    for (int m = 0; m < kDimTiles; ++m) {
      uint32_t a[4];
      tile.load_a_trans(a, 0, 2 * m);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        ptx::mma_m16n8k16<T>(values[m][n], a, terms[n], values[m][n]);
      }
    }
  }

  // Whether a tile holds an infinity or NaN, which times a term of 0 would be NaN.
  __device__ __forceinline__ static bool has_non_finite(const Tile& tile) {
    bool found = false;
#pragma unroll 1
    for (int m = 0; m < kDimTiles; ++m) {
      uint32_t a[4];
      tile.load_a_trans(a, 0, 2 * m);
#pragma unroll
      for (int j = 0; j < 4; ++j) found = found || any_non_finite<T>(a[j]);
    }
    return ptx::any(found);
  }

  // As add_values for `num_columns` columns from `first_column` on, which see `seen` of the keys,
  // whose first is at `position`. No other column changes, and no other key is touched.
  __device__ __forceinline__ void add_values_apart(const Tile& tile,
                                                   const uint32_t (&terms)[kColumnTiles][2],
                                                   KeyRange seen, int position, int first_column,
                                                   int num_columns) {
    const int pair = static_cast<int>(threadIdx.x % 4) * 2;
    uint32_t masks[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = position + pair + j * 8;
      masks[j] = (seen.contains(key) ? 0xffffu : 0u) | (seen.contains(key + 1) ? 0xffff0000u : 0u);
    }
#pragma unroll
    for (int m = 0; m < kDimTiles; ++m) {
      uint32_t a[4];
      tile.load_a_trans(a, 0, 2 * m);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] &= masks[j / 2];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        float sum[4];
        ptx::mma_m16n8k16<T>(sum, a, terms[n], values[m][n]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = n * 8 + pair + j % 2 - first_column;
          if (column >= 0 && column < num_columns) values[m][n][j] = sum[j];
        }
      }
    }
  }
};

}  // namespace exafuse
