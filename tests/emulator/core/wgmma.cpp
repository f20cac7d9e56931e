// wgmma: asynchronous products of a warpgroup. Lanes queue them; a wait makes the warp's share be
// computed, as late as it allows. Each warp completes on its own, where the GPU completes the four
// together. An accumulator in flight holds poison, so that whoever reads or writes it is found.
#include "core/wgmma.h"

#include <cstring>

namespace exafuse::emulator {

namespace {

constexpr int kWarpsOfGroup = 4;
// Of a warp in flight.
constexpr uint64_t kMaxProducts = 128;
constexpr uint64_t kMaxGroups = 64;
constexpr int kMaxAccumulators = 8;
// Steps of a warpgroup that are compared between its warps.
constexpr uint64_t kMaxSteps = 1024;

// NaN, which no arithmetic loses, so that a read comes out; and a number that arithmetic changes,
// so that a write is seen.
constexpr uint32_t kPoisons[] = {0x7fc0dead, 0x7d4c1dad};

struct Product {
  WgmmaCall call;  // of the lane that came first
  Site site;
  uint64_t issued_at = 0;
  int accumulator = 0;
  WgmmaOperand a, b;
  const uint32_t* registers[kWarpSize];
  uint32_t values[kWarpSize][4];  // of the registers when they were given
};

struct Accumulator {
  bool in_flight = false;
  int columns = 0;
  uint32_t lanes = 0;  // that have given theirs
  float* d[kWarpSize];
  uint64_t newest = 0;  // product
  Site site;
  float values[kWgmmaRows * kMaxWgmmaColumns];
};

struct LaneProducts {
  uint64_t issued = 0;
  uint64_t committed = 0;
  bool fenced = false;
};

// Products and groups are numbered from the beginning of the block.
struct WarpProducts {
  LaneProducts lanes[kWarpSize];
  uint64_t issued = 0;
  uint64_t computed = 0;
  uint64_t completed = 0;
  uint64_t groups = 0;
  uint64_t completed_groups = 0;
  uint64_t ends[kMaxGroups];  // of groups: the number of products before it
  int commits[kMaxGroups];    // lanes that have closed it
};

struct Step {
  uint64_t number = ~uint64_t{0};
  WgmmaCall call;
  Site site;
};

struct Wait {
  int pending;
  const void* const* registers;
  int count;
  Site site;
};

WarpProducts warps[kMaxWarps];
Product products[kMaxWarps][kMaxProducts];
Accumulator accumulators[kMaxWarps][kMaxAccumulators];
Step steps[kMaxWarps / kWarpsOfGroup][kMaxSteps];

// They take turns from register to register, and by seed.
uint32_t poison(int i) { return kPoisons[(i + options().seed) % 2]; }

Product& product_of(int warp, uint64_t number) { return products[warp][number % kMaxProducts]; }

bool same_call(const WgmmaCall& x, const WgmmaCall& y) {
  return x.columns == y.columns && (x.a == nullptr) == (y.a == nullptr) &&
         x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor &&
         x.b_depth_by_row == y.b_depth_by_row && x.accumulate == y.accumulate &&
         x.is_bf16 == y.is_bf16;
}

// Where pair `i` of a lane's registers stands in [rows, columns].
int place_of(int lane, int i, int columns) {
  return (lane / 4 + i % 2 * 8) * columns + i / 2 * 8 + lane % 4 * 2;
}

void take_values(Accumulator& accumulator, int lane) {
  float* d = accumulator.d[lane];
  const uint32_t words[] = {poison(0), poison(1)};
  for (int i = 0; i < accumulator.columns / 4; ++i) {
    float* values = accumulator.values + place_of(lane, i, accumulator.columns);
    std::memcpy(values, d + 2 * i, 2 * sizeof(float));
    std::memcpy(d + 2 * i, words, sizeof(words));
  }
}

void give_values(const Accumulator& accumulator, int lane) {
  float* d = accumulator.d[lane];
  for (int i = 0; i < accumulator.columns / 4; ++i) {
    const float* values = accumulator.values + place_of(lane, i, accumulator.columns);
    std::memcpy(d + 2 * i, values, 2 * sizeof(float));
  }
}

bool is_poisoned(const Accumulator& accumulator, int lane) {
  uint32_t words[kMaxWgmmaColumns / 2];
  const int count = accumulator.columns / 2;
  std::memcpy(words, accumulator.d[lane], count * sizeof(uint32_t));
  uint32_t difference = 0;
  for (int i = 0; i < count; ++i) difference |= words[i] ^ poison(i);
  return difference == 0;
}

// The accumulator in flight that `d` belongs to, or a free one that becomes it.
int find_accumulator(const WgmmaCall& call, int lane, const Site& site) {
  int free = -1;
  Accumulator* all = accumulators[current->warp];
  for (int i = 0; i < kMaxAccumulators; ++i) {
    const Accumulator& one = all[i];
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
  Accumulator& one = all[free];
  one.in_flight = true;
  one.columns = call.columns;
  one.lanes = 0;
  one.site = site;
  return free;
}

void join_accumulator(Accumulator& accumulator, const WgmmaCall& call, int lane, const Site& site) {
  if ((accumulator.lanes >> lane & 1) == 0) {
    accumulator.lanes |= 1u << lane;
    accumulator.d[lane] = call.d;
    take_values(accumulator, lane);
  } else if (accumulator.d[lane] != call.d) {
    fail(format("wgmma: lane %d gives another accumulator than the lanes before it", lane), site);
  }
}

// All four warps must come with the same operands: what they say is checked against the first.
void check_step(const WgmmaCall& call, uint64_t number, const Site& site) {
  Step& step = steps[current->warp / kWarpsOfGroup][number % kMaxSteps];
  if (step.number == number) {
    if (!same_call(step.call, call) || !same_place(step.site, site)) {
      fail(format("wgmma: warp %d of the block issues another product than a warp of the same "
                  "warpgroup at %s",
                  current->warp, describe(step.site).c_str()),
           site);
    }
  } else if (step.number == ~uint64_t{0} || step.number < number) {
    step = {number, call, site};
  }
}

// The first lane of its warp to come.
void open_product(const WgmmaCall& call, uint64_t number, const Site& site) {
  WarpProducts& warp = warps[current->warp];
  if (number - warp.completed >= kMaxProducts) {
    fail(format("more than %d products in flight", static_cast<int>(kMaxProducts)), site);
  }
  check_step(call, number, site);
  Product& product = product_of(current->warp, number);
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
  Accumulator& accumulator = accumulators[current->warp][product.accumulator];
  accumulator.newest = number;
  warp.issued = number + 1;
}

void compute(int warp, uint64_t number) {
  const Product& product = product_of(warp, number);
  Accumulator& accumulator = accumulators[warp][product.accumulator];
  const int columns = product.call.columns;
  static float a[kWgmmaDepth * kWgmmaRows];
  static float b[kWgmmaDepth * kMaxWgmmaColumns];
  if (product.call.a == nullptr) {
    widen_operand(product.a, product.call.is_bf16, a);
  } else {
    widen_registers(product.values, product.call.is_bf16, a);
  }
  widen_operand(product.b, product.call.is_bf16, b);
  if (!product.call.accumulate) {
    std::memset(accumulator.values, 0, kWgmmaRows * columns * sizeof(float));
  }
  multiply_accumulate(a, b, accumulator.values, columns);
  if (options().count) {
    // As so many m16n8k16. The four warps share operand b.
    counts().mma += columns / 8;
    const int share = product.call.a == nullptr ? kWgmmaRows : 0;
    counts().shared_read += 2 * kWgmmaDepth * (share + columns / kWarpsOfGroup);
  }
}

void compute_until(int warp, uint64_t end) {
  for (uint64_t& number = warps[warp].computed; number < end; ++number) compute(warp, number);
}

// The earliest a GPU might be done, where wgmma_wait is the latest.
bool computes_at_commit() {
  if (options().schedule == Schedule::kRandom) return next_random() % 2 == 0;
  return options().schedule == Schedule::kReverse;
}

void check_operands(int warp, const Product& product, const Site& site) {
  for (const bool is_a : {true, false}) {
    if (is_a && product.call.a != nullptr) continue;
    if (operand_written_at(is_a ? product.a : product.b) > product.issued_at) {
      fail(format("operand %s of the wgmma at %s was overwritten while in flight, before a wait "
                  "for it",
                  is_a ? "a" : "b", describe(product.site).c_str()),
           site);
    }
  }
  if (product.call.a == nullptr) return;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (std::memcmp(product.registers[lane], product.values[lane], sizeof(product.values[lane])) ==
        0) {
      continue;
    }
    fail(format("operand a of the wgmma at %s was written while in flight, in registers of thread "
                "%d",
                describe(product.site).c_str(), warp * kWarpSize + lane),
         site);
  }
}

bool names(const Wait& wait, const void* registers) {
  for (int i = 0; i < wait.count; ++i) {
    if (wait.registers[i] == registers) return true;
  }
  return false;
}

void check_operand_is_named(int warp, const Product& product, const Wait* const* waits,
                            const Site& site) {
  if (product.call.a == nullptr) return;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (names(*waits[lane], product.registers[lane])) continue;
    fail(
        format("the wait ends the wgmma at %s and does not name its operand a, registers of thread "
               "%d",
               describe(product.site).c_str(), warp * kWarpSize + lane),
        site);
  }
}

// Gives accumulators back whose products are all among the first `end`.
void finish_accumulator(int warp, Accumulator& accumulator, uint64_t end, const Wait* const* waits,
                        const Site& site) {
  const bool is_done = accumulator.newest < end;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const bool named = names(*waits[lane], accumulator.d[lane]);
    if (named && !is_done) {
      fail(
          format("the wait lets %d groups go on and names an accumulator still in flight, of the "
                 "wgmma at %s",
                 waits[lane]->pending, describe(product_of(warp, accumulator.newest).site).c_str()),
          site);
    }
    if (!named && is_done) {
      fail(format("the wait ends the wgmma at %s and does not name its accumulator",
                  describe(product_of(warp, accumulator.newest).site).c_str()),
           site);
    }
    if (!is_poisoned(accumulator, lane)) {
      fail(format("the accumulator of the wgmma at %s was written while in flight by thread %d",
                  describe(accumulator.site).c_str(), warp * kWarpSize + lane),
           site);
    }
    if (is_done) give_values(accumulator, lane);
  }
  accumulator.in_flight = !is_done;
}

