// What the sm_90a wrappers take the hardware to be, one instruction at a time: how a copied box
// lies in shared memory, which elements of it a product reads, where the product's results are.
// Compiled by nvcc for a GPU and by the emulator's build for the CPU; tests/hopper_probes.py loads
// either and compares with the formulas.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/ptx_sm90.cuh"
#include "common/tensor_map.h"

namespace exafuse {
namespace {

constexpr int kThreads = 128;
constexpr int kDepth = 128;  // of the products: two panels along a row, eight steps
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;

template <int kBytesOf>
struct alignas(1024) Image {
  static constexpr int kBytes = kBytesOf;
  char bytes[kBytes];
};

// --- boxes --------------------------------------------------------------------------------------

struct BoxParams {
  TensorMap map;
  uint4* image;
  int rows;
  int at[4];  // column, row, head, batch
};

struct BoxShared {
  Image<kMaxBoxRows * kRowBytes>* box;
  uint64_t* full;

  template <class Arena>
  static constexpr BoxShared take_from(Arena& arena) {
    return {arena.template take<Image<kMaxBoxRows * kRowBytes>, 1>(),
            arena.template take<uint64_t, 1>()};
  }
};

__device__ __forceinline__ bool is_first_warp() {
  return ptx::shfl(static_cast<int>(threadIdx.x) / ptx::kWarpSize, 0) == 0;
}

__global__ void __launch_bounds__(kThreads) load_box_kernel(const __grid_constant__ BoxParams p) {
  SharedArena arena;
  const BoxShared shared = BoxShared::take_from(arena);
  const uint32_t box = ptx::smem_addr(shared.box);
  const uint32_t full = ptx::smem_addr(shared.full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  if (is_first_warp() && ptx::elect_one()) {
    ptx::mbarrier_arrive_expect_tx(full, p.rows * kRowBytes);
    ptx::tma_load(box, p.map, full, p.at[0], p.at[1], p.at[2], p.at[3]);
  }
  ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < p.rows * kRowBytes / 16; i += kThreads) {
    p.image[i] = ptx::ld_shared(box + 16 * i);
  }
}

__global__ void __launch_bounds__(kThreads) store_box_kernel(const __grid_constant__ BoxParams p) {
  SharedArena arena;
  const BoxShared shared = BoxShared::take_from(arena);
  const uint32_t box = ptx::smem_addr(shared.box);
  for (int i = static_cast<int>(threadIdx.x); i < p.rows * kRowBytes / 16; i += kThreads) {
    ptx::st_shared(box + 16 * i, p.image[i]);
  }
  ptx::fence_proxy_async();
  ptx::sync_threads();
  if (is_first_warp() && ptx::elect_one()) {
    ptx::tma_store(p.map, box, p.at[0], p.at[1], p.at[2], p.at[3]);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

// --- products -----------------------------------------------------------------------------------

enum class Operands : uint8_t { kDepthAlongRow, kDepthByRow, kRegisters };

struct ProductParams {
  const uint4* a;  // an image; for kRegisters the matrix [64, kDepth] as it is
  const uint4* b;  // an image
  float* d;        // [64, columns]
};

template <int kColumns, Operands kOperands>
struct ProductShared {
  static constexpr int kPanels = (kColumns + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelBytes =
      (kOperands == Operands::kDepthAlongRow ? kColumns : kDepth) * kRowBytes;
  static constexpr int kBBytes =
      kPanelBytes * (kOperands == Operands::kDepthAlongRow ? kDepth / kPanelColumns : kPanels);

  Image<64 * kDepth * 2>* a;
  Image<kBBytes>* b;

  template <class Arena>
  static constexpr ProductShared take_from(Arena& arena) {
    return {arena.template take<Image<64 * kDepth * 2>, 1>(),
            arena.template take<Image<kBBytes>, 1>()};
  }
};

// d = a b, by one warpgroup.
template <class T, int kColumns, Operands kOperands>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ ProductParams p) {
  using Shared = ProductShared<kColumns, kOperands>;
  constexpr bool kFromRegisters = kOperands == Operands::kRegisters;
  SharedArena arena;
  const Shared shared = Shared::take_from(arena);
  const uint32_t a = ptx::smem_addr(shared.a);
  const uint32_t b = ptx::smem_addr(shared.b);
  const int tid = static_cast<int>(threadIdx.x);
  if constexpr (!kFromRegisters) {
    for (int i = tid; i < 64 * kDepth * 2 / 16; i += kThreads) {
      ptx::st_shared(a + 16 * i, p.a[i]);
    }
  }
  for (int i = tid; i < Shared::kBBytes / 16; i += kThreads) ptx::st_shared(b + 16 * i, p.b[i]);
  ptx::fence_proxy_async();
  ptx::sync_threads();

  const int row = tid / ptx::kWarpSize * 16 + tid % ptx::kWarpSize / 4;
  const int pair = tid % 4;
  uint32_t fragments[kDepth / 16][4];
  if constexpr (kFromRegisters) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(p.a);
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        fragments[step][j] = words[(row + j % 2 * 8) * (kDepth / 2) + step * 8 + j / 2 * 4 + pair];
      }
    }
  }

  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = -1;  // the first step must not add to it
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint32_t along_row = step % 4 * 32;  // bytes of 16 elements
    const uint32_t by_row = step * 16 * kRowBytes;
    const uint64_t from_b =
        kOperands == Operands::kDepthAlongRow
            ? ptx::wgmma_descriptor(b + step / 4 * Shared::kPanelBytes + along_row, 0)
            : ptx::wgmma_descriptor(b + by_row, Shared::kPanelBytes);
    if constexpr (kFromRegisters) {
      ptx::wgmma_rs<T, kColumns>(d, fragments[step], from_b, step > 0);
    } else {
      const uint64_t from_a = ptx::wgmma_descriptor(a + step / 4 * 64 * kRowBytes + along_row, 0);
      constexpr ptx::WgmmaB kLayout = kOperands == Operands::kDepthByRow
                                          ? ptx::WgmmaB::kDepthByRow
                                          : ptx::WgmmaB::kDepthAlongRow;
      ptx::wgmma_ss<T, kColumns, kLayout>(d, from_a, from_b, step > 0);
    }
  }
  ptx::wgmma_commit();
  if constexpr (kFromRegisters) {
    ptx::wgmma_wait<0>(d, fragments);
  } else {
    ptx::wgmma_wait<0>(d);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const int column = i / 4 * 8 + 2 * pair + i % 2;
    p.d[(row + i / 2 % 2 * 8) * kColumns + column] = d[i];
  }
}

