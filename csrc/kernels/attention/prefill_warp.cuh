// The part of the prefill kernel that one warp works on: 32 queries of a tile of 128 against tiles
// of 64 keys, on tensor cores, each fragment of K and V serving two mma rows. Scores, softmax and
// output stay in registers, where they fill almost all of them.
#pragma once

#include <cstdint>

#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "common/softmax.cuh"

namespace exafuse {

inline constexpr int kPrefillWarps = 4;
inline constexpr int kPrefillThreads = kPrefillWarps * ptx::kWarpSize;
inline constexpr int kPrefillWarpQueries = 32;
inline constexpr int kPrefillTileQueries = kPrefillWarps * kPrefillWarpQueries;
inline constexpr int kPrefillTileKeys = 64;
inline constexpr int kPrefillMmaRows = kPrefillWarpQueries / 16;  // blocks of 16 queries in a warp
inline constexpr int kPrefillThreadRows =
    2 * kPrefillMmaRows;  // rows of an accumulator that a thread holds

// The queries of one warp: scores, running softmax and output of the rows that this thread holds.
// Row r of a thread is row 16 * (r / 2) + 8 * (r % 2) + lane / 4 of the warp's 32.
template <class T, int kCols>
class WarpQueries {
 public:
  using QueryTile = SharedTile<T, kPrefillTileQueries, kCols>;
  using KeyTile = SharedTile<T, kPrefillTileKeys, kCols>;

  // With 128 columns the output takes 128 registers and the scores 64: there q is read from shared
  // memory again for every tile of keys.
  static constexpr bool kKeepsQueries = kCols < 96;
  static constexpr int kDepth = kCols / 16;                // mma steps of q k^T
  static constexpr int kKeyBlocks = kPrefillTileKeys / 8;  // accumulators of a row of scores
  static constexpr int kColBlocks = kCols / 8;             // accumulators of a row of the output

  __device__ __forceinline__ WarpQueries(const QueryTile& q, int first_row)
      : q_(q), first_row_(first_row) {
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      max_[r] = kMasked;
      sum_[r] = 0;
    }
#pragma unroll
    for (int m = 0; m < kPrefillMmaRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[m][n][i] = 0;
      }
    }
  }

  // Row r of this thread within the tile of queries.
  __device__ __forceinline__ int row(int r) const {
    return first_row_ + 16 * (r / 2) + 8 * (r % 2) + lane() / 4;
  }

  // Once the tile of queries is complete.
  __device__ __forceinline__ void load_queries() {
    if constexpr (kKeepsQueries) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) load_queries(kept_[k], k);
    }
  }

  // scores = q k^T, not scaled.
  __device__ __forceinline__ void multiply_keys(const KeyTile& keys) {
#pragma unroll
    for (int m = 0; m < kPrefillMmaRows; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[m][n][i] = 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      uint32_t read[kPrefillMmaRows][4];
      if constexpr (!kKeepsQueries) load_queries(read, k);
      const auto& a = kKeepsQueries ? kept_[k] : read;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) {
        uint32_t b[2][2];
        keys.load_b(b[0], b[1], 8 * n, 2 * k);
#pragma unroll
        for (int m = 0; m < kPrefillMmaRows; ++m) {
          ptx::mma_m16n8k16<T>(scores_[m][n], a[m], b[0], scores_[m][n]);
          ptx::mma_m16n8k16<T>(scores_[m][n + 1], a[m], b[1], scores_[m][n + 1]);
        }
      }
    }
  }

  // Scores of the keys that a row does not see become -inf, whatever they are. `row_sees(r)` counts
  // from the first key of the tile.
  template <class RowSees>
  __device__ __forceinline__ void mask(RowSees row_sees) {
    const int own_keys = 2 * (lane() % 4);
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      const KeyRange range = row_sees(r);
      const KeyRange seen{range.begin - own_keys, range.end - own_keys};
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores_[r / 2][n][2 * (r % 2) + i];
          score = seen.contains(8 * n + i) ? score : kMasked;
        }
      }
    }
  }

  // Takes note of the largest scores and rescales what was summed so far.
  __device__ __forceinline__ void raise_maxima(float scale_log2) {
    float rescale[kPrefillThreadRows];
    bool raised = false;
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      float largest = kMasked;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        const float (&two)[4] = scores_[r / 2][n];
        largest = ptx::max(largest, ptx::max(two[2 * (r % 2)], two[2 * (r % 2) + 1]));
      }
      largest = ptx::max(largest, ptx::shfl_xor(largest, 1));
      largest = ptx::max(largest, ptx::shfl_xor(largest, 2));
      const float next = ptx::max(max_[r], largest);
      rescale[r] = softmax_rescale(max_[r], next, scale_log2);
      raised = raised || rescale[r] != 1.0f;
      max_[r] = next;
    }
    // A factor of 1 changes nothing: a warp without another one may leave the products out.
    if (!ptx::any(raised)) return;
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      sum_[r] *= rescale[r];
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
        out_[r / 2][n][2 * (r % 2)] *= rescale[r];
        out_[r / 2][n][2 * (r % 2) + 1] *= rescale[r];
      }
    }
  }

  // out += exp(scores) v, 16 keys after the other: the exponentials of the next are computed while
  // the tensor cores work on the last.
  __device__ __forceinline__ void multiply_values(const KeyTile& values, float scale_log2) {
    float base[kPrefillThreadRows];
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) base[r] = softmax_base(max_[r], scale_log2);
#pragma unroll
    for (int k = 0; k < kPrefillTileKeys / 16; ++k) {
      uint32_t probs[kPrefillMmaRows][4];
#pragma unroll
      for (int m = 0; m < kPrefillMmaRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // keys 16k to 16k + 7, then the next eight
          const float (&score)[4] = scores_[m][2 * k + half];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = 2 * m + h;
            const float low = softmax_term(score[2 * h], scale_log2, base[r]);
            const float high = softmax_term(score[2 * h + 1], scale_log2, base[r]);
            sum_[r] += low + high;
            // An accumulator of the scores is laid out as operand a of the next product.
            probs[m][2 * half + h] = ptx::pack2<T>(low, high);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kColBlocks; n += 2) {
        uint32_t b[2][2];
        values.load_b_trans(b[0], b[1], 16 * k, n);
#pragma unroll
        for (int m = 0; m < kPrefillMmaRows; ++m) {
          ptx::mma_m16n8k16<T>(out_[m][n], probs[m], b[0], out_[m][n]);
          ptx::mma_m16n8k16<T>(out_[m][n + 1], probs[m], b[1], out_[m][n + 1]);
        }
      }
    }
  }

  // Adds the NaN and infinities of v, which multiply_values finds replaced by zero, to the rows
  // that see their keys, with the bits that it would give to a row that sees the whole tile.
  template <class RowSees>
  __device__ __forceinline__ void add_non_finite(const KeyTile& rest, RowSees row_sees,
                                                 float scale_log2) {
#pragma unroll
    for (int m = 0; m < kPrefillMmaRows; ++m) {
      // Keys whose weight is rounded to zero, one bit each: zero times infinity is NaN.
      uint32_t weightless[2][kPrefillTileKeys / 32] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float base = softmax_base(max_[2 * m + h], scale_log2);
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float weight = softmax_term(scores_[m][n][2 * h + i], scale_log2, base);
            const bool is_zero = ptx::pack2<T>(weight, 0.0f) == 0;
            weightless[h][n / 4] |= is_zero ? 1u << (8 * (n % 4) + i) : 0;
          }
        }
