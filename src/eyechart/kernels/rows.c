/* Exact causal attention together with the statistics of its rows and columns, on the CPU.
 *
 * Plain attention, tiled: a block of queries meets the keys chunk by chunk, and with the scores of a
 * chunk still in the first-level cache its softmax, its statistics and its mixture of values are
 * carried on (online softmax). The exponentials of one block of queries are kept (ROWS x length
 * numbers a thread): what each key received needs the normaliser of every row, known only at the end.
 */
#include "tiles.h"

/* What a thread needs for one block of queries. */
typedef struct {
  float *mass;    /* [keys][ROWS]: scores, then their exponentials against `top` at that time */
  float *q, *o;   /* [width][ROWS], [value_width][ROWS] */
  float *tops;    /* [chunks][ROWS]: the row maxima each chunk's exponentials are relative to */
} Room;

/* One block of queries of one head, from row i0 on. */
static void block(const Attention *a, int64_t b, int64_t h, int64_t i0, Room room, float *received) {
  const int64_t n = a->length, g = h / (a->heads / a->kv_heads);
  const int width = a->width, value_width = a->value_width;
  const float *q = a->q + b * a->q_batch + h * a->q_head;
  const float *k = a->k + b * a->k_batch + g * a->k_head;
  const float *v = a->v + b * a->v_batch + g * a->v_head;
  const int64_t end = i0 + ROWS < n ? i0 + ROWS : n; /* keys that any of these queries sees */
  int64_t low = n, high = 0;                         /* smallest and largest first key */
  int32_t row[ROWS], start[ROWS];
  float place[ROWS], to_first[ROWS], to_self[ROWS], to_previous[ROWS];
  for (int r = 0; r < ROWS; r++) {
    row[r] = i0 + r < n ? i0 + r : n - 1; /* lanes past the end repeat the last query */
    place[r] = row[r];
    start[r] = a->start ? a->start[b * n + row[r]] : 0;
    if (start[r] < low) low = start[r];
    if (start[r] > high) high = start[r];
    to_first[r] = to_self[r] = to_previous[r] = MASKED;
    for (int c = 0; c < width; c++) room.q[c * ROWS + r] = q[row[r] * a->q_row + c] * a->scale;
  }
  memset(room.o, 0, sizeof(float) * value_width * ROWS);
  vec top[VECTORS], sum[VECTORS], spread[VECTORS], reach[VECTORS];
  for (int u = 0; u < VECTORS; u++) {
    top[u] = all(MASKED);
    sum[u] = spread[u] = reach[u] = (vec){0};
  }
  const int64_t begin = low / CHUNK * CHUNK;
  for (int64_t j0 = begin; j0 < end; j0 += CHUNK) {
    const int count = end - j0 < CHUNK ? end - j0 : CHUNK;
    float *s = room.mass + (j0 - begin) * ROWS;
    score(s, room.q, k + j0 * a->k_row, a->k_row, count, width);
    if (a->softcap > 0)
      for (int j = 0; j < count; j++)
        for (int u = 0; u < VECTORS; u++)
          at(s, j)[u] = tanh_of(at(s, j)[u] / a->softcap) * a->softcap;
    if (j0 + count - 1 > i0 || j0 < high)
      for (int j = 0; j < count; j++)
        for (int r = 0; r < ROWS; r++)
          if (j0 + j > row[r] || j0 + j < start[r]) s[j * ROWS + r] = MASKED;
    if (j0 == 0) memcpy(to_first, s, sizeof to_first);
    if (j0 + count >= i0)
      for (int r = 0; r < ROWS; r++) {
        int64_t self = row[r] - j0;
        if (self >= 0 && self < count) to_self[r] = s[self * ROWS + r];
        if (self >= 1 && self <= count) to_previous[r] = s[(self - 1) * ROWS + r];
      }
    for (int u = 0; u < VECTORS; u++) {
      vec highest = top[u];
      for (int j = 0; j < count; j++) highest = pick(at(s, j)[u] > highest, at(s, j)[u], highest);
      vec fall = top[u] - highest;
      int rises = 0;
      for (int i = 0; i < LANES; i++) rises |= fall[i] < 0;
      if (rises) {
        vec shrink = exp_of(fall);
        /* spread is the sum of x log x with x = exp(s - top): it shifts with the top. */
        spread[u] = shrink * (spread[u] + fall * sum[u]);
        sum[u] *= shrink, reach[u] *= shrink;
        for (int c = 0; c < value_width; c++) at(room.o, c)[u] *= shrink;
        top[u] = highest;
      }
      at(room.tops, (j0 - begin) / CHUNK)[u] = highest;
      /* Sums of a chunk first: a long row added up one by one would lose digits. */
      vec mass = {0}, logs = {0}, steps = {0}, away = ((vec *)place)[u] - (float)j0;
      for (int j = 0; j < count; j++) {
        vec z = at(s, j)[u] - highest;
        vec x = exp_of(z);
        at(s, j)[u] = x;
        mass += x, logs += x * z, steps += x * away;
        away -= 1.0f;
      }
      sum[u] += mass, spread[u] += logs, reach[u] += steps;
    }
    mix(room.o, s, v + j0 * a->v_row, a->v_row, count, value_width);
  }
  vec weight[VECTORS];
  for (int r = 0; r < ROWS; r++) {
    const float m = ((float *)top)[r], keys = ((float *)sum)[r];
    const float sink = a->sinks ? a->sinks[h] : -INFINITY, peak = sink > m ? sink : m;
    const float sunk = expf(sink - peak), total = keys * expf(m - peak) + sunk;
    const float share = expf(m - peak) / total; /* of the key with the highest score */
    const float lse = logf(total) + (peak - m); /* above that score */
    ((float *)weight)[r] = i0 + r < n && i0 + r < a->lengths[b] ? share : 0;
    if (i0 + r >= n) continue;
    const int64_t to = (b * a->heads + h) * n + i0 + r;
    a->first[to] = expf(to_first[r] - m) * share;
    a->diagonal[to] = expf(to_self[r] - m) * share;
    a->previous[to] = expf(to_previous[r] - m) * share;
    a->largest[to] = share;
    a->distance[to] = ((float *)reach)[r] * share;
    a->entropy[to] = keys * share * lse - ((float *)spread)[r] * share;
    a->lse[to] = m + lse;
    if (a->virtual_sink) a->virtual_sink[to] = sunk / total;
    float *out = a->output + ((b * n + i0 + r) * a->heads + h) * value_width;
    for (int c = 0; c < value_width; c++) out[c] = room.o[c * ROWS + r] * share;
  }
  for (int64_t j0 = begin; j0 < end; j0 += CHUNK) {
    const int count = end - j0 < CHUNK ? end - j0 : CHUNK;
    vec w[VECTORS];
    for (int u = 0; u < VECTORS; u++)
      w[u] = exp_of(at(room.tops, (j0 - begin) / CHUNK)[u] - top[u]) * weight[u];
    for (int j = 0; j < count; j++) {
      const vec *x = at(room.mass, j0 - begin + j);
      received[j0 + j] += sum_of(x[0] * w[0] + x[1] * w[1] + x[2] * w[2]);
    }
  }
}

