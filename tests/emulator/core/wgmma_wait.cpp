// The end of products of a warpgroup: what the warp's share comes to, and whether the operands and
// accumulators were left alone until then.
#include <cstring>

#include "core/wgmma.h"

namespace exafuse::emulator {

namespace {

struct Wait {
  int pending;
  const void* const* registers;
  int count;
  Site site;
};

void give_values(const WgmmaAccumulator& accumulator, int lane) {
  float* d = accumulator.d[lane];
  for (int i = 0; i < accumulator.columns / 4; ++i) {
    const float* values = accumulator.values + wgmma_place(lane, i, accumulator.columns);
    std::memcpy(d + 2 * i, values, 2 * sizeof(float));
  }
}

// ThreadSanitizer sees what the library's functions read and write, so none of them looks at what
// belongs to a thread: words are compared one by one.
uint32_t word_at(const void* address) {
  uint32_t word;
  std::memcpy(&word, address, sizeof(word));
  return word;
}

bool is_poisoned(const WgmmaAccumulator& accumulator, int lane) {
  const uint32_t even = wgmma_poison(0);
  const uint32_t odd = wgmma_poison(1);
  uint32_t difference = 0;
  for (int i = 0; i < accumulator.columns / 2; i += 2) {
    difference |= word_at(accumulator.d[lane] + i) ^ even;
    difference |= word_at(accumulator.d[lane] + i + 1) ^ odd;
  }
  return difference == 0;
}

bool are_unchanged(const WgmmaProduct& product, int lane) {
  uint32_t difference = 0;
  for (int i = 0; i < 4; ++i) {
    difference |= word_at(product.registers[lane] + i) ^ product.values[lane][i];
  }
  return difference == 0;
}

void compute(int warp, uint64_t number) {
  const WgmmaProduct& product = wgmma_product(warp, number);
  WgmmaAccumulator& accumulator = wgmma_accumulators[warp][product.accumulator];
  const int columns = product.call.columns;
  static float a[kWgmmaDepth * kWgmmaRows];
  static float b[kWgmmaDepth * kMaxWgmmaColumns];
  if (product.call.a == nullptr) {
    widen_operand(product.a, product.call.is_bf16, a);
  } else {
    widen_registers(product.values, product.call.is_bf16, a);
  }
  widen_operand(product.b, product.call.is_bf16, b);
  multiply(a, b, product.call.accumulate, accumulator.values, columns);
  if (options().count) {
    // As so many m16n8k16. The four warps share operand b.
    counts().mma += columns / 8;
    const int share = product.call.a == nullptr ? kWgmmaRows : 0;
    counts().shared_read += 2 * kWgmmaDepth * (share + columns / kWarpsOfGroup);
  }
}

void check_operands(int warp, const WgmmaProduct& product, const Site& site) {
  for (const bool is_a : {true, false}) {
    if (is_a && product.call.a != nullptr) continue;
    if (operand_written_at(is_a ? product.a : product.b) > product.issued_at) {
      fail(format("operand %s of the wgmma at %s was overwritten while in flight", is_a ? "a" : "b",
                  describe(product.site).c_str()),
           site);
    }
  }
  if (product.call.a == nullptr) return;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (are_unchanged(product, lane)) continue;
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

void check_operand_is_named(int warp, const WgmmaProduct& product, const Wait* const* waits,
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
void finish_accumulator(int warp, WgmmaAccumulator& accumulator, uint64_t end,
                        const Wait* const* waits, const Site& site) {
  const bool is_done = accumulator.newest < end;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const bool named = names(*waits[lane], accumulator.d[lane]);
    if (named && !is_done) {
      fail(format("the wait lets %d groups go on and names an accumulator still in flight, of the "
                  "wgmma at %s",
                  waits[lane]->pending,
                  describe(wgmma_product(warp, accumulator.newest).site).c_str()),
           site);
    }
    if (!named && is_done) {
      fail(format("the wait ends the wgmma at %s and does not name its accumulator",
                  describe(wgmma_product(warp, accumulator.newest).site).c_str()),
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

void check_lanes_agree(const WgmmaWarp& warp, const Wait* const* waits, const Site& site) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const WgmmaLane& one = warp.lanes[lane];
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

void compute_wgmma(int warp, uint64_t end) {
  for (uint64_t& number = wgmma_warps[warp].computed; number < end; ++number) compute(warp, number);
}

void wgmma_wait(int pending, const void* const* registers, int count, const Site& site) {
  Wait wait{pending, registers, count, site};
  collective(Collective::kWgmmaWait, ~0u, &wait, site);
}

void complete_wgmma_wait(void* const* data) {
  const int number = current->warp;
  WgmmaWarp& warp = wgmma_warps[number];
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
    check_operands(number, wgmma_product(number, i), site);
    check_operand_is_named(number, wgmma_product(number, i), waits, site);
  }
  compute_wgmma(number, end);
  for (WgmmaAccumulator& one : wgmma_accumulators[number]) {
    if (one.in_flight) finish_accumulator(number, one, end, waits, site);
  }
  warp.completed = end;
  warp.completed_groups = groups;
}

}  // namespace exafuse::emulator
