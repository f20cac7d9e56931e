// The kernel of hopper.h and its consumers: wgmma with operands in shared memory and in registers,
// warpgroups that take turns, TMA stores.
#include "bugs/hopper_block.h"
#include "common/ptx.cuh"

namespace honesty {
namespace {

using namespace hopper;

using T = __nv_bfloat16;

constexpr int kGroupThreads = 128;
constexpr int kGroupQueries = 64;
constexpr int kScores = kHopperKeys / 2;  // registers of an accumulator
constexpr int kOut = kHeadDim / 2;
constexpr int kSteps = kHopperKeys / 16;  // of the depth of p v

// Named barriers.
constexpr int kTurn = 1;      // and the next: of each consumer
constexpr int kEpilogue = 3;  // and the next
constexpr int kAllConsumers = 5;

// 64 queries and what a thread of their warpgroup holds of them.
class Consumer {
 public:
  Consumer(const Block& block, int index)
      : block_(block),
        p_(block.p),
        index_(index),
        queries_(ptx::smem_addr(block.shared.q) + index * kGroupQueries * kRowBytes),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(static_cast<int>(threadIdx.x) % kGroupThreads / 32) {}

  void run() {
    if (index_ == 1) pass_turn();
    for (int first = 0; first < p_.num_queries; first += kHopperQueries) {
      attend();
      store(first);
    }
    if (index_ == 0) wait_for_turn();  // the one that is left
  }

 private:
  bool is(Mistake mistake) const { return block_.is(mistake); }

  void wait(int barrier, Ring ring) const {
    ptx::mbarrier_wait(block_.barrier(barrier + ring.stage()), ring.parity());
  }
  void wait_for_values(Ring ring) const {
    wait(Shared::kFullV, ring);
    wait(Shared::kCleanV, ring);
  }
  void release(int barrier, Ring ring) const {
    if (is(Mistake::kReleaseByOneWarp) && warp_ != 0) return;
    if (lane_ == 0) ptx::mbarrier_arrive(block_.barrier(barrier + ring.stage()));
  }
  void wait_for_turn() const {
    ptx::bar_sync(kTurn + index_, kConsumers * kGroupThreads);
    if (is(Mistake::kBarrierInsideTurn)) {
      ptx::bar_sync(kAllConsumers, kConsumers * kGroupThreads);
    }
  }
  void pass_turn() const {
    if (is(Mistake::kTurnNotPassed) && index_ == 0) return;
    ptx::bar_arrive(kTurn + 1 - index_, kConsumers * kGroupThreads);
  }

  void multiply_keys(int stage) {
    const uint32_t along = is(Mistake::kStepOf64Bytes) ? 64 : 32;
    const uint32_t keys = block_.k_tile(stage);
    ptx::wgmma_fence();
    for (uint32_t step = 0; step < kHeadDim / 16; ++step) {
      const uint32_t a = queries_ + step / 4 * kQueryPanelBytes + step % 4 * along;
      const uint32_t b = keys + step / 4 * kKeyPanelBytes + step % 4 * along;
      ptx::wgmma_ss<T, kHopperKeys>(scores_, ptx::wgmma_descriptor(a, 0),
                                    ptx::wgmma_descriptor(b, 0),
                                    step > 0 || is(Mistake::kAddsToOldScores));
    }
    ptx::wgmma_commit();
  }

  void multiply_values(int stage) {
    uint64_t b = ptx::wgmma_descriptor(block_.v_tile(stage), kKeyPanelBytes);
    if (is(Mistake::kStridesSwapped)) {
      constexpr uint64_t kMask = 0x3fff;
      const uint64_t panel = b >> 16 & kMask;
      const uint64_t group = b >> 32 & kMask;
      b = (b & ~(kMask << 16 | kMask << 32)) | group << 16 | panel << 32;
    }
    if (!is(Mistake::kNoWgmmaFence)) ptx::wgmma_fence();
    if (is(Mistake::kRescaleAfterFence)) rescale();
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma_rs<T, kHeadDim>(out_, probs_[step], b + step * 16 * kRowBytes / 16, true);
    }
    ptx::wgmma_commit();
  }