void check_lanes_agree(const WarpProducts& warp, const Wait* const* waits, const Site& site) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const LaneProducts& one = warp.lanes[lane];
    if (one.issued != warp.issued || one.committed != warp.groups) {
      fail(format("wgmma_wait: lane %d has issued %llu products in %llu groups, others %llu in "
                  "%llu",
                  lane, static_cast<unsigned long long>(one.issued),
                  static_cast<unsigned long long>(one.committed),
                  static_cast<unsigned long long>(warp.issued),
                  static_cast<unsigned long long>(warp.groups)),
           site);
    }
    if (waits[lane]->pending != waits[0]->pending) {
      fail(format("wgmma_wait<%d> in lane %d, <%d> in lane 0", waits[lane]->pending, lane,
                  waits[0]->pending),
           site);
    }
  }
}

}  // namespace

void reset_wgmma() {
  for (int warp = 0; warp < block.num_warps; ++warp) {
    warps[warp] = WarpProducts();
    for (Accumulator& one : accumulators[warp]) one.in_flight = false;
  }
  const int groups = (block.num_warps + kWarpsOfGroup - 1) / kWarpsOfGroup;
  for (int group = 0; group < groups; ++group) {
    for (Step& step : steps[group]) step.number = ~uint64_t{0};
  }
}

