#include "bugs/cases.h"

namespace honesty {
namespace {

using namespace exafuse;

struct Params { const float* in; float* out; };

struct Scratch {
  float* x;
  template <class Arena>
  __host__ __device__ static constexpr Scratch take_from(Arena& arena) {
    return {arena.template take<float, 256>()};
  }
};

__global__ void __launch_bounds__(256) toy_kernel(const __grid_constant__ Params p) {
  SharedArena arena;
  Scratch s = Scratch::take_from(arena);
  const int tid = threadIdx.x;
  s.x[tid] = p.in[blockIdx.x * 256 + tid];
  ptx::sync_threads();
  float v = s.x[255 - tid];
  for (int m = 16; m > 0; m /= 2) v += ptx::shfl_xor(v, m);
  p.out[blockIdx.x * 256 + tid] = v;
}

void toy() {
  std::vector<float> in(2560), out(2560);
  for (int i = 0; i < 2560; ++i) in[i] = i % 7;
  launch(toy_kernel, {.grid = dim3(10), .block = dim3(256), .smem_bytes = shared_bytes<Scratch>()}, {in.data(), out.data()});
  float sum = 0; for (int i = 0; i < 32; ++i) sum += in[255 - i];
  expect(out[0] == sum, "sum");
}
const Register r("toy", toy);

}  // namespace
}  // namespace honesty
