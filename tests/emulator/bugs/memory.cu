// Wrong kernels: shared and global memory, addresses, races.
#include "bugs/cases.h"

namespace honesty {
namespace {

constexpr int kThreads = 64;

// --- shared memory
// --------------------------------------------------------------------------------

struct TwoArrays {
  float* first;
  float* second;

  template <class Arena>
  static constexpr TwoArrays take_from(Arena& arena) {
    return {arena.template take<float, kThreads>(), arena.template take<float, kThreads>()};
  }
};

__global__ void uninitialised_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kThreads>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  if (tid != 9) shared.values[tid] = 0;
  ptx::sync_threads();
  p.out[tid] = shared.values[tid];
}

void uninitialised() {
  std::vector<float> out(kThreads);
  launch(uninitialised_kernel, one_block(kThreads, shared_bytes<Floats<kThreads>>()),
         {nullptr, out.data()});
  expect_equal(out, std::vector<float>(kThreads, 0.0f));
}
const Register r1("bug uninitialised shared read", uninitialised);

__global__ void read_past_end_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Floats<kThreads>::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  shared.values[tid] = 1;
  ptx::sync_threads();
  p.out[tid] = shared.values[tid + 1] > 0 ? 1.0f : 0.0f;
}

void read_past_end() {
  std::vector<float> out(kThreads);
  launch(read_past_end_kernel, one_block(kThreads, shared_bytes<Floats<kThreads>>()),
         {nullptr, out.data()});
}
const Register r2("bug shared read past the end", read_past_end);

__global__ void write_past_end_kernel(const __grid_constant__ InOut) {
  SharedArena arena;
  const auto shared = Floats<kThreads>::take_from(arena);
  shared.values[threadIdx.x + 1] = 1;
}

void write_past_end() {
  launch(write_past_end_kernel, one_block(kThreads, shared_bytes<Floats<kThreads>>()),
         {nullptr, nullptr});
}
const Register r3("bug shared write past the end", write_past_end);

// On a GPU the second array follows the first without a gap, and nothing would show.
__global__ void into_neighbour_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = TwoArrays::take_from(arena);
  const int tid = static_cast<int>(threadIdx.x);
  shared.first[tid] = 1;
  shared.second[tid] = 2;
  ptx::sync_threads();
  p.out[tid] = shared.first[tid + 32];
}

void into_neighbour() {
  std::vector<float> out(kThreads), wanted(kThreads, 1.0f);
  for (int i = 32; i < kThreads; ++i) wanted[i] = 2;
  launch(into_neighbour_kernel, one_block(kThreads, shared_bytes<TwoArrays>()),
         {nullptr, out.data()});
  expect_equal(out, wanted);
}
const Register r4("bug shared index into the neighbour array", into_neighbour);

__global__ void shared_total_kernel(const __grid_constant__ InOut) {
  SharedArena arena;
  TwoArrays::take_from(arena);
}

void shared_too_small() {
  launch(shared_total_kernel, one_block(kThreads, shared_bytes<Floats<kThreads>>()),
         {nullptr, nullptr});
}
const Register r5("bug shared memory smaller than taken", shared_too_small);

void shared_too_large() {
  launch(shared_total_kernel, one_block(kThreads, shared_bytes<TwoArrays>() + 16),
         {nullptr, nullptr});
}
const Register r6("bug shared memory larger than taken", shared_too_large);

// --- global memory
// --------------------------------------------------------------------------------

__global__ void misaligned_kernel(const __grid_constant__ InOut p) {
  const auto word = ptx::load_word<uint4>(p.in + 1 + 4 * threadIdx.x);
  ptx::store_word(p.out + 4 * threadIdx.x, word);
}

void misaligned() {
  const std::vector<float> in = counting(4 * kThreads + 4);
  std::vector<float> out(4 * kThreads);
  launch(misaligned_kernel, one_block(kThreads), {in.data(), out.data()});
}
const Register r7("bug misaligned vector access", misaligned);

__global__ void global_past_end_kernel(const __grid_constant__ InOut p) {
  p.out[threadIdx.x] = p.in[threadIdx.x + 1];
}

void global_past_end() {
  const std::vector<float> in = counting(kThreads);
  std::vector<float> out(kThreads);
  launch(global_past_end_kernel, one_block(kThreads), {in.data(), out.data()});
}
const Register r8("bug global read past the end", global_past_end);

struct Strided {
  const float* in;
  float* out;
  int row;
  int stride;
};

__global__ void int32_offset_kernel(const __grid_constant__ Strided p) {
  p.out[0] = p.in[p.row * p.stride];  // 3 * 2^30 does not fit
}

void int32_offset() {
  const std::vector<float> in = counting(4);
  std::vector<float> out(4);
  launch(int32_offset_kernel, one_block(1), {in.data(), out.data(), 3, 1 << 30});
}
const Register r9("bug int32 offset", int32_offset);

__global__ void wild_pointer_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x == 3) p.out[0] = 1;
}

void wild_pointer() {
  launch(wild_pointer_kernel, one_block(kThreads), {nullptr, reinterpret_cast<float*>(0x40)});
}
const Register r10("bug wild pointer", wild_pointer);

__global__ void deep_stack_kernel(const __grid_constant__ InOut p) {
  volatile float local[64 * 1024];
  for (int i = 0; i < 64 * 1024; ++i) local[i] = p.in[i % 4];
  p.out[0] = local[7];
}

void deep_stack() {
  const std::vector<float> in = counting(4);
  std::vector<float> out(4);
  launch(deep_stack_kernel, one_block(1), {in.data(), out.data()});
}
const Register r11("bug more local memory than a stack holds", deep_stack);

// --- races
// ----------------------------------------------------------------------------------------

__global__ void racing_blocks_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x == 0) p.out[0] += p.in[blockIdx.x];
}

void racing_blocks() {
  const std::vector<float> in = counting(8);
  std::vector<float> out(1);
  launch(racing_blocks_kernel, {.grid = dim3(8), .block = dim3(32)}, {in.data(), out.data()});
  expect_equal(out, {28});
}
const Register r12("bug two blocks race", racing_blocks);

__global__ void racing_threads_kernel(const __grid_constant__ InOut p) { p.out[0] += 1; }

void racing_threads() {
  std::vector<float> out(1);
  launch(racing_threads_kernel, one_block(kThreads), {nullptr, out.data()});
  expect_equal(out, {kThreads});
}
const Register r13("bug counter without atomics", racing_threads);

}  // namespace
}  // namespace honesty
