// Warp collectives. Every lane of the mask must come to the same call in the source with the same
// mask; the last one to come computes the results of all.
#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr uint32_t bit(int lane) { return 1u << lane; }

// "lanes 3, 5-9": for messages.
std::string list_lanes(uint32_t lanes) {
  std::string text = __builtin_popcount(lanes) == 1 ? "lane " : "lanes ";
  bool first = true;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes & bit(lane)) == 0) continue;
    int last = lane;
    while (last + 1 < kWarpSize && (lanes & bit(last + 1)) != 0) ++last;
    text += first ? "" : ", ";
    text += last == lane ? format("%d", lane) : format("%d-%d", lane, last);
    first = false;
    lane = last;
  }
  return text;
}

void check_mask(const char* name, uint32_t mask, const Site& site) {
  const Thread& self = *current;
  const Warp& warp = block.warps[self.warp];
  if ((mask & bit(self.lane)) == 0) {
    fail(
        format("%s: lane %d calls with mask 0x%08x, which does not name it", name, self.lane, mask),
        site);
  }
  if ((mask & ~warp.exists) != 0) {
    fail(format("%s: mask 0x%08x names %s, which the block of %d threads does not have", name, mask,
                list_lanes(mask & ~warp.exists).c_str(), block.num_threads),
         site);
  }
  if ((mask & warp.exited) != 0) {
    fail(format("%s: mask 0x%08x names %s, which ended before", name, mask,
                list_lanes(mask & warp.exited).c_str()),
         site);
  }
}

// The lanes of `mask` that already wait for the same collective. A waiting lane that wants the
// running one must agree with it in everything; one that does not is busy elsewhere and may come
// later.
uint32_t lanes_already_here(const char* name, bool is_sync, Collective operation, uint32_t mask,
                            const Site& site) {
  const Thread& self = *current;
  const Warp& warp = block.warps[self.warp];
  uint32_t here = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((warp.waiting & mask & bit(lane)) == 0) continue;
    if ((warp.masks[lane] & bit(self.lane)) == 0) continue;
    const Thread& other = block.threads[self.warp * kWarpSize + lane];
    if (!same_place(other.site, site) || warp.is_sync[lane] != is_sync ||
        warp.operations[lane] != operation) {
      fail(format("%s: the lanes of the warp diverge, lane %d waits in %s at %s", name, lane,
                  other.waiting_for, describe(other.site).c_str()),
           site);
    }
    if (warp.masks[lane] != mask) {
      fail(format("%s: lane %d gives mask 0x%08x, lane %d gave 0x%08x", name, self.lane, mask, lane,
                  warp.masks[lane]),
           site);
    }
    here |= bit(lane);
  }
  return here;
}

// Waits for the lanes of `mask`; true in the lane that came last, which then must call release().
bool gather(const char* name, bool is_sync, Collective operation, uint32_t mask, void* data,
            const Site& site) {
  note_progress();
  check_mask(name, mask, site);
  const uint32_t here = lanes_already_here(name, is_sync, operation, mask, site);
  const int lane = current->lane;
  Warp& warp = block.warps[current->warp];
  warp.masks[lane] = mask;
  warp.operations[lane] = operation;
  warp.is_sync[lane] = is_sync;
  warp.data[lane] = data;
  if ((here | bit(lane)) == mask) return true;
  warp.waiting |= bit(lane);
  wait_for_wake(name, site);
  return false;
}

void release(uint32_t mask) {
  Warp& warp = block.warps[current->warp];
  const uint32_t others = mask & ~bit(current->lane);
  warp.waiting &= ~others;
  wake(current->warp, others);
}

uint32_t equal_lanes(uint32_t mask, void* const* data, uint64_t value) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask & bit(lane)) == 0) continue;
    if (static_cast<Exchange*>(data[lane])->value == value) lanes |= bit(lane);
  }
  return lanes;
}

// The lane that `lane` reads from; its own where the source lies outside its segment.
int source_lane(Collective operation, int lane, const Exchange& exchange) {
  const int width = exchange.width;
  const int segment = lane & ~(width - 1);
  const int inside = lane & (width - 1);
  int source = 0;
  switch (operation) {
    case Collective::kShflIdx:
      return segment + (exchange.argument & (width - 1));
    case Collective::kShflUp:
      source = inside - exchange.argument;
      return source >= 0 ? segment + source : lane;
    case Collective::kShflDown:
      source = inside + exchange.argument;
      return source < width ? segment + source : lane;
    default:  // xor: may reach into a lower segment, never into a higher one
      source = lane ^ exchange.argument;
      return source < segment + width ? source : lane;
  }
}

void complete_shuffle(Collective operation, uint32_t mask, void* const* data) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask & bit(lane)) == 0) continue;
    Exchange& exchange = *static_cast<Exchange*>(data[lane]);
    const int source = source_lane(operation, lane, exchange);
    if (source < 0 || source >= kWarpSize || (mask & bit(source)) == 0) {
      fail(format("%s: lane %d reads from lane %d, which the mask 0x%08x does not name",
                  name_of(operation), lane, source, mask),
           block.threads[current->warp * kWarpSize + lane].site);
    }
    exchange.result = static_cast<Exchange*>(data[source])->value;
  }
}

