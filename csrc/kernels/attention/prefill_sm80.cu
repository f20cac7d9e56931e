// Attention of many queries in one pass over the keys (FlashAttention-2, Dao 2023) on tensor cores:
// mma.m16n8k16 fed by ldmatrix from swizzled shared memory, filled by cp.async.
//
// A block of four warps takes 128 queries of one head, a warp 32 of them, so that every fragment of
// K and V serves two mma rows. It walks the tiles of 64 keys that hold a key seen by any of its
// queries, from the first to the last; only tiles at the edge of what its queries see are tested
// key by key. K(i + 1) is under way while tile i is worked on, V(i) during q k^T and the maxima.
//
// What a row becomes depends on its own queries and keys alone: tiles start at absolute multiples
// of their size, one row's tiles come in ascending order, and a tile of which it sees nothing
// changes no bit of it.

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mask.cuh"
#include "common/ptx.cuh"
#include "common/shared_tile.cuh"
#include "common/softmax.cuh"
#include "common/vec.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/prefill_sm80.h"
#include "kernels/attention/sequence.cuh"

namespace exafuse {
namespace {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * ptx::kWarpSize;
inline constexpr int kWarpQueries = 32;
inline constexpr int kTileQueries = kWarps * kWarpQueries;
inline constexpr int kTileKeys = 64;
inline constexpr int kMmaRows = kWarpQueries / 16;  // blocks of 16 queries in a warp
inline constexpr int kThreadRows = 2 * kMmaRows;    // rows of an accumulator that a thread holds
static_assert(kKeyTile % kTileKeys == 0);

// --- kernel -------------------------------------------------------------------------------------

template <class T, int kCols>
struct PrefillShared {
  using QueryTile = SharedTile<T, kTileQueries, kCols>;
  using KeyTile = SharedTile<T, kTileKeys, kCols>;
  T* q;  // and, at the end, the output
  T* k;  // two tiles
  T* v;
  KeyRange* seen;   // by each query; behind the last one, by the last
  int* non_finite;  // the latest tile whose V holds a NaN or an infinity

  template <class Arena>
  static constexpr PrefillShared take_from(Arena& arena) {
    return {arena.template take<T, QueryTile::kElements>(),
            arena.template take<T, 2 * KeyTile::kElements>(),
            arena.template take<T, KeyTile::kElements>(),
            arena.template take<KeyRange, kTileQueries>(), arena.template take<int, 1>()};
  }
};

// The queries of one warp: scores, running softmax and output of the rows that this thread holds.
// Row r of a thread is row 16 * (r / 2) + 8 * (r % 2) + lane / 4 of the warp's 32.
template <class T, int kCols>
class WarpQueries {
 public:
  using QueryTile = typename PrefillShared<T, kCols>::QueryTile;
  using KeyTile = typename PrefillShared<T, kCols>::KeyTile;

  // With 128 columns the output takes 128 registers and the scores 64: there q is read from shared
  // memory again for every tile of keys.
  static constexpr bool kKeepsQueries = kCols < 96;
  static constexpr int kDepth = kCols / 16;         // mma steps of q k^T
  static constexpr int kKeyBlocks = kTileKeys / 8;  // accumulators of a row of scores
  static constexpr int kColBlocks = kCols / 8;      // accumulators of a row of the output

