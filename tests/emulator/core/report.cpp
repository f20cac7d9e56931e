// Failure texts: what went wrong, in which kernel, block and thread, and the chain of source lines
// that led there, found by the addr2line of the compiler's binutils.
#include <dlfcn.h>
#include <execinfo.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/state.h"

#if !defined(EXAFUSE_ROOT)
#error "EXAFUSE_ROOT: the folder that source paths are shown relative to"
#endif

namespace exafuse::emulator {

namespace {

constexpr int kMaxFrames = 48;
constexpr int kMaxLines = 4 * kMaxFrames;

struct Line {
  std::string function;
  std::string place;  // file:line, relative to the project
  bool is_emulator = false;
};

std::string relative(std::string path) {
  static const std::string root = EXAFUSE_ROOT "/";
  const size_t at = path.find(root);
  if (at != std::string::npos) path.erase(0, at + root.size());
  const size_t note = path.find(" (discriminator");
  if (note != std::string::npos) path.erase(note);
  return path;
}

bool is_emulator_source(const std::string& place) {
  return place.find("tests/emulator/core/") != std::string::npos ||
         place.find("tests/emulator/common/") != std::string::npos;
}

std::string read_line(FILE* pipe) {
  std::string line;
  for (int c = std::fgetc(pipe); c != EOF && c != '\n'; c = std::fgetc(pipe)) {
    line += static_cast<char>(c);
  }
  return line;
}

// Starts addr2line without the sanitizer that may be preloaded into this process; its output comes
// through `pipe`. Returns its process id, or -1.
pid_t start_addr2line(const char* module, const std::vector<std::string>& offsets, FILE** pipe) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return -1;
  std::vector<const char*> arguments = {"addr2line", "-C", "-f", "-i", "-e", module};
  for (const std::string& offset : offsets) arguments.push_back(offset.c_str());
  arguments.push_back(nullptr);
  const char* path = std::getenv("PATH");
  const std::string path_variable =
      std::string("PATH=") + (path == nullptr ? "/usr/bin:/bin" : path);
  const char* environment[] = {path_variable.c_str(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  pid_t child = -1;
  const int error =
      posix_spawnp(&child, arguments[0], &actions, nullptr, const_cast<char**>(arguments.data()),
                   const_cast<char**>(environment));
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (error != 0) {
    close(ends[0]);
    return -1;
  }
  *pipe = fdopen(ends[0], "r");
  return child;
}

// The source lines behind those of the addresses that lie in the module of the first one, innermost
// inlined function first; at most kMaxLines.
int look_up(const void* const* addresses, int num_addresses, Line* lines) {
  std::string module;
  std::vector<std::string> offsets;
  for (int i = 0; i < num_addresses; ++i) {
    Dl_info info;
    if (dladdr(addresses[i], &info) == 0 || info.dli_fname == nullptr) continue;
    if (module.empty()) module = info.dli_fname;
    if (module != info.dli_fname) continue;
    offsets.push_back(format("0x%zx", static_cast<size_t>(static_cast<const char*>(addresses[i]) -
                                                          static_cast<char*>(info.dli_fbase))));
  }
  if (offsets.empty()) return 0;
  FILE* pipe = nullptr;
  const pid_t child = start_addr2line(module.c_str(), offsets, &pipe);
  if (child < 0) return 0;
  int count = 0;
  while (count < kMaxLines) {
    const std::string function = read_line(pipe);
    const std::string place = read_line(pipe);
    if (place.empty()) break;
    if (place[0] == '?') continue;  // a function without line information
    lines[count].function = function;
    lines[count].place = relative(place);
    lines[count].is_emulator = is_emulator_source(lines[count].place);
    ++count;
  }
  std::fclose(pipe);
  waitpid(child, nullptr, 0);
  return count;
}

// The project's own source lines among the frames, innermost first, without the emulator's.
std::string describe_frames(void* const* frames, int num_frames) {
  std::string text;
  static Line lines[kMaxLines];
  const int count = look_up(frames, num_frames, lines);
  for (int i = 0; i < count; ++i) {
    if (lines[i].is_emulator) continue;
    if (lines[i].place[0] == '/') continue;  // the C++ library
    if (lines[i].place.find("launch.h") != std::string::npos) return text;
    text += "\n  at " + lines[i].place + " in " + lines[i].function;
  }
  return text;
}

std::string describe_index(const uint3& index) {
  return format("(%u, %u, %u)", index.x, index.y, index.z);
}

}  // namespace

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

std::string describe(const Site& site) {
  return format("%s:%u", relative(site.file_name()).c_str(), static_cast<unsigned>(site.line()));
}

std::string kernel_name(const void* kernel) {
  static Line lines[kMaxLines];
  const int count = look_up(&kernel, 1, lines);
  return count == 0 ? "an unknown kernel" : lines[count - 1].function;
}

std::string describe_threads() {
  std::string text;
  int first = 0;
  const auto same_state = [](const Thread& a, const Thread& b) {
    if (a.exited || b.exited) return a.exited == b.exited;
    if (a.waiting_for == nullptr || b.waiting_for == nullptr) return a.waiting_for == b.waiting_for;
    return same_place(a.site, b.site);
  };
  for (int id = 1; id <= block.num_threads; ++id) {
    const Thread& start = block.threads[first];
    if (id < block.num_threads && same_state(start, block.threads[id])) continue;
    text += text.empty() ? "" : "; ";
    text += first == id - 1 ? format("thread %d ", first) : format("threads %d-%d ", first, id - 1);
    if (start.exited) {
      text += "ended";
    } else if (start.waiting_for != nullptr) {
      text += format("in %s at %s", start.waiting_for, describe(start.site).c_str());
    } else {
      text += "running";
    }
    first = id;
    if (text.size() > 800) return text + "; ...";
  }
  return text;
}

std::string report(const std::string& message, const Site* site, void* const* frames,
                   int num_frames) {
  std::string text = "emulator: " + message;
  if (site != nullptr) text += "; at " + describe(*site);
  if (launch.request != nullptr) {
    text += "\n  kernel " + kernel_name(launch.request->kernel);
    text += "\n  block " + describe_index(blockIdx);
    if (current != nullptr) text += ", thread " + describe_index(current->index);
    const dim3& grid = launch.request->grid;
    const dim3& shape = launch.request->block;
    text += format(" of grid (%u, %u, %u), block (%u, %u, %u)", grid.x, grid.y, grid.z, shape.x,
                   shape.y, shape.z);
  }
  return text + describe_frames(frames, num_frames);
}

void fail(const std::string& message, const Site& site) {
  void* frames[kMaxFrames];
  const int count = backtrace(frames, kMaxFrames);
  // A return address belongs to the line after the call.
  for (int i = 0; i < count; ++i) frames[i] = static_cast<char*>(frames[i]) - 1;
  throw std::runtime_error(report(message, &site, frames, count));
}

void record_failure(const std::string& message) {
  launch.error = std::make_exception_ptr(std::runtime_error(report(message, nullptr, nullptr, 0)));
}

namespace {

// `what` as the emulated ptx.cuh names its accesses. Asynchronous copies are counted where they
// start, because some of them read nothing.
void count_access(const char* what, int bytes, bool is_shared) {
  Counts& found = counts();
  const bool is_atomic = std::strcmp(what, "an atomic") == 0;
  const bool stores = std::strcmp(what, "a store") == 0;
  if (std::strcmp(what, "cp_async_16") == 0) return;
  if (is_atomic) ++found.atomics;
  if (stores || is_atomic) (is_shared ? found.shared_written : found.global_written) += bytes;
  if (!stores) (is_shared ? found.shared_read : found.global_read) += bytes;
}

}  // namespace

void check_access(const void* address, int bytes, const char* what, const Site& site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail(format("%s of %d bytes at %p, which is not aligned to %d bytes", what, bytes, address,
                bytes),
         site);
  }
  const char* byte = static_cast<const char*>(address);
  const bool is_shared = block.shared != nullptr && byte >= block.shared &&
                         byte < block.shared + block.shared_capacity;
  const bool forbidden = launch.request->pdl && !current->waited_for_grid;
  if (forbidden && !is_shared) {
    fail(format("%s of global memory before griddep_wait() in a kernel launched to overlap its "
                "predecessor",
                what),
         site);
  }
  if (is_shared && block.is_asynchronous && std::strcmp(what, "ldg") != 0 &&
      std::strcmp(what, "a load") != 0) {
    const auto at = static_cast<uint32_t>(byte - block.shared) + kSharedBase;
    check_not_in_flight(at, bytes, what, site);
    note_store(at, bytes, *current);
  }
  if (options().count) count_access(what, bytes, is_shared);
}

}  // namespace exafuse::emulator
