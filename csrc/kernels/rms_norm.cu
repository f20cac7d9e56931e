// Root-mean-square norm (Zhang & Sennrich 2019) over the last dimension, alone or fused with a
// residual:
//
//   rms_norm      out = x * r * weight                       r = 1 / sqrt(mean(x^2) + eps)
//   add_rms_norm  s = round(x + residual); out = s * r(s) * weight; residual_out = s
//   rms_norm_add  out = residual + x * r * weight
//
// All three move each byte once: a row is read into registers with 16-byte accesses, summed, scaled
// and written. Short rows take 1 to 32 lanes each and share a block of 128 threads; longer ones
// take a block of their own, sized so that a thread holds four vectors. Rows that do not fit (bf16
// and fp16 beyond 32768, fp32 beyond 16384) and rows that are not 16-byte aligned are read again
// instead of kept; which thread holds which element, and so the order of summation, does not depend
// on alignment. The geometry depends on dtype and hidden size alone.

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/vec.cuh"
#include "ops.h"

namespace exafuse {
namespace {

enum class NormOp { kNorm, kAddNorm, kNormAdd };

inline constexpr int kSharedBlockThreads = 128;  // of a block that several rows share
inline constexpr int kMaxHidden = 65536;

// --- kernel -------------------------------------------------------------------------------------

enum RowTensor { kX, kResidual, kOut, kResidualOut, kNumRowTensors };

template <class T>
struct NormParams {
  const T* x;          // [rows, hidden]
  const T* residual;   // [rows, hidden]
  const void* weight;  // [hidden], T or fp32
  T* out;              // [rows, hidden]
  T* residual_out;     // [rows, hidden]
  Rows<kNumRowTensors> rows;
  Compute<T> eps;
  int hidden;
  bool weight_is_fp32;
};

// Sums of the warps of a row that spans a block, for each of the two attempts of inverse_rms.
template <class Value>
struct NormScratch {
  Value* warp_sums;

  template <class Arena>
  static constexpr NormScratch take_from(Arena& arena) {
    return {arena.template take<Value, 2 * ptx::kWarpSize>()};
  }
};

// Thread (x, y) of a block works on row blockIdx.x * blockDim.y + y, vectors x, x + blockDim.x, ...
// of it. kKeep is the number of vectors that a thread keeps in registers; 0 reads them anew in each
// pass.
template <class T, NormOp kOp, int kKeep, bool kWide>
__global__ void __launch_bounds__(kKeep == 0 || kKeep == 4 ? kMaxBlockThreads : kSharedBlockThreads,
                                  1) rms_norm_kernel(const __grid_constant__ NormParams<T> p) {
  using Value = Compute<T>;
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  using Vector = Vec<T, kElements>;

  const int threads_per_row = static_cast<int>(blockDim.x);
  const int first_column = static_cast<int>(threadIdx.x) * kElements;
  const int column_step = threads_per_row * kElements;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // Threads behind the last row stay for the collectives, with an empty row.
  const int hidden = row < p.rows.count ? p.hidden : 0;

  ptx::griddep_wait();
  const auto offsets = p.rows.offsets(row < p.rows.count ? row : 0);
  const T* x_row = p.x + offsets.of[kX];
  const T* residual_row = p.residual + offsets.of[kResidual];

  // The vector that is normed: x, or for add_rms_norm the rounded sum.
  const auto load = [&](int column) {
    const Vector vector = Vector::template load<kWide>(x_row + column);
    if constexpr (kOp == NormOp::kAddNorm) {
      const Vector residual = Vector::template load<kWide>(residual_row + column);
      Value sum[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[i] = vector.get(i) + residual.get(i);
      return Vector::rounded(sum);
    } else {
      return vector;
    }
  };
  Vector kept[kKeep == 0 ? 1 : kKeep];
  if constexpr (kKeep > 0) {
#pragma unroll
    for (int i = 0; i < kKeep; ++i) {
      const int column = first_column + i * column_step;
      if (column < hidden) kept[i] = load(column);
    }
  }
  ptx::griddep_launch_dependents();

  // Calls body(column, vector) for each vector of this thread.
  const auto for_each_vector = [&](auto body) {
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int i = 0; i < kKeep; ++i) {
        const int column = first_column + i * column_step;
        if (column < hidden) body(column, kept[i]);
      }
    } else {
      for (int column = first_column; column < hidden; column += column_step) {
        body(column, load(column));
      }
    }
  };
  SharedArena arena;
  const auto scratch = NormScratch<Value>::take_from(arena);
  const bool spans_block = threads_per_row > ptx::kWarpSize;
  const auto row_sum = [&](Value scale, int attempt) {
    Value sum = 0;
    for_each_vector([&](int, const Vector& vector) { sum += sum_of_squares(vector, scale); });
    return spans_block ? block_sum(sum, scratch.warp_sums + attempt * ptx::kWarpSize)
                       : lanes_sum(sum, threads_per_row);
  };
  const Value inverse = inverse_rms<T>(p.hidden, p.eps, row_sum, [&](bool condition) {
    return spans_block ? condition : ptx::any(condition);
  });

