// wgmma: asynchronous products of a warpgroup. Lanes queue them; a wait makes the warp's share be
// computed, as late as it allows. Each warp completes on its own, where the GPU completes the four
// together. An accumulator in flight holds poison, so that whoever reads or writes it is found.
#include "core/wgmma.h"

#include <cstring>

namespace exafuse::emulator {

WgmmaWarp wgmma_warps[kMaxWarps];
WgmmaProduct wgmma_products[kMaxWarps][kMaxProducts];
WgmmaAccumulator wgmma_accumulators[kMaxWarps][kMaxAccumulators];

namespace {

// Steps of a warpgroup that are compared between its warps.
constexpr uint64_t kMaxSteps = 1024;

struct Step {
  uint64_t count = 0;  // of the warpgroup's steps up to this one; 0: none
  WgmmaCall call;
  Site site;
};

Step steps[kMaxWarps / kWarpsOfGroup][kMaxSteps];

// What a lane has given to products so far, and what it held at the lane's newest fence.
struct Registers {
  const void* begin;
  int words;
  bool known;  // `digest` is
  uint64_t digest;
};
constexpr int kMaxRegisters = 48;

struct LaneRegisters {
  int count;
  Registers all[kMaxRegisters];
};
LaneRegisters given[kMaxThreads];

bool in_use = false;  // since the last reset

bool same_call(const WgmmaCall& x, const WgmmaCall& y) {
  return x.columns == y.columns && (x.a == nullptr) == (y.a == nullptr) &&
         x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor &&
         x.b_depth_by_row == y.b_depth_by_row && x.accumulate == y.accumulate &&
         x.is_bf16 == y.is_bf16;
}

void take_values(WgmmaAccumulator& accumulator, int lane) {
  float* d = accumulator.d[lane];
  const uint32_t words[] = {wgmma_poison(0), wgmma_poison(1)};
  for (int i = 0; i < accumulator.columns / 4; ++i) {
    float* values = accumulator.values + wgmma_place(lane, i, accumulator.columns);
    std::memcpy(values, d + 2 * i, 2 * sizeof(float));
    std::memcpy(d + 2 * i, words, sizeof(words));
  }
}

// The accumulator in flight that `d` belongs to, or a free one that becomes it.
int find_accumulator(const WgmmaCall& call, int lane, const Site& site) {
  int free = -1;
  WgmmaAccumulator* all = wgmma_accumulators[current->warp];
  for (int i = 0; i < kMaxAccumulators; ++i) {
    const WgmmaAccumulator& one = all[i];
    if (!one.in_flight) {
      free = i;
    } else if ((one.lanes >> lane & 1) == 0) {
      continue;
    } else if (one.d[lane] == call.d && one.columns == call.columns) {
      return i;
    } else if (call.d < one.d[lane] + one.columns / 2 && one.d[lane] < call.d + call.columns / 2) {
      fail(format("wgmma into a part of the accumulator that the one at %s is writing",
                  describe(one.site).c_str()),
           site);
    }
  }
  if (free < 0) fail(format("more than %d accumulators in flight", kMaxAccumulators), site);
  WgmmaAccumulator& one = all[free];
  one.in_flight = true;
  one.columns = call.columns;
  one.lanes = 0;
  one.site = site;
  return free;
}

void join_accumulator(WgmmaAccumulator& accumulator, const WgmmaCall& call, int lane,
                      const Site& site) {
  if ((accumulator.lanes >> lane & 1) == 0) {
    accumulator.lanes |= 1u << lane;
    accumulator.d[lane] = call.d;
    take_values(accumulator, lane);
  } else if (accumulator.d[lane] != call.d) {
    fail(format("wgmma: lane %d gives another accumulator than the lanes before it", lane), site);
  }
}

uint64_t digest_of(const Registers& registers) {
  uint64_t sum = 0;
  for (int i = 0; i < registers.words; ++i) {
    uint32_t word;
    std::memcpy(&word, static_cast<const uint32_t*>(registers.begin) + i, sizeof(word));
    sum += word * (uint64_t{0x9E3779B97F4A7C15u} * (2 * i + 1));
  }
  return sum;
}

bool is_in_flight(const void* d) {
  for (const WgmmaAccumulator& one : wgmma_accumulators[current->warp]) {
    if (one.in_flight && (one.lanes >> current->lane & 1) != 0 && one.d[current->lane] == d) {
      return true;
    }
  }
  return false;
}

// Registers that a product takes must hold what they held at the fence. Of those that no product
// has taken before nothing is known.
void check_fenced(const void* begin, int words, const Site& site) {
  LaneRegisters& lane = given[current->id];
  for (int i = 0; i < lane.count; ++i) {
    Registers& one = lane.all[i];
    if (one.begin != begin || one.words != words) continue;
    if (!one.known || is_in_flight(begin) || digest_of(one) == one.digest) return;
    fail("wgmma of registers that were written after wgmma_fence()", site);
  }
  if (lane.count < kMaxRegisters) lane.all[lane.count++] = {begin, words, false, 0};
}

// All four warps must come with the same operands: what they say is checked against the first.
void check_step(const WgmmaCall& call, uint64_t number, const Site& site) {
  Step& step = steps[current->warp / kWarpsOfGroup][number % kMaxSteps];
  if (step.count == number + 1) {
    if (!same_call(step.call, call) || !same_place(step.site, site)) {
      fail(format("wgmma: warp %d of the block issues another product than a warp of the same "
                  "warpgroup at %s",
                  current->warp, describe(step.site).c_str()),
           site);
    }
  } else if (step.count <= number) {
    step = {number + 1, call, site};
  }
}

// The first lane of its warp to come.
void open_product(const WgmmaCall& call, uint64_t number, const Site& site) {
  WgmmaWarp& warp = wgmma_warps[current->warp];
  if (number - warp.completed >= kMaxProducts) {
    fail(format("more than %d products in flight", static_cast<int>(kMaxProducts)), site);
  }
  check_step(call, number, site);
  WgmmaProduct& product = wgmma_product(current->warp, number);
  product.call = call;
  product.site = site;
  product.issued_at = tick();
  if (call.a == nullptr) {
    const int first_row = current->warp % kWarpsOfGroup * kWgmmaRows;
    product.a = read_descriptor(call.a_descriptor, false, first_row, kWgmmaRows, "operand a", site);
    check_operand_is_clean(product.a, "operand a of wgmma", site);
  }
  product.b =
      read_descriptor(call.b_descriptor, call.b_depth_by_row, 0, call.columns, "operand b", site);
  check_operand_is_clean(product.b, "operand b of wgmma", site);
  product.accumulator = find_accumulator(call, current->lane, site);
  WgmmaAccumulator& accumulator = wgmma_accumulators[current->warp][product.accumulator];
  accumulator.newest = number;
  warp.issued = number + 1;
}

// The earliest a GPU might be done, where wgmma_wait is the latest.
bool computes_at_commit() {
  if (options().schedule == Schedule::kRandom) return next_random() % 2 == 0;
  return options().schedule == Schedule::kReverse;
}

// By the last thread of a warpgroup: all four warps must have taken part in all products.
void check_group_at_exit(const Thread& thread) {
  const int first = thread.warp / kWarpsOfGroup * kWarpsOfGroup;
  int most = first;
  int least = first;
  for (int warp = first; warp < first + kWarpsOfGroup; ++warp) {
    const Warp& lanes = block.warps[warp];
    const uint32_t self = warp == thread.warp ? 1u << thread.lane : 0;
    if ((lanes.exited | self) != lanes.exists) return;
    if (wgmma_warps[warp].issued > wgmma_warps[most].issued) most = warp;
    if (wgmma_warps[warp].issued < wgmma_warps[least].issued) least = warp;
  }
  const uint64_t issued = wgmma_warps[most].issued;
  if (wgmma_warps[least].issued == issued) return;
  fail(format("warp %d of a warpgroup has issued %llu wgmma, warp %d only %llu", most,
              static_cast<unsigned long long>(issued), least,
              static_cast<unsigned long long>(wgmma_warps[least].issued)),
       wgmma_product(most, issued - 1).site);
}

}  // namespace

void reset_wgmma() {
  if (!in_use) return;
  in_use = false;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    wgmma_warps[warp] = WgmmaWarp();
    for (WgmmaAccumulator& one : wgmma_accumulators[warp]) one.in_flight = false;
  }
  for (LaneRegisters& lane : given) lane.count = 0;
  for (auto& group : steps) {
    for (Step& step : group) step.count = 0;
  }
}

