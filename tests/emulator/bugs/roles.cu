// Warps with roles of their own: registers that move between them, values handed over by mbarriers,
// releases.
#include "bugs/cases.h"
#include "common/ptx_sm90.cuh"

namespace honesty {
namespace {

// --- registers
// -------------------------------------------------------------------------------------

template <int kFewer, int kMore>
__global__ void registers_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<kFewer>();
  } else {
    ptx::setmaxnreg_inc<kMore>();
    p.out[threadIdx.x] = 1;
  }
}

template <int kFewer, int kMore>
void registers() {
  std::vector<float> out(384);
  launch(registers_kernel<kFewer, kMore>, one_block(384), {nullptr, out.data()});
}
const Register r1("ok registers of three warpgroups", registers<24, 240>);
const Register r2("bug more registers than the block has", registers<40, 240>);
const Register r3("bug setmaxnreg the wrong way", registers<176, 240>);

__global__ void half_a_warpgroup_kernel(const __grid_constant__ InOut) {
  if (threadIdx.x < 64) ptx::setmaxnreg_dec<24>();
}

void half_a_warpgroup() { launch(half_a_warpgroup_kernel, one_block(384), {nullptr, nullptr}); }
const Register r4("bug setmaxnreg in half a warpgroup", half_a_warpgroup);

__global__ void one_lane_elects_kernel(const __grid_constant__ InOut p) {
  if (threadIdx.x < 16 && ptx::elect_one()) p.out[0] = 1;
}

void one_lane_elects() {
  std::vector<float> out(1);
  launch(one_lane_elects_kernel, one_block(32), {nullptr, out.data()});
}
const Register r5("bug elect_one in half a warp", one_lane_elects);

// --- plain values through an mbarrier
// --------------------------------------------------------------

constexpr int kRounds = 5;
constexpr int kReaders = 6;  // warps

struct Handover {
  float* values;    // [32], by warp 0
  uint64_t* full;   // warp 0 has written
  uint64_t* empty;  // the readers have read

  template <class Arena>
  static constexpr Handover take_from(Arena& arena) {
    float* values = arena.template take<float, 32>();
    uint64_t* full = arena.template take<uint64_t, 1>();
    return {values, full, arena.template take<uint64_t, 1>()};
  }
};

enum class Reader : uint8_t { kRight, kDoesNotWait, kReleasesForAll, kLaneReleases };

// Warp 0 writes, the others sum what they read. Lane 0 of each warp releases it, or of one alone.
template <Reader kReader>
__global__ void handover_kernel(const __grid_constant__ InOut p) {
  SharedArena arena;
  const auto shared = Handover::take_from(arena);
  const uint32_t full = ptx::smem_addr(shared.full);
  const uint32_t empty = ptx::smem_addr(shared.empty);
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, kReader == Reader::kReleasesForAll ? 1 : kReaders);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  float sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    if (tid < 32) {
      ptx::mbarrier_wait(empty, i % 2 ^ 1);
      shared.values[tid] = p.in[i * 32 + tid];
      ptx::mbarrier_arrive(full);
      continue;
    }
    if (kReader != Reader::kDoesNotWait) ptx::mbarrier_wait(full, i % 2);
    sum += shared.values[31 - tid % 32];
    if (kReader != Reader::kLaneReleases) ptx::sync_warp();
    const bool releases = kReader != Reader::kReleasesForAll || tid < 64;
    const int lane = kReader == Reader::kLaneReleases && i % 2 == 1 ? 31 : 0;
    if (tid % 32 == lane && releases) ptx::mbarrier_arrive(empty);
  }
  p.out[tid] = sum;
}

template <Reader kReader>
void handover() {
  constexpr int kThreads = 32 * (1 + kReaders);
  const std::vector<float> in = counting(kRounds * 32);
  std::vector<float> out(kThreads), wanted(kThreads, 0.0f);
  for (int tid = 32; tid < kThreads; ++tid) {
    for (int i = 0; i < kRounds; ++i) wanted[tid] += in[i * 32 + 31 - tid % 32];
  }
  launch(handover_kernel<kReader>, one_block(kThreads, shared_bytes<Handover>()),
         {in.data(), out.data()});
  expect_equal(out, wanted);
}
const Register h1("ok values handed over by mbarriers", handover<Reader::kRight>);
const Register h2("bug values read without waiting", handover<Reader::kDoesNotWait>);
const Register h3("bug one warp releases for all", handover<Reader::kReleasesForAll>);
const Register h4("bug one lane releases for a warp", handover<Reader::kLaneReleases>);

}  // namespace
}  // namespace honesty
