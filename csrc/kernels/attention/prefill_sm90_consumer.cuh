// A consumer warpgroup of the prefill kernel of sm_90: 64 queries of the block's tile against one
// tile of keys after the other, and what becomes of them in the end.
#pragma once

#include <cstdint>

#include "common/mask.cuh"
#include "common/ptx_sm90.cuh"
#include "common/softmax.cuh"
#include "common/tensor_map.h"
#include "common/vec.cuh"
#include "kernels/attention/key_tiles.cuh"
#include "kernels/attention/prefill_sm90_block.cuh"
#include "kernels/attention/prefill_warpgroup.cuh"

namespace exafuse {

template <class T, int kCols, int kQueries, int kKeys>
struct PrefillConsumer {
  using Shared = PrefillSm90Shared<T, kCols, kQueries, kKeys>;
  using Queries = typename Shared::Queries;
  using QueryPanels = typename Shared::QueryPanels;
  using Work = QueryTileWork<kQueries, kKeys>;
  static constexpr int kConsumers = Shared::kConsumers;

  // Named barriers, of each consumer the number after: its turn to issue, and its epilogue.
  static constexpr int kTurnBarrier = 1;
  static constexpr int kEpilogueBarrier = 4;

  const PrefillSm90Params& p;
  const Shared& shared;

  __device__ __forceinline__ static void wait_for_turn(int consumer) {
    ptx::bar_sync(kTurnBarrier + consumer, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ static void pass_turn(int consumer) {
    ptx::bar_arrive(kTurnBarrier + (consumer + 1) % kConsumers, 2 * kWarpgroupThreads);
  }

  // After the warp's own wait for the products that read the tile.
  __device__ __forceinline__ static void release(const uint64_t* empty, int stage) {
    if (Queries::lane() == 0) ptx::mbarrier_arrive(barrier_at(empty, stage));
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
        ptx::mbarrier_arrive(barrier_at(shared.empty_q));
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
    if (thread == 0) ptx::mbarrier_arrive(barrier_at(shared.empty_q));
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
        ptx::mbarrier_wait(barrier_at(shared.full_v, stage), parity_of(at_item));
        if (whole.contains(tile)) return;
        ptx::mbarrier_wait(barrier_at(shared.clean_v, stage), clean_parities >> stage & 1);
        clean_parities ^= 1u << stage;
#pragma unroll
        for (int i = 0; i < kCleanerWarps; ++i) {
          careful = careful || shared.non_finite[stage * kCleanerWarps + i] != 0;
        }
      };

      queries.reset();
      ptx::mbarrier_wait(barrier_at(shared.full_q), uses++ & 1);
      ptx::mbarrier_wait(barrier_at(shared.full_k, stage_of(item)), parity_of(item));
      wait_for_turn(consumer);
      queries.multiply_keys(shared.k_tile(stage_of(item)));
      pass_turn(consumer);
      queries.template wait_for_scores<0>();
      release(shared.empty_k, stage_of(item));
      softmax(active.end - 1);
      queries.pack_probs();
      if (active.end - 1 > active.begin) {
        ptx::mbarrier_wait(barrier_at(shared.full_k, stage_of(item + 1)), parity_of(item + 1));
      }
#pragma unroll 1
      for (int tile = active.end - 2; tile >= active.begin; --tile) {
        const uint32_t previous = item++;
        wait_for_turn(consumer);
        queries.multiply_keys(shared.k_tile(stage_of(item)));
        wait_for_values(tile + 1, previous);
        queries.multiply_values(shared.v_tile(stage_of(previous)));
        pass_turn(consumer);
        queries.template wait_for_scores<1>();
        release(shared.empty_k, stage_of(item));
        softmax(tile);
        // Here, because a wait with a branch keeps the compiler from drawing the wait for the
        // output above the softmax, whose exponentials are to run beneath the products.
        if (tile > active.begin) {
          ptx::mbarrier_wait(barrier_at(shared.full_k, stage_of(item + 1)), parity_of(item + 1));
        }
        queries.wait_for_out();
        release(shared.empty_v, stage_of(previous));
        queries.rescale_out();
        queries.pack_probs();
      }
      wait_for_values(active.begin, item);
      queries.multiply_values(shared.v_tile(stage_of(item)));
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

}  // namespace exafuse
