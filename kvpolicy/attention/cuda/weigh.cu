// Pass 2 of observe.cu for Hopper (sm_90a), on its products of warpgroups: what tokens receive of the attention of some
// queries, given the logarithm of each query's sum of exponentials.
//
// A block has 256 tokens. Two warpgroups keep 128 each, two tiles of 64 rows in registers, and take exponentials of one
// tile's products while the tensor cores work at the other's. A third fetches tiles of queries, of all heads of the group,
// into a ring. What comes before this file defines HEAD_DIM and BFLOAT (the model's type).
#include "machine.cuh"
#include "observed.cuh"

constexpr int D = HEAD_DIM, STEPS = D / 16, CHUNKS = D / 8, HALVES = (D + 63) / 64;
constexpr int GROUPS = 2, TILES = 2, ROWS = GROUPS * TILES * 64, COLS = 128, SUMS = COLS / 2;  // SUMS: products that a thread has of a tile
constexpr int HALF = COLS * 128, LSE = HALVES * HALF, AT = LSE + COLS * 4, STAGE = AT + COLS * 4, STAGES = 6, AHEAD = 2;
constexpr int KEY_TILES = (ROWS + COLS - 1) / COLS;  // of the ring, which a block's tokens take
constexpr int FETCHING = 128, THREADS = GROUPS * 128 + FETCHING;
extern "C" { __constant__ int SHARED_BYTES = STAGES * STAGE + 2048; }

struct Segment {
  int row, kv_head, first, from, per, begin, end, split;  // first: of its tokens; columns begin at tile `from`, `per` of each head
};

// A block's share of the work: of each `lines` rows and heads an even part, so that all blocks end at once, and the queries
// that they read stay in the cache.
struct Walk {
  int line;  // where those begin that are worked at
  i64 unit, stop, all;
};

__device__ __forceinline__ void enter(const Given& g, Walk& w, int each, int lines) {
  w.all = (i64)min(g.lines, lines - w.line) * each;
  w.unit = w.all * blockIdx.x / gridDim.x;
  w.stop = w.all * (blockIdx.x + 1) / gridDim.x;
}

__device__ __forceinline__ bool next(const Given& g, Walk& w, Segment& s) {
  const int kv_heads = g.heads / g.groups, lines = g.rows * kv_heads, tiles = (g.tokens + ROWS - 1) / ROWS, each = g.ends[tiles] * g.groups;
  while (w.unit == w.stop) {
    w.line += g.lines;
    if (w.line >= lines || each == 0) return false;
    enter(g, w, each, lines);
  }
  const int line = w.line + (int)(w.unit / each), at = (int)(w.unit % each);
  int low = 0, high = tiles - 1;  // the block of tokens: the last that begins no later
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (g.ends[middle] * g.groups <= at) low = middle;
    else high = middle - 1;
  }
  const int start = g.ends[low];
  s.row = line / kv_heads;
  s.kv_head = line % kv_heads;
  s.first = low * ROWS;
  s.per = g.ends[low + 1] - start;
  s.from = (g.count + COLS - 1) / COLS - s.per;
  s.begin = at - start * g.groups;
  s.end = (int)min((i64)s.per * g.groups, s.begin + w.stop - w.unit);
  s.split = blockIdx.x - (int)(((w.unit - s.begin + 1) * gridDim.x - 1) / w.all);
  w.unit += s.end - s.begin;
  return true;
}

__device__ __forceinline__ void make(u32 barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"); }
__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n"
      "bra again;\n"
      "done:}" ::"r"(barrier), "r"(parity) : "memory");
}

struct Place {  // of a tile in the ring, whose first 1 KB are barriers
  u32 ring;
  int slot;
  u32 parity;
  __device__ __forceinline__ u32 stage() const { return ring + 1024 + slot * STAGE; }
  __device__ __forceinline__ u32 full() const { return ring + 8 * slot; }
  __device__ __forceinline__ u32 empty() const { return ring + 8 * (STAGES + slot); }
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

// Rows of 128 bytes of which 16 each are swapped by the row's last three bits: what the tensor cores read without conflicts.
__device__ __forceinline__ u32 swizzled(int row, int chunk) { return (chunk / 8) * HALF + row * 128 + ((chunk % 8) ^ (row & 7)) * 16; }

// A thread of the accumulators has columns 2q, 2q + 1 of each 8, q its lane's last two bits: it finds four numbers at once.
__device__ __forceinline__ int spot(int column) { return column / 16 * 16 + (column % 8) / 2 * 4 + (column / 8) % 2 * 2 + column % 2; }

__device__ __forceinline__ void hand_over(const Place& at) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if ((threadIdx.x & 31) == 0) arrive(at.full());
}

// What comes with the tokens of a segment, in the place of numbers of queries: where it goes, and what it is.
struct Head {
  int tiles, tile, per, first, line, edges;  // edges: tiles of a head, from the first on, where tokens of the warpgroup may be hidden
};

