// Wrong kernels: asynchronous copies and dependent launches.
#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kThreads = 32;
constexpr int kTile = 4 * kThreads;  // floats that the block copies at once, 16 bytes a thread
constexpr int kTiles = 6;

__device__ void copy_tile(float* shared, const float* global) {
  const int first = 4 * static_cast<int>(threadIdx.x);
  ptx::cp_async_16(ptx::smem_addr(shared + first), global + first);
  ptx::cp_async_commit();
}

// Sums all tiles with two buffers. kWait: groups that may be in flight when a tile is read; 1 is
// right. kBarrier: whether a barrier keeps the next copy from the buffer that slower threads still
// read.
template <int kWait, bool kBarrier>
__global__ void pipeline_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<2 * kTile>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  float sum = 0;
  copy_tile(shared.values, p.in);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) {
      copy_tile(shared.values + (tile + 1) % 2 * kTile, p.in + (tile + 1) * kTile);
    } else {
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<kWait>();
    ptx::sync_threads();
    for (int i = 0; i < 4; ++i) sum += shared.values[tile % 2 * kTile + (4 * tid + i + 37) % kTile];
    if (kBarrier) ptx::sync_threads();
  }
  ptx::cp_async_wait<0>();
  p.out[tid] = sum;
}

template <int kWait, bool kBarrier>
void pipeline() {
  const std::vector<float> in = counting(kTiles * kTile);
  std::vector<float> out(kThreads), wanted(kThreads, 0.0f);
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int tid = 0; tid < kThreads; ++tid) {
      for (int i = 0; i < 4; ++i) wanted[tid] += in[tile * kTile + (4 * tid + i + 37) % kTile];
    }
  }
  launch(pipeline_kernel<kWait, kBarrier>, one_block(kThreads, shared_bytes<Floats<2 * kTile>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r1("ok two-stage pipeline", pipeline<1, true>);
const Register r2("bug wait that lets one copy too many fly", pipeline<2, true>);
const Register r3("bug buffer refilled too early", pipeline<1, false>);

// The wait covers a thread's own copies only; the others' need the barrier as well.
__global__ void copy_without_barrier_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kTile>::take_from(arena);
  copy_tile(shared.values, p.in);
  ptx::cp_async_wait<0>();
  p.out[threadIdx.x] = shared.values[kTile - 1 - threadIdx.x];
}

void copy_without_barrier() {
  const std::vector<float> in = counting(kTile);
  std::vector<float> out(kThreads), wanted(kThreads);
  for (int i = 0; i < kThreads; ++i) wanted[i] = in[kTile - 1 - i];
  launch(copy_without_barrier_kernel, one_block(kThreads, shared_bytes<Floats<kTile>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r4("bug copy awaited without a barrier", copy_without_barrier);

__global__ void copy_at_exit_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kTile>::take_from(arena);
  copy_tile(shared.values, p.in);
}

void copy_at_exit() {
  const std::vector<float> in = counting(kTile);
  launch(copy_at_exit_kernel, one_block(kThreads, shared_bytes<Floats<kTile>>()),
         {in.data(), nullptr});
}
const Register r5("bug thread exits with a copy in flight", copy_at_exit);

__global__ void write_under_copy_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kTile>::take_from(arena);
  copy_tile(shared.values, p.in);
  shared.values[4 * threadIdx.x] = 0;
  ptx::cp_async_wait<0>();
}

void write_under_copy() {
  const std::vector<float> in = counting(kTile);
  launch(write_under_copy_kernel, one_block(kThreads, shared_bytes<Floats<kTile>>()),
         {in.data(), nullptr});
}
const Register r6("bug store into a copy in flight", write_under_copy);

__global__ void source_changes_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kTile>::take_from(arena);
  copy_tile(shared.values, p.out);
  p.out[4 * threadIdx.x] = -1;
  ptx::cp_async_wait<0>();
}

void source_changes() {
  std::vector<float> out = counting(kTile);
  launch(source_changes_kernel, one_block(kThreads, shared_bytes<Floats<kTile>>()),
         {nullptr, out.data()});
}
const Register r7("bug source of a copy changes in flight", source_changes);

__global__ void misaligned_copy_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kTile>::take_from(arena);
  ptx::cp_async_16(ptx::smem_addr(shared.values + 2), p.in);
}

void misaligned_copy() {
  const std::vector<float> in = counting(kTile);
  launch(misaligned_copy_kernel, one_block(1, shared_bytes<Floats<kTile>>()), {in.data(), nullptr});
}
const Register r8("bug copy to a misaligned shared address", misaligned_copy);

// --- dependent launch
// -----------------------------------------------------------------------------

template <bool kWait>
__global__ void dependent_kernel(const __grid_constant__ InOut p) {
  const uint32_t word = ptx::load_word<uint32_t>(p.in + threadIdx.x);
  if (kWait) ptx::griddep_wait();
  ptx::store_word(p.out + threadIdx.x, word);
}

__global__ void never_waits_kernel(const __grid_constant__ InOut) {}

template <class Kernel>
void launch_dependent(Kernel kernel) {
  const std::vector<float> in = counting(kThreads);
  std::vector<float> out(kThreads);
  LaunchConfig config = one_block(kThreads);
  config.pdl = true;
  launch(kernel, config, {in.data(), out.data()});
}

void touches_before_wait() { launch_dependent(dependent_kernel<true>); }
const Register r9("bug global memory before griddep_wait", touches_before_wait);

void never_waits() { launch_dependent(never_waits_kernel); }
const Register r10("bug dependent launch that never waits", never_waits);

}  // namespace
}  // namespace honesty
