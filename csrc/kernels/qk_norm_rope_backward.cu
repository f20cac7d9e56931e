// Gradients of qk_norm_rope, per head of q and k; v is passed on:
//
// clang-format off
//   g        = the gradient rotated back: g[i] = grad[i] * cos[i] + grad[i + half] * sin[i]
//                                  g[i + half] = grad[i + half] * cos[i] - grad[i] * sin[i]
//   n        = x * r                   r = 1 / sqrt(mean(x^2) + eps) over the head, of the saved x
//   d_x      = r * (g * weight - n * mean(g * weight * n))          no weight: d_x = g, x unread
//   d_weight = the sum of g * n over all tokens and heads
// clang-format on
//
// A head belongs to 1 to 16 neighbouring lanes, a lane holds one vector of the first half and its
// partner of the second: as in qk_norm_rope.cu. A block of 128 threads walks through a part of the
// tokens and all their heads; each thread adds up what its columns give to the weights' gradients,
// the block adds up its threads and writes one row of the workspace for each weight, and a second
// launch adds up the rows. Who adds what, and in which order, follows from the shapes alone: no
// atomics, the same bits on every GPU in every run.

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/heads_backward_call.h"
#include "kernels/sum_partials.h"
#include "ops_backward.h"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 128;
inline constexpr int kBlocksPerSm = 4;     // a thread may use 128 registers then
inline constexpr int kMaxBlockDepth = 64;  // CUDA's limit for blockDim.z
inline constexpr int64_t kMaxParts = 1024;

enum Part { kQ, kK, kV, kNumParts };
inline constexpr int kNumWeights = 2;         // of q and of k
static_assert(kMaxHeadDim <= kBlockThreads);  // each column's sum is a thread's

// --- gradients of the heads ---------------------------------------------------------------------

// q, k or v: its gradient, the saved input, and where the input's gradient goes; each
// [num_tokens, num_heads, head_dim].
struct HeadsPart {
  const void* grad;
  const void* in;
  void* out;
  const void* weight;  // [head_dim], or null for no norm
  int64_t grad_token_stride;
  int64_t grad_head_stride;
  int64_t in_token_stride;
  int64_t in_head_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;
  int num_heads;  // 0: the part is absent
  bool weight_is_fp32;
};

struct HeadsParams {
  HeadsPart parts[kNumParts];
  const void* cos;  // [table_rows, head_dim / 2], or null for no rotation
  const void* sin;
  int64_t cos_stride;
  int64_t sin_stride;
  const int32_t* positions;  // [num_tokens]
  void* partials;            // [kNumWeights, parts, head_dim] of Compute<T>, or null
  int64_t num_tokens;
  int64_t tokens_per_part;  // a multiple of blockDim.z
  int32_t last_table_row;
  double eps;
  int head_dim;
  int num_heads;  // of all parts together
  bool table_is_fp32;
};

// What each thread of a block adds up for one weight, by column. A thread slot has a row, so all of
// them hold 128 lanes of two vectors at most.
template <class Value, int kElements>
struct HeadsScratch {
  Value* sums;  // [thread slots, head_dim]

  template <class Arena>
  static constexpr HeadsScratch take_from(Arena& arena) {
    return {arena.template take<Value, kBlockThreads * 2 * kElements>()};
  }
};

