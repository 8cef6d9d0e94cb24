// What a kernel that sums up a prompt's attention is given, and where its second pass begins.
struct Given {
  i64 query_row, query_head, query_token, key_row, key_head, key_token;  // elements
  i64 mask_row, mask_head, mask_query, mask_token;                       // elements
  const u8 *query, *keys, *mask;
  const int* at;  // which queries count: `count` of them, ascending, then the last again, up to `room`
  float* lse;     // of base 2; pass 1 writes [splits, rows, heads, room], pass 2 reads [rows, heads, room]; infinite: counts nothing
  float* out;     // [splits, rows, kv_heads, tokens]
  const int* ends;  // pass 2 on warpgroups: tiles of queries that see each block of tokens, summed up from 0 on
  int rows, lines;  // and how many rows and heads blocks work at together
  int count, room, tokens, heads, groups, offset, splits, causal;  // offset: tokens before the first query
  float scale, cap;                                                // with log2(e)
};

// The first query, of those that count, that sees a token.
__device__ __forceinline__ int first_that_sees(const Given& g, int token) {
  int low = 0, high = g.causal ? max(0, min(g.count, token - g.offset)) : 0;
  if (high && g.at[high - 1] + g.offset < token) return high;  // all count
  while (low < high) {
    const int middle = (low + high) / 2;
    if (g.at[middle] + g.offset < token) low = middle + 1;
    else high = middle;
  }
  return low;
}
