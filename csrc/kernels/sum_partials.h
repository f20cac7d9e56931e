// The second step of a sum over many rows: partial sums, one row for each part, are added up in the
// order of the parts.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace exafuse {

// out[c] = sum over p of partials[p][c], rounded once.
//   partials  [parts, columns]   fp32, or fp64 where is_fp64
//   out       [columns]          bf16, fp16 or fp32
// Launches on the current device.
void launch_sum_partials(const void* partials, bool is_fp64, int64_t parts, int columns,
                         const Tensor& out, Stream stream);

}  // namespace exafuse
