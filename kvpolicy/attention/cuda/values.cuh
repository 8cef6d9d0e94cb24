// Weighted values, per token and exact, and what a warp writes down of them.
// What a warp found for its columns goes to its slot, together with what is there from other kinds.
struct Writer {
  float old[2], fresh[2];
  bool filled;
  float* at;
  __device__ __forceinline__ void open(Warp& w, float m[2], float l[2]) {
    const int c = w.lane & 3;
    float* sums = w.slot + 8 * (DV + 4) + 4 * c;
    filled = w.filled;
    at = w.slot + 2 * c * (DV + 4);
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
      float* to = at + j * (DV + 4) + ch;
      *to = more ? *to + (filled ? x[j] * fresh[j] : x[j]) : filled ? *to * old[j] + x[j] * fresh[j] : x[j];
    }
  }
};

template <int BITS, int GROUP, int T, int TS> struct TokenValues {
  using C = Codes<DV, BITS>;
  using A = typename C::A;
  using B = typename C::B;
  using S = Scaled<BITS, DV / GROUP, T>;
  static constexpr int GROUPS = DV / GROUP, PARAMS = S::PARAMS, NB = Tile<TS>::NB, NS = Tile<TS>::NS;
  static constexpr int BYTES = C::bytes(TS), PARAM_BYTES = (TS * PARAMS + 15) / 16 * 16;
  static constexpr bool BY_SLOT = false;
  // Sums of both parts of a code are one where a thread has no registers for two: 16 channels of a plane of the first part
  // are those of a plane of the second, whose codes weigh 4 or 2 times as much. Half and twice the weights are in range.
  static constexpr bool ONE = C::TWO && DV > 128 && A::WIDTH % 32 == 0;
  static constexpr int SUMS = ONE ? A::STEPS : C::STEPS;
  // Scales and offsets of a token that are a row of eight 16-bit numbers are turned as they are read: tokens two by two, as
  // the weights of a product lie. Scales are multiplied in there. All of them are an operand A as they lie, whose rows 0 to 7
  // are numbers of tokens 0 to 7 and 16 to 23, and the others those of the other tokens: one product with the weights of the
  // ones, and one of the others, sum up offsets; the other half of each is not read.
  static constexpr bool TURNED = GROUPS == 4 && T < 2 && TS % 32 == 0;
  static constexpr int SETS = TURNED ? TS / 32 : 1, SCRATCH = TURNED ? SETS * 512 : 0;
  using Source = Reader<DV, BITS, PARAMS, TS, false, 1>;
  struct State {
    float acc[SUMS][4], o[2][GROUPS];  // of each column and group; turned: of each product
    u32 turned[SETS][4];
    __device__ __forceinline__ void start() {
#pragma unroll
      for (int i = 0; i < SUMS * 4; i++) acc[0][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++) o[0][i] = 0.f;
    }
    __device__ __forceinline__ void rescale(const float f[2]) {
#pragma unroll
      for (int i = 0; i < SUMS * 4; i++) acc[0][i] *= f[i & 1];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        o[0][g] *= f[TURNED ? g & 1 : 0];
        o[1][g] *= f[TURNED ? g & 1 : 1];
      }
    }
    // Turn the scales and offsets of a tile, and put them where all threads read scales.
    __device__ __forceinline__ void convert(u32 params, const Warp& w) {
      if (TURNED) {
#pragma unroll
        for (int t = 0; t < SETS; t++) {
          u32 x[2][2];
          load_two<true>(x, params + t * 512 + w.lane * 16);
#pragma unroll
          for (int i = 0; i < 4; i++) turned[t][i] = T == 1 ? halves(lo(x[0][i]), hi(x[0][i])) : x[0][i];
          store_four(w.more + t * 512 + w.lane * 16, turned[t]);
        }
      }
    }
    // The weights of a block as an operand: of 4 query heads the columns of the other block are zero.
    static __device__ __forceinline__ u32 of_block(const u32 e[NS][TURNED ? 1 : GROUPS][2], int i, int b, int r) {
      return R == 8 ? e[b % NS][0][i] : (r >> 2) == (b & 1) ? e[b / 2][0][i] : 0u;
    }
    // Weights times the scales of each group, as operands.
    __device__ __forceinline__ void scaled(u32 params, const Warp& w, const float p[NS][4], u32 e[NS][TURNED ? 1 : GROUPS][2]) {
#pragma unroll
      for (int n = 0; n < NS; n++) {
        const int tok = Tile<TS>::token(n, w.lane);
        u32 par[2][S::WORDS];
        S::load(par[0], params + tok * PARAMS);
        S::load(par[1], params + (tok + 8) * PARAMS);
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float s = S::scale(par[h], g), z = S::offset(par[h], g);
            o[0][g] += p[n][2 * h] * z;
            o[1][g] += p[n][2 * h + 1] * z;
            e[n][g][h] = transposed(halves(p[n][2 * h] * s, p[n][2 * h + 1] * s));
          }
      }
    }
    __device__ __forceinline__ void add(u32 data, u32 params, const Warp& w, float p[NS][4]) {
      const int c = w.lane & 3, r = w.lane >> 2;
      u32 e[NS][TURNED ? 1 : GROUPS][2], par[SETS][GROUPS][4];
      if (TURNED) {
#pragma unroll
        for (int i = 0; i < NS * 2; i++) e[i >> 1][0][i & 1] = transposed(halves(p[i >> 1][2 * (i & 1)], p[i >> 1][2 * (i & 1) + 1]));
#pragma unroll
        for (int i = 0; i < SETS * GROUPS; i++) load_words<4>(par[0][i], w.more + i / GROUPS * 512 + i % GROUPS * 64 + c * 16);
#pragma unroll
        for (int i = 0; i < SETS * 2; i++)
          mma(o[i & 1], turned[i >> 1][0], turned[i >> 1][1], turned[i >> 1][2], turned[i >> 1][3], of_block(e, i & 1, i & ~1, r), of_block(e, i & 1, i | 1, r));
      } else {
        scaled(params, w, p, e);
      }
#pragma unroll
      for (int b = 0; b < NB; b++) {
        u32 x[A::CHUNKS][2], y[B::CHUNKS][2], z[GROUPS][2];
        load_part<A, true>(x, data, w.lane, b);
        if (C::TWO) load_part<B, true>(y, data + A::place(TS), w.lane, b);
#pragma unroll
        for (int i = 0; i < GROUPS * 2; i++) {
          z[0][i] = of_block(e, TURNED ? i & 1 : i, b, r);
          if (TURNED) z[0][i] = times(z[0][i], par[b / 2][i >> 1][2 * (b & 1) + (i & 1)]);
        }
#pragma unroll
        for (int q = 0; q < A::PLANES; q++)
#pragma unroll
          for (int k = 0; k < A::CHUNKS; k++) weigh<A, ONE ? -1 : 0>(acc[q * A::CHUNKS + k], x[k], q, z[A::channel(q, k) / GROUP]);
        if (C::TWO) {
#pragma unroll
          for (int q = 0; q < B::PLANES; q++)
#pragma unroll
            for (int k = 0; k < B::CHUNKS; k++) {
              float* d = acc[(ONE ? 0 : A::STEPS) + q * B::CHUNKS + k];
              if (ONE && q % 2 == 0) weigh<B, 1>(d, y[k], q, z[B::channel(q, k) / GROUP]);
              else weigh<B, 0>(d, y[k], q, z[B::channel(q, k) / GROUP]);
            }
        }
      }
    }
    // UP: by what power of two the weights are larger.
    template <class P, int UP> static __device__ __forceinline__ void weigh(float* d, const u32 x[2], int plane, const u32 z[2]) {
      const u32 m = P::mask(plane), f = UP > 0 ? 0x40004000u : 0x38003800u;  // twice, and half
      mma(d, x[0] & m, (x[0] >> 8) & m, x[1] & m, (x[1] >> 8) & m, UP ? times(z[0], f) : z[0], UP ? times(z[1], f) : z[1]);
    }
    template <class P> __device__ __forceinline__ void write(Writer& out, int r, int first) {
#pragma unroll
      for (int q = 0; q < P::PLANES; q++)
#pragma unroll
        for (int k = 0; k < P::CHUNKS; k++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float* d = acc[first + q * P::CHUNKS + k] + 2 * h;
            const float unit = UNIT * P::factor(q) * (ONE ? 2.f : 1.f);
            const int g = P::channel(q, k) / GROUP, within = 16 * k + 2 * r + h, ch = q * P::WIDTH + within;
            const bool there = within < P::WIDTH;
            out.put(ch, there, first > 0, fmaf(d[0], unit, first ? 0.f : o[0][g]), fmaf(d[1], unit, first ? 0.f : o[1][g]));
          }
    }
    __device__ __forceinline__ void finish(Warp& w, float m[2], float l[2]) {
      if (TURNED) {
        const float sums[2] = {o[0][0] + o[1][2], o[0][1] + o[1][3]};
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++) o[0][i] = __shfl_sync(~0u, sums[i / GROUPS], 16 + 4 * (i % GROUPS) + (w.lane & 3));
      } else {
#pragma unroll
        for (int i = 0; i < 2 * GROUPS; i++)
#pragma unroll
          for (int x = 4; x < 32; x <<= 1) o[0][i] += __shfl_xor_sync(~0u, o[0][i], x);
      }
      Writer out;
      out.open(w, m, l);
      write<A>(out, w.lane >> 2, 0);
      if (C::TWO && !ONE) {
        __syncwarp();
        write<B>(out, w.lane >> 2, A::STEPS);
      }
      __syncwarp();
    }
  };
};

