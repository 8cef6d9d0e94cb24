// What attend.cu is made of: the plan that a launch is given, operands, stores of keys and of values, and the merge.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int D = HEAD_DIM, R = ROWS, WARPS = 4;
constexpr float LOWEST = -1e30f, RISE = 6.f, UNIT = 16777216.f;  // of a code: 2^-24
constexpr int SLOT = 8 * (D + 4) + 16;  // floats: what a warp found for its columns, then maximum and sum of each
constexpr int PART = R * D + 2 * R;     // the same of a block, for its rows

struct Side {  // where the keys or the values of a run lie
  const u8 *data, *params;
  i64 data_row, data_head, params_row, params_head;  // bytes from row to row, and from head to head
  int token, group;                                   // exact: bytes from token to token; per channel: tokens before the run in its first group
};
struct Run {  // neighbouring tokens of one kind
  Side k, v;
  int tokens, tile;    // tile: tiles of its kind before it
  int column, causal;  // column: of its first token in mask and scores; causal: a query sees this many and its own number of tokens
};
struct Kind {
  const u8 *key_channels, *value_channels;  // what each channel was divided by, or null
  int key_step, value_step;                 // bytes from head to head of these
  int first, last, tiles, weight;           // its runs; weight: what a tile costs, compared with those of other kinds
};
struct Plan {
  const u8 *query, *mask;
  u8* out;
  float *partial, *scores, *sums;
  const float* sinks;
  u32* counters;
  i64 query_row, query_head, query_query;              // elements
  i64 mask_row, mask_head, mask_group, mask_query;     // elements
  int kv_heads, groups, queries, parts, columns, pad;  // groups: query heads per KV head
  float scale, cap;                                    // scale includes log2(e), cap too
  Kind kinds[KINDS];
  Run runs[RUNS];
};
struct Warp {
  int lane, row, head, base;  // base: the first of its query rows
  u32 ring, scratch;
  float* slot;
  bool filled;
};

__device__ __forceinline__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }
__device__ __forceinline__ float lo(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float hi(u32 w) { return __uint_as_float(w & 0xffff0000u); }
__device__ __forceinline__ float half(u32 w) {
  float f;
  asm("{.reg .b16 x; cvt.u16.u32 x, %1; cvt.f32.f16 %0, x;}" : "=f"(f) : "r"(w));
  return f;
}
__device__ __forceinline__ u32 halves(float a, float b) {
  u32 h;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
}
__device__ __forceinline__ u32 bfloats(float a, float b) {
  u32 h;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
}
__device__ __forceinline__ u32 model_pair(float a, float b) { return BFLOAT ? bfloats(a, b) : halves(a, b); }
__device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 d;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float soften(float x, float cap) {  // cap * tanh(x / cap)
  const float e = ex2(fminf(x / cap * 2.885390082f, 120.f));
  return cap * (e - 1.f) / (e + 1.f);
}
__device__ __forceinline__ void mma(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_model(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (!BFLOAT) return mma(d, a0, a1, a2, a3, b0, b1);
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// Two 8x8 matrices of 16-bit numbers for each of one or two chunks of 16 bytes: tokens 0 to 7, and 8 to 15.
template <bool TRANS> __device__ __forceinline__ void load_two(u32 x[2][2], u32 at) {
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0][0]), "=r"(x[0][1]), "=r"(x[1][0]), "=r"(x[1][1]) : "r"(at) : "memory");
}
template <bool TRANS> __device__ __forceinline__ void load_one(u32 x[2], u32 at) {
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
}
template <int N> __device__ __forceinline__ void load_words(u32* x, u32 at) {
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x[i]), "=r"(x[i + 1]), "=r"(x[i + 2]), "=r"(x[i + 3]) : "r"(at + 4 * i) : "memory");
  } else if (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[i]), "=r"(x[i + 1]) : "r"(at + 4 * i) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[i]) : "r"(at + 4 * i) : "memory");
  }
}
__device__ __forceinline__ void store_pair(u32 at, u32 a, u32 b) { asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(at), "r"(a), "r"(b) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// N bytes to shared memory; zeros where there is no token.
template <int N> __device__ __forceinline__ void copy(u32 to, const u8* from, bool there) {
  if (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
  } else if (N == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(there ? 8 : 0) : "memory");
  } else if (N == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
  } else {
    const u16 x = there ? *(const u16*)from : (u16)0;
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
  }
}

// A number of the model's type, or (per quantizer) of float32: 0 float16, 1 bfloat16, 2 float32.
template <int T> struct Number {
  static constexpr int SIZE = T == 2 ? 4 : 2;
  static __device__ __forceinline__ float of(const u32* words, int i) {
    if (T == 2) return __uint_as_float(words[i]);
    const u32 w = words[i >> 1];
    return T == 1 ? ((i & 1) ? hi(w) : lo(w)) : half((i & 1) ? w >> 16 : w);
  }
  static __device__ __forceinline__ float at(const u8* p, i64 i) {
    if (T == 2) return ((const float*)p)[i];
    const u32 w = ((const u16*)p)[i];
    return T == 1 ? lo(w) : half(w);
  }
};
using Model = Number<BFLOAT>;