  T* out_row = p.out + offsets.of[kOut];
  T* residual_out_row = p.residual_out + offsets.of[kResidualOut];
  for_each_vector([&](int column, const Vector& vector) {
    Value weight[kElements];
    load_as_compute<kWide, T>(p.weight, p.weight_is_fp32, column, weight);
    Value y[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) y[i] = vector.get(i) * inverse * weight[i];
    if constexpr (kOp == NormOp::kNormAdd) {
      const Vector residual = Vector::template load<kWide>(residual_row + column);
#pragma unroll
      for (int i = 0; i < kElements; ++i) y[i] += residual.get(i);
    }
    Vector::rounded(y).template store<kWide>(out_row + column);
    if constexpr (kOp == NormOp::kAddNorm) {
      vector.template store<kWide>(residual_out_row + column);
    }
  });
}

// --- host ---------------------------------------------------------------------------------------

struct NormGeometry {
  int threads_per_row;
  int rows_per_block;
  int vectors_per_thread;  // 0: more than registers hold
};

NormGeometry norm_geometry(int hidden, int elements_per_vector) {
  const int vectors = hidden / elements_per_vector;
  const auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  if (vectors <= 8 * ptx::kWarpSize) {
    int lanes = 1;
    while (lanes < ptx::kWarpSize && lanes * 2 < vectors) lanes *= 2;
    const int each = ceil_div(vectors, lanes);
    return {lanes, kSharedBlockThreads / lanes, each <= 2 ? 2 : each <= 4 ? 4 : 8};
  }
  const int threads = ceil_div(ceil_div(vectors, 4), ptx::kWarpSize) * ptx::kWarpSize;
  return threads <= kMaxBlockThreads ? NormGeometry{threads, 1, 4}
                                     : NormGeometry{kMaxBlockThreads, 1, 0};
}

// The arguments of one call; the residual tensors are null where the op has none.
struct NormArguments {
  const Tensor& x;
  const Tensor* residual;
  const Tensor& weight;
  Real eps;
  const Tensor& out;
  const Tensor* residual_out;
};

void check_norm(const NormArguments& args) {
  const auto& [x, residual, weight, eps, out, residual_out] = args;
  Dim hidden{"hidden"};
  check_last_dim("x", x, hidden);
  check_multiple("hidden", hidden.value, 8, kMaxHidden);
  if (residual != nullptr) check_same_rows("residual", *residual, x, hidden.value);
  check_shape("weight", weight, {hidden});
  check_same_rows("out", out, x, hidden.value);
  if (residual_out != nullptr) check_same_rows("residual_out", *residual_out, x, hidden.value);
  check_eps(eps);

  check_float_dtype("x", x);
  if (residual != nullptr) check_dtype("residual", *residual, {x.dtype});
  check_dtype("weight", weight, {x.dtype, DType::kFloat32});
  check_dtype("out", out, {x.dtype});
  if (residual_out != nullptr) check_dtype("residual_out", *residual_out, {x.dtype});

  const auto check_layout = [](const char* name, const Tensor& tensor) {
    check_last_stride(name, tensor);
    check_alignment(name, tensor);
  };
  check_layout("x", x);
  if (residual != nullptr) check_layout("residual", *residual);
  check_layout("weight", weight);
  const auto check_output = [&](const char* name, const Tensor& output) {
    check_layout(name, output);
    check_writable(name, output);
    check_disjoint_or_same(name, output, "x", x);
    if (residual != nullptr) check_disjoint_or_same(name, output, "residual", *residual);
    check_disjoint(name, output, "weight", weight);
  };
  check_output("out", out);
  if (residual_out != nullptr) {
    check_output("residual_out", *residual_out);
    check_disjoint("residual_out", *residual_out, "out", out);
  }

  check_device("x", x);
  if (residual != nullptr) check_device("residual", *residual, x.device);
  check_device("weight", weight, x.device);
  check_device("out", out, x.device);
  if (residual_out != nullptr) check_device("residual_out", *residual_out, x.device);
}

template <NormOp kOp>
void run_norm(const NormArguments& args) {
  check_norm(args);
  const Tensor& x = args.x;
  if (x.numel() == 0) return;
  const Tensor& residual = args.residual != nullptr ? *args.residual : x;
  const Tensor& residual_out = args.residual_out != nullptr ? *args.residual_out : args.out;
  const int hidden = static_cast<int>(x.size(-1));
  const int elements_per_vector = 16 / size_bytes(x.dtype);
  const NormGeometry geometry = norm_geometry(hidden, elements_per_vector);
  const bool wide = is_aligned(x, 16) && is_aligned(residual, 16) && is_aligned(args.weight, 16) &&
                    is_aligned(args.out, 16) && is_aligned(residual_out, 16);

  dispatch_dtype(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const NormParams<T> params{
        .x = x.data_as<const T>(),
        .residual = residual.data_as<const T>(),
        .weight = args.weight.data,
        .out = args.out.data_as<T>(),
        .residual_out = residual_out.data_as<T>(),
        .rows = rows_of<kNumRowTensors>({&x, &residual, &args.out, &residual_out}),
        .eps = static_cast<Compute<T>>(args.eps.value),
        .hidden = hidden,
        .weight_is_fp32 = args.weight.dtype == DType::kFloat32 && x.dtype != DType::kFloat32,
    };
    const int64_t blocks =
        (params.rows.count + geometry.rows_per_block - 1) / geometry.rows_per_block;
    const LaunchConfig config{
        .grid = dim3(grid_size(blocks)),
        .block = dim3(static_cast<unsigned>(geometry.threads_per_row),
                      static_cast<unsigned>(geometry.rows_per_block)),
        .smem_bytes = shared_bytes<NormScratch<Compute<T>>>(),
        .stream = x.stream(),
        .pdl = true,
    };
    const DeviceGuard guard(x.device);
    if (!wide) return launch(rms_norm_kernel<T, kOp, 0, false>, config, params);
    dispatch_value<2, 4, 8, 0>("vectors_per_thread", geometry.vectors_per_thread, [&](auto keep) {
      launch(rms_norm_kernel<T, kOp, decltype(keep)::kValue, true>, config, params);
    });
  });
}

}  // namespace

void rms_norm(Tensor x, Tensor weight, Real eps, Tensor out) {
  run_norm<NormOp::kNorm>({x, nullptr, weight, eps, out, nullptr});
}

void add_rms_norm(Tensor x, Tensor residual, Tensor weight, Real eps, Tensor out,
                  Tensor residual_out) {
  run_norm<NormOp::kAddNorm>({x, &residual, weight, eps, out, &residual_out});
}

void rms_norm_add(Tensor x, Tensor residual, Tensor weight, Real eps, Tensor out) {
  run_norm<NormOp::kNormAdd>({x, &residual, weight, eps, out, nullptr});
}

}  // namespace exafuse