  void attend() {
    for (float& value : out_) value = 0;
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0;
    if (!is(Mistake::kNoWaitForQueries)) {
      ptx::mbarrier_wait(block_.barrier(Shared::kFullQ), uses_++ & 1);
    }
    int tile = block_.num_tiles() - 1;
    wait(Shared::kFullK, ring_);
    wait_for_turn();
    multiply_keys(ring_.stage());
    pass_turn();
    ptx::wgmma_wait<0>(scores_);
    release(Shared::kEmptyK, ring_);
    softmax(tile);
    pack();
    for (--tile; tile >= 0; --tile) {
      const Ring previous = ring_;
      ++ring_.item;
      wait(Shared::kFullK, ring_);
      wait_for_turn();
      multiply_keys(ring_.stage());
      if (!is(Mistake::kNoWaitForValues)) wait_for_values(previous);
      multiply_values(previous.stage());
      pass_turn();
      if (is(Mistake::kEarlyReleaseOfKeys)) release(Shared::kEmptyK, ring_);
      if (is(Mistake::kOneGroupTooMany)) {
        ptx::wgmma_wait<2>(scores_);
      } else {
        ptx::wgmma_wait<1>(scores_);
      }
      if (!is(Mistake::kEarlyReleaseOfKeys)) release(Shared::kEmptyK, ring_);
      softmax(tile);
      if (is(Mistake::kEarlyReleaseOfValues)) release(Shared::kEmptyV, previous);
      if (is(Mistake::kRescaleInFlight)) rescale();
      if (is(Mistake::kPackInFlight)) pack();
      ptx::wgmma_wait<0>(out_, probs_);
      if (!is(Mistake::kEarlyReleaseOfValues)) release(Shared::kEmptyV, previous);
      if (!is(Mistake::kRescaleInFlight) && !is(Mistake::kRescaleAfterFence)) rescale();
      if (!is(Mistake::kPackInFlight)) pack();
    }
    wait_for_values(ring_);
    multiply_values(ring_.stage());
    ptx::wgmma_wait<0>(out_, probs_);
    release(Shared::kEmptyV, ring_);
    ++ring_.item;
  }

  void softmax(int tile) {
    for (int r = 0; r < 2; ++r) {
      float largest = max_[r];
      for (int i = 0; i < kScores; ++i) {
        if (i / 2 % 2 != r) continue;
        const int key = tile * kHopperKeys + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
        if (key >= p_.num_keys) scores_[i] = -INFINITY;
        largest = ptx::max(largest, scores_[i]);
      }
      largest = ptx::max(largest, ptx::shfl_xor(largest, 1));
      largest = ptx::max(largest, ptx::shfl_xor(largest, 2));
      rescale_[r] = ptx::exp2((max_[r] - largest) * p_.scale_log2);
      max_[r] = largest;
      sum_[r] *= rescale_[r];
      for (int i = 0; i < kScores; ++i) {
        if (i / 2 % 2 != r) continue;
        scores_[i] = ptx::exp2((scores_[i] - largest) * p_.scale_log2);
        sum_[r] += scores_[i];
      }
    }
  }

  void rescale() {
    for (int i = 0; i < kOut; ++i) out_[i] *= rescale_[i / 2 % 2];
  }

  void pack() {
    for (int step = 0; step < kSteps; ++step) {
      for (int j = 0; j < 4; ++j) {
        const float* pair = scores_ + 8 * step + 2 * j;
        probs_[step][j] = ptx::pack2<T>(pair[0], pair[1]);
      }
    }
  }

  // By way of the queries' place, which the producer then fills again.
  void store(int first) {
    float inverse[2];
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r] + ptx::shfl_xor(sum_[r], 1);
      sum += ptx::shfl_xor(sum, 2);
      inverse[r] = ptx::rcp(sum);
    }
    for (int i = 0; i < kOut; i += 2) {
      const int row = 16 * warp_ + lane_ / 4 + i / 2 % 2 * 8;
      const int swizzle = is(Mistake::kNotSwizzled) ? 0 : row % 8;
      const int chunk = i / 4 % 8 ^ swizzle;
      const uint32_t panel = queries_ + i / 4 / 8 * kQueryPanelBytes;
      const float scale = inverse[i / 2 % 2];
      ptx::st_shared(panel + row * kRowBytes + chunk * 16 + lane_ % 4 * 4,
                     ptx::pack2<T>(out_[i] * scale, out_[i + 1] * scale));
    }
    if (!is(Mistake::kNoProxyFence)) ptx::fence_proxy_async();
    ptx::bar_sync(kEpilogue + index_, kGroupThreads);
    if (warp_ != 0 || !ptx::elect_one()) return;
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      ptx::tma_store(p_.out, queries_ + panel * kQueryPanelBytes, panel * kBoxColumns,
                     first + index_ * kGroupQueries, 0, 0);
    }
    ptx::tma_store_commit();
    if (!is(Mistake::kStoreNotAwaited)) ptx::tma_store_wait_read<0>();
    ptx::mbarrier_arrive(block_.barrier(Shared::kEmptyQ));
  }

  const Block& block_;
  const HopperParams& p_;
  const int index_;
  const uint32_t queries_;
  const int lane_;
  const int warp_;
  Ring ring_{0};
  uint32_t uses_ = 0;
  float scores_[kScores] = {};
  uint32_t probs_[kSteps][4] = {};
  float out_[kOut] = {};
  float max_[2] = {}, sum_[2] = {}, rescale_[2] = {};
};

}  // namespace

__global__ void hopper_kernel(const __grid_constant__ HopperParams p) {
  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  const Block block{p, shared};
  if (threadIdx.x == 0) block.init();
  ptx::sync_threads();
  const int warp = ptx::shfl(static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4) {
    ptx::setmaxnreg_dec<40>();
    if (warp == 0 && ptx::elect_one()) block.produce();
    if (warp == 1) block.clean();
  } else {
    ptx::setmaxnreg_inc<232>();
    Consumer(block, warp / 4 - 1).run();
  }
}

}  // namespace honesty
