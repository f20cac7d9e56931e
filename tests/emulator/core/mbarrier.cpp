// Barriers in shared memory. Their state lies beside the shared memory; the 8 bytes of a barrier
// hold a tag, so that a barrier somebody writes over is noticed.
#include <cstring>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr int kMaxMbarriers = 64;
constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals and of bytes
constexpr int kNeverWaited = -2;
constexpr int kMaxPause = 12;  // in rounds of all threads

struct Mbarrier {
  uint32_t address = 0;
  int count = 0;
  int pending = 0;    // arrivals that this phase still needs
  int missing = 0;    // bytes announced and not landed
  int unclaimed = 0;  // bytes announced that no copy has promised yet
  int phase = 0;      // how many are over
  bool fenced = false;
  int init_thread = 0;
  uint32_t init_generation = 0;  // of the block's barrier
  Site init_site;
  uint32_t waiting[kMaxWarps] = {};
  int num_waiting = 0;
  int waited_for[kMaxThreads] = {};  // the newest phase that each thread has waited for
};

Mbarrier mbarriers[kMaxMbarriers];
int num_mbarriers = 0;

uint64_t tag_of(uint32_t address) {
  return 0x7265697272616240u ^ uint64_t { address } << 32;
}

uint64_t* memory_of(uint32_t address, const Site& site) {
  return reinterpret_cast<uint64_t*>(shared_pointer(address, sizeof(uint64_t), site));
}

// What orders threads through a phase; two take turns, as of every barrier.
void* sync_object(const Mbarrier& barrier, int phase) {
  return block.shared + (barrier.address - kSharedBase) + (phase & 1);
}

Mbarrier* look_up(uint32_t address) {
  for (int i = 0; i < num_mbarriers; ++i) {
    if (mbarriers[i].address == address) return &mbarriers[i];
  }
  return nullptr;
}

std::string name_of(const Mbarrier& barrier) {
  return format("mbarrier 0x%x (initialised at %s)", barrier.address,
                describe(barrier.init_site).c_str());
}

// The barrier that a thread uses, initialised in a way that everyone can rely on.
Mbarrier& use(uint32_t address, const char* what, const Site& site) {
  need_sm90(what, site);
  const uint64_t found = *memory_of(address, site);
  Mbarrier* barrier = look_up(address);
  if (barrier == nullptr) {
    fail(format("%s: there is no mbarrier at 0x%x, or it was not initialised yet", what, address),
         site);
  }
  if (found != tag_of(address)) {
    fail(format("%s: %s was written over", what, name_of(*barrier).c_str()), site);
  }
  if (!barrier->fenced) {
    fail(format("%s: %s, and no fence_mbarrier_init followed", what, name_of(*barrier).c_str()),
         site);
  }
  if (current->id != barrier->init_thread &&
      block.barriers[0].generation == barrier->init_generation) {
    fail(format("%s: %s, and no barrier of the block followed", what, name_of(*barrier).c_str()),
         site);
  }
  note_progress();
  return *barrier;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.missing > 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (int warp = 0; warp < block.num_warps; ++warp) {
    wake(warp, barrier.waiting[warp]);
    barrier.waiting[warp] = 0;
  }
  barrier.num_waiting = 0;
  if (options().count) ++counts().barriers;
}

void arrive(Mbarrier& barrier, const char* what, const Site& site) {
  if (barrier.pending == 0) {
    fail(format("%s: more arrivals at %s than its count of %d, while %d bytes of phase %d are "
                "missing",
                what, name_of(barrier).c_str(), barrier.count, barrier.missing, barrier.phase),
         site);
  }
  memory_release(sync_object(barrier, barrier.phase));
  --barrier.pending;
  end_phase_if_complete(barrier);
}

void check_overrun(const Mbarrier& barrier, int phase, const Site& site) {
  if (barrier.phase <= phase + 1) return;
  fail(format("mbarrier_wait: the thread was overrun: it waits for phase %d of %s, and phase %d is "
              "over already",
              phase, name_of(barrier).c_str(), barrier.phase - 1),
       site);
}

}  // namespace

void need_sm90(const char* what, const Site& site) {
  if (gpu_model().major < 9) {
    fail(format("%s needs sm_90, the emulated GPU is %s", what, gpu_model().name), site);
  }
}

void reset_mbarriers() { num_mbarriers = 0; }

