// Runs a kernel of CUDA C++ on the host, thread by thread: what kernels.cu uses of CUDA, and how a block is run.
//
// The threads of a block are fibers, which run one after the other up to the next __syncthreads(), in either order. The
// shared memory of a block begins as NaN. So a value that is read before it was written, or overwritten before all have
// read it, makes the result wrong: the first thread of the order runs alone until it meets a barrier.
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

static const void* first_input;
static const void* second_input;
static void* output;

static void call() {
#ifdef SECOND_STAGE
  depthwise_sum(static_cast<const float*>(first_input), static_cast<float*>(output));
#elif WEIGHT_GRAD
  depthwise_weight_grad(
      static_cast<const Value*>(first_input), static_cast<const Value*>(second_input), static_cast<float*>(output));
#else
  depthwise_forward(
      static_cast<const Value*>(first_input), static_cast<const float*>(second_input), static_cast<Value*>(output));
#endif
}

// 0 if all went well, 1 if threads did not meet at a barrier, 2 if one wrote beyond the shared memory.
extern "C" int run(int blocks, int threads, bool backwards, const void* first, const void* second, void* out) {
  first_input = first;
  second_input = second;
  output = out;
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
  return 0;
}
