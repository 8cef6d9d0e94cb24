// Kinds of tokens, what is hidden of scores, and how all that was found becomes one result.
// Bytes of tiles for a warp, so that a multiprocessor holds its blocks.
constexpr int ROOM = (MEMORY * 1024 / (MEMORY < 128 ? 1 : BLOCKS) - 1024 - WARPS * SLOT * 4) / WARPS - 1024;
// Keys and values of a kind of tokens, and where a tile of them lies in shared memory.
template <class K_, class V_, int TS> struct Pair {
  using K = K_;
  using V = V_;
  static constexpr int TOKENS = TS, VALUES = K::BYTES, KEY_PARAMS = VALUES + V::BYTES, VALUE_PARAMS = KEY_PARAMS + K::PARAM_BYTES;
  static constexpr int STAGE = VALUE_PARAMS + V::PARAM_BYTES, FIT = TS == 16 ? 1 : (ROOM - V::SCRATCH) / STAGE;
  static constexpr int STAGES_ = FIT >= STAGES && TS > 16 ? STAGES : FIT < 3 ? 1 : FIT, SCRATCH = STAGES_ * STAGE, MORE = SCRATCH + K::SCRATCH, BYTES = MORE + V::SCRATCH;
};

__device__ constexpr int most(int a, int b) { return a > b ? a : b; }
#ifndef KIND_1
#define KIND_1 KIND_0
#endif
#ifndef KIND_2
#define KIND_2 KIND_0
#endif
#ifndef KIND_3
#define KIND_3 KIND_0
#endif
#ifndef KIND_4
#define KIND_4 KIND_0
#endif
#ifndef KIND_5
#define KIND_5 KIND_0
#endif
constexpr int RING = most(most(most(KIND_0::BYTES, KIND_1::BYTES), most(KIND_2::BYTES, KIND_3::BYTES)), most(KIND_4::BYTES, KIND_5::BYTES));

extern "C" { __constant__ int SHARED_BYTES = WARPS * (SLOT * 4 + RING); }

// The column of the mask for a token, -1 where there is none.
__device__ __forceinline__ i64 column_of(const Plan& plan, const Run& run, int token, const Warp& w) {
  if (!PLACES || run.slot >= 0) return run.slot + token;
  const i64 at = w.row * plan.places_row + w.head * plan.places_head + run.column + token;
  return PLACES == 8 ? ((const i64*)plan.places)[at] : (i64)((const int*)plan.places)[at];
}
__device__ __forceinline__ float mask_at(const Plan& plan, i64 at) {
  if (MASK == 2) return ((const float*)plan.mask)[at];
  return MASK == 3 ? Number<1>::at(plan.mask, at) : Number<0>::at(plan.mask, at);
}

// Whether the value of a token lies in the page of its run.
template <bool BY_SLOT> __device__ __forceinline__ bool here(const Plan& plan, const Run& run, int token, const Warp& w) {
  return !BY_SLOT || !scattered(run.v) || has(run.v, fresh(index_of(plan, run.v, w) + token));
}