void wgmma_fence(const Site&) {
  in_use = true;
  wgmma_warps[current->warp].lanes[current->lane].fenced = true;
  LaneRegisters& lane = given[current->id];
  for (int i = 0; i < lane.count; ++i) {
    lane.all[i].known = !is_in_flight(lane.all[i].begin);
    if (lane.all[i].known) lane.all[i].digest = digest_of(lane.all[i]);
  }
}

void wgmma_issue(const WgmmaCall& call, const Site& site) {
  WgmmaWarp& warp = wgmma_warps[current->warp];
  const int lane = current->lane;
  WgmmaLane& self = warp.lanes[lane];
  if (gpu_model().major != 9) fail("wgmma needs sm_90, the emulated GPU is another", site);
  if (current->warp / kWarpsOfGroup >= block.num_threads / (kWarpsOfGroup * kWarpSize)) {
    fail(format("wgmma by a warp of no whole warpgroup: the block has %d threads",
                block.num_threads),
         site);
  }
  if (!self.fenced) fail("wgmma with no wgmma_fence() since the last commit", site);
  const uint64_t number = self.issued;
  if (number == warp.issued) open_product(call, number, site);
  ++self.issued;
  WgmmaProduct& product = wgmma_product(current->warp, number);
  if (!same_call(product.call, call) || !same_place(product.site, site)) {
    fail(format("wgmma: lane %d issues another product than a lane of the same warp at %s", lane,
                describe(product.site).c_str()),
         site);
  }
  check_fenced(call.d, call.columns / 2, site);
  join_accumulator(wgmma_accumulators[current->warp][product.accumulator], call, lane, site);
  if (call.a != nullptr) {
    check_fenced(call.a, 4, site);
    product.registers[lane] = call.a;
    std::memcpy(product.values[lane], call.a, sizeof(product.values[lane]));
  }
}