__device__ __forceinline__ void tell(const Given& g, const Segment& b, u32 to) {
  const int lane = threadIdx.x & 31, group = min(lane, GROUPS - 1);
  const int clear = (first_that_sees(g, min(b.first + (group + 1) * TILES * 64, g.tokens) - 1) + COLS - 1) / COLS - b.from;
  const int line = (b.split * g.rows + b.row) * (g.heads / g.groups) + b.kv_head;
  if (lane < GROUPS) asm volatile("st.shared.s32 [%0], %1;" ::"r"(to + 20 + 4 * lane), "r"(clear) : "memory");
  if (lane == 0) {
    asm volatile("st.shared.v4.s32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(b.end - b.begin), "r"(b.begin % b.per), "r"(b.per), "r"(b.first) : "memory");
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(to + 16), "r"(line) : "memory");
  }
}

struct Fetch {
  Place to, ready;
  int waiting;  // tiles on their way

  __device__ __forceinline__ u32 begin() {
    await(to.empty(), to.parity);
    return to.stage();
  }
  // Copy the rows that a warp has of a tile; `mine` is the number of the lane's.
  __device__ __forceinline__ void rows(const u8* from, u32 step, int mine) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
#pragma unroll 4
    for (int k = 0; k < CHUNKS; k++) {
      const int r = (k * 32 + lane) / CHUNKS, c = (k * 32 + lane) % CHUNKS;
      copy<16>(to.stage() + swizzled(warp * 32 + r, c), from + c * 16 + (u64)(u32)__shfl_sync(~0u, mine, r) * step, true);
    }
  }
  __device__ __forceinline__ void end() {
    commit();
    if (waiting == AHEAD) {
      wait<AHEAD>();
      hand_over(ready);
      ready.next();
    } else {
      waiting++;
    }
    to.next();
  }
};

__device__ __forceinline__ void fetch(const Given& g, u32 ring) {
  const int column = threadIdx.x & 127;
  Fetch f = {{ring, 0, 1}, {ring, 0, 0}, 0};
  Walk w = {-g.lines, 0, 0, 0};
  Segment b;
  while (next(g, w, b)) {
    for (int k = 0; k < KEY_TILES; k++) {
      const u32 to = f.begin();
      if (k == 0 && threadIdx.x % FETCHING < 32) tell(g, b, to + LSE);
      f.rows(g.keys + 2 * (b.row * g.key_row + b.kv_head * g.key_head), 2 * (u32)g.key_token, min(b.first + k * COLS + column, g.tokens - 1));
      f.end();
    }
    int head = b.kv_head * g.groups + b.begin / b.per, tile = b.from + b.begin % b.per;
    for (int i = b.begin; i < b.end; i++) {
      const u32 to = f.begin();
      const int at = tile * COLS + column;
      f.rows(g.query + 2 * (b.row * g.query_row + head * g.query_head), 2 * (u32)g.query_token, g.at[at]);
      copy<4>(to + LSE + 4 * spot(column), (const u8*)(g.lse + ((i64)b.row * g.heads + head) * g.room + at), true);
      copy<4>(to + AT + 4 * spot(column), (const u8*)(g.at + at), true);
      f.end();
      if (++tile == b.from + b.per) tile = b.from, head++;
    }
  }
  const u32 to = f.begin();  // no more
  if (column == 0) asm volatile("st.shared.s32 [%0], 0;" ::"r"(to + LSE) : "memory");
  f.end();
  wait<0>();
  for (; f.waiting; f.waiting--) {
    hand_over(f.ready);
    f.ready.next();
  }
}

#if BFLOAT
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
__device__ __forceinline__ void product(float (&d)[SUMS], const u32 (&a)[4], u32 b, int more) {
  asm volatile(
      "{.reg .pred p; .reg .b32 h; .reg .b64 b; setp.ne.b32 p, %69, 0; mov.b32 h, 0x40000040; mov.b64 b, {%68, h};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "}, {%64,%65,%66,%67}, b, p, 1, 1, 0;}"
      : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(more));
}

// Begin the products of 64 tokens and queries of a tile.
__device__ __forceinline__ void begin(float (&d)[SUMS], const u32 (&a)[STEPS][4], u32 queries) {
  // Swizzled over 128 bytes, 1,024 from 8 rows to the next; from one lane, which the compiler takes for the same in all.
  const u32 b = __shfl_sync(~0u, 0x10000 | (queries >> 4), 0);
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i]));
  asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
  for (int k = 0; k < STEPS; k++) product(d, a[k], b + (k / 4 * HALF + k % 4 * 32) / 16, k != 0);
  asm volatile("wgmma.commit_group.sync.aligned;");
}

// Wait for products, but for those begun since.
template <int SINCE> __device__ __forceinline__ void end(float (&d)[SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(SINCE));
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(d[i]));
}

