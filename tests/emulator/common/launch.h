// The emulator's twin of csrc/common/launch.h: the same names and signatures on a CPU. A launch
// runs the whole grid before it returns; streams and devices do not exist.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"
#include "core/emulator.h"

// Keywords that CUDA's headers leave undefined, or harmless, for a plain C++ compiler.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "take shared memory from SharedArena");

namespace exafuse {

inline constexpr DeviceType kKernelDevice = DeviceType::kCPU;
inline constexpr const char* kBackendName = "emulated";
inline constexpr int kCudaVersion = 0;

inline constexpr int kMaxBlockThreads = 1024;
inline constexpr int kDefaultSharedBytes = 48 * 1024;

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int smem_bytes = 0;
  Stream stream = nullptr;
  bool pdl = false;
};

struct DeviceProperties {
  int major = 0;
  int minor = 0;
  int num_sms = 0;
  int max_smem_bytes = 0;

  int arch() const { return major * 10 + minor; }
};

// --- shared memory
// ----------------------------------------------------------------------------------

constexpr int align_shared(int offset, int alignment) {
  return (offset + alignment - 1) / alignment * alignment;
}

template <class T>
constexpr int shared_alignment() {
  return alignof(T) > 16 ? static_cast<int>(alignof(T)) : 16;
}

struct SharedSize {
  int bytes = 0;

  template <class T, int kCount>
  constexpr T* take() {
    bytes = align_shared(bytes, shared_alignment<T>()) + kCount * static_cast<int>(sizeof(T));
    return nullptr;
  }
};

template <class Layout>
constexpr int shared_bytes() {
  SharedSize size;
  Layout::take_from(size);
  return size.bytes;
}

// --- devices
// ----------------------------------------------------------------------------------------

class DeviceGuard {
 public:
  explicit DeviceGuard(Device) {}
  ~DeviceGuard() {}  // not trivial, so that no compiler calls the guard unused
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline const DeviceProperties& device_properties(int) {
  static thread_local DeviceProperties properties;
  const emulator::GpuModel& model = emulator::gpu_model();
  properties = {.major = model.major,
                .minor = model.minor,
                .num_sms = model.num_sms,
                .max_smem_bytes = model.max_smem_bytes};
  return properties;
}

inline std::string device_problem() { return ""; }

// --- launching
// --------------------------------------------------------------------------------------

inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("too much work for one launch: " + std::to_string(blocks) +
                                " blocks, at most 2147483647; split the tensors");
  }
  return static_cast<unsigned>(blocks);
}

inline std::string kernel_name(const void* kernel) { return emulator::kernel_name(kernel); }

template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config,
            const std::type_identity_t<Params>& params,
            const std::source_location& site = std::source_location::current()) {
  static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
  emulator::run({.kernel = reinterpret_cast<const void*>(kernel),
                 .invoke =
                     [](const void* entry, const void* bytes) {
                       reinterpret_cast<void (*)(Params)>(const_cast<void*>(entry))(
                           *static_cast<const Params*>(bytes));
                     },
                 .params = &params,
                 .grid = config.grid,
                 .block = config.block,
                 .smem_bytes = config.smem_bytes,
                 .pdl = config.pdl,
                 .site = site});
}

}  // namespace exafuse