// Thread (x, y, z): x is the lane within a head, y the first of its heads, z the first of its
// tokens within the block's part.
template <class T, int kElements, bool kNorm, bool kWide>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm)
    heads_backward_kernel(const __grid_constant__ HeadsParams p) {
  using Value = Compute<T>;
  using Vector = Vec<T, kElements>;

  const int half = p.head_dim / 2;
  const int column = static_cast<int>(threadIdx.x) * kElements;
  const int64_t first_token = blockIdx.x * p.tokens_per_part;
  Value sums[kNumWeights][2 * kElements] = {};
  ptx::griddep_wait();

  // All threads take every step, for the collectives; those behind the last column, token or head
  // do nothing in it.
  for (int64_t step = 0; step < p.tokens_per_part; step += blockDim.z) {
    const int64_t token = first_token + step + threadIdx.z;
    const bool has_column = column < half && token < p.num_tokens;
    Value cos[kElements];
    Value sin[kElements];
    if (p.cos != nullptr && has_column) {
      const int32_t asked = ptx::ldg(p.positions + token);
      const int32_t position = asked < 0 ? 0 : asked > p.last_table_row ? p.last_table_row : asked;
      load_as_compute<kWide, T>(p.cos, p.table_is_fp32, position * p.cos_stride + column, cos);
      load_as_compute<kWide, T>(p.sin, p.table_is_fp32, position * p.sin_stride + column, sin);
    }
    for (int first_head = 0; first_head < p.num_heads; first_head += static_cast<int>(blockDim.y)) {
      int head = first_head + static_cast<int>(threadIdx.y);
      Part which = kQ;
      if (head >= p.parts[kQ].num_heads) {
        head -= p.parts[kQ].num_heads;
        which = kK;
        if (head >= p.parts[kK].num_heads) {
          head -= p.parts[kK].num_heads;
          which = kV;
        }
      }
      const HeadsPart& part = p.parts[which];
      const bool active = has_column && head < part.num_heads;
      const bool is_normed = kNorm && active && part.weight != nullptr;
      Vector grad_first = Vector::zero();
      Vector grad_second = Vector::zero();
      if (active) {
        const T* grad = static_cast<const T*>(part.grad) + token * part.grad_token_stride +
                        head * part.grad_head_stride + column;
        grad_first = Vector::template load<kWide>(grad);
        grad_second = Vector::template load<kWide>(grad + half);
      }
      Vector x_first = Vector::zero();
      Vector x_second = Vector::zero();
      if (is_normed) {
        const T* in = static_cast<const T*>(part.in) + token * part.in_token_stride +
                      head * part.in_head_stride + column;
        x_first = Vector::template load<kWide>(in);
        x_second = Vector::template load<kWide>(in + half);
      }

      Value a[kElements];
      Value b[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        a[j] = grad_first.get(j);
        b[j] = grad_second.get(j);
      }
      if (p.cos != nullptr && active && which != kV) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          const Value rotated = a[j] * cos[j] + b[j] * sin[j];
          b[j] = b[j] * cos[j] - a[j] * sin[j];
          a[j] = rotated;
        }
      }
      if constexpr (kNorm) {
        const auto row_sum = [&](Value scale, int) {
          return lanes_sum(sum_of_squares(x_first, scale) + sum_of_squares(x_second, scale),
                           static_cast<int>(blockDim.x));
        };
        const Value inverse = inverse_rms<T>(p.head_dim, static_cast<Value>(p.eps), row_sum,
                                             [](bool condition) { return ptx::any(condition); });
        Value along = 0;
        if (is_normed) {
          Value a_weight[kElements];
          Value b_weight[kElements];
          load_as_compute<kWide, T>(part.weight, part.weight_is_fp32, column, a_weight);
          load_as_compute<kWide, T>(part.weight, part.weight_is_fp32, column + half, b_weight);
#pragma unroll
          for (int j = 0; j < kElements; ++j) {
            const Value a_normed = x_first.get(j) * inverse;
            const Value b_normed = x_second.get(j) * inverse;
            const Value a_term = a[j] * a_normed;
            const Value b_term = b[j] * b_normed;
            sums[kQ][j] += which == kQ ? a_term : Value(0);
            sums[kQ][kElements + j] += which == kQ ? b_term : Value(0);
            sums[kK][j] += which == kK ? a_term : Value(0);
            sums[kK][kElements + j] += which == kK ? b_term : Value(0);
            a[j] *= a_weight[j];
            b[j] *= b_weight[j];
            along += a[j] * a_normed + b[j] * b_normed;
          }
        }
        along = lanes_sum(along, static_cast<int>(blockDim.x)) / static_cast<Value>(p.head_dim);
        if (is_normed) {
#pragma unroll
          for (int j = 0; j < kElements; ++j) {
            a[j] = (a[j] - x_first.get(j) * inverse * along) * inverse;
            b[j] = (b[j] - x_second.get(j) * inverse * along) * inverse;
          }
        }
      }
      if (active) {
        T* out = static_cast<T*>(part.out) + token * part.out_token_stride +
                 head * part.out_head_stride + column;
        Vector::rounded(a).template store<kWide>(out);
        Vector::rounded(b).template store<kWide>(out + half);
      }
    }
  }
  ptx::griddep_launch_dependents();

  if constexpr (kNorm) {
    if (p.partials == nullptr) return;
    SharedArena arena;
    const auto scratch = HeadsScratch<Value, kElements>::take_from(arena);
    const int slots = static_cast<int>(blockDim.y * blockDim.z);
    const int slot = static_cast<int>(threadIdx.z * blockDim.y + threadIdx.y);
    const int tid = slot * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int which = 0; which < kNumWeights; ++which) {
      if (which > 0) ptx::sync_threads();
      if (column < half) {
        Value* row = scratch.sums + slot * p.head_dim + column;
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          row[j] = sums[which][j];
          row[half + j] = sums[which][kElements + j];
        }
      }
      ptx::sync_threads();
      if (tid < p.head_dim) {
        Value total = 0;
        for (int i = 0; i < slots; ++i) total += scratch.sums[i * p.head_dim + tid];
        const int64_t row = static_cast<int64_t>(which) * gridDim.x + blockIdx.x;
        static_cast<Value*>(p.partials)[row * p.head_dim + tid] = total;
      }
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

