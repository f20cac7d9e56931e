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
#include <type_traits>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"
#include "common/vec.cuh"
#include "kernels/attention/key_tiles.cuh"
#include "kernels/attention/params.h"
#include "kernels/attention/prefill_sm90.h"
#include "kernels/attention/prefill_sm90_block.cuh"
#include "kernels/attention/prefill_warpgroup.cuh"
#include "kernels/attention/sequence.cuh"

namespace exafuse {
namespace {

// Named barriers.
constexpr int kTurnBarrier = 1;      // and one more for each consumer: its turn to issue
constexpr int kEpilogueBarrier = 4;  // and one more for each consumer

// Row of the cache or page, and slot there, of the key at a position.
struct KeyPlace {
  int row;
  int slot;
};
__device__ __forceinline__ KeyPlace place_of(const Sequence& sequence, int position) {
  // The offset in a tensor whose rows lie 2^32 elements apart names both.
  const int64_t offset = sequence.key_offset({.batch = int64_t{1} << 32, .row = 1}, position, 0);
  return {static_cast<int>(offset >> 32), static_cast<int>(offset)};
}

template <class T, int kCols, int kQueries, int kKeys>
struct Prefill {
  using Shared = PrefillSm90Shared<T, kCols, kQueries, kKeys>;
  using Queries = typename Shared::Queries;
  using QueryPanels = typename Shared::QueryPanels;
  using KeyPanels = typename Shared::KeyPanels;
  using Work = QueryTileWork<kQueries, kKeys>;
  static constexpr int kConsumers = Shared::kConsumers;

  const PrefillSm90Params& p;
  const Shared& shared;

  __device__ __forceinline__ uint32_t k_tile(int stage) const {
    return ptx::smem_addr(shared.k) + stage * KeyPanels::kBytes;
  }
  __device__ __forceinline__ uint32_t v_tile(int stage) const {
    return ptx::smem_addr(shared.v) + stage * KeyPanels::kBytes;
  }
  __device__ __forceinline__ static uint32_t at(const uint64_t* barriers, int stage = 0) {
    return ptx::smem_addr(barriers) + 8 * stage;
  }

  // --- the producer -----------------------------------------------------------------------------

  __device__ __forceinline__ void load_keys(const TensorMap& map, const uint64_t* full,
                                            const uint64_t* empty, uint32_t tiles, uint32_t item,
                                            const KeyPlace& place, int kv_head) const {
    const int stage = stage_of(item);
    ptx::mbarrier_wait(at(empty, stage), parity_of(item) ^ 1);
    ptx::mbarrier_arrive_expect_tx(at(full, stage), KeyPanels::kBytes);
#pragma unroll
    for (int panel = 0; panel < KeyPanels::kCount; ++panel) {
      ptx::tma_load(tiles + stage * KeyPanels::kBytes + panel * KeyPanels::kPanelBytes, map,
                    at(full, stage), panel * kBoxColumns, place.slot, kv_head, place.row);
    }
  }

