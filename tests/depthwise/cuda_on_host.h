// Runs a kernel of CUDA C++ on the host, thread by thread: what kernels.cu uses of CUDA, and how a block is run.
//
// The threads of a block are fibers, which run one after the other up to the next __syncthreads(), in either order. The
// shared memory of a block begins as NaN. So a value that is read before it was written, or overwritten before all have
// read it, makes the result wrong: the first thread of the order runs alone until it meets a barrier. Global memory
// lies between pages that nobody may touch, at the end or at the beginning of its own: what reaches beyond it crashes.
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads, ...)

struct Index {
  int x;
};
static Index threadIdx, blockIdx;

template <typename T>
T max(T a, T b) { return a > b ? a : b; }

template <typename T>
T min(T a, T b) { return a < b ? a : b; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned host_bfloat16(float value) {  // to the nearest, ties to even
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

namespace host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int barriers = 0;
  bool done = false;
};

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static Fiber* running;
static void (*body)();

inline void enter() {
  body();
  running->done = true;
}

// Whether all threads met at each barrier, but those that had ended before.
inline bool run_block(bool backwards) {
  const int count = fibers.size();
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.barriers = 0;
    fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = count, round = 0; left > 0; ++round) {
    for (int k = 0; k < count; ++k) {
      threadIdx.x = backwards ? count - 1 - k : k;
      running = &fibers[threadIdx.x];
      if (running->done) continue;
      swapcontext(&scheduler, &running->context);
      if (running->done) --left;
    }
    for (const Fiber& fiber : fibers) {
      if (!fiber.done && fiber.barriers != round + 1) return false;
    }
  }
  return true;
}

}  // namespace host

inline void __syncthreads() {
  ++host::running->barriers;
  const int thread = threadIdx.x;
  swapcontext(&host::running->context, &host::scheduler);
  threadIdx.x = thread;
}

#include "kernels.cu"

constexpr int kGuard = 64;  // vectors behind the shared memory that no thread may write
alignas(64) Floats shared[SHARED / sizeof(Floats) + kGuard];

// Memory of so many bytes, whose vectors are aligned as on a GPU.
class Global {
 public:
  Global(const void* from, size_t bytes, bool at_end) {
    const size_t page = 4096;
    size_ = (bytes + page - 1) / page * page + 2 * page;
    all_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    start = at_end ? all_ + (size_ - page - bytes) / 16 * 16 : all_ + page;
    std::memset(all_, 0xff, size_);
    if (from) std::memcpy(start, from, bytes);
    mprotect(all_, page, PROT_NONE);
    mprotect(all_ + size_ - page, page, PROT_NONE);
  }
  ~Global() { munmap(all_, size_); }

  char* start;

 private:
  char* all_;
  size_t size_;
};

static char* inputs[2];
static char* output;

static void call() {
#ifdef SECOND_STAGE
  depthwise_sum(reinterpret_cast<float*>(inputs[0]), reinterpret_cast<float*>(output));
#elif WEIGHT_GRAD
  const Value* maps[] = {reinterpret_cast<Value*>(inputs[0]), reinterpret_cast<Value*>(inputs[1])};
  depthwise_weight_grad(maps[0], maps[1], reinterpret_cast<float*>(output));
#else
  const float* kernel = reinterpret_cast<float*>(inputs[1]);
  depthwise_forward(reinterpret_cast<Value*>(inputs[0]), kernel, reinterpret_cast<Value*>(output));
#endif
}

// Returns 0 if all went well, 1 if threads did not meet at a barrier, 2 if one wrote beyond the shared memory.
extern "C" int run(
    int blocks, int threads, bool backwards, const void* first, size_t first_bytes, const void* second,
    size_t second_bytes, void* out, size_t out_bytes) {
  Global globals[] = {
      {first, first_bytes, backwards}, {second, second_bytes, backwards}, {nullptr, out_bytes, backwards}};
  inputs[0] = globals[0].start;
  inputs[1] = globals[1].start;
  output = globals[2].start;
  host::body = call;
  host::fibers = std::vector<host::Fiber>(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(shared, 0xff, sizeof shared);
    if (!host::run_block(backwards)) return 1;
    const unsigned char* guard = reinterpret_cast<unsigned char*>(shared) + SHARED;
    for (size_t k = 0; k < kGuard * sizeof(Floats); ++k) {
      if (guard[k] != 0xff) return 2;
    }
  }
  std::memcpy(out, output, out_bytes);
  return 0;
}
