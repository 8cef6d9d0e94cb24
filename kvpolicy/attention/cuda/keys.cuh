// Scores: queries with keys per token, per channel, and exact.
__device__ __forceinline__ const u8* query_row(const Plan& plan, const Kind& kind, const Warp& w, int i) {
  const int rows = plan.groups * plan.queries, at = w.base + i < rows ? w.base + i : w.base;
  const i64 head = (i64)w.head * plan.groups + at / plan.queries;
  const i64* strides = plan.query_strides[kind.query];
  return plan.query[kind.query] + 2 * (w.row * strides[0] + head * strides[1] + (at % plan.queries) * strides[2]);
}

// Chunks of codes of one block of 16 tokens as registers.
template <class P, bool TRANS> __device__ __forceinline__ void load_part(u32 x[P::CHUNKS][2], u32 base, int lane, int block) {
  const u32 at = base + P::place(lane & 15) + (lane >> 4) * 16 + block * P::place(16);
#pragma unroll
  for (int k = 0; k + 1 < P::CHUNKS; k += 2) load_two<TRANS>(x + k, at + k * 16);
  if (P::CHUNKS % 2) load_one<TRANS>(x[P::CHUNKS - 1], base + P::place(lane & 15) + (P::CHUNKS - 1) * 16 + block * P::place(16));
}

// The queries as operand B: a thread's column is lane / 4, its channels of a step 4 * (lane & 3) + {0, 2} and {1, 3}.
// They are asked for first, as they lie, and put in order once tiles are on their way.
template <class P> __device__ __forceinline__ void ask_query(u32 q[][2], const u8* row, int c) {
  if (P::WIDTH % 4) return;
#pragma unroll
  for (int p = 0; p < P::PLANES; p++)
#pragma unroll
    for (int k = 0; k < P::CHUNKS; k++) {
      const int within = k * 16 + 4 * c;
      const uint2 v = P::WIDTH % 16 == 0 || within < P::WIDTH ? *(const uint2*)(row + 2 * (p * P::WIDTH + within)) : make_uint2(0, 0);
      q[p * P::CHUNKS + k][0] = v.x;
      q[p * P::CHUNKS + k][1] = v.y;
    }
}
// Mapped ones are float16, the model's of its type.
template <class P, class F> __device__ __forceinline__ void load_query(u32 q[][2], const u8* row, bool mapped, int c, bool scaled, F&& each) {
#pragma unroll
  for (int p = 0; p < P::PLANES; p++)
#pragma unroll
    for (int k = 0; k < P::CHUNKS; k++) {
      float x[4] = {0.f, 0.f, 0.f, 0.f};
      if (P::WIDTH % 4 == 0) {
        const u32* words = q[p * P::CHUNKS + k];
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = BFLOAT && !mapped ? Number<1>::of(words, e) : Number<0>::of(words, e);
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (k * 16 + 4 * c + e < P::WIDTH) {
            const int ch = p * P::WIDTH + k * 16 + 4 * c + e;
            x[e] = BFLOAT && !mapped ? Number<1>::at(row, ch) : Number<0>::at(row, ch);
          }
      }
      each(p, k, x[0] + x[1] + x[2] + x[3]);
      const float f = scaled ? P::factor(p) : 1.f;
      q[p * P::CHUNKS + k][0] = halves(x[0] * f, x[2] * f);
      q[p * P::CHUNKS + k][1] = halves(x[1] * f, x[3] * f);
    }
}
// Add the products of a step's codes with the queries.
template <class P> __device__ __forceinline__ void multiply(float* d, const u32 x[2], int plane, u32 b0, u32 b1) {
  const u32 m = P::mask(plane);
  mma(d, x[0] & m, x[1] & m, (x[0] >> 8) & m, (x[1] >> 8) & m, b0, b1);
}

