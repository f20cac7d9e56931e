// What a test chooses (schedule, seed, GPU, arithmetic) and what it may ask afterwards (which
// kernels were launched). Options come from environment variables EXAFUSE_EMULATOR_<NAME> when the
// library is loaded, and from exafuse_emulator_set() later; tests/emulator/control.py is the Python
// side.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "core/state.h"

namespace exafuse::emulator {

namespace {

constexpr GpuModel kGpuModels[] = {
    {"sm_80", 8, 0, 108, 163 * 1024},
    {"sm_90", 9, 0, 132, 227 * 1024},
    {"sm_90_small", 9, 0, 3, 227 * 1024},  // so that a block that stays takes several tiles
};
constexpr int kMaxRecords = 4096;

struct Record {
  const void* kernel;
  dim3 grid, block;
  int smem_bytes;
  Counts counts;
};

Record records[kMaxRecords];
uint64_t num_records = 0;
uint64_t random_state = 1;

bool set_option(Options& options, const char* name, const char* value) {
  const auto is = [](const char* a, const char* b) { return std::strcmp(a, b) == 0; };
  if (is(name, "schedule")) {
    if (is(value, "forward")) {
      options.schedule = Schedule::kForward;
    } else if (is(value, "reverse")) {
      options.schedule = Schedule::kReverse;
    } else if (is(value, "random")) {
      options.schedule = Schedule::kRandom;
    } else {
      return false;
    }
    return true;
  }
  if (is(name, "seed")) {
    char* end = nullptr;
    options.seed = std::strtoull(value, &end, 10);
    return *value != '\0' && *end == '\0';
  }
  if (is(name, "landing")) {
    static constexpr const char* kNames[] = {"latest", "early", "random"};
    for (int i = 0; i < 3; ++i) {
      if (!is(value, kNames[i])) continue;
      options.landing = static_cast<Landing>(i);
      return true;
    }
    return false;
  }
  if (is(name, "slow_warp")) {
    char* end = nullptr;
    const long number = std::strtol(value, &end, 10);
    const bool is_number = *value != '\0' && *end == '\0' && number >= 0 && number < kMaxWarps;
    options.slow_warp = is_number           ? static_cast<int>(number)
                        : is(value, "none") ? Options::kNoSlowWarp
                                            : Options::kSlowWarpByChance;
    return is_number || is(value, "none") || is(value, "chance");
  }
  if (is(name, "gpu")) {
    for (const GpuModel& model : kGpuModels) {
      if (!is(value, model.name)) continue;
      options.gpu = &model;
      return true;
    }
    return false;
  }
  if (is(name, "approx")) {
    options.exact_approximations = is(value, "exact");
    return is(value, "exact") || is(value, "perturbed");
  }
  if (is(name, "mma")) {
    options.mma_in_double = is(value, "double");
    return is(value, "double") || is(value, "single");
  }
  if (is(name, "count")) {
    options.count = is(value, "on");
    return is(value, "on") || is(value, "off");
  }
  return false;
}

Options read_environment() {
  Options options;
  options.gpu = &kGpuModels[0];
  static constexpr const char* kNames[][2] = {{"schedule", "EXAFUSE_EMULATOR_SCHEDULE"},
                                              {"seed", "EXAFUSE_EMULATOR_SEED"},
                                              {"landing", "EXAFUSE_EMULATOR_LANDING"},
                                              {"slow_warp", "EXAFUSE_EMULATOR_SLOW_WARP"},
                                              {"gpu", "EXAFUSE_EMULATOR_GPU"},
                                              {"approx", "EXAFUSE_EMULATOR_APPROX"},
                                              {"mma", "EXAFUSE_EMULATOR_MMA"}};
  for (const auto& name : kNames) {
    const char* value = std::getenv(name[1]);
    if (value == nullptr || set_option(options, name[0], value)) continue;
    std::fprintf(stderr, "emulator: %s=%s is not understood\n", name[1], value);
    std::abort();
  }
  return options;
}

Options current_options = read_environment();

}  // namespace

const Options& options() { return current_options; }
const GpuModel& gpu_model() { return *current_options.gpu; }

void seed_random(uint64_t seed) { random_state = seed * 0x9E3779B97F4A7C15u + 1; }

uint64_t next_random() {  // xorshift64*
  if (random_state == 0) random_state = 1;
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Du >> 16;
}

void record_launch(const LaunchRequest& request) {
  records[num_records++ % kMaxRecords] = {request.kernel, request.grid, request.block,
                                          request.smem_bytes, Counts()};
}

Counts& counts() { return records[(num_records - 1) % kMaxRecords].counts; }

// What a GPU would answer with an error, or, for y and z of the grid in some frameworks, with
// silence.
void check_limits(const LaunchRequest& request) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error("emulator: launch of " + kernel_name(request.kernel) + " at " +
                             describe(request.site) + ": " + why);
  };
  const dim3& grid = request.grid;
  const dim3& shape = request.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || shape.x == 0 || shape.y == 0 || shape.z == 0) {
    refuse(format("empty grid (%u, %u, %u) or block (%u, %u, %u)", grid.x, grid.y, grid.z, shape.x,
                  shape.y, shape.z));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse(format("grid (%u, %u, %u) exceeds (2147483647, 65535, 65535)", grid.x, grid.y, grid.z));
  }
  const uint64_t threads = static_cast<uint64_t>(shape.x) * shape.y * shape.z;
  if (threads > kMaxThreads || shape.z > 64) {
    refuse(
        format("block (%u, %u, %u) exceeds 1024 threads or 64 along z", shape.x, shape.y, shape.z));
  }
  if (request.smem_bytes < 0 || request.smem_bytes > gpu_model().max_smem_bytes) {
    refuse(format("%d bytes of shared memory, %s offers %d", request.smem_bytes, gpu_model().name,
                  gpu_model().max_smem_bytes));
  }
}

}  // namespace exafuse::emulator

