// Which thread runs next: by the schedule, without the threads that pause and mostly without the
// slow warps.
#include <vector>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr uint32_t kSlowWarpPeriod = 16;
constexpr uint32_t kSlowerWarpPeriod = 48;
// Of threads picked, where the slow warp was chosen by number.
constexpr uint64_t kChosenWarpPeriod = 4096;

struct Pause {
  int thread;
  uint64_t until;  // so many threads were picked
};
std::vector<Pause> pauses;

uint32_t above(int bit) { return bit == 31 ? 0 : ~0u << (bit + 1); }
uint32_t below(int bit) { return (1u << bit) - 1; }
int lowest(uint32_t bits) { return __builtin_ctz(bits); }
int highest(uint32_t bits) { return 31 - __builtin_clz(bits); }

int nth_bit(uint32_t bits, uint32_t n) {
  while (n-- > 0) bits &= bits - 1;
  return lowest(bits);
}

// The next thread in ascending (descending) order after the one that ran last, all around the
// block.
int pick_in_order(uint32_t candidates, bool ascending) {
  const int warp = block.cursor / kWarpSize;
  const int lane = block.cursor % kWarpSize;
  const uint32_t runnable_here = (candidates >> warp & 1) != 0 ? block.warps[warp].runnable : 0;
  const uint32_t lanes = runnable_here & (ascending ? above(lane) : below(lane));
  if (lanes != 0) return warp * kWarpSize + (ascending ? lowest(lanes) : highest(lanes));
  const uint32_t rest = candidates & (ascending ? above(warp) : below(warp));
  const uint32_t warps = rest != 0 ? rest : candidates;
  const int next = ascending ? lowest(warps) : highest(warps);
  const uint32_t runnable = block.warps[next].runnable;
  return next * kWarpSize + (ascending ? lowest(runnable) : highest(runnable));
}

uint32_t without(uint32_t warps, int slow_warp) {
  const uint32_t others = warps & ~(1u << slow_warp);
  return others != 0 ? others : warps;
}

// A random lane of a random warp; one warp of the block hardly ever gets its turn, so that the
// others run as far ahead of it as the barriers let them. Where warps have roles of their own,
// another one is slower still.
int pick_at_random(uint32_t warps) {
  if (block.slow_warp >= 0 && next_random() % kSlowWarpPeriod != 0) {
    warps = without(warps, block.slow_warp);
  }
  if (block.slower_warp >= 0 && next_random() % kSlowerWarpPeriod != 0) {
    warps = without(warps, block.slower_warp);
  }
  const int warp = nth_bit(warps, next_random() % __builtin_popcount(warps));
  const uint32_t lanes = block.warps[warp].runnable;
  return warp * kWarpSize + nth_bit(lanes, next_random() % __builtin_popcount(lanes));
}

void end_pauses(uint64_t until) {
  for (size_t i = pauses.size(); i-- > 0;) {
    if (pauses[i].until > until) continue;
    const Thread& thread = block.threads[pauses[i].thread];
    wake(thread.warp, 1u << thread.lane);
    pauses.erase(pauses.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// Whether any thread can run, if need be because a pause ends or a copy lands.
bool find_work() {
  ++block.picks;
  end_pauses(block.picks);
  if (block.runnable_warps != 0) return true;
  uint64_t soonest = UINT64_MAX;
  for (const Pause& pause : pauses) {
    if (pause.until < soonest) soonest = pause.until;
  }
  end_pauses(soonest);
  while (block.runnable_warps == 0) {
    if (!land_when_idle()) return false;
  }
  return true;
}

}  // namespace

Thread* pick() {
  try {
    if (!find_work()) return nullptr;
  } catch (...) {
    launch.error = std::current_exception();
    return nullptr;
  }
  uint32_t warps = block.runnable_warps;
  const int chosen = options().slow_warp;
  if (chosen >= 0 && block.picks % kChosenWarpPeriod != 0) warps = without(warps, chosen);
  int id = 0;
  switch (options().schedule) {
    case Schedule::kForward:
      id = pick_in_order(warps, true);
      break;
    case Schedule::kReverse:
      id = pick_in_order(warps, false);
      break;
    case Schedule::kRandom:
      id = pick_at_random(warps);
      break;
  }
  return &block.threads[id];
}

void pause(int picks, const char* what, const Site& site) {
  pauses.push_back({current->id, block.picks + picks});
  wait_for_wake(what, site);
}

void reset_picking() {
  block.picks = 0;
  pauses.clear();
  pauses.reserve(kMaxThreads);
  const bool random =
      options().schedule == Schedule::kRandom && options().slow_warp == Options::kSlowWarpByChance;
  block.cursor = options().schedule == Schedule::kReverse ? 0 : block.num_threads - 1;
  block.slow_warp = random ? static_cast<int>(next_random() % block.num_warps) : -1;
  block.slower_warp = -1;
}

void choose_slower_warp() {
  if (block.slow_warp >= 0) block.slower_warp = static_cast<int>(next_random() % block.num_warps);
}

}  // namespace exafuse::emulator