// One part of codes: BITS of a code, LOW bits of the code below them, after SKIP bytes of a row. 16 bits are exact numbers.
template <int BITS_, int LOW_, int SKIP_> struct Part {
  static constexpr int BITS = BITS_, LOW = LOW_, SKIP = SKIP_, WIDTH = D * BITS / 8, CHUNKS = (WIDTH + 15) / 16;
  static constexpr int PLANES = BITS == 16 ? 1 : 8 / BITS, STRIDE = CHUNKS * 16, STEPS = CHUNKS * PLANES;
  static constexpr int PER = 128 / gcd(STRIDE, 128);  // tokens after which 16 bytes of padding keep banks apart
  static __device__ __forceinline__ constexpr int place(int token) { return token * STRIDE + (PER < 8 ? token / PER * 16 : 0); }
  static __device__ __forceinline__ constexpr int channel(int plane, int chunk) { return plane * WIDTH + chunk * 16; }
  static __device__ __forceinline__ constexpr u32 mask(int plane) { return (((1u << BITS) - 1) * 0x10001u) << (BITS * plane); }
  // What a code of a plane is to be multiplied by, apart from UNIT.
  static __device__ __forceinline__ constexpr float factor(int plane) { return (float)(1 << LOW) / (float)(1 << (BITS * plane)); }
};
template <int BITS> struct Codes {
  using A = Part<BITS == 3 ? 2 : BITS, 0, 0>;
  using B = Part<BITS == 3 ? 1 : BITS, BITS == 3 ? 2 : 0, A::WIDTH>;
  static constexpr bool TWO = BITS == 3;
  static constexpr int ROW = A::WIDTH + (TWO ? B::WIDTH : 0), PIECE = gcd(16, ROW), STEPS = A::STEPS + (TWO ? B::STEPS : 0);
  static __device__ __forceinline__ constexpr int bytes(int tokens) { return A::place(tokens) + (TWO ? B::place(tokens) : 0); }
};

// Copies of rows of PIECE bytes times PIECES by a warp: each lane has its own place among them, found once.
template <int ROW, int TS, class F> struct Rows {
  static constexpr int PIECE = gcd(16, ROW), PIECES = ROW / PIECE, TOTAL = TS * PIECES, TURNS = (TOTAL + 31) / 32;
  static constexpr bool EVEN = 32 % PIECES == 0;  // each turn is as many tokens further
  const u8* from;
  u32 place;
  __device__ __forceinline__ void start(int lane) {
    place = F::place(lane / PIECES, lane % PIECES * PIECE);
    asm volatile("" : "+r"(place));
  }
  __device__ __forceinline__ void open(const u8* data, int lane, i64 token) { from = data + lane / PIECES * token + lane % PIECES * PIECE; }
  template <bool ALL> __device__ __forceinline__ void copy_all(u32 to, int count, int lane, i64 token) {
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
      if (EVEN) {
        const int t = 32 / PIECES * k;
        if (TOTAL % 32 && TOTAL < 32 * (k + 1) && lane + 32 * k >= TOTAL) break;
        copy<PIECE>(to + place + F::place(t, 0), from + t * token, ALL || t + lane / PIECES < count);
      } else {
        const int i = lane + 32 * k, t = i / PIECES, o = i % PIECES * PIECE;
        if (TOTAL % 32 && i >= TOTAL) break;
        copy<PIECE>(to + F::place(t, o), from + (t - lane / PIECES) * token + o - lane % PIECES * PIECE, ALL || t < count);
      }
    }
  }
};
template <int BITS, int TS> struct CodePlaces {
  using C = Codes<BITS>;
  static __device__ __forceinline__ constexpr int place(int t, int o) {
    return C::TWO && o >= C::A::WIDTH ? C::A::place(TS) + C::B::place(t) + o - C::A::WIDTH : C::A::place(t) + o;
  }
};
template <int ROW> struct Plain {
  static __device__ __forceinline__ constexpr int place(int t, int o) { return t * ROW + o; }
};

// Where the next tile of a side is read.
template <int BITS, int PARAMS_, int TS, bool BY_CHANNEL, int GROUP> struct Reader {
  static constexpr int PARAMS = PARAMS_ ? PARAMS_ : 16, SETS = TS > GROUP ? TS / GROUP : 1;
  static constexpr bool PLAIN = !PARAMS_, BY_TOKEN = PARAMS_ && !BY_CHANNEL;
  Rows<Codes<BITS>::ROW, TS, CodePlaces<BITS, TS>> codes;
  Rows<PARAMS, BY_CHANNEL ? SETS : TS, Plain<PARAMS>> params;
  int step, group;
  __device__ __forceinline__ void start(int lane) {
    codes.start(lane);
    if (!PLAIN) params.start(lane);
  }
  __device__ __forceinline__ void open(const Side& s, const Warp& w, int done) {
    step = BITS == 16 ? s.token : Codes<BITS>::ROW;
    group = s.group;
    codes.open(s.data + w.row * s.data_row + w.head * s.data_head + (i64)done * token(), w.lane, token());
    if (!PLAIN) params.open(s.params + w.row * s.params_row + w.head * s.params_head + (BY_CHANNEL ? 0 : (i64)done * PARAMS), w.lane, PARAMS);
  }
  __device__ __forceinline__ i64 token() const { return BITS == 16 ? (i64)step : (i64)Codes<BITS>::ROW; }
  __device__ __forceinline__ void fetch(u32 to, u32 to_params, int done, int count, int lane) {
    if (count >= TS) {
      codes.template copy_all<true>(to, TS, lane, token());
      if (BY_TOKEN) params.template copy_all<true>(to_params, TS, lane, PARAMS);
    } else {
      codes.template copy_all<false>(to, count, lane, token());
      if (BY_TOKEN) params.template copy_all<false>(to_params, count, lane, PARAMS);
    }
    codes.from += TS * token();
    if (BY_TOKEN) params.from += TS * PARAMS;
    if (BY_CHANNEL) {
      Rows<PARAMS, SETS, Plain<PARAMS>> here = params;
      here.from += (i64)((group + done) / GROUP) * PARAMS;
      here.template copy_all<false>(to_params, (count + GROUP - 1) / GROUP, lane, PARAMS);
    }
  }
};

