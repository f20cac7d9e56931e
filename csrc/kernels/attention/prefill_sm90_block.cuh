// What the warps of a prefill block of sm_90 share: its shared memory, its barriers, and the order
// in which it works.
//
// Barriers in shared memory, each with the phase that its users count: a producer fills q, and a
// ring of stages of k and of v, which the consumers empty. Number i of the ring lies in stage
// i % kStages and is its (i / kStages)th use.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "common/ptx_sm90.cuh"
#include "kernels/attention/key_tiles.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/prefill_warpgroup.cuh"
#include "kernels/attention/sequence.cuh"

namespace exafuse {

struct PrefillSm90Params {
  TensorMap q;
  TensorMap k;
  TensorMap v;
  TensorMap out;
  AttentionParams call;
  unsigned num_tiles = 0;  // of queries, of every head of every sequence
  bool out_by_map = false;
};

inline constexpr int kPrefillStages = 2;
// Warps 1 to 3 of the producer's warpgroup.
inline constexpr int kCleanerWarps = 3;

template <class T, int kCols, int kQueries, int kKeys>
struct PrefillSm90Shared {
  using Queries = WarpgroupQueries<T, kCols, kQueries, kKeys>;
  using QueryPanels = typename Queries::QueryPanels;
  using KeyPanels = typename Queries::KeyPanels;
  static constexpr int kConsumers = kQueries / kWarpgroupQueries;
  static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);

  typename QueryPanels::Memory* q;  // and, at the end, the output
  typename KeyPanels::Memory* k;
  typename KeyPanels::Memory* v;
  uint64_t* full_q;
  uint64_t* empty_q;
  uint64_t* full_k;
  uint64_t* empty_k;
  uint64_t* full_v;
  uint64_t* empty_v;
  uint64_t* clean_v;  // a tile at the edge of what the block sees is ready for products
  int* non_finite;    // per stage and cleaner warp: whether such a tile held a NaN or an infinity

  template <class Arena>
  static constexpr PrefillSm90Shared take_from(Arena& arena) {
    return {arena.template take<typename QueryPanels::Memory, 1>(),
            arena.template take<typename KeyPanels::Memory, kPrefillStages>(),
            arena.template take<typename KeyPanels::Memory, kPrefillStages>(),
            arena.template take<uint64_t, 1>(),
            arena.template take<uint64_t, 1>(),
            arena.template take<uint64_t, kPrefillStages>(),
            arena.template take<uint64_t, kPrefillStages>(),
            arena.template take<uint64_t, kPrefillStages>(),
            arena.template take<uint64_t, kPrefillStages>(),
            arena.template take<uint64_t, kPrefillStages>(),
            arena.template take<int, kPrefillStages * kCleanerWarps>()};
  }

  __device__ __forceinline__ uint32_t k_tile(int stage) const {
    return ptx::smem_addr(k) + stage * KeyPanels::kBytes;
  }
  __device__ __forceinline__ uint32_t v_tile(int stage) const {
    return ptx::smem_addr(v) + stage * KeyPanels::kBytes;
  }

  // By one thread, before any other uses them.
  __device__ __forceinline__ void init_barriers() const {
    constexpr int kConsumerWarps = 4 * kConsumers;
    ptx::mbarrier_init(ptx::smem_addr(full_q), 1);
    ptx::mbarrier_init(ptx::smem_addr(empty_q), kConsumers);
#pragma unroll
    for (int stage = 0; stage < kPrefillStages; ++stage) {
      ptx::mbarrier_init(ptx::smem_addr(full_k + stage), 1);
      ptx::mbarrier_init(ptx::smem_addr(empty_k + stage), kConsumerWarps);
      ptx::mbarrier_init(ptx::smem_addr(full_v + stage), 1);
      ptx::mbarrier_init(ptx::smem_addr(empty_v + stage), kConsumerWarps + kCleanerWarps);
      ptx::mbarrier_init(ptx::smem_addr(clean_v + stage), kCleanerWarps);
    }
    ptx::fence_mbarrier_init();
  }
};

__device__ __forceinline__ uint32_t barrier_at(const uint64_t* barriers, int stage = 0) {
  return ptx::smem_addr(barriers) + 8 * stage;
}

// Where number `item` of a ring lies, and the parity of the phase that fills it.
__device__ __forceinline__ int stage_of(uint32_t item) {
  return static_cast<int>(item % kPrefillStages);
}
__device__ __forceinline__ uint32_t parity_of(uint32_t item) { return item / kPrefillStages & 1; }

// Which tiles of queries a block takes: one of each row of gridDim.x, from left to right and from
// right to left by turns, so that who gets the longest of one row gets the shortest of the next.
class TileNumbers {
 public:
  __device__ __forceinline__ unsigned current() const { return number_; }
  __device__ __forceinline__ void advance() {
    number_ += leftwards_ ? 2 * blockIdx.x + 1 : 2 * (gridDim.x - blockIdx.x) - 1;
    leftwards_ = !leftwards_;
  }

 private:
  unsigned number_ = blockIdx.x;
  bool leftwards_ = false;
};

// One tile of queries of one head of a sequence. The head comes first, so that the query heads of
// one kv head run side by side and share its keys in the L2 cache; then the sequence; then the tile
// of queries, the last, which sees the most keys under a causal mask, before the others.
template <int kQueries, int kKeys>
class QueryTileWork {
 public:
  __device__ __forceinline__ QueryTileWork(const PrefillSm90Params& p, unsigned number)
      : head(static_cast<int>(number % static_cast<unsigned>(p.call.num_heads))),
        index(static_cast<int>(number / static_cast<unsigned>(p.call.num_heads) %
                               static_cast<unsigned>(p.call.batch))),
        first_query(((p.call.seqlen_q + kQueries - 1) / kQueries - 1 -
                     static_cast<int>(number / static_cast<unsigned>(p.call.num_heads) /
                                      static_cast<unsigned>(p.call.batch))) *
                    kQueries),
        sequence(p.call, index),
        num_queries(sequence.seqlen_q() - first_query) {}

  // What the query in a row of the tile sees.
  __device__ __forceinline__ KeyRange sees(int row) const {
    return sequence.visible(first_query + last_row(row));
  }

  // The row of q and out, counted from the first of the sequence or of all packed ones.
  __device__ __forceinline__ int query_row(int row) const {
    return static_cast<int>(sequence.query_offset({.row = 1}, first_query + row, 0));
  }

  // Tiles of keys of the rows from `from` to before `to`: some of them, and each of them, sees.
  __device__ __forceinline__ TileRange active(int from = 0, int to = kQueries) const {
    return tiles_of_any<kKeys>(sees(from), sees(to - 1));
  }
  __device__ __forceinline__ TileRange whole(int from = 0, int to = kQueries) const {
    return tiles_of_all<kKeys>(sees(from), sees(to - 1));
  }
  __device__ __forceinline__ KeyRange seen() const {
    return {sees(0).begin, sees(kQueries - 1).end};
  }

  int head;
  int index;
  int first_query;
  Sequence sequence;
  int num_queries;  // of the tile and of those behind it; none if not positive

 private:
  // Rows that do not exist count as the last that does.
  __device__ __forceinline__ int last_row(int row) const {
    return row < num_queries ? row : num_queries - 1;
  }
};

}  // namespace exafuse