template <int BITS, int GROUP, int T, int TS> struct TokenKeys {
  using C = Codes<DK, BITS>;
  using A = typename C::A;
  using B = typename C::B;
  using S = Scaled<BITS, DK / GROUP, T>;
  static constexpr int GROUPS = DK / GROUP, PARAMS = S::PARAMS, NB = Tile<TS>::NB, NS = Tile<TS>::NS;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = (TS * PARAMS + 15) / 16 * 16;
  static constexpr bool FAR = C::TWO && DK > 128;  // more queries than a thread has registers for: they lie in shared memory
  static constexpr int SCRATCH = FAR ? C::STEPS * 256 : 0;
  using Source = Reader<DK, BITS, PARAMS, TS, false, 1>;
  struct State {
    u32 q[C::STEPS][2];
    float u[2][GROUPS];
    float scale;
    __device__ __forceinline__ void ask(const Plan& plan, const Kind& kind, const Warp& w) {
      const u8* row = query_row(plan, kind, w, (w.lane >> 2) % R);
      ask_query<A>(q, row, w.lane & 3);
      if (C::TWO) ask_query<B>(q + A::STEPS, row, w.lane & 3);
    }
    __device__ __forceinline__ void start(const Plan& plan, const Kind& kind, const Warp& w) {
      const int c = w.lane & 3, r = w.lane >> 2;
      scale = plan.scale * UNIT;
      float sums[GROUPS];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) sums[g] = 0.f;
      const u8* row = query_row(plan, kind, w, r % R);
      const bool mapped = kind.query;
      load_query<A>(q, row, mapped, c, true, [&](int p, int k, float x) { sums[A::channel(p, k) / GROUP] += x; });
      if (C::TWO) load_query<B>(q + A::STEPS, row, mapped, c, true, [](int, int, float) {});
      if (FAR) {
#pragma unroll
        for (int i = 0; i < C::STEPS; i++) store_pair(w.scratch + i * 256 + 8 * w.lane, q[i][0], q[i][1]);
      }
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        sums[g] *= plan.scale;
        sums[g] += __shfl_xor_sync(~0u, sums[g], 1);
        sums[g] += __shfl_xor_sync(~0u, sums[g], 2);
        u[0][g] = __shfl_sync(~0u, sums[g], 8 * c);
        u[1][g] = __shfl_sync(~0u, sums[g], 8 * c + 4);
      }
    }
    __device__ __forceinline__ void convert(u32, const Warp&) {}
    template <class P> __device__ __forceinline__ void step(float* d, const u32 x[2], int plane, int i, const Warp& w) {
      u32 far[2];
      if (FAR) load_words<2>(far, w.scratch + i * 256 + 8 * w.lane);
      multiply<P>(d, x, plane, FAR ? far[0] : q[i][0], FAR ? far[1] : q[i][1]);
    }
    __device__ __forceinline__ void scores(u32 data, u32 params, const Warp& w, float s[NS][4]) {
      const int c = w.lane & 3, r = w.lane >> 2;
      u32 x[NB][A::CHUNKS][2], y[NB][B::CHUNKS][2];
#pragma unroll
      for (int b = 0; b < NB; b++) {
        load_part<A, false>(x[b], data, w.lane, b);
        if (C::TWO) load_part<B, false>(y[b], data + A::place(TS), w.lane, b);
      }
      const bool up = Tile<TS>::up(w.lane);
      u32 par[NS][2][S::WORDS];
#pragma unroll
      for (int i = 0; i < NS * 2; i++)
        S::load(par[i >> 1][i & 1], params + (Tile<TS>::token(i >> 1, w.lane) + 8 * (i & 1)) * PARAMS);
      float codes[NS][4], offsets[NS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        float d[NB][4];
#pragma unroll
        for (int i = 0; i < NB * 4; i++) d[0][i] = 0.f;
#pragma unroll
        for (int p = 0; p < A::PLANES; p++)
#pragma unroll
          for (int k = 0; k < A::CHUNKS; k++)
#pragma unroll
            for (int b = 0; b < NB; b++)
              if (A::channel(p, k) / GROUP == g) step<A>(d[b], x[b][k], p, p * A::CHUNKS + k, w);
        if (C::TWO) {
#pragma unroll
          for (int p = 0; p < B::PLANES; p++)
#pragma unroll
            for (int k = 0; k < B::CHUNKS; k++)
#pragma unroll
              for (int b = 0; b < NB; b++)
                if (B::channel(p, k) / GROUP == g) step<B>(d[b], y[b][k], p, A::STEPS + p * B::CHUNKS + k, w);
        }
#pragma unroll
        for (int n = 0; n < NS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float v = Tile<TS>::own(d, n, i, up);
            const float a = v * S::scale(par[n][i >> 1], g), o = u[i & 1][g] * S::offset(par[n][i >> 1], g);
            codes[n][i] = g ? codes[n][i] + a : a;
            offsets[n][i] = g ? offsets[n][i] + o : o;
          }
      }
#pragma unroll
      for (int i = 0; i < NS * 4; i++) s[0][i] = fmaf(codes[0][i], scale, offsets[0][i]);
    }
  };
};

