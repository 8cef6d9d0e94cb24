// The attention weights of the only query of an update, those of the query heads of a KV head as one, from scores in units
// of log2 and log2 of their sums: in one pass. Weights are added in the order in which PyTorch adds them up.
// What comes before this file defines COLUMNS, those of a thread.
typedef long long i64;

struct Given {
  const float* scores;  // of each line those of the groups, one after the other
  const float* sums;    // of each line, one a group
  float* to;
  float factor;  // of all results: 1, or one by the number of groups for a mean
  int groups, columns;
};
extern "C" { __constant__ int SHARED_BYTES = 0; }

extern "C" __global__ void __launch_bounds__(128) heads(const __grid_constant__ Given given) {
  const i64 line = blockIdx.x;
  const int first = blockIdx.y * 128 * COLUMNS + threadIdx.x;
  const float* from = given.scores + line * given.groups * given.columns;
  float total[COLUMNS][4] = {};
  for (int group = 0; group < given.groups; group += 4)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (group + i < given.groups) {
        const float sum = given.sums[line * given.groups + group + i];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const int column = first + c * 128;
          if (column >= given.columns) continue;
          const float weight = exp2f(__fsub_rn(from[(i64)(group + i) * given.columns + column], sum));
          total[c][i] = __fadd_rn(total[c][i], weight);
        }
      }
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    const int column = first + c * 128;
    if (column >= given.columns) continue;
    const float all = __fadd_rn(__fadd_rn(__fadd_rn(total[c][0], total[c][1]), total[c][2]), total[c][3]);
    given.to[line * given.columns + column] = __fmul_rn(all, given.factor);
  }
}
