// Gradients of out = silu(gate) * up, with s = 1 / (1 + exp(-gate)):
//
//   grad_gate = grad * up * s * (1 + gate * (1 - s))
//   grad_up   = grad * gate * s
//
// One pass, as silu_and_mul.cu: each byte moves once, in 16-byte accesses, two vectors of each
// input in flight per thread. The geometry depends on dtype and row length.

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/rows.cuh"
#include "common/vec.cuh"
#include "ops_backward.h"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 256;
inline constexpr int kVectorsPerThread = 2;

// --- kernel -------------------------------------------------------------------------------------

enum RowTensor { kGrad, kGate, kUp, kGradGate, kGradUp, kNumRowTensors };

template <class T>
struct SiluBackwardParams {
  const T* grad;  // each [rows, intermediate_size]
  const T* gate;
  const T* up;
  T* grad_gate;
  T* grad_up;
  Rows<kNumRowTensors> rows;
  int64_t intermediate_size;
  int pieces_per_row;
};

template <class Value>
struct SiluGrads {
  Value gate;
  Value up;
};

__device__ __forceinline__ SiluGrads<double> silu_grads(double grad, double gate, double up) {
  const double decay = std::exp(-std::fabs(gate));
  const double nearer = 1.0 / (1.0 + decay);  // the larger of s and 1 - s
  const double sigmoid = gate >= 0 ? nearer : decay * nearer;
  const double rest = gate >= 0 ? decay * nearer : nearer;
  return {grad * up * sigmoid * ptx::fma(gate, rest, 1.0), grad * gate * sigmoid};
}

// With h = exp(-|gate| / 2): a negative gate has s = h * h / (1 + h^2), and takes one h to each of
// two factors, which stay in range as long as the result does. exp(-|gate|) itself would be gone
// below -104, where bf16 values of grad and up still make results that count. Where grad * up
// leaves the range, so may h for a gate that brings it back: then all three carry powers of two.
__device__ __forceinline__ SiluGrads<float> silu_grads(float grad, float gate, float up) {
  constexpr float kHalfLog2E = 0.72134752f;
  const float exponent = gate >= 0 ? 0.0f : kHalfLog2E * gate;
  const float root = ptx::exp2(-kHalfLog2E * std::fabs(gate));
  const float nearer = ptx::rcp(1.0f + root * root);  // the larger of s and 1 - s
  const float share = gate >= 0 ? 1.0f : root;
  const float rest = gate >= 0 ? root * root * nearer : nearer;
  const float slope = ptx::fma(gate, rest, 1.0f) * nearer;
  const float product = grad * up;
  float grad_gate = (product * share) * (slope * share);
  if (std::isinf(product)) {
    const float scaled_share = ptx::exp2(exponent + 64.0f);
    grad_gate = (grad * 0x1p-64f * scaled_share * slope) * (up * 0x1p-64f * scaled_share);
  }
  return {grad_gate, (grad * share) * (gate * share * nearer)};
}

// Thread (x, y) of a block works on row block_row * blockDim.y + y, on vectors x and x + blockDim.x
// of the block's piece of it.
template <class T, int kElements>
__global__ void __launch_bounds__(kBlockThreads)
    silu_and_mul_backward_kernel(const __grid_constant__ SiluBackwardParams<T> p) {
  using Vector = Vec<T, kElements>;
  const int64_t block_row = blockIdx.x / static_cast<unsigned>(p.pieces_per_row);
  const int64_t piece = blockIdx.x % static_cast<unsigned>(p.pieces_per_row);
  const int64_t row = block_row * blockDim.y + threadIdx.y;
  const int64_t first_column = (piece * kVectorsPerThread * blockDim.x + threadIdx.x) * kElements;
  const int64_t column_step = static_cast<int64_t>(blockDim.x) * kElements;

  ptx::griddep_wait();
  if (row >= p.rows.count) return;
  const auto offsets = p.rows.offsets(row);

  Vector grad[kVectorsPerThread];
  Vector gate[kVectorsPerThread];
  Vector up[kVectorsPerThread];
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first_column + i * column_step;
    if (column < p.intermediate_size) {
      grad[i] = Vector::template load<true>(p.grad + offsets.of[kGrad] + column);
      gate[i] = Vector::template load<true>(p.gate + offsets.of[kGate] + column);
      up[i] = Vector::template load<true>(p.up + offsets.of[kUp] + column);
    }
  }
  ptx::griddep_launch_dependents();
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first_column + i * column_step;
    if (column < p.intermediate_size) {
      Compute<T> grad_gate[kElements];
      Compute<T> grad_up[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const auto grads = silu_grads(grad[i].get(j), gate[i].get(j), up[i].get(j));
        grad_gate[j] = grads.gate;
        grad_up[j] = grads.up;
      }
      Vector::rounded(grad_gate).template store<true>(p.grad_gate + offsets.of[kGradGate] + column);
      Vector::rounded(grad_up).template store<true>(p.grad_up + offsets.of[kGradUp] + column);
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// The inputs and outputs of one call, each [..., intermediate_size].
struct SiluBackwardCall {
  NamedTensor grad;
  NamedTensor gate;
  NamedTensor up;
  NamedTensor grad_gate;
  NamedTensor grad_up;

  template <class Visit>
  void for_each(Visit visit) const {
    for (const NamedTensor& each : {grad, gate, up, grad_gate, grad_up}) {
      visit(each.name, each.tensor);
    }
  }
};

// A half of a packed [..., 2 * intermediate_size] tensor. Holds its shape.
class Half {
 public:
  Half(const Tensor& packed, int which) : tensor_(packed) {
    std::copy(packed.shape, packed.shape + packed.ndim, shape_);
    const int64_t size = packed.size(-1) / 2;
    shape_[packed.ndim - 1] = size;
    tensor_.shape = shape_;
    tensor_.data = packed.data_as<char>() + which * size * size_bytes(packed.dtype);
  }
  Half(const Half&) = delete;

  const Tensor& tensor() const { return tensor_; }

 private:
  int64_t shape_[Tensor::kMaxDims];
  Tensor tensor_;
};

void check_call(const SiluBackwardCall& call) {
  check_float_dtype(call.grad.name, call.grad.tensor);
  call.for_each([&](const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, {call.grad.tensor.dtype});
  });
  call.for_each(check_last_stride);
  call.for_each(check_alignment);
  for (const NamedTensor& output : {call.grad_gate, call.grad_up}) {
    check_writable(output.name, output.tensor);
    for (const NamedTensor& input : {call.grad, call.gate, call.up}) {
      check_disjoint(output.name, output.tensor, input.name, input.tensor);
    }
  }
  check_disjoint(call.grad_up.name, call.grad_up.tensor, call.grad_gate.name,
                 call.grad_gate.tensor);
  check_device(call.grad.name, call.grad.tensor);
  call.for_each([&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, call.grad.tensor.device);
  });
}

