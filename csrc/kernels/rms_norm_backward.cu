// Gradients of the root-mean-square norm y = xhat * weight, xhat = x * r, r = 1 / sqrt(mean(x^2) +
// eps):
//
//   grad_x      = r * (w - xhat * mean(w * xhat))   w = grad * weight; plus the gradient that comes
//                                                   past the norm, for add_rms_norm
//   grad_weight = sum over rows of grad * xhat
//
// Each row of x and grad is read once, into registers; its two sums go through one reduction. r is
// not kept from the forward pass: the sum of squares costs nothing beside the read, which is needed
// for xhat. A block goes through every n-th row, its threads adding up grad * xhat of their columns
// in registers, and writes one row of partial sums, which a second kernel adds up in order: no
// atomics, the same bits every time. Without a gradient of weight every row has its own threads.
//
// Short rows take 1 to 32 lanes each and share a block of 128 threads; longer ones take a block of
// up to 512. Rows that do not fit into registers (bf16 and fp16 beyond 16384, fp32 beyond 8192) and
// rows that are not 16-byte aligned are read again instead of kept, and their columns' sums live in
// the workspace. Which thread holds which element does not depend on alignment or on the batch.

#include <algorithm>
#include <string>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/vec.cuh"
#include "kernels/sum_partials.h"
#include "ops_backward.h"

namespace exafuse {
namespace {

inline constexpr int kMaxHidden = 65536;
inline constexpr int kSharedBlockThreads = 128;  // of a block that several rows share
inline constexpr int kMaxRowThreads = 512;       // a thread may use 128 registers then
inline constexpr int kMaxKept = 4;               // vectors of x, and of grad, in registers

// --- kernel -------------------------------------------------------------------------------------

enum RowTensor { kGrad, kX, kGradResidual, kGradX, kNumRowTensors };

template <class T>
struct NormBackwardParams {
  const T* grad;           // [rows, hidden]
  const T* x;              // [rows, hidden]
  const T* grad_residual;  // [rows, hidden], where there is one
  const void* weight;      // [hidden], T or fp32
  T* grad_x;               // [rows, hidden]
  Compute<T>* partials;    // [blocks, hidden], where weight has a gradient
  Rows<kNumRowTensors> rows;
  Compute<T> eps;
  int hidden;
  bool weight_is_fp32;
  bool has_grad_residual;
};

// Sums over the warps of a row that spans a block: of x^2 and of w * x, for each of the two
// attempts of inverse_rms, for rows of even and of odd number. A row meets one barrier an attempt,
// so the row before may still be read, but not the one before that.
inline constexpr int kAttemptSums = 2 * ptx::kWarpSize;
inline constexpr int kRowSums = 2 * kAttemptSums;

// Those sums; or, of a block that several rows share and for a gradient of weight, what each of
// them adds to it: [rows_per_block, hidden], at most kMaxKept vectors a thread.
template <class T, bool kWeightGrad>
struct NormBackwardScratch {
  Compute<T>* sums;

