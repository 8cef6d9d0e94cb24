// What tokens receive of the attention of some queries of a prompt, summed over these, with no score written.
//
// Two passes over the products of queries and keys. PASS 1 gives each query the logarithm of the sum of its exponentials:
// its rows are queries, its columns keys. PASS 2 sums each key's weights: its rows are keys, its columns queries of all
// heads of its group. A block keeps its rows in registers; columns come through a ring. What comes before this file
// defines PASS, HEAD_DIM, BFLOAT (the model's type), BLOCKS, MASK (0 none, 1 bytes) and SOFTCAP.
#include "machine.cuh"
#include "observed.cuh"

constexpr int D = HEAD_DIM, WARPS = 4, FRAGS = D > 128 ? 1 : PASS == 1 && MASK ? 2 : 4, ROWS = WARPS * FRAGS * 16, COLS = 64, STEPS = D / 16;
constexpr int WIDE = FRAGS < 4 ? 4 : 2;  // tiles of 8 columns at a time
constexpr int CHUNKS = D / 8, PITCH = 2 * D + 16;  // bytes; an odd number of 16 keeps banks apart
constexpr int LSE = COLS * PITCH, AT = LSE + COLS * 4, STAGE = AT + COLS * 4, STAGES = D > 128 ? 2 : 3;
extern "C" { __constant__ int SHARED_BYTES = STAGES * STAGE; }

struct Block {
  int row, head, kv_head, first, from, per;  // first: of its rows; pass 2: columns begin at `from`, `per` tiles of each head
};

__device__ __forceinline__ bool hidden(const Given& g, const Block& b, int query, int head, int token) {
  if (token >= g.tokens || (g.causal && token > query + g.offset)) return true;
#if MASK
  return !g.mask[b.row * g.mask_row + head * g.mask_head + query * g.mask_query + token * g.mask_token];
#else
  return false;
#endif
}

__device__ __forceinline__ void fetch(const Given& g, const Block& b, int tile, u32 to) {
  const int at = threadIdx.x;
  if (PASS == 1) {
    const u8* from = g.keys + 2 * (b.row * g.key_row + b.kv_head * g.key_head);
#pragma unroll
    for (int i = at; i < COLS * CHUNKS; i += WARPS * 32) {
      const int j = i / CHUNKS, c = i % CHUNKS, t = tile * COLS + j;
      copy<16>(to + j * PITCH + c * 16, from + 2 * min(t, g.tokens - 1) * g.key_token + c * 16, t < g.tokens);
    }
  } else {
    const int head = b.kv_head * g.groups + tile / b.per, first = (b.from + tile % b.per) * COLS;
    const u8* from = g.query + 2 * (b.row * g.query_row + head * g.query_head);
#pragma unroll
    for (int i = at; i < COLS * CHUNKS; i += WARPS * 32) {
      const int j = i / CHUNKS, c = i % CHUNKS;
      copy<16>(to + j * PITCH + c * 16, from + 2 * g.at[first + j] * g.query_token + c * 16, true);
    }
    if (at < COLS) copy<4>(to + LSE + 4 * at, (const u8*)(g.lse + ((i64)b.row * g.heads + head) * g.room + first + at), true);
    else copy<4>(to + AT + 4 * (at - COLS), (const u8*)(g.at + first + at - COLS), true);
  }
}

struct Rows {
  u32 a[FRAGS][STEPS][4];
  int at[FRAGS][2];  // the query's number, or the token's
  float m[FRAGS][2], l[FRAGS][2];
};

__device__ __forceinline__ void load(const Given& g, const Block& b, Rows& r) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u8* from = PASS == 1 ? g.query + 2 * (b.row * g.query_row + b.head * g.query_head) : g.keys + 2 * (b.row * g.key_row + b.kv_head * g.key_head);
#pragma unroll
  for (int f = 0; f < FRAGS; f++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = b.first + (warp * FRAGS + f) * 16 + 8 * i + lane / 4;
      r.at[f][i] = PASS == 1 ? g.at[min(row, g.room - 1)] : row;
      r.m[f][i] = LOWEST;
      r.l[f][i] = 0.f;
      const u8* x = from + 2 * (PASS == 1 ? r.at[f][i] * g.query_token : min(row, g.tokens - 1) * g.key_token) + 4 * (lane & 3);
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        r.a[f][s][i] = *(const u32*)(x + 32 * s);
        r.a[f][s][i + 2] = *(const u32*)(x + 32 * s + 16);
      }
    }
}

// WIDE * 8 columns of a tile. EDGE: some of them may be hidden from some row.
template <bool EDGE> __device__ __forceinline__ void add(const Given& g, const Block& b, Rows& r, u32 tile, int columns, int head, int token) {
  const int lane = threadIdx.x & 31;
  float s[FRAGS][WIDE][4] = {};
  const u32 place = tile + (columns + (lane >> 4) * 8 + (lane & 7)) * PITCH + ((lane >> 3) & 1) * 16;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 x[WIDE / 2][2][2];
#pragma unroll
    for (int n = 0; n < WIDE / 2; n++) load_two<false>(x[n], place + n * 16 * PITCH + 32 * k);
#pragma unroll
    for (int f = 0; f < FRAGS; f++)
#pragma unroll
      for (int n = 0; n < WIDE; n++) mma_model(s[f][n], r.a[f][k][0], r.a[f][k][1], r.a[f][k][2], r.a[f][k][3], x[n / 2][n & 1][0], x[n / 2][n & 1][1]);
  }
#pragma unroll
  for (int f = 0; f < FRAGS; f++)
