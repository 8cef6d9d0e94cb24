// Codes, scales and offsets of tokens, written where their stores keep them.
//
// All arithmetic is that of the quantizer in float32, rounded after each operation as PyTorch does on a GPU: nothing is
// contracted, and to divide by a constant is to multiply by its reciprocal. What comes before this file defines HEAD_DIM,
// BITS, GROUP (channels of a token, or tokens of a channel, that share a scale), BY_CHANNEL, BFLOAT (the model's type),
// RMS (0: levels from minimum to maximum, 1: a STEP times the root mean square), SYMMETRIC, ROTATED (a Hadamard matrix
// first, then a FACTOR), DIVIDED (channels by a number of their own first), RANGED (channels have known extremes, those of
// all tokens), KEPT (scales in 0 float16, 1 bfloat16, 2 float32, 3 float8_e4m3), PIECES, TURNS and BLOCKS.
#include "machine.cuh"

constexpr int D = HEAD_DIM, THREADS = 128;
constexpr int ROW = D * BITS / 8;  // bytes
constexpr int NUMBERS = BY_CHANNEL || RANGED ? D : D / GROUP;
constexpr bool OFFSETS = !RMS;
constexpr u32 LEVELS = (1u << BITS) - 1;
constexpr float TOP = (float)LEVELS, PER_LEVEL = 1.f / TOP;
extern "C" { __constant__ int SHARED_BYTES = BY_CHANNEL ? GROUP * D : 0; }

struct Piece {
  const u8* numbers;
  u8 *codes, *params;
  const u16 *first, *second;  // divisors, or least and greatest numbers, of channels
};
struct Given {
  i64 row, head, token;            // of numbers, in elements
  i64 codes_row, codes_head;       // bytes
  i64 params_row, params_head;     // bytes
  i64 beside_row, beside_head;     // of divisors or extremes, in elements
  int heads, tokens, blocks, pad;  // blocks for a row and head
  Piece pieces[PIECES];
};

