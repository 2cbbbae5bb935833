// The depthwise convolution for CUDA GPUs of compute capability 8.0 and later.
//
// Maps are (N, HEIGHT, WIDTH, CHANNELS), filters (KH, KW, CHANNELS). `cuda.py` compiles this file by NVRTC for one size
// of maps and one division of the work, all of which are macros. The tests compile it for the host as well.
//
// A block copies a tile of maps to shared memory, in float32: so each value is converted once, not once for each of
// its products, and the inner loops are multiply-adds and few loads. A thread handles VECTOR channels of a row of COLS
// positions and keeps its sums in registers. Loops over rows stay loops, all others are unrolled.
//
// Macros: N, HEIGHT, WIDTH, CHANNELS, KH, KW; BFLOAT16 is 1 if maps are bfloat16, 0 if they are float32. A tile has
// ROWS x (COLS * STRIPS) positions of IMAGES maps in VECTOR * GROUPS channels. A block has THREADS threads, and at least
// MIN_BLOCKS blocks run at once on a multiprocessor. WEIGHT_GRAD chooses the pass, with STRIPS = 1, and has two macros
// more: SLICES, the threads that share the rows of a tile, and PARTS, the sums that the second stage adds.

constexpr int kHalfRows = KH / 2, kHalfCols = KW / 2;
constexpr int kTileCols = COLS * STRIPS, kTileChannels = VECTOR * GROUPS;
// If a thread has a whole row of the map, products with the padding beside it are left out, and the tile has none.
constexpr int kMargin = COLS == WIDTH ? 0 : kHalfCols;
constexpr int kSourceRows = ROWS + 2 * kHalfRows, kSourceCols = kTileCols + 2 * kMargin;
constexpr int kRowTiles = (HEIGHT + ROWS - 1) / ROWS, kColTiles = (WIDTH + kTileCols - 1) / kTileCols;
constexpr int kImageTiles = (N + IMAGES - 1) / IMAGES, kChannelTiles = (CHANNELS + kTileChannels - 1) / kTileChannels;

template <typename T, int size>
struct alignas(sizeof(T) * size) Vector {
  T at[size];
};
using Floats = Vector<float, VECTOR>;

#if BFLOAT16
using Value = unsigned short;  // its bits
#else
using Value = float;
#endif

extern __shared__ Floats shared[];

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }

// Two values rounded to bfloat16, the first in the lower half.
__device__ inline unsigned to_bfloat16(float first, float second) {
#ifdef __CUDA_ARCH__
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#else
  return host_bfloat16(first) | host_bfloat16(second) << 16;
#endif
}

// VECTOR channels of a position, whose channels begin at `values`; zeros beyond the last.
template <typename T>
__device__ inline Vector<T, VECTOR> load(const T* __restrict__ values, int channel) {
  Vector<T, VECTOR> result;
  if constexpr (CHANNELS % VECTOR == 0) {
    result = *reinterpret_cast<const Vector<T, VECTOR>*>(values + channel);
  } else {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) result.at[v] = channel + v < CHANNELS ? values[channel + v] : T(0);
  }
  return result;
}

__device__ inline void store(Value* __restrict__ values, int channel, const Floats& sums) {
  Vector<Value, VECTOR> rounded;
#if BFLOAT16
#pragma unroll
  for (int v = 0; v < VECTOR; v += 2) {
    unsigned bits = to_bfloat16(sums.at[v], sums.at[v + 1]);
    rounded.at[v] = bits & 0xffff;
    rounded.at[v + 1] = bits >> 16;
  }
#else
  rounded = sums;
#endif
  if constexpr (CHANNELS % VECTOR == 0) {
    *reinterpret_cast<Vector<Value, VECTOR>*>(values + channel) = rounded;
  } else {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (channel + v < CHANNELS) values[channel + v] = rounded.at[v];
    }
  }
}

__device__ inline void multiply_add(Floats& sums, const Floats& a, const Floats& b) {
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) sums.at[v] += a.at[v] * b.at[v];
}

struct Tile {
  int image, row, col, channel;  // of its first position
};

// Channels vary first: blocks that run at the same time then read the same sectors and rows of memory.
__device__ inline Tile find_tile(int index, int channel_tile) {
  Tile tile;
  tile.channel = channel_tile * kTileChannels;
  tile.col = index % kColTiles * kTileCols;
  tile.row = index / kColTiles % kRowTiles * ROWS;
  tile.image = index / (kColTiles * kRowTiles) * IMAGES;
  return tile;
}

