// The prefill kernel of sm_80 and every later GPU.
#pragma once

#include "common/tensor.h"
#include "kernels/attention/params.h"

namespace exafuse {

void launch_prefill_sm80(const AttentionParams& params, Stream stream);

}  // namespace exafuse