  template <class Arena>
  static constexpr NormBackwardScratch take_from(Arena& arena) {
    constexpr int kColumns = kSharedBlockThreads * kMaxKept * 16 / static_cast<int>(sizeof(T));
    static_assert(kColumns >= 2 * kRowSums);
    return {arena.template take<Compute<T>, kWeightGrad ? kColumns : 2 * kRowSums>()};
  }
};

template <class Value>
struct TwoSums {
  Value squares;   // of x^2
  Value products;  // of grad * weight * x
};

// As block_sum, of two values behind one barrier.
template <class Value>
__device__ __forceinline__ TwoSums<Value> block_sums(TwoSums<Value> value, Value* warp_sums) {
  const int warp_id = static_cast<int>(threadIdx.x) / ptx::kWarpSize;
  const int lane_id = static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / ptx::kWarpSize;
  value.squares = lanes_sum(value.squares, ptx::kWarpSize);
  value.products = lanes_sum(value.products, ptx::kWarpSize);
  if (lane_id == 0) {
    warp_sums[warp_id] = value.squares;
    warp_sums[ptx::kWarpSize + warp_id] = value.products;
  }
  ptx::sync_threads();
  const bool holds = lane_id < num_warps;
  return {lanes_sum(holds ? warp_sums[lane_id] : Value(0), ptx::kWarpSize),
          lanes_sum(holds ? warp_sums[ptx::kWarpSize + lane_id] : Value(0), ptx::kWarpSize)};
}

// Thread (x, y) of a block works on rows blockIdx.x * blockDim.y + y + i * gridDim.x * blockDim.y,
// vectors x, x + blockDim.x, ... of each. kKeep is the number of vectors that a thread keeps in
// registers; 0 reads them anew in each pass.
template <class T, int kKeep, bool kWide, bool kWeightGrad>
__global__ void __launch_bounds__(kKeep == 0 || kKeep == kMaxKept ? kMaxRowThreads
                                                                  : kSharedBlockThreads,
                                  1)
    rms_norm_backward_kernel(const __grid_constant__ NormBackwardParams<T> p) {
  using Value = Compute<T>;
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  constexpr int kVectors = kKeep == 0 ? 1 : kKeep;
  using Vector = Vec<T, kElements>;

  const int threads_per_row = static_cast<int>(blockDim.x);
  const bool spans_block = threads_per_row > ptx::kWarpSize;
  const int first_column = static_cast<int>(threadIdx.x) * kElements;
  const int column_step = threads_per_row * kElements;
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  SharedArena arena;
  Value* const scratch = NormBackwardScratch<T, kWeightGrad>::take_from(arena).sums;
  const int64_t partial = static_cast<int64_t>(blockIdx.x) * p.hidden;  // this block's
  Value column_sums[kVectors][kElements] = {};                          // of grad * xhat

  ptx::griddep_wait();
  int parity = 0;
  for (int64_t first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y; first_row < p.rows.count;
       first_row += row_step, parity ^= 1) {
    const int64_t row = first_row + threadIdx.y;
    // Threads behind the last row stay for the collectives, with an empty row.
    const int hidden = row < p.rows.count ? p.hidden : 0;
    const auto offsets = p.rows.offsets(row < p.rows.count ? row : 0);
    const T* grad_row = p.grad + offsets.of[kGrad];
    const T* x_row = p.x + offsets.of[kX];

    Vector kept_grad[kVectors];
    Vector kept_x[kVectors];
    if constexpr (kKeep > 0) {
#pragma unroll
      for (int i = 0; i < kKeep; ++i) {
        const int column = first_column + i * column_step;
        if (column < hidden) {
          kept_grad[i] = Vector::template load<kWide>(grad_row + column);
          kept_x[i] = Vector::template load<kWide>(x_row + column);
        }
      }
    }
    // Calls body(column, grad, x, weight, i) for each vector of this thread.
    const auto for_each_vector = [&](auto body) {
      Value weight[kElements];
      if constexpr (kKeep > 0) {
#pragma unroll
        for (int i = 0; i < kKeep; ++i) {
          const int column = first_column + i * column_step;
          if (column >= hidden) continue;
          load_as_compute<kWide, T>(p.weight, p.weight_is_fp32, column, weight);
          body(column, kept_grad[i], kept_x[i], weight, i);
        }
      } else {
        for (int column = first_column; column < hidden; column += column_step) {
          load_as_compute<kWide, T>(p.weight, p.weight_is_fp32, column, weight);
          body(column, Vector::template load<kWide>(grad_row + column),
               Vector::template load<kWide>(x_row + column), weight, 0);
        }
      }
    };

    Value products = 0;  // of w * x * scale
    Value scale = 1;
    const auto row_sum = [&](Value attempt_scale, int attempt) {
      TwoSums<Value> sums = {};
      for_each_vector(
          [&](int, const Vector& grad, const Vector& x, const Value(&weight)[kElements], int) {
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
              const Value scaled = x.get(i) * attempt_scale;
              sums.squares = ptx::fma(scaled, scaled, sums.squares);
              sums.products = ptx::fma(grad.get(i) * weight[i], scaled, sums.products);
            }
          });
      if (spans_block) {
        sums = block_sums(sums, scratch + parity * kRowSums + attempt * kAttemptSums);
      } else {
        sums = {lanes_sum(sums.squares, threads_per_row),
                lanes_sum(sums.products, threads_per_row)};
      }
      products = sums.products;
      scale = attempt_scale;
      return sums.squares;
    };
    const Value inverse = inverse_rms<T>(p.hidden, p.eps, row_sum, [&](bool condition) {
      return spans_block ? condition : ptx::any(condition);
    });
    const Value along = products * (inverse / scale) / static_cast<Value>(p.hidden);

    T* grad_x_row = p.grad_x + offsets.of[kGradX];
    const T* grad_residual_row = p.grad_residual + offsets.of[kGradResidual];
    for_each_vector([&](int column, const Vector& grad, const Vector& x,
                        const Value(&weight)[kElements], int kept) {
      Value normed[kElements];
      Value y[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        normed[i] = x.get(i) * inverse;
        y[i] = inverse * (grad.get(i) * weight[i] - normed[i] * along);
      }
      if (p.has_grad_residual) {
        const Vector residual = Vector::template load<kWide>(grad_residual_row + column);
#pragma unroll
        for (int i = 0; i < kElements; ++i) y[i] += residual.get(i);
      }
      Vector::rounded(y).template store<kWide>(grad_x_row + column);
      if constexpr (kWeightGrad && kKeep > 0) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          column_sums[kept][i] = ptx::fma(grad.get(i), normed[i], column_sums[kept][i]);
        }
      } else if constexpr (kWeightGrad) {
        // A shared block's rows add in shared memory, others in their block's row of the workspace.
        Value* sums =
            (spans_block ? p.partials + partial : scratch + threadIdx.y * p.hidden) + column;
        const bool is_first = first_row < row_step;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          sums[i] = ptx::fma(grad.get(i), normed[i], is_first ? Value(0) : sums[i]);
        }
      }
    });
  }
  ptx::griddep_launch_dependents();

  if constexpr (kWeightGrad) {
    // Calls body(column, sums) for each vector of this thread in a row that every block has.
    const auto for_each_column_sum = [&](auto body) {
      if constexpr (kKeep > 0) {
#pragma unroll
        for (int i = 0; i < kKeep; ++i) {
          const int column = first_column + i * column_step;
          if (column < p.hidden) body(column, column_sums[i]);
        }
      }
    };
    if (spans_block) {
      for_each_column_sum([&](int column, const Value(&sums)[kElements]) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) p.partials[partial + column + i] = sums[i];
      });
      return;
    }
    for_each_column_sum([&](int column, const Value(&sums)[kElements]) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        scratch[threadIdx.y * p.hidden + column + i] = sums[i];
      }
    });
    ptx::sync_threads();
    // Rows of the block that had no row of the tensor to begin with wrote nothing, or zeros.
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * blockDim.y;
    const int used = static_cast<int>(
        p.rows.count - first_row < blockDim.y ? p.rows.count - first_row : blockDim.y);
    const int thread = static_cast<int>(threadIdx.y) * threads_per_row + threadIdx.x;
    for (int column = thread; column < p.hidden; column += kSharedBlockThreads) {
      Value sum = 0;
      for (int y = 0; y < used; ++y) sum += scratch[y * p.hidden + column];
      p.partials[partial + column] = sum;
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

struct NormBackwardGeometry {
  int threads_per_row;
  int rows_per_block;
  int vectors_per_thread;  // 0: more than registers hold
};

NormBackwardGeometry norm_backward_geometry(int hidden, int elements_per_vector) {
  const int vectors = hidden / elements_per_vector;
  const auto ceil_div = [](int a, int b) { return (a + b - 1) / b; };
  if (vectors <= kMaxKept * ptx::kWarpSize) {
    int lanes = 1;
    while (lanes < ptx::kWarpSize && lanes * 2 < vectors) lanes *= 2;
    return {lanes, kSharedBlockThreads / lanes, ceil_div(vectors, lanes) <= 2 ? 2 : kMaxKept};
  }
  const int threads = ceil_div(ceil_div(vectors, kMaxKept), ptx::kWarpSize) * ptx::kWarpSize;
  return threads <= kMaxRowThreads ? NormBackwardGeometry{threads, 1, kMaxKept}
                                   : NormBackwardGeometry{kMaxRowThreads, 1, 0};
}

// Blocks of a call that sums the gradient of weight, each with a row of the workspace. At least
// eight rows a block keep the partial sums a small share of all bytes; 64 Ki threads fill any GPU.
int64_t weight_grad_blocks(int64_t num_rows, const NormBackwardGeometry& geometry) {
  constexpr int64_t kMaxThreads = 64 * 1024;
  const int64_t rows = std::max(8, geometry.rows_per_block);
  const int64_t threads = int64_t{geometry.threads_per_row} * geometry.rows_per_block;
  return std::min((num_rows + rows - 1) / rows, kMaxThreads / threads);
}

// The arguments of one call, under the names that its caller gave them.
struct NormBackwardArguments {
  const Tensor& grad;
  const Tensor* grad_residual;  // nullptr: none
  const Tensor& x;
  const Tensor& weight;
  Real eps;
  const Tensor& grad_x;
  const std::optional<Tensor>& grad_weight;
  const std::optional<Tensor>& workspace;
  const char* x_name;
  const char* grad_x_name;

  // Calls visit(name, tensor) for each input / each output that is there.
  template <class Visit>
  void for_each_input(Visit visit) const {
    visit("grad", grad);
    if (grad_residual != nullptr) visit("grad_residual", *grad_residual);
    visit(x_name, x);
    visit("weight", weight);
  }

  template <class Visit>
  void for_each_output(Visit visit) const {
    visit(grad_x_name, grad_x);
    if (grad_weight.has_value()) visit("grad_weight", *grad_weight);
    if (workspace.has_value()) visit("workspace", *workspace);
  }
};

// The bytes that the call needs must be there.
void check_workspace(const NormBackwardArguments& args, int64_t bytes) {
  const std::string expected = std::to_string(bytes / 4) + " or more elements";
  if (!args.workspace.has_value()) {
    if (bytes > 0) fail("workspace", expected + " of float32", "None");
    return;
  }
  const Tensor& workspace = *args.workspace;
  check_is_tensor("workspace", workspace);
  if (workspace.ndim != 1 || workspace.size(0) * 4 < bytes) {
    fail("workspace", expected, to_string(workspace.shape, workspace.ndim));
  }
  check_dtype("workspace", workspace, {DType::kFloat32});
}

void check_norm_backward(const NormBackwardArguments& args) {
  const Tensor& x = args.x;
  Dim hidden{"hidden"};
  check_last_dim(args.x_name, x, hidden);
  check_multiple("hidden", hidden.value, 8, kMaxHidden);
  check_same_rows("grad", args.grad, x, hidden.value);
  if (args.grad_residual != nullptr) {
    check_same_rows("grad_residual", *args.grad_residual, x, hidden.value);
  }
  check_shape("weight", args.weight, {hidden});
  check_same_rows(args.grad_x_name, args.grad_x, x, hidden.value);
  if (args.grad_weight.has_value()) check_shape("grad_weight", *args.grad_weight, {hidden});
  check_eps(args.eps);

  check_float_dtype(args.x_name, x);
  check_dtype("grad", args.grad, {x.dtype});
  if (args.grad_residual != nullptr) check_dtype("grad_residual", *args.grad_residual, {x.dtype});
  check_dtype("weight", args.weight, {x.dtype, DType::kFloat32});
  check_dtype(args.grad_x_name, args.grad_x, {x.dtype});
  if (args.grad_weight.has_value()) {
    check_dtype("grad_weight", *args.grad_weight, {args.weight.dtype});
  }
  const int64_t num_rows = x.numel() / hidden.value;
  const int64_t bytes =
      args.grad_weight.has_value()
          ? rms_norm_backward_workspace(num_rows, hidden.value, size_bytes(x.dtype))
          : 0;
  check_workspace(args, bytes);

  const auto check_layout = [](const char* name, const Tensor& tensor) {
    check_last_stride(name, tensor);
    check_alignment(name, tensor);
  };
  args.for_each_input(check_layout);
  args.for_each_output(check_layout);
  if (bytes > 0 && !is_aligned(*args.workspace, 16)) {
    fail("workspace", "data aligned to 16 bytes", "an address that is not");
  }
  args.for_each_output([&](const char* name, const Tensor& output) {
    check_writable(name, output);
    args.for_each_input([&](const char* input_name, const Tensor& input) {
      check_disjoint(name, output, input_name, input);
    });
    args.for_each_output([&](const char* other_name, const Tensor& other) {
      if (&other != &output) check_disjoint(name, output, other_name, other);
    });
  });

  check_device("grad", args.grad);
  args.for_each_input([&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, args.grad.device);
  });
  args.for_each_output([&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, args.grad.device);
  });
}