/* All heads of one layer. Returns 1 where memory ran out, and then nothing is to be used. */
int attend(const Attention *a) {
  const int64_t n = a->length, blocks = (n + ROWS - 1) / ROWS, heads = a->batch * a->heads;
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  int failed = 0;
#pragma omp parallel num_threads((int)a->threads)
  {
    size_t rows = chunks * CHUNK + TILE + a->width + a->value_width + chunks;
    float *memory = aligned_alloc(64, (rows * ROWS * sizeof(float) + 63) / 64 * 64);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    Room room = {.mass = memory};
    room.q = room.mass + (chunks * CHUNK + TILE) * ROWS;
    room.o = room.q + a->width * ROWS;
    room.tops = room.o + a->value_width * ROWS;
    /* Segments of one head have equal numbers of scores, and sums of their own, so that the result
     * does not depend on which thread came first. */
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < heads * a->segments; t++) {
      if (!memory) continue;
      const int64_t head = t % heads, segment = a->segments - 1 - t / heads;
      const int64_t from = llround(blocks * sqrt((double)segment / a->segments));
      const int64_t to = llround(blocks * sqrt((segment + 1.0) / a->segments));
      float *received = a->received + (head * a->segments + segment) * n;
      memset(received, 0, sizeof(float) * n);
      for (int64_t i = from; i < to; i++)
        block(a, head / a->heads, head % a->heads, i * ROWS, room, received);
    }
    free(memory);
  }
  return failed;
}
