// The prefill kernels: many queries a sequence.
#pragma once

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// Sequences of any number of queries over keys of any kind; chooses the kernel for the device.
void launch_prefill(const AttentionParams& params, Stream stream);

}  // namespace exafuse
