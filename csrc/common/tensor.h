// A tensor as the kernels' host functions see it: pointer, dtype, device, shape and strides. It
// owns nothing, knows neither Python nor a framework, and is valid during the call that received it
// only.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace exafuse {

// An argument that is no tensor at all: TypeError in Python. Every other wrong argument is a
// std::invalid_argument, which becomes ValueError.
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A tensor without plain memory behind it (fake, meta, wrapped by a transform, a subclass): kernels
// cannot take it, the caller's framework can.
struct NotAPlainTensor : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class DType : uint8_t { kBFloat16, kFloat16, kFloat32, kInt32, kInt64, kOther };

enum class DeviceType : uint8_t { kCPU, kCUDA, kOther };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;

  bool operator==(const Device&) const = default;
};

// The caller's CUDA stream; nullptr is the default stream.
using Stream = void*;

// Numbers as they come from the caller. `wrong_type` is the name of the type of something else,
// which the check of the argument reports, because only the check knows the argument's name.
struct Real {
  double value = 0;
  const char* wrong_type = nullptr;
};

struct Count {
  int64_t value = 0;
  const char* wrong_type = nullptr;
};

struct Tensor {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  const int64_t* shape = nullptr;    // [ndim]
  const int64_t* strides = nullptr;  // [ndim], in elements
  int ndim = 0;
  DType dtype = DType::kOther;
  Device device;
  // Asks the caller's framework which stream it works on; nullptr where there are no streams.
  Stream (*stream_of)(Device) = nullptr;
  // As in Real. No other member may be read then; every shape check looks at this first.
  const char* wrong_type = nullptr;

  // Size and stride of a dimension; negative counts from the end.
  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }

  int64_t numel() const {
    int64_t count = 1;
    for (int dim = 0; dim < ndim; ++dim) count *= shape[dim];
    return count;
  }

  Stream stream() const { return stream_of == nullptr ? nullptr : stream_of(device); }

  template <class T>
  T* data_as() const {
    return static_cast<T*>(data);
  }
};

constexpr int size_bytes(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
    case DType::kOther:
      break;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat32:
      return "float32";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kOther:
      break;
  }
  return "an unsupported dtype";
}

constexpr const char* name_of(DeviceType type) {
  switch (type) {
    case DeviceType::kCPU:
      return "cpu";
    case DeviceType::kCUDA:
      return "cuda";
    case DeviceType::kOther:
      break;
  }
  return "another device";
}

}  // namespace exafuse