// Copies rows x cols positions of IMAGES maps to shared memory, from a row and a column of the tile's first map on.
// Columns beside a map are zeros. Rows beside it, and maps beyond the last, are left as they are: nobody reads them.
template <int rows, int cols>
__device__ inline void copy_tile(Floats* to, const Value* __restrict__ maps, Tile tile, int row, int col) {
  constexpr int kVectors = cols * GROUPS, kTurns = (kVectors + 31) / 32, kWarps = THREADS / 32;
  constexpr int kLines = kTurns < 12 ? 12 / kTurns : 1;  // so many loads are under way at once
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < rows * IMAGES; first += kWarps * kLines) {
    Vector<Value, VECTOR> loaded[kLines][kTurns];
#pragma unroll
    for (int k = 0; k < kLines; ++k) {
      const int line = first + k * kWarps, image = tile.image + line / rows, y = row + line % rows;
      const bool real = line < rows * IMAGES && image < N && 0 <= y && y < HEIGHT;
      const Value* values = maps + (static_cast<long long>(image) * HEIGHT + y) * WIDTH * CHANNELS;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int vector = lane + turn * 32, x = col + vector / GROUPS;
        const int channel = tile.channel + vector % GROUPS * VECTOR;
        loaded[k][turn] = {};
        if (real && vector < kVectors && 0 <= x && x < WIDTH && channel < CHANNELS) {
          loaded[k][turn] = load(values + x * CHANNELS, channel);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLines; ++k) {
      const int line = first + k * kWarps;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int vector = lane + turn * 32;
        if (line < rows * IMAGES && vector < kVectors) {
          Floats floats;
#pragma unroll
          for (int v = 0; v < VECTOR; ++v) floats.at[v] = to_float(loaded[k][turn].at[v]);
          to[line * kVectors + vector] = floats;
        }
      }
    }
  }
}

#if !WEIGHT_GRAD

// x, and the filter in float32, to the map of the sums. A block has one tile.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
depthwise_forward(const Value* __restrict__ x, const float* __restrict__ kernel, Value* __restrict__ out) {
  const Tile tile = find_tile(blockIdx.x / kChannelTiles, blockIdx.x % kChannelTiles);
  copy_tile<kSourceRows, kSourceCols>(shared, x, tile, tile.row - kHalfRows, tile.col - kMargin);
  __syncthreads();

  // Rows vary last, so that few threads of a warp wait for rows that have more rows of the map around them.
  const int group = threadIdx.x % GROUPS, strip = threadIdx.x / GROUPS % STRIPS;
  const int image = threadIdx.x / (GROUPS * STRIPS) % IMAGES, y = threadIdx.x / (GROUPS * STRIPS * IMAGES);
  const int row = tile.row + y, col = tile.col + strip * COLS, channel = tile.channel + group * VECTOR;
  if (y >= ROWS || row >= HEIGHT || col >= WIDTH || channel >= CHANNELS || tile.image + image >= N) return;

  Floats sums[COLS] = {};
  const Floats* source = shared + ((image * kSourceRows + y) * kSourceCols + strip * COLS) * GROUPS + group;
  const int low = max(0, kHalfRows - row), high = min(KH, HEIGHT + kHalfRows - row);  // taps that meet the map
#pragma unroll 1
  for (int i = low; i < high; ++i) {
    Floats taps[KW];
#pragma unroll
    for (int j = 0; j < KW; ++j) taps[j] = load(kernel + (i * KW + j) * CHANNELS, channel);
#pragma unroll
    for (int s = 0; s < COLS + 2 * kMargin; ++s) {
      const Floats value = source[(i * kSourceCols + s) * GROUPS];
#pragma unroll
      for (int j = 0; j < KW; ++j) {
        const int c = s - kMargin + kHalfCols - j;
        if (0 <= c && c < COLS) multiply_add(sums[c], value, taps[j]);
      }
    }
  }

  const long long at = (static_cast<long long>(tile.image + image) * HEIGHT + row) * WIDTH + col;
#pragma unroll
  for (int c = 0; c < COLS; ++c) {
    if (WIDTH % COLS == 0 || col + c < WIDTH) store(out + (at + c) * CHANNELS, channel, sums[c]);
  }
}