// Scores of tokens that a query may not see, and of those that are none, are minus infinity.
template <int TS, bool BY_SLOT> __device__ __forceinline__ void hide(const Plan& plan, const Run& run, int seen, int left, const Warp& w, float s[Tile<TS>::NS][4]) {
  using T = Tile<TS>;
  const int c = w.lane & 3, rows = plan.groups * plan.queries;
#pragma unroll
  for (int n = 0; n < T::NS; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int tok = T::token(n, w.lane) + 8 * h;
      const bool held = tok < left && !(R == 4 && !T::PAIRS && c >= 2) && here<BY_SLOT>(plan, run, seen + tok, w);
      const i64 column = (MASK || PLACES) && held ? column_of(plan, run, seen + tok, w) : 0;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int row = w.base + (2 * c + j) % R;
        float& x = s[n][2 * h + j];
        bool there = held && column >= 0;
        if (CAUSAL) there = there && tok <= run.causal - seen + row % plan.queries;
        if (MASK && there) {
          i64 at = w.row * plan.mask_row + w.head * plan.mask_head + column * plan.mask_column;
          if (row < rows) at += row / plan.queries * plan.mask_group + row % plan.queries * plan.mask_query;
          if (MASK == 1) {
            there = plan.mask[at];
          } else {
            const float more = mask_at(plan, at);
            there = more > plan.hidden;
            x += 1.44269504f * more;
          }
        }
        if (!there) x = -INFINITE;
      }
    }
}
template <int TS, bool BY_SLOT> __device__ __forceinline__ void keep(const Plan& plan, const Run& run, int seen, int left, const Warp& w, const float s[Tile<TS>::NS][4]) {
  using T = Tile<TS>;
  const int c = w.lane & 3, rows = plan.groups * plan.queries;
#pragma unroll
  for (int i = 0; i < T::NS * 4; i++) {
    const int tok = T::token(i >> 2, w.lane) + 8 * ((i >> 1) & 1), row = w.base + (2 * c + (i & 1)) % R;
    if (tok < left && row < rows && !(R == 4 && !T::PAIRS && c >= 2) && here<BY_SLOT>(plan, run, seen + tok, w))
      plan.scores[(((i64)w.row * plan.kv_heads + w.head) * rows + row) * plan.columns + run.column + seen + tok] = s[0][i];
  }
}

// Past the caches that other multiprocessors don't see, and only what is there.
__device__ __forceinline__ void load4(float4& v, const float* p, bool there) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];}" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p), "r"((int)there) : "memory");
}
__device__ __forceinline__ void load1(float& v, const float* p, bool there) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.cg.f32 %0, [%1];}" : "+f"(v) : "l"(p), "r"((int)there) : "memory");
}
__device__ __forceinline__ void add4(float4& v, const float4 x, float f) {
  v.x = fmaf(x.x, f, v.x);
  v.y = fmaf(x.y, f, v.y);
  v.z = fmaf(x.z, f, v.z);
  v.w = fmaf(x.w, f, v.w);
}
// Where a row of the output and four of its channels are: i counts fours of the block's rows.
struct Spot {
  int head, query, ch;  // query head; query -1: there is no such row
  __device__ __forceinline__ Spot(const Plan& plan, const Warp& w, int i) {
    const int at = w.base + i / (DV / 4);
    const bool there = at < plan.groups * plan.queries;
    head = plan.queries == 1 ? at : at / plan.queries;
    query = there ? at - head * plan.queries : -1;
    head += w.head * plan.groups;
    ch = i % (DV / 4) * 4;
  }
};
// What divides the sum of a row, once sinks are in: the factor of its values.
__device__ __forceinline__ float finished(const Plan& plan, const Warp& w, const Spot& spot, float top, float sum) {
  if (spot.query < 0) return 0.f;
  float f = 1.f;
  if (plan.sinks) {
    const float sink = plan.sinks[spot.head] * 1.44269504f, high = fmaxf(top, sink);
    f = ex2(top - high);
    sum = sum * f + ex2(sink - high);
    top = high;
  }
  if (spot.ch == 0) {
    const i64 at = ((i64)w.row * plan.kv_heads * plan.groups + spot.head) * plan.queries + spot.query;
    const float lse = sum > 0.f ? top + __log2f(sum) : -INFINITE;
    plan.lse[at] = 0.69314718f * lse;
    if (SCORES) plan.sums[at] = sum > 0.f ? lse : 0.f;
  }
  return sum > 0.f ? __fdividef(f, sum) : 0.f;
}
__device__ __forceinline__ void write_out(const Plan& plan, const Warp& w, const Spot& spot, float4 v, float f, int space) {
  if (spot.query < 0) return;
  const i64 to = space * plan.out_space + (((i64)w.row * plan.queries + spot.query) * plan.kv_heads * plan.groups + spot.head) * DV + spot.ch;
  if (FLOAT) *(float4*)(plan.out + 4 * to) = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
  else *(uint2*)(plan.out + 2 * to) = make_uint2(model_pair(v.x * f, v.y * f), model_pair(v.z * f, v.w * f));
}