void wgmma_fence(const Site&) { warps[current->warp].lanes[current->lane].fenced = true; }

void wgmma_issue(const WgmmaCall& call, const Site& site) {
  WarpProducts& warp = warps[current->warp];
  const int lane = current->lane;
  LaneProducts& self = warp.lanes[lane];
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
  Product& product = product_of(current->warp, number);
  if (!same_call(product.call, call) || !same_place(product.site, site)) {
    fail(format("wgmma: lane %d issues another product than a lane of the same warp at %s", lane,
                describe(product.site).c_str()),
         site);
  }
  join_accumulator(accumulators[current->warp][product.accumulator], call, lane, site);
  if (call.a != nullptr) {
    product.registers[lane] = call.a;
    std::memcpy(product.values[lane], call.a, sizeof(product.values[lane]));
  }
}

void wgmma_commit(const Site& site) {
  WarpProducts& warp = warps[current->warp];
  LaneProducts& self = warp.lanes[current->lane];
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
    compute_until(current->warp, warp.ends[slot]);
  }
}

void wgmma_wait(int pending, const void* const* registers, int count, const Site& site) {
  Wait wait{pending, registers, count, site};
  collective(Collective::kWgmmaWait, ~0u, &wait, site);
}

void complete_wgmma_wait(void* const* data) {
  const int number = current->warp;
  WarpProducts& warp = warps[number];
  const Wait* waits[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) waits[lane] = static_cast<Wait*>(data[lane]);
  const Site site = waits[0]->site;
  check_lanes_agree(warp, waits, site);
  const auto pending = static_cast<uint64_t>(waits[0]->pending);
  uint64_t groups = warp.groups > pending ? warp.groups - pending : 0;
  groups = groups > warp.completed_groups ? groups : warp.completed_groups;
  const uint64_t end =
      groups > warp.completed_groups ? warp.ends[(groups - 1) % kMaxGroups] : warp.completed;
  for (uint64_t i = warp.completed; i < end; ++i) {
    check_operands(number, product_of(number, i), site);
    check_operand_is_named(number, product_of(number, i), waits, site);
  }
  compute_until(number, end);
  for (Accumulator& one : accumulators[number]) {
    if (one.in_flight) finish_accumulator(number, one, end, waits, site);
  }
  warp.completed = end;
  warp.completed_groups = groups;
}