#else

constexpr int kTaps = KH * KW * CHANNELS;

// x and the gradient g of the result to PARTS partial sums (PARTS, KH, KW, CHANNELS). A block goes through every
// PARTS-th tile of its channels; each of its threads has one row of taps and every SLICES-th row of the tile.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
depthwise_weight_grad(const Value* __restrict__ x, const Value* __restrict__ g, float* __restrict__ parts) {
  constexpr int kAhead = kHalfCols - kMargin;  // so many columns of g are needed before the first of x
  Floats* const gs = shared + IMAGES * kSourceRows * kSourceCols * GROUPS;
  const int part = blockIdx.x / kChannelTiles, channel_tile = blockIdx.x % kChannelTiles;
  // Threads with the same rows are neighbours: one load of g serves all that differ in their taps alone.
  const int group = threadIdx.x % GROUPS, i = threadIdx.x / GROUPS % KH, slice = threadIdx.x / (GROUPS * KH);
  Floats sums[KW] = {};

#pragma unroll 1
  for (int index = part; index < kColTiles * kRowTiles * kImageTiles; index += PARTS) {
    const Tile tile = find_tile(index, channel_tile);
    __syncthreads();  // the tile before has been read
    copy_tile<kSourceRows, kSourceCols>(shared, x, tile, tile.row - kHalfRows, tile.col - kMargin);
    copy_tile<ROWS, COLS>(gs, g, tile, tile.row, tile.col);
    __syncthreads();
#pragma unroll 1
    for (int line = slice; line < ROWS * IMAGES && slice < SLICES; line += SLICES) {
      const int image = line / ROWS, y = line % ROWS, row = tile.row + y, from = row + i - kHalfRows;
      if (tile.image + image >= N || row >= HEIGHT || from < 0 || from >= HEIGHT) continue;
      const Floats* source = shared + (image * kSourceRows + y + i) * kSourceCols * GROUPS + group;
      Floats held[COLS];
#pragma unroll
      for (int s = -kAhead; s < kSourceCols; ++s) {
        if (s + kAhead < COLS) held[s + kAhead] = gs[(line * COLS + s + kAhead) * GROUPS + group];
        if (s < 0) continue;
        const Floats value = source[s * GROUPS];
#pragma unroll
        for (int j = 0; j < KW; ++j) {
          const int c = s - kMargin + kHalfCols - j;
          if (0 <= c && c < COLS) multiply_add(sums[j], value, held[c]);
        }
      }
    }
  }

  // The sums of the slices, in their order. Shared memory is (SLICES - 1, KH, KW, GROUPS) now.
  __syncthreads();
  if (0 < slice && slice < SLICES) {
#pragma unroll
    for (int j = 0; j < KW; ++j) shared[(((slice - 1) * KH + i) * KW + j) * GROUPS + group] = sums[j];
  }
  __syncthreads();
  if (slice > 0) return;
  const int channel = channel_tile * kTileChannels + group * VECTOR;
#pragma unroll
  for (int j = 0; j < KW; ++j) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      float sum = sums[j].at[v];
#pragma unroll 1
      for (int other = 0; other < SLICES - 1; ++other) {
        sum += shared[((other * KH + i) * KW + j) * GROUPS + group].at[v];
      }
      if (channel + v < CHANNELS) parts[static_cast<long long>(part) * kTaps + (i * KW + j) * CHANNELS + channel + v] = sum;
    }
  }
}

// Adds the partial sums in an order that is always the same: eight threads for each tap, then their eight sums.
extern "C" __global__ void __launch_bounds__(256) depthwise_sum(const float* __restrict__ parts, float* __restrict__ out) {
  float* const sums = reinterpret_cast<float*>(shared);  // (8, 32)
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, tap = blockIdx.x * 32 + lane;
  float sum = 0;
  if (tap < kTaps) {
#pragma unroll 8
    for (int part = slice; part < PARTS; part += 8) sum += parts[static_cast<long long>(part) * kTaps + tap];
  }
  sums[slice * 32 + lane] = sum;
  __syncthreads();
  if (slice > 0 || tap >= kTaps) return;
#pragma unroll
  for (int other = 1; other < 8; ++other) sum += sums[other * 32 + lane];
  out[tap] = sum;
}

#endif
