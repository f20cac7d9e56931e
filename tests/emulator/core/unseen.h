// Included before everything else of the core where ThreadSanitizer watches the kernels. It watches
// the C library's memory functions whoever calls them, and what the core keeps of its own races in
// its eyes: no barrier of a kernel orders it. Calls of the core, also those that the compiler makes
// up for copies and loops, go to functions of other names.
#pragma once

#include <stddef.h>

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("exafuse_emulator_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("exafuse_emulator_memmove");
void* memset(void*, int, size_t) noexcept __asm__("exafuse_emulator_memset");
}
