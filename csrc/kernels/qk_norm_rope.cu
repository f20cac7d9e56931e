// What stands between the merged projection and attention, in one launch: per-head RMSNorm of q and
// k, rotary embedding (RoPE, Su et al. 2021) of both, and the write of k and v to their place:
//
// clang-format off
//   a             = x * r * weight      r = 1 / sqrt(mean(x^2) + eps) over a head; no weight: a = x
//   out[i]        = a[i] * cos[i] - a[i + half] * sin[i]           half = head_dim / 2
//   out[i + half] = a[i + half] * cos[i] + a[i] * sin[i]           no table: out = a
// clang-format on
//
// Apart, these are five passes over q and k. A head belongs to 1 to 16 neighbouring lanes; a lane
// holds one vector of the first half and its partner of the second, so that rotation needs no
// exchange, and the table row is read once for the two heads that a thread works on. A block of 128
// threads covers as many heads of a token as it can, several tokens where there are few heads. Each
// head is summed by the same tree whatever the launch.

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/heads_call.h"
#include "ops.h"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 128;
inline constexpr int kHeadsPerThread = 2;
inline constexpr int kMaxBlockDepth = 64;  // CUDA's limit for blockDim.z

enum Part { kQ, kK, kV, kNumParts };

// --- kernel -------------------------------------------------------------------------------------

// q, k or v: where its heads come from, where they go. A token goes to row `token` of an output, or
// to its slot of a cache, which is a row and a slot within it.
struct HeadsPart {
  const void* in;      // [num_tokens, num_heads, head_dim]
  void* out;           // [num_tokens, num_heads, head_dim] or [rows, slots, num_heads, head_dim]
  const void* weight;  // [head_dim], or null for no norm
  int64_t in_token_stride;
  int64_t in_head_stride;
  int64_t out_row_stride;
  int64_t out_slot_stride;
  int64_t out_head_stride;
  int num_heads;  // 0: the part is absent
  bool weight_is_fp32;
  bool to_cache;
};

struct HeadsParams {
  HeadsPart parts[kNumParts];
  const void* cos;  // [table_rows, head_dim / 2], or null for no rotation
  const void* sin;
  int64_t cos_stride;
  int64_t sin_stride;
  const int32_t* positions;     // [num_tokens]
  const int64_t* slot_mapping;  // [num_tokens], or null without a cache
  int64_t num_tokens;
  int64_t cache_slots;      // per row of the cache
  int64_t cache_positions;  // rows * slots
  int32_t last_table_row;
  double eps;
  int head_dim;
  int head_blocks;  // blocks that share a token
  bool has_norm;
  bool table_is_fp32;
};

// One head in the hands of a thread.
template <class T, int kElements>
struct HeadSlice {
  Part part = kQ;
  int head = 0;
  bool active = false;
  Vec<T, kElements> first;   // of the first half of head_dim
  Vec<T, kElements> second;  // its partner in the second half
};

// Thread (x, y, z): x is the lane within a head, y the first of its heads, z the token.
template <class T, int kElements, bool kWide>
__global__ void __launch_bounds__(kBlockThreads, 1)
    heads_kernel(const __grid_constant__ HeadsParams p) {
  using Value = Compute<T>;
  using Vector = Vec<T, kElements>;

  const unsigned head_block = blockIdx.x % static_cast<unsigned>(p.head_blocks);
  const int64_t token =
      static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(p.head_blocks)) * blockDim.z +
      threadIdx.z;
  const int half = p.head_dim / 2;
  const int column = static_cast<int>(threadIdx.x) * kElements;
  // Lanes behind the last column and threads behind the last token stay for the collectives.
  const bool has_column = column < half && token < p.num_tokens;
  ptx::griddep_wait();

  HeadSlice<T, kElements> slices[kHeadsPerThread];
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    HeadSlice<T, kElements>& slice = slices[i];
    slice.head = static_cast<int>((head_block * kHeadsPerThread + i) * blockDim.y + threadIdx.y);
    if (slice.head >= p.parts[kQ].num_heads) {
      slice.head -= p.parts[kQ].num_heads;
      slice.part = kK;
      if (slice.head >= p.parts[kK].num_heads) {
        slice.head -= p.parts[kK].num_heads;
        slice.part = kV;
      }
    }
    const HeadsPart& part = p.parts[slice.part];
    slice.active = has_column && slice.head < part.num_heads;
    slice.first = slice.second = Vector::zero();
    if (slice.active) {
      const T* in = static_cast<const T*>(part.in) + token * part.in_token_stride +
                    slice.head * part.in_head_stride + column;
      slice.first = Vector::template load<kWide>(in);
      slice.second = Vector::template load<kWide>(in + half);
    }
  }

  Value cos[kElements];
  Value sin[kElements];
  if (p.cos != nullptr && has_column) {
    const int32_t asked = ptx::ldg(p.positions + token);
    const int32_t position = asked < 0 ? 0 : asked > p.last_table_row ? p.last_table_row : asked;
    load_as_compute<kWide, T>(p.cos, p.table_is_fp32, position * p.cos_stride + column, cos);
    load_as_compute<kWide, T>(p.sin, p.table_is_fp32, position * p.sin_stride + column, sin);
  }
  int64_t cache_row = 0;
  int64_t cache_slot = 0;
  bool cached = true;
  if (p.slot_mapping != nullptr && has_column) {
    const int64_t slot = ptx::ldg(p.slot_mapping + token);
    cached = slot >= 0 && slot < p.cache_positions;
    if (cached) {
      cache_row = slot / p.cache_slots;
      cache_slot = slot % p.cache_slots;
    }
  }
  ptx::griddep_launch_dependents();

