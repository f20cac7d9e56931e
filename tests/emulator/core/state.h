// The state of a running launch, shared by the emulator's own source files.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>

#include "core/emulator.h"

namespace exafuse::emulator {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr int kMaxThreads = kWarpSize * kMaxWarps;
inline constexpr int kMaxNamedBarriers = 16;
inline constexpr int kMaxSharedArrays = 64;
// The first shared address is not 0, so that a forgotten address is none.
inline constexpr uint32_t kSharedBase = 1024;

// --- fibers (fiber.cpp) -------------------------------------------------------------------------

// A place to run: a stack with a guard page below it and what the sanitizers know about it. One is
// bound to the same sanitizer fiber for life, so reusing its memory is no race.
struct Stack {
  char* memory = nullptr;  // lowest usable byte
  void* stack_pointer = nullptr;
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
};

extern const size_t kStackBytes;

// Gives back a stack ready to run `entry` from its beginning.
Stack* prepare_stack(int number, void (*entry)());
// Forgets every stack: after a failed launch frames of abandoned threads lie on them.
void discard_stacks(void* launch_ended);
void enter_fibers(Stack* host);  // before the first switch of a launch
void switch_stack(Stack* from, Stack* to, bool from_is_done);
void arrived_on_new_stack();  // first statement of a stack's entry function
bool is_guard_page(const void* address);

// Orders memory between contexts, for ThreadSanitizer only.
void memory_release(void* object);
void memory_acquire(void* object);
// Runs in a context that has seen nothing but the start of the launch / all ends of blocks: shared
// memory is born in the one and dies in the other, so that blocks stay unordered with each other.
void* allocate_for_block(size_t bytes, void* launch_started, void* block_started);
void free_after_block(void* memory, void* block_ended);

// --- threads, warps, blocks (scheduler.cpp) -----------------------------------------------------

struct Thread {
  int id = 0;
  int warp = 0;
  int lane = 0;
  uint3 index{};
  Stack* stack = nullptr;
  bool exited = false;
  bool waited_for_grid = false;
  const char* waiting_for = nullptr;  // while blocked
  Site site;                          // while blocked
  // Asynchronous copies in flight: a ring (shared.cpp).
  int first_copy = 0;
  int num_copies = 0;
  unsigned commits = 0;
  // Of the asynchronous proxy (proxy.cpp, tma.cpp).
  uint32_t fences = 0;
  unsigned store_commits = 0;
  uint32_t last_address = 0;  // of shared memory that ptx:: was asked for
  int registers = 0;          // roles.cpp
};

struct Warp {
  uint32_t exists = 0;    // lanes that the block has
  uint32_t runnable = 0;  // lanes that could run now
  uint32_t exited = 0;
  uint32_t waiting = 0;  // lanes inside a collective
  uint32_t masks[kWarpSize] = {};
  Collective operations[kWarpSize] = {};
  bool is_sync[kWarpSize] = {};
  void* data[kWarpSize] = {};
  char sync_objects[kWarpSize][2] = {};  // only their addresses matter
  uint32_t sync_generation[kWarpSize] = {};
};

struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint32_t generation = 0;
  uint32_t waiting[kMaxWarps] = {};
  Site first_site;
  char sync_objects[2] = {};
};

struct SharedArray {
  int begin = 0;  // logical offset, as on the GPU
  int bytes = 0;
  uint32_t offset = 0;  // where it really lies: arrays are kept apart by poisoned gaps
};

struct Block {
  int num_threads = 0;
  int num_warps = 0;
  int num_exited = 0;
  uint32_t runnable_warps = 0;
  int cursor = 0;  // the thread that ran last
  int slow_warp = -1;
  int slower_warp = -1;
  uint64_t picks = 0;            // of a thread to run
  bool is_asynchronous = false;  // whether it uses mbarriers
  int free_registers = 0;
  uint32_t waiting_for_registers[kMaxWarps] = {};
  uint64_t quiet_atomics = 0;  // atomics since anything else happened
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Barrier barriers[kMaxNamedBarriers];
  char* shared = nullptr;
  size_t shared_capacity = 0;
  int num_arrays = 0;
  SharedArray arrays[kMaxSharedArrays];
  char started = 0, ended = 0;  // only their addresses matter
};

struct Launch {
  const LaunchRequest* request = nullptr;
  bool any_waited_for_grid = false;
  std::exception_ptr error;
  char started = 0, ended = 0;  // only their addresses matter
};

extern Block block;
extern Launch launch;
extern Thread* current;  // nullptr on the host

// Takes the running thread off the processor until wake() names it.
void wait_for_wake(const char* what, const Site& site);
void wake(int warp, uint32_t lanes);

// picking.cpp. The next thread to run, made runnable by the end of a pause or the landing of a copy
// if need be; nullptr: none can, or that failed.
Thread* pick();
void reset_picking();
void choose_slower_warp();
// Lets others run until so many threads have been picked, or none of them can run.
void pause(int picks, const char* what, const Site& site);
// Called by the first use of an mbarrier: from now on every access by ptx:: is looked at.
void note_asynchronous();
// Called for everything but an atomic: someone got further.
inline void note_progress() { block.quiet_atomics = 0; }