struct HeadsGeometry {
  int elements;  // of a vector
  int lanes;     // per head
  int head_slots;
  int token_slots;
};

HeadsGeometry heads_geometry(DType dtype, int head_dim, int num_heads) {
  const int half = head_dim / 2;
  const int elements = size_bytes(dtype) == 2 && half % 8 == 0 ? 8 : 4;
  int lanes = 1;
  while (lanes * elements < half) lanes *= 2;
  const int slots = kBlockThreads / lanes;
  int head_slots = 1;
  while (head_slots < slots && head_slots < num_heads) head_slots *= 2;
  return {elements, lanes, head_slots, std::min(slots / head_slots, kMaxBlockDepth)};
}

HeadsPart part_of(const HeadsGrads& grads) {
  HeadsPart part{};
  if (!grads.is_present()) return part;
  part.grad = grads.grad->data;
  part.grad_token_stride = grads.grad->stride(0);
  part.grad_head_stride = grads.grad->stride(1);
  part.out = grads.out->data;
  part.out_token_stride = grads.out->stride(0);
  part.out_head_stride = grads.out->stride(1);
  part.num_heads = static_cast<int>(grads.grad->size(1));
  if (grads.weight != nullptr) {
    part.in = grads.in->data;
    part.in_token_stride = grads.in->stride(0);
    part.in_head_stride = grads.in->stride(1);
    part.weight = grads.weight->data;
    part.weight_is_fp32 = grads.weight->dtype == DType::kFloat32;
  }
  return part;
}

HeadsParams params_of(const HeadsBackwardCall& call, const HeadsGeometry& geometry) {
  HeadsParams params{};
  params.parts[kQ] = part_of(call.q);
  params.parts[kK] = part_of(call.k);
  params.parts[kV] = part_of(call.v);
  if (call.cos != nullptr) {
    params.cos = call.cos->data;
    params.sin = call.sin->data;
    params.cos_stride = call.cos->stride(0);
    params.sin_stride = call.sin->stride(0);
    params.positions = call.positions->data_as<const int32_t>();
    params.last_table_row =
        static_cast<int32_t>(std::min<int64_t>(call.cos->size(0) - 1, INT32_MAX));
    params.table_is_fp32 = call.cos->dtype == DType::kFloat32;
  }
  params.num_tokens = call.num_tokens();
  const int64_t needed = (params.num_tokens + kMaxParts - 1) / kMaxParts;
  params.tokens_per_part =
      (needed + geometry.token_slots - 1) / geometry.token_slots * geometry.token_slots;
  params.eps = call.eps.value;
  params.head_dim = call.head_dim();
  params.num_heads = call.num_heads();
  return params;
}

