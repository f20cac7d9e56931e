// The asynchronous proxy's view of shared memory. Every 16 bytes carry the moment at which they
// were last written, every word the thread that stored it and how often that thread had called
// fence_proxy_async: as long as it has not called it again, the proxy may not see what was stored.
#include <vector>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr uint32_t kGranuleBytes = 16;
constexpr uint32_t kWordBytes = 4;

// By address. They take their memory on the host, between blocks.
std::vector<uint64_t> moments;  // of each granule
std::vector<uint32_t> writers;  // of each word: fences of the thread, its number + 1; 0: nobody
uint64_t now = 0;
bool all_clear = true;  // whether nobody has written

uint32_t writer_of(const Thread& thread) {
  return thread.fences * (2 * kMaxThreads) + static_cast<uint32_t>(thread.id) + 1;
}

void write(uint32_t address, int bytes, uint32_t writer) {
  all_clear = false;
  const uint64_t moment = tick();
  const uint32_t last = address + bytes - 1;
  for (uint32_t i = address / kGranuleBytes; i <= last / kGranuleBytes; ++i) moments[i] = moment;
  for (uint32_t i = address / kWordBytes; i <= last / kWordBytes; ++i) writers[i] = writer;
}

}  // namespace

uint64_t tick() { return ++now; }

uint64_t written_at(uint32_t address, int bytes) {
  if (all_clear) return 0;
  uint64_t latest = 0;
  const uint32_t last = address + bytes - 1;
  for (uint32_t i = address / kGranuleBytes; i <= last / kGranuleBytes; ++i) {
    if (moments[i] > latest) latest = moments[i];
  }
  return latest;
}

void check_clean(uint32_t address, int bytes, const char* what, const Site& site) {
  if (all_clear) return;
  const uint32_t last = address + bytes - 1;
  for (uint32_t i = address / kWordBytes; i <= last / kWordBytes; ++i) {
    if (writers[i] == 0) continue;
    const uint32_t id = writers[i] % (2 * kMaxThreads) - 1;
    if (writers[i] != writer_of(block.threads[id])) continue;
    fail(format("%s meets shared address 0x%x, where thread %u has stored and not called "
                "fence_proxy_async since",
                what, i * kWordBytes, id),
         site);
  }
}

void note_store(uint32_t address, int bytes, const Thread& thread) {
  write(address, bytes, writer_of(thread));
}
void note_async_write(uint32_t address, int bytes) { write(address, bytes, 0); }

const void* shared_load(uint32_t address, int bytes, const Site& site) {
  const void* memory = shared_pointer(address, bytes, site);
  check_not_in_flight(address, bytes, "a load", site);
  if (options().count) counts().shared_read += bytes;
  return memory;
}

void* shared_store(uint32_t address, int bytes, const Site& site) {
  void* memory = shared_pointer(address, bytes, site);
  check_not_in_flight(address, bytes, "a store", site);
  if (options().count) counts().shared_written += bytes;
  note_store(address, bytes, *current);
  return memory;
}

void fence_proxy_async(const Site& site) {
  need_sm90("fence_proxy_async", site);
  ++current->fences;
}

void reset_proxy() {
  now = 0;
  const size_t end = block.shared_capacity + kSharedBase;
  if (all_clear && moments.size() > end / kGranuleBytes) return;
  moments.assign(end / kGranuleBytes + 1, 0);
  writers.assign(end / kWordBytes + 1, 0);
  all_clear = true;
}

}  // namespace exafuse::emulator
