// Wrong launches, and code that takes an approximation for exact.
#include "bugs/cases.h"

namespace honesty {
namespace {

__global__ void empty_kernel(const __grid_constant__ InOut) {}

void launch_with(dim3 grid, dim3 block, int smem_bytes = 0) {
  launch(empty_kernel, {.grid = grid, .block = block, .smem_bytes = smem_bytes},
         {nullptr, nullptr});
}

const Register r1("bug grid.y beyond 65535", [] { launch_with(dim3(1, 65536), dim3(32)); });
const Register r2("bug empty grid", [] { launch_with(dim3(0), dim3(32)); });
const Register r3("bug block of 1056 threads", [] { launch_with(dim3(1), dim3(33, 32)); });
const Register r4("bug more shared memory than the GPU has",
                  [] { launch_with(dim3(1), dim3(32), 228 * 1024); });

__global__ void reciprocal_kernel(const __grid_constant__ InOut p) {
  p.out[threadIdx.x] = p.in[threadIdx.x] * ptx::rcp(p.in[threadIdx.x]);
}

void exact_reciprocal() {
  const std::vector<float> in = counting(33);
  std::vector<float> out(32);
  launch(reciprocal_kernel, one_block(32), {in.data() + 1, out.data()});
  expect_equal(out, std::vector<float>(32, 1.0f));
}
const Register r5("bug approximation taken for exact", exact_reciprocal);

__global__ void flush_kernel(const __grid_constant__ InOut p) { p.out[0] = ptx::rsqrt(p.in[0]); }

void subnormal_rsqrt() {
  const std::vector<float> in = {1e-40f};
  std::vector<float> out(1);
  launch(flush_kernel, one_block(1), {in.data(), out.data()});
  expect(std::isfinite(out[0]), "rsqrt of a subnormal is infinite");
}
const Register r6("bug rsqrt of a subnormal", subnormal_rsqrt);

struct Tile {
  uint32_t* words;

  template <class Arena>
  static constexpr Tile take_from(Arena& arena) {
    return {arena.template take<uint32_t, 32>()};
  }
};

__global__ void stmatrix_kernel(const __grid_constant__ InOut) {
  SharedArena arena;
  const auto tile = Tile::take_from(arena);
  const uint32_t value[1] = {threadIdx.x};
  ptx::stmatrix_x1(ptx::smem_addr(tile.words + threadIdx.x % 8 * 4), value);
}

void stmatrix() {
  launch(stmatrix_kernel, one_block(32, shared_bytes<Tile>()), {nullptr, nullptr});
}
const Register r7("stmatrix, which sm_80 lacks", stmatrix);

}  // namespace
}  // namespace honesty