#pragma unroll
    for (int n = 0; n < WIDE; n++) {
      const int c = columns + 8 * n + 2 * (lane & 3);
      float2 lse;
      int2 at;
      if (PASS == 2) {
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(lse.x), "=f"(lse.y) : "r"(tile + LSE + 4 * c));
        if (EDGE) asm volatile("ld.shared.v2.s32 {%0,%1}, [%2];" : "=r"(at.x), "=r"(at.y) : "r"(tile + AT + 4 * c));
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e >> 1, right = e & 1;
        float x = s[f][n][e];
        if (SOFTCAP) x = soften(x * g.scale, g.cap);
        else if (PASS == 1) x *= g.scale;
        if (EDGE) {
          const int query = PASS == 1 ? r.at[f][i] : right ? at.y : at.x;
          if (hidden(g, b, query, head, PASS == 1 ? token + c + right : r.at[f][i])) x = -__int_as_float(0x7f800000);
        }
        if (PASS == 2) r.l[f][i] += ex2(SOFTCAP ? x - (right ? lse.y : lse.x) : fmaf(x, g.scale, -(right ? lse.y : lse.x)));
        else s[f][n][e] = x;
      }
    }
  if (PASS == 2) return;
#pragma unroll
  for (int f = 0; f < FRAGS; f++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = s[f][0][2 * i];
#pragma unroll
      for (int n = 0; n < WIDE; n++) most = fmaxf(most, fmaxf(s[f][n][2 * i], s[f][n][2 * i + 1]));
      if (most > r.m[f][i] + 8.f) {
        r.l[f][i] *= ex2(r.m[f][i] - most);
        r.m[f][i] = most;
      }
#pragma unroll
      for (int n = 0; n < WIDE; n++) r.l[f][i] += ex2(s[f][n][2 * i] - r.m[f][i]) + ex2(s[f][n][2 * i + 1] - r.m[f][i]);
    }
}

__device__ __forceinline__ void finish(const Given& g, const Block& b, Rows& r) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, kv_heads = g.heads / g.groups, rows = gridDim.x / (PASS == 1 ? g.heads : kv_heads);
#pragma unroll
  for (int f = 0; f < FRAGS; f++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float m = r.m[f][i], l = r.l[f][i];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, m, lanes), sum = __shfl_xor_sync(~0u, l, lanes), most = fmaxf(m, other);
        l = PASS == 1 ? l * ex2(m - most) + sum * ex2(other - most) : l + sum;
        m = most;
      }
      const int row = b.first + (warp * FRAGS + f) * 16 + 8 * i + lane / 4;
      if (lane & 3) continue;
      if (PASS == 1 && row < g.room)
        g.lse[(((i64)blockIdx.z * rows + b.row) * g.heads + b.head) * g.room + row] = l > 0.f ? m + log2f(l) : -__int_as_float(0x7f800000);
      if (PASS == 2 && row < g.tokens) g.out[(((i64)blockIdx.z * rows + b.row) * kv_heads + b.kv_head) * g.tokens + row] = l;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) observe(const __grid_constant__ Given g) {
  extern __shared__ __align__(16) unsigned char shared[];
  const u32 ring = (u32)__cvta_generic_to_shared(shared);
  const int kv_heads = g.heads / g.groups;
  Block b;
  b.from = 0;
  i64 count;
  if (PASS == 1) {  // the last queries see most: they begin
    b.first = (gridDim.y - 1 - blockIdx.y) * ROWS;
    b.row = blockIdx.x / g.heads;
    b.head = blockIdx.x % g.heads;
    b.kv_head = b.head / g.groups;
    const int seen = g.causal ? min(g.tokens, g.at[min(b.first + ROWS, g.room) - 1] + g.offset + 1) : g.tokens;
    b.per = (seen + COLS - 1) / COLS;
    count = b.per;
  } else {
    b.first = blockIdx.y * ROWS;
    b.row = blockIdx.x / kv_heads;
    b.head = b.kv_head = blockIdx.x % kv_heads;
    b.from = first_that_sees(g, b.first) / COLS;
    b.per = (g.count + COLS - 1) / COLS - b.from;
    count = (i64)b.per * g.groups;
  }
  const int begin = (int)(count * blockIdx.z / g.splits), end = (int)(count * (blockIdx.z + 1) / g.splits);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (begin + i < end) fetch(g, b, begin + i, ring + i * STAGE);
    commit();
  }
  Rows r;
  load(g, b, r);
  const int last = PASS == 1 ? g.room : g.tokens;
  const bool idle = b.first + (int)(threadIdx.x >> 5) * FRAGS * 16 >= last;  // of a block's rows those of this warp are none
  int slot = 0, next = STAGES - 1;
  for (int tile = begin; tile < end; tile++) {
    wait<STAGES - 2>();
    __syncthreads();
    if (tile + STAGES - 1 < end) fetch(g, b, tile + STAGES - 1, ring + next * STAGE);
    commit();
    const u32 here = ring + slot * STAGE;
    const int token = tile * COLS, head = PASS == 1 ? b.head : b.kv_head * g.groups + tile / max(b.per, 1);
    bool edge = MASK || (PASS == 1 && token + COLS > g.tokens);
    if (g.causal) {
      const int query = PASS == 1 ? b.first : (b.from + tile % max(b.per, 1)) * COLS;
      edge |= (PASS == 1 ? token + COLS : b.first + ROWS) - 1 > g.at[query] + g.offset;
    }
    if (idle) {
    } else if (edge) {
#pragma unroll 1
      for (int c = 0; c < COLS; c += 8 * WIDE) add<true>(g, b, r, here, c, head, token);
    } else {
#pragma unroll 1
      for (int c = 0; c < COLS; c += 8 * WIDE) add<false>(g, b, r, here, c, head, token);
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  finish(g, b, r);
}
