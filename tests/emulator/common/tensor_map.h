// The emulator's twin of csrc/common/tensor_map.h: a tensor map keeps what it was made from.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/launch.h"
#include "common/tensor_map_spec.h"

namespace exafuse {

// A member of a kernel's parameters, which must be __grid_constant__: the copy engine reads it
// there.
struct alignas(64) TensorMap {
  TensorMapSpec spec;
};
static_assert(sizeof(TensorMap) == 128 && std::is_trivially_copyable_v<TensorMap>);

inline const DeviceProperties& current_device() { return device_properties(0); }

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  const bool is_16_bit = spec.dtype == DType::kBFloat16 || spec.dtype == DType::kFloat16;
  if (!is_16_bit || spec.data == nullptr || spec.box_rows < 1 || spec.box_rows > kMaxBoxRows ||
      !fits_tensor_map(spec)) {
    throw std::runtime_error(
        "make_tensor_map: no tensor map can say sizes [" + std::to_string(spec.columns) + ", " +
        std::to_string(spec.rows) + ", " + std::to_string(spec.heads) + ", " +
        std::to_string(spec.batch) + "], strides [" + std::to_string(spec.row_stride) + ", " +
        std::to_string(spec.head_stride) + ", " + std::to_string(spec.batch_stride) +
        "], boxes of " + std::to_string(spec.box_rows) + " rows");
  }
  return {spec};
}

}  // namespace exafuse