// Keys per channel, groups of 16 or more tokens. Scale and offset of a group are put into float16 in the order in which
// threads read them, once for all of a warp; scales go into the query, offsets into a product of their own. The four words
// of a thread and step are its operand A as they lie: offsets in rows 0 to 7, of whose sums all are the same, and in the
// others, of which nothing is read, scales.
template <int BITS, int GROUP, int T, int TS> struct ChannelKeys {
  using C = Codes<DK, BITS>;
  using A = typename C::A;
  using B = typename C::B;
  static constexpr int PARAMS = 2 * DK * Number<T>::SIZE, NB = Tile<TS>::NB, NS = Tile<TS>::NS, SETS = TS > GROUP ? TS / GROUP : 1;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = SETS * PARAMS, SET = C::STEPS * 64, SCRATCH = SETS * SET;
  static constexpr int FOURS = DK / 4, TURNS = (SETS * FOURS + 31) / 32;  // a thread takes four channels of a group at a time
  static constexpr bool NEAR = DK <= 128;  // whether a thread has registers for the queries that scales are multiplied with
  using Source = Reader<DK, BITS, PARAMS, TS, true, GROUP>;
  // Where a channel's numbers go in the order of reading.
  template <class P> static __device__ __forceinline__ u32 place(int ch) { return (ch / P::WIDTH * P::CHUNKS + ch % P::WIDTH / 16) * 64 + ch % P::WIDTH % 16 * 4; }
  static __device__ __forceinline__ constexpr float factor(int i) { return .5f * (i < A::STEPS ? A::factor(i / A::CHUNKS) : B::factor((i - A::STEPS) / B::CHUNKS)); }
  struct State {
    u32 q[C::STEPS][2], near[NEAR ? C::STEPS : 1][2], to[TURNS];  // near: halves of queries, as codes of their planes weigh
    float scale, plain;
    __device__ __forceinline__ void ask(const Plan& plan, const Kind& kind, const Warp& w) {
      const u8* row = query_row(plan, kind, w, (w.lane >> 2) % R);
      ask_query<A>(q, row, w.lane & 3);
      if (C::TWO) ask_query<B>(q + A::STEPS, row, w.lane & 3);
    }
    __device__ __forceinline__ void start(const Plan& plan, const Kind& kind, const Warp& w) {
      plain = plan.scale;
      scale = plan.scale * 2.f * UNIT;
      const u8* row = query_row(plan, kind, w, (w.lane >> 2) % R);
      const bool mapped = kind.query;
      load_query<A>(q, row, mapped, w.lane & 3, false, [](int, int, float) {});
      if (C::TWO) load_query<B>(q + A::STEPS, row, mapped, w.lane & 3, false, [](int, int, float) {});
      if (NEAR) {
#pragma unroll
        for (int i = 0; i < C::STEPS * 2; i++) near[0][i] = weighed(i);
      }
#pragma unroll
      for (int k = 0; k < TURNS; k++) {
        const int i = w.lane + 32 * k;
        to[k] = w.scratch + i / FOURS * SET + place<A>(i % FOURS * 4);
        asm volatile("" : "+r"(to[k]));
      }
      if (A::WIDTH % 16 || B::WIDTH % 16) {
        for (int i = w.lane; i < SCRATCH / 8; i += 32) store_pair(w.scratch + 8 * i, 0, 0);
        __syncwarp();
      }
    }
    __device__ __forceinline__ u32 weighed(int i) const {
      const float f = factor(i / 2);
      return times(q[0][i], halves(f, f));
    }
    // Put scales and offsets, the k-th four of this thread, where they are read.
    __device__ __forceinline__ void put(int k, const u32 scales[], const u32 offsets[], const Warp& w) {
      const int i = w.lane + 32 * k;
      u32 x[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        x[2 * h] = halves(Number<T>::of(offsets, h), Number<T>::of(offsets, h + 2));
        x[2 * h + 1] = halves(Number<T>::of(scales, h), Number<T>::of(scales, h + 2));
      }
      store_four(to[k], x);
      if (C::TWO) store_four(w.scratch + i / FOURS * SET + A::STEPS * 64 + place<B>(i % FOURS * 4), x);
    }
    __device__ __forceinline__ void convert(u32 params, const Warp& w) {
      constexpr int SIZE = Number<T>::SIZE;
#pragma unroll
      for (int k = 0; k < TURNS; k++) {
        const int i = w.lane + 32 * k;
        if (SETS * FOURS % 32 && i >= SETS * FOURS) break;
        const u32 from = params + i / FOURS * PARAMS + i % FOURS * 4 * SIZE;
        u32 scales[SIZE], offsets[SIZE];
        load_words<SIZE>(scales, from);
        load_words<SIZE>(offsets, from + DK * SIZE);
        put(k, scales, offsets, w);
      }
    }
    __device__ __forceinline__ void load(u32 data, const Warp& w, u32 x[NB][A::CHUNKS][2], u32 y[NB][B::CHUNKS][2]) {
#pragma unroll
      for (int b = 0; b < NB; b++) {
        load_part<A, false>(x[b], data, w.lane, b);
        if (C::TWO) load_part<B, false>(y[b], data + A::place(TS), w.lane, b);
      }
    }
    // Products of codes with scaled queries, and of offsets with queries.
    __device__ __forceinline__ void products(const u32 x[NB][A::CHUNKS][2], const u32 y[NB][B::CHUNKS][2], const Warp& w, float d[NB][4], float o[SETS][4]) {
#pragma unroll
      for (int i = 0; i < NB * 4; i++) d[0][i] = 0.f;
#pragma unroll
      for (int i = 0; i < SETS * 4; i++) o[0][i] = 0.f;
      const u32 from = w.scratch + (w.lane & 3) * 16;
#pragma unroll
      for (int t = 0; t < SETS; t++)
#pragma unroll
        for (int i = 0; i < C::STEPS; i++) {
          u32 par[4];
          load_words<4>(par, from + t * SET + i * 64);
          const u32 a = times(NEAR ? near[i][0] : weighed(2 * i), par[1]), e = times(NEAR ? near[i][1] : weighed(2 * i + 1), par[3]);
          if (i < A::STEPS) mma(o[t], par[0], par[1], par[2], par[3], q[i][0], q[i][1]);
#pragma unroll
          for (int b = t * NB / SETS; b < (t + 1) * NB / SETS; b++) {
            if (i < A::STEPS) multiply<A>(d[b], x[b][i % A::CHUNKS], i / A::CHUNKS, a, e);
            else if (C::TWO) multiply<B>(d[b], y[b][(i - A::STEPS) % B::CHUNKS], (i - A::STEPS) / B::CHUNKS, a, e);
          }
        }
    }
    __device__ __forceinline__ float score(const float d[NB][4], const float o[SETS][4], bool up, int n, int i) {
      constexpr int PER = Tile<TS>::PAIRS ? 2 : 1;  // blocks of a set of columns
      const float shift = up ? o[(PER * n + PER - 1) * SETS / NB][i & 1] : o[PER * n * SETS / NB][i & 1];
      return fmaf(Tile<TS>::own(d, n, i, up), scale, shift * plain);
    }
    __device__ __forceinline__ void scores(u32 data, u32, const Warp& w, float s[NS][4]) {
      u32 x[NB][A::CHUNKS][2], y[NB][B::CHUNKS][2];
      load(data, w, x, y);
      float d[NB][4], o[SETS][4];
      products(x, y, w, d, o);
      const bool up = Tile<TS>::up(w.lane);
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = score(d, o, up, n, i);
    }
  };
};