void wgmma_commit(const Site& site) {
  in_use = true;
  WgmmaWarp& warp = wgmma_warps[current->warp];
  WgmmaLane& self = warp.lanes[current->lane];
  const uint64_t number = self.committed++;
  const int slot = static_cast<int>(number % kMaxGroups);
  if (number == warp.groups) {
    if (number - warp.completed_groups >= kMaxGroups) {
      fail(format("more than %d groups of wgmma in flight", static_cast<int>(kMaxGroups)), site);
    }
    warp.ends[slot] = self.issued;
    warp.commits[slot] = 0;
    ++warp.groups;
  } else if (warp.ends[slot] != self.issued) {
    fail(format("wgmma_commit: lane %d closes a group of another length than the lanes before it",
                current->lane),
         site);
  }
  self.fenced = false;
  if (++warp.commits[slot] == kWarpSize && computes_at_commit()) {
    compute_wgmma(current->warp, warp.ends[slot]);
  }
}

void check_wgmma_at_exit(const Thread& thread) {
  if (!in_use) return;
  const WgmmaWarp& warp = wgmma_warps[thread.warp];
  const WgmmaLane& self = warp.lanes[thread.lane];
  if (self.issued > 0) {
    const Site site = wgmma_product(thread.warp, self.issued - 1).site;
    const uint64_t closed = self.committed == 0 ? 0 : warp.ends[(self.committed - 1) % kMaxGroups];
    if (self.issued > closed) {
      fail("the thread ends with wgmma that no wgmma_commit() closes", site);
    }
    if (self.issued > warp.completed) {
      fail("the thread ends with wgmma in flight; wait for them before leaving the kernel", site);
    }
  }
  check_group_at_exit(thread);
}

}  // namespace exafuse::emulator