__device__ __forceinline__ float least(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float greatest(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float divisor(float scale) { return scale > 0.f ? scale : 1.f; }
__device__ __forceinline__ float number(u32 w) { return BFLOAT ? lo(w) : half(w); }
__device__ __forceinline__ float as_model(float x) { return number(BFLOAT ? bfloats(x, 0.f) & 0xffffu : halves(x, 0.f) & 0xffffu); }

// x as float8_e4m3, rounded up or down, the sign apart; a byte, and what it stands for.
__device__ __forceinline__ u32 e4m3(float x, bool up, float& value) {
  const bool negative = x < 0.f;
  const float size = fminf(fabsf(x), 448.f);
  if (x != x) {
    value = x;
    return 0x7f;
  }
  const int exponent = max((int)(__float_as_uint(size) >> 23) - 127, -6);
  const float unit = __uint_as_float((u32)(exponent - 3 + 127) << 23), more = __uint_as_float((u32)(3 - exponent + 127) << 23);
  const float steps = __fmul_rn(size, more);
  const float rounded = __fmul_rn(negative == up ? floorf(steps) : ceilf(steps), unit);
  const u32 bits = __float_as_uint(rounded);
  const int found = (int)(bits >> 23) - 127;
  const u32 byte = found >= -6 ? (u32)(found + 7) << 3 | (bits >> 20 & 7u) : (u32)__fmul_rn(rounded, 512.f);
  value = negative ? -rounded : rounded;
  return byte | (negative ? 0x80u : 0u);
}

struct Affine {
  float offset, over;         // of the quantizer
  float base, other;          // as they are kept, if in 8 bits
  bool again;                 // whether codes go by these
  u32 scale_kept, offset_kept;
};
__device__ __forceinline__ u32 kept(float x) {
  if (KEPT == 2) return __float_as_uint(x);
  if (KEPT == 1) return bfloats(x, 0.f) & 0xffffu;
  return halves(fabsf(x) < __uint_as_float(0x7f800000u) ? fminf(fmaxf(x, -65504.f), 65504.f) : x, 0.f) & 0xffffu;
}
__device__ __forceinline__ Affine affine(float scale, float offset) {
  Affine a;
  a.offset = offset;
  a.over = divisor(scale);
  a.again = false;
  a.base = a.other = 0.f;
  if (KEPT == 3) {
    float base = 0.f, rounded;
    a.offset_kept = OFFSETS ? e4m3(offset, false, base) : 0u;
    const float wanted = OFFSETS ? __fadd_rn(scale, __fmul_rn(__fsub_rn(offset, base), PER_LEVEL)) : scale;
    a.scale_kept = e4m3(wanted, true, rounded);
    a.again = !(rounded == scale && base == offset);
    a.base = base;
    a.other = divisor(rounded);
  } else {
    a.scale_kept = kept(scale);
    a.offset_kept = OFFSETS ? kept(offset) : 0u;
  }
  return a;
}
__device__ __forceinline__ Affine of_range(float low, float high) {
  if (SYMMETRIC) {
    const float bound = greatest(-low, high);
    const bool same = low == high;
    low = same ? low : -bound;
    high = same ? high : bound;
  }
  return affine(__fmul_rn(__fsub_rn(high, low), PER_LEVEL), low);
}
__device__ __forceinline__ u32 clamped(float x) { return x != x ? 0u : (u32)fminf(fmaxf(x, 0.f), TOP); }
__device__ __forceinline__ u32 code_of(float x, const Affine& a) {
  if (KEPT == 3 && a.again) {
    const float y = __fdiv_rn(OFFSETS ? __fsub_rn(x, a.base) : x, a.other);
    // Levels of RMS: how many of the whole numbers between them y exceeds.
    return RMS ? clamped(ceilf(y == y ? fminf(fmaxf(y, -1000.f), 1000.f) : 0.f) + (float)(LEVELS / 2)) : clamped(rintf(y));
  }
  return clamped(rintf(RMS ? __fadd_rn(__fdiv_rn(x, a.over), TOP * .5f) : __fdiv_rn(__fsub_rn(x, a.offset), a.over)));
}
__device__ __forceinline__ void put(u8* params, int number, u32 value) {
  if (KEPT == 3) params[number] = (u8)value;
  else if (KEPT == 2) ((u32*)params)[number] = value;
  else ((u16*)params)[number] = (u16)value;
}

struct Line {
  const u16 *numbers, *first, *second;
  u8 *codes, *params;
  int block;
};
__device__ __forceinline__ Line line_of(const Given& g) {
  const int line = (int)(blockIdx.x / (u32)g.blocks), row = line / g.heads, head = line % g.heads;
  const Piece& p = g.pieces[blockIdx.y];
  Line l;
  l.numbers = (const u16*)p.numbers + row * g.row + head * g.head;
  l.first = p.first + row * g.beside_row + head * g.beside_head;
  l.second = p.second + row * g.beside_row + head * g.beside_head;
  l.codes = p.codes + row * g.codes_row + head * g.codes_head;
  l.params = p.params + row * g.params_row + head * g.params_head;
  l.block = (int)(blockIdx.x % (u32)g.blocks);
  return l;
}

#if BY_CHANNEL
// A block codes a group of tokens, a thread channels. Codes meet in shared memory, where planes are put together.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) encode(const __grid_constant__ Given g) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Line l = line_of(g);
  const u16* numbers = l.numbers + (i64)l.block * GROUP * g.token;
  u8 *codes = l.codes + (i64)l.block * GROUP * ROW, *params = l.params + (i64)l.block * 2 * NUMBERS * (KEPT == 3 ? 1 : KEPT == 2 ? 4 : 2);
  for (int c = threadIdx.x; c < D; c += THREADS) {
    float low = number(numbers[c]), high = low;
#pragma unroll 8
    for (int t = 1; t < GROUP; t++) {
      const float x = number(numbers[t * g.token + c]);
      low = least(low, x);
      high = greatest(high, x);
    }
    const Affine a = of_range(low, high);
    put(params, c, a.scale_kept);
    put(params, NUMBERS + c, a.offset_kept);
#pragma unroll 8
    for (int t = 0; t < GROUP; t++) shared[t * D + c] = (u8)code_of(number(numbers[t * g.token + c]), a);
  }
  __syncthreads();
  const u32* words = (const u32*)shared;
  for (int i = threadIdx.x; i < GROUP * ROW / 4; i += THREADS) {
    const int token = i / (ROW / 4), word = i % (ROW / 4);
    u32 found = 0;
    if (BITS == 3) {
      constexpr int LOW = D / 16, HIGH = D / 32;  // words of the planes of two bits, and of one
      if (word < LOW) {
        for (int p = 0; p < 4; p++) found |= (words[token * (D / 4) + p * LOW + word] & 0x03030303u) << 2 * p;
      } else {
        for (int p = 0; p < 8; p++) found |= (words[token * (D / 4) + p * HIGH + word - LOW] >> 2 & 0x01010101u) << p;
      }
    } else {
      for (int p = 0; p < 8 / BITS; p++) found |= words[token * (D / 4) + p * (ROW / 4) + word] << BITS * p;
    }
    ((u32*)codes)[i] = found;
  }
}
#else
// A warp codes a token, or several of a smaller head; a lane 4 or 8 neighbouring channels.
constexpr int LANES = D < 128 ? D / 4 : 32, EACH = D / LANES, WORDS = EACH / 4, MEMBERS = GROUP / EACH;
constexpr int AT_ONCE = 32 / LANES, TOKENS = THREADS / 32 * AT_ONCE * TURNS;

__device__ __forceinline__ float across(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// By sums and differences of channels 1, 2, 4, ... apart.
__device__ __forceinline__ void rotate(float* v, int lane) {
#pragma unroll
  for (int width = 1; width < EACH; width *= 2) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (i & width) continue;
      const float a = v[i], b = v[i + width];
      v[i] = __fadd_rn(a, b);
      v[i + width] = __fsub_rn(a, b);
    }
  }
#pragma unroll
  for (int width = 1; width < LANES; width *= 2) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const float other = across(v[i], width);
      v[i] = lane & width ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other);
    }
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) v[i] = as_model(__fmul_rn(v[i], (float)(FACTOR)));
}