void run_norm_backward(const NormBackwardArguments& args) {
  check_norm_backward(args);
  const Tensor& x = args.x;
  const Tensor& grad_residual = args.grad_residual != nullptr ? *args.grad_residual : args.grad;
  const int hidden = static_cast<int>(x.size(-1));
  const int elements_per_vector = 16 / size_bytes(x.dtype);
  const NormBackwardGeometry geometry = norm_backward_geometry(hidden, elements_per_vector);
  const bool wide = is_aligned(x, 16) && is_aligned(args.grad, 16) &&
                    is_aligned(grad_residual, 16) && is_aligned(args.weight, 16) &&
                    is_aligned(args.grad_x, 16);
  const bool weight_grad = args.grad_weight.has_value();
  const int64_t num_rows = x.numel() / hidden;
  const int64_t blocks = weight_grad
                             ? weight_grad_blocks(num_rows, geometry)
                             : (num_rows + geometry.rows_per_block - 1) / geometry.rows_per_block;
  const Stream stream = x.stream();
  const DeviceGuard guard(x.device);

  if (num_rows > 0) {
    dispatch_dtype(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const NormBackwardParams<T> params{
          .grad = args.grad.data_as<const T>(),
          .x = x.data_as<const T>(),
          .grad_residual = grad_residual.data_as<const T>(),
          .weight = args.weight.data,
          .grad_x = args.grad_x.data_as<T>(),
          .partials = weight_grad ? args.workspace->data_as<Compute<T>>() : nullptr,
          .rows = rows_of<kNumRowTensors>({&args.grad, &x, &grad_residual, &args.grad_x}),
          .eps = static_cast<Compute<T>>(args.eps.value),
          .hidden = hidden,
          .weight_is_fp32 = args.weight.dtype == DType::kFloat32 && x.dtype != DType::kFloat32,
          .has_grad_residual = args.grad_residual != nullptr,
      };
      dispatch_bool(weight_grad, [&](auto with_weight) {
        constexpr bool kWeightGrad = decltype(with_weight)::kValue;
        const LaunchConfig config{
            .grid = dim3(grid_size(blocks)),
            .block = dim3(static_cast<unsigned>(geometry.threads_per_row),
                          static_cast<unsigned>(geometry.rows_per_block)),
            .smem_bytes = shared_bytes<NormBackwardScratch<T, kWeightGrad>>(),
            .stream = stream,
            .pdl = true,
        };
        if (!wide) {
          return launch(rms_norm_backward_kernel<T, 0, false, kWeightGrad>, config, params);
        }
        dispatch_value<2, kMaxKept, 0>(
            "vectors_per_thread", geometry.vectors_per_thread, [&](auto keep) {
              constexpr int kKeep = decltype(keep)::kValue;
              launch(rms_norm_backward_kernel<T, kKeep, true, kWeightGrad>, config, params);
            });
      });
    });
  }
  if (weight_grad) {
    const void* partials = args.workspace.has_value() ? args.workspace->data : nullptr;
    launch_sum_partials(partials, x.dtype == DType::kFloat32, blocks, hidden, *args.grad_weight,
                        stream);
  }
}

}  // namespace

void rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Real eps, Tensor grad_x,
                       std::optional<Tensor> grad_weight, std::optional<Tensor> workspace) {
  run_norm_backward({grad, nullptr, x, weight, eps, grad_x, grad_weight, workspace, "x", "grad_x"});
}

void add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor new_residual, Tensor weight,
                           Real eps, Tensor grad_sum, std::optional<Tensor> grad_weight,
                           std::optional<Tensor> workspace) {
  run_norm_backward({grad, &grad_residual, new_residual, weight, eps, grad_sum, grad_weight,
                     workspace, "new_residual", "grad_sum"});
}

int64_t rms_norm_backward_workspace(int64_t num_rows, int64_t hidden, int64_t element_size) {
  check_multiple("hidden", hidden, 8, kMaxHidden);
  if (element_size != 2 && element_size != 4) {
    fail("element_size", "2 or 4", std::to_string(element_size));
  }
  if (num_rows < 1) return 0;
  const auto geometry =
      norm_backward_geometry(static_cast<int>(hidden), static_cast<int>(16 / element_size));
  // Summed in fp32, and in fp64 for fp32.
  return weight_grad_blocks(num_rows, geometry) * hidden * 2 * element_size;
}

}  // namespace exafuse
