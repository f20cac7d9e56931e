// The prefill kernels: many queries a sequence.
#pragma once

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

// Sequences of any number of queries over keys of any kind; chooses the kernel for the device.
// `cached`: the keys lie in a cache. All such calls take the same tiles, so that rings, pages and
// chunks give the same bits.
void launch_prefill(const AttentionParams& params, bool cached, Stream stream);

}  // namespace exafuse