// As `root_mean_square`: squares of what the largest number is 1 of, summed by pairs of neighbours.
__device__ __forceinline__ float size_of(const float* v) {
  float largest = 0.f, squares[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) largest = greatest(largest, fabsf(v[i]));
#pragma unroll
  for (int width = 1; width < MEMBERS; width *= 2) largest = greatest(largest, across(largest, width));
  const float over = divisor(largest);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const float x = __fdiv_rn(v[i], over);
    squares[i] = __fmul_rn(x, x);
  }
#pragma unroll
  for (int width = 1; width < EACH; width *= 2) {
#pragma unroll
    for (int i = 0; i < EACH; i += 2 * width) squares[i] = __fadd_rn(squares[i], squares[i + width]);
  }
  float sum = squares[0];
#pragma unroll
  for (int width = 1; width < MEMBERS; width *= 2) sum = __fadd_rn(sum, across(sum, width));
  return __fmul_rn(__fsqrt_rn(__fmul_rn(sum, 1.f / GROUP)), largest);
}
__device__ __forceinline__ Affine affine_of(const float* v) {
  if (RMS) return affine(__fmul_rn(size_of(v), (float)(STEP)), 0.f);
  float low = v[0], high = v[0];
#pragma unroll
  for (int i = 1; i < EACH; i++) {
    low = least(low, v[i]);
    high = greatest(high, v[i]);
  }
#pragma unroll
  for (int width = 1; width < MEMBERS; width *= 2) {
    low = least(low, across(low, width));
    high = greatest(high, across(high, width));
  }
  return of_range(low, high);
}

// The planes of the lower BITS_ bits of codes, four in a word; the first lanes hold what is packed.
template <int BITS_> __device__ __forceinline__ void pack(const u32* words, u8* to, int lane, bool there) {
  constexpr int FILLED = LANES * BITS_ / 8;  // lanes that have something to write
  u32 packed[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    packed[i] = words[i] << BITS_ * (lane / FILLED);
#pragma unroll
    for (int width = FILLED; width < LANES; width *= 2) packed[i] |= __shfl_xor_sync(0xffffffffu, packed[i], width);
    if (there && lane < FILLED) ((u32*)to)[lane * WORDS + i] = packed[i];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) encode(const __grid_constant__ Given g) {
  const Line l = line_of(g);
  const int lane = threadIdx.x % LANES, first = l.block * TOKENS + threadIdx.x / LANES;
  u32 raw[TURNS][EACH / 2];
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int token = min(first + turn * (TOKENS / TURNS), g.tokens - 1);
    const u32* from = (const u32*)(l.numbers + token * g.token) + lane * (EACH / 2);
#pragma unroll
    for (int i = 0; i < EACH / 2; i += 2) {
      const uint2 w = *(const uint2*)(from + i);
      raw[turn][i] = w.x;
      raw[turn][i + 1] = w.y;
    }
  }
  float over[EACH];
  Affine of_channel[EACH];
  if (DIVIDED) {
#pragma unroll
    for (int i = 0; i < EACH; i++) over[i] = number(l.first[lane * EACH + i]);
  }
  if (RANGED) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int channel = lane * EACH + i;
      of_channel[i] = of_range(number(l.first[channel]), number(l.second[channel]));
      if (first == 0) {
        put(l.params, channel, of_channel[i].scale_kept);
        put(l.params, NUMBERS + channel, of_channel[i].offset_kept);
      }
    }
  }
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int token = first + turn * (TOKENS / TURNS);
    const bool there = token < g.tokens;
    float v[EACH];
#pragma unroll
    for (int i = 0; i < EACH / 2; i++) {
      v[2 * i] = number(raw[turn][i] & 0xffffu);
      v[2 * i + 1] = number(raw[turn][i] >> 16);
    }
    if (DIVIDED) {
#pragma unroll
      for (int i = 0; i < EACH; i++) v[i] = as_model(__fdiv_rn(v[i], over[i]));
    }
    if (ROTATED) rotate(v, lane);
    Affine a;
    if (!RANGED) a = affine_of(v);
    u32 words[WORDS], low[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      words[w] = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) words[w] |= code_of(v[4 * w + i], RANGED ? of_channel[4 * w + i] : a) << 8 * i;
    }
    u8* codes = l.codes + (i64)token * ROW;
    if (BITS == 3) {
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        low[w] = words[w] & 0x03030303u;
        words[w] = words[w] >> 2 & 0x01010101u;
      }
      pack<2>(low, codes, lane, there);
      pack<1>(words, codes + D / 4, lane, there);
    } else {
      pack<BITS == 3 ? 1 : BITS>(words, codes, lane, there);
    }
    if (!RANGED && there && lane % MEMBERS == 0) {
      u8* params = l.params + (i64)token * NUMBERS * (OFFSETS ? 2 : 1) * (KEPT == 3 ? 1 : KEPT == 2 ? 4 : 2);
      put(params, lane / MEMBERS, a.scale_kept);
      if (OFFSETS) put(params, NUMBERS + lane / MEMBERS, a.offset_kept);
    }
  }
}
#endif
