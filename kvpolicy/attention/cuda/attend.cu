// Attention on packed codes: a warp takes tiles of tokens, keeps a softmax for each of its columns, and blocks merge.
//
// Tokens are the rows of m16n8k16, query heads its columns. A byte of codes, masked where it lies in a 16-bit lane, is
// the subnormal float16 code * 2^(shift - 24), exactly: codes become operands without shifts or conversions. What comes
// before this file defines KEY_DIM, VALUE_DIM, ROWS (4 or 8 columns for query heads), BFLOAT (the model's type), FLOAT (a
// float32 output), KINDS, KIND_i, RUNS, PAGES, STAGES, MEMORY, BLOCKS, MASK (0 none, 1 bytes, 2 float32, 3 bfloat16,
// 4 float16), PLACES (bytes of a number in `places`, 0 for none), CAUSAL, SOFTCAP and SCORES.
#include "machine.cuh"
#include "plan.cuh"
#include "operands.cuh"
#include "keys.cuh"
#include "values.cuh"
#include "merge.cuh"

// Where in its run a tile of a kind is.
struct Place {
  int run, done, left;
};
struct Line : Place {
  int tile, next, uneven;  // next: the first tile of the next run; uneven: the warp's tiles before those with even steps
  __device__ __forceinline__ void find(const Layout& layout, const Kind& kind, int tokens) {
    while (run + 1 < kind.last && layout.tiles[run + 1] <= tile) run++;
    next = run + 1 < kind.last ? layout.tiles[run + 1] : 1 << 30;
    done = (tile - layout.tiles[run]) * tokens;
    left = layout.runs[run].tokens - done;
  }
  __device__ __forceinline__ int skip(int i, int tokens, const Warp& w) {  // from the warp's i-th tile to its next one, so many further on
    int stride = w.stride;
    if (i < uneven) {
      stride = 0;
#pragma unroll
      for (int u = 0; u < WARPS; u++) stride += w.all - uneven + i >= w.from[u];
    }
    tile += stride;
    done += stride * tokens;
    left -= stride * tokens;
    return stride;
  }
};
// The next tile of a kind to be fetched. The warps of a block take turns, so that it reads on in one place.
template <class P> struct Cursor {
  typename P::K::Source k;
  typename P::V::Source v;
  Line at;
  __device__ __forceinline__ void open(const Plan& plan, const Warp& w) {
    k.open(plan, plan.layout.runs[at.run].k, w, at.done, at.left);
    v.open(plan, plan.layout.runs[at.run].v, w, at.done, at.left);
  }
  __device__ __forceinline__ void fetch_keys(u32 to, const Warp& w) { k.fetch(to, to + P::KEY_PARAMS, at.done, at.left, w.lane); }
  __device__ __forceinline__ void fetch_values(const Plan& plan, const Kind& kind, int i, u32 to, const Warp& w) {
    v.fetch(to + P::VALUES, to + P::VALUE_PARAMS, at.done, at.left, w.lane);
    const int stride = at.skip(i, P::TOKENS, w);
    if (at.tile < at.next) {
      k.skip(stride, at.left, w.lane);
      v.skip(stride, at.left, w.lane);
    } else {
      at.find(plan.layout, kind, P::TOKENS);
      open(plan, w);
    }
  }
};