__device__ __forceinline__ const u8* query_row(const Plan& plan, const Warp& w, int i) {
  const int rows = plan.groups * plan.queries, at = w.base + i < rows ? w.base + i : w.base;
  const i64 head = (i64)w.head * plan.groups + at / plan.queries;
  return plan.query + 2 * (w.row * plan.query_row + head * plan.query_head + (at % plan.queries) * plan.query_query);
}
__device__ __forceinline__ const u8* channels_of(const u8* all, int step, const Plan& plan, const Warp& w) {
  return all ? all + ((i64)w.row * plan.kv_heads + w.head) * step : nullptr;
}

// Chunks of codes of one block of 16 tokens as registers.
template <class P, bool TRANS> __device__ __forceinline__ void load_part(u32 x[P::CHUNKS][2], u32 base, int lane, int block) {
  const u32 at = base + P::place(lane & 15) + (lane >> 4) * 16 + block * P::place(16);
#pragma unroll
  for (int k = 0; k + 1 < P::CHUNKS; k += 2) load_two<TRANS>(x + k, at + k * 16);
  if (P::CHUNKS % 2) load_one<TRANS>(x[P::CHUNKS - 1], base + P::place(lane & 15) + (P::CHUNKS - 1) * 16 + block * P::place(16));
}

// The queries as operand B: a thread's column is lane / 4, its channels of a step 4 * (lane & 3) + {0, 2} and {1, 3}.
template <class P, class F> __device__ __forceinline__ void load_query(u32 q[][2], const u8* row, const u8* channels, int c, bool scaled, F&& each) {
#pragma unroll
  for (int p = 0; p < P::PLANES; p++)
#pragma unroll
    for (int k = 0; k < P::CHUNKS; k++) {
      float x[4] = {0.f, 0.f, 0.f, 0.f};
      if (P::WIDTH % 4 == 0) {
        const int within = k * 16 + 4 * c;
        if (P::WIDTH % 16 == 0 || within < P::WIDTH) {
          const uint2 v = *(const uint2*)(row + 2 * (p * P::WIDTH + within));
          const u32 words[2] = {v.x, v.y};
#pragma unroll
          for (int e = 0; e < 4; e++) x[e] = Model::of(words, e);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (k * 16 + 4 * c + e < P::WIDTH) x[e] = Model::at(row, p * P::WIDTH + k * 16 + 4 * c + e);
      }
      if (channels)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (k * 16 + 4 * c + e < P::WIDTH) x[e] *= Model::at(channels, p * P::WIDTH + k * 16 + 4 * c + e);
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
  using C = Codes<BITS>;
  using A = typename C::A;
  using B = typename C::B;
  static constexpr int GROUPS = D / GROUP, PARAMS = 2 * GROUPS * Number<T>::SIZE, NB = TS / 16, NS = R == 8 ? NB : 1;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = (TS * PARAMS + 15) / 16 * 16, SCRATCH = 0;
  using Source = Reader<BITS, PARAMS, TS, false, 1>;
  struct State {
    u32 q[C::STEPS][2];
    float u[2][GROUPS];
    float scale;
    __device__ __forceinline__ void start(const Plan& plan, const Kind& kind, const Warp& w) {
      const int c = w.lane & 3, r = w.lane >> 2;
      scale = plan.scale * UNIT;
      float sums[GROUPS];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) sums[g] = 0.f;
      const u8 *row = query_row(plan, w, r % R), *channels = channels_of(kind.key_channels, kind.key_step, plan, w);
      load_query<A>(q, row, channels, c, true, [&](int p, int k, float x) { sums[A::channel(p, k) / GROUP] += x; });
      if (C::TWO) load_query<B>(q + A::STEPS, row, channels, c, true, [](int, int, float) {});
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
    __device__ __forceinline__ void scores(u32 data, u32 params, const Warp& w, float s[NS][4]) {
      const int c = w.lane & 3, r = w.lane >> 2;
      u32 x[NB][A::CHUNKS][2], y[NB][B::CHUNKS][2];
#pragma unroll
      for (int b = 0; b < NB; b++) {
        load_part<A, false>(x[b], data, w.lane, b);
        if (C::TWO) load_part<B, false>(y[b], data + A::place(TS), w.lane, b);
      }
      const bool up = R == 4 && NB == 2 && c >= 2;
      u32 par[NS][2][PARAMS / 4];
#pragma unroll
      for (int i = 0; i < NS * 2; i++)
        load_words<PARAMS / 4>(par[i >> 1][i & 1], params + ((R == 8 ? (i >> 1) * 16 : up ? 16 : 0) + r + 8 * (i & 1)) * PARAMS);
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
              if (A::channel(p, k) / GROUP == g) multiply<A>(d[b], x[b][k], p, q[p * A::CHUNKS + k][0], q[p * A::CHUNKS + k][1]);
        if (C::TWO) {
#pragma unroll
          for (int p = 0; p < B::PLANES; p++)
#pragma unroll
            for (int k = 0; k < B::CHUNKS; k++)
#pragma unroll
              for (int b = 0; b < NB; b++)
                if (B::channel(p, k) / GROUP == g)
                  multiply<B>(d[b], y[b][k], p, q[A::STEPS + p * B::CHUNKS + k][0], q[A::STEPS + p * B::CHUNKS + k][1]);
        }
#pragma unroll
        for (int n = 0; n < NS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float v = R == 8 ? d[n][i] : (up ? d[NB - 1][i] : d[0][i]);
            const float a = v * Number<T>::of(par[n][i >> 1], g), o = u[i & 1][g] * Number<T>::of(par[n][i >> 1], GROUPS + g);
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
// threads read them, once for all of a warp; scales go into the query, offsets into a product of their own.
template <int BITS, int GROUP, int T, int TS> struct ChannelKeys {
  using C = Codes<BITS>;
  using A = typename C::A;
  using B = typename C::B;
  static constexpr int PARAMS = 2 * D * Number<T>::SIZE, NB = TS / 16, NS = R == 8 ? NB : 1, SETS = TS > GROUP ? TS / GROUP : 1;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = SETS * PARAMS, SET = C::STEPS * 64, SCRATCH = SETS * SET;
  static constexpr int PIECE = 16 / Number<T>::SIZE, PIECES = SETS * PARAMS / 16, TURNS = (PIECES + 31) / 32;
  using Source = Reader<BITS, PARAMS, TS, true, GROUP>;
  // Where a channel's numbers go in the order of reading, and what a scale is multiplied by.
  template <class P> static __device__ __forceinline__ u32 place(int ch) { return (ch / P::WIDTH * P::CHUNKS + ch % P::WIDTH / 16) * 64 + ch % P::WIDTH % 16 * 4; }
  template <class P> static __device__ __forceinline__ float factor(int ch) { return (float)(1 << P::LOW) * __uint_as_float((127 - P::BITS * (ch / P::WIDTH)) << 23); }
  struct State {
    u32 q[C::STEPS][2], to[TURNS];
    float scale, plain, by[TURNS];
    __device__ __forceinline__ void start(const Plan& plan, const Kind& kind, const Warp& w) {
      plain = plan.scale;
      scale = plan.scale * UNIT;
      const u8 *row = query_row(plan, w, (w.lane >> 2) % R), *channels = channels_of(kind.key_channels, kind.key_step, plan, w);
      load_query<A>(q, row, channels, w.lane & 3, false, [](int, int, float) {});
      if (C::TWO) load_query<B>(q + A::STEPS, row, channels, w.lane & 3, false, [](int, int, float) {});
#pragma unroll
      for (int k = 0; k < TURNS; k++) {
        const int i = w.lane + 32 * k, first = i % (PIECES / SETS) * PIECE;
        to[k] = w.scratch + i / (PIECES / SETS) * SET + place<A>(first % D) + first / D * 8;
        by[k] = first < D ? factor<A>(first) : 1.f;
        asm volatile("" : "+r"(to[k]), "+f"(by[k]));
      }
      if (A::WIDTH % 16 || B::WIDTH % 16) {
        for (int i = w.lane; i < SCRATCH / 8; i += 32) store_pair(w.scratch + 8 * i, 0, 0);
        __syncwarp();
      }
    }
    __device__ __forceinline__ void convert(u32 params, const Warp& w) {
#pragma unroll
      for (int k = 0; k < TURNS; k++) {
        const int i = w.lane + 32 * k;
        if (PIECES % 32 && i >= PIECES) break;
        u32 raw[4];
        load_words<4>(raw, params + i * 16);
#pragma unroll
        for (int j = 0; j < PIECE; j += 4) {
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; e++) x[e] = Number<T>::of(raw, j + e);
          const int first = i % (PIECES / SETS) * PIECE + j;
          u32 at = to[k] + 4 * j;
          float f = by[k];
          if (A::WIDTH % 8 && j) {  // four more channels may be of another plane
            at = w.scratch + i / (PIECES / SETS) * SET + place<A>(first % D) + first / D * 8;
            f = first < D ? factor<A>(first) : 1.f;
          }
          store_pair(at, halves(x[0] * f, x[2] * f), halves(x[1] * f, x[3] * f));
          if (C::TWO && first < D) {
            const float g = factor<B>(first);
            store_pair(w.scratch + i / (PIECES / SETS) * SET + A::STEPS * 64 + place<B>(first), halves(x[0] * g, x[2] * g), halves(x[1] * g, x[3] * g));
          }
        }
      }
    }
    __device__ __forceinline__ void scores(u32 data, u32, const Warp& w, float s[NS][4]) {
      const int c = w.lane & 3;
      u32 x[NB][A::CHUNKS][2], y[NB][B::CHUNKS][2];
#pragma unroll
      for (int b = 0; b < NB; b++) {
        load_part<A, false>(x[b], data, w.lane, b);
        if (C::TWO) load_part<B, false>(y[b], data + A::place(TS), w.lane, b);
      }
      float d[NB][4], o[SETS][4];
#pragma unroll
      for (int i = 0; i < NB * 4; i++) d[0][i] = 0.f;
#pragma unroll
      for (int i = 0; i < SETS * 4; i++) o[0][i] = 0.f;
      const u32 from = w.scratch + c * 16;
#pragma unroll
      for (int t = 0; t < SETS; t++)
#pragma unroll
        for (int i = 0; i < C::STEPS; i++) {
          u32 par[4];
          load_words<4>(par, from + t * SET + i * 64);
          const u32 a = times(q[i][0], par[0]), e = times(q[i][1], par[1]);
          if (i < A::STEPS) mma(o[t], par[2], par[2], par[3], par[3], q[i][0], q[i][1]);
#pragma unroll
          for (int b = t * NB / SETS; b < (t + 1) * NB / SETS; b++) {
            if (i < A::STEPS) multiply<A>(d[b], x[b][i % A::CHUNKS], i / A::CHUNKS, a, e);
            else if (C::TWO) multiply<B>(d[b], y[b][(i - A::STEPS) % B::CHUNKS], (i - A::STEPS) / B::CHUNKS, a, e);
          }
        }
      const bool up = R == 4 && NB == 2 && c >= 2;
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float v = R == 8 ? d[n][i] : (up ? d[NB - 1][i] : d[0][i]);
          const float shift = R == 8 ? o[n * SETS / NB][i & 1] : (up ? o[SETS - 1][i & 1] : o[0][i & 1]);
          s[n][i] = fmaf(v, scale, shift * plain);
        }
    }
  };
};

template <int TS> struct ExactKeys {
  using P = Part<16, 0, 0>;
  static constexpr int NB = TS / 16, NS = R == 8 ? NB : 1, BYTES = P::place(TS), PARAM_BYTES = 0, SCRATCH = 0;
  using Source = Reader<16, 0, TS, false, 1>;
  struct State {
    u32 q[D / 16][2];
    float scale;
    __device__ __forceinline__ void start(const Plan& plan, const Kind&, const Warp& w) {
      scale = plan.scale;
      const u8* row = query_row(plan, w, (w.lane >> 2) % R);
#pragma unroll
      for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) q[i][h] = *(const u32*)(row + 2 * (16 * i + 8 * h + 2 * (w.lane & 3)));
    }
    __device__ __forceinline__ void convert(u32, const Warp&) {}
    __device__ __forceinline__ void scores(u32 data, u32, const Warp& w, float s[NS][4]) {
      float d[NB][4];
#pragma unroll
      for (int i = 0; i < NB * 4; i++) d[0][i] = 0.f;
      const u32 at = data + P::place(w.lane & 15) + (w.lane >> 4) * 16;
#pragma unroll
      for (int b = 0; b < NB; b++)
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
          u32 x[2][2];
          load_two<false>(x, at + b * P::place(16) + i * 32);
          mma_model(d[b], x[0][0], x[0][1], x[1][0], x[1][1], q[i][0], q[i][1]);
        }
      const bool up = R == 4 && NB == 2 && (w.lane & 3) >= 2;
#pragma unroll
      for (int n = 0; n < NS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = scale * (R == 8 ? d[n][i] : (up ? d[NB - 1][i] : d[0][i]));
    }
  };
};

// What a warp found for its columns goes to its slot, together with what is there from other kinds.
struct Writer {
  float old[2], fresh[2];
  bool filled;
  float* at;
  __device__ __forceinline__ void open(Warp& w, float m[2], float l[2]) {
    const int c = w.lane & 3;
    float* sums = w.slot + 8 * (D + 4) + 4 * c;
    filled = w.filled;
    at = w.slot + 2 * c * (D + 4);
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int x = 4; x < 32; x <<= 1) l[j] += __shfl_xor_sync(~0u, l[j], x);
      if (filled) {
        const float before = sums[2 * j], top = fmaxf(before, m[j]);
        old[j] = ex2(before - top);
        fresh[j] = ex2(m[j] - top);
        m[j] = top;
        l[j] = l[j] * fresh[j] + sums[2 * j + 1] * old[j];
      }
    }
    __syncwarp();
    if (w.lane < 4) *(float4*)sums = make_float4(m[0], l[0], m[1], l[1]);
    w.filled = true;
  }
  __device__ __forceinline__ void put(int ch, bool there, bool more, float a, float b) {
    if (!there) return;
    const float x[2] = {a, b};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float* to = at + j * (D + 4) + ch;
      *to = more ? *to + (filled ? x[j] * fresh[j] : x[j]) : filled ? *to * old[j] + x[j] * fresh[j] : x[j];
    }
  }
};

