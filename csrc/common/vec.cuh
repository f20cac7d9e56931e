// Vectors of elements in registers: the only way in which kernels touch global memory in bulk. A
// wide access uses words of up to 16 bytes and needs pointers aligned to the word; a narrow one
// goes element by element and takes any tensor. Both yield the same vector, so results do not
// depend on alignment.
//
// A vector keeps its elements packed in 32-bit units, two 16-bit elements each, the first in the
// lower half. Words are put together from units by name: from an array of elements the compiler may
// well make two-byte stores.
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

template <int kBytes>
using WordOf = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <class T, int kCount>
class Vec {
 public:
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  static constexpr int kWideBytes = kBytes < 16 ? kBytes : 16;
  static_assert(kBytes % kWideBytes == 0);

  // Element i, exactly.
  __device__ __forceinline__ Compute<T> get(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return static_cast<double>(std::bit_cast<float>(units_[i]));
    } else {
      const uint32_t unit = units_[i / 2];
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return std::bit_cast<float>(i % 2 == 0 ? unit << 16 : unit & 0xffff0000u);
      } else {
        const auto half = static_cast<uint16_t>(i % 2 == 0 ? unit : unit >> 16);
        return __half2float(std::bit_cast<__half>(half));
      }
    }
  }

  // The vector whose elements are `values`, each rounded to nearest even.
  __device__ __forceinline__ static Vec rounded(const Compute<T> (&values)[kCount]) {
    Vec vec;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        vec.units_[i] = std::bit_cast<uint32_t>(static_cast<float>(values[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        vec.units_[i / 2] = ptx::pack2<T>(values[i], i + 1 < kCount ? values[i + 1] : 0.0f);
      }
    }
    return vec;
  }

  __device__ __forceinline__ static Vec zero() {
    Vec vec;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) vec.units_[i] = 0;
    return vec;
  }

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
    using Word = AccessWord<kWide>;
    constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      const int unit = i / kPerUnit;
      if constexpr (sizeof(Word) == 16) {
        const uint4 word{units_[unit], units_[unit + 1], units_[unit + 2], units_[unit + 3]};
        ptx::store_word(address + i, word);
      } else if constexpr (sizeof(Word) == 8) {
        ptx::store_word(address + i, uint2{units_[unit], units_[unit + 1]});
      } else if constexpr (sizeof(Word) == 4) {
        ptx::store_word(address + i, units_[unit]);
      } else {
        const uint32_t shifted = units_[unit] >> (i % 2 * 16);
        ptx::store_word(address + i, static_cast<uint16_t>(shifted));
      }
    }
  }

  // To shared memory, at a multiple of 16 bytes.
  __device__ __forceinline__ void store_shared(T* address) const {
    static_assert(kBytes == 16);
    ptx::store_shared(address, uint4{units_[0], units_[1], units_[2], units_[3]});
  }

 private:
  static constexpr int kPerUnit = 4 / static_cast<int>(sizeof(T));
  static constexpr int kUnits = (kCount + kPerUnit - 1) / kPerUnit;

  template <bool kWide>
  using AccessWord = WordOf<kWide ? kWideBytes : static_cast<int>(sizeof(T))>;

  template <bool kWide, class LoadWord>
  __device__ __forceinline__ static Vec gather(const T* address, LoadWord load_word) {
    using Word = AccessWord<kWide>;
    constexpr int kPerWord = static_cast<int>(sizeof(Word) / sizeof(T));
    Vec vec = zero();
#pragma unroll
    for (int i = 0; i < kCount; i += kPerWord) {
      const int unit = i / kPerUnit;
      const Word word = load_word(address + i);
      if constexpr (sizeof(Word) == 16) {
        vec.units_[unit] = word.x;
        vec.units_[unit + 1] = word.y;
        vec.units_[unit + 2] = word.z;
        vec.units_[unit + 3] = word.w;
      } else if constexpr (sizeof(Word) == 8) {
        vec.units_[unit] = word.x;
        vec.units_[unit + 1] = word.y;
      } else if constexpr (sizeof(Word) == 4) {
        vec.units_[unit] = word;
      } else {
        vec.units_[unit] |= static_cast<uint32_t>(word) << (i % 2 * 16);
      }
    }
    return vec;
  }

  uint32_t units_[kUnits];
};

// A vector that memory holds either as T or as fp32, such as a norm's weight.
template <bool kWide, class T, int kCount>
__device__ __forceinline__ void load_as_compute(const void* base, bool is_fp32, int64_t offset,
                                                Compute<T> (&values)[kCount]) {
  if (is_fp32) {
    const auto vec =
        Vec<float, kCount>::template load_readonly<kWide>(static_cast<const float*>(base) + offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<Compute<T>>(vec.get(i));
  } else {
    const auto vec =
        Vec<T, kCount>::template load_readonly<kWide>(static_cast<const T*>(base) + offset);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = vec.get(i);
  }
}

}  // namespace exafuse
