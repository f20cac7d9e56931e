// Tensors as the copy engine of sm_90 (TMA) takes them: boxes of 64 columns and some rows, from a
// tensor [batch, head, row, column] of 16-bit elements with any strides.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace exafuse {

// Columns of a box: 128 bytes, the width of the swizzle.
inline constexpr int kBoxColumns = 64;
inline constexpr int kMaxBoxRows = 256;

struct TensorMapSpec {
  void* data = nullptr;
  DType dtype = DType::kOther;
  int64_t columns = 0;  // stride 1
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t batch = 0;
  int64_t row_stride = 0;  // in elements, as the others
  int64_t head_stride = 0;
  int64_t batch_stride = 0;
  int box_rows = 0;
};

// Whether a tensor map can say it: addresses in steps of 16 bytes, no stride of zero.
constexpr bool fits_tensor_map(const TensorMapSpec& spec) {
  constexpr int64_t kMaxSize = int64_t{1} << 32;
  constexpr int64_t kMaxStride = int64_t{1} << 39;  // elements
  const auto fits = [](int64_t size, int64_t stride) {
    return size >= 1 && size <= kMaxSize &&
           (size == 1 || (stride > 0 && stride % 8 == 0 && stride < kMaxStride));
  };
  return reinterpret_cast<uintptr_t>(spec.data) % 16 == 0 && fits(spec.columns, 8) &&
         fits(spec.rows, spec.row_stride) && fits(spec.heads, spec.head_stride) &&
         fits(spec.batch, spec.batch_stride);
}

}  // namespace exafuse