void mbarrier_init(uint32_t address, int count, const Site& site) {
  need_sm90("mbarrier_init", site);
  uint64_t* memory = memory_of(address, site);
  if (const Mbarrier* other = look_up(address)) {
    fail(format("mbarrier_init: %s already", name_of(*other).c_str()), site);
  }
  if (count < 1 || count > kMaxCount) {
    fail(format("mbarrier_init for %d arrivals: expected 1 to %d", count, kMaxCount), site);
  }
  if (num_mbarriers == kMaxMbarriers) fail("more than 64 mbarriers", site);
  note_asynchronous();
  Mbarrier& barrier = mbarriers[num_mbarriers++];
  barrier.address = address;
  barrier.count = barrier.pending = count;
  barrier.missing = barrier.unclaimed = barrier.phase = barrier.num_waiting = 0;
  barrier.fenced = false;
  barrier.init_thread = current->id;
  barrier.init_generation = block.barriers[0].generation;
  barrier.init_site = site;
  for (uint32_t& lanes : barrier.waiting) lanes = 0;
  for (int id = 0; id < block.num_threads; ++id) barrier.waited_for[id] = kNeverWaited;
  *memory = tag_of(address);
}

void fence_mbarrier_init(const Site& site) {
  need_sm90("fence_mbarrier_init", site);
  for (int i = 0; i < num_mbarriers; ++i) {
    if (mbarriers[i].init_thread == current->id) mbarriers[i].fenced = true;
  }
}

void mbarrier_arrive(uint32_t address, const Site& site) {
  arrive(use(address, "mbarrier_arrive", site), "mbarrier_arrive", site);
  // What others do with this arrival may come long before what the thread does next. Not so after
  // arrivals that announce bytes: a producer would only sleep in step with its consumers.
  if (options().schedule == Schedule::kRandom) {
    const auto rounds = static_cast<int>(next_random() % (kMaxPause + 1));
    if (rounds > 0) pause(rounds * block.num_threads, "mbarrier_arrive", site);
  }
}

void mbarrier_arrive_expect_tx(uint32_t address, int bytes, const Site& site) {
  Mbarrier& barrier = use(address, "mbarrier_arrive_expect_tx", site);
  if (bytes < 0 || bytes % 16 != 0 || barrier.missing + bytes > kMaxCount) {
    fail(format("mbarrier_arrive_expect_tx of %d bytes on top of %d: expected a multiple of 16, "
                "and at most %d in all",
                bytes, barrier.missing, kMaxCount),
         site);
  }
  barrier.missing += bytes;
  barrier.unclaimed += bytes;
  arrive(barrier, "mbarrier_arrive_expect_tx", site);
  land_at_random();
}

void mbarrier_wait(uint32_t address, uint32_t parity, const Site& site) {
  land_at_random();
  Mbarrier& barrier = use(address, "mbarrier_wait", site);
  if (parity > 1) fail(format("mbarrier_wait for parity %u: expected 0 or 1", parity), site);
  int& newest = barrier.waited_for[current->id];
  const int phase = newest == kNeverWaited ? (parity == 1 ? -1 : 0) : newest + 1;
  if (static_cast<uint32_t>(phase & 1) != parity) {
    fail(
        format("mbarrier_wait: the thread waits for parity %u of %s twice in a row, the last time "
               "for phase %d: a phase was left out, and the wait for it may end with the wrong one",
               parity, name_of(barrier).c_str(), newest),
        site);
  }
  check_overrun(barrier, phase, site);
  while (barrier.phase <= phase) {
    barrier.waiting[current->warp] |= 1u << current->lane;
    ++barrier.num_waiting;
    wait_for_wake("mbarrier_wait", site);
  }
  check_overrun(barrier, phase, site);
  newest = phase;
  memory_acquire(sync_object(barrier, phase));
}

void promise_bytes(uint32_t address, int bytes, const char* what, const Site& site) {
  Mbarrier& barrier = use(address, what, site);
  if (bytes > barrier.unclaimed) {
    fail(format("%s of %d bytes for %s, which awaits only %d more: announce the bytes of all "
                "copies, whole boxes, before the first",
                what, bytes, name_of(barrier).c_str(), barrier.unclaimed),
         site);
  }
  barrier.unclaimed -= bytes;
}

void land_bytes(uint32_t address, int bytes) {
  Mbarrier& barrier = *look_up(address);
  barrier.missing -= bytes;
  end_phase_if_complete(barrier);
}

bool is_waited_for(uint32_t address) { return look_up(address)->num_waiting > 0; }

std::string describe_mbarriers() {
  std::string text;
  for (int i = 0; i < num_mbarriers; ++i) {
    const Mbarrier& barrier = mbarriers[i];
    if (barrier.num_waiting == 0) continue;
    text += format("; %s: %d threads wait for the end of phase %d, which needs %d of %d arrivals",
                   name_of(barrier).c_str(), barrier.num_waiting, barrier.phase, barrier.pending,
                   barrier.count);
    if (barrier.missing > 0) {
      text +=
          format(" and %d bytes, of which no copy brings %d", barrier.missing, barrier.unclaimed);
    }
  }
  return text;
}

}  // namespace exafuse::emulator