void run(const SiluBackwardCall& call) {
  check_call(call);
  const Tensor& grad = call.grad.tensor;
  if (grad.numel() == 0) return;

  const int64_t size = grad.size(-1);
  const int elements_per_vector = 16 / size_bytes(grad.dtype);
  bool wide = size % elements_per_vector == 0;
  call.for_each([&](const char*, const Tensor& tensor) { wide = wide && is_aligned(tensor, 16); });
  const int64_t vectors = wide ? size / elements_per_vector : size;
  int64_t threads_per_row = 1;
  while (threads_per_row < kBlockThreads && threads_per_row * kVectorsPerThread < vectors) {
    threads_per_row *= 2;
  }
  const int64_t rows_per_block = kBlockThreads / threads_per_row;
  const int64_t piece = threads_per_row * kVectorsPerThread;

  dispatch_dtype(grad.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const SiluBackwardParams<T> params{
        .grad = grad.data_as<const T>(),
        .gate = call.gate.tensor.data_as<const T>(),
        .up = call.up.tensor.data_as<const T>(),
        .grad_gate = call.grad_gate.tensor.data_as<T>(),
        .grad_up = call.grad_up.tensor.data_as<T>(),
        .rows = rows_of<kNumRowTensors>({&grad, &call.gate.tensor, &call.up.tensor,
                                         &call.grad_gate.tensor, &call.grad_up.tensor}),
        .intermediate_size = size,
        .pieces_per_row = static_cast<int>(grid_size((vectors + piece - 1) / piece)),
    };
    const int64_t block_rows = (params.rows.count + rows_per_block - 1) / rows_per_block;
    const LaunchConfig config{
        .grid = dim3(grid_size(block_rows * params.pieces_per_row)),
        .block =
            dim3(static_cast<unsigned>(threads_per_row), static_cast<unsigned>(rows_per_block)),
        .stream = grad.stream(),
        .pdl = true,
    };
    const DeviceGuard guard(grad.device);
    if (wide) {
      launch(silu_and_mul_backward_kernel<T, 16 / static_cast<int>(sizeof(T))>, config, params);
    } else {
      launch(silu_and_mul_backward_kernel<T, 1>, config, params);
    }
  });
}

}  // namespace

void silu_and_mul_backward(Tensor grad, Tensor gate, std::optional<Tensor> up, Tensor grad_gate,
                           std::optional<Tensor> grad_up) {
  check_is_tensor("grad", grad);
  if (grad.ndim < 1) fail("grad", "(..., intermediate_size)", "()");
  if (up.has_value() != grad_up.has_value()) {
    throw std::invalid_argument("up, grad_up: expected both or neither");
  }
  const int64_t size = grad.size(-1);
  if (up.has_value()) {
    check_same_rows("gate", gate, grad, size);
    check_same_rows("up", *up, grad, size);
    check_same_rows("grad_gate", grad_gate, grad, size);
    check_same_rows("grad_up", *grad_up, grad, size);
    return run({{"grad", grad},
                {"gate", gate},
                {"up", *up},
                {"grad_gate", grad_gate},
                {"grad_up", *grad_up}});
  }
  check_same_rows("gate_up", gate, grad, 2 * size);
  check_same_rows("grad_gate_up", grad_gate, grad, 2 * size);
  const Half gate_half(gate, 0);
  const Half up_half(gate, 1);
  const Half grad_gate_half(grad_gate, 0);
  const Half grad_up_half(grad_gate, 1);
  run({{"grad", grad},
       {"gate_up", gate_half.tensor()},
       {"gate_up", up_half.tensor()},
       {"grad_gate_up", grad_gate_half.tensor()},
       {"grad_gate_up", grad_up_half.tensor()}});
}

}  // namespace exafuse
