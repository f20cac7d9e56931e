// Copies of whole boxes between global and shared memory. A load poisons its box when it starts and
// lands as late as it may (or at once, or at random: option `landing`); a store reads shared memory
// when its thread waits for that.
#include <cstring>
#include <vector>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr int kPoison = 0xFF;
constexpr uint32_t kSwizzleBytes = 1024;
// Memory is taken on the host: to ThreadSanitizer a thread must not free another's.
constexpr size_t kMaxInFlight = 1024;

struct Load {
  Box box;
  uint32_t barrier;
  uint64_t digest;
  uint64_t moment;  // when it began
  int thread;
  Site site;
};

struct Store {
  Box box;
  uint64_t moment;
  int thread;
  unsigned group;
  Site site;
};

std::vector<Load> loads;    // in flight, oldest first
std::vector<Store> stores;  // not read, oldest first

int bytes_of(const Box& box) { return box.rows * kBoxRowBytes; }

// The part of shared memory that a store reads.
uint32_t first_address(const Box& box) { return box.smem + box.first_row * kBoxRowBytes; }
int bytes_read(const Box& box) { return (box.end_row - box.first_row) * kBoxRowBytes; }

bool overlap(const Box& box, uint32_t address, int bytes) {
  return address < box.smem + bytes_of(box) && box.smem < address + bytes;
}

void check_shared_side(const Box& box, const char* what, const Site& site) {
  if (box.smem % kSwizzleBytes != 0) {
    fail(format("%s: shared address 0x%x is not a multiple of %u", what, box.smem, kSwizzleBytes),
         site);
  }
  shared_bytes_at(box.smem, bytes_of(box), site);
}

bool is_wide(const Box& box) {
  return box.first_byte % 8 == 0 && box.end_byte % 8 == 0 &&
         reinterpret_cast<uintptr_t>(box.global) % 8 == 0;
}

// Copies the inside of a box to where the swizzle wants it; returns the digest of what was copied.
template <class Word>
uint64_t copy_inside(const Box& box, char* shared) {
  uint64_t digest = 0;
  for (int row = box.first_row; row < box.end_row; ++row) {
    const char* from = box.global + (row - box.first_row) * box.row_bytes;
    for (int byte = box.first_byte; byte < box.end_byte; byte += sizeof(Word)) {
      Word word;
      __builtin_memcpy(&word, from + (byte - box.first_byte), sizeof(Word));
      digest = add_to_digest(digest, word);
      // The box starts at a multiple of 1024: the address may be taken from its beginning.
      const uint32_t at = row * kBoxRowBytes + byte;
      __builtin_memcpy(shared + (at ^ (at >> 3 & 0x70)), &word, sizeof(Word));
    }
  }
  return digest;
}

bool is_poison(const char* bytes, int count) {
  uint64_t all = ~uint64_t{0};
  for (int i = 0; i < count; i += sizeof(uint64_t)) {
    uint64_t word;
    __builtin_memcpy(&word, bytes + i, sizeof(word));
    all &= word;
  }
  return all == ~uint64_t{0};
}

struct ActAs {
  explicit ActAs(Thread* thread) : running(current) { current = thread; }
  ~ActAs() { current = running; }

  Thread* running;
};

void land(size_t number) {
  const Load load = loads[number];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(number));
  const int bytes = bytes_of(load.box);
  char* shared = block.shared + (load.box.smem - kSharedBase);
  const ActAs thread(&block.threads[load.thread]);  // for reports
  if (written_at(load.box.smem, bytes) != load.moment || !is_poison(shared, bytes)) {
    fail("tma_load: its shared memory was written while the copy was in flight", load.site);
  }
  fill_bytes(shared, bytes, 0);
  const uint64_t digest = is_wide(load.box) ? copy_inside<uint64_t>(load.box, shared)
                                            : copy_inside<uint16_t>(load.box, shared);
  if (digest != load.digest) {
    fail("tma_load: the tensor changed while the copy was in flight", load.site);
  }
  note_async_write(load.box.smem, bytes);
  land_bytes(load.barrier, bytes);
}

void check_overlap(const Box& box, const char* what, const Site& site) {
  for (const Load& load : loads) {
    if (!overlap(load.box, box.smem, bytes_of(box))) continue;
    fail(format("%s: shared address 0x%x belongs to a tma_load in flight, started at %s", what,
                box.smem, describe(load.site).c_str()),
         site);
  }
}

}  // namespace

