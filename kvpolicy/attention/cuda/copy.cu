// Tokens of several layers written to where their stores keep them. What comes before this file defines PIECES.
typedef unsigned char u8;
typedef long long i64;

struct Piece {
  const u8* from;
  u8* to;
};
struct Given {
  i64 from_row, from_head, from_token;  // bytes
  i64 to_row, to_head, to_token;
  int heads, tokens, words, count;  // words: of a token, 16 bytes each; count: words of all tokens, heads and rows
  Piece pieces[PIECES];
};
extern "C" { __constant__ int SHARED_BYTES = 0; }

extern "C" __global__ void __launch_bounds__(128) copy(const __grid_constant__ Given given) {
  const Piece& piece = given.pieces[blockIdx.y];
  const int at = blockIdx.x * 128 + threadIdx.x;
  if (at >= given.count) return;
  const int word = at % given.words, token = at / given.words % given.tokens, rest = at / given.words / given.tokens;
  const int head = rest % given.heads, row = rest / given.heads;
  const i64 from = row * given.from_row + head * given.from_head + token * given.from_token + word * 16;
  const i64 to = row * given.to_row + head * given.to_head + token * given.to_token + word * 16;
  *(uint4*)(piece.to + to) = *(const uint4*)(piece.from + from);
}