// Keys per channel whose groups lie anyhow: each token has the number of its group. Most tiles are of one group; the
// scales of others are put in place one after the other.
template <int BITS, int T, int TS> struct GroupKeys {
  using By = ChannelKeys<BITS, TS, T, TS>;
  using A = typename By::A;
  using B = typename By::B;
  static constexpr int NB = Tile<TS>::NB, NS = Tile<TS>::NS, BYTES = By::BYTES, PARAM_BYTES = TS * 4, SCRATCH = By::SCRATCH;
  using Source = Reader<DK, BITS, 4, TS, false, 1>;
  struct State {
    typename By::State by;
    const u8* groups;
    u32 held, last;  // the group whose scales are in place, and the last one there is
    __device__ __forceinline__ void ask(const Plan& plan, const Kind& kind, const Warp& w) { by.ask(plan, kind, w); }
    __device__ __forceinline__ void start(const Plan& plan, const Kind& kind, const Warp& w) {
      by.start(plan, kind, w);
      const Side& s = plan.layout.runs[kind.first].k;  // of one store, as all runs of the kind
      groups = place(plan, s.group & 255, s.token, w);
      held = ~0u;
      last = (u32)s.group >> 8;
    }
    __device__ __forceinline__ void convert(u32, const Warp&) {}
    __device__ __forceinline__ void hold(u32 group, const Warp& w) {
      constexpr int SIZE = Number<T>::SIZE;
      __syncwarp();
#pragma unroll
      for (int k = 0; k < By::TURNS; k++) {
        const int i = w.lane + 32 * k;
        if (By::FOURS % 32 && i >= By::FOURS) break;
        const u8* from = groups + (i64)group * By::PARAMS + i * 4 * SIZE;
        u32 scales[SIZE], offsets[SIZE];
        look_up<SIZE>(scales, from);
        look_up<SIZE>(offsets, from + DK * SIZE);
        by.put(k, scales, offsets, w);
      }
      __syncwarp();
      held = group;
    }
    __device__ __forceinline__ void scores(u32 data, u32 numbers, const Warp& w, float s[NS][4]) {
      const int c = w.lane & 3, r = w.lane >> 2;
      u32 x[NB][A::CHUNKS][2], y[NB][B::CHUNKS][2];
      by.load(data, w, x, y);
      const bool up = Tile<TS>::up(w.lane);
      u32 own[NS][2], mine;
#pragma unroll
      for (int i = 0; i < NS * 2; i++)
        load_words<1>(&own[i >> 1][i & 1], numbers + (Tile<TS>::token(i >> 1, w.lane) + 8 * (i & 1)) * 4);
      load_words<1>(&mine, numbers + w.lane % TS * 4);
      mine = min(mine, last);  // after the last tile there are any numbers
      for (u32 todo = TS == 32 ? ~0u : 0xffffu; todo;) {
        const u32 group = __shfl_sync(~0u, mine, __ffs(todo) - 1);
        if (group != held) hold(group, w);
        float d[NB][4], o[1][4];
        by.products(x, y, w, d, o);
#pragma unroll
        for (int n = 0; n < NS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) s[n][i] = min(own[n][i >> 1], last) == group ? by.score(d, o, up, n, i) : s[n][i];
        todo &= ~__ballot_sync(~0u, mine == group);
      }
    }
  };
};

