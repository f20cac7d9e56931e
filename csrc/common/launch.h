// Everything between a host function and the CUDA runtime: launching, device guard, device
// properties, the size of shared memory. tests/emulator has a file of the same name with the same
// signatures, so that one kernel source serves both; this one compiles under nvcc and under a plain
// host compiler.
//
// Shared memory. A kernel describes its arrays once, in a struct that takes them from an arena:
//
//   struct Scratch {
//     float* row_sums;
//     template <class Arena>
//     static constexpr Scratch take_from(Arena& arena) {
//       return {arena.template take<float, 32>()};
//     }
//   };
//
// In the kernel: `SharedArena arena; Scratch scratch = Scratch::take_from(arena);` (ptx.cuh). On
// the host: `LaunchConfig{..., .smem_bytes = shared_bytes<Scratch>()}`. Both walk the same list.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/tensor.h"

namespace exafuse {

// Where the kernels of this build run; host functions refuse tensors that live elsewhere.
inline constexpr DeviceType kKernelDevice = DeviceType::kCUDA;
inline constexpr const char* kBackendName = "cuda";
// Of the toolkit, as 1000 * major + 10 * minor; 0 for a build without CUDA.
inline constexpr int kCudaVersion = CUDART_VERSION;

inline constexpr int kMaxBlockThreads = 1024;
// Dynamic shared memory that a kernel may use without opting in.
inline constexpr int kDefaultSharedBytes = 48 * 1024;

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int smem_bytes = 0;
  Stream stream = nullptr;
  // Programmatic dependent launch: the kernel may start while its predecessor drains. Only for
  // kernels that call ptx::griddep_wait() before they touch global memory.
  bool pdl = false;
};

struct DeviceProperties {
  int major = 0;
  int minor = 0;
  int num_sms = 0;
  int max_smem_bytes = 0;  // per block, after opting in

  int arch() const { return major * 10 + minor; }
};

// --- shared memory ------------------------------------------------------------------------------

// Where the next array of an arena starts; the one rule that host and device share.
constexpr int align_shared(int offset, int alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

// 16 bytes serve every vector access; types that need more say so with alignas.
template <class T>
constexpr int shared_alignment() {
  return alignof(T) > 16 ? static_cast<int>(alignof(T)) : 16;
}

// An arena that only counts.
struct SharedSize {
  int bytes = 0;

  template <class T, int kCount>
  constexpr T* take() {
    bytes = align_shared(bytes, shared_alignment<T>()) + kCount * static_cast<int>(sizeof(T));
    return nullptr;
  }
};

// Bytes of dynamic shared memory of a kernel whose arrays are those of Layout::take_from.
template <class Layout>
constexpr int shared_bytes() {
  SharedSize size;
  Layout::take_from(size);
  return size.bytes;
}

// --- errors -------------------------------------------------------------------------------------

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const std::string& what) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) throw std::runtime_error("no NVIDIA driver was found");
  std::string message = what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    const auto version = [](int number) {
      return "CUDA " + std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
    };
    message += ". The extension was built with " + version(CUDART_VERSION) +
               ", the driver offers " + version(driver) +
               ": update the driver, or rebuild with a CUDA toolkit that it supports";
  } else if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    message += ". The kernels were not compiled for this GPU: rebuild for its architecture";
  }
  throw std::runtime_error(message);
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // not sticky: do not leave it for the caller's next check
    throw_cuda_error(error, what);
  }
}

// --- devices ------------------------------------------------------------------------------------

// Makes a device current for the scope and restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(Device device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device.index != previous_) {
      check_cuda(cudaSetDevice(device.index), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Queried once per device, then read without a lock.
inline const DeviceProperties& device_properties(int device) {
  static constexpr int kMaxDevices = 64;
  static std::array<DeviceProperties, kMaxDevices> properties;
  static std::array<std::once_flag, kMaxDevices> queried;
  if (device < 0 || device >= kMaxDevices) {
    throw std::runtime_error("device index " + std::to_string(device) + " is out of range");
  }
  std::call_once(queried[device], [device] {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    properties[device] = {.major = attribute(cudaDevAttrComputeCapabilityMajor),
                          .minor = attribute(cudaDevAttrComputeCapabilityMinor),
                          .num_sms = attribute(cudaDevAttrMultiProcessorCount),
                          .max_smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return properties[device];
}

// Why kernels cannot run in this process ("" if they can): no driver, an old driver, no GPU.
inline std::string device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no CUDA device was found";
  try {
    throw_cuda_error(error, "cudaGetDeviceCount");
  } catch (const std::runtime_error& problem) {
    return problem.what();
  }
}

// --- launching ----------------------------------------------------------------------------------

// Number of blocks along x. CUDA ignores or rejects larger grids, so they are refused by name here.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("too much work for one launch: " + std::to_string(blocks) +
                                " blocks, at most 2147483647; split the tensors");
  }
  return static_cast<unsigned>(blocks);
}

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "kernel";
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  return name;
}

// Lets a kernel use more than 48 KiB: once per (device, kernel), and never lowered, so that two
// threads with different sizes cannot take the permission from each other.
inline void allow_shared_memory(const void* kernel, int smem_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& bytes = allowed[{device, kernel}];
  if (smem_bytes <= bytes) return;
  const int maximum = device_properties(device).max_smem_bytes;
  if (smem_bytes > maximum) {
    throw std::runtime_error(kernel_name(kernel) + " needs " + std::to_string(smem_bytes) +
                             " bytes of shared memory, this GPU offers " + std::to_string(maximum));
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
             "cudaFuncSetAttribute");
  bytes = smem_bytes;
}

// Launches `kernel(params)` on the current device. Asynchronous: no synchronisation, no allocation.
template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config,
            const std::type_identity_t<Params>& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (config.smem_bytes > kDefaultSharedBytes) allow_shared_memory(entry, config.smem_bytes);

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  int device = 0;
  if (config.pdl) check_cuda(cudaGetDevice(&device), "cudaGetDevice");

  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = static_cast<size_t>(config.smem_bytes);
  launch_config.stream = static_cast<cudaStream_t>(config.stream);
  launch_config.attrs = &attribute;
  launch_config.numAttrs = config.pdl && device_properties(device).major >= 9 ? 1 : 0;

  cudaError_t error = cudaLaunchKernelEx(&launch_config, kernel, Params(params));
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) throw_cuda_error(error, "launch of " + kernel_name(entry));
}

}  // namespace exafuse
