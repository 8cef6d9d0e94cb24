// Operands of products: numbers and codes, and where they lie.
// A number of the model's type, or as quantizers ask for: 0 float16, 1 bfloat16, 2 float32, 3 float8_e4m3.
template <int T> struct Number {
  static constexpr int SIZE = T == 2 ? 4 : T == 3 ? 1 : 2;
  // Put where a float16 has them, sign, exponent and mantissa of eight bits are 2^-8 of the number, subnormal or not.
  // The largest of both signs is no number.
  static __device__ __forceinline__ float small(u32 byte) {
    const float x = 256.f * half((byte & 0x80u) << 8 | (byte & 0x7fu) << 7);
    return (byte & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : x;
  }
  static __device__ __forceinline__ float of(const u32* words, int i) {
    if (T == 2) return __uint_as_float(words[i]);
    if (T == 3) return small(words[i >> 2] >> 8 * (i & 3) & 0xffu);
    const u32 w = words[i >> 1];
    return T == 1 ? ((i & 1) ? hi(w) : lo(w)) : half((i & 1) ? w >> 16 : w);
  }
  static __device__ __forceinline__ float at(const u8* p, i64 i) {
    if (T == 2) return ((const float*)p)[i];
    if (T == 3) return small(p[i]);
    const u32 w = ((const u16*)p)[i];
    return T == 1 ? lo(w) : half(w);
  }
};
using Model = Number<BFLOAT>;
// Scales of a token: of type T & 3, with offsets, or from 4 on without. Levels are then symmetric to zero.
template <int BITS, int GROUPS, int T> struct Scaled {
  using N = Number<T & 3>;
  static constexpr bool CENTRED = T >= 4;
  static constexpr int PARAMS = (CENTRED ? 1 : 2) * GROUPS * N::SIZE, WORDS = (PARAMS + 3) / 4;
  static __device__ __forceinline__ void load(u32 x[WORDS], u32 at) {
    if (PARAMS % 4 == 0) load_words<WORDS>(x, at);
    else if (N::SIZE == 1) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) x[i] = 0;
#pragma unroll
      for (int i = 0; i < PARAMS; i++) {
        u32 byte;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(at + i) : "memory");
        x[i / 4] |= byte << 8 * (i % 4);
      }
    } else
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        u32 low, high = 0;
        asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(low) : "r"(at + 4 * i) : "memory");
        if (2 * i + 1 < GROUPS) asm volatile("{.reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(high) : "r"(at + 4 * i + 2) : "memory");
        x[i] = low | high << 16;
      }
  }
  static __device__ __forceinline__ float scale(const u32* x, int g) { return N::of(x, g); }
  static __device__ __forceinline__ float offset(const u32* x, int g) {
    return CENTRED ? -.5f * ((1 << BITS) - 1) * N::of(x, g) : N::of(x, GROUPS + g);
  }
};

// Scores of a tile: 16 tokens are a block, and 8 columns are one of them or, of 4 query heads, two.
template <int TS> struct Tile {
  static constexpr int NB = TS / 16, NS = R == 8 ? NB : (NB + 1) / 2;
  static constexpr bool PAIRS = R == 4 && NB > 1;
  static __device__ __forceinline__ bool up(int lane) { return PAIRS && (lane & 3) >= 2; }  // whether a thread's columns are of the second
  // The first of a thread's two tokens of a set of columns; the other one is 8 further.
  static __device__ __forceinline__ int token(int n, int lane) { return 16 * (PAIRS ? 2 * n : n) + (up(lane) ? 16 : 0) + (lane >> 2); }
  static __device__ __forceinline__ float own(const float d[NB][4], int n, int i, bool up) { return PAIRS ? (up ? d[2 * n + 1][i] : d[2 * n][i]) : d[n][i]; }
};