template <int BITS, int GROUP, int T, int TS> struct TokenValues {
  using C = Codes<BITS>;
  using A = typename C::A;
  using B = typename C::B;
  static constexpr int GROUPS = D / GROUP, PARAMS = 2 * GROUPS * Number<T>::SIZE, NB = TS / 16, NS = R == 8 ? NB : 1;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = (TS * PARAMS + 15) / 16 * 16;
  using Source = Reader<BITS, PARAMS, TS, false, 1>;
  struct State {
    float acc[C::STEPS][4], o[2][GROUPS];
    __device__ __forceinline__ void start() {
#pragma unroll
      for (int i = 0; i < C::STEPS * 4; i++) acc[0][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) o[0][i] = 0.f;
    }
    __device__ __forceinline__ void rescale(const float f[2]) {
#pragma unroll
      for (int i = 0; i < C::STEPS * 4; i++) acc[0][i] *= f[i & 1];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        o[0][g] *= f[0];
        o[1][g] *= f[1];
      }
    }
    __device__ __forceinline__ void add(u32 data, u32 params, const Warp& w, float p[NS][4]) {
      const int c = w.lane & 3, r = w.lane >> 2;
      u32 e[NS][GROUPS][2];
#pragma unroll
      for (int n = 0; n < NS; n++) {
        const int tok = (R == 8 ? 16 * n : NB == 2 && c >= 2 ? 16 : 0) + r;
        u32 par[2][PARAMS / 4];
        load_words<PARAMS / 4>(par[0], params + tok * PARAMS);
        load_words<PARAMS / 4>(par[1], params + (tok + 8) * PARAMS);
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float s = Number<T>::of(par[h], g), z = Number<T>::of(par[h], GROUPS + g);
            o[0][g] += p[n][2 * h] * z;
            o[1][g] += p[n][2 * h + 1] * z;
            e[n][g][h] = transposed(halves(p[n][2 * h] * s, p[n][2 * h + 1] * s));
          }
      }
#pragma unroll
      for (int b = 0; b < NB; b++) {
        u32 x[A::CHUNKS][2], y[B::CHUNKS][2], z[GROUPS][2];
        load_part<A, true>(x, data, w.lane, b);
        if (C::TWO) load_part<B, true>(y, data + A::place(TS), w.lane, b);
#pragma unroll
        for (int i = 0; i < GROUPS * 2; i++) z[0][i] = R == 8 ? e[b * (NS - 1) / (NB > 1 ? NB - 1 : 1)][0][i] : (r >> 2) == b ? e[0][0][i] : 0u;
#pragma unroll
        for (int q = 0; q < A::PLANES; q++)
#pragma unroll
          for (int k = 0; k < A::CHUNKS; k++) weigh<A>(acc[q * A::CHUNKS + k], x[k], q, z[A::channel(q, k) / GROUP]);
        if (C::TWO) {
#pragma unroll
          for (int q = 0; q < B::PLANES; q++)
#pragma unroll
            for (int k = 0; k < B::CHUNKS; k++) weigh<B>(acc[A::STEPS + q * B::CHUNKS + k], y[k], q, z[B::channel(q, k) / GROUP]);
        }
      }
    }
    template <class P> static __device__ __forceinline__ void weigh(float* d, const u32 x[2], int plane, const u32 z[2]) {
      const u32 m = P::mask(plane);
      mma(d, x[0] & m, (x[0] >> 8) & m, x[1] & m, (x[1] >> 8) & m, z[0], z[1]);
    }
    template <class P> __device__ __forceinline__ void write(Writer& out, const u8* channels, int r, int first) {
#pragma unroll
      for (int q = 0; q < P::PLANES; q++)
#pragma unroll
        for (int k = 0; k < P::CHUNKS; k++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float* d = acc[first + q * P::CHUNKS + k] + 2 * h;
            const float unit = UNIT * P::factor(q);
            const int g = P::channel(q, k) / GROUP, within = 16 * k + 2 * r + h, ch = q * P::WIDTH + within;
            const bool there = within < P::WIDTH;
            float a = fmaf(d[0], unit, first ? 0.f : o[0][g]), b = fmaf(d[1], unit, first ? 0.f : o[1][g]);
            if (channels && there) {
              const float by = Model::at(channels, ch);
              a *= by;
              b *= by;
            }
            out.put(ch, there, first > 0, a, b);
          }
    }
    __device__ __forceinline__ void finish(const Plan& plan, const Kind& kind, Warp& w, float m[2], float l[2]) {
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++)
#pragma unroll
        for (int x = 4; x < 32; x <<= 1) o[0][i] += __shfl_xor_sync(~0u, o[0][i], x);
      Writer out;
      out.open(w, m, l);
      const u8* channels = channels_of(kind.value_channels, kind.value_step, plan, w);
      write<A>(out, channels, w.lane >> 2, 0);
      if (C::TWO) {
        __syncwarp();
        write<B>(out, channels, w.lane >> 2, A::STEPS);
      }
      __syncwarp();
    }
  };
};

