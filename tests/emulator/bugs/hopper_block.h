// What the producer of the kernel of hopper.h does, and what it shares with the consumers.
#pragma once

#include "bugs/hopper.h"
#include "common/ptx.cuh"

namespace honesty {
namespace hopper {

using Shared = HopperShared;

inline constexpr int kConsumers = 2;
inline constexpr int kConsumerWarps = 4 * kConsumers;
inline constexpr int kRowBytes = 128;
inline constexpr int kQueryPanelBytes = kHopperQueries * kRowBytes;
inline constexpr int kKeyPanelBytes = kHopperKeys * kRowBytes;

struct Ring {
  uint32_t item;

  int stage() const { return static_cast<int>(item % Shared::kStages); }
  uint32_t parity() const { return item / Shared::kStages & 1; }
};

struct Block {
  const HopperParams& p;
  const Shared& shared;

  bool is(Mistake mistake) const { return p.mistake == mistake; }
  uint32_t barrier(int number) const { return ptx::smem_addr(shared.barriers + number); }
  uint32_t k_tile(int stage) const { return ptx::smem_addr(shared.k + stage * Shared::kPanels); }
  uint32_t v_tile(int stage) const { return ptx::smem_addr(shared.v + stage * Shared::kPanels); }
  int num_tiles() const { return (p.num_keys + kHopperKeys - 1) / kHopperKeys; }

  void init() const {
    const int releases = is(Mistake::kReleaseByOneWarp) ? kConsumers : kConsumerWarps;
    ptx::mbarrier_init(barrier(Shared::kFullQ), 1);
    ptx::mbarrier_init(barrier(Shared::kEmptyQ), kConsumers);
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      ptx::mbarrier_init(barrier(Shared::kFullK + stage), 1);
      ptx::mbarrier_init(barrier(Shared::kEmptyK + stage),
                         is(Mistake::kEmptyCountOfOne) ? 1 : releases);
      ptx::mbarrier_init(barrier(Shared::kFullV + stage), 1);
      ptx::mbarrier_init(barrier(Shared::kEmptyV + stage), releases + 1);
      ptx::mbarrier_init(barrier(Shared::kCleanV + stage), 1);
    }
    if (!is(Mistake::kNoInitFence)) ptx::fence_mbarrier_init();
  }

  void load(uint32_t smem, const TensorMap& map, int full, int panel_bytes, int row) const {
    const int bytes = Shared::kPanels * panel_bytes;
    ptx::mbarrier_arrive_expect_tx(barrier(full), is(Mistake::kHalfTheBytes) ? bytes / 2 : bytes);
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      ptx::tma_load(smem + panel * panel_bytes, map, barrier(full), panel * kBoxColumns, row, 0, 0);
    }
  }

  // One thread. Tiles of keys come from the right, each one's values after the keys of the next.
  void produce() const {
    Ring ring{0};
    uint32_t uses = 0;
    for (int first = 0; first < p.num_queries; first += kHopperQueries) {
      ptx::mbarrier_wait(barrier(Shared::kEmptyQ), (uses++ & 1) ^ 1);
      load(ptx::smem_addr(shared.q), p.q, Shared::kFullQ, kQueryPanelBytes, first);
      load_keys(ring, num_tiles() - 1);
      for (int tile = num_tiles() - 1; tile >= 0; --tile, ++ring.item) {
        if (tile > 0) load_keys({ring.item + 1}, tile - 1);
        const int stage = ring.stage();
        ptx::mbarrier_wait(barrier(Shared::kEmptyV + stage), ring.parity() ^ 1);
        load(v_tile(stage), p.v, Shared::kFullV + stage, kKeyPanelBytes, tile * kHopperKeys);
      }
    }
  }

  void load_keys(Ring ring, int tile) const {
    const int stage = ring.stage();
    const uint32_t fresh = is(Mistake::kInvertedParity) ? 0 : 1;
    if (!is(Mistake::kNoWaitForEmptyKeys)) {
      ptx::mbarrier_wait(barrier(Shared::kEmptyK + stage), ring.parity() ^ fresh);
    }
    load(k_tile(stage), p.k, Shared::kFullK + stage, kKeyPanelBytes, tile * kHopperKeys);
  }

  // One warp: zeros in the place of rows behind the last key, for zero times NaN is NaN.
  void clean() const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Ring ring{0};
    for (int first = 0; first < p.num_queries; first += kHopperQueries) {
      for (int tile = num_tiles() - 1; tile >= 0; --tile, ++ring.item) {
        const int stage = ring.stage();
        ptx::mbarrier_wait(barrier(Shared::kFullV + stage), ring.parity());
        const int rows = p.num_keys - tile * kHopperKeys;
        const int begin = rows < kHopperKeys && !is(Mistake::kNoCleaning) ? rows : kHopperKeys;
        for (int row = begin; row < kHopperKeys; ++row) {
          if (lane >= 8 * Shared::kPanels) continue;
          const uint32_t panel = v_tile(stage) + lane / 8 * kKeyPanelBytes;
          ptx::st_shared(panel + row * kRowBytes + lane % 8 * 16, uint4{0, 0, 0, 0});
        }
        ptx::fence_proxy_async();
        ptx::sync_warp();
        if (lane != 0) continue;
        ptx::mbarrier_arrive(barrier(Shared::kCleanV + stage));
        ptx::mbarrier_arrive(barrier(Shared::kEmptyV + stage));
      }
    }
  }
};

}  // namespace hopper
}  // namespace honesty
