// Attention of a few queries over long keys (flash decoding, Dao et al. 2023), bound by the bytes
// of k and v.
//
// All queries of all heads that share a kv head are the columns of one matrix, so that k and v are
// read once: S^T = K Q^T and O^T = V^T P^T, keys in the 16 rows of mma.m16n8k16, queries in its 8
// columns. A block takes up to 8, 16 or 24 columns and one split of the keys. Its warps share
// nothing until the end: each copies its own 16 keys out of every 64 into its own ring of shared
// memory and keeps its own running maximum and sum.
//
// What a column gets is the same bits whatever stands in the columns beside it: keys that it does
// not see add nothing, whether some other column sees them or none.

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/softmax.cuh"
#include "common/vec.cuh"
#include "kernels/attention/decode.h"
#include "kernels/attention/decode_block.cuh"
#include "kernels/attention/decode_splits.cuh"
#include "kernels/attention/decode_tiles.cuh"

namespace exafuse {
namespace {

inline constexpr int kMostColumnTiles = 3;  // of 8 columns: what registers hold

// --- kernel -------------------------------------------------------------------------------------

template <class T, int kCols, int kColumnTiles>
__global__ void __launch_bounds__(kDecodeThreads, kColumnTiles < 3 ? 3 : 2)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  using Shared = DecodeShared<T, kCols, kColumnTiles>;
  using KeyTile = typename Shared::KeyTile;
  using QueryTile = typename Shared::QueryTile;
  constexpr int kColumns = Shared::kColumns;
  constexpr int kStages = Shared::kStages;

  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  const AttentionParams& call = p.call;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp_id = static_cast<int>(threadIdx.x / ptx::kWarpSize);
  const int group_id = static_cast<int>(threadIdx.x % ptx::kWarpSize / 4);  // row of a fragment
  const int pair_id = static_cast<int>(threadIdx.x % 4);                    // pair of columns

  const BlockWork work(p);
  ptx::griddep_wait();
  const Sequence sequence(call, work.sequence);
  const SplitPlan plan(call, sequence);
  const int group = call.gqa_group_size;
  const int first_column = work.column_block * kColumns;
  const int num_columns = std::min(kColumns, sequence.seqlen_q() * group - first_column);
  // The first block of a sequence stays if only to write that there is nothing to see.
  if (num_columns <= 0 || (work.split > 0 && work.split >= plan.count)) return;
  const bool is_whole = plan.count <= 1;  // no other split: the result is final

  // The keys of this split that some column sees; all columns see those in `common`.
  const KeyRange first_seen = sequence.visible(first_column / group);
  const KeyRange last_seen = sequence.visible((first_column + num_columns - 1) / group);
  const KeyRange common{last_seen.begin, first_seen.end};
  KeyRange reach;
  if (plan.count > 0) {
    const int64_t begin = int64_t{plan.first + work.split} * plan.size;
    reach.begin = static_cast<int>(std::max<int64_t>(first_seen.begin, begin));
    reach.end = static_cast<int>(std::min<int64_t>(last_seen.end, begin + plan.size));
  }
  // Tile t of 16 keys, counted from position 0, belongs to warp t % kDecodeWarps.
  const int tile_of_begin = reach.begin / kDecodeTileKeys;
  const int first_tile = tile_of_begin + ((warp_id - tile_of_begin) & (kDecodeWarps - 1));
  const int last_tile = reach.empty() ? -1 : (reach.end - 1) / kDecodeTileKeys;
  const int num_tiles = last_tile < first_tile ? 0 : (last_tile - first_tile) / kDecodeWarps + 1;

  T* const ring = shared.rings + warp_id * Shared::kRing;
  const auto tile_at = [&](int stage, int which) {
    return KeyTile(ring + (stage * 2 + which) * KeyTile::kElements);
  };
  const auto position_of = [&](int i) { return (first_tile + i * kDecodeWarps) * kDecodeTileKeys; };
  // Starts the copy of the i-th tile of this warp; an empty group behind the last.
  const auto load_tile = [&](const T* source, const AttentionStrides& strides, int which, int i) {
    if (i < num_tiles) {
      const int position = position_of(i);
      load_keys(tile_at(i % kStages, which), source, strides.row, reach.begin - position,
                reach.end - position, call.head_dim, call.wide);
    }
    ptx::cp_async_commit();
  };
  KeyCursor<T, kDecodeWarps * kDecodeTileKeys> cursor;
  if (num_tiles > 0) cursor.seek(call, sequence, work.kv_head, position_of(0));
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    if (i > 0 && i < num_tiles) cursor.advance(call, sequence, work.kv_head, position_of(i));
    load_tile(cursor.k, call.k_strides, 0, i);
    load_tile(cursor.v, call.v_strides, 1, i);
  }

