// What gives warps roles of their own: elect_one, and setmaxnreg, by which registers move from
// warpgroup to warpgroup.
#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr int kRegistersOfBlock = 65536;
constexpr int kMaxRegisters = 256;  // of a thread
constexpr int kWarpsOfGroup = 4;

}  // namespace

// In one warp the leader is always the same lane; which one, nobody promises.
bool elect_one(const Site& site) {
  need_sm90("elect_one", site);
  collective(Collective::kElect, ~0u, nullptr, site);
  switch (options().schedule) {
    case Schedule::kForward:
      return current->lane == 0;
    case Schedule::kReverse:
      return current->lane == kWarpSize - 1;
    default: {
      const uint64_t hash = (options().seed + current->warp + 1) * 0x9E3779B97F4A7C15u;
      return current->lane == static_cast<int>(hash >> 59);
    }
  }
}

void reset_registers() {
  // What a kernel compiled for one block of this size on an SM starts with.
  const int all = kRegistersOfBlock / (block.num_warps * kWarpSize) / 8 * 8;
  const int each = all < kMaxRegisters ? all : kMaxRegisters;
  block.free_registers = 0;  // what goes around is what the threads started with, no more
  for (int id = 0; id < block.num_threads; ++id) block.threads[id].registers = each;
  for (uint32_t& lanes : block.waiting_for_registers) lanes = 0;
}

void set_max_registers(int registers, bool increase, const Site& site) {
  const char* what = increase ? "setmaxnreg_inc" : "setmaxnreg_dec";
  need_sm90(what, site);
  Thread& self = *current;
  if (increase ? registers < self.registers : registers > self.registers) {
    fail(format("%s to %d registers: the thread has %d", what, registers, self.registers), site);
  }
  collective(Collective::kSetmaxnreg, ~0u, nullptr, site);
  const int more = registers - self.registers;
  while (more > block.free_registers) {
    block.waiting_for_registers[self.warp] |= 1u << self.lane;
    wait_for_wake(what, site);
  }
  note_progress();
  block.free_registers -= more;
  self.registers = registers;
  if (more > 0) return;
  for (int warp = 0; warp < block.num_warps; ++warp) {
    wake(warp, block.waiting_for_registers[warp]);
    block.waiting_for_registers[warp] = 0;
  }
}

void check_registers_at_end() {
  for (int warp = 0; warp < block.num_warps; ++warp) {
    const Thread& first = block.threads[warp / kWarpsOfGroup * kWarpsOfGroup * kWarpSize];
    const Thread& thread = block.threads[warp * kWarpSize];
    if (thread.registers == first.registers) continue;
    record_failure(
        format("warp %d ends with %d registers a thread, warp %d of its warpgroup with "
               "%d: setmaxnreg is for whole warpgroups",
               warp, thread.registers, first.warp, first.registers));
    return;
  }
}

}  // namespace exafuse::emulator
