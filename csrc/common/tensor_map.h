// Tensor maps: what a kernel gives the copy engine of sm_90 (TMA) to say which tensor it means.
// tests/emulator has a file of the same name with the same signatures.
#pragma once

#include <cudaTypedefs.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor_map_spec.h"

namespace exafuse {

inline const DeviceProperties& current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device_properties(device);
}

// A member of a kernel's parameters, which must be __grid_constant__: the copy engine reads it
// there.
struct TensorMap {
  CUtensorMap map;
};

// For specs that fits_tensor_map. The driver encodes; it is asked for by name at run time, so that
// the extension needs no driver to be loaded.
inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("this driver has no cuTensorMapEncodeTiled: it needs CUDA 12.0");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  const auto bytes = [&](int64_t size, int64_t stride) {
    // The stride of a dimension of one element is never used, and still checked.
    return static_cast<cuuint64_t>(2 * (size > 1 ? stride : spec.columns));
  };
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(spec.columns), static_cast<cuuint64_t>(spec.rows),
      static_cast<cuuint64_t>(spec.heads), static_cast<cuuint64_t>(spec.batch)};
  const cuuint64_t strides[] = {bytes(spec.rows, spec.row_stride),
                                bytes(spec.heads, spec.head_stride),
                                bytes(spec.batch, spec.batch_stride)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(spec.box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map.map,
             spec.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, spec.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) +
                             " for sizes [" + std::to_string(sizes[0]) + ", " +
                             std::to_string(sizes[1]) + ", " + std::to_string(sizes[2]) + ", " +
                             std::to_string(sizes[3]) + "], strides in bytes [" +
                             std::to_string(strides[0]) + ", " + std::to_string(strides[1]) + ", " +
                             std::to_string(strides[2]) + "]");
  }
  return map;
}

}  // namespace exafuse
