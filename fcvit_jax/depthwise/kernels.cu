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
// ROWS x (COLS * STRIPS) positions of IMAGES maps in VECTOR * GROUPS channels. A block has THREADS threads; at least
// MIN_BLOCKS blocks run at once on a multiprocessor. WEIGHT_GRAD chooses the pass, with STRIPS = 1, and has two macros
// more: SLICES, the threads that share the rows of a tile, and PARTS, the sums that the second stage adds.

constexpr int kHalfRows = KH / 2, kHalfCols = KW / 2;
constexpr int kTileCols = COLS * STRIPS, kTileChannels = VECTOR * GROUPS;
// If a thread has a whole row of the map, products with the padding beside it are left out, and the tile has none.
constexpr int kMargin = COLS == WIDTH ? 0 : kHalfCols;
// Products with padding above and below are always left out. A tile of all rows has none.
constexpr int kRowMargin = ROWS == HEIGHT ? 0 : kHalfRows;
constexpr int kSourceRows = ROWS + 2 * kRowMargin, kSourceCols = kTileCols + 2 * kMargin;
constexpr int kRowTiles = (HEIGHT + ROWS - 1) / ROWS, kColTiles = (WIDTH + kTileCols - 1) / kTileCols;
constexpr int kImageTiles = (N + IMAGES - 1) / IMAGES, kChannelTiles = (CHANNELS + kTileChannels - 1) / kTileChannels;

template <typename T, int size>
struct alignas(sizeof(T) * size) Vector {
  T at[size];
};
using Floats = Vector<float, VECTOR>;

#if BFLOAT16
using Value = unsigned short;  // the bits of a value
using Values = Vector<unsigned, VECTOR / 2>;  // of two each, the first in the lower half
#else
using Value = float;
using Values = Floats;
#endif

extern __shared__ Floats shared[];

#if BFLOAT16

__device__ inline Value take(const Values& values, int v) { return values.at[v / 2] >> v % 2 * 16; }

__device__ inline void put(Values& values, int v, Value value) { values.at[v / 2] |= unsigned(value) << v % 2 * 16; }

__device__ inline Floats to_floats(const Values& values) {
  Floats result;
#pragma unroll
  for (int v = 0; v < VECTOR; v += 2) {  // one instruction for each value
    result.at[v] = __uint_as_float(values.at[v / 2] << 16);
    result.at[v + 1] = __uint_as_float(values.at[v / 2] & 0xffff0000);
  }
  return result;
}

__device__ inline Values from_floats(const Floats& floats) {
  Values result;
#pragma unroll
  for (int v = 0; v < VECTOR; v += 2) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result.at[v / 2]) : "f"(floats.at[v + 1]), "f"(floats.at[v]));
#else
    result.at[v / 2] = host_bfloat16(floats.at[v]) | host_bfloat16(floats.at[v + 1]) << 16;
#endif
  }
  return result;
}

#else

__device__ inline Value take(const Values& values, int v) { return values.at[v]; }

__device__ inline void put(Values& values, int v, Value value) { values.at[v] = value; }

__device__ inline Floats to_floats(const Values& values) { return values; }

__device__ inline Values from_floats(const Floats& floats) { return floats; }

#endif

// VECTOR channels from `channel` on, which `values` points to; zeros beyond the last.
__device__ inline Values load(const Value* __restrict__ values, int channel) {
  if constexpr (CHANNELS % VECTOR == 0) return *reinterpret_cast<const Values*>(values);
  Values result = {};
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    if (channel + v < CHANNELS) put(result, v, values[v]);
  }
  return result;
}

__device__ inline Floats load_taps(const float* __restrict__ taps, int channel) {
  if constexpr (CHANNELS % VECTOR == 0) return *reinterpret_cast<const Floats*>(taps);
  Floats result;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) result.at[v] = channel + v < CHANNELS ? taps[v] : 0;
  return result;
}