  __device__ __forceinline__ void load_queries(const Work& work, uint32_t uses) const {
    ptx::mbarrier_wait(at(shared.empty_q), (uses & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(at(shared.full_q), QueryPanels::kBytes);
    const bool packed = p.call.cu_seqlens_q != nullptr;
#pragma unroll
    for (int panel = 0; panel < QueryPanels::kCount; ++panel) {
      ptx::tma_load(ptx::smem_addr(shared.q) + panel * QueryPanels::kPanelBytes, p.q,
                    at(shared.full_q), panel * kBoxColumns, work.query_row(0), work.head,
                    packed ? 0 : work.index);
    }
  }

  // One thread. K(i) goes ahead of V(i + 1): the tile right of it, which is needed after it.
  __device__ __forceinline__ void produce() const {
    const uint32_t k = ptx::smem_addr(shared.k);
    const uint32_t v = ptx::smem_addr(shared.v);
    uint32_t item = 0;
    uint32_t uses = 0;
    for (TileNumbers numbers; numbers.current() < p.num_tiles; numbers.advance()) {
      const Work work(p, numbers.current());
      if (work.num_queries <= 0) continue;
      const TileRange active = work.active();
      if (active.empty()) continue;
      const int kv_head = work.head / p.call.gqa_group_size;
      KeyPlace place = place_of(work.sequence, (active.end - 1) * kKeys);
      load_keys(p.k, shared.full_k, shared.empty_k, k, item, place, kv_head);
      load_queries(work, uses++);
#pragma unroll 1
      for (int tile = active.end - 2; tile >= active.begin; --tile) {
        const KeyPlace next = place_of(work.sequence, tile * kKeys);
        load_keys(p.k, shared.full_k, shared.empty_k, k, item + 1, next, kv_head);
        load_keys(p.v, shared.full_v, shared.empty_v, v, item, place, kv_head);
        place = next;
        ++item;
      }
      load_keys(p.v, shared.full_v, shared.empty_v, v, item, place, kv_head);
      ++item;
    }
  }

  // --- the cleaners -----------------------------------------------------------------------------
  // Zero times NaN is NaN: values of keys that some rows do not see may not be multiplied by their
  // zeros. Where every row sees every key there is nothing to look for. Elsewhere the keys that no
  // row sees become zeros, and so do NaN and infinities, which the consumers then add by themselves
  // to the rows that see them.

  __device__ __forceinline__ static uint32_t non_finite(uint32_t two) {
    constexpr uint32_t kExponent = std::is_same_v<T, __nv_bfloat16> ? 0x7f80u : 0x7c00u;
    const uint32_t low = (two & kExponent) == kExponent ? 0xffffu : 0;
    const uint32_t high = (two & kExponent << 16) == kExponent << 16 ? 0xffff0000u : 0;
    return low | high;
  }

  // This thread's share of a tile of v whose rows from seen.begin to before seen.end are seen.
  // Whether one of those held a NaN or an infinity. Loads go four at a time: consumers wait.
  __device__ __forceinline__ static bool clean_tile(uint32_t tile, KeyRange seen) {
    constexpr int kThreads = kCleanerWarps * ptx::kWarpSize;
    constexpr int kChunks = KeyPanels::kBytes / 16;
    constexpr int kAtOnce = 4;
    bool found = false;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x) - ptx::kWarpSize; first < kChunks;
         first += kAtOnce * kThreads) {
      uint4 words[kAtOnce];
      bool is_seen[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int chunk = first + i * kThreads;
        is_seen[i] = seen.contains(static_cast<int>(static_cast<unsigned>(chunk) / 8 % kKeys));
        words[i] = uint4{};
        if (chunk < kChunks && is_seen[i]) words[i] = ptx::ld_shared(tile + 16 * chunk);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int chunk = first + i * kThreads;
        uint4& word = words[i];
        const uint4 bad{non_finite(word.x), non_finite(word.y), non_finite(word.z),
                        non_finite(word.w)};
        const bool any = (bad.x | bad.y | bad.z | bad.w) != 0;
        found = found || any;
        if (chunk >= kChunks || (is_seen[i] && !any)) continue;
        word = uint4{word.x & ~bad.x, word.y & ~bad.y, word.z & ~bad.z, word.w & ~bad.w};
        ptx::st_shared(tile + 16 * chunk, word);
      }
    }
    return found;
  }

  __device__ __forceinline__ void clean() const {
    const int lane = Queries::lane();
    const int cleaner = static_cast<int>(threadIdx.x) / ptx::kWarpSize - 1;
    uint32_t item = 0;
    for (TileNumbers numbers; numbers.current() < p.num_tiles; numbers.advance()) {
      const Work work(p, numbers.current());
      if (work.num_queries <= 0) continue;
      const TileRange active = work.active();
      const TileRange whole = work.whole();
      const KeyRange seen = work.seen();
#pragma unroll 1
      for (int tile = active.end - 1; tile >= active.begin; --tile, ++item) {
        const int stage = stage_of(item);
        // Also for a tile that stays as it is: who misses a phase takes the next for it.
        ptx::mbarrier_wait(at(shared.full_v, stage), parity_of(item));
        if (!whole.contains(tile)) {
          const bool found =
              clean_tile(v_tile(stage), {seen.begin - tile * kKeys, seen.end - tile * kKeys});
          ptx::fence_proxy_async();
          const bool any = ptx::any(found);
          ptx::sync_warp();
          if (lane == 0) {
            shared.non_finite[stage * kCleanerWarps + cleaner] = any;
            ptx::mbarrier_arrive(at(shared.clean_v, stage));
          }
        }
        // No lane is still at the wait when the next phase may begin.
        ptx::sync_warp();
        if (lane == 0) ptx::mbarrier_arrive(at(shared.empty_v, stage));
      }
    }
  }