__device__ __forceinline__ float plus(float a, float b) {
  float c;
  asm("add.ftz.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

struct Four {
  float x[4];
};

__device__ __forceinline__ Four four(u32 at) {
  Four f;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(f.x[0]), "=f"(f.x[1]), "=f"(f.x[2]), "=f"(f.x[3]) : "r"(at));
  return f;
}

// Add the weights of some columns, the first of whose numbers are at `lse`. EDGE: some tokens may be hidden from some
// queries; `token` is the first of the thread's.
template <bool EDGE> __device__ __forceinline__ void add(const Given& g, const float (&d)[SUMS], float (&sum)[2], u32 lse, Four known, int token) {
#pragma unroll
  for (int n = 0; n < COLS / 16; n++) {
    const Four now = known;
    if (n + 1 < COLS / 16) known = four(lse + (n + 1) * 64);
    Four at;
    if (EDGE) at = four(lse + AT - LSE + n * 64);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int i = e / 2 % 2, c = e / 4 * 2 + e % 2;
      float x = fmaf(d[8 * n + e], g.scale, -now.x[c]);
      if (EDGE && token + 8 * i > __float_as_int(at.x[c]) + g.offset) x = -__int_as_float(0x7f800000);
      sum[i] = plus(sum[i], ex2(x));
    }
  }
}

__device__ __forceinline__ void weigh_tile(const Given& g, const float (&d)[SUMS], float (&sum)[2], u32 lse, Four known, int token, bool edge) {
  if (edge) add<true>(g, d, sum, lse, known, token);
  else add<false>(g, d, sum, lse, known, token);
}

// The tokens of a warp, as operands of all its products.
__device__ __forceinline__ void load(u32 (&a)[TILES][STEPS][4], Place& now) {
  const int lane = threadIdx.x & 31, row = (threadIdx.x >> 7) * TILES * 64 + ((threadIdx.x >> 5) & 3) * 16 + lane % 16;
#pragma unroll
  for (int tile = 0; tile < KEY_TILES; tile++) {
    if (tile) await(now.full(), now.parity);
#pragma unroll
    for (int m = 0; m < TILES; m++)
      if ((row + m * 64) / COLS == tile) {
#pragma unroll
        for (int k = 0; k < STEPS; k++)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
              : "=r"(a[m][k][0]), "=r"(a[m][k][1]), "=r"(a[m][k][2]), "=r"(a[m][k][3])
              : "r"(now.stage() + swizzled((row + m * 64) % COLS, 2 * k + lane / 16))
              : "memory");
      }
    __syncwarp();
    if (lane == 0) arrive(now.empty());
    now.next();
  }
}

__device__ __forceinline__ void store(const Given& g, const Head& b, const float (&sum)[TILES][2], int token) {
  float* to = g.out + (i64)b.line * g.tokens;
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x = sum[m][i];
      x += __shfl_xor_sync(~0u, x, 1);
      x += __shfl_xor_sync(~0u, x, 2);
      const int at = token + m * 64 + i * 8;
      if ((threadIdx.x & 3) == 0 && at < g.tokens) to[at] = x;
    }
}

__device__ __forceinline__ bool told(Head& b, const Place& now) {
  const u32 from = now.stage() + LSE;
  await(now.full(), now.parity);
  asm volatile("ld.shared.v4.s32 {%0,%1,%2,%3}, [%4];" : "=r"(b.tiles), "=r"(b.tile), "=r"(b.per), "=r"(b.first) : "r"(from) : "memory");
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(b.line) : "r"(from + 16) : "memory");
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(b.edges) : "r"(from + 20 + (threadIdx.x >> 7) * 4) : "memory");
  return b.tiles > 0;
}

__device__ __forceinline__ void consume(const Given& g, u32 ring) {
  const int lane = threadIdx.x & 31, row = (threadIdx.x >> 7) * TILES * 64 + ((threadIdx.x >> 5) & 3) * 16 + lane / 4;
  u32 a[TILES][STEPS][4];
  float d[2][SUMS];
  Place now = {ring, 0, 0};
  Head b;
#pragma unroll 1
  while (told(b, now)) {
    const int token = b.first + row;
    float sum[TILES][2] = {};
    load(a, now);
    await(now.full(), now.parity);
    begin(d[0], a[0], now.stage());
    end<0>(d[0]);
#pragma unroll 1
    for (; b.tiles; b.tiles--) {
      const u32 here = now.stage(), lse = here + LSE + (lane & 3) * 16, empty = now.empty();
      const bool edge = b.tile < b.edges;
      Four known = four(lse);
      begin(d[1], a[1], here);
      weigh_tile(g, d[0], sum[0], lse, known, token, edge);
      now.next();
      if (b.tiles > 1) await(now.full(), now.parity);  // else once more the same, for nothing
      known = four(lse);
      begin(d[0], a[0], b.tiles > 1 ? now.stage() : here);
      end<1>(d[1]);
      weigh_tile(g, d[1], sum[1], lse, known, token + 64, edge);
      end<0>(d[0]);
      __syncwarp();
      if (lane == 0) arrive(empty);
      if (++b.tile == b.per) b.tile = 0;
    }
    store(g, b, sum, token);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) weigh(const __grid_constant__ Given g) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 ring = ((u32)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) {
      make(ring + 8 * i, FETCHING / 32);
      make(ring + 8 * (STAGES + i), GROUPS * 4);
    }
  __syncthreads();
  if (threadIdx.x >= GROUPS * 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    fetch(g, ring);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(g, ring);
  }
}
