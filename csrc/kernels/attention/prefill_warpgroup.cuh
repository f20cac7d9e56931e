// The part of the prefill kernel of sm_90 that one warpgroup works on: 64 queries against tiles of
// kKeys keys, by wgmma. Scores, softmax and output stay in registers.
//
// Products run while the threads go on: multiply_keys and multiply_values only start them, and what
// they read and write belongs to them until the wait that names it.
#pragma once

#include <cstdint>

#include "common/mask.cuh"
#include "common/ptx_sm90.cuh"
#include "common/softmax.cuh"

namespace exafuse {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupQueries = 64;

// A tile of rows in shared memory as TMA writes and wgmma reads it: panels of 64 columns, a row of
// a panel 128 bytes, its 16-byte chunks permuted by XOR with the row number modulo 8.
template <int kRowsOf, int kCols>
struct Panels {
  static constexpr int kRows = kRowsOf;
  static constexpr int kRowBytes = 128;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kCount = (kCols + 63) / 64;
  static constexpr int kBytes = kCount * kPanelBytes;
  static_assert(kPanelBytes % 1024 == 0);

  struct alignas(1024) Memory {
    unsigned char bytes[kBytes];
  };

  // The offset of 16-byte chunk `chunk` of a row.
  __device__ __forceinline__ static constexpr int offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kRowBytes + (chunk % 8 ^ row % 8) * 16;
  }
};

// The queries of one warpgroup. Row r (0 or 1) of a thread is row 16 * warp + 8 * r + lane / 4.
template <class T, int kCols, int kQueries, int kKeys>
class WarpgroupQueries {
 public:
  using QueryPanels = Panels<kQueries, kCols>;
  using KeyPanels = Panels<kKeys, kCols>;

  static constexpr int kRows = 2;  // of a thread
  static constexpr int kKeyBlocks = kKeys / 8;
  static constexpr int kColBlocks = kCols / 8;

  // `queries`: shared address of this warpgroup's rows.
  __device__ __forceinline__ explicit WarpgroupQueries(uint32_t queries) : queries_(queries) {}

  __device__ __forceinline__ static int lane() {
    return static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  }

  // Row r of this thread among the warpgroup's 64.
  __device__ __forceinline__ static int row(int r) {
    return static_cast<int>(threadIdx.x) % kWarpgroupThreads / ptx::kWarpSize * 16 + 8 * r +
           lane() / 4;
  }