  __device__ __forceinline__ WarpQueries(const QueryTile& q, int first_row)
      : q_(q), first_row_(first_row) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      max_[r] = kMasked;
      sum_[r] = 0;
    }
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
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
    for (int m = 0; m < kMmaRows; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[m][n][i] = 0;
      }
    }
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      uint32_t read[kMmaRows][4];
      if constexpr (!kKeepsQueries) load_queries(read, k);
      const auto& a = kKeepsQueries ? kept_[k] : read;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) {
        uint32_t b[2][2];
        keys.load_b(b[0], b[1], 8 * n, 2 * k);
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
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
    for (int r = 0; r < kThreadRows; ++r) {
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
    float rescale[kThreadRows];
    bool raised = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float largest = kMasked;
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        const float (&two)[4] = scores_[r / 2][n];
        largest = ptx::max(largest, ptx::max(two[2 * (r % 2)], two[2 * (r % 2) + 1]));
      }
      largest = ptx::max(largest, ptx::shfl_xor(largest, 1));
      largest = ptx::max(largest, ptx::shfl_xor(largest, 2));
      const float next = softmax_next_max(max_[r], largest, scale_log2);
      rescale[r] = softmax_rescale(max_[r], next, scale_log2);
      raised = raised || rescale[r] != 1.0f;
      max_[r] = next;
    }
    // A factor of 1 changes nothing: a warp without another one may leave the products out.
    if (!ptx::any(raised)) return;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
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
    float base[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) base[r] = softmax_base(max_[r], scale_log2);
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      uint32_t probs[kMmaRows][4];
#pragma unroll
      for (int m = 0; m < kMmaRows; ++m) {
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
        for (int m = 0; m < kMmaRows; ++m) {
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
    for (int r = 0; r < kThreadRows; ++r) {
      // Keys whose weight is rounded to zero, one bit each: zero times infinity is NaN.
      const float base = softmax_base(max_[r], scale_log2);
      uint32_t weightless[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float score = scores_[r / 2][n][2 * (r % 2) + i];
          const uint32_t weight = ptx::pack2<T>(softmax_term(score, scale_log2, base), 0.0f);
          weightless[n / 4] |= weight == 0 ? 1u << (8 * (n % 4) + i) : 0;
        }
      }
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        weightless[word] <<= 2 * (lane() % 4);
        weightless[word] |= ptx::shfl_xor(weightless[word], 1);
        weightless[word] |= ptx::shfl_xor(weightless[word], 2);
      }
      const KeyRange seen = row_sees(r);
      const int end = seen.end < kTileKeys ? seen.end : kTileKeys;
#pragma unroll 1
      for (int at = seen.begin > 0 ? seen.begin : 0; at < end; ++at) {
        const uint32_t bits = at < 32 ? weightless[0] : weightless[1];
        const float weight = (bits >> (at % 32) & 1) != 0 ? 0.0f : 1.0f;
#pragma unroll
        for (int n = 0; n < kColBlocks; ++n) {
          float value[2];
          rest.load_two(value, at, n);
          float (&out)[4] = out_[r / 2][n];
          out[2 * (r % 2)] = ptx::fma(weight, value[0], out[2 * (r % 2)]);
          out[2 * (r % 2) + 1] = ptx::fma(weight, value[1], out[2 * (r % 2) + 1]);
        }
      }
    }
  }

  // Divides the output by the sums, puts it into the warp's rows of `to`, rounded, and returns the
  // logarithm of each row's sum. `sees_nothing[r]` tells rows without a key from rows whose scores
  // are all -inf, which are NaN.
  __device__ __forceinline__ void finish(const QueryTile& to,
                                         const bool (&sees_nothing)[kThreadRows], float scale_log2,
                                         float (&lse)[kThreadRows]) {
    float inverse[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float sum = sum_[r];
      sum += ptx::shfl_xor(sum, 1);
      sum += ptx::shfl_xor(sum, 2);
      lse[r] = sees_nothing[r] ? kMasked : softmax_lse(max_[r], sum, scale_log2);
      inverse[r] = sees_nothing[r] ? 0.0f : ptx::rcp(sum);
    }
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) {
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

  __device__ __forceinline__ void load_queries(uint32_t (&a)[kMmaRows][4], int k) const {
#pragma unroll
    for (int m = 0; m < kMmaRows; ++m) q_.load_a(a[m], first_row_ + 16 * m, 2 * k);
  }

  QueryTile q_;
  int first_row_;
  uint32_t kept_[kKeepsQueries ? kDepth : 1][kMmaRows][4];
  float scores_[kMmaRows][kKeyBlocks][4];
  float out_[kMmaRows][kColBlocks][4];
  float max_[kThreadRows];  // of the scores, not scaled
  float sum_[kThreadRows];  // of this thread's columns
};