// Maximum and sum of a row, and the sum of four of its channels.
struct Found {
  float top, sum;
  float4 v;
  __device__ __forceinline__ Found() : top(LOWEST), sum(0.f), v(make_float4(0.f, 0.f, 0.f, 0.f)) {}
  // Add what some blocks found: means, and the logarithms of their weights. All that a step takes is on its way at once.
  template <bool VALUES> __device__ __forceinline__ void add(const float* partial, int i, int first, int last) {
    constexpr int N = 32;
#pragma unroll 1
    for (int p = first; p < last; p += N) {
      const float* from = partial + (i64)p * PART;
      float about[N];
      float4 x[N];
#pragma unroll
      for (int q = 0; q < N; q++) {
        about[q] = -INFINITE;
        load1(about[q], from + q * PART + R * DV + i / (DV / 4), p + q < last);
        if (VALUES) load4(x[q], from + q * PART + 4 * i, p + q < last);
      }
      float high = top;
#pragma unroll
      for (int q = 0; q < N; q++) high = fmaxf(high, about[q]);
      const float f = ex2(top - high);
      top = high;
      sum *= f;
      v = make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
#pragma unroll
      for (int q = 0; q < N; q++) {
        const float f = ex2(about[q] - high);
        sum += f;
        if (VALUES && p + q < last) add4(v, x[q], f);
      }
    }
  }
};

// The warps' slots become one; of the blocks of a head the last to come puts all together, always in the same order.
__device__ __forceinline__ void merge_block(const Plan& plan, const Warp& w, const float* slots) {
  constexpr int FOURS = R * DV / 4, THREADS = WARPS * 32;
  const i64 line = (i64)blockIdx.z * gridDim.y + blockIdx.y;
  float* partial = plan.partial + line * plan.parts * PART;
  for (int i = threadIdx.x; i < FOURS; i += THREADS) {
    const int row = i / (DV / 4), ch = i % (DV / 4) * 4;
    Found own;
#pragma unroll
    for (int k = 0; k < WARPS * (8 / R); k++)
      own.top = fmaxf(own.top, slots[k % WARPS * SLOT + 8 * (DV + 4) + 2 * (row + k / WARPS * R)]);
#pragma unroll
    for (int k = 0; k < WARPS * (8 / R); k++) {
      const float* slot = slots + k % WARPS * SLOT;
      const float2 x = *(const float2*)(slot + 8 * (DV + 4) + 2 * (row + k / WARPS * R));
      const float f = ex2(x.x - own.top);
      own.sum += x.y * f;
      if (x.y > 0.f) add4(own.v, *(const float4*)(slot + (row + k / WARPS * R) * (DV + 4) + ch), f);
    }
    if (plan.parts == 1) {
      const Spot spot(plan, w, i);
      write_out(plan, w, spot, own.v, finished(plan, w, spot, own.top, own.sum), 0);
    } else {
      const float f = own.sum > 0.f ? __fdividef(1.f, own.sum) : 0.f;
      *(float4*)(partial + blockIdx.x * PART + 4 * i) = make_float4(own.v.x * f, own.v.y * f, own.v.z * f, own.v.w * f);
      if (ch == 0) partial[blockIdx.x * PART + R * DV + row] = own.sum > 0.f ? own.top + __log2f(own.sum) : -INFINITE;
    }
  }
  if (plan.parts == 1) return;
  __syncthreads();
  __shared__ u32 before;
  if (threadIdx.x == 0) before = count(plan.counters + line, plan.parts - 1);
  __syncthreads();
  if (before != plan.parts - 1) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < FOURS; i += THREADS) {
    const Spot spot(plan, w, i);
    Found all;
    if (plan.spaces > 1) all.add<false>(partial, i, 0, plan.parts);
    float f = 0.f;
#pragma unroll 1
    for (int space = 0; space < plan.spaces; space++) {
      Found own;
      own.add<true>(partial, i, plan.layout.parts[space], plan.layout.parts[space + 1]);
      if (plan.spaces == 1) all = own;
      if (!space) f = finished(plan, w, spot, all.top, all.sum);
      write_out(plan, w, spot, own.v, f * ex2(own.top - all.top), space);
    }
  }
}
