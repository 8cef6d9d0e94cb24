// What lies behind transforms that divide channels, times the divisors: outputs of all spaces of values become one, and
// queries meet keys. Products are rounded before they are added, in the order of the spaces, as PyTorch does.
// What comes before this file defines FROM, KEPT and TO (the types of numbers, divisors and results: 0 float16,
// 1 bfloat16, 2 float32), HEADS_FIRST (whether heads come before queries) and SPACES (at most).
#define BFLOAT (TO == 1)
#include "machine.cuh"

struct Given {
  i64 space, row, first, second;            // of numbers, in elements; results have no gaps
  i64 kept_row[SPACES], kept_head[SPACES];  // of divisors, in elements, 0 where all have the same
  int firsts, seconds, fours, groups, spaces, count;  // fours of channels; count: of all results
  const u8* from;
  u8* to;
  const u8* kept[SPACES];  // null where nothing divides
};
extern "C" { __constant__ int SHARED_BYTES = 0; }

// Four numbers from a place that is a multiple of four on.
template <int T> __device__ __forceinline__ void load_four(float* x, const u8* from, i64 at) {
  if (T == 2) {
    const float4 v = *(const float4*)(from + 4 * at);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = *(const uint2*)(from + 2 * at);
    const u32 word[4] = {v.x & 0xffffu, v.x >> 16, v.y & 0xffffu, v.y >> 16};
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = T == 1 ? lo(word[i]) : half(word[i]);
  }
}

extern "C" __global__ void __launch_bounds__(128) join(const __grid_constant__ Given given) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  const int channel = at % given.fours * 4, line = at / given.fours;
  const int second = line % given.seconds, rest = line / given.seconds;
  const int first = rest % given.firsts, row = rest / given.firsts;
  const int head = (HEADS_FIRST ? first : second) / given.groups;
  const i64 from = row * given.row + first * given.first + second * given.second + channel;
  wait_for_last();
  if (at >= given.count) return;
  float x[SPACES][4], d[SPACES][4], sum[4];
#pragma unroll
  for (int s = 0; s < SPACES; s++) {
    d[s][0] = d[s][1] = d[s][2] = d[s][3] = 1.f;
    if (s < given.spaces) load_four<FROM>(x[s], given.from, s * given.space + from);
    if (given.kept[s]) load_four<KEPT>(d[s], given.kept[s], row * given.kept_row[s] + head * given.kept_head[s] + channel);
  }
#pragma unroll
  for (int s = 0; s < SPACES; s++)
    if (s < given.spaces)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float y = __fmul_rn(x[s][i], d[s][i]);
        sum[i] = s ? __fadd_rn(sum[i], y) : y;
      }
  if (TO == 2) {
    *(float4*)(given.to + 16 * (i64)at) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  } else {
    *(uint2*)(given.to + 8 * (i64)at) = make_uint2(model_pair(sum[0], sum[1]), model_pair(sum[2], sum[3]));
  }
}
