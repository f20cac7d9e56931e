// The second half of decode: a row whose keys were split among blocks is put together from what
// each split found.
//
// A block takes a row. Its warps share the splits, each adding up its own in ascending order; which
// warp takes which depends on the split's absolute number alone, so that splits of which the row
// sees nothing leave no trace in its bits, whether they exist or not.

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/attention/decode_splits.cuh"

namespace exafuse {
namespace {

inline constexpr int kWarps = 4;
inline constexpr int kBlockThreads = kWarps * ptx::kWarpSize;
inline constexpr int kLaneColumns = 4;  // of the head dimension: 32 lanes hold all of it
static_assert(kLaneColumns * ptx::kWarpSize >= kMaxHeadDim);

struct CombineShared {
  float* values;  // [kWarps, kMaxHeadDim]
  float* sums;    // [kWarps]

  template <class Arena>
  static constexpr CombineShared take_from(Arena& arena) {
    return {arena.template take<float, kWarps * kMaxHeadDim>(),
            arena.template take<float, kWarps>()};
  }
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    combine_kernel(const __grid_constant__ DecodeParams p) {
  SharedArena arena;
  const CombineShared shared = CombineShared::take_from(arena);
  const AttentionParams& call = p.call;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp_id = tid / ptx::kWarpSize;
  const int lane_id = tid % ptx::kWarpSize;
  const int head = static_cast<int>(blockIdx.x % static_cast<unsigned>(call.num_heads));
  const unsigned token = blockIdx.x / static_cast<unsigned>(call.num_heads);
  const int query = static_cast<int>(token % static_cast<unsigned>(call.seqlen_q));

  ptx::griddep_wait();
  const Sequence sequence(call, static_cast<int>(token / static_cast<unsigned>(call.seqlen_q)));
  const SplitPlan plan(call, sequence);
  ptx::griddep_launch_dependents();
  // One split was written out at once.
  if (query >= sequence.seqlen_q() || plan.count <= 1) return;
  const KeyRange seen = sequence.visible(query);
  const int first = seen.begin / plan.size;
  const int end = seen.empty() ? first : (seen.end - 1) / plan.size + 1;
  const int64_t row = partial_row(call, sequence, query, head);
  const auto slot_of = [&](int split) { return (split - plan.first) * p.partials.rows + row; };

  float max_score = kMasked;
  for (int split = first + lane_id; split < end; split += ptx::kWarpSize) {
    max_score = ptx::max(max_score, p.partials.stats[slot_of(split)].x);
  }
#pragma unroll
  for (int offset = ptx::kWarpSize / 2; offset > 0; offset /= 2) {
    max_score = ptx::max(max_score, ptx::shfl_xor(max_score, offset));
  }

  const int column = lane_id * kLaneColumns;
  float values[kLaneColumns] = {};
  float sum = 0;
#pragma unroll 8
  for (int split = first + ((warp_id - first) & (kWarps - 1)); split < end; split += kWarps) {
    const float2 stats = p.partials.stats[slot_of(split)];
    const float factor = softmax_rescale(stats.x, max_score, call.scale_log2);
    sum = ptx::fma(stats.y, factor, sum);
    if (column < call.head_dim) {
      const auto word =
          ptx::load_word<uint4>(p.partials.values + slot_of(split) * call.head_dim + column);
      values[0] = ptx::fma(std::bit_cast<float>(word.x), factor, values[0]);
      values[1] = ptx::fma(std::bit_cast<float>(word.y), factor, values[1]);
      values[2] = ptx::fma(std::bit_cast<float>(word.z), factor, values[2]);
      values[3] = ptx::fma(std::bit_cast<float>(word.w), factor, values[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    shared.values[warp_id * kMaxHeadDim + column + i] = values[i];
  }
  if (lane_id == 0) shared.sums[warp_id] = sum;
  ptx::sync_threads();

  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.sums[w];
  const int dim = tid * 2;
  if (dim < call.head_dim) {
    float found[2] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      found[0] += shared.values[w * kMaxHeadDim + dim];
      found[1] += shared.values[w * kMaxHeadDim + dim + 1];
    }
    write_row<T>(call, sequence.query_offset(call.out_strides, query, head),
                 sequence.query_offset(call.lse_strides, query, head), dim, found, max_score,
                 total);
  }
}

}  // namespace

void launch_combine(const DecodeParams& params, Stream stream) {
  const LaunchConfig config{
      .grid = dim3(
          grid_size(int64_t{params.call.batch} * params.call.seqlen_q * params.call.num_heads)),
      .block = dim3(kBlockThreads),
      .smem_bytes = shared_bytes<CombineShared>(),
      .stream = stream,
      .pdl = true,
  };
  if (params.call.dtype == DType::kBFloat16) {
    launch(combine_kernel<__nv_bfloat16>, config, params);
  } else {
    launch(combine_kernel<__half>, config, params);
  }
}

}  // namespace exafuse