template <class P> __device__ __forceinline__ void attend_kind(const Plan& plan, const Kind& kind, int first, int round, int n, Warp& w) {
  using K = typename P::K;
  using V = typename P::V;
  constexpr int TS = P::TOKENS, NB = Tile<TS>::NB, NS = Tile<TS>::NS, ST = P::STAGES_;
  w.scratch = w.ring + P::SCRATCH;
  w.more = w.ring + P::MORE;
  typename K::State ks;
  typename V::State vs;
  Cursor<P> next;
  next.at.run = kind.first;
  next.at.tile = first;
  next.at.uneven = w.all - round;
  next.at.find(plan.layout, kind, TS);
  next.k.start(w.lane);
  next.v.start(w.lane);
  next.open(plan, w);
  constexpr int AHEAD = ST > 1 ? ST - 1 : 1;
  Place now[AHEAD];  // of the next scores, and those after them
  auto remember = [&] {
#pragma unroll
    for (int i = 0; i + 1 < AHEAD; i++) now[i] = now[i + 1];
    now[AHEAD - 1] = next.at;
  };
  u32 stage[ST];  // of the tile at its values, and those after it
#pragma unroll
  for (int i = 0; i < ST; i++) stage[i] = w.ring + i * P::STAGE;
  wait_for_last();
  ks.ask(plan, kind, w);
  auto fetch = [&](int i, u32 to) {
    remember();
    if (i < n) {
      next.fetch_keys(to, w);
      next.fetch_values(plan, kind, i, to, w);
    }
    commit();
  };
  if (ST > 1) {  // of ST tiles one is at its values, the next one at its keys, and the others are on their way
#pragma unroll 1
    for (int i = 0; i < ST - 1; i++) fetch(i, w.ring + i * P::STAGE);
  } else {  // keys of a tile are on their way while the last one is at its values, and the other way round
    remember();
    next.fetch_keys(w.ring, w);
    commit();
    next.fetch_values(plan, kind, 0, w.ring, w);
    commit();
  }
  ks.start(plan, kind, w);
  vs.start();
  float m[2] = {LOWEST, LOWEST}, l[2] = {0.f, 0.f}, s[NS][4];
  wait<(ST > 1 ? ST - 2 : 1)>();
  __syncwarp();
  ks.convert(w.ring + P::KEY_PARAMS, w);
  __syncwarp();
  ks.scores(w.ring, w.ring + P::KEY_PARAMS, w, s);
  for (int it = 0; it < n; it++) {
    const u32 values = stage[0], keys = stage[ST > 1 ? 1 : 0];
    if (SOFTCAP) {
#pragma unroll
      for (int i = 0; i < NS * 4; i++) s[0][i] = soften(s[0][i], plan.cap);
    }
    if (MASK || PLACES || CAUSAL || (R == 4 && !Tile<TS>::PAIRS) || now[0].left < TS || (V::BY_SLOT && scattered(plan.layout.runs[now[0].run].v)))
      hide<TS, V::BY_SLOT>(plan, plan.layout.runs[now[0].run], now[0].done, now[0].left, w, s);
    if (SCORES) keep<TS, V::BY_SLOT>(plan, plan.layout.runs[now[0].run], now[0].done, now[0].left, w, s);
    float top[2] = {s[0][0], s[0][1]};
#pragma unroll
    for (int i = 2; i < NS * 4; i++) top[i & 1] = fmaxf(top[i & 1], s[0][i]);
    if (__any_sync(~0u, top[0] > m[0] + RISE || top[1] > m[1] + RISE)) {
      float f[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int x = 4; x < 32; x <<= 1) top[j] = fmaxf(top[j], __shfl_xor_sync(~0u, top[j], x));
        top[j] = fmaxf(top[j], m[j]);
        f[j] = ex2(m[j] - top[j]);
        m[j] = top[j];
        l[j] *= f[j];
      }
      vs.rescale(f);
    }
    if (ST > 1) {
      fetch(it + ST - 1, stage[ST - 1]);
      wait<(ST > 1 ? ST - 2 : 0)>();
      __syncwarp();
    } else {
      if (it + 1 < n) next.fetch_keys(keys, w);
      commit();
      wait<1>();
      __syncwarp();
    }
    float p[NS][4];
#pragma unroll
    for (int i = 0; i < NS * 4; i++) {
      p[0][i] = ex2(s[0][i] - m[i & 1]);
      l[i & 1] += p[0][i];
    }
    if (ST > 1) {  // the next scores (of nothing, in the end) together with this tile's values: neither waits for the other
      ks.convert(keys + P::KEY_PARAMS, w);
      vs.convert(values + P::VALUE_PARAMS, w);
      __syncwarp();
      ks.scores(keys, keys + P::KEY_PARAMS, w, s);
      vs.add(values + P::VALUES, values + P::VALUE_PARAMS, w, p);
#pragma unroll
      for (int i = 0; i + 1 < ST; i++) stage[i] = stage[i + 1];
      stage[ST - 1] = values;
    } else {
      vs.convert(values + P::VALUE_PARAMS, w);
      __syncwarp();
      vs.add(values + P::VALUES, values + P::VALUE_PARAMS, w, p);
      __syncwarp();
      remember();
      if (it + 1 < n) next.fetch_values(plan, kind, it + 1, values, w);
      commit();
      wait<1>();
      __syncwarp();
      ks.convert(keys + P::KEY_PARAMS, w);
      __syncwarp();
      ks.scores(keys, keys + P::KEY_PARAMS, w, s);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  vs.finish(w, m, l);
}

// All tiles of a head whose values lie in one space stand in a line, as long as they cost; a block takes those that begin
// in its stretch of it. Few tiles of a kind are for one or two warps, and the others go on with the next kind, of which
// these take less: in a round of tiles warps take one each, from the round on in which they have time.
template <class P> __device__ __forceinline__ void share(const Plan& plan, const Kind& kind, int space, int begin, int end, Warp& w) {
  if (kind.space != space) return;
  auto tile = [&](int x) { return min((int)__umulhi(max(x - kind.before, 0) + kind.weight - 1, kind.inverse), kind.tiles); };
  const int warp = threadIdx.x >> 5, first = tile(begin), count = tile(end) - first;
  if (count <= 0) return;
  int rank[WARPS], mine = 0, at = 0, round = 0, begun = 0, n;  // rank: those come first that have had less to do
#pragma unroll
  for (int u = 0; u < WARPS; u++) {
    rank[u] = 0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) rank[u] += w.busy[v] < w.busy[u] || (v < u && w.busy[v] == w.busy[u]);
    if (u == warp) mine = rank[u];
  }
  if (kind.warps < WARPS) {
    w.all = 0;
    w.stride = kind.warps;
    n = mine < kind.warps ? (count - mine + kind.warps - 1) >> (kind.warps >> 1) : 0;
    at = mine;
#pragma unroll
    for (int u = 0; u < WARPS; u++)
      if (rank[u] < kind.warps) w.busy[u] += kind.start + ((count - rank[u] + kind.warps - 1) >> (kind.warps >> 1)) * kind.weight;
  } else {
    w.all = 0;
    w.stride = WARPS;
#pragma unroll
    for (int u = 0; u < WARPS; u++) {
      w.from[u] = __umulhi(w.busy[u] + kind.weight / 2, kind.inverse);
      w.all = max(w.all, w.from[u]);
      begun += w.from[u];
      w.busy[u] = 0;
      if (u == warp) round = w.from[u];
    }
    auto before = [&](int round) {  // tiles of the rounds before
      int tiles = 0;
#pragma unroll
      for (int u = 0; u < WARPS; u++) tiles += max(round - w.from[u], 0);
      return tiles;
    };
    int last = (count - mine + begun + WARPS - 1) / WARPS;
    while (last > round && before(last - 1) + mine >= count) last--;
    n = last - round;
    at = before(round) + mine;
  }
  if (n > 0) attend_kind<P>(plan, kind, first + at, round, n, w);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) attend(const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
  let_next_begin();
  const Layout& layout = plan.layout;
  Warp w;
  w.lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  w.row = plan.kv_heads == 1 ? blockIdx.y : __umulhi(blockIdx.y, plan.inverse);
  w.head = blockIdx.y - w.row * plan.kv_heads;
  w.base = blockIdx.z * R;
  float* slots = (float*)shared;
  w.slot = slots + warp * SLOT;
  w.filled = false;
#pragma unroll
  for (int u = 0; u < WARPS; u++) w.busy[u] = 0;
  w.ring = (u32)__cvta_generic_to_shared(shared + WARPS * SLOT * 4 + warp * RING);
  int space = 0;
  while (space + 1 < plan.spaces && layout.parts[space + 1] <= blockIdx.x) space++;
  const u64 step = layout.steps[space], part = blockIdx.x - layout.parts[space];
  const int begin = step * part >> 32, end = step * (part + 1) >> 32;
  share<KIND_0>(plan, layout.kinds[0], space, begin, end, w);
#if KINDS > 1
  share<KIND_1>(plan, layout.kinds[1], space, begin, end, w);
#endif
#if KINDS > 2
  share<KIND_2>(plan, layout.kinds[2], space, begin, end, w);
#endif
#if KINDS > 3
  share<KIND_3>(plan, layout.kinds[3], space, begin, end, w);
#endif
#if KINDS > 4
  share<KIND_4>(plan, layout.kinds[4], space, begin, end, w);
#endif
#if KINDS > 5
  share<KIND_5>(plan, layout.kinds[5], space, begin, end, w);
#endif
  if (!w.filled && w.lane < 8) *(float2*)(w.slot + 8 * (DV + 4) + 2 * w.lane) = make_float2(LOWEST, 0.f);
  __syncthreads();
  wait_for_last();
  merge_block(plan, w, slots);
}