void launch_heads(const HeadsBackwardCall& call, const HeadsGeometry& geometry, int64_t num_parts,
                  const HeadsParams& params, Stream stream) {
  // positions are read one by one, whatever their alignment.
  bool wide = true;
  call.for_each([&](const char*, const Tensor& tensor) {
    wide = wide && (tensor.dtype == DType::kInt32 ||
                    is_aligned(tensor, std::min(16, geometry.elements * size_bytes(tensor.dtype))));
  });
  LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(num_parts)),
      .block =
          dim3(static_cast<unsigned>(geometry.lanes), static_cast<unsigned>(geometry.head_slots),
               static_cast<unsigned>(geometry.token_slots)),
      .stream = stream,
      .pdl = true,
  };
  dispatch_dtype(call.q.grad->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto launch_with = [&](auto elements) {
      constexpr int kElements = decltype(elements)::kValue;
      dispatch_bool(call.has_norm(), [&](auto has_norm) {
        constexpr bool kNorm = decltype(has_norm)::kValue;
        if (kNorm && params.partials != nullptr) {
          config.smem_bytes = shared_bytes<HeadsScratch<Compute<T>, kElements>>();
        }
        dispatch_bool(wide, [&](auto is_wide) {
          launch(heads_backward_kernel<T, kElements, kNorm, decltype(is_wide)::kValue>, config,
                 params);
        });
      });
    };
    if constexpr (sizeof(T) == 2) {
      if (geometry.elements == 8) return launch_with(ValueTag<8>{});
    }
    launch_with(ValueTag<4>{});
  });
}

const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

}  // namespace

void qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, std::optional<Tensor> grad_v,
                           std::optional<Tensor> q, std::optional<Tensor> k,
                           std::optional<Tensor> q_weight, std::optional<Tensor> k_weight,
                           std::optional<Tensor> cos, std::optional<Tensor> sin,
                           std::optional<Tensor> positions, Real eps,
                           std::optional<Tensor> workspace, Tensor d_q, Tensor d_k,
                           std::optional<Tensor> d_v, std::optional<Tensor> d_q_weight,
                           std::optional<Tensor> d_k_weight) {
  const HeadsBackwardCall call{
      .q = {"grad_q", &grad_q, "q", pointer(q), "q_weight", pointer(q_weight), "d_q", &d_q,
            "d_q_weight", pointer(d_q_weight)},
      .k = {"grad_k", &grad_k, "k", pointer(k), "k_weight", pointer(k_weight), "d_k", &d_k,
            "d_k_weight", pointer(d_k_weight)},
      .v = {"grad_v", pointer(grad_v), "v", nullptr, "v_weight", nullptr, "d_v", pointer(d_v),
            "d_v_weight", nullptr},
      .cos = pointer(cos),
      .sin = pointer(sin),
      .positions = pointer(positions),
      .workspace = pointer(workspace),
      .eps = eps,
  };
  check_heads_backward_shapes(call);
  check_heads_backward_dtypes(call);
  const int64_t bytes = call.wants_weights()
                            ? qk_norm_rope_backward_workspace(call.num_tokens(), call.head_dim(),
                                                              size_bytes(grad_q.dtype))
                            : 0;
  check_heads_backward_workspace(call, bytes);
  check_heads_backward_memory(call);

  const HeadsGeometry geometry = heads_geometry(grad_q.dtype, call.head_dim(), call.num_heads());
  HeadsParams params = params_of(call, geometry);
  if (bytes > 0) params.partials = workspace->data;
  const int64_t num_parts =
      params.num_tokens == 0 ? 0 : (params.num_tokens - 1) / params.tokens_per_part + 1;
  const DeviceGuard guard(grad_q.device);
  const Stream stream = grad_q.stream();
  if (num_parts > 0) launch_heads(call, geometry, num_parts, params, stream);
  const Tensor* const wanted[kNumWeights] = {call.q.weight_grad, call.k.weight_grad};
  for (int which = 0; which < kNumWeights; ++which) {
    if (wanted[which] == nullptr) continue;
    const int64_t offset = which * num_parts * call.head_dim() * 2 * size_bytes(grad_q.dtype);
    launch_sum_partials(static_cast<const char*>(params.partials) + offset,
                        grad_q.dtype == DType::kFloat32, num_parts, call.head_dim(), *wanted[which],
                        stream);
  }
}

int64_t qk_norm_rope_backward_workspace(int64_t num_tokens, int64_t head_dim,
                                        int64_t element_size) {
  check_multiple("head_dim", head_dim, 8, kMaxHeadDim);
  if (element_size != 2 && element_size != 4) {
    fail("element_size", "2 or 4", std::to_string(element_size));
  }
  // Summed in fp32, and in fp64 for fp32.
  return std::clamp<int64_t>(num_tokens, 0, kMaxParts) * kNumWeights * head_dim * 2 * element_size;
}

}  // namespace exafuse