template <int TS> struct ExactValues {
  using P = Part<16, 0, 0>;
  static constexpr int NB = TS / 16, NS = R == 8 ? NB : 1, BYTES = P::place(TS), PARAM_BYTES = 0;
  using Source = Reader<16, 0, TS, false, 1>;
  struct State {
    float acc[D / 16][4];
    __device__ __forceinline__ void start() {
#pragma unroll
      for (int i = 0; i < D / 4; i++) acc[0][i] = 0.f;
    }
    __device__ __forceinline__ void rescale(const float f[2]) {
#pragma unroll
      for (int i = 0; i < D / 4; i++) acc[0][i] *= f[i & 1];
    }
    __device__ __forceinline__ void add(u32 data, u32, const Warp& w, float p[NS][4]) {
      const int r = w.lane >> 2;
      const u32 at = data + P::place(w.lane & 15) + (w.lane >> 4) * 16;
#pragma unroll
      for (int b = 0; b < NB; b++) {
        const float* y = p[R == 8 ? b : 0];
        u32 e0 = transposed(model_pair(y[0], y[1])), e1 = transposed(model_pair(y[2], y[3]));
        if (R == 4 && (r >> 2) != b) e0 = e1 = 0u;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
          u32 x[2][2];
          load_two<true>(x, at + b * P::place(16) + i * 32);
          mma_model(acc[i], x[0][0], x[1][0], x[0][1], x[1][1], e0, e1);
        }
      }
    }
    __device__ __forceinline__ void finish(const Plan&, const Kind&, Warp& w, float m[2], float l[2]) {
      Writer out;
      out.open(w, m, l);
#pragma unroll
      for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          out.put(16 * i + 8 * h + (w.lane >> 2), true, false, acc[i][2 * h], acc[i][2 * h + 1]);
      __syncwarp();
    }
  };
};