void check_wgmma_at_exit(const Thread& thread) {
  const WarpProducts& warp = warps[thread.warp];
  const LaneProducts& self = warp.lanes[thread.lane];
  if (self.issued == 0) return;
  const Site site = product_of(thread.warp, self.issued - 1).site;
  const uint64_t closed = self.committed == 0 ? 0 : warp.ends[(self.committed - 1) % kMaxGroups];
  if (self.issued > closed) fail("the thread ends with wgmma that no wgmma_commit() closes", site);
  if (self.issued > warp.completed) {
    fail("the thread ends with wgmma in flight; wait for them before leaving the kernel", site);
  }
  const int first = thread.warp / kWarpsOfGroup * kWarpsOfGroup;
  for (int other = first; other < first + kWarpsOfGroup; ++other) {
    const Warp& lanes = block.warps[other];
    const uint32_t self_bit = other == thread.warp ? 1u << thread.lane : 0;
    if ((lanes.exited | self_bit) != lanes.exists) return;
  }
  for (int other = first; other < first + kWarpsOfGroup; ++other) {
    if (warps[other].issued == warp.issued) continue;
    fail(format("warp %d issued %llu products of its warpgroup, warp %d %llu", thread.warp,
                static_cast<unsigned long long>(warp.issued), other,
                static_cast<unsigned long long>(warps[other].issued)),
         site);
  }
}

}  // namespace exafuse::emulator