// One part of codes: BITS of a code, LOW bits of the code below them, after SKIP bytes of a row. 16 bits are exact numbers.
template <int DIM, int BITS_, int LOW_, int SKIP_> struct Part {
  static constexpr int BITS = BITS_, LOW = LOW_, SKIP = SKIP_, WIDTH = DIM * BITS / 8, CHUNKS = (WIDTH + 15) / 16;
  static constexpr int PLANES = BITS == 16 ? 1 : 8 / BITS, STRIDE = CHUNKS * 16, STEPS = CHUNKS * PLANES;
  static constexpr int PER = 128 / gcd(STRIDE, 128);  // tokens after which 16 bytes of padding keep banks apart
  static __device__ __forceinline__ constexpr int place(int token) { return token * STRIDE + (PER < 8 ? token / PER * 16 : 0); }
  static __device__ __forceinline__ constexpr int channel(int plane, int chunk) { return plane * WIDTH + chunk * 16; }
  static __device__ __forceinline__ constexpr u32 mask(int plane) { return (((1u << BITS) - 1) * 0x10001u) << (BITS * plane); }
  // What a code of a plane is to be multiplied by, apart from UNIT.
  static __device__ __forceinline__ constexpr float factor(int plane) { return (float)(1 << LOW) / (float)(1 << (BITS * plane)); }
};
template <int DIM, int BITS> struct Codes {
  using A = Part<DIM, BITS == 3 ? 2 : BITS, 0, 0>;
  using B = Part<DIM, BITS == 3 ? 1 : BITS, BITS == 3 ? 2 : 0, A::WIDTH>;
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
  __device__ __forceinline__ void copy_all(u32 to, int count, int lane, i64 token) {
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
      if (EVEN) {
        const int t = 32 / PIECES * k;
        if (TOTAL % 32 && TOTAL < 32 * (k + 1) && lane + 32 * k >= TOTAL) break;
        copy<PIECE>(to + place + F::place(t, 0), from + t * token, t + lane / PIECES < count);
      } else {
        const int i = lane + 32 * k, t = i / PIECES, o = i % PIECES * PIECE;
        if (TOTAL % 32 && i >= TOTAL) break;
        copy<PIECE>(to + F::place(t, o), from + (t - lane / PIECES) * token + o - lane % PIECES * PIECE, t < count);
      }
    }
  }
};
template <int DIM, int BITS, int TS> struct CodePlaces {
  using C = Codes<DIM, BITS>;
  static __device__ __forceinline__ constexpr int place(int t, int o) {
    return C::TWO && o >= C::A::WIDTH ? C::A::place(TS) + C::B::place(t) + o - C::A::WIDTH : C::A::place(t) + o;
  }
};
template <int ROW> struct Plain {
  static __device__ __forceinline__ constexpr int place(int t, int o) { return t * ROW + o; }
};

// The tokens of a row and head in a page; where these lie one after the other, from the token on that another page says.
__device__ __forceinline__ const u8* place(const Plan& plan, int page, int offset, const Warp& w) {
  const Page& at = plan.layout.pages[page];
  if (at.row < 0) {
    wait_for_last();
    const int first = ((const int*)plan.pages[-at.row])[w.row * plan.kv_heads + w.head];
    return plan.pages[page] + first * at.head + offset;
  }
  return plan.pages[page] + w.row * at.row + w.head * at.head + offset;
}

// Where the next tile of a side is read.
template <int DIM, int BITS, int PARAMS_, int TS, bool BY_CHANNEL, int GROUP> struct Reader {
  static constexpr int PARAMS = PARAMS_ ? PARAMS_ : 16, SETS = TS > GROUP ? TS / GROUP : 1;
  static constexpr bool PLAIN = !PARAMS_, BY_TOKEN = PARAMS_ && !BY_CHANNEL;
  Rows<Codes<DIM, BITS>::ROW, TS, CodePlaces<DIM, BITS, TS>> codes;
  Rows<PARAMS, BY_CHANNEL ? SETS : TS, Plain<PARAMS>> params;
  static constexpr bool WHOLE = BY_CHANNEL && TS % GROUP == 0;  // tiles are of as many groups each
  int step, group;
  __device__ __forceinline__ void start(int lane) {
    codes.start(lane);
    if (!PLAIN) params.start(lane);
  }
  __device__ __forceinline__ void open(const Plan& plan, const Side& s, const Warp& w, int done, int) {
    step = BITS == 16 ? s.token : Codes<DIM, BITS>::ROW;
    group = s.group;
    codes.open(place(plan, s.data, s.data_offset, w) + (i64)done * token(), w.lane, token());
    const i64 before = WHOLE ? (group + done) / GROUP : BY_CHANNEL ? 0 : done;
    if (!PLAIN) params.open(place(plan, s.params, s.params_offset, w) + before * PARAMS, w.lane, PARAMS);
  }
  __device__ __forceinline__ i64 token() const { return BITS == 16 ? (i64)step : (i64)Codes<DIM, BITS>::ROW; }
  // Scales of one or two bytes a token, four bytes at a time where they lie so.
  __device__ __forceinline__ void fetch_small(u32 to, int count, int lane) {
    const u8* from = params.from - lane * PARAMS;
    if (((u64)from & 3) == 0) {
      if (lane < TS * PARAMS / 4) copy<4>(to + 4 * lane, from + 4 * lane, 4 / PARAMS * lane < count);
    } else {
#pragma unroll
      for (int t = lane; t < TS; t += 32) copy<PARAMS>(to + PARAMS * t, from + PARAMS * t, t < count);
    }
  }
  __device__ __forceinline__ void fetch(u32 to, u32 to_params, int done, int count, int lane) {
    codes.copy_all(to, count, lane, token());
    if (BY_TOKEN && PARAMS <= 2) fetch_small(to_params, count, lane);
    else if (BY_TOKEN) params.copy_all(to_params, count, lane, PARAMS);
    if (BY_CHANNEL) {
      Rows<PARAMS, SETS, Plain<PARAMS>> here = params;
      if (!WHOLE) here.from += (i64)((group + done) / GROUP) * PARAMS;
      here.copy_all(to_params, SETS == 1 ? 1 : (count + GROUP - 1) / GROUP, lane, PARAMS);
    }
  }
  __device__ __forceinline__ void skip(int tiles, int, int) {
    codes.from += tiles * TS * token();
    if (BY_TOKEN) params.from += tiles * TS * PARAMS;
    if (WHOLE) params.from += tiles * SETS * PARAMS;
  }
};

