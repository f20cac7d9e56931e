// Wrong kernels: warp collectives without all their lanes, and what lockstep would have forgiven.
#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kWarp = 32;

void run_warp(void (*kernel)(InOut), int smem_bytes = 0) {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> out(kWarp);
  launch(kernel, one_block(kWarp, smem_bytes), {in.data(), out.data()});
}

// --- lanes missing
// --------------------------------------------------------------------------------

__global__ void missing_lane_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  float value = p.in[lane];
  if (lane != 5) value += ptx::shfl_xor(value, 1);
  p.out[lane] = value;
}

void missing_lane() { run_warp(missing_lane_kernel); }
const Register r1("bug lane missing from a collective", missing_lane);

__global__ void lonely_lane_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x == 0) p.out[0] = ptx::shfl(p.in[0], 0);
  ptx::sync_threads();
}

void lonely_lane() { run_warp(lonely_lane_kernel); }
const Register r2("bug one lane alone in a collective", lonely_lane);

__global__ void two_places_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  float value = p.in[lane];
  if (lane % 2 == 0) {
    value = ptx::shfl_xor(value, 1);
  } else {
    value = ptx::shfl_xor(value, 1);
  }
  p.out[lane] = value;
}

void two_places() { run_warp(two_places_kernel); }
const Register r3("bug collective at two places", two_places);

__global__ void wrong_mask_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  p.out[lane] = ptx::shfl_xor(p.in[lane], 1, kWarp, 0x0000ffffu);
}

void wrong_mask() { run_warp(wrong_mask_kernel); }
const Register r4("bug lane outside its own mask", wrong_mask);

__global__ void source_outside_mask_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) p.out[lane] = ptx::shfl(p.in[lane], 20, kWarp, 0x0000ffffu);
}

void source_outside_mask() { run_warp(source_outside_mask_kernel); }
const Register r5("bug shuffle from a lane outside the mask", source_outside_mask);

// A block of 48 threads: the second warp has 16 lanes, the full mask names 32.
__global__ void partial_warp_kernel(const __grid_constant__ InOut p) {
  p.out[threadIdx.x] = ptx::shfl_xor(p.in[threadIdx.x], 1);
}

void partial_warp() {
  const std::vector<float> in = counting(48);
  std::vector<float> out(48);
  launch(partial_warp_kernel, one_block(48), {in.data(), out.data()});
}
const Register r6("bug full mask in a partial warp", partial_warp);

// --- order of memory that only lockstep would give
// ------------------------------------------------

__global__ void lockstep_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kWarp>::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  shared.values[lane] = p.in[lane];
  p.out[lane] = shared.values[lane ^ 1];
}

void lockstep() {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> out(kWarp), wanted(kWarp);
  for (int i = 0; i < kWarp; ++i) wanted[i] = in[i ^ 1];
  launch(lockstep_kernel, one_block(kWarp, shared_bytes<Floats<kWarp>>()), {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r7("bug lanes taken to run in lockstep", lockstep);

// A shuffle makes lanes wait for each other but orders no memory.
__global__ void shuffle_as_barrier_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kWarp>::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  shared.values[lane] = p.in[lane];
  const float zero = ptx::shfl(0.0f, 0);
  p.out[lane] = shared.values[lane ^ 1] + zero;
}

void shuffle_as_barrier() { run_warp(shuffle_as_barrier_kernel, shared_bytes<Floats<kWarp>>()); }
const Register r8("bug shuffle taken for a barrier", shuffle_as_barrier);

}  // namespace
}  // namespace honesty
