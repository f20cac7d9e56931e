// How the keys of a sequence are split among blocks, and where the parts of its result lie.
//
// A split starts at an absolute multiple of its size, and the size follows from how many keys the
// last query may see: not from the batch, the number of queries or the GPU. A row is therefore
// added up from the same parts in every call. The host, which does not know the lengths, launches
// blocks for as many splits as any length can have.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/softmax.cuh"
#include "common/vec.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/sequence.cuh"

namespace exafuse {

inline constexpr int kSmallestSplit = 256;
inline constexpr int kMostSplits = 64;

// Keys per split of a sequence whose last query has `length` keys in reach.
constexpr int split_size(int64_t length) {
  int size = kSmallestSplit;
  while (int64_t{size} * kMostSplits < length) size *= 2;
  return size;
}

// The most splits that a sequence can have. Its positions end before `end`; the keys that its
// queries see may start at any position if `any_start`, else at 0.
constexpr int most_splits(int64_t end, int64_t capacity, int64_t window_left, int64_t seqlen_q,
                          bool any_start) {
  const int64_t longest = window_left < 0 ? capacity : std::min(capacity, window_left + 1);
  int64_t most = 0;
  for (int64_t size = kSmallestSplit; size <= split_size(longest); size *= 2) {
    const int64_t length = std::min(longest, size * kMostSplits);
    const int64_t span = window_left < 0 ? length : length + seqlen_q - 1;
    const int64_t by_span = any_start ? (span + size - 2) / size + 1 : (span + size - 1) / size;
    most = std::max(most, std::min(by_span, (end + size - 1) / size));
  }
  return static_cast<int>(most);
}

// The splits of one sequence: `count` of them, the first being number `first` from position 0.
struct SplitPlan {
  int size = kSmallestSplit;
  int first = 0;
  int count = 0;

  __device__ __forceinline__ SplitPlan(const AttentionParams& params, const Sequence& sequence) {
    if (sequence.seqlen_q() == 0) return;
    const KeyRange keys = sequence.keys();
    const KeyRange seen = sequence.visible(0, sequence.seqlen_q() - 1);
    if (seen.empty()) return;
    int64_t length = keys.end - keys.begin;
    if (params.window.left >= 0 && length > params.window.left) {
      length = int64_t{params.window.left} + 1;
    }
    size = split_size(length);
    first = seen.begin / size;
    count = (seen.end - 1) / size - first + 1;
  }
};

// What a split found for a row, a row being a query and head: the largest score, the sum of the
// terms relative to it, and the sum of the values times their terms.
struct Partials {
  float* values;  // [splits, rows, head_dim]
  float2* stats;  // [splits, rows]: largest score, sum
  int64_t rows;

  static constexpr int64_t bytes(int64_t splits, int64_t rows, int64_t head_dim) {
    return splits * rows * (head_dim + 2) * static_cast<int64_t>(sizeof(float));
  }

  Partials(float* workspace, int64_t splits, int64_t rows, int64_t head_dim)
      : values(workspace), stats(nullptr), rows(rows) {
    if (splits > 1) stats = reinterpret_cast<float2*>(workspace + splits * rows * head_dim);
  }

  // Two dims of a row of a split, which is number split * rows + row.
  __device__ __forceinline__ void write(int64_t row, int dim, int head_dim, const float (&found)[2],
                                        float max_score, float sum) const {
    ptx::store_word(values + row * head_dim + dim,
                    uint2{std::bit_cast<uint32_t>(found[0]), std::bit_cast<uint32_t>(found[1])});
    if (dim == 0) stats[row] = float2{max_score, sum};
  }
};

struct DecodeParams {
  AttentionParams call;
  Partials partials;
  int max_splits;
  int column_blocks;
};

// The row of a query and head in the partial results.
__device__ __forceinline__ int64_t partial_row(const AttentionParams& params,
                                               const Sequence& sequence, int query, int head) {
  const int64_t per_sequence =
      params.cu_seqlens_q != nullptr ? 0 : int64_t{params.seqlen_q} * params.num_heads;
  return sequence.query_offset({.batch = per_sequence, .row = params.num_heads, .head = 1}, query,
                               head);
}

// Two dims of a row that is complete; a row without a term gives 0 and lse -inf. `out_at` and
// `lse_at` are offsets of the row.
template <class T>
__device__ __forceinline__ void write_row(const AttentionParams& params, int64_t out_at,
                                          int64_t lse_at, int dim, const float (&found)[2],
                                          float max_score, float sum) {
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float out[2] = {found[0] * inverse, found[1] * inverse};
  const auto vec = Vec<T, 2>::rounded(out);
  T* address = static_cast<T*>(params.out) + out_at + dim;
  if (params.out_wide) {
    vec.template store<true>(address);
  } else {
    vec.template store<false>(address);
  }
  if (dim == 0 && params.lse != nullptr) {
    const float top = max_score == kMasked ? 0.0f : max_score;
    params.lse[lse_at] =
        sum == 0.0f ? kMasked : ptx::fma(top, params.scale_log2, ptx::log2(sum)) * kLn2;
  }
}

// Adds up the splits of every row that has more than one.
void launch_combine(const DecodeParams& params, Stream stream);

}  // namespace exafuse