// Keys and values of a kind of tokens, and where a tile of them lies in shared memory.
template <class K_, class V_, int TS> struct Pair {
  using K = K_;
  using V = V_;
  static constexpr int TOKENS = TS, VALUES = K::BYTES, KEY_PARAMS = VALUES + V::BYTES, VALUE_PARAMS = KEY_PARAMS + K::PARAM_BYTES;
  static constexpr int STAGE = VALUE_PARAMS + V::PARAM_BYTES, FIT = TS == 16 ? 1 : 14400 / STAGE;
  static constexpr int STAGES_ = FIT >= STAGES ? STAGES : TS == 16 ? 1 : FIT < 3 ? 3 : FIT, BYTES = STAGES_ * STAGE, SCRATCH = K::SCRATCH;
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
constexpr int SCRATCH = most(most(most(KIND_0::SCRATCH, KIND_1::SCRATCH), most(KIND_2::SCRATCH, KIND_3::SCRATCH)), most(KIND_4::SCRATCH, KIND_5::SCRATCH));
constexpr int RING = SCRATCH + most(most(most(KIND_0::BYTES, KIND_1::BYTES), most(KIND_2::BYTES, KIND_3::BYTES)), most(KIND_4::BYTES, KIND_5::BYTES));

extern "C" { __constant__ int SHARED_BYTES = WARPS * (SLOT * 4 + RING); }

// Scores of tokens that a query may not see, and of those that are none, are minus infinity.
template <int NS, int NB> __device__ __forceinline__ void hide(const Plan& plan, const Run& run, int seen, int left, const Warp& w, float s[NS][4]) {
  const int c = w.lane & 3, r = w.lane >> 2;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int row = w.base + (2 * c + j) % R, rows = plan.groups * plan.queries;
    const i64 masked = MASK ? w.row * plan.mask_row + w.head * plan.mask_head + (row < rows ? row / plan.queries * plan.mask_group + row % plan.queries * plan.mask_query : 0) : 0;
    const int last = CAUSAL ? run.causal - seen + row % plan.queries : 0;
#pragma unroll
    for (int n = 0; n < NS; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int tok = (R == 8 ? 16 * n : NB == 2 && c >= 2 ? 16 : 0) + r + 8 * h;
        float& x = s[n][2 * h + j];
        bool there = tok < left && !(NB == 1 && R == 4 && c >= 2);
        if (CAUSAL) there = there && tok <= last;
        if (MASK == 1) there = there && plan.mask[masked + run.column + seen + tok];
        if (MASK == 2 && there) x += 1.44269504f * ((const float*)plan.mask)[masked + run.column + seen + tok];
        if (!there) x = -__uint_as_float(0x7f800000u);
      }
  }
}
template <int NS, int NB> __device__ __forceinline__ void keep(const Plan& plan, int column, int left, const Warp& w, const float s[NS][4]) {
  const int c = w.lane & 3, r = w.lane >> 2, rows = plan.groups * plan.queries;
#pragma unroll
  for (int i = 0; i < NS * 4; i++) {
    const int tok = (R == 8 ? 16 * (i >> 2) : NB == 2 && c >= 2 ? 16 : 0) + r + 8 * ((i >> 1) & 1), row = w.base + (2 * c + (i & 1)) % R;
    if (tok < left && row < rows && !(NB == 1 && R == 4 && c >= 2))
      plan.scores[(((i64)w.row * plan.kv_heads + w.head) * rows + row) * plan.columns + column + tok] = s[0][i];
  }
}

