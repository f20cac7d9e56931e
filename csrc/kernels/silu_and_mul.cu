// The activation of SwiGLU feed-forward layers (Shazeer 2020): out = gate / (1 + exp(-gate)) * up.
//
// Each byte moves once, in 16-byte accesses, two vectors of gate and two of up in flight per
// thread. Short rows share a block, long ones are cut into pieces. The geometry depends on dtype
// and row length.

#include <cmath>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/rows.cuh"
#include "common/vec.cuh"
#include "ops.h"

namespace exafuse {
namespace {

inline constexpr int kBlockThreads = 256;
inline constexpr int kVectorsPerThread = 2;

// --- kernel -------------------------------------------------------------------------------------

enum RowTensor { kGate, kUp, kOut, kNumRowTensors };

template <class T>
struct SiluParams {
  const T* gate;  // [rows, intermediate_size]
  const T* up;    // [rows, intermediate_size]
  T* out;         // [rows, intermediate_size]
  Rows<kNumRowTensors> rows;
  int64_t intermediate_size;
  int pieces_per_row;
};

__device__ __forceinline__ double silu_times(double gate, double up) {
  const double decay = std::exp(-std::fabs(gate));
  const double sigmoid = (gate >= 0 ? 1.0 : decay) / (1.0 + decay);
  return gate * sigmoid * up;
}

// With h = exp(-|gate| / 2): a negative gate gives (gate * h) * (up * h) / (1 + h^2), whose factors
// stay in range as long as the result does. exp(-|gate|) itself would be gone below -104, where
// bf16 values of up still make results that count.
__device__ __forceinline__ float silu_times(float gate, float up) {
  constexpr float kHalfLog2E = 0.72134752f;
  const float root = ptx::exp2(-kHalfLog2E * std::fabs(gate));
  const float share = gate >= 0 ? 1.0f : root;
  return (gate * share * ptx::rcp(1.0f + root * root)) * (up * share);
}

// Thread (x, y) of a block works on row block_row * blockDim.y + y, on vectors x and x + blockDim.x
// of the block's piece of it.
template <class T, int kElements>
__global__ void __launch_bounds__(kBlockThreads)
    silu_and_mul_kernel(const __grid_constant__ SiluParams<T> p) {
  using Vector = Vec<T, kElements>;
  const int64_t block_row = blockIdx.x / static_cast<unsigned>(p.pieces_per_row);
  const int64_t piece = blockIdx.x % static_cast<unsigned>(p.pieces_per_row);
  const int64_t row = block_row * blockDim.y + threadIdx.y;
  const int64_t first_column = (piece * kVectorsPerThread * blockDim.x + threadIdx.x) * kElements;
  const int64_t column_step = static_cast<int64_t>(blockDim.x) * kElements;

  ptx::griddep_wait();
  if (row >= p.rows.count) return;
  const auto offsets = p.rows.offsets(row);
  const T* gate_row = p.gate + offsets.of[kGate];
  const T* up_row = p.up + offsets.of[kUp];
  T* out_row = p.out + offsets.of[kOut];

  Vector gate[kVectorsPerThread];
  Vector up[kVectorsPerThread];
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first_column + i * column_step;
    if (column < p.intermediate_size) {
      gate[i] = Vector::template load<true>(gate_row + column);
      up[i] = Vector::template load<true>(up_row + column);
    }
  }
  ptx::griddep_launch_dependents();
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first_column + i * column_step;
    if (column < p.intermediate_size) {
      Compute<T> out[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) out[j] = silu_times(gate[i].get(j), up[i].get(j));
      Vector::rounded(out).template store<true>(out_row + column);
    }
  }
}

// --- host ---------------------------------------------------------------------------------------

