// Attention of many queries in one pass over the keys (FlashAttention-2, Dao 2023) on tensor cores:
// mma.m16n8k16 fed by ldmatrix from swizzled shared memory, filled by cp.async.
//
// A block of four warps takes 128 queries of one head, a warp 32 of them, so that every fragment of
// K and V serves two mma rows. It walks the tiles of 64 keys that hold a key seen by any of its
// queries, from the first to the last; only tiles at the edge of what its queries see are tested
// key by key. K(i + 1) is under way while tile i is worked on, and V(i + 1) as well; with 128
// columns shared memory has room for one tile of v only, which arrives during q k^T and the maxima.
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
#include "kernels/attention/key_tiles.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/prefill_sm80.h"
#include "kernels/attention/prefill_warp.cuh"
#include "kernels/attention/sequence.cuh"

namespace exafuse {
namespace {

static_assert(kKeyTile % kPrefillTileKeys == 0);

// --- kernel -------------------------------------------------------------------------------------

struct WarpTiles {
  TileRange active;  // some query of the warp sees a key
  TileRange whole;   // every query of the warp sees every key
};

// What the block works on. The loop over the keys has no registers left for it.
struct BlockState {
  KeyRange existing;  // of the sequence
  KeyRange seen;      // by any query of the block
  int64_t position;   // of the first query
  TileRange active;   // some query of the block sees a key
  TileRange whole;    // every query of the block sees every key
  int index;          // of the sequence
  int kv_head;
  int num_queries;    // of the tile and of those behind it
  int non_finite[2];  // the latest tiles, even and odd, whose v holds a NaN or an infinity
  int64_t out;        // element offsets of the first row
  int64_t lse;
};

template <class T, int kCols>
struct PrefillShared {
  using Warp = WarpQueries<T, kCols>;
  using QueryTile = typename Warp::QueryTile;
  using KeyTile = typename Warp::KeyTile;
  // A second tile of 128 columns would leave an SM of sm_80 with one block instead of two.
  static constexpr int kValueTiles = kCols < 128 ? 2 : 1;

  T* q;  // and, at the end, the output
  T* k;  // two tiles
  T* v;
  WarpTiles* warps;
  BlockState* block;

  template <class Arena>
  static constexpr PrefillShared take_from(Arena& arena) {
    return {arena.template take<T, QueryTile::kElements>(),
            arena.template take<T, 2 * KeyTile::kElements>(),
            arena.template take<T, kValueTiles * KeyTile::kElements>(),
            arena.template take<WarpTiles, kPrefillWarps>(), arena.template take<BlockState, 1>()};
  }
};
// Two blocks to an SM of sm_80, which has 164 KiB and takes 1 KiB of them for each block.
static_assert(2 * (shared_bytes<PrefillShared<__half, kMaxHeadDim>>() + 1024) <= 164 * 1024);

// Block b: the head comes first, so that the query heads of one kv head run side by side and share
// its keys in the L2 cache; then the sequence; then the tile of queries, the last, which sees the
// most keys under a causal mask, before the others.
template <class T, int kCols>
__global__ void __launch_bounds__(kPrefillThreads, 2)
    prefill_sm80_kernel(const __grid_constant__ AttentionParams p) {
  using Shared = PrefillShared<T, kCols>;
  using KeyTile = typename Shared::KeyTile;
  const int tid = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.num_heads));
  const unsigned sequence_and_tile = blockIdx.x / static_cast<unsigned>(p.num_heads);
  const int index = static_cast<int>(sequence_and_tile % static_cast<unsigned>(p.batch));
  const int num_tiles = (p.seqlen_q + kPrefillTileQueries - 1) / kPrefillTileQueries;
  const int first_query =
      (num_tiles - 1 - static_cast<int>(sequence_and_tile / static_cast<unsigned>(p.batch))) *
      kPrefillTileQueries;

  ptx::griddep_wait();
  const Sequence sequence(p, index);
  const int num_queries = sequence.seqlen_q() - first_query;  // of the tile and those behind it
  if (num_queries <= 0) return;

  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  const typename Shared::QueryTile q_tile(shared.q);
  constexpr bool kValuesAhead = Shared::kValueTiles == 2;
  const auto k_tile = [&](int tile) { return KeyTile(shared.k + tile % 2 * KeyTile::kElements); };
  const auto v_tile = [&](int tile) {
    return KeyTile(shared.v + tile % Shared::kValueTiles * KeyTile::kElements);
  };
  const int first_row = tid / ptx::kWarpSize * kPrefillWarpQueries;
  const WarpTiles& warp = shared.warps[tid / ptx::kWarpSize];
  BlockState& block = *shared.block;

  const auto seen_by = [&](int row) {
    return sequence.visible(first_query + (row < num_queries ? row : num_queries - 1));
  };
  if (tid % ptx::kWarpSize == 0) {
    const KeyRange first = seen_by(first_row);
    const KeyRange last = seen_by(first_row + kPrefillWarpQueries - 1);
    shared.warps[tid / ptx::kWarpSize] = {
        first_row < num_queries ? tiles_of_any<kPrefillTileKeys>(first, last) : TileRange{},
        tiles_of_all<kPrefillTileKeys>(first, last)};
  }
  if (tid == 0) {
    const KeyRange first = seen_by(0);
    const KeyRange last = seen_by(kPrefillTileQueries - 1);
    block = {.existing = sequence.keys(),
             .seen = {first.begin, last.end},
             .position = int64_t{sequence.keys().end} - sequence.seqlen_q() + first_query,
             .active = tiles_of_any<kPrefillTileKeys>(first, last),
             .whole = tiles_of_all<kPrefillTileKeys>(first, last),
             .index = index,
             .kv_head = head / p.gqa_group_size,
             .num_queries = num_queries,
             .non_finite = {-1, -1},
             .out = sequence.query_offset(p.out_strides, first_query, head),
             .lse = sequence.query_offset(p.lse_strides, first_query, head)};
  }
  ptx::sync_threads();