// --- host ---------------------------------------------------------------------------------------

std::string last_error;

// 0, or 1 and the message in last_error.
template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

template <class T, int kColumns>
void launch_product(Operands operands, const ProductParams& params) {
  const auto go = [&](auto kernel, int bytes) {
    launch(kernel, {.grid = dim3(1), .block = dim3(kThreads), .smem_bytes = bytes}, params);
  };
  if (operands == Operands::kDepthAlongRow) {
    go(product_kernel<T, kColumns, Operands::kDepthAlongRow>,
       shared_bytes<ProductShared<kColumns, Operands::kDepthAlongRow>>());
  } else if (operands == Operands::kDepthByRow) {
    go(product_kernel<T, kColumns, Operands::kDepthByRow>,
       shared_bytes<ProductShared<kColumns, Operands::kDepthByRow>>());
  } else {
    go(product_kernel<T, kColumns, Operands::kRegisters>,
       shared_bytes<ProductShared<kColumns, Operands::kRegisters>>());
  }
}

template <class T>
void launch_product_of(int columns, Operands operands, const ProductParams& params) {
  switch (columns) {
    case 64:
      return launch_product<T, 64>(operands, params);
    case 96:
      return launch_product<T, 96>(operands, params);
    case 128:
      return launch_product<T, 128>(operands, params);
    case 160:
      return launch_product<T, 160>(operands, params);
    case 176:
      return launch_product<T, 176>(operands, params);
    case 192:
      return launch_product<T, 192>(operands, params);
    default:
      throw std::invalid_argument("no product of " + std::to_string(columns) + " columns");
  }
}

}  // namespace
}  // namespace exafuse

#define EXAFUSE_PROBE extern "C" __attribute__((visibility("default")))

EXAFUSE_PROBE const char* exafuse_probe_error() { return exafuse::last_error.c_str(); }

// Copies a box of a tensor [batch, head, row, column] to `image`, or `image` to the box, as it lies
// in shared memory. `sizes`: columns, rows, heads, batch; `strides` in elements: row, head, batch;
// `at`: column, row, head, batch.
EXAFUSE_PROBE int exafuse_probe_box(int store, void* data, int is_bf16, const int64_t* sizes,
                                    const int64_t* strides, int box_rows, const int* at,
                                    void* image) {
  using namespace exafuse;
  return guarded([&] {
    const TensorMapSpec spec{.data = data,
                             .dtype = is_bf16 != 0 ? DType::kBFloat16 : DType::kFloat16,
                             .columns = sizes[0],
                             .rows = sizes[1],
                             .heads = sizes[2],
                             .batch = sizes[3],
                             .row_stride = strides[0],
                             .head_stride = strides[1],
                             .batch_stride = strides[2],
                             .box_rows = box_rows};
    if (!fits_tensor_map(spec)) throw std::invalid_argument("no tensor map can say this");
    const BoxParams params{.map = make_tensor_map(spec),
                           .image = static_cast<uint4*>(image),
                           .rows = box_rows,
                           .at = {at[0], at[1], at[2], at[3]}};
    launch(store != 0 ? store_box_kernel : load_box_kernel,
           {.grid = dim3(1), .block = dim3(kThreads), .smem_bytes = shared_bytes<BoxShared>()},
           params);
  });
}

// d [64, columns] = a [64, 128] b. `operands`: 0 depth along the rows of b, 1 depth by its rows, 2
// the same with a from registers.
EXAFUSE_PROBE int exafuse_probe_product(int operands, int is_bf16, int columns, const void* a,
                                        const void* b, float* d) {
  using namespace exafuse;
  return guarded([&] {
    const ProductParams params{
        .a = static_cast<const uint4*>(a), .b = static_cast<const uint4*>(b), .d = d};
    const auto kind = static_cast<Operands>(operands);
    if (is_bf16 != 0) {
      launch_product_of<__nv_bfloat16>(columns, kind, params);
    } else {
      launch_product_of<__half>(columns, kind, params);
    }
  });
}