template <int TS> struct ExactValues {
  using P = Part<DV, 16, 0, 0>;
  static constexpr int NB = Tile<TS>::NB, NS = Tile<TS>::NS, BYTES = P::place(TS), PARAM_BYTES = 0, SCRATCH = 0;
  static constexpr bool BY_SLOT = false;
  using Source = Reader<DV, 16, 0, TS, false, 1>;
  struct State {
    float acc[DV / 16][4];
    __device__ __forceinline__ void start() {
#pragma unroll
      for (int i = 0; i < DV / 4; i++) acc[0][i] = 0.f;
    }
    __device__ __forceinline__ void rescale(const float f[2]) {
#pragma unroll
      for (int i = 0; i < DV / 4; i++) acc[0][i] *= f[i & 1];
    }
    __device__ __forceinline__ void convert(u32, const Warp&) {}
    __device__ __forceinline__ void add(u32 data, u32, const Warp& w, float p[NS][4]) {
      const int r = w.lane >> 2;
      const u32 at = data + P::place(w.lane & 15) + (w.lane >> 4) * 16;
#pragma unroll
      for (int b = 0; b < NB; b++) {
        const float* y = p[R == 8 ? b : b / 2];
        u32 e0 = transposed(model_pair(y[0], y[1])), e1 = transposed(model_pair(y[2], y[3]));
        if (R == 4 && (r >> 2) != (b & 1)) e0 = e1 = 0u;
#pragma unroll
        for (int i = 0; i < DV / 16; i++) {
          u32 x[2][2];
          load_two<true>(x, at + b * P::place(16) + i * 32);
          mma_model(acc[i], x[0][0], x[1][0], x[0][1], x[1][1], e0, e1);
        }
      }
    }
    __device__ __forceinline__ void finish(Warp& w, float m[2], float l[2]) {
      Writer out;
      out.open(w, m, l);
#pragma unroll
      for (int i = 0; i < DV / 16; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          out.put(16 * i + 8 * h + (w.lane >> 2), true, false, acc[i][2 * h], acc[i][2 * h + 1]);
      __syncwarp();
    }
  };
};

// Values that lie where an index says.
template <class V> struct Slots : V {
  static constexpr bool BY_SLOT = true;
  using Source = Gather<typename V::Source>;
};