  // --- the consumers ----------------------------------------------------------------------------

  __device__ __forceinline__ static void wait_for_turn(int consumer) {
    ptx::bar_sync(kTurnBarrier + consumer, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ static void pass_turn(int consumer) {
    ptx::bar_arrive(kTurnBarrier + (consumer + 1) % kConsumers, 2 * kWarpgroupThreads);
  }

  // After the warp's own wait for the products that read the tile.
  __device__ __forceinline__ static void release(const uint64_t* empty, int stage) {
    if (Queries::lane() == 0) ptx::mbarrier_arrive(at(empty, stage));
  }

  // Rows of queries that see no key: zeros, and the logarithm of zero.
  __device__ __forceinline__ void store_nothing(const Work& work, int consumer) const {
    const int first_row = consumer * kWarpgroupQueries;
    const int rows = work.num_queries - first_row;
    T* const out =
        static_cast<T*>(p.call.out) +
        work.sequence.query_offset(p.call.out_strides, work.first_query + first_row, work.head);
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const int chunks = p.call.head_dim / 8;
    for (int i = thread; i < kWarpgroupQueries * chunks && i / chunks < rows;
         i += kWarpgroupThreads) {
      Vec<T, 8>::zero().template store<false>(out + i / chunks * p.call.out_strides.row +
                                              i % chunks * 8);
    }
    if (p.call.lse != nullptr && thread < kWarpgroupQueries && thread < rows) {
      p.call.lse[work.sequence.query_offset(p.call.lse_strides, work.first_query + first_row,
                                            work.head) +
                 thread * p.call.lse_strides.row] = kMasked;
    }
  }

  // Adds what the cleaners took out.
  __device__ __forceinline__ void add_non_finite(const Work& work, int consumer,
                                                 Queries& queries) const {
    const TileRange active = work.active();
    const TileRange whole = work.whole();
    const int kv_head = work.head / p.call.gqa_group_size;
    const int first_row = consumer * kWarpgroupQueries;
    const auto sees = [&](int row, int position) {
      return first_row + row < work.num_queries &&
             work.sequence.visible(work.first_query + first_row + row).contains(position);
    };
#pragma unroll 1
    for (int tile = active.begin; tile < active.end; ++tile) {
      if (whole.contains(tile)) continue;
#pragma unroll 1
      for (int i = 0; i < kKeys && i < work.seen().end - tile * kKeys; ++i) {
        const int position = tile * kKeys + i;
        const bool seen[] = {sees(Queries::row(0), position), sees(Queries::row(1), position)};
        const T* const v = static_cast<const T*>(p.call.v) +
                           work.sequence.key_offset(p.call.v_strides, position, kv_head);
        const auto value = [&](int column) {
          return column < p.call.head_dim ? Vec<T, 1>::template load<false>(v + column).get(0)
                                          : 0.0f;
        };
        const auto score = [&](int row) {
          const T* const q = static_cast<const T*>(p.call.q) +
                             work.sequence.query_offset(
                                 p.call.q_strides, work.first_query + first_row + row, work.head);
          const T* const k = static_cast<const T*>(p.call.k) +
                             work.sequence.key_offset(p.call.k_strides, position, kv_head);
          float sum = 0;
          for (int i = 0; i < p.call.head_dim; ++i) {
            sum = ptx::fma(Vec<T, 1>::template load<false>(q + i).get(0),
                           Vec<T, 1>::template load<false>(k + i).get(0), sum);
          }
          return sum;
        };
        queries.add_non_finite(seen, p.call.scale_log2, value, score);
      }
    }
  }

  // The output goes through the place of the queries, which the producer then fills again.
  __device__ __forceinline__ void store(const Work& work, int consumer, Queries& queries) const {
    float lse[Queries::kRows];
    queries.finish(p.call.scale_log2, lse);
    const int first_row = consumer * kWarpgroupQueries;
    const int rows = work.num_queries - first_row;
    if (p.call.lse != nullptr && Queries::lane() % 4 == 0) {
      float* const to =
          p.call.lse +
          work.sequence.query_offset(p.call.lse_strides, work.first_query + first_row, work.head);
#pragma unroll
      for (int r = 0; r < Queries::kRows; ++r) {
        const int row = Queries::row(r);
        if (row < rows) to[row * p.call.lse_strides.row] = lse[r];
      }
    }
    queries.store_out();
    ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogueBarrier + consumer, kWarpgroupThreads);
    const uint32_t from = ptx::smem_addr(shared.q) + first_row * QueryPanels::kRowBytes;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const bool packed = p.call.cu_seqlens_q != nullptr;
    // The copy engine leaves out rows behind the tensor, not those of the next packed sequence.
    if (p.out_by_map && (!packed || rows >= kWarpgroupQueries)) {
      if (ptx::shfl(thread / ptx::kWarpSize, 0) == 0 && ptx::elect_one()) {
#pragma unroll
        for (int panel = 0; panel < QueryPanels::kCount; ++panel) {
          ptx::tma_store(p.out, from + panel * QueryPanels::kPanelBytes, panel * kBoxColumns,
                         work.query_row(first_row), work.head, packed ? 0 : work.index);
        }
        ptx::tma_store_commit();
        ptx::tma_store_wait_read<0>();
        ptx::mbarrier_arrive(at(shared.empty_q));
      }
      return;
    }
    T* const out =
        static_cast<T*>(p.call.out) +
        work.sequence.query_offset(p.call.out_strides, work.first_query + first_row, work.head);
    const int chunks = p.call.head_dim / 8;
#pragma unroll 1
    for (int i = thread; i < kWarpgroupQueries * chunks && i / chunks < rows;
         i += kWarpgroupThreads) {
      const auto vec = Vec<T, 8>::template load<true>(reinterpret_cast<const T*>(
          shared.q->bytes + QueryPanels::offset(first_row + i / chunks, i % chunks)));
      T* const to = out + i / chunks * p.call.out_strides.row + i % chunks * 8;
      if (p.call.out_wide) {
        vec.template store<true>(to);
      } else {
        vec.template store<false>(to);
      }
    }
    ptx::bar_sync(kEpilogueBarrier + consumer, kWarpgroupThreads);
    if (thread == 0) ptx::mbarrier_arrive(at(shared.empty_q));
  }

  __device__ __forceinline__ void consume(int consumer) const {
    const int first_row = consumer * kWarpgroupQueries;
    Queries queries(ptx::smem_addr(shared.q) + first_row * QueryPanels::kRowBytes);
    uint32_t item = 0;
    uint32_t uses = 0;
    uint32_t clean_parities = 0;  // one bit a stage
    if (consumer == kConsumers - 1) pass_turn(consumer);

    for (TileNumbers numbers; numbers.current() < p.num_tiles; numbers.advance()) {
      const Work work(p, numbers.current());
      if (work.num_queries <= 0) continue;
      const TileRange active = work.active();
      if (active.empty()) {
        store_nothing(work, consumer);
        continue;
      }
      const TileRange whole = work.whole();
      const TileRange own_whole = work.whole(first_row, first_row + kWarpgroupQueries);
      const int64_t position = int64_t{work.sequence.keys().end} - work.sequence.seqlen_q() +
                               work.first_query + first_row;
      bool careful = false;

      const auto softmax = [&](int tile) {
        if (!own_whole.contains(tile)) {
          queries.mask([&](int row) {
            const KeyRange range =
                visible_keys(work.sequence.keys(), p.call.window, position + row);
            return KeyRange{range.begin - tile * kKeys, range.end - tile * kKeys};
          });
        }
        queries.softmax(p.call.scale_log2);
      };
      const auto wait_for_values = [&](int tile, uint32_t at_item) {
        const int stage = stage_of(at_item);
        ptx::mbarrier_wait(at(shared.full_v, stage), parity_of(at_item));
        if (whole.contains(tile)) return;
        ptx::mbarrier_wait(at(shared.clean_v, stage), clean_parities >> stage & 1);
        clean_parities ^= 1u << stage;
#pragma unroll
        for (int i = 0; i < kCleanerWarps; ++i) {
          careful = careful || shared.non_finite[stage * kCleanerWarps + i] != 0;
        }
      };

      queries.reset();
      ptx::mbarrier_wait(at(shared.full_q), uses++ & 1);
      ptx::mbarrier_wait(at(shared.full_k, stage_of(item)), parity_of(item));
      wait_for_turn(consumer);
      queries.multiply_keys(k_tile(stage_of(item)));
      pass_turn(consumer);
      queries.template wait_for_scores<0>();
      release(shared.empty_k, stage_of(item));
      softmax(active.end - 1);
      queries.pack_probs();
      if (active.end - 1 > active.begin) {
        ptx::mbarrier_wait(at(shared.full_k, stage_of(item + 1)), parity_of(item + 1));
      }
#pragma unroll 1
      for (int tile = active.end - 2; tile >= active.begin; --tile) {
        const uint32_t previous = item++;
        wait_for_turn(consumer);
        queries.multiply_keys(k_tile(stage_of(item)));
        wait_for_values(tile + 1, previous);
        queries.multiply_values(v_tile(stage_of(previous)));
        pass_turn(consumer);
        queries.template wait_for_scores<1>();
        release(shared.empty_k, stage_of(item));
        softmax(tile);
        // Here, because a wait with a branch keeps the compiler from drawing the wait for the
        // output above the softmax, whose exponentials are to run beneath the products.
        if (tile > active.begin) {
          ptx::mbarrier_wait(at(shared.full_k, stage_of(item + 1)), parity_of(item + 1));
        }
        queries.wait_for_out();
        release(shared.empty_v, stage_of(previous));
        queries.rescale_out();
        queries.pack_probs();
      }
      wait_for_values(active.begin, item);
      queries.multiply_values(v_tile(stage_of(item)));
      queries.wait_for_out();
      release(shared.empty_v, stage_of(item));
      ++item;
      if (careful) add_non_finite(work, consumer, queries);
      store(work, consumer, queries);
    }
    // The turn that the last consumer passed on.
    if (consumer == 0) wait_for_turn(consumer);
  }
};

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