#define EXAFUSE_EXPORT extern "C" __attribute__((visibility("default")))

// Returns 0, or -1 if the name or the value is unknown.
EXAFUSE_EXPORT int exafuse_emulator_set(const char* name, const char* value) {
  using namespace exafuse::emulator;
  return set_option(current_options, name, value) ? 0 : -1;
}

EXAFUSE_EXPORT uint64_t exafuse_emulator_num_launches() { return exafuse::emulator::num_records; }

EXAFUSE_EXPORT void exafuse_emulator_clear_launches() { exafuse::emulator::num_records = 0; }

// Describes launch number `i` as "name|grid x|y|z|block x|y|z|shared bytes" into `text`; the oldest
// of more than 4096 are forgotten. Returns 0, or -1 if there is no such launch.
EXAFUSE_EXPORT int exafuse_emulator_launch(uint64_t i, char* text, size_t capacity) {
  using namespace exafuse::emulator;
  if (i >= num_records || i + kMaxRecords < num_records) return -1;
  const Record& record = records[i % kMaxRecords];
  std::snprintf(text, capacity, "%s|%u|%u|%u|%u|%u|%u|%d", kernel_name(record.kernel).c_str(),
                record.grid.x, record.grid.y, record.grid.z, record.block.x, record.block.y,
                record.block.z, record.smem_bytes);
  return 0;
}

// What launch number `i` did, as seven numbers in the order of struct Counts: all 0 unless the
// option `count` was on. Returns 0, or -1 if there is no such launch.
EXAFUSE_EXPORT int exafuse_emulator_counts(uint64_t i, uint64_t* numbers) {
  using namespace exafuse::emulator;
  if (i >= num_records || i + kMaxRecords < num_records) return -1;
  const Counts& found = records[i % kMaxRecords].counts;
  const uint64_t all[] = {found.mma,         found.global_read,    found.global_written,
                          found.shared_read, found.shared_written, found.barriers,
                          found.atomics};
  std::memcpy(numbers, all, sizeof(all));
  return 0;
}
