// Correct kernels that a careless emulator would refuse, hang on, or get wrong.
#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kWarp = 32;

// --- a producer warp and a consumer warp hand a buffer to and fro with named barriers
// -------------

__global__ void hand_over_kernel(const __grid_constant__ InOut p) {
  constexpr int kFull = 1, kEmpty = 2, kRounds = 5;
  SharedArena arena;
  const auto shared = Floats<kWarp>::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (threadIdx.x < kWarp) {
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0) ptx::bar_sync(kEmpty, 2 * kWarp);
      shared.values[lane] = p.in[lane] + static_cast<float>(round);
      ptx::bar_arrive(kFull, 2 * kWarp);
    }
  } else {
    float sum = 0;
    for (int round = 0; round < kRounds; ++round) {
      ptx::bar_sync(kFull, 2 * kWarp);
      sum += shared.values[kWarp - 1 - lane];
      if (round + 1 < kRounds) ptx::bar_arrive(kEmpty, 2 * kWarp);
    }
    p.out[lane] = sum;
  }
}

void hand_over() {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> out(kWarp), wanted(kWarp);
  for (int i = 0; i < kWarp; ++i) wanted[i] = 5 * in[kWarp - 1 - i] + 10;
  launch(hand_over_kernel, one_block(2 * kWarp, shared_bytes<Floats<kWarp>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r1("ok producer and consumer with named barriers", hand_over);

// --- the two halves of a warp are in different collectives at once
// --------------------------------

__global__ void half_warps_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  float value = p.in[lane];
  if (lane < 16) {
    for (int step = 8; step > 0; step /= 2) value += ptx::shfl_xor(value, step, 16, 0x0000ffffu);
  } else {
    value = ptx::shfl(value, 16, kWarp, 0xffff0000u);
    ptx::sync_warp(0xffff0000u);
  }
  ptx::sync_warp();
  p.out[lane] = value;
}

void half_warps() {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> out(kWarp), wanted(kWarp, 120.0f);
  for (int i = 16; i < kWarp; ++i) wanted[i] = 16;
  launch(half_warps_kernel, one_block(kWarp), {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r2("ok half warps in different collectives", half_warps);

// --- whole warps leave early, the others work on with warp-level steps only ----------------------

__global__ void early_warps_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x >= 2 * kWarp) return;
  SharedArena arena;
  const auto shared = Floats<2 * kWarp>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  shared.values[tid] = p.in[tid];
  ptx::sync_warp();
  p.out[tid] = shared.values[tid ^ 31];
}

void early_warps() {
  const std::vector<float> in = counting(2 * kWarp);
  std::vector<float> out(2 * kWarp), wanted(2 * kWarp);
  for (int i = 0; i < 2 * kWarp; ++i) wanted[i] = in[i ^ 31];
  launch(early_warps_kernel, one_block(4 * kWarp, shared_bytes<Floats<2 * kWarp>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r3("ok warps leave early", early_warps);

// --- a partial warp with the mask of the lanes it has
// ---------------------------------------------

__global__ void partial_warp_kernel(const __grid_constant__ InOut p) {
  const int tid = static_cast<int>(threadIdx.x);
  const unsigned mask = tid < kWarp ? ptx::kFullMask : 0x0000ffffu;
  ptx::sync_threads();
  p.out[tid] = ptx::shfl_xor(p.in[tid], 8, kWarp, mask);
}

void partial_warp() {
  const std::vector<float> in = counting(48);
  std::vector<float> out(48), wanted(48);
  for (int i = 0; i < 48; ++i) wanted[i] = in[i ^ 8];
  launch(partial_warp_kernel, one_block(48), {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r4("ok block of one and a half warps", partial_warp);

// --- a loop whose length the warp agrees on by vote
// -----------------------------------------------

__global__ void vote_loop_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  int left = lane;
  int rounds = 0;
  while (ptx::any(left > 0)) {
    left -= 3;
    ++rounds;
  }
  const bool same = ptx::all(ptx::match_any(rounds) == ptx::kFullMask);
  const int most = ptx::reduce_max(lane * (lane % 2 == 0 ? 1 : -1));
  const unsigned sum = ptx::reduce_add(static_cast<unsigned>(lane));
  const unsigned even = ptx::ballot(lane % 2 == 0);
  const bool right = same && rounds == 11 && most == 30 && sum == 496 && even == 0x55555555u &&
                     ptx::reduce_min(lane - 40) == -40 && ptx::reduce_min(40u + lane) == 40;
  p.out[lane] = right ? 1.0f : 0.0f;
}

void vote_loop() {
  std::vector<float> out(kWarp);
  launch(vote_loop_kernel, one_block(kWarp), {nullptr, out.data()});
  expect_equal(out, std::vector<float>(kWarp, 1.0f));
}
const Register r5("ok votes and reductions steer a loop", vote_loop);

// --- shuffles at the edges of their segments
// ------------------------------------------------------

__global__ void shuffle_edges_kernel(const __grid_constant__ InOut p) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto value = static_cast<double>(p.in[lane]);
  const double up = ptx::shfl_up(value, 3, 8);      // lanes 0-2 of each eight keep their own
  const double down = ptx::shfl_down(value, 3, 8);  // lanes 5-7 keep theirs
  const double fixed = ptx::shfl(value, 10, 8);     // lane 2 of each eight
  p.out[lane] = static_cast<float>(10000 * up + 100 * down + fixed);
}

void shuffle_edges() {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> out(kWarp), wanted(kWarp);
  for (int i = 0; i < kWarp; ++i) {
    const int inside = i % 8, segment = i - inside;
    const int up = inside >= 3 ? i - 3 : i;
    const int down = inside < 5 ? i + 3 : i;
    wanted[i] = static_cast<float>(10000 * up + 100 * down + segment + 2);
  }
  launch(shuffle_edges_kernel, one_block(kWarp), {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r6("ok shuffles at segment edges", shuffle_edges);

// --- blocks add to one histogram; one lane adds for all lanes of the same bin
// ---------------------

struct Histogram {
  int* bins;  // [5]
  float* total;
};

__global__ void histogram_kernel(const __grid_constant__ Histogram p) {
  const int number = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int bin = number % 5;
  const unsigned peers = ptx::match_any(bin);
  const bool is_leader = __builtin_ctz(peers) == static_cast<int>(threadIdx.x) % kWarp;
  if (is_leader) ptx::atomic_add(p.bins + bin, __builtin_popcount(peers));
  ptx::atomic_add(p.total, 1.0f);
}

void histogram() {
  std::vector<int> bins(5);
  float total = 0;
  launch(histogram_kernel, {.grid = dim3(7), .block = dim3(64)}, {bins.data(), &total});
  expect(bins == std::vector<int>({90, 90, 90, 89, 89}), "histogram");
  expect(total == 448, "total");
}
const Register r7("ok atomics across blocks", histogram);

// --- one warp waits for a flag that another one sets
// ----------------------------------------------

__global__ void flag_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  auto* flag = arena.take<unsigned, 1>();
  if (threadIdx.x == 0) ptx::atomic_exch(flag, 0u);
  ptx::sync_threads();
  if (threadIdx.x < kWarp) {
    while (ptx::atomic_add(flag, 0u) < kWarp) {
    }
    p.out[threadIdx.x] = 1;
  } else {
    ptx::atomic_add(flag, 1u);
  }
}

void flag() {
  std::vector<float> out(kWarp);
  launch(flag_kernel, one_block(2 * kWarp, 4), {nullptr, out.data()});
  expect_equal(out, std::vector<float>(kWarp, 1.0f));
}
const Register r8("ok spinning on an atomic flag", flag);

// --- shared memory used again as another type
// -----------------------------------------------------

__global__ void reuse_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<2 * kWarp>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  shared.values[tid] = p.in[tid];
  ptx::sync_threads();
  const float other = shared.values[(tid + 33) % (2 * kWarp)];
  ptx::sync_threads();
  auto* words = reinterpret_cast<uint32_t*>(shared.values);
  words[tid ^ 1] = static_cast<uint32_t>(other);
  ptx::sync_threads();
  p.out[tid] = static_cast<float>(words[tid]);
}

void reuse() {
  const std::vector<float> in = counting(2 * kWarp);
  std::vector<float> out(2 * kWarp), wanted(2 * kWarp);
  for (int i = 0; i < 2 * kWarp; ++i) wanted[i] = in[((i ^ 1) + 33) % (2 * kWarp)];
  launch(reuse_kernel, one_block(2 * kWarp, shared_bytes<Floats<2 * kWarp>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r9("ok shared memory reused as another type", reuse);

// --- one launch reads what the one before it wrote, after waiting for it
// --------------------------

__global__ void dependent_kernel(const __grid_constant__ InOut p) {
  ptx::griddep_wait();
  const auto word = ptx::load_word<uint32_t>(p.in + threadIdx.x);
  ptx::griddep_launch_dependents();
  ptx::store_word(p.out + kWarp - 1 - threadIdx.x, word);
}

void dependent_launches() {
  const std::vector<float> in = counting(kWarp);
  std::vector<float> between(kWarp), out(kWarp);
  LaunchConfig config = one_block(kWarp);
  config.pdl = true;
  launch(dependent_kernel, config, {in.data(), between.data()});
  launch(dependent_kernel, config, {between.data(), out.data()});
  expect_equal(out, in);
}
const Register r10("ok dependent launches", dependent_launches);

// --- rows past the end are filled with zeros by the copy
// ------------------------------------------

__global__ void zero_fill_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<4 * kWarp>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  const bool valid = tid < 20;
  ptx::cp_async_16(ptx::smem_addr(shared.values + 4 * tid), valid ? p.in + 4 * tid : p.in, valid);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  for (int i = 0; i < 4; ++i) p.out[i * kWarp + tid] = shared.values[i * kWarp + tid];
}

void zero_fill() {
  const std::vector<float> in = counting(80);
  std::vector<float> out(128, -1.0f), wanted(128, 0.0f);
  for (int i = 0; i < 80; ++i) wanted[i] = in[i];
  launch(zero_fill_kernel, one_block(kWarp, shared_bytes<Floats<4 * kWarp>>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register r11("ok copies that fill with zeros", zero_fill);

// --- a three-dimensional block in a three-dimensional grid
// ----------------------------------------

__global__ void dimensions_kernel(const __grid_constant__ InOut p) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  p.out[number * threads + thread] = static_cast<float>(number * threads + thread);
  ptx::sync_threads();
}

void dimensions() {
  const int count = 2 * 3 * 4 * 5 * 6 * 7;
  std::vector<float> out(count, -1.0f);
  launch(dimensions_kernel, {.grid = dim3(2, 3, 4), .block = dim3(5, 6, 7)}, {nullptr, out.data()});
  expect_equal(out, counting(count));
}
const Register r12("ok three-dimensional grid and block", dimensions);

}  // namespace
}  // namespace honesty
