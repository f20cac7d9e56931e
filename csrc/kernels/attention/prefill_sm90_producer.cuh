// The producer warpgroup of the prefill kernel of sm_90: one warp that keeps the copies going, and
// three that clean the tiles of v at the edges of what the block sees.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"
#include "kernels/attention/key_tiles.cuh"
#include "kernels/attention/prefill_sm90_block.cuh"
#include "kernels/attention/sequence.cuh"

namespace exafuse {

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
struct PrefillProducer {
  using Shared = PrefillSm90Shared<T, kCols, kQueries, kKeys>;
  using QueryPanels = typename Shared::QueryPanels;
  using KeyPanels = typename Shared::KeyPanels;
  using Work = QueryTileWork<kQueries, kKeys>;

  const PrefillSm90Params& p;
  const Shared& shared;

  __device__ __forceinline__ void load_keys(const TensorMap& map, const uint64_t* full,
                                            const uint64_t* empty, uint32_t tiles, uint32_t item,
                                            const KeyPlace& place, int kv_head) const {
    const int stage = stage_of(item);
    ptx::mbarrier_wait(barrier_at(empty, stage), parity_of(item) ^ 1);
    ptx::mbarrier_arrive_expect_tx(barrier_at(full, stage), KeyPanels::kBytes);
#pragma unroll
    for (int panel = 0; panel < KeyPanels::kCount; ++panel) {
      ptx::tma_load(tiles + stage * KeyPanels::kBytes + panel * KeyPanels::kPanelBytes, map,
                    barrier_at(full, stage), panel * kBoxColumns, place.slot, kv_head, place.row);
    }
  }

  __device__ __forceinline__ void load_queries(const Work& work, uint32_t uses) const {
    ptx::mbarrier_wait(barrier_at(shared.empty_q), (uses & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(barrier_at(shared.full_q), QueryPanels::kBytes);
    const bool packed = p.call.cu_seqlens_q != nullptr;
#pragma unroll
    for (int panel = 0; panel < QueryPanels::kCount; ++panel) {
      ptx::tma_load(ptx::smem_addr(shared.q) + panel * QueryPanels::kPanelBytes, p.q,
                    barrier_at(shared.full_q), panel * kBoxColumns, work.query_row(0), work.head,
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
    const int lane = static_cast<int>(threadIdx.x) % ptx::kWarpSize;
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
        ptx::mbarrier_wait(barrier_at(shared.full_v, stage), parity_of(item));
        if (!whole.contains(tile)) {
          const bool found = clean_tile(shared.v_tile(stage),
                                        {seen.begin - tile * kKeys, seen.end - tile * kKeys});
          ptx::fence_proxy_async();
          const bool any = ptx::any(found);
          ptx::sync_warp();
          if (lane == 0) {
            shared.non_finite[stage * kCleanerWarps + cleaner] = any;
            ptx::mbarrier_arrive(barrier_at(shared.clean_v, stage));
          }
        }
        // No lane is still at the wait when the next phase may begin.
        ptx::sync_warp();
        if (lane == 0) ptx::mbarrier_arrive(barrier_at(shared.empty_v, stage));
      }
    }
  }
};

}  // namespace exafuse