  const QueryTile queries(shared.queries);
  for (int i = tid; i < QueryTile::kRows * QueryTile::kChunks; i += kDecodeThreads) {
    const int row = i / QueryTile::kChunks;
    const int chunk = i % QueryTile::kChunks;
    auto vec = Vec<T, kChunkElements>::zero();
    if (row < num_columns && chunk * kChunkElements < call.head_dim) {
      const int query = (first_column + row) / group;
      const int head = work.kv_head * group + (first_column + row) % group;
      const T* source = static_cast<const T*>(call.q) +
                        sequence.query_offset(call.q_strides, query, head) + chunk * kChunkElements;
      vec = call.wide ? Vec<T, kChunkElements>::template load_readonly<true>(source)
                      : Vec<T, kChunkElements>::template load_readonly<false>(source);
    }
    vec.store_shared(queries.chunk(row, chunk));
  }
  if (tid < kColumns) {
    Column column = {};
    if (tid < num_columns) {
      const int query = (first_column + tid) / group;
      const int head = work.kv_head * group + (first_column + tid) % group;
      column.seen = sequence.visible(query);
      column.out = is_whole
                       ? sequence.query_offset(call.out_strides, query, head)
                       : work.split * p.partials.rows + partial_row(call, sequence, query, head);
      column.lse = sequence.query_offset(call.lse_strides, query, head);
    }
    shared.columns[tid] = column;
  }
  ptx::griddep_launch_dependents();
  ptx::sync_threads();

  WarpColumns<T, kCols, kColumnTiles> found;
  found.reset();
  for (int i = 0; i < num_tiles; ++i) {
    const int position = position_of(i);
    const bool seen_by_all = position >= common.begin && common.end - position >= kDecodeTileKeys;

    float scores[kColumnTiles][4] = {};
    ptx::cp_async_wait<2 * kStages - 1>();
    ptx::sync_warp();
    found.score(tile_at(i % kStages, 0), queries, scores);
    ptx::sync_warp();
    if (i + kStages < num_tiles) {
      cursor.advance(call, sequence, work.kv_head, position_of(i + kStages));
    }
    load_tile(cursor.k, call.k_strides, 0, i + kStages);
    if (!seen_by_all) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const KeyRange seen = shared.columns[n * 8 + pair_id * 2 + j % 2].seen;
          if (!seen.contains(position + group_id + j / 2 * 8)) scores[n][j] = kMasked;
        }
      }
    }
    uint32_t terms[kColumnTiles][2];
    found.add_scores(scores, terms, call.scale_log2);

    ptx::cp_async_wait<2 * kStages - 1>();
    ptx::sync_warp();
    const KeyTile values = tile_at(i % kStages, 1);
    if (seen_by_all || !found.has_non_finite(values)) {
      found.add_values(values, terms);
    } else {  // query by query, each with the values of its own keys
#pragma unroll 1
      for (int column = -(first_column % group); column < num_columns; column += group) {
        found.add_values_apart(values, terms, shared.columns[std::max(column, 0)].seen, position,
                               column, group);
      }
    }
    ptx::sync_warp();
    load_tile(cursor.v, call.v_strides, 1, i + kStages);
  }

  // Every copy was waited for, and the warp has read its last tile.
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = n * 8 + pair_id * 2 + c;
      float sum = found.sums[n][c];
#pragma unroll
      for (int offset = 4; offset < ptx::kWarpSize; offset *= 2) sum += ptx::shfl_xor(sum, offset);
      if (group_id == 0) {
        shared.max_scores[warp_id * kColumns + column] = found.max_scores[n][c];
        shared.sums[warp_id * kColumns + column] = sum;
      }
