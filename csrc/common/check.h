// Checks of tensor arguments. Dimensions are symbols: the first use binds a name to a size, later
// uses must agree, and the message is generated from the check, so that the two cannot drift apart:
//
//   k: expected (total_k, num_kv_heads, head_dim=128), got (7, 2, 64)
//
// A host function checks shapes, then dtypes, strides, alignment, overlap, and the device last, so
// that everything but the device can be tested on any machine. Nothing here allocates unless it
// throws.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/tensor.h"

namespace exafuse {

// A named dimension of one call.
struct Dim {
  const char* name;
  int64_t value = -1;  // not bound yet
};

// One entry of an expected shape: a symbol, or a fixed size.
struct Expected {
  Dim* symbol = nullptr;
  int64_t fixed = 0;

  Expected(Dim& dim) : symbol(&dim) {}     // NOLINT: implicit by design, shapes read as lists
  Expected(int64_t size) : fixed(size) {}  // NOLINT
  Expected(int size) : fixed(size) {}      // NOLINT

  bool accept(int64_t size) const {
    if (symbol == nullptr) return size == fixed;
    if (symbol->value < 0) symbol->value = size;
    return symbol->value == size;
  }
};

using Shape = std::initializer_list<Expected>;

inline std::string to_string(Shape shape, const char* prefix = "") {
  std::string text = std::string("(") + prefix;
  const char* separator = "";
  for (const Expected& dim : shape) {
    text += separator;
    separator = ", ";
    if (dim.symbol == nullptr) {
      text += std::to_string(dim.fixed);
    } else {
      text += dim.symbol->name;
      if (dim.symbol->value >= 0) text += "=" + std::to_string(dim.symbol->value);
    }
  }
  return text + ")";
}

inline std::string to_string(const int64_t* values, int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}

inline std::string to_string(Device device) {
  std::string text = name_of(device.type);
  return device.type == DeviceType::kCPU ? text : text + ":" + std::to_string(device.index);
}

[[noreturn]] inline void fail(const char* name, const std::string& expected,
                              const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

[[noreturn]] inline void fail_type(const char* name, const char* expected, const char* got) {
  throw WrongType(std::string(name) + ": expected " + expected + ", got " + got);
}

// The first check of every tensor argument; the shape checks call it.
inline void check_is_tensor(const char* name, const Tensor& tensor) {
  if (tensor.wrong_type != nullptr) {
    fail_type(name, "a torch.Tensor", tensor.wrong_type);
  }
  if (tensor.ndim > Tensor::kMaxDims) {
    fail(name, "at most 8 dimensions", to_string(tensor.shape, tensor.ndim));
  }
}

// --- shape --------------------------------------------------------------------------------------

inline void check_shape(const char* name, const Tensor& tensor, Shape shape) {
  check_is_tensor(name, tensor);
  bool matches = tensor.ndim == static_cast<int>(shape.size());
  const int64_t* size = tensor.shape;
  if (matches) {
    for (const Expected& dim : shape) matches = dim.accept(*size++) && matches;
  }
  if (!matches) fail(name, to_string(shape), to_string(tensor.shape, tensor.ndim));
}

// `[..., last]`: any leading dimensions.
inline void check_last_dim(const char* name, const Tensor& tensor, Expected last) {
  check_is_tensor(name, tensor);
  if (tensor.ndim < 1 || !last.accept(tensor.size(-1))) {
    fail(name, to_string({last}, "..., "), to_string(tensor.shape, tensor.ndim));
  }
}

// The leading dimensions of `other`, then `last`.
inline void check_same_rows(const char* name, const Tensor& tensor, const Tensor& other,
                            int64_t last) {
  check_is_tensor(name, tensor);
  if (tensor.ndim == other.ndim && tensor.size(-1) == last &&
      std::equal(tensor.shape, tensor.shape + tensor.ndim - 1, other.shape)) {
    return;
  }
  int64_t expected[Tensor::kMaxDims];
  std::copy(other.shape, other.shape + other.ndim, expected);
  expected[other.ndim - 1] = last;
  fail(name, to_string(expected, other.ndim), to_string(tensor.shape, tensor.ndim));
}

inline void check_multiple(const char* name, int64_t value, int64_t factor, int64_t maximum) {
  if (value < 1 || value % factor != 0 || value > maximum) {
    fail(name,
         "a multiple of " + std::to_string(factor) + " from " + std::to_string(factor) + " to " +
             std::to_string(maximum),
         std::to_string(value));
  }
}

// --- dtype --------------------------------------------------------------------------------------

inline void check_dtype(const char* name, const Tensor& tensor,
                        std::initializer_list<DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.dtype) != allowed.end()) return;
  std::string expected = "dtype ";
  const char* separator = "";
  for (auto dtype = allowed.begin(); dtype != allowed.end(); ++dtype) {
    if (std::find(allowed.begin(), dtype, *dtype) != dtype) continue;
    expected += std::string(separator) + name_of(*dtype);
    separator = " or ";
  }
  fail(name, expected, name_of(tensor.dtype));
}

inline void check_float_dtype(const char* name, const Tensor& tensor) {
  check_dtype(name, tensor, {DType::kBFloat16, DType::kFloat16, DType::kFloat32});
}

// --- strides and alignment ----------------------------------------------------------------------

inline void check_last_stride(const char* name, const Tensor& tensor) {
  if (tensor.ndim > 0 && tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    fail(name, "stride 1 in the last dimension",
         "strides " + to_string(tensor.strides, tensor.ndim) + "; call .contiguous() first");
  }
}