__device__ inline void store(Value* __restrict__ to, int channel, const Values& values) {
  if constexpr (CHANNELS % VECTOR == 0) {
    *reinterpret_cast<Values*>(to) = values;
  } else {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      if (channel + v < CHANNELS) to[v] = take(values, v);
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
// What lies beside a map or beyond the last becomes zeros; the kernels leave out whole rows of them.
template <int rows, int cols>
__device__ inline void copy_tile(Floats* to, const Value* __restrict__ maps, Tile tile, int row, int col) {
  static_assert(32 % GROUPS == 0 && THREADS % 32 == 0, "a warp copies whole positions");
  // A warp copies a row in kTurns turns, of kStep positions each, and kLines rows at once: 12 loads are under way then.
  constexpr int kVectors = cols * GROUPS, kStep = 32 / GROUPS, kTurns = (kVectors + 31) / 32, kWarps = THREADS / 32;
  constexpr int kLines = kTurns < 12 ? 12 / kTurns : 1;
  const int lane = threadIdx.x % 32, x = col + lane / GROUPS, channel = tile.channel + lane % GROUPS * VECTOR;
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < rows * IMAGES; first += kWarps * kLines) {
    Values loaded[kLines][kTurns];
#pragma unroll
    for (int k = 0; k < kLines; ++k) {
      const int line = first + k * kWarps, image = tile.image + line / rows, y = row + line % rows;
      const bool real = line < rows * IMAGES && image < N && 0 <= y && y < HEIGHT && channel < CHANNELS;
      const Value* values = maps + (static_cast<long long>(image) * HEIGHT + y) * WIDTH * CHANNELS;
      const int at = x * CHANNELS + channel;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const bool on_map = static_cast<unsigned>(x + turn * kStep) < WIDTH;
        loaded[k][turn] = {};
        if (real && on_map && lane + turn * 32 < kVectors) {
          loaded[k][turn] = load(values + at + turn * kStep * CHANNELS, channel);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLines; ++k) {
      const int line = first + k * kWarps;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int vector = lane + turn * 32;
        if (line < rows * IMAGES && vector < kVectors) to[line * kVectors + vector] = to_floats(loaded[k][turn]);
      }
    }
  }
}

#if !WEIGHT_GRAD

// x, and the filter in float32, to the map of the sums. A block has one tile.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
depthwise_forward(const Value* __restrict__ x, const float* __restrict__ kernel, Value* __restrict__ out) {
  const Tile tile = find_tile(blockIdx.x / kChannelTiles, blockIdx.x % kChannelTiles);
  copy_tile<kSourceRows, kSourceCols>(shared, x, tile, tile.row - kRowMargin, tile.col - kMargin);
  __syncthreads();

  // Rows vary last, so that few threads of a warp wait for rows that have more rows of the map around them.
  const int group = threadIdx.x % GROUPS, strip = threadIdx.x / GROUPS % STRIPS;
  const int image = threadIdx.x / (GROUPS * STRIPS) % IMAGES, y = threadIdx.x / (GROUPS * STRIPS * IMAGES);
  const int row = tile.row + y, col = tile.col + strip * COLS, channel = tile.channel + group * VECTOR;
  if (y >= ROWS || row >= HEIGHT || col >= WIDTH || channel >= CHANNELS || tile.image + image >= N) return;

  Floats sums[COLS] = {};
  const int first = image * kSourceRows + y - kHalfRows + kRowMargin;  // of the rows of the tile
  const Floats* strip_start = shared + strip * COLS * GROUPS + group;
  const int low = max(0, kHalfRows - row), high = min(KH, HEIGHT + kHalfRows - row);  // taps that meet the map
#pragma unroll 1
  for (int i = low; i < high; ++i) {
    const Floats* source = strip_start + (first + i) * kSourceCols * GROUPS;
    const float* const row_of_taps = kernel + i * KW * CHANNELS + channel;
    Floats taps[KW];
#pragma unroll
    for (int j = 0; j < KW; ++j) taps[j] = load_taps(row_of_taps + j * CHANNELS, channel);
#pragma unroll
    for (int s = 0; s < COLS + 2 * kMargin; ++s) {
      const Floats value = source[s * GROUPS];
#pragma unroll
      for (int j = 0; j < KW; ++j) {
        const int c = s - kMargin + kHalfCols - j;
        if (0 <= c && c < COLS) multiply_add(sums[c], value, taps[j]);
      }
    }
  }

  out += ((static_cast<long long>(tile.image + image) * HEIGHT + row) * WIDTH + col) * CHANNELS + channel;
#pragma unroll
  for (int c = 0; c < COLS; ++c) {
    if (WIDTH % COLS == 0 || col + c < WIDTH) store(out + c * CHANNELS, channel, from_floats(sums[c]));
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
    copy_tile<kSourceRows, kSourceCols>(shared, x, tile, tile.row - kRowMargin, tile.col - kMargin);
    copy_tile<ROWS, COLS>(gs, g, tile, tile.row, tile.col);
    __syncthreads();
#pragma unroll 1
    for (int line = slice; line < ROWS * IMAGES && slice < SLICES; line += SLICES) {
      const int image = line / ROWS, y = line % ROWS, row = tile.row + y, from = row + i - kHalfRows;
      if (tile.image + image >= N || row >= HEIGHT || from < 0 || from >= HEIGHT) continue;
      const int first = image * kSourceRows + y + i - kHalfRows + kRowMargin;
      const Floats* source = shared + first * kSourceCols * GROUPS + group;
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
      const int tap = (i * KW + j) * CHANNELS + channel + v;
      if (channel + v < CHANNELS) parts[static_cast<long long>(part) * kTaps + tap] = sum;
    }
  }
}

// Adds the partial sums in an order that is always the same: eight threads for each tap, then their eight sums.
extern "C" __global__ void __launch_bounds__(256)
depthwise_sum(const float* __restrict__ parts, float* __restrict__ out) {
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
