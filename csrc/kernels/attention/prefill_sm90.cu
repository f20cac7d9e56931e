// Attention of many queries in one pass over the keys on Hopper (FlashAttention-3, Shah et al.
// 2024): copies by TMA, products by wgmma, the roles of a block divided among its warps.
//
// A block holds one producer warpgroup and two or three consumer warpgroups of 64 queries each. The
// producer's first warp keeps the copies going; its other warps clean the tiles of v at the edges.
// The consumers take turns: while one issues its products, the others compute their softmax; and
// within a consumer the products p v of one tile run beneath the softmax of the next. Blocks stay,
// one to an SM, and take one tile of queries after the other.
//
// What a row becomes depends on its own queries and keys alone: tiles start at absolute multiples
// of their size, one row's tiles come in descending order, and a tile of which it sees nothing
// changes no bit of it.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"
#include "kernels/attention/params.h"
#include "kernels/attention/prefill_sm90.h"
#include "kernels/attention/prefill_sm90_block.cuh"
#include "kernels/attention/prefill_sm90_consumer.cuh"
#include "kernels/attention/prefill_sm90_producer.cuh"

namespace exafuse {
namespace {

template <class T, int kCols, int kQueries, int kKeys>
__global__ void __launch_bounds__(PrefillSm90Shared<T, kCols, kQueries, kKeys>::kThreads, 1)
    prefill_sm90_kernel(const __grid_constant__ PrefillSm90Params p) {
  using Shared = PrefillSm90Shared<T, kCols, kQueries, kKeys>;
  constexpr int kProducerRegisters = Shared::kConsumers == 2 ? 40 : 32;
  constexpr int kConsumerRegisters = Shared::kConsumers == 2 ? 232 : 160;
  // What the threads start with is all that goes around.
  static_assert(kProducerRegisters + Shared::kConsumers * kConsumerRegisters <=
                65536 / Shared::kThreads / 8 * 8 * (1 + Shared::kConsumers));
  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  if (threadIdx.x == 0) shared.init_barriers();
  ptx::sync_threads();
  ptx::griddep_wait();
  ptx::griddep_launch_dependents();

  using Producer = PrefillProducer<T, kCols, kQueries, kKeys>;
  const int warp = ptx::shfl(static_cast<int>(threadIdx.x) / ptx::kWarpSize, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp > 0) {
      Producer{p, shared}.clean();
    } else if (ptx::elect_one()) {
      Producer{p, shared}.produce();
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    PrefillConsumer<T, kCols, kQueries, kKeys>{p, shared}.consume(warp / 4 - 1);
  }
}

// --- host ---------------------------------------------------------------------------------------

TensorMapSpec map_of(const AttentionParams& params, const void* data,
                     const AttentionStrides& strides, int64_t rows, int heads, int batch,
                     int box_rows) {
  return {.data = const_cast<void*>(data),
          .dtype = params.dtype,
          .columns = params.head_dim,
          .rows = rows,
          .heads = heads,
          .batch = batch,
          .row_stride = strides.row,
          .head_stride = strides.head,
          .batch_stride = strides.batch,
          .box_rows = box_rows};
}

// Packed sequences are one long one to the copy engine.
TensorMapSpec map_of_queries(const AttentionParams& params, const void* data,
                             const AttentionStrides& strides, int box_rows) {
  const bool packed = params.cu_seqlens_q != nullptr;
  return map_of(params, data, strides, packed ? params.total_q : params.seqlen_q, params.num_heads,
                packed ? 1 : params.batch, box_rows);
}

TensorMapSpec map_of_keys(const AttentionParams& params, const void* data,
                          const AttentionStrides& strides, int box_rows) {
  const bool packed = params.cu_seqlens_k != nullptr;
  return map_of(params, data, strides, packed ? params.total_k : params.slots, params.num_kv_heads,
                packed ? 1 : params.key_rows, box_rows);
}

template <class T, int kCols, int kQueries, int kKeys>
void launch_prefill_tile(const AttentionParams& params, Stream stream) {
  using Shared = PrefillSm90Shared<T, kCols, kQueries, kKeys>;
  const int64_t tiles = (params.seqlen_q + kQueries - 1) / kQueries;
  const unsigned num_tiles = grid_size(tiles * params.batch * params.num_heads);
  const TensorMapSpec out =
      map_of_queries(params, params.out, params.out_strides, kWarpgroupQueries);
  PrefillSm90Params all{
      .q = make_tensor_map(map_of_queries(params, params.q, params.q_strides, kQueries)),
      .k = make_tensor_map(map_of_keys(params, params.k, params.k_strides, kKeys)),
      .v = make_tensor_map(map_of_keys(params, params.v, params.v_strides, kKeys)),
      .out = {},
      .call = params,
      .num_tiles = num_tiles,
      .out_by_map = fits_tensor_map(out)};
  if (all.out_by_map) all.out = make_tensor_map(out);
  const LaunchConfig config{
      .grid = dim3(std::min(num_tiles, static_cast<unsigned>(current_device().num_sms))),
      .block = dim3(Shared::kThreads),
      .smem_bytes = shared_bytes<Shared>(),
      .stream = stream,
      .pdl = true,
  };
  launch(prefill_sm90_kernel<T, kCols, kQueries, kKeys>, config, all);
}

// Calls body(cols, queries, keys) with the template arguments of a tile.
template <class Body>
void dispatch_tile(int head_dim, PrefillTile tile, Body body) {
  bool found = false;
  const auto offer = [&](auto cols, auto queries, auto keys) {
    if (found || tile != PrefillTile{decltype(queries)::kValue, decltype(keys)::kValue}) return;
    found = true;
    body(cols, queries, keys);
  };
  dispatch_head_dim(head_dim, [&](auto cols) {
    constexpr int kCols = decltype(cols)::kValue;
    offer(cols, ValueTag<128>{}, ValueTag<128>{});
    if constexpr (kCols == 64) {
      offer(cols, ValueTag<192>{}, ValueTag<128>{});
      offer(cols, ValueTag<128>{}, ValueTag<192>{});
    } else if constexpr (kCols == 96) {
      offer(cols, ValueTag<128>{}, ValueTag<160>{});
    } else {
      offer(cols, ValueTag<128>{}, ValueTag<176>{});
    }
  });
  if (!found) {
    throw std::invalid_argument("no prefill tile of " + std::to_string(tile.queries) + "x" +
                                std::to_string(tile.keys) + " is compiled for head_dim " +
                                std::to_string(head_dim));
  }
}

}  // namespace

PrefillTile prefill_tile_sm90(const AttentionParams& params, bool cached) {
  // Rings and pages hold whole tiles of 128 keys; a window ends soon.
  if (cached || params.window.left >= 0) return {128, kKeyTile};
  if (params.head_dim <= 64) return {192, 128};
  return {128, params.head_dim <= 96 ? 160 : 176};
}

bool prefill_sm90_takes(const AttentionParams& params) {
  return fits_tensor_map(map_of_queries(params, params.q, params.q_strides, 128)) &&
         fits_tensor_map(map_of_keys(params, params.k, params.k_strides, 128)) &&
         fits_tensor_map(map_of_keys(params, params.v, params.v_strides, 128));
}

void launch_prefill_sm90(const AttentionParams& params, PrefillTile tile, Stream stream) {
  dispatch_tile(params.head_dim, tile, [&](auto cols, auto queries, auto keys) {
    constexpr int kCols = decltype(cols)::kValue;
    constexpr int kQueries = decltype(queries)::kValue;
    constexpr int kKeys = decltype(keys)::kValue;
    if (params.dtype == DType::kBFloat16) {
      launch_prefill_tile<__nv_bfloat16, kCols, kQueries, kKeys>(params, stream);
    } else {
      launch_prefill_tile<__half, kCols, kQueries, kKeys>(params, stream);
    }
  });
}

}  // namespace exafuse