  WarpQueries<T, kCols> queries(q_tile, first_row);
  if (block.active.begin < block.active.end) {
    q_tile.template load<kPrefillThreads>(
        static_cast<const T*>(p.q) + sequence.query_offset(p.q_strides, first_query, head),
        p.q_strides.row, 0, num_queries, p.head_dim, p.wide, tid);

    // Starts loading a tile of k or v. `own` is where this thread's part of it lies and moves on to
    // that of the next.
    const auto load_keys = [&](const void* base, const AttentionStrides& strides, const T*& own,
                               const KeyTile& to, int tile) {
      const int64_t own_offset = KeyTile::template own_offset<kPrefillThreads>(strides.row, tid);
      const int start = tile * kPrefillTileKeys;
      if (p.block_table != nullptr || p.ring || tile == block.active.begin) {
        own = static_cast<const T*>(base) +
              Sequence(p, block.index).key_offset(strides, start, block.kv_head) + own_offset;
      }
      if (p.wide && tile > block.active.begin && tile + 1 < block.active.end) {
        to.template load_whole<kPrefillThreads>(own, strides.row, p.head_dim, tid);
      } else {
        to.template load<kPrefillThreads>(own - own_offset, strides.row, block.seen.begin - start,
                                          block.seen.end - start, p.head_dim, p.wide, tid);
      }
      own += kPrefillTileKeys * strides.row;
      ptx::cp_async_commit();
    };
    const T* k_own = nullptr;
    const T* v_own = nullptr;
    const auto load_k = [&](int tile) { load_keys(p.k, p.k_strides, k_own, k_tile(tile), tile); };
    const auto load_v = [&](int tile) { load_keys(p.v, p.v_strides, v_own, v_tile(tile), tile); };
    // Zero times NaN is NaN: a value that some rows must not see may not be multiplied by their
    // zeros. Where every row sees every key there is nothing to look for. Before the barrier that
    // completes the tile.
    const auto look_for_non_finite = [&](int tile) {
      if (!block.whole.contains(tile) &&
          v_tile(tile).template has_non_finite<kPrefillThreads>(tid)) {
        ptx::atomic_exch(&block.non_finite[tile % 2], tile);
      }
    };

    load_k(block.active.begin);
    if constexpr (kValuesAhead) load_v(block.active.begin);
    ptx::griddep_launch_dependents();
    ptx::cp_async_wait<0>();
    if constexpr (kValuesAhead) look_for_non_finite(block.active.begin);
    ptx::sync_threads();
    queries.load_queries();

#pragma unroll 1
    for (int tile = block.active.begin; tile < block.active.end; ++tile) {
      const bool active = warp.active.contains(tile);

      const auto row_sees = [&](int r) {
        const KeyRange range =
            visible_keys(block.existing, p.window, block.position + queries.row(r));
        return KeyRange{range.begin - tile * kPrefillTileKeys, range.end - tile * kPrefillTileKeys};
      };

      if constexpr (!kValuesAhead) load_v(tile);
      if (tile + 1 < block.active.end) {
        load_k(tile + 1);
        if constexpr (kValuesAhead) load_v(tile + 1);
      } else {
        ptx::cp_async_commit();
      }
      if (active) {
        queries.multiply_keys(k_tile(tile));
        if (!warp.whole.contains(tile)) queries.mask(row_sees);
        queries.raise_maxima(p.scale_log2);
      }
      if constexpr (!kValuesAhead) {
        ptx::cp_async_wait<1>();
        look_for_non_finite(tile);
        ptx::sync_threads();
      }
      if (!block.whole.contains(tile) && block.non_finite[tile % 2] == tile) {
        if constexpr (kValuesAhead) ptx::sync_threads();
        // All warps are done with this tile of k.
        v_tile(tile).template split_non_finite<kPrefillThreads>(k_tile(tile), tid);
        ptx::sync_threads();
        if (active) queries.add_non_finite(k_tile(tile), row_sees, p.scale_log2);
      }
      if (active) queries.multiply_values(v_tile(tile), p.scale_log2);
      ptx::cp_async_wait<0>();
      if constexpr (kValuesAhead) {
        if (tile + 1 < block.active.end) look_for_non_finite(tile + 1);
      }
      ptx::sync_threads();
    }
  }

  float lse[kPrefillThreadRows];
  // A warp reads its own rows of the queries only, so it may overwrite them by itself.
  queries.finish(q_tile, p.scale_log2, lse);
  if (p.lse != nullptr && tid % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kPrefillThreadRows; ++r) {
      const int row = queries.row(r);
      if (row < block.num_queries) p.lse[block.lse + row * p.lse_strides.row] = lse[r];
    }
  }
  ptx::sync_warp();
  T* const out = static_cast<T*>(p.out) + block.out;
  constexpr int kChunks = KeyTile::kChunks;
#pragma unroll 4
  for (int i = tid % ptx::kWarpSize; i < kPrefillWarpQueries * kChunks; i += ptx::kWarpSize) {
    const int row = first_row + i / kChunks;
    const int column = i % kChunks * kChunkElements;
    if (row >= block.num_queries || column >= p.head_dim) continue;
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
  const int64_t tiles = (params.seqlen_q + kPrefillTileQueries - 1) / kPrefillTileQueries;
  const LaunchConfig config{
      .grid = dim3(grid_size(tiles * params.batch * params.num_heads)),
      .block = dim3(kPrefillThreads),
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
