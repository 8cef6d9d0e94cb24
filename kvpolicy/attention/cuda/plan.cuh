// What a launch is given: `Plan`, by value. Its last part, `Layout`, is the same for all layers of a step.
constexpr int DK = KEY_DIM, DV = VALUE_DIM, R = ROWS, WARPS = 4;
constexpr float RISE = 6.f, UNIT = 16777216.f;  // of a code: 2^-24
constexpr int SLOT = 8 * (DV + 4) + 16;  // floats: what a warp found for its columns, then maximum and sum of each
constexpr int PART = R * DV + R;         // of a block for its rows: means, and the logarithms of their weights
constexpr int MAPS = 4;                  // spaces of keys, and of values: the model's own, and those of transforms

struct Side {  // where the keys or the values of a run lie
  int data, params;                // pages
  int data_offset, params_offset;  // bytes from there
  int token, group;                // exact: bytes from token to token; per channel: tokens before the run in its first group;
                                   // with numbers of groups (params): bytes before their scales, and the page of these | the last group << 8;
                                   // by slot (group): the page of the index | slots of the page << 8, 0: all lie there; data_offset: bytes
                                   // before theirs in the index; params_offset: the slot of the page's first token
};
struct Run {  // neighbouring tokens of one kind
  Side k, v;
  int tokens;
  int column, slot;  // of its first token: column of the scores; column of the mask, -1 where `places` has it
  int causal;        // a query sees this many and its own number of tokens
};
struct Kind {
  int first, last, tiles;  // its runs
  int weight;              // what a tile costs, compared with those of other kinds
  u32 inverse;             // 2^32 / weight, rounded up
  int before;              // what the kinds before it cost whose values lie in the same space
  u8 query, space;         // which queries it takes, and which output its values add to
  u8 warps, pad;           // how many of a block serve it: all, or one or two where its tiles are few
  int start;               // what it costs a warp to begin with it, if they are few
};
struct Page {
  i64 row, head;  // bytes from row to row, and from head to head; or minus a page that says where these begin, and bytes of a token
};
struct Layout {
  u64 steps[MAPS];      // of each space of values what a block is to do, in 2^-32 of what tiles cost
  int parts[MAPS + 1];  // and the first block of a head
  int pad;
  Kind kinds[KINDS];
  int tiles[RUNS];  // of its kind before a run
  Run runs[RUNS];
  Page pages[PAGES];
};
struct Plan {
  i64 query_strides[MAPS][3];                                    // elements from row to row, head to head and query to query
  i64 mask_row, mask_head, mask_group, mask_query, mask_column;  // elements
  i64 places_row, places_head, out_space;                        // elements; out_space: from the output of one space to the next
  int kv_heads, groups, queries, parts, columns, spaces;         // groups: query heads per KV head; parts: blocks of a head
  float scale, cap, hidden;                                      // scale includes log2(e), cap too; hidden: what of a mask hides
  u32 inverse;                                                   // 2^32 / kv_heads, rounded up
  const u8* query[MAPS];  // the model's, then in float16 those for transformed keys
  const u8 *mask, *places;
  u8* out;
  float *lse, *partial, *scores, *sums;
  const float* sinks;
  u32* counters;
  const u8* pages[PAGES];
  Layout layout;
};
struct Warp {
  int lane, row, head, base;  // base: the first of its query rows
  int busy[WARPS];            // what the warps of the block have had to do, as `weight` counts
  int from[WARPS], all;       // the round of tiles in which each begins with a kind, and from which on all take part
  int stride;                 // then from a warp's tile to its next one
  u32 ring, scratch, more;    // of the kind at hand, after its tiles: what its keys put there, and its values (more)
  float* slot;
  bool filled;
};
