// Wrong kernels: barriers that are missing, divergent or miscounted.
#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kThreads = 128;

std::vector<float> reversed(const std::vector<float>& values) {
  return {values.rbegin(), values.rend()};
}

// --- no barrier between the writes and the reads of other threads
// ---------------------------------

__global__ void missing_barrier_before_read_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kThreads>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  shared.values[tid] = p.in[tid];
  p.out[tid] = shared.values[kThreads - 1 - tid];
}

void missing_barrier_before_read() {
  const std::vector<float> in = counting(kThreads);
  std::vector<float> out(kThreads);
  launch(missing_barrier_before_read_kernel, one_block(kThreads, shared_bytes<Floats<kThreads>>()),
         {in.data(), out.data()});
  expect_equal(out, reversed(in));
}
const Register r1("bug missing barrier before read", missing_barrier_before_read);

// --- no barrier before the next round overwrites what slower threads still read
// -------------------

__global__ void missing_barrier_before_overwrite_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<1>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (tid == 0) shared.values[0] = p.in[round];
    ptx::sync_threads();
    sum += shared.values[0];
  }
  p.out[tid] = sum;
}

void missing_barrier_before_overwrite() {
  const std::vector<float> in = counting(4);
  std::vector<float> out(kThreads);
  launch(missing_barrier_before_overwrite_kernel, one_block(kThreads, shared_bytes<Floats<1>>()),
         {in.data(), out.data()});
}
const Register r2("bug missing barrier before overwrite", missing_barrier_before_overwrite);

// --- half of the block takes another way
// ----------------------------------------------------------

__global__ void divergent_barrier_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x < kThreads / 2) {
    ptx::sync_threads();
    p.out[0] = 1;
  } else {
    ptx::sync_threads();
    p.out[1] = 2;
  }
}

void divergent_barrier() {
  std::vector<float> out(2);
  launch(divergent_barrier_kernel, one_block(kThreads), {nullptr, out.data()});
}
const Register r3("bug divergent barrier", divergent_barrier);

__global__ void skipped_barrier_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x < kThreads / 2) ptx::sync_threads();
  p.out[threadIdx.x] = 1;
}

void skipped_barrier() {
  std::vector<float> out(kThreads);
  launch(skipped_barrier_kernel, one_block(kThreads), {nullptr, out.data()});
}
const Register r4("bug half the block skips the barrier", skipped_barrier);

// --- a thread with nothing to do leaves before the barrier
// ----------------------------------------

__global__ void exited_thread_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x == 77) return;
  ptx::sync_threads();
  p.out[threadIdx.x] = 1;
}

void exited_thread() {
  std::vector<float> out(kThreads);
  launch(exited_thread_kernel, one_block(kThreads), {nullptr, out.data()});
}
const Register r5("bug thread exits before the barrier", exited_thread);

// --- one warp goes through the loop once more than the others
// -------------------------------------

__global__ void uneven_loop_kernel(const __grid_constant__ InOut p) {
  const int rounds = threadIdx.x < 32 ? 3 : 2;
  for (int i = 0; i < rounds; ++i) ptx::sync_threads();
  p.out[threadIdx.x] = 1;
}

void uneven_loop() {
  std::vector<float> out(kThreads);
  launch(uneven_loop_kernel, one_block(kThreads), {nullptr, out.data()});
}
const Register r6("bug one warp meets one barrier more", uneven_loop);

// --- named barriers
// -------------------------------------------------------------------------------

__global__ void named_barrier_count_kernel(const __grid_constant__ InOut) {
  ptx::bar_sync(1, threadIdx.x < 64 ? 64 : 128);
}

void named_barrier_count() {
  launch(named_barrier_count_kernel, one_block(kThreads), {nullptr, nullptr});
}
const Register r7("bug named barrier with two counts", named_barrier_count);

__global__ void named_barrier_leftover_kernel(const __grid_constant__ InOut) {
  if (threadIdx.x < 32) ptx::bar_arrive(2, 64);
}

void named_barrier_leftover() {
  launch(named_barrier_leftover_kernel, one_block(kThreads), {nullptr, nullptr});
}
const Register r8("bug arrival nobody waits for", named_barrier_leftover);

// The consumer waits at barrier 3, the producer arrives at 4.
__global__ void named_barrier_deadlock_kernel(const __grid_constant__ InOut) {
  if (threadIdx.x < 32) {
    ptx::bar_sync(3, 64);
  } else {
    ptx::bar_sync(4, 64);
  }
}

void named_barrier_deadlock() {
  launch(named_barrier_deadlock_kernel, one_block(64), {nullptr, nullptr});
}
const Register r9("bug warps wait at two named barriers", named_barrier_deadlock);

}  // namespace
}  // namespace honesty