void reset_copies() {
  loads.clear();
  stores.clear();
  loads.reserve(kMaxInFlight);
  stores.reserve(kMaxInFlight);
}

void check_box(const Box& box, const char* what, const Site& site) {
  need_sm90(what, site);
  if (launch.request->pdl && !current->waited_for_grid && box.inside_bytes() > 0) {
    fail(format("%s of global memory before griddep_wait() in a kernel launched to overlap its "
                "predecessor",
                what),
         site);
  }
}

void start_load(const Box& box, uint32_t barrier, uint64_t digest, const Site& site) {
  check_shared_side(box, "tma_load", site);
  promise_bytes(barrier, bytes_of(box), "tma_load", site);
  check_clean(box.smem, bytes_of(box), "tma_load", site);
  check_overlap(box, "tma_load", site);
  for (const Store& store : stores) {
    if (!overlap(store.box, box.smem, bytes_of(box))) continue;
    fail(format("tma_load: shared address 0x%x belongs to a tma_store that has not read it, "
                "started at %s",
                box.smem, describe(store.site).c_str()),
         site);
  }
  if (loads.size() == kMaxInFlight) fail("more than 1024 TMA loads in flight", site);
  fill_bytes(block.shared + (box.smem - kSharedBase), bytes_of(box), kPoison);
  note_async_write(box.smem, bytes_of(box));
  loads.push_back({box, barrier, digest, written_at(box.smem, 1), current->id, site});
  if (options().count) {
    counts().global_read += box.inside_bytes();
    counts().shared_written += bytes_of(box);
  }
  if (options().landing == Landing::kEarly) land(loads.size() - 1);
  land_at_random();
}

void start_store(const Box& box, const Site& site) {
  check_box(box, "tma_store", site);
  check_shared_side(box, "tma_store", site);
  if (box.inside_bytes() > 0) {
    check_clean(first_address(box), bytes_read(box), "tma_store", site);
    check_overlap(box, "tma_store", site);
  }
  if (stores.size() == kMaxInFlight) fail("more than 1024 TMA stores unread", site);
  stores.push_back({box, tick(), current->id, current->store_commits, site});
  if (options().count) counts().global_written += box.inside_bytes();  // the rest when it is read
}

void commit_stores() { ++current->store_commits; }

bool next_store(unsigned pending, Box* box, const Site& site) {
  need_sm90("tma_store_wait_read", site);
  for (size_t i = 0; i < stores.size(); ++i) {
    const Store store = stores[i];
    if (store.thread != current->id) continue;
    if (store.group + pending >= current->store_commits) return false;
    stores.erase(stores.begin() + static_cast<std::ptrdiff_t>(i));
    if (store.box.inside_bytes() > 0 &&
        written_at(first_address(store.box), bytes_read(store.box)) > store.moment) {
      fail("tma_store: its shared memory was written before tma_store_wait_read", store.site);
    }
    *box = store.box;
    return true;
  }
  return false;
}

void check_stores_at_exit(const Thread& thread) {
  for (const Store& store : stores) {
    if (store.thread != thread.id) continue;
    fail(format("the thread ends with a TMA store unread, started at %s; commit it and wait for it "
                "before leaving the kernel",
                describe(store.site).c_str()),
         store.site);
  }
}

void check_loads_at_end() {
  if (loads.empty()) return;
  record_failure(
      format("the block ends with %zu TMA loads in flight, the oldest started at %s by "
             "thread %d",
             loads.size(), describe(loads[0].site).c_str(), loads[0].thread));
}

void check_not_in_flight(uint32_t address, int bytes, const char* what, const Site& site) {
  for (const Load& load : loads) {
    if (!overlap(load.box, address, bytes)) continue;
    fail(format("%s: shared address 0x%x belongs to a tma_load in flight, started at %s", what,
                address, describe(load.site).c_str()),
         site);
  }
}

void land_at_random() {
  if (options().landing != Landing::kRandom) return;
  for (size_t i = loads.size(); i-- > 0;) {
    if (next_random() % 4 == 0) land(i);
  }
}

bool land_when_idle() {
  size_t found = loads.size();
  int num_candidates = 0;
  for (size_t i = 0; i < loads.size(); ++i) {
    if (!is_waited_for(loads[i].barrier)) continue;
    ++num_candidates;
    const bool first = found == loads.size();
    const bool any = options().schedule == Schedule::kRandom;
    if (first || (any && next_random() % num_candidates == 0)) found = i;
  }
  if (found == loads.size()) return false;
  land(found);
  return true;
}

}  // namespace exafuse::emulator