// Block b: the head comes first, so that the query heads of one kv head run side by side and share
// its keys in the L2 cache; then the sequence; then the tile of queries, the last, which sees the
// most keys under a causal mask, before the others.
template <class T, int kCols>
__global__ void __launch_bounds__(kThreads, 2)
    prefill_sm80_kernel(const __grid_constant__ AttentionParams p) {
  using Shared = PrefillShared<T, kCols>;
  using KeyTile = typename Shared::KeyTile;
  const int tid = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.num_heads));
  const unsigned sequence_and_tile = blockIdx.x / static_cast<unsigned>(p.num_heads);
  const int index = static_cast<int>(sequence_and_tile % static_cast<unsigned>(p.batch));
  const int num_tiles = (p.seqlen_q + kTileQueries - 1) / kTileQueries;
  const int first_query =
      (num_tiles - 1 - static_cast<int>(sequence_and_tile / static_cast<unsigned>(p.batch))) *
      kTileQueries;

  ptx::griddep_wait();
  const Sequence sequence(p, index);
  const int num_queries = sequence.seqlen_q() - first_query;  // of the tile and those behind it
  if (num_queries <= 0) return;

  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  const typename Shared::QueryTile q_tile(shared.q);
  const KeyTile v_tile(shared.v);
  const int first_row = tid / ptx::kWarpSize * kWarpQueries;
  const int last_row = first_row + kWarpQueries - 1;
  WarpQueries<T, kCols> queries(q_tile, first_row);

  const auto seen_by = [&](int row) {
    return sequence.visible(first_query + (row < num_queries ? row : num_queries - 1));
  };
  shared.seen[tid] = seen_by(tid);
  ptx::sync_warp();
  const KeyRange seen{seen_by(0).begin, seen_by(kTileQueries - 1).end};  // by any

  const int kv_head = head / p.gqa_group_size;
  const auto load_keys = [&](const void* base, const AttentionStrides& strides, const KeyTile& tile,
                             int start) {
    const T* const source =
        static_cast<const T*>(base) + sequence.key_offset(strides, start, kv_head);
    tile.template load<kThreads>(source, strides.row, seen.begin - start, seen.end - start,
                                 p.head_dim, p.wide, tid);
    ptx::cp_async_commit();
  };
  const auto k_tile = [&](int tile) { return KeyTile(shared.k + tile % 2 * KeyTile::kElements); };

  if (!seen.empty()) {
    const int first_tile = seen.begin / kTileKeys;
    const int last_tile = (seen.end - 1) / kTileKeys;
    if (tid == 0) *shared.non_finite = -1;
    q_tile.template load<kThreads>(
        static_cast<const T*>(p.q) + sequence.query_offset(p.q_strides, first_query, head),
        p.q_strides.row, 0, num_queries, p.head_dim, p.wide, tid);
    load_keys(p.k, p.k_strides, k_tile(first_tile), first_tile * kTileKeys);
    ptx::griddep_launch_dependents();
    ptx::cp_async_wait<0>();
    ptx::sync_threads();
    queries.load_queries();

#pragma unroll 1
    for (int tile = first_tile; tile <= last_tile; ++tile) {
      const int start = tile * kTileKeys;
      // What the queries from row `first` to row `last` see all alike, and whether they see any.
      const auto sees_all = [&](int first, int last) {
        return shared.seen[last].begin <= start && shared.seen[first].end - start >= kTileKeys;
      };
      const auto sees_any = [&](int first, int last) {
        return shared.seen[first].begin - start < kTileKeys && shared.seen[last].end > start;
      };
      const auto row_sees = [&](int r) {
        const KeyRange range = shared.seen[queries.row(r)];
        return KeyRange{range.begin - start, range.end - start};
      };
      const bool edge = !sees_all(0, kTileQueries - 1);
      const bool active = first_row < num_queries && sees_any(first_row, last_row);
      const bool masked = !sees_all(first_row, last_row);

      load_keys(p.v, p.v_strides, v_tile, start);
      if (tile < last_tile) {
        load_keys(p.k, p.k_strides, k_tile(tile + 1), start + kTileKeys);
      } else {
        ptx::cp_async_commit();
      }
      if (active) {
        queries.multiply_keys(k_tile(tile));
        if (masked) queries.mask(row_sees);
        queries.raise_maxima(p.scale_log2);
      }

      ptx::cp_async_wait<1>();
      // Zero times NaN is NaN: a value that some rows must not see may not be multiplied by their
      // zeros. Where every row sees every key there is nothing to look for.
      if (edge && v_tile.template has_non_finite<kThreads>(tid)) {
        ptx::atomic_exch(shared.non_finite, tile);
      }
      ptx::sync_threads();
      if (edge && *shared.non_finite == tile) {
        // All warps are done with this tile of k.
        v_tile.template split_non_finite<kThreads>(k_tile(tile), tid);
        ptx::sync_threads();
        if (active) queries.add_non_finite(k_tile(tile), row_sees, p.scale_log2);
      }
      if (active) queries.multiply_values(v_tile, p.scale_log2);
      ptx::cp_async_wait<0>();
      ptx::sync_threads();
    }
  }

  bool sees_nothing[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) sees_nothing[r] = shared.seen[queries.row(r)].empty();
  float lse[kThreadRows];
  // A warp reads its own rows of the queries only, so it may overwrite them by itself.
  queries.finish(q_tile, sees_nothing, p.scale_log2, lse);
  if (p.lse != nullptr && tid % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const int row = queries.row(r);
      if (row < num_queries) {
        p.lse[sequence.query_offset(p.lse_strides, first_query + row, head)] = lse[r];
      }
    }
  }
  ptx::sync_warp();
  T* const out = static_cast<T*>(p.out) + sequence.query_offset(p.out_strides, first_query, head);
  constexpr int kChunks = KeyTile::kChunks;