#pragma unroll
        for (uint32_t& bits : weightless[h]) {
          bits <<= 2 * (lane() % 4);
          bits |= ptx::shfl_xor(bits, 1);
          bits |= ptx::shfl_xor(bits, 2);
        }
      }
      const KeyRange seen[2] = {row_sees(2 * m), row_sees(2 * m + 1)};
#pragma unroll 1
      for (int at = 0; at < kPrefillTileKeys; ++at) {
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n) {
          const auto two = rest.load_two(at, n);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t bits = at < 32 ? weightless[h][0] : weightless[h][1];
            const float weight = (bits >> (at % 32) & 1) != 0 ? 0.0f : 1.0f;
            if (!seen[h].contains(at)) continue;
            out_[m][n][2 * h] = ptx::fma(weight, two.get(0), out_[m][n][2 * h]);
            out_[m][n][2 * h + 1] = ptx::fma(weight, two.get(1), out_[m][n][2 * h + 1]);
          }
        }
      }
    }
  }

  // Divides the output by the sums, puts it into the warp's rows of `to`, rounded, and returns the
  // logarithm of each row's sum. A sum of zero gives zeros.
  __device__ __forceinline__ void finish(const QueryTile& to, float scale_log2,
                                         float (&lse)[kPrefillThreadRows]) {
    float inverse[kPrefillThreadRows];
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      float sum = sum_[r];
      sum += ptx::shfl_xor(sum, 1);
      sum += ptx::shfl_xor(sum, 2);
      inverse[r] = sum == 0 ? 0.0f : ptx::rcp(sum);
      lse[r] = softmax_lse(max_[r], sum, scale_log2);
    }
#pragma unroll
    for (int m = 0; m < kPrefillMmaRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColBlocks; ++n) {
        // Adding zero makes one zero of the two.
        const float c[4] = {ptx::fma(out_[m][n][0], inverse[2 * m], 0.0f),
                            ptx::fma(out_[m][n][1], inverse[2 * m], 0.0f),
                            ptx::fma(out_[m][n][2], inverse[2 * m + 1], 0.0f),
                            ptx::fma(out_[m][n][3], inverse[2 * m + 1], 0.0f)};
        to.store_c(c, first_row_ + 16 * m, n);
      }
    }
  }

 private:
  __device__ __forceinline__ static int lane() {
    return static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  }

  __device__ __forceinline__ void load_queries(uint32_t (&a)[kPrefillMmaRows][4], int k) const {
#pragma unroll
    for (int m = 0; m < kPrefillMmaRows; ++m) q_.load_a(a[m], first_row_ + 16 * m, 2 * k);
  }

  QueryTile q_;
  int first_row_;
  uint32_t kept_[kKeepsQueries ? kDepth : 1][kPrefillMmaRows][4];
  float scores_[kPrefillMmaRows][kKeyBlocks][4];
  float out_[kPrefillMmaRows][kColBlocks][4];
  float max_[kPrefillThreadRows];  // of the scores, not scaled
  float sum_[kPrefillThreadRows];  // of this thread's columns
};

}  // namespace exafuse
