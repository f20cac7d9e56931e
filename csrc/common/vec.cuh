// Vectors of elements in registers: the only way in which kernels touch global memory in bulk. A
// wide access uses words of up to 16 bytes and needs pointers aligned to the word; a narrow one
// goes element by element and takes any tensor. Both yield the same vector, so results do not
// depend on alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"

namespace exafuse {

// The type that a kernel computes in: wide enough that only the final rounding to T is felt.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, float>, double, float>;

__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__device__ __forceinline__ double to_compute(float x) { return static_cast<double>(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T round_to(Compute<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return static_cast<float>(x);
  }
}

template <int kBytes>
using WordOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <class T, int kCount>
struct Vec {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kWideBytes = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes % kWideBytes == 0);

  T values[kCount];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }

  template <bool kWide>
  __device__ __forceinline__ static Vec load(const T* address) {
    return gather<kWide>(address,
                         [](const void* word) { return ptx::load_word<AccessWord<kWide>>(word); });
  }

  // For memory that the kernel never writes.
  template <bool kWide>
  __device__ __forceinline__ static Vec load_readonly(const T* address) {
    return gather<kWide>(
        address, [](const void* word) { return ptx::load_word_readonly<AccessWord<kWide>>(word); });
  }

  template <bool kWide>
  __device__ __forceinline__ void store(T* address) const {
    constexpr int kPerWord = elements_per_word<kWide>();
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kPerWord) {
      Chunk<kPerWord> chunk;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) chunk.values[i] = values[begin + i];
      ptx::store_word(address + begin, std::bit_cast<AccessWord<kWide>>(chunk));
    }
  }

 private:
  template <bool kWide>
  using AccessWord = WordOf<kWide ? kWideBytes : static_cast<int>(sizeof(T))>;

  template <int kPerWord>
  struct Chunk {
    T values[kPerWord];
  };

  template <bool kWide>
  static constexpr int elements_per_word() {
    return static_cast<int>(sizeof(AccessWord<kWide>) / sizeof(T));
  }

  template <bool kWide, class LoadWord>
  __device__ __forceinline__ static Vec gather(const T* address, LoadWord load_word) {
    constexpr int kPerWord = elements_per_word<kWide>();
    Vec vec;
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kPerWord) {
      const auto chunk = std::bit_cast<Chunk<kPerWord>>(load_word(address + begin));
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) vec.values[begin + i] = chunk.values[i];
    }
    return vec;
  }
};

// A vector that memory holds either as T or as fp32, such as a norm's weight.
template <bool kWide, class T, int kCount>
__device__ __forceinline__ void load_as_compute(const void* base, bool is_fp32, int64_t offset,
                                                Compute<T> (&values)[kCount]) {
  if (is_fp32) {
    const auto vec =
        Vec<float, kCount>::template load_readonly<kWide>(static_cast<const float*>(base) + offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<Compute<T>>(vec[i]);
  } else {
    const auto vec =
        Vec<T, kCount>::template load_readonly<kWide>(static_cast<const T*>(base) + offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = to_compute(vec[i]);
  }
}

}  // namespace exafuse
