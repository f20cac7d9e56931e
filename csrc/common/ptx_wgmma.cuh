// wgmma.mma_async in every width that kernels use. One instruction names each register of its
// accumulator, so every width needs a spelling of its own; ptx_sm90.cuh says what they do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace exafuse {

namespace ptx::detail {

template <class T, int kN>
struct Wgmma;

// clang-format off

// Eight registers of the accumulator as operands, from number i.
#define EXAFUSE_D8(i)                                                               \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]),                   \
  "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define EXAFUSE_D32(i) EXAFUSE_D8(i), EXAFUSE_D8(i + 8), EXAFUSE_D8(i + 16), EXAFUSE_D8(i + 24)

// Their names in the instruction.
#define EXAFUSE_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EXAFUSE_R48 EXAFUSE_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define EXAFUSE_R64 EXAFUSE_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EXAFUSE_R80 EXAFUSE_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define EXAFUSE_R88 EXAFUSE_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define EXAFUSE_R96 EXAFUSE_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"

// kRegisters: the names of the accumulator's; n0 to n5: the numbers of the operands that follow
// them; then the accumulator as operands.
#define EXAFUSE_WGMMA(T, kType, kN, kRegisters, n0, n1, n2, n3, n4, n5, ...)                        \
  template <>                                                                                       \
  struct Wgmma<T, kN> {                                                                             \
    template <bool kDepthByRow>                                                                     \
    __device__ __forceinline__ static void ss(float (&d)[kN / 2], uint64_t a, uint64_t b,           \
                                              bool accumulate) {                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" n2 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType               \
                   " {" kRegisters "}, %" n0 ", %" n1 ", p, 1, 1, 0, %" n3 ";\n}"                    \
                   : __VA_ARGS__                                                                    \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                             \
                     "n"(static_cast<int>(kDepthByRow)));                                           \
    }                                                                                               \
    __device__ __forceinline__ static void rs(float (&d)[kN / 2], const uint32_t (&a)[4],           \
                                              uint64_t b, bool accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" n5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType               \
                   " {" kRegisters "}, {%" n0 ", %" n1 ", %" n2 ", %" n3 "}, %" n4                  \
                   ", p, 1, 1, 1;\n}"                                                               \
                   : __VA_ARGS__                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                            \
                     "r"(static_cast<int>(accumulate)));                                            \
    }                                                                                               \
  };
#define EXAFUSE_WGMMA_BOTH(...)                  \
  EXAFUSE_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) \
  EXAFUSE_WGMMA(__half, "f16", __VA_ARGS__)

EXAFUSE_WGMMA_BOTH(64, EXAFUSE_R32, "32", "33", "34", "35", "36", "37",
                   EXAFUSE_D32(0))
EXAFUSE_WGMMA_BOTH(96, EXAFUSE_R48, "48", "49", "50", "51", "52", "53",
                   EXAFUSE_D32(0), EXAFUSE_D8(32), EXAFUSE_D8(40))
EXAFUSE_WGMMA_BOTH(128, EXAFUSE_R64, "64", "65", "66", "67", "68", "69",
                   EXAFUSE_D32(0), EXAFUSE_D32(32))
EXAFUSE_WGMMA_BOTH(160, EXAFUSE_R80, "80", "81", "82", "83", "84", "85",
                   EXAFUSE_D32(0), EXAFUSE_D32(32), EXAFUSE_D8(64), EXAFUSE_D8(72))
EXAFUSE_WGMMA_BOTH(176, EXAFUSE_R88, "88", "89", "90", "91", "92", "93",
                   EXAFUSE_D32(0), EXAFUSE_D32(32), EXAFUSE_D8(64), EXAFUSE_D8(72), EXAFUSE_D8(80))
EXAFUSE_WGMMA_BOTH(192, EXAFUSE_R96, "96", "97", "98", "99", "100", "101",
                   EXAFUSE_D32(0), EXAFUSE_D32(32), EXAFUSE_D32(64))

#undef EXAFUSE_WGMMA_BOTH
#undef EXAFUSE_WGMMA
#undef EXAFUSE_R96
#undef EXAFUSE_R88
#undef EXAFUSE_R80
#undef EXAFUSE_R64
#undef EXAFUSE_R48
#undef EXAFUSE_R32
#undef EXAFUSE_D32
#undef EXAFUSE_D8

// clang-format on

}  // namespace ptx::detail

}  // namespace exafuse
