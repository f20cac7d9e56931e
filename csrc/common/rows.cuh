// Rows of tensors of shape [..., last] with any strides, addressed by one row number. Leading
// dimensions that are contiguous to each other in every tensor of the call are merged first, so
// that the usual case is a single multiplication per row.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#include "common/check.h"
#include "common/tensor.h"

namespace exafuse {

template <int kTensors>
struct Rows {
  static constexpr int kMaxDims = 4;

  int64_t count = 1;  // product of sizes
  int num_dims = 0;
  int64_t sizes[kMaxDims] = {};              // innermost first
  int64_t strides[kMaxDims][kTensors] = {};  // in elements

  struct Offsets {
    int64_t of[kTensors];
  };

  // Element offset of a row in each tensor.
  __device__ __forceinline__ Offsets offsets(int64_t row) const {
    Offsets offsets = {};
#pragma unroll 1
    for (int dim = 0; dim < num_dims; ++dim) {
      int64_t index = row;
      if (dim + 1 < num_dims) {
        index = row % sizes[dim];
        row /= sizes[dim];
      }
      for (int tensor = 0; tensor < kTensors; ++tensor) {
        offsets.of[tensor] += index * strides[dim][tensor];
      }
    }
    return offsets;
  }
};

// The rows of `tensors`, whose leading dimensions agree. Tensors absent from a call are passed as
// any other of them.
template <int kTensors>
Rows<kTensors> rows_of(const Tensor* const (&tensors)[kTensors]) {
  Rows<kTensors> rows;
  const Tensor& first = *tensors[0];
  for (int dim = first.ndim - 2; dim >= 0; --dim) {
    const int64_t size = first.shape[dim];
    rows.count *= size;
    if (size == 1) continue;
    bool merges = rows.num_dims > 0;
    for (int i = 0; i < kTensors && merges; ++i) {
      const int inner = rows.num_dims - 1;
      merges = tensors[i]->strides[dim] == rows.strides[inner][i] * rows.sizes[inner];
    }
    if (merges) {
      rows.sizes[rows.num_dims - 1] *= size;
      continue;
    }
    if (rows.num_dims == Rows<kTensors>::kMaxDims) {
      throw std::invalid_argument(
          "expected at most 4 leading dimensions that cannot be merged into one, got strides " +
          to_string(first.strides, first.ndim) + "; call .contiguous() first");
    }
    rows.sizes[rows.num_dims] = size;
    for (int i = 0; i < kTensors; ++i) rows.strides[rows.num_dims][i] = tensors[i]->strides[dim];
    ++rows.num_dims;
  }
  return rows;
}

}  // namespace exafuse