  // New queries.
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max_[r] = kMasked;
      sum_[r] = 0;
    }
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) out_[i] = 0;
  }

  // Starts scores = q k^T, not scaled, as a group of its own.
  __device__ __forceinline__ void multiply_keys(uint32_t keys) {
    const uint64_t a = ptx::wgmma_descriptor(queries_, 0);
    const uint64_t b = ptx::wgmma_descriptor(keys, 0);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kCols / 16; ++k) {
      const int in_panel = k % 4 * 32;  // bytes of 16 elements
      ptx::wgmma_ss<T, kKeys>(scores_, a + (k / 4 * QueryPanels::kPanelBytes + in_panel) / 16,
                              b + (k / 4 * KeyPanels::kPanelBytes + in_panel) / 16, k > 0);
    }
    ptx::wgmma_commit();
  }

  // Starts out += probs v, as a group of its own.
  __device__ __forceinline__ void multiply_values(uint32_t values) {
    const uint64_t b = ptx::wgmma_descriptor(values, KeyPanels::kPanelBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      ptx::wgmma_rs<T, kCols>(out_, probs_[k], b + k * 16 * KeyPanels::kRowBytes / 16, true);
    }
    ptx::wgmma_commit();
  }

  template <int kPending>
  __device__ __forceinline__ void wait_for_scores() {
    ptx::wgmma_wait<kPending>(scores_);
  }
  __device__ __forceinline__ void wait_for_out() { ptx::wgmma_wait<0>(out_, probs_); }

  // Scores of the keys that a row does not see become -inf, whatever they are. `row_sees(row)`
  // counts from the first key of the tile.
  template <class RowSees>
  __device__ __forceinline__ void mask(RowSees row_sees) {
    const int own_keys = 2 * (lane() % 4);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const KeyRange range = row_sees(row(r));
      const KeyRange seen{range.begin - own_keys, range.end - own_keys};
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores_[4 * n + 2 * r + i];
          score = seen.contains(8 * n + i) ? score : kMasked;
        }
      }
    }
  }

  // From scores to their exponentials, and the sums. What was summed before is rescaled; the output
  // still has to be, by rescale_out.
  __device__ __forceinline__ void softmax(float scale_log2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = kMasked;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        largest = ptx::max(largest, ptx::max(scores_[4 * n + 2 * r], scores_[4 * n + 2 * r + 1]));
      }
      largest = ptx::max(largest, ptx::shfl_xor(largest, 1));
      largest = ptx::max(largest, ptx::shfl_xor(largest, 2));
      const float next = ptx::max(max_[r], largest);
      rescale_[r] = softmax_rescale(max_[r], next, scale_log2);
      max_[r] = next;
      sum_[r] *= rescale_[r];
      const float base = softmax_base(next, scale_log2);
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        float& low = scores_[4 * n + 2 * r];
        float& high = scores_[4 * n + 2 * r + 1];
        low = softmax_term(low, scale_log2, base);
        high = softmax_term(high, scale_log2, base);
        sum_[r] += low + high;
      }
    }
  }

  __device__ __forceinline__ void rescale_out() {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) out_[i] *= rescale_[i / 2 % 2];
  }

  // The exponentials, rounded, as operand of multiply_values: an accumulator of the scores is laid
  // out as operand a of the next product.
  __device__ __forceinline__ void pack_probs() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        probs_[k][j] = ptx::pack2<T>(scores_[8 * k + 2 * j], scores_[8 * k + 2 * j + 1]);
      }
    }
  }

  // Adds the NaN and infinities of one key's values to the rows that see it: multiply_values found
  // zeros in their place. `value(column)` and `score(row)` read what they name. Weights are
  // measured from the final maximum, those of whole tiles from the largest so far: where one of the
  // two rounds to zero, infinity becomes NaN in one kind of tile and not in the other.
  template <class Value, class Score>
  __device__ __forceinline__ void add_non_finite(const bool (&sees)[kRows], float scale_log2,
                                                 Value value, Score score) {
    bool found = false;
    for (int n = 0; n < kColBlocks; ++n) {
      for (int i = 0; i < 2; ++i) found = found || !is_finite(value(8 * n + 2 * (lane() % 4) + i));
    }
    if (!found) return;
    float weight[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float base = softmax_base(max_[r], scale_log2);
      const float prob = sees[r] ? softmax_term(score(row(r)), scale_log2, base) : 0.0f;
      // Zero times infinity is NaN.
      weight[r] = ptx::pack2<T>(prob, 0.0f) == 0 ? 0.0f : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
      const int r = i / 2 % 2;
      const float one = value(i / 4 * 8 + 2 * (lane() % 4) + i % 2);
      if (sees[r] && !is_finite(one)) out_[i] = ptx::fma(weight[r], one, out_[i]);
    }
  }

  // Divides the output by the sums and returns the logarithm of each row's sum. A sum of zero gives
  // zeros.
  __device__ __forceinline__ void finish(float scale_log2, float (&lse)[kRows]) {
    float inverse[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = sum_[r];
      sum += ptx::shfl_xor(sum, 1);
      sum += ptx::shfl_xor(sum, 2);
      inverse[r] = sum == 0 ? 0.0f : ptx::rcp(sum);
      lse[r] = softmax_lse(max_[r], sum, scale_log2);
    }
    // Adding zero makes one zero of the two.
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) out_[i] = ptx::fma(out_[i], inverse[i / 2 % 2], 0.0f);
  }

  // Puts the output, rounded, into the place of the queries.
  __device__ __forceinline__ void store_out() const {
#pragma unroll
    for (int n = 0; n < kColBlocks; ++n) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        ptx::st_shared(queries_ + QueryPanels::offset(row(r), n) + 4 * (lane() % 4),
                       ptx::pack2<T>(out_[4 * n + 2 * r], out_[4 * n + 2 * r + 1]));
      }
    }
  }

 private:
  __device__ __forceinline__ static bool is_finite(float x) { return x - x == 0; }

  uint32_t queries_;
  float scores_[kKeys / 2];
  uint32_t probs_[kKeys / 16][4];
  float out_[kCols / 2];
  float rescale_[kRows];
  float max_[kRows];  // of the scores, not scaled
  float sum_[kRows];  // of this thread's columns
};

}  // namespace exafuse