// Every element on a multiple of its own size.
inline void check_alignment(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  const auto element = static_cast<uintptr_t>(size_bytes(tensor.dtype));
  if (element > 1 && address % element != 0) {
    fail(name, "data aligned to its elements of " + std::to_string(element) + " bytes",
         "an address that is " + std::to_string(address % element) + " bytes off");
  }
}

// Whether vectors of `bytes` bytes (a power of two) starting at multiples of their size in the last
// dimension are aligned in every row.
inline bool is_aligned(const Tensor& tensor, int bytes) {
  auto bits = reinterpret_cast<uintptr_t>(tensor.data);
  for (int dim = 0; dim < tensor.ndim - 1; ++dim) {
    if (tensor.shape[dim] > 1) {
      bits |= static_cast<uintptr_t>(tensor.strides[dim] * size_bytes(tensor.dtype));
    }
  }
  return (bits & static_cast<uintptr_t>(bytes - 1)) == 0;
}

// --- overlap ------------------------------------------------------------------------------------

// Bytes from the first to behind the last element, over the dimensions whose stride is below
// `limit`.
inline int64_t extent_bytes(const Tensor& tensor, int64_t limit) {
  int64_t extent = size_bytes(tensor.dtype);
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    const int64_t stride = tensor.strides[dim] * size_bytes(tensor.dtype);
    if (stride < limit) extent += (tensor.shape[dim] - 1) * stride;
  }
  return extent;
}

// Whether every stride of at least `period` bytes is a multiple of it.
inline bool repeats_with(const Tensor& tensor, int64_t period) {
  for (int dim = 0; dim < tensor.ndim; ++dim) {
    const int64_t stride = tensor.strides[dim] * size_bytes(tensor.dtype);
    if (tensor.shape[dim] > 1 && stride >= period && stride % period != 0) return false;
  }
  return true;
}

// Whether two tensors may share memory. Exact for views that are slices of one packed buffer: two
// tensors that repeat with a common period are apart if they are apart within it.
inline bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto a_begin = reinterpret_cast<intptr_t>(a.data);
  const auto b_begin = reinterpret_cast<intptr_t>(b.data);
  if (a_begin + extent_bytes(a, INT64_MAX) <= b_begin ||
      b_begin + extent_bytes(b, INT64_MAX) <= a_begin) {
    return false;
  }
  for (int dim = 0; dim < a.ndim; ++dim) {
    const int64_t period = a.strides[dim] * size_bytes(a.dtype);
    if (a.shape[dim] < 2 || period <= 0 || !repeats_with(a, period) || !repeats_with(b, period)) {
      continue;
    }
    const int64_t distance = ((b_begin - a_begin) % period + period) % period;
    if (distance >= extent_bytes(a, period) && distance + extent_bytes(b, period) <= period) {
      return false;
    }
  }
  return true;
}

// Whether element i of one is element i of the other. The shapes are equal.
inline bool is_same_view(const Tensor& a, const Tensor& b) {
  if (a.data != b.data || a.dtype != b.dtype) return false;
  for (int dim = 0; dim < a.ndim; ++dim) {
    if (a.shape[dim] > 1 && a.strides[dim] != b.strides[dim]) return false;
  }
  return true;
}

// An output must give every element its own memory: no expanded dimension.
inline void check_writable(const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t needed = 1;  // smallest stride that the next dimension may have
  bool done[Tensor::kMaxDims] = {};
  for (int round = 0; round < tensor.ndim; ++round) {
    int smallest = -1;
    for (int dim = 0; dim < tensor.ndim; ++dim) {
      if (!done[dim] && (smallest < 0 || tensor.strides[dim] < tensor.strides[smallest])) {
        smallest = dim;
      }
    }
    done[smallest] = true;
    if (tensor.shape[smallest] == 1) continue;
    if (tensor.strides[smallest] < needed) {
      fail(name, "an output whose elements do not share memory",
           "shape " + to_string(tensor.shape, tensor.ndim) + " with strides " +
               to_string(tensor.strides, tensor.ndim));
    }
    needed += (tensor.shape[smallest] - 1) * tensor.strides[smallest];
  }
}

inline void check_disjoint(const char* output_name, const Tensor& output, const char* name,
                           const Tensor& tensor) {
  if (may_overlap(output, tensor)) {
    fail(output_name, std::string("memory apart from ") + name, "an overlap");
  }
}

// The kernel reads element i of the input before it writes element i of the output, and no other
// thread reads it: the output may be the input itself, but not share memory with it in any other
// way.
inline void check_disjoint_or_same(const char* output_name, const Tensor& output, const char* name,
                                   const Tensor& input) {
  if (may_overlap(output, input) && !is_same_view(output, input)) {
    fail(output_name, std::string("exactly the memory of ") + name + " or memory apart from it",
         "a partial overlap");
  }
}

// --- scalars and device -------------------------------------------------------------------------

inline void check_eps(Real eps) {
  if (eps.wrong_type != nullptr) fail_type("eps", "a number", eps.wrong_type);
  if (!(eps.value >= 0) || !std::isfinite(eps.value)) {
    fail("eps", "a finite number >= 0", std::to_string(eps.value));
  }
}

inline int64_t check_count(const char* name, Count count) {
  if (count.wrong_type != nullptr) fail_type(name, "an int", count.wrong_type);
  return count.value;
}

// The first tensor of a call: it must live where this build's kernels run.
inline void check_device(const char* name, const Tensor& tensor) {
  if (tensor.device.type != kKernelDevice) {
    fail(name, std::string("a ") + name_of(kKernelDevice) + " tensor", to_string(tensor.device));
  }
}

// Every other tensor: the same device as the first.
inline void check_device(const char* name, const Tensor& tensor, Device device) {
  if (!(tensor.device == device)) fail(name, to_string(device), to_string(tensor.device));
}

}  // namespace exafuse
