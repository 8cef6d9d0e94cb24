// Tokens of several layers moved within their pages. What comes before this file defines PIECES and UNIT (bytes of a
// word, 4 or 16).
typedef unsigned char u8;
typedef long long i64;

struct Piece {
  u8* page;
  const i64 *from, *to;  // tokens, by row and head
};
struct Given {
  i64 row, head, token;                            // bytes
  i64 from_row, from_head, to_row, to_head;        // numbers from row to row and head to head, 0 where all have the same
  int heads, tokens, words, count;                 // words: of a token; count: words of all tokens, heads and rows
  Piece pieces[PIECES];
};
extern "C" { __constant__ int SHARED_BYTES = 0; }

extern "C" __global__ void __launch_bounds__(128) shift(const __grid_constant__ Given given) {
  const Piece& piece = given.pieces[blockIdx.y];
  const int at = blockIdx.x * 128 + threadIdx.x;
  if (at >= given.count) return;
  const int word = at % given.words, token = at / given.words % given.tokens, rest = at / given.words / given.tokens;
  const int head = rest % given.heads, row = rest / given.heads;
  u8* const page = piece.page + row * given.row + head * given.head + word * UNIT;
  const i64 from = piece.from[row * given.from_row + head * given.from_head + token];
  const i64 to = piece.to[row * given.to_row + head * given.to_head + token];
  if (UNIT == 16) *(uint4*)(page + to * given.token) = *(const uint4*)(page + from * given.token);
  else *(unsigned int*)(page + to * given.token) = *(const unsigned int*)(page + from * given.token);
}
