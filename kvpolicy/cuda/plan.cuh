// The plan that a launch is given.
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
