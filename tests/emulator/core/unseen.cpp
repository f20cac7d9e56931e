// The memory functions of unseen.h.
#include <cstddef>
#include <cstdint>

extern "C" {

__attribute__((visibility("hidden"))) void* exafuse_emulator_memcpy(void* to, const void* from,
                                                                    size_t bytes) {
  void* at = to;
  asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}

__attribute__((visibility("hidden"))) void* exafuse_emulator_memmove(void* to, const void* from,
                                                                     size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from) >= bytes) {
    return exafuse_emulator_memcpy(to, from, bytes);
  }
  auto* last_to = static_cast<char*>(to) + bytes - 1;
  auto* last_from = static_cast<const char*>(from) + bytes - 1;
  asm volatile("std\n rep movsb\n cld" : "+D"(last_to), "+S"(last_from), "+c"(bytes) : : "memory");
  return to;
}

__attribute__((visibility("hidden"))) void* exafuse_emulator_memset(void* to, int value,
                                                                    size_t bytes) {
  void* at = to;
  asm volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
  return to;
}

}  // extern "C"
