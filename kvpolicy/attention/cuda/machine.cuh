// What the machine does: conversions, products of tensor cores, and copies to shared memory.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
constexpr float LOWEST = -1e30f;  // below all scores, and a number
#define INFINITE __uint_as_float(0x7f800000u)

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
// Launches overlap where the card can: the next one may begin, and this one waits for the last one before it reads what
// that has written, or writes. To wait again takes no time.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A number that the last launch may have written: no load that may be moved ahead of the wait.
__device__ __forceinline__ int fresh(const int* at) {
  int x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}
// One more of those that count to `last`, after all that this block has written; what others wrote before they counted
// can be read afterwards. Returns how many there were before.
__device__ __forceinline__ u32 count(u32* at, u32 last) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(last) : "memory");
  return before;
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
__device__ __forceinline__ void store_four(u32 at, const u32 x[4]) { asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory"); }
// Words at an address that is known only once the last launch has ended.
template <int N> __device__ __forceinline__ void look_up(u32* x, const u8* from) {
  if (N == 4) {
    const uint4 v = __ldg((const uint4*)from);
    x[0] = v.x, x[1 % N] = v.y, x[2 % N] = v.z, x[3 % N] = v.w;
  } else if (N == 2) {
    const uint2 v = __ldg((const uint2*)from);
    x[0] = v.x, x[1 % N] = v.y;
  } else {
    x[0] = __ldg((const u32*)from);
  }
}
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
  } else if (N == 2) {
    const u16 x = there ? *(const u16*)from : (u16)0;
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
  } else {
    const u32 x = there ? *from : 0u;
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(x) : "memory");
  }
}