  const Prefill<T, kCols, kQueries, kKeys> prefill{p, shared};
  const int warp = ptx::shfl(static_cast<int>(threadIdx.x) / ptx::kWarpSize, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp > 0) {
      prefill.clean();
    } else if (ptx::elect_one()) {
      prefill.produce();
    }
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    prefill.consume(warp / 4 - 1);
  }
}

// --- host ---------------------------------------------------------------------------------------

TensorMapSpec map_of_queries(const AttentionParams& params, const void* data,
                             const AttentionStrides& strides, int box_rows) {
  const bool packed = params.cu_seqlens_q != nullptr;
  return {.data = const_cast<void*>(data),
          .dtype = params.dtype,
          .columns = params.head_dim,
          .rows = packed ? params.total_q : params.seqlen_q,
          .heads = params.num_heads,
          .batch = packed ? 1 : params.batch,
          .row_stride = strides.row,
          .head_stride = strides.head,
          .batch_stride = strides.batch,
          .box_rows = box_rows};
}

TensorMapSpec map_of_keys(const AttentionParams& params, const void* data,
                          const AttentionStrides& strides, int box_rows) {
  const bool packed = params.cu_seqlens_k != nullptr;
  return {.data = const_cast<void*>(data),
          .dtype = params.dtype,
          .columns = params.head_dim,
          .rows = packed ? params.total_k : params.slots,
          .heads = params.num_kv_heads,
          .batch = packed ? 1 : params.key_rows,
          .row_stride = strides.row,
          .head_stride = strides.head,
          .batch_stride = strides.batch,
          .box_rows = box_rows};
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