template <int TS> struct ExactKeys {
  using P = Part<DK, 16, 0, 0>;
  static constexpr int NB = Tile<TS>::NB, NS = Tile<TS>::NS, BYTES = P::place(TS), PARAM_BYTES = 0, SCRATCH = 0;
  using Source = Reader<DK, 16, 0, TS, false, 1>;
  struct State {
    u32 q[DK / 16][2];
    float scale;
    __device__ __forceinline__ void ask(const Plan& plan, const Kind& kind, const Warp& w) {
      scale = plan.scale;
      const u8* row = query_row(plan, kind, w, (w.lane >> 2) % R);
#pragma unroll
      for (int i = 0; i < DK / 16; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) q[i][h] = *(const u32*)(row + 2 * (16 * i + 8 * h + 2 * (w.lane & 3)));
    }
    __device__ __forceinline__ void start(const Plan&, const Kind&, const Warp&) {}
    __device__ __forceinline__ void convert(u32, const Warp&) {}
    __device__ __forceinline__ void scores(u32 data, u32, const Warp& w, float s[NS][4]) {
      float d[NB][4];
#pragma unroll
      for (int i = 0; i < NB * 4; i++) d[0][i] = 0.f;
      const u32 at = data + P::place(w.lane & 15) + (w.lane >> 4) * 16;
#pragma unroll
      for (int b = 0; b < NB; b++)
#pragma unroll
        for (int i = 0; i < DK / 16; i++) {
          u32 x[2][2];
          load_two<false>(x, at + b * P::place(16) + i * 32);
          mma_model(d[b], x[0][0], x[0][1], x[1][0], x[1][1], q[i][0], q[i][1]);
        }
      const bool up = Tile<TS>::up(w.lane);
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = scale * Tile<TS>::own(d, n, i, up);
    }
  };
};
