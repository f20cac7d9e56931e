// A small attention kernel with the roles that sm_90's kernels give their warps, and everything
// that such a kernel can do wrong.
#pragma once

#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"

namespace honesty {

using namespace exafuse;

enum class Mistake {
  kNone,
  // The producer, and the barriers it shares with the consumers.
  kNoInitFence,
  kNoWaitForEmptyKeys,
  kHalfTheBytes,
  kInvertedParity,
  kEmptyCountOfOne,
  kNoCleaning,
  // The consumers.
  kNoWgmmaFence,
  kNoWaitForQueries,
  kNoWaitForValues,
  kOneGroupTooMany,
  kEarlyReleaseOfKeys,
  kEarlyReleaseOfValues,
  kReleaseByOneWarp,
  kTurnNotPassed,
  kBarrierInsideTurn,
  // The products.
  kStridesSwapped,
  kStepOf64Bytes,
  kAddsToOldScores,
  kRescaleInFlight,
  kRescaleAfterFence,
  kPackInFlight,
  // The output.
  kNoProxyFence,
  kNotSwizzled,
  kStoreNotAwaited,
};

inline constexpr int kHeadDim = 128;
inline constexpr int kHopperQueries = 128;  // of a tile
inline constexpr int kHopperKeys = 64;
inline constexpr int kHopperThreads = 384;

struct HopperParams {
  TensorMap q, k, v, out;  // bf16 [rows, head_dim]; boxes of 128, 64, 64 and 64 rows
  int num_queries;         // a multiple of the tile's
  int num_keys;            // v's rows behind them may be NaN
  float scale_log2;
  Mistake mistake;
};

// Rows of 64 elements, as TMA and wgmma see them.
template <int kRows>
struct alignas(1024) HopperPanel {
  uint16_t elements[kRows * kBoxColumns];
};

struct HopperShared {
  static constexpr int kPanels = kHeadDim / kBoxColumns;
  static constexpr int kStages = 2;

  HopperPanel<kHopperQueries>* q;  // [panels]; and, at the end, the output
  HopperPanel<kHopperKeys>* k;     // [stages, panels]
  HopperPanel<kHopperKeys>* v;     // [stages, panels]
  uint64_t* barriers;

  template <class Arena>
  static constexpr HopperShared take_from(Arena& arena) {
    HopperShared shared{};
    shared.q = arena.template take<HopperPanel<kHopperQueries>, kPanels>();
    shared.k = arena.template take<HopperPanel<kHopperKeys>, kStages * kPanels>();
    shared.v = arena.template take<HopperPanel<kHopperKeys>, kStages * kPanels>();
    shared.barriers = arena.template take<uint64_t, 12>();
    return shared;
  }

  // Numbers of the barriers; those of a ring are the first of two.
  static constexpr int kFullQ = 0, kEmptyQ = 1, kFullK = 2, kEmptyK = 4, kFullV = 6, kEmptyV = 8,
                       kCleanV = 10;
};

__global__ void hopper_kernel(const __grid_constant__ HopperParams p);

}  // namespace honesty