uint32_t reduce(Collective operation, uint32_t a, uint32_t b) {
  const int32_t signed_a = static_cast<int32_t>(a);
  const int32_t signed_b = static_cast<int32_t>(b);
  switch (operation) {
    case Collective::kReduceAdd:
      return a + b;
    case Collective::kReduceMinSigned:
      return signed_a < signed_b ? a : b;
    case Collective::kReduceMaxSigned:
      return signed_a > signed_b ? a : b;
    case Collective::kReduceMinUnsigned:
      return a < b ? a : b;
    default:
      return a > b ? a : b;
  }
}

void complete_reduction(Collective operation, uint32_t mask, void* const* data) {
  bool first = true;
  uint32_t result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask & bit(lane)) == 0) continue;
    const auto value = static_cast<uint32_t>(static_cast<Exchange*>(data[lane])->value);
    result = first ? value : reduce(operation, result, value);
    first = false;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask & bit(lane)) != 0) static_cast<Exchange*>(data[lane])->result = result;
  }
}

void complete_vote(Collective operation, uint32_t mask, void* const* data) {
  const uint32_t yes = equal_lanes(mask, data, 1);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask & bit(lane)) == 0) continue;
    Exchange& exchange = *static_cast<Exchange*>(data[lane]);
    if (operation == Collective::kAny) {
      exchange.result = yes != 0;
    } else if (operation == Collective::kAll) {
      exchange.result = yes == mask;
    } else if (operation == Collective::kBallot) {
      exchange.result = yes;
    } else {
      exchange.result = equal_lanes(mask, data, exchange.value);
    }
  }
}

// Rows that stmatrix stores: each lane has just named its own.
void note_stmatrix(Collective operation) {
  if (operation != Collective::kStmatrix && operation != Collective::kStmatrixTrans) return;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Thread& thread = block.threads[current->warp * kWarpSize + lane];
    const void* data = block.warps[current->warp].data[lane];
    if (lane < 8 * static_cast<const MatrixLane*>(data)->num_matrices) {
      note_store(thread.last_address, 16, thread);
    }
  }
}

void count(Collective operation, const void* lane_data) {
  if (operation >= Collective::kMmaBf16) {
    ++counts().mma;
  } else if (operation >= Collective::kLdmatrix && operation <= Collective::kStmatrixTrans) {
    constexpr uint64_t kMatrixBytes = 8 * 16;
    const uint64_t bytes = kMatrixBytes * static_cast<const MatrixLane*>(lane_data)->num_matrices;
    const bool loads = operation <= Collective::kLdmatrixTrans;
    (loads ? counts().shared_read : counts().shared_written) += bytes;
  }
}

}  // namespace

const char* name_of(Collective operation) {
  static constexpr const char* kNames[] = {"shfl",
                                           "shfl_up",
                                           "shfl_down",
                                           "shfl_xor",
                                           "any",
                                           "all",
                                           "ballot",
                                           "match_any",
                                           "elect_one",
                                           "setmaxnreg",
                                           "wgmma_wait",
                                           "reduce_add",
                                           "reduce_min",
                                           "reduce_min",
                                           "reduce_max",
                                           "reduce_max",
                                           "ldmatrix",
                                           "ldmatrix_trans",
                                           "stmatrix",
                                           "stmatrix_trans",
                                           "movmatrix_trans",
                                           "mma_m16n8k16",
                                           "mma_m16n8k16"};
  return kNames[static_cast<int>(operation)];
}

void complete_collective(Collective operation, uint32_t mask, void* const* data) {
  if (operation <= Collective::kShflXor) {
    complete_shuffle(operation, mask, data);
  } else if (operation <= Collective::kMatchAny) {
    complete_vote(operation, mask, data);
  } else if (operation == Collective::kWgmmaWait) {
    complete_wgmma_wait(data);
  } else if (operation <= Collective::kSetmaxnreg) {
    // Nothing to exchange: that all lanes have come is enough.
  } else if (operation <= Collective::kReduceMaxUnsigned) {
    complete_reduction(operation, mask, data);
  } else if (operation <= Collective::kMovmatrixTrans) {
    complete_matrix(operation, data);
  } else {
    complete_mma(operation, data);
  }
}

void collective(Collective operation, unsigned mask, void* lane_data, const Site& site) {
  if (gather(name_of(operation), false, operation, mask, lane_data, site)) {
    complete_collective(operation, mask, block.warps[current->warp].data);
    if (block.is_asynchronous) note_stmatrix(operation);
    if (options().count) count(operation, block.warps[current->warp].data[current->lane]);
    release(mask);
  }
}

// The one collective that orders memory. As for barriers, two objects take turns.
void sync_warp(unsigned mask, const Site& site) {
  Warp& warp = block.warps[current->warp];
  const int leader = __builtin_ctz(mask | 1u << 31);
  const uint32_t generation = warp.sync_generation[leader];
  char* object = &warp.sync_objects[leader][generation % 2];
  memory_release(object);
  if (gather("sync_warp", true, Collective::kAny, mask, nullptr, site)) {
    ++warp.sync_generation[leader];
    release(mask);
  }
  memory_acquire(object);
}

void check_collectives_at_exit(const Thread& thread) {
  const Warp& warp = block.warps[thread.warp];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((warp.waiting & bit(lane)) == 0 || (warp.masks[lane] & bit(thread.lane)) == 0) continue;
    const Thread& other = block.threads[thread.warp * kWarpSize + lane];
    fail(format("lane %d ends while lane %d waits for it in %s", thread.lane, lane,
                other.waiting_for),
         other.site);
  }
}

}  // namespace exafuse::emulator