void reset_shared_memory();
// As memset, unseen by the sanitizers.
void fill_bytes(char* begin, size_t bytes, int value);
void check_shared_memory();
void release_shared_memory();
Site oldest_copy_site();

bool same_place(const Site& a, const Site& b);

// What an exited thread may have left behind (barrier.cpp, collective.cpp).
void check_barriers_at_exit(const Thread& thread);
void check_barriers_at_end();
void check_collectives_at_exit(const Thread& thread);
// Writes the results of a collective whose lanes `mask` have all arrived (collective.cpp,
// fragments.cpp).
void complete_collective(Collective operation, uint32_t mask, void* const* data);
void complete_matrix(Collective operation, void* const* data);
void complete_mma(Collective operation, void* const* data);
// Of all 32 lanes of the running thread's warp, each with its own data (wgmma.cpp).
void complete_wgmma_wait(void* const* data);
const char* name_of(Collective operation);

// --- the asynchronous proxy (proxy.cpp)
// -----------------------------------------------------------

// The next moment of asynchronous time.
uint64_t tick();
// The latest moment at which any of these bytes of shared memory was written or poisoned; 0: never.
uint64_t written_at(uint32_t address, int bytes);
// Fails where a thread has stored and not called fence_proxy_async since. `what` will read or write
// these bytes: "wgmma", "tma_store".
void check_clean(uint32_t address, int bytes, const char* what, const Site& site);
// The memory behind an address, for the core's own reads: inside one array, of any alignment.
const char* shared_bytes_at(uint32_t address, int bytes, const Site& site);
// Called by what writes: a thread, or the asynchronous proxy.
void note_store(uint32_t address, int bytes, const Thread& thread);
void note_async_write(uint32_t address, int bytes);
void reset_proxy();

// mbarrier.cpp
void need_sm90(const char* what, const Site& site);
void reset_mbarriers();
// Bytes that a copy will land for a barrier, which must have been announced; and their landing.
void promise_bytes(uint32_t address, int bytes, const char* what, const Site& site);
void land_bytes(uint32_t address, int bytes);
bool is_waited_for(uint32_t address);
std::string describe_mbarriers();

// tma.cpp
void reset_copies();
void land_at_random();
// Lands a copy that some thread waits for; false if there is none.
bool land_when_idle();
void check_not_in_flight(uint32_t address, int bytes, const char* what, const Site& site);
void check_stores_at_exit(const Thread& thread);
void check_loads_at_end();

// roles.cpp
void reset_registers();
void check_registers_at_end();

// wgmma.cpp: what a thread leaves behind when it ends is an error.
void reset_wgmma();
void check_wgmma_at_exit(const Thread& thread);

// --- options, reports (control.cpp, report.cpp) -------------------------------------------------

enum class Schedule : uint8_t { kForward, kReverse, kRandom };

// When a tma_load lands: when nothing else can happen, when it starts, or somewhere between.
enum class Landing : uint8_t { kLatest, kEarly, kRandom };

struct Options {
  static constexpr int kSlowWarpByChance = -1;  // in the random schedule alone
  static constexpr int kNoSlowWarp = -2;

  Schedule schedule = Schedule::kForward;
  uint64_t seed = 1;
  Landing landing = Landing::kLatest;
  int slow_warp = kSlowWarpByChance;
  const GpuModel* gpu = nullptr;
  bool exact_approximations = false;
  bool mma_in_double = false;
  bool count = false;
};
const Options& options();

uint64_t next_random();
void seed_random(uint64_t seed);

// What the blocks of a launch did together, while the option `count` is on. Matrix instructions and
// barriers count once for the warp and the block that run them, bytes as often as they are asked
// for. Shared memory is seen where ptx:: moves it; plain C++ accesses are not.
struct Counts {
  uint64_t mma = 0;
  uint64_t global_read = 0, global_written = 0;
  uint64_t shared_read = 0, shared_written = 0;
  uint64_t barriers = 0;
  uint64_t atomics = 0;
};
Counts& counts();  // of the newest launch

void record_launch(const LaunchRequest& request);
void check_limits(const LaunchRequest& request);

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string describe(const Site& site);
// "threads 0-31 wait at ...; thread 40 has exited", for deadlocks and lonely barriers.
std::string describe_threads();
// The full text of a failure: what, where, and the chain of calls that led there.
std::string report(const std::string& message, const Site* site, void* const* frames,
                   int num_frames);
// Notes a failure that no running thread can throw; the launch ends with it.
void record_failure(const std::string& message);

// Turns a memory fault of a kernel into a failure of the launch (fault.cpp).
void catch_faults();
void release_faults();
// Ends the launch from a place that has no usable stack above it.
[[noreturn]] void abandon_launch(std::exception_ptr error);

}  // namespace exafuse::emulator