// Where an index says which tokens of a page those of a run are.
__device__ __forceinline__ const int* index_of(const Plan& plan, const Side& s, const Warp& w) { return (const int*)place(plan, s.group & 255, s.data_offset, w); }
__device__ __forceinline__ bool scattered(const Side& s) { return (u32)s.group >> 8; }
// Whether the page has the token, which may lie in another.
__device__ __forceinline__ bool has(const Side& s, int slot) { return (u32)(slot - s.params_offset) < (u32)s.group >> 8; }

// Where the next tile is read of tokens that lie anyhow. Each lane has the slot of one of them, which came with the tile before.
template <class S> struct Gather;
template <int DIM, int BITS, int PARAMS_, int TS> struct Gather<Reader<DIM, BITS, PARAMS_, TS, false, 1>> {
  static constexpr int PARAMS = PARAMS_ ? PARAMS_ : 16;
  using C = Codes<DIM, BITS>;
  const u8 *data, *params;
  const int* index;
  int step, first, count, next;
  __device__ __forceinline__ void start(int) {}
  __device__ __forceinline__ void open(const Plan& plan, const Side& s, const Warp& w, int done, int left) {
    step = BITS == 16 ? s.token : C::ROW;
    data = place(plan, s.data, 0, w);
    params = PARAMS_ ? place(plan, s.params, 0, w) : data;
    index = index_of(plan, s, w) + done + w.lane;
    first = s.params_offset;
    count = scattered(s) ? (u32)s.group >> 8 : 0x7fffffff;
    wait_for_last();
    look(left, w.lane);
  }
  __device__ __forceinline__ void look(int left, int lane) { next = lane < TS && lane < left ? fresh(index) : -1; }
  template <int ROW, class F> __device__ __forceinline__ void copy_all(u32 to, const u8* from, int bytes, int slot, int lane) {
    constexpr int PIECE = gcd(16, ROW), PIECES = ROW / PIECE, TOTAL = TS * PIECES;
#pragma unroll
    for (int k = 0; k < (TOTAL + 31) / 32; k++) {
      const int i = lane + 32 * k, t = i / PIECES, o = i % PIECES * PIECE, at = __shfl_sync(~0u, slot, t & 31);
      if (TOTAL % 32 == 0 || i < TOTAL) copy<PIECE>(to + F::place(t, o), from + (i64)at * bytes + o, (u32)at < (u32)count);
    }
  }
  __device__ __forceinline__ void fetch(u32 to, u32 to_params, int, int, int lane) {
    const int slot = next - first;  // of no token it is negative
    copy_all<C::ROW, CodePlaces<DIM, BITS, TS>>(to, data, step, slot, lane);
    if (PARAMS_) copy_all<PARAMS, Plain<PARAMS>>(to_params, params, PARAMS, slot, lane);
  }
  __device__ __forceinline__ void skip(int tiles, int left, int lane) {
    index += tiles * TS;
    look(left, lane);
  }
};
