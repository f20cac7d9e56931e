// Shared memory and the asynchronous copies into it. Each array of a block lies apart from the
// next, filled with NaN; what lies between is poison for AddressSanitizer and a canary for everyone
// else.
#include <cstdlib>
#include <new>

#include "core/state.h"

#if defined(EXAFUSE_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace exafuse::emulator {

namespace {

constexpr int kFill = 0xFF;  // NaN as bf16, fp16 and fp32
// Keeps what the kernel knows of an address modulo 1024, which is all that swizzles look at.
constexpr uint32_t kGap = 1024;

constexpr int kMaxCopies = 256;  // of one thread in flight
Copy copies[kMaxThreads][kMaxCopies];

uint32_t round_up(uint32_t value, uint32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// To ThreadSanitizer a visible fill by the first thread that takes an array would race with
// everyone's first write.
void fill(char* begin, size_t bytes) { fill_bytes(begin, bytes, kFill); }

void poison(char* begin, char* end) {
  fill(begin, end - begin);
#if defined(EXAFUSE_EMULATOR_ASAN)
  __asan_poison_memory_region(begin, end - begin);
#endif
}

void unpoison(char* begin, size_t bytes) {
  fill(begin, bytes);
#if defined(EXAFUSE_EMULATOR_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

uint32_t end_of(const SharedArray& array) { return array.offset + array.bytes; }
uint32_t end_of_gap(const SharedArray& array) { return round_up(end_of(array), kGap) + kGap; }

// The array around an address, or nullptr. The end of an array belongs to it if `at_end`.
const SharedArray* find_array(uint32_t offset, int bytes, bool at_end) {
  for (int i = 0; i < block.num_arrays; ++i) {
    const SharedArray& array = block.arrays[i];
    const uint32_t end = array.offset + array.bytes;
    if (offset >= array.offset && offset + bytes <= end && (at_end || offset < end)) return &array;
  }
  return nullptr;
}

}  // namespace

// Neither a loop nor memset: sanitizers watch those.
void fill_bytes(char* begin, size_t bytes, int value) {
  asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(value) : "memory");
}

void reset_shared_memory() {
  block.num_arrays = 0;
  reset_copies();
  reset_mbarriers();
  if (launch.request->smem_bytes == 0) return;
  // An upper bound: every array may need a gap and a partial gap around it.
  const size_t bytes = round_up(launch.request->smem_bytes, kGap) + 3 * kGap * kMaxSharedArrays;
#if defined(EXAFUSE_EMULATOR_TSAN)
  block.shared_capacity = bytes;
  block.shared = static_cast<char*>(allocate_for_block(bytes, &launch.started, &block.started));
#else
  if (bytes > block.shared_capacity) {
    std::free(block.shared);
    block.shared_capacity = bytes;
    block.shared = static_cast<char*>(allocate_for_block(bytes, nullptr, nullptr));
  }
#endif
  if (block.shared == nullptr) throw std::bad_alloc();
  reset_proxy();
}

void release_shared_memory() {
#if defined(EXAFUSE_EMULATOR_TSAN)
  // Threads of a failed launch have not ended: to ThreadSanitizer they may still write there.
  const bool all_ended = launch.error == nullptr;
  if (block.shared != nullptr && all_ended) free_after_block(block.shared, &block.ended);
  block.shared = nullptr;
#endif
}

void* shared_array(int index, int begin, int bytes, const Site& site) {
  const int total = launch.request->smem_bytes;
  if (begin + bytes > total) {
    fail(format("the kernel takes %d bytes of shared memory, the launch gives it %d", begin + bytes,
                total),
         site);
  }
  if (index < block.num_arrays) {
    const SharedArray& array = block.arrays[index];
    if (array.begin != begin || array.bytes != bytes) {
      fail(format("shared array %d is %d bytes at offset %d here, another thread took %d at %d",
                  index, bytes, begin, array.bytes, array.begin),
           site);
    }
    return block.shared + array.offset;
  }
  if (index >= kMaxSharedArrays) fail("more than 64 shared arrays", site);
  SharedArray& array = block.arrays[index];
  const SharedArray* previous = index == 0 ? nullptr : &block.arrays[index - 1];
  array.begin = begin;
  array.bytes = bytes;
  array.offset = (previous == nullptr ? 0 : end_of_gap(*previous)) + begin % kGap;
  block.num_arrays = index + 1;
  poison(block.shared + (previous == nullptr ? 0 : end_of(*previous)), block.shared + array.offset);
  unpoison(block.shared + array.offset, bytes);
  poison(block.shared + end_of(array), block.shared + end_of_gap(array));
  return block.shared + array.offset;
}

void check_shared_memory() {
  if (block.num_arrays == 0) return;
  const SharedArray& last = block.arrays[block.num_arrays - 1];
  if (last.begin + last.bytes != launch.request->smem_bytes) {
    record_failure(format("the launch gives the kernel %d bytes of shared memory, it takes %d",
                          launch.request->smem_bytes, last.begin + last.bytes));
    return;
  }
#if !defined(EXAFUSE_EMULATOR_ASAN)  // there, the first write into a gap was reported already
  for (int i = 0; i < block.num_arrays; ++i) {
    const SharedArray& array = block.arrays[i];
    for (uint32_t k = end_of(array); k < end_of_gap(array); ++k) {
      if (static_cast<unsigned char>(block.shared[k]) == kFill) continue;
      record_failure(
          format("shared array %d (%d bytes at offset %d) was written %u bytes past its end", i,
                 array.bytes, array.begin, k - end_of(array)));
      return;
    }
  }
#endif
}

uint32_t shared_address(const void* pointer, const Site& site) {
  const char* byte = static_cast<const char*>(pointer);
  const bool inside = block.shared != nullptr && byte >= block.shared &&
                      byte < block.shared + block.shared_capacity;
  const auto offset = static_cast<uint32_t>(byte - block.shared);
  if (!inside || find_array(offset, 0, true) == nullptr) {
    fail("smem_addr() of a pointer that is not into a shared array", site);
  }
  return offset + kSharedBase;
}

void* shared_pointer(uint32_t address, int bytes, const Site& site) {
  const char* memory = shared_bytes_at(address, bytes, site);
  if (address % bytes != 0) {
    fail(format("shared address 0x%x is not aligned to %d bytes", address, bytes), site);
  }
  current->last_address = address;
  return const_cast<char*>(memory);
}

const char* shared_bytes_at(uint32_t address, int bytes, const Site& site) {
  const uint32_t offset = address - kSharedBase;
  if (find_array(offset, bytes, false) == nullptr) {
    fail(format("%d bytes at shared address 0x%x lie outside every shared array", bytes, address),
         site);
  }
  return block.shared + offset;
}

void start_copy(const Copy& copy) {
  Thread& thread = *current;
  if (thread.num_copies == kMaxCopies) {
    fail(format("more than %d asynchronous copies of one thread in flight", kMaxCopies), copy.site);
  }
  Copy& slot = copies[thread.id][(thread.first_copy + thread.num_copies) % kMaxCopies];
  slot = copy;
  slot.group = thread.commits;
  ++thread.num_copies;
  if (options().count) {
    counts().shared_written += 16;
    if (copy.source != nullptr) counts().global_read += 16;
  }
}

void commit_copies() { ++current->commits; }

bool next_landing(unsigned pending, Copy* copy) {
  Thread& thread = *current;
  if (thread.num_copies == 0) return false;
  // Groups 0 .. commits - 1 are closed; all but the newest `pending` of them must have landed.
  const Copy& oldest = copies[thread.id][thread.first_copy];
  if (oldest.group + pending >= thread.commits) return false;
  *copy = oldest;
  thread.first_copy = (thread.first_copy + 1) % kMaxCopies;
  --thread.num_copies;
  return true;
}

Site oldest_copy_site() { return copies[current->id][current->first_copy].site; }

}  // namespace exafuse::emulator
