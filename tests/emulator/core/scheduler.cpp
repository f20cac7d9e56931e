// Runs a grid block by block, and within a block one fiber per thread. Control passes from thread
// to thread only where a thread must wait, so that nothing may be taken from lanes running in
// lockstep.
#include <pthread.h>

#include <cstdlib>
#include <cstring>

#include "core/state.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim{};
dim3 gridDim{};

namespace exafuse::emulator {

Block block;
Launch launch;
Thread* current = nullptr;
bool global_memory_forbidden = false;

namespace {

// Atomics in a row, by all threads together, before a spinning kernel is given up.
constexpr uint64_t kSpinLimit = 20'000'000;

Stack host;
pthread_mutex_t launch_mutex = PTHREAD_MUTEX_INITIALIZER;

// While accesses are counted or shared memory has asynchronous readers, all accesses take the path
// of those that are checked.
void choose_access_path() {
  global_memory_forbidden = options().count || block.is_asynchronous ||
                            (launch.request->pdl && !current->waited_for_grid);
}

void resume(Thread* thread, Stack* from, bool from_is_done) {
  current = thread;
  block.cursor = thread->id;
  threadIdx = thread->index;
  choose_access_path();
  switch_stack(from, thread->stack, from_is_done);
}

void return_to_host(bool from_is_done) {
  Stack* from = current->stack;
  current = nullptr;
  switch_stack(from, &host, from_is_done);
}

// Gives the processor to another thread, or back to the host when no thread can run.
void leave(bool is_done) {
  Stack* from = current->stack;
  Thread* next = pick();
  if (next == nullptr) {
    return_to_host(is_done);
  } else if (next != current) {
    resume(next, from, is_done);
  }
}

void sleep(Thread* thread) {
  Warp& warp = block.warps[thread->warp];
  warp.runnable &= ~(1u << thread->lane);
  if (warp.runnable == 0) block.runnable_warps &= ~(1u << thread->warp);
}

void end_of_thread() {
  Thread& thread = *current;
  if (thread.num_copies > 0) {
    fail(format("the thread ends with %d asynchronous copies in flight, the oldest started at %s; "
                "wait for them before leaving the kernel",
                thread.num_copies, describe(oldest_copy_site()).c_str()),
         oldest_copy_site());
  }
  check_wgmma_at_exit(thread);
  thread.exited = true;
  check_collectives_at_exit(thread);
  check_barriers_at_exit(thread);
  check_stores_at_exit(thread);
  block.warps[thread.warp].exited |= 1u << thread.lane;
  ++block.num_exited;
}

void thread_main() {
  arrived_on_new_stack();
  memory_acquire(&launch.started);
  memory_acquire(&block.started);
  try {
    launch.request->invoke(launch.request->kernel, launch.request->params);
    end_of_thread();
  } catch (...) {
    launch.error = std::current_exception();
  }
  memory_release(&block.ended);
  memory_release(&launch.ended);
  note_progress();
  if (launch.error != nullptr) {
    return_to_host(true);
  } else {
    sleep(current);
    leave(true);
  }
  __builtin_unreachable();
}

void prepare_block(const uint3& index, uint64_t sequence) {
  blockIdx = index;
  const dim3& shape = launch.request->block;
  const int num_stacks = 2 * block.num_threads;
  // Blocks rotate through twice as many stacks as they have threads. ThreadSanitizer knows a stack
  // as one thread of execution, so a thread of one block must not always follow the same of
  // another.
  const int rotation = static_cast<int>((sequence * 0x9E3779B97F4A7C15u >> 33) % num_stacks);
  block.num_exited = 0;
  block.runnable_warps = 0;
  block.quiet_atomics = 0;
  block.is_asynchronous = false;
  for (int w = 0; w < block.num_warps; ++w) block.warps[w] = Warp();
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  for (int id = 0; id < block.num_threads; ++id) {
    Thread& thread = block.threads[id];
    thread = Thread();
    thread.id = id;
    thread.warp = id / kWarpSize;
    thread.lane = id % kWarpSize;
    thread.index.x = id % shape.x;
    thread.index.y = id / shape.x % shape.y;
    thread.index.z = id / (shape.x * shape.y);
    thread.stack = prepare_stack((id + rotation) % num_stacks, thread_main);
    Warp& warp = block.warps[thread.warp];
    warp.exists |= 1u << thread.lane;
    warp.runnable |= 1u << thread.lane;
    block.runnable_warps |= 1u << thread.warp;
  }
  reset_registers();
  reset_picking();
}

void run_block(const uint3& index, uint64_t sequence) {
  prepare_block(index, sequence);
  reset_shared_memory();
  reset_wgmma();
  resume(pick(), &host, false);
  // Here again when every thread has ended, when one failed, or when none can run.
  if (launch.error == nullptr && block.num_exited < block.num_threads) {
    record_failure("deadlock, no thread can run: " + describe_threads() + describe_mbarriers());
  }
  if (launch.error == nullptr) {
    check_barriers_at_end();
    check_loads_at_end();
    check_registers_at_end();
    check_shared_memory();
  }
  release_shared_memory();
}

uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// The random schedule walks the grid in strides that have no divisor in common with its size, so
// that each block comes once.
uint64_t random_stride(uint64_t count) {
  uint64_t stride = 1 + next_random() % count;
  while (greatest_common_divisor(stride, count) != 1) ++stride;
  return stride;
}

void run_grid() {
  const dim3& grid = launch.request->grid;
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const Schedule schedule = options().schedule;
  const uint64_t stride = schedule == Schedule::kRandom ? random_stride(count) : 1;
  for (uint64_t i = 0; i < count && launch.error == nullptr; ++i) {
    const uint64_t number =
        schedule == Schedule::kReverse
            ? count - 1 - i
            : static_cast<uint64_t>(static_cast<unsigned __int128>(i) * stride % count);
    uint3 index;
    index.x = static_cast<unsigned>(number % grid.x);
    index.y = static_cast<unsigned>(number / grid.x % grid.y);
    index.z = static_cast<unsigned>(number / grid.x / grid.y);
    run_block(index, i);
  }
  if (launch.error == nullptr && launch.request->pdl && !launch.any_waited_for_grid) {
    record_failure(
        "launched to overlap its predecessor, but no thread called griddep_wait(): the next kernel "
        "would start before the previous one has ended");
  }
}

}  // namespace

int lane_id() { return current->lane; }

void wait_for_wake(const char* what, const Site& site) {
  Thread* self = current;
  self->waiting_for = what;
  self->site = site;
  sleep(self);
  leave(false);
  self->waiting_for = nullptr;
}

void wake(int warp, uint32_t lanes) {
  if (lanes == 0) return;
  block.warps[warp].runnable |= lanes;
  block.runnable_warps |= 1u << warp;
}

void note_asynchronous() {
  if (block.is_asynchronous) return;
  block.is_asynchronous = true;
  choose_slower_warp();
  choose_access_path();
}

void yield_in_atomic(const Site& site) {
  if (++block.quiet_atomics > kSpinLimit) {
    fail("threads spin on an atomic and none gets any further: " + describe_threads(), site);
  }
  leave(false);
}

void griddep_wait() {
  current->waited_for_grid = true;
  launch.any_waited_for_grid = true;
  choose_access_path();
}

void abandon_launch(std::exception_ptr error) {
  launch.error = std::move(error);
  return_to_host(true);
  __builtin_unreachable();
}

void run(const LaunchRequest& request) {
  check_limits(request);
  pthread_mutex_lock(&launch_mutex);
  seed_random(options().seed);
  launch.request = &request;
  launch.any_waited_for_grid = false;
  launch.error = nullptr;
  blockDim = request.block;
  gridDim = request.grid;
  block.num_threads = static_cast<int>(request.block.x * request.block.y * request.block.z);
  block.num_warps = (block.num_threads + kWarpSize - 1) / kWarpSize;
  record_launch(request);
  enter_fibers(&host);
  catch_faults();
  memory_release(&launch.started);
  run_grid();
  release_faults();
  const std::exception_ptr error = launch.error;
  launch.error = nullptr;
  if (error != nullptr) discard_stacks(&launch.ended);
  memory_acquire(&launch.ended);
  pthread_mutex_unlock(&launch_mutex);
  if (error != nullptr) std::rethrow_exception(error);
}

}  // namespace exafuse::emulator