#pragma unroll
      for (int m = 0; m < kCols / 16; ++m) {
        *shared.result(warp_id, column, m * 16 + group_id) = found.values[m][n][c];
        *shared.result(warp_id, column, m * 16 + group_id + 8) = found.values[m][n][c + 2];
      }
    }
  }
  ptx::sync_threads();

  // The warps' results, added up in their order.
  for (int i = tid; i < kColumns * kCols / 2; i += kDecodeThreads) {
    const int at = i / (kCols / 2);
    const int dim = i % (kCols / 2) * 2;
    if (at >= num_columns || dim >= call.head_dim) continue;
    float max_score = kMasked;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      max_score = ptx::max(max_score, shared.max_scores[w * kColumns + at]);
    }
    float sum = 0;
    float out[2] = {};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor =
          softmax_rescale(shared.max_scores[w * kColumns + at], max_score, call.scale_log2);
      const float* result = shared.result(w, at, dim);
      sum = ptx::fma(shared.sums[w * kColumns + at], factor, sum);
      out[0] = ptx::fma(result[0], factor, out[0]);
      out[1] = ptx::fma(result[1], factor, out[1]);
    }
    const Column column = shared.columns[at];
    if (is_whole) {
      write_row<T>(call, column.out, column.lse, dim, out, max_score, sum);
    } else {
      p.partials.write(column.out, dim, call.head_dim, out, max_score, sum);
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

template <class T, int kCols, int kColumnTiles>
void launch_tiles(DecodeParams params, Stream stream) {
  using Shared = DecodeShared<T, kCols, kColumnTiles>;
  const AttentionParams& call = params.call;
  const int columns = call.seqlen_q * call.gqa_group_size;
  params.column_blocks = (columns + Shared::kColumns - 1) / Shared::kColumns;
  const int64_t blocks = int64_t{params.column_blocks} * call.num_kv_heads * params.max_splits;
  const LaunchConfig config{
      .grid = dim3(grid_size(blocks * call.batch)),
      .block = dim3(kDecodeThreads),
      .smem_bytes = shared_bytes<Shared>(),
      .stream = stream,
      .pdl = true,
  };
  launch(decode_kernel<T, kCols, kColumnTiles>, config, params);
}

template <class T>
void launch_typed(const DecodeParams& params, Stream stream) {
  // As few passes over the keys as registers allow, all of the same width.
  const int tiles = (params.call.seqlen_q * params.call.gqa_group_size + 7) / 8;
  const int passes = (tiles + kMostColumnTiles - 1) / kMostColumnTiles;
  const int column_tiles = (tiles + passes - 1) / passes;
  dispatch_head_dim(params.call.head_dim, [&](auto cols) {
    dispatch_value<1, 2, kMostColumnTiles>("columns", column_tiles, [&](auto tiles) {
      launch_tiles<T, cols.kValue, tiles.kValue>(params, stream);
    });
  });
}

}  // namespace

int64_t decode_workspace_bytes(int64_t total_q, int64_t max_seqlen_q, int64_t num_heads,
                               int64_t head_dim, int64_t key_capacity, int64_t window_left) {
  // The largest of all caches of this capacity: positions of a ring go on behind its slots, and
  // left padding moves the first key.
  const int64_t end = window_left < 0 ? key_capacity : INT32_MAX;
  const int splits = most_splits(end, key_capacity, window_left, max_seqlen_q, true);
  return splits <= 1 ? 0 : Partials::bytes(splits, total_q * num_heads, head_dim);
}

void launch_decode(const AttentionParams& params, float* workspace, Stream stream) {
  if (params.batch == 0 || params.seqlen_q == 0) return;
  const int64_t capacity = params.key_capacity();
  const bool any_start = params.window.left >= 0 || params.cache_leftpad != nullptr;
  const int splits = most_splits(params.ring ? INT32_MAX : capacity, capacity, params.window.left,
                                 params.seqlen_q, any_start);
  const int64_t tokens =
      params.cu_seqlens_q != nullptr ? params.total_q : int64_t{params.batch} * params.seqlen_q;
  const DecodeParams decode{
      .call = params,
      .partials = Partials(workspace, splits, tokens * params.num_heads, params.head_dim),
      .max_splits = std::max(1, splits),
      .column_blocks = 1,
  };
  if (params.dtype == DType::kBFloat16) {
    launch_typed<__nv_bfloat16>(decode, stream);
  } else {
    launch_typed<__half>(decode, stream);
  }
  if (splits > 1) launch_combine(decode, stream);
}

}  // namespace exafuse
