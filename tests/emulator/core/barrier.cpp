// Barriers, strict: a thread that is missing is reported when it is known to be missing, instead of
// being waited for or passed over.
#include <cstring>

#include "core/state.h"

namespace exafuse::emulator {

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

namespace {

// Counts the running thread at a barrier and releases all waiting threads if it is the last one.
// Returns true if it was the last one.
bool arrive(Barrier& barrier) {
  note_progress();
  memory_release(&barrier.sync_objects[barrier.generation % 2]);
  if (++barrier.arrived < barrier.expected) return false;
  for (int warp = 0; warp < block.num_warps; ++warp) {
    wake(warp, barrier.waiting[warp]);
    barrier.waiting[warp] = 0;
  }
  barrier.arrived = 0;
  barrier.expected = 0;
  ++barrier.generation;
  if (options().count) ++counts().barriers;
  return true;
}

void wait_at(Barrier& barrier, const char* what, const Site& site) {
  const uint32_t generation = barrier.generation;
  if (!arrive(barrier)) {
    barrier.waiting[current->warp] |= 1u << current->lane;
    wait_for_wake(what, site);
  }
  // Alternating objects: an early arrival at the next phase must not be ordered before this one.
  memory_acquire(&barrier.sync_objects[generation % 2]);
}

}  // namespace

void sync_threads(const Site& site) {
  Barrier& barrier = block.barriers[0];
  if (block.num_exited > 0) {
    fail(format("sync_threads() can never be reached by all %d threads: %s", block.num_threads,
                describe_threads().c_str()),
         site);
  }
  if (barrier.arrived == 0) {
    barrier.first_site = site;
  } else if (!same_place(barrier.first_site, site)) {
    fail("divergent sync_threads(): other threads of the block wait at " +
             describe(barrier.first_site),
         site);
  }
  barrier.expected = block.num_threads;
  wait_at(barrier, "sync_threads", site);
}

void named_barrier(int id, int num_threads, bool wait, const Site& site) {
  if (id < 1 || id >= kMaxNamedBarriers) {
    fail(format("named barrier id %d is out of range: 1 to 15 (0 is sync_threads)", id), site);
  }
  if (num_threads <= 0 || num_threads % kWarpSize != 0 || num_threads > block.num_threads) {
    fail(
        format("named barrier %d for %d threads: expected a multiple of 32, at most the block's %d",
               id, num_threads, block.num_threads),
        site);
  }
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = num_threads;
    barrier.first_site = site;
  } else if (barrier.expected != num_threads) {
    fail(format("named barrier %d for %d threads, but others came to it for %d at %s", id,
                num_threads, barrier.expected, describe(barrier.first_site).c_str()),
         site);
  }
  if (wait) {
    wait_at(barrier, "bar_sync", site);
  } else {
    arrive(barrier);
  }
}

void check_barriers_at_exit(const Thread& thread) {
  const Barrier& barrier = block.barriers[0];
  if (barrier.arrived > 0) {
    fail(format("thread %d ends while other threads of the block wait for it in sync_threads()",
                thread.id),
         barrier.first_site);
  }
}

void check_barriers_at_end() {
  for (int id = 1; id < kMaxNamedBarriers; ++id) {
    const Barrier& barrier = block.barriers[id];
    if (barrier.arrived > 0) {
      record_failure(
          format("the block ends with %d of %d arrivals left at named barrier %d, the first "
                 "from %s",
                 barrier.arrived, barrier.expected, id, describe(barrier.first_site).c_str()));
    }
  }
}

}  // namespace exafuse::emulator
