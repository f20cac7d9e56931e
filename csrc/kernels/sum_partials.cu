// Sums the rows of a small matrix, for gradients of weights. A warp reads 32 neighbouring columns
// of every kWarps-th row; the warps' sums are added in shared memory. The order is a function of
// the number of parts alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "kernels/sum_partials.h"

namespace exafuse {
namespace {

inline constexpr int kWarps = 16;

template <class Value, class T>
struct SumParams {
  const Value* partials;  // [parts, columns]
  T* out;                 // [columns]
  int64_t parts;
  int columns;
};

template <class Value>
struct SumScratch {
  Value* warp_sums;  // [kWarps, 32]

  template <class Arena>
  static constexpr SumScratch take_from(Arena& arena) {
    return {arena.template take<Value, kWarps * ptx::kWarpSize>()};
  }
};

// Thread (lane, warp) of block b: column 32 b + lane, parts warp, warp + kWarps, ...
template <class Value, class T>
__global__ void __launch_bounds__(kWarps* ptx::kWarpSize, 1)
    sum_partials_kernel(const __grid_constant__ SumParams<Value, T> p) {
  SharedArena arena;
  const auto scratch = SumScratch<Value>::take_from(arena);
  const int lane = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * ptx::kWarpSize + lane;

  ptx::griddep_wait();
  Value sum = 0;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t part = warp; part < p.parts; part += kWarps) {
      sum += p.partials[part * p.columns + column];
    }
  }
  ptx::griddep_launch_dependents();
  scratch.warp_sums[warp * ptx::kWarpSize + lane] = sum;
  ptx::sync_threads();
  if (warp != 0 || column >= p.columns) return;
  for (int other = 1; other < kWarps; ++other) {
    sum += scratch.warp_sums[other * ptx::kWarpSize + lane];
  }
  p.out[column] = static_cast<T>(sum);
}

template <class Value, class T>
void launch_typed(const void* partials, int64_t parts, int columns, const Tensor& out,
                  Stream stream) {
  const LaunchConfig config{
      .grid = dim3(grid_size((columns + ptx::kWarpSize - 1) / ptx::kWarpSize)),
      .block = dim3(ptx::kWarpSize, kWarps),
      .smem_bytes = shared_bytes<SumScratch<Value>>(),
      .stream = stream,
      .pdl = true,
  };
  const SumParams<Value, T> params{
      .partials = static_cast<const Value*>(partials),
      .out = out.data_as<T>(),
      .parts = parts,
      .columns = columns,
  };
  launch(sum_partials_kernel<Value, T>, config, params);
}

}  // namespace

void launch_sum_partials(const void* partials, bool is_fp64, int64_t parts, int columns,
                         const Tensor& out, Stream stream) {
  if (is_fp64) return launch_typed<double, float>(partials, parts, columns, out, stream);
  dispatch_dtype(out.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_typed<float, T>(partials, parts, columns, out, stream);
  });
}

}  // namespace exafuse
