// From run-time values to template arguments, without macros. A value that is not compiled is an
// error that lists what is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "common/tensor.h"

namespace exafuse {

template <class T>
struct TypeTag {
  using type = T;
};

template <auto kValueOf>
struct ValueTag {
  static constexpr auto kValue = kValueOf;
};

// Calls `body(TypeTag<T>{})` with the element type of `dtype`.
template <class Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kFloat32:
      return body(TypeTag<float>{});
    default:
      throw std::invalid_argument(std::string("expected dtype bfloat16, float16 or float32, got ") +
                                  name_of(dtype));
  }
}

// Calls `body(ValueTag<value>{})` for the one of kValues that equals `value`.
template <auto... kValues, class Value, class Body>
void dispatch_value(const char* name, Value value, Body&& body) {
  const bool found = ((value == kValues ? (body(ValueTag<kValues>{}), true) : false) || ...);
  if (!found) {
    std::string compiled;
    ((compiled += (compiled.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    throw std::invalid_argument(std::string(name) + ": compiled for " + compiled + ", got " +
                                std::to_string(value));
  }
}

// Ops take head dimensions that are multiples of 8 up to this.
inline constexpr int kMaxHeadDim = 128;

// Calls `body(ValueTag<tile>{})` with the narrowest compiled tile of columns that holds a head;
// kernels fill the rest with zeros.
template <class Body>
void dispatch_head_dim(int head_dim, Body&& body) {
  const int tile = head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : kMaxHeadDim;
  dispatch_value<64, 96, kMaxHeadDim>("head_dim", tile, body);
}

template <class Body>
void dispatch_bool(bool value, Body&& body) {
  if (value) {
    body(ValueTag<true>{});
  } else {
    body(ValueTag<false>{});
  }
}

}  // namespace exafuse
