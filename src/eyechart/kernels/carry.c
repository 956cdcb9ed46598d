/* Row vectors times attention, which carries a row of a product of attention matrices one layer on. */
#include "tiles.h"

/* Row vectors times attention: carried[m][j] = sum_i rows[i][m] exp(s_ij - lse_i).
 *
 * The forward pass the other way round: a block of keys lies along the vector lanes and the queries
 * that see it stream by, with what the rows hold for them in the place of values.
 */
static void carry_block(const Attention *a, int64_t b, int64_t h, int64_t j0, float *memory) {
  const int64_t n = a->length, g = h / (a->heads / a->kv_heads), count = a->count;
  const float *q = a->q + b * a->q_batch + h * a->q_head;
  const float *k = a->k + b * a->k_batch + g * a->k_head;
  const float *lse = a->lse + (b * a->heads + h) * n, *rows = a->rows + b * n * count;
  float *s = memory, *keys = s + (CHUNK + TILE) * ROWS, *o = keys + a->width * ROWS;
  for (int r = 0; r < ROWS; r++) {
    const int64_t key = j0 + r < n ? j0 + r : n - 1; /* lanes past the end repeat the last key */
    for (int c = 0; c < a->width; c++) keys[c * ROWS + r] = k[key * a->k_row + c] * a->scale;
  }
  memset(o, 0, sizeof(float) * count * ROWS);
  for (int64_t i0 = j0; i0 < n; i0 += CHUNK) { /* earlier queries see none of it */
    const int many = n - i0 < CHUNK ? n - i0 : CHUNK;
    int used = 0, hidden = i0 < j0 + ROWS;
    for (int64_t x = 0; x < many * count && !used; x++) used = rows[i0 * count + x] != 0;
    if (used && a->start) {
      int64_t low = n, high = 0;
      for (int i = 0; i < many; i++) {
        const int64_t start = a->start[b * n + i0 + i];
        if (start < low) low = start;
        if (start > high) high = start;
      }
      used = low < j0 + ROWS, hidden |= high > j0;
    }
    if (!used) continue;
    score(s, keys, q + i0 * a->q_row, a->q_row, many, a->width);
    for (int i = 0; i < many; i++)
      for (int u = 0; u < VECTORS; u++) {
        vec x = at(s, i)[u];
        if (a->softcap > 0) x = tanh_of(x / a->softcap) * a->softcap;
        at(s, i)[u] = exp_of(x - lse[i0 + i]);
      }
    if (hidden)
      for (int i = 0; i < many; i++) {
        const int64_t start = a->start ? a->start[b * n + i0 + i] : 0;
        for (int r = 0; r < ROWS; r++)
          if (j0 + r > i0 + i || j0 + r < start) s[i * ROWS + r] = 0;
      }
    mix(o, s, rows + i0 * count, count, many, count);
  }
  for (int64_t m = 0; m < count; m++)
    for (int r = 0; r < ROWS && j0 + r < n; r++)
      a->carried[((b * a->heads + h) * count + m) * n + j0 + r] = o[m * ROWS + r];
}

/* All heads of one layer. Returns 1 where memory ran out, and then nothing is to be used. */
int carry(const Attention *a) {
  const int64_t blocks = (a->length + ROWS - 1) / ROWS, heads = a->batch * a->heads;
  int failed = 0;
#pragma omp parallel num_threads((int)a->threads)
  {
    size_t rows = CHUNK + TILE + a->width + a->count;
    float *memory = aligned_alloc(64, (rows * ROWS * sizeof(float) + 63) / 64 * 64);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    /* Early keys are seen by the most queries: they come first. */
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * blocks; t++)
      if (memory) carry_block(a, t % heads / a->heads, t % heads % a->heads, t / heads * ROWS, memory);
    free(memory);
  }
  return failed;
}