#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    HeadSlice<T, kElements>& slice = slices[i];
    const HeadsPart& part = p.parts[slice.part];
    Value inverse = 1;
    if (p.has_norm) {  // for every head of the launch: q, k and v may share a warp
      const auto row_sum = [&](Value scale, int) {
        return lanes_sum(sum_of_squares(slice.first, scale) + sum_of_squares(slice.second, scale),
                         static_cast<int>(blockDim.x));
      };
      inverse = inverse_rms<T>(p.head_dim, static_cast<Value>(p.eps), row_sum,
                               [](bool condition) { return ptx::any(condition); });
    }
    if (!slice.active || (part.to_cache && !cached)) continue;
    if (slice.part != kV) {
      Value a[kElements];
      Value b[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        a[j] = slice.first.get(j);
        b[j] = slice.second.get(j);
      }
      if (part.weight != nullptr) {
        Value a_weight[kElements];
        Value b_weight[kElements];
        load_as_compute<kWide, T>(part.weight, part.weight_is_fp32, column, a_weight);
        load_as_compute<kWide, T>(part.weight, part.weight_is_fp32, column + half, b_weight);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          a[j] = a[j] * inverse * a_weight[j];
          b[j] = b[j] * inverse * b_weight[j];
        }
      }
      if (p.cos != nullptr) {
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          const Value rotated = a[j] * cos[j] - b[j] * sin[j];
          b[j] = b[j] * cos[j] + a[j] * sin[j];
          a[j] = rotated;
        }
      }
      slice.first = Vector::rounded(a);
      slice.second = Vector::rounded(b);
    }
    T* out = static_cast<T*>(part.out) + slice.head * part.out_head_stride + column;
    out += part.to_cache ? cache_row * part.out_row_stride + cache_slot * part.out_slot_stride
                         : token * part.out_row_stride;
    slice.first.template store<kWide>(out);
    slice.second.template store<kWide>(out + half);
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
  while (head_slots < slots && head_slots * kHeadsPerThread < num_heads) head_slots *= 2;
  return {elements, lanes, head_slots, std::min(slots / head_slots, kMaxBlockDepth)};
}

HeadsPart part_of(const Tensor& in, const Tensor& out, const std::optional<Tensor>* weight,
                  bool to_cache) {
  const bool has_weight = weight != nullptr && weight->has_value();
  return {
      .in = in.data,
      .out = out.data,
      .weight = has_weight ? (*weight)->data : nullptr,
      .in_token_stride = in.stride(0),
      .in_head_stride = in.stride(1),
      .out_row_stride = out.stride(0),
      .out_slot_stride = to_cache ? out.stride(1) : 0,
      .out_head_stride = out.stride(-2),
      .num_heads = static_cast<int>(in.size(1)),
      .weight_is_fp32 = has_weight && (*weight)->dtype == DType::kFloat32,
      .to_cache = to_cache,
  };
}

HeadsParams params_of(const HeadsCall& call) {
  HeadsParams params{};
  params.parts[kQ] = part_of(call.q, call.q_out, &call.q_weight, false);
  params.parts[kK] = part_of(call.k, call.k_out, &call.k_weight, call.to_cache());
  if (call.v_out != nullptr) {
    params.parts[kV] = part_of(*call.v, *call.v_out, nullptr, call.to_cache());
  }
  if (call.cos.has_value()) {
    params.cos = call.cos->data;
    params.sin = call.sin->data;
    params.cos_stride = call.cos->stride(0);
    params.sin_stride = call.sin->stride(0);
    params.positions = call.positions->data_as<const int32_t>();
    params.last_table_row =
        static_cast<int32_t>(std::min<int64_t>(call.cos->size(0) - 1, INT32_MAX));
    params.table_is_fp32 = call.cos->dtype == DType::kFloat32;
  }
  if (call.to_cache()) {
    params.slot_mapping = call.slot_mapping->data_as<const int64_t>();
    params.cache_slots = call.k_out.size(1);
    params.cache_positions = call.k_out.size(0) * call.k_out.size(1);
  }
  params.num_tokens = call.q.size(0);
  params.eps = call.eps.value;
  params.head_dim = static_cast<int>(call.q.size(2));
  params.has_norm = call.q_weight.has_value() || call.k_weight.has_value();
  return params;
}