__device__ __forceinline__ float4 load4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float2 load2(const float* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add4(float4& v, const float4 x, float f) {
  v.x = fmaf(x.x, f, v.x);
  v.y = fmaf(x.y, f, v.y);
  v.z = fmaf(x.z, f, v.z);
  v.w = fmaf(x.w, f, v.w);
}
__device__ __forceinline__ void write_out(const Plan& plan, int i, float4 v, float top, float sum) {
  const int at = blockIdx.z * R + i / (D / 4), rows = plan.groups * plan.queries;
  if (at >= rows) return;
  const int row = blockIdx.y / plan.kv_heads, head = blockIdx.y % plan.kv_heads * plan.groups + at / plan.queries;
  if (plan.sinks) {
    const float sink = plan.sinks[head] * 1.44269504f, high = fmaxf(top, sink), f = ex2(top - high);
    sum = sum * f + ex2(sink - high);
    top = high;
    v.x *= f; v.y *= f; v.z *= f; v.w *= f;
  }
  if (SCORES && i % (D / 4) == 0) plan.sums[(i64)blockIdx.y * rows + at] = sum > 0.f ? top + __log2f(sum) : 0.f;
  const float f = sum > 0.f ? 1.f / sum : 0.f;
  const i64 to = (((i64)row * plan.queries + at % plan.queries) * plan.kv_heads * plan.groups + head) * D + i % (D / 4) * 4;
  *(uint2*)(plan.out + 2 * to) = make_uint2(model_pair(v.x * f, v.y * f), model_pair(v.z * f, v.w * f));
}

// The warps' slots become one; of the blocks of a head the last to come puts all together, always in the same order.
__device__ __forceinline__ void merge_block(const Plan& plan, const float* slots, float* shared) {
  constexpr int FOURS = R * D / 4, THREADS = WARPS * 32;
  const i64 line = (i64)blockIdx.z * gridDim.y + blockIdx.y, part = line * plan.parts + blockIdx.x;
  float* partial = plan.partial + part * PART;
  for (int i = threadIdx.x; i < FOURS; i += THREADS) {
    const int row = i / (D / 4), ch = i % (D / 4) * 4;
    float top = LOWEST, sum = 0.f;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int k = 0; k < WARPS * (8 / R); k++)
      top = fmaxf(top, slots[k % WARPS * SLOT + 8 * (D + 4) + 2 * (row + k / WARPS * R)]);
#pragma unroll
    for (int k = 0; k < WARPS * (8 / R); k++) {
      const float* slot = slots + k % WARPS * SLOT;
      const float2 x = *(const float2*)(slot + 8 * (D + 4) + 2 * (row + k / WARPS * R));
      const float f = ex2(x.x - top);
      sum += x.y * f;
      if (x.y > 0.f) add4(v, *(const float4*)(slot + (row + k / WARPS * R) * (D + 4) + ch), f);
    }
    if (plan.parts == 1) {
      write_out(plan, i, v, top, sum);
    } else {
      *(float4*)(partial + 4 * i) = v;
      if (i % (D / 4) == 0) *(float2*)(partial + R * D + 2 * row) = make_float2(top, sum);
    }
  }
  if (plan.parts == 1) return;
  __threadfence();
  __syncthreads();
  __shared__ u32 before;
  if (threadIdx.x == 0) {
    before = atomicInc(plan.counters + line, plan.parts - 1);
    __threadfence();
  }
  __syncthreads();
  if (before != plan.parts - 1) return;
  partial = plan.partial + line * plan.parts * PART;
  for (int row = threadIdx.x >> 5; row < R; row += WARPS) {  // shared: of each row and part its weight; then maximum and sum
    float top = LOWEST, sum = 0.f;
    for (int p = threadIdx.x & 31; p < plan.parts; p += 32) {
      const float2 x = load2(partial + (i64)p * PART + R * D + 2 * row);
      const float high = fmaxf(top, x.x);
      sum = sum * ex2(top - high) + x.y * ex2(x.x - high);
      top = high;
      shared[2 * R + p * R + row] = x.x;
    }
#pragma unroll
    for (int x = 16; x; x >>= 1) {
      const float high = fmaxf(top, __shfl_xor_sync(~0u, top, x)), part = sum * ex2(top - high);
      sum = part + __shfl_xor_sync(~0u, part, x);
      top = high;
    }
    __syncwarp();
    for (int p = threadIdx.x & 31; p < plan.parts; p += 32) shared[2 * R + p * R + row] = ex2(shared[2 * R + p * R + row] - top);
    if ((threadIdx.x & 31) == 0) {
      shared[2 * row] = top;
      shared[2 * row + 1] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < FOURS; i += THREADS) {
    const int row = i / (D / 4);
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int p = 0; p < plan.parts; p++) add4(v, load4(partial + (i64)p * PART + 4 * i), shared[2 * R + p * R + row]);
    write_out(plan, i, v, shared[2 * row], shared[2 * row + 1]);
  }
}