// The two halves of a packed gate_up, as tensors of their own.
class Halves {
 public:
  explicit Halves(const Tensor& packed) : gate_(packed), up_(packed) {
    std::copy(packed.shape, packed.shape + packed.ndim, shape_);
    const int64_t half = packed.size(-1) / 2;
    shape_[packed.ndim - 1] = half;
    gate_.shape = up_.shape = shape_;
    up_.data = packed.data_as<char>() + half * size_bytes(packed.dtype);
  }
  Halves(const Halves&) = delete;

  const Tensor& gate() const { return gate_; }
  const Tensor& up() const { return up_; }

 private:
  int64_t shape_[Tensor::kMaxDims];
  Tensor gate_;
  Tensor up_;
};

void run_silu_and_mul(const char* gate_name, const Tensor& gate, const char* up_name,
                      const Tensor& up, const Tensor& out) {
  check_same_rows("out", out, gate, gate.size(-1));
  check_float_dtype(gate_name, gate);
  check_dtype(up_name, up, {gate.dtype});
  check_dtype("out", out, {gate.dtype});
  check_last_stride(gate_name, gate);
  check_last_stride(up_name, up);
  check_last_stride("out", out);
  check_alignment(gate_name, gate);
  check_alignment(up_name, up);
  check_alignment("out", out);
  check_writable("out", out);
  check_disjoint_or_same("out", out, gate_name, gate);
  check_disjoint_or_same("out", out, up_name, up);
  check_device(gate_name, gate);
  check_device(up_name, up, gate.device);
  check_device("out", out, gate.device);
  if (out.numel() == 0) return;

  const int64_t size = gate.size(-1);
  const int elements_per_vector = 16 / size_bytes(gate.dtype);
  const bool wide = size % elements_per_vector == 0 && is_aligned(gate, 16) && is_aligned(up, 16) &&
                    is_aligned(out, 16);
  const int64_t vectors = wide ? size / elements_per_vector : size;
  int64_t threads_per_row = 1;
  while (threads_per_row < kBlockThreads && threads_per_row * kVectorsPerThread < vectors) {
    threads_per_row *= 2;
  }
  const int64_t rows_per_block = kBlockThreads / threads_per_row;
  const int64_t piece = threads_per_row * kVectorsPerThread;

  dispatch_dtype(gate.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    SiluParams<T> params{
        .gate = gate.data_as<const T>(),
        .up = up.data_as<const T>(),
        .out = out.data_as<T>(),
        .rows = rows_of<kNumRowTensors>({&gate, &up, &out}),
        .intermediate_size = size,
        .pieces_per_row = static_cast<int>(grid_size((vectors + piece - 1) / piece)),
    };
    const int64_t block_rows = (params.rows.count + rows_per_block - 1) / rows_per_block;
    const LaunchConfig config{
        .grid = dim3(grid_size(block_rows * params.pieces_per_row)),
        .block =
            dim3(static_cast<unsigned>(threads_per_row), static_cast<unsigned>(rows_per_block)),
        .stream = gate.stream(),
        .pdl = true,
    };
    const DeviceGuard guard(gate.device);
    if (wide) {
      launch(silu_and_mul_kernel<T, 16 / static_cast<int>(sizeof(T))>, config, params);
    } else {
      launch(silu_and_mul_kernel<T, 1>, config, params);
    }
  });
}

}  // namespace

void silu_and_mul(Tensor gate, std::optional<Tensor> up, Tensor out) {
  if (up.has_value()) {
    check_is_tensor("gate", gate);
    if (gate.ndim < 1) fail("gate", "(..., intermediate_size)", "()");
    check_same_rows("up", *up, gate, gate.size(-1));
    return run_silu_and_mul("gate", gate, "up", *up, out);
  }
  check_is_tensor("gate_up", gate);
  if (gate.ndim < 1 || gate.size(-1) % 2 != 0) {
    fail("gate_up", "(..., 2 * intermediate_size)", to_string(gate.shape, gate.ndim));
  }
  const Halves halves(gate);
  run_silu_and_mul("gate_up", halves.gate(), "gate_up", halves.up(), out);
}

}  // namespace exafuse