#pragma unroll 4
  for (int i = tid % ptx::kWarpSize; i < kWarpQueries * kChunks; i += ptx::kWarpSize) {
    const int row = first_row + i / kChunks;
    const int column = i % kChunks * kChunkElements;
    if (row >= num_queries || column >= p.head_dim) continue;
    const auto vec = Vec<T, kChunkElements>::template load<true>(q_tile.chunk(row, i % kChunks));
    T* const to = out + row * p.out_strides.row + column;
    if (p.out_wide) {
      vec.template store<true>(to);
    } else {
      vec.template store<false>(to);
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

template <class T, int kCols>
void launch_prefill_tile(const AttentionParams& params, Stream stream) {
  const int64_t tiles = (params.seqlen_q + kTileQueries - 1) / kTileQueries;
  const LaunchConfig config{
      .grid = dim3(grid_size(tiles * params.batch * params.num_heads)),
      .block = dim3(kThreads),
      .smem_bytes = shared_bytes<PrefillShared<T, kCols>>(),
      .stream = stream,
      .pdl = true,
  };
  launch(prefill_sm80_kernel<T, kCols>, config, params);
}

}  // namespace

void launch_prefill_sm80(const AttentionParams& params, Stream stream) {
  dispatch_head_dim(params.head_dim, [&](auto cols) {
    constexpr int kCols = decltype(cols)::kValue;
    if (params.dtype == DType::kBFloat16) {
      launch_prefill_tile<__nv_bfloat16, kCols>(params, stream);
    } else {
      launch_prefill_tile<__half, kCols>(params, stream);
    }
  });
}

}  // namespace exafuse