void run(const HeadsCall& call) {
  check_heads_call(call);
  HeadsParams params = params_of(call);
  if (params.num_tokens == 0) return;

  int num_heads = 0;
  for (const HeadsPart& part : params.parts) num_heads += part.num_heads;
  const HeadsGeometry geometry = heads_geometry(call.q.dtype, params.head_dim, num_heads);
  const int heads_per_block = geometry.head_slots * kHeadsPerThread;
  params.head_blocks = (num_heads + heads_per_block - 1) / heads_per_block;
  const int64_t token_blocks =
      (params.num_tokens + geometry.token_slots - 1) / geometry.token_slots;

  // positions and slot_mapping are read one by one, whatever their alignment.
  bool wide = true;
  const auto check_wide = [&](const char*, const Tensor& tensor, const Tensor* = nullptr) {
    wide = wide && (tensor.dtype == DType::kInt32 || tensor.dtype == DType::kInt64 ||
                    is_aligned(tensor, std::min(16, geometry.elements * size_bytes(tensor.dtype))));
  };
  call.for_each_input(check_wide);
  call.for_each_output(check_wide);

  const LaunchConfig config{
      .grid = dim3(grid_size(token_blocks * params.head_blocks)),
      .block =
          dim3(static_cast<unsigned>(geometry.lanes), static_cast<unsigned>(geometry.head_slots),
               static_cast<unsigned>(geometry.token_slots)),
      .stream = call.q.stream(),
      .pdl = true,
  };
  const DeviceGuard guard(call.q.device);
  dispatch_dtype(call.q.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_bool(wide, [&](auto is_wide) {
      constexpr bool kWide = decltype(is_wide)::kValue;
      if constexpr (sizeof(T) == 2) {
        if (geometry.elements == 8) return launch(heads_kernel<T, 8, kWide>, config, params);
      }
      launch(heads_kernel<T, 4, kWide>, config, params);
    });
  });
}

}  // namespace

void qk_norm_rope(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Count num_heads,
                  Count num_kv_heads, std::optional<Tensor> q_weight,
                  std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                  std::optional<Tensor> sin, std::optional<Tensor> positions, Real eps,
                  Tensor q_out, Tensor k_out, std::optional<Tensor> v_out) {
  const Heads heads = split_heads(q, k, v, num_heads, num_kv_heads);
  run({.q = heads.q.tensor(),
       .k = heads.k.tensor(),
       .v = heads.v.tensor(),
       .q_weight = q_weight,
       .k_weight = k_weight,
       .cos = cos,
       .sin = sin,
       .positions = positions,
       .eps = eps,
       .q_out = q_out,
       .k_out = k_out,
       .v_out = v_out.has_value() ? &*v_out : nullptr});
}

void qk_norm_rope_cache(Tensor q, std::optional<Tensor> k, std::optional<Tensor> v, Count num_heads,
                        Count num_kv_heads, std::optional<Tensor> q_weight,
                        std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                        std::optional<Tensor> sin, std::optional<Tensor> positions, Real eps,
                        Tensor k_cache, Tensor v_cache, Tensor slot_mapping, Tensor q_out) {
  const Heads heads = split_heads(q, k, v, num_heads, num_kv_heads);
  run({.q = heads.q.tensor(),
       .k = heads.k.tensor(),
       .v = heads.v.tensor(),
       .q_weight = q_weight,
       .k_weight = k_weight,
       .cos = cos,
       .sin = sin,
       .positions = positions,
       .eps = eps,
       .q_out = q_out,
       .k_out = k_cache,
       .v_out = &v_cache,
       .slot_mapping = &slot_mapping});
}

void apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, Tensor q_out,
                Tensor k_out) {
  const std::optional<Tensor> no_weight;
  const std::optional<Tensor> cos_table = cos;
  const std::optional<Tensor> sin_table = sin;
  const std::optional<Tensor> rows = positions;
  run({.q = q,
       .k = k,
       .q_weight = no_weight,
       .k_weight = no_weight,
       .cos = cos_table,
       .sin = sin_table,
       .positions = rows,
       .q_out = q_out,
       .k_out = k_out});
}

}  // namespace exafuse
