/* Exact causal attention together with the statistics of its rows and columns, on the CPU.
 *
 * Plain attention, tiled: a block of queries meets the keys chunk by chunk, and with the scores of a
 * chunk still in the first-level cache its softmax, its statistics and its mixture of values are
 * carried on (online softmax). Queries lie along the vector lanes, so that everything said of a row is
 * plain vertical arithmetic. The exponentials of one block of queries are kept (ROWS x length numbers
 * a thread): what each key received needs the normaliser of every row, known only at the end.
 *
 * Only vector extensions of GCC and Clang are used; widths follow the instruction set.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* TILE x VECTORS accumulators, VECTORS operands and one broadcast must fit the register file. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE 8
#elif defined(__AVX2__)
#define LANES 8
#define TILE 4
#else
#define LANES 4
#define TILE 4
#endif
#define VECTORS 3
#define ROWS (LANES * VECTORS)
#define CHUNK 64
#define MASKED -1e30f /* finite, so that a difference of two of them is no NaN */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef struct {
  const float *q, *k, *v; /* last axis contiguous; strides of batch, head and position below */
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;
  int64_t batch, heads, kv_heads, length, width, value_width;
  float scale, softcap;   /* softcap 0: none */
  const int32_t *start;   /* [batch length]: first key a query sees; NULL: key 0 */
  const float *sinks;     /* [heads]: learned sink logits; NULL: none */
  const int32_t *lengths; /* [batch]: real tokens; later queries do not count in received */
  float *output;          /* [batch length heads value_width] */
  float *first, *diagonal, *previous, *entropy, *largest, *distance, *lse; /* [batch heads length] */
  /* `carry` reads lse and writes none of these */
  float *virtual_sink;    /* likewise; NULL where there are no sinks */
  float *received;        /* [batch heads segments length]: sums, one part a segment of queries */
  int64_t segments, threads;
  const float *rows;      /* [batch length count]: what `carry` multiplies with the attention ... */
  float *carried;         /* [batch heads count length]: ... and what comes of it */
  int64_t count;          /* a multiple of TILE is fastest */
  const float *pull;      /* [batch length heads value_width]: derivative with respect to output */
  const float *delta;     /* [batch heads length]: its product with output, row by row */
  float *q_pull;          /* [batch heads length width]: what `pull` makes of it */
  float *k_pull, *v_pull; /* [batch kv_heads length width or value_width] */
} Attention;

static inline vec all(float x) { return x - (vec){0}; }
static inline vec pick(ivec c, vec a, vec b) { return (vec)((c & (ivec)a) | (~c & (ivec)b)); }
static inline vec *at(float *p, int64_t row) { return (vec *)(p + row * ROWS); }

static inline float sum_of(vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* exp for x <= 0 to two units in the last place, 0 below -87 (Cephes' minimax polynomial). */
static inline vec exp_of(vec x) {
  const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  ivec alive = x > all(-87.0f);
  x = pick(alive, x, all(-87.0f));
  vec shifted = x * 1.44269504088896341f + magic;
  vec n = shifted - magic;
  vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vec)(alive & ((ivec)p + ((ivec)shifted << 23)));
}

static inline vec tanh_of(vec x) {
  ivec negative = x < all(0.0f);
  vec t = exp_of(pick(negative, x, -x) * 2.0f);
  vec y = (1.0f - t) / (1.0f + t);
  return pick(negative, -y, y);
}

/* s[key][query] = k[key] . q[:, query] for up to CHUNK keys; q is [width][ROWS]. */
static void score(float *s, const float *q, const float *k, int64_t k_row, int count, int width) {
  for (int j = 0; j < count; j += TILE) {
    const float *key[TILE];
    for (int t = 0; t < TILE; t++) key[t] = k + (j + t < count ? j + t : count - 1) * k_row;
    vec sum[TILE][VECTORS] = {0};
    for (int c = 0; c < width; c++) {
      const vec *query = (const vec *)(q + c * ROWS);
      vec a = query[0], b = query[1], d = query[2];
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) {
        vec x = all(key[t][c]);
        sum[t][0] += x * a, sum[t][1] += x * b, sum[t][2] += x * d;
      }
    }
    for (int t = 0; t < TILE; t++)
      for (int u = 0; u < VECTORS; u++) at(s, j + t)[u] = sum[t][u];
  }
}

/* o[c][query] += sum over keys of v[key][c] p[key][query], for `wide` columns of v. */
static inline __attribute__((always_inline)) void mix_tile(
    float *o, const float *p, const float *v, int64_t v_row, int count, const int wide) {
  vec sum[TILE][VECTORS];
#pragma GCC unroll 8
  for (int t = 0; t < wide; t++)
    for (int u = 0; u < VECTORS; u++) sum[t][u] = at(o, t)[u];
  for (int j = 0; j < count; j++) {
    const vec *mass = (const vec *)(p + j * ROWS);
    const float *value = v + j * v_row;
    vec a = mass[0], b = mass[1], d = mass[2];
#pragma GCC unroll 8
    for (int t = 0; t < wide; t++) {
      vec x = all(value[t]);
      sum[t][0] += x * a, sum[t][1] += x * b, sum[t][2] += x * d;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < wide; t++)
    for (int u = 0; u < VECTORS; u++) at(o, t)[u] = sum[t][u];
}

static void mix(float *o, const float *p, const float *v, int64_t v_row, int count, int width) {
  int c = 0;
  for (; c + TILE <= width; c += TILE) mix_tile(o + c * ROWS, p, v + c, v_row, count, TILE);
  for (; c < width; c++) mix_tile(o + c * ROWS, p, v + c, v_row, count, 1);
}

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
  for (int64_t i0 = j0 / CHUNK * CHUNK; i0 < n; i0 += CHUNK) {
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

/* p = exp(s - lse), and ds = p (dp - delta), the derivative with respect to the scores before scale
 * and soft cap. `lse` and `delta` advance with the row of s where `step` is 1, else along its lanes. */
static void slope(const Attention *a, float *s, float *ds, const float *lse, const float *delta,
                  int step, int many) {
  for (int i = 0; i < many; i++)
    for (int u = 0; u < VECTORS; u++) {
      vec shift = step ? all(lse[i]) : *(const vec *)(lse + u * LANES);
      vec mean = step ? all(delta[i]) : *(const vec *)(delta + u * LANES);
      vec x = at(s, i)[u], bend = all(1.0f);
      if (a->softcap > 0) {
        vec t = tanh_of(x / a->softcap);
        x = t * a->softcap, bend = 1.0f - t * t;
      }
      vec p = exp_of(x - shift);
      at(ds, i)[u] = p * (at(ds, i)[u] - mean) * bend;
      at(s, i)[u] = p;
    }
}

/* Derivatives with respect to a block of keys and values, from all queries of their heads. */
static void pull_keys(const Attention *a, int64_t b, int64_t g, int64_t j0, float *memory) {
  const int64_t n = a->length, shared = a->heads / a->kv_heads;
  const int width = a->width, value_width = a->value_width;
  const float *k = a->k + b * a->k_batch + g * a->k_head, *v = a->v + b * a->v_batch + g * a->v_head;
  float *s = memory, *ds = s + (CHUNK + TILE) * ROWS, *keys = ds + (CHUNK + TILE) * ROWS;
  float *values = keys + width * ROWS, *ok = values + value_width * ROWS, *ov = ok + width * ROWS;
  for (int r = 0; r < ROWS; r++) {
    const int64_t key = j0 + r < n ? j0 + r : n - 1;
    for (int c = 0; c < width; c++) keys[c * ROWS + r] = k[key * a->k_row + c] * a->scale;
    for (int c = 0; c < value_width; c++) values[c * ROWS + r] = v[key * a->v_row + c];
  }
  memset(ok, 0, sizeof(float) * (width + value_width) * ROWS);
  for (int64_t h = g * shared; h < (g + 1) * shared; h++) {
    const float *q = a->q + b * a->q_batch + h * a->q_head;
    const float *pull = a->pull + (b * n * a->heads + h) * value_width;
    const int64_t row = a->heads * value_width, head = (b * a->heads + h) * n;
    for (int64_t i0 = j0 / CHUNK * CHUNK; i0 < n; i0 += CHUNK) {
      const int many = n - i0 < CHUNK ? n - i0 : CHUNK;
      score(s, keys, q + i0 * a->q_row, a->q_row, many, width);
      score(ds, values, pull + i0 * row, row, many, value_width);
      slope(a, s, ds, a->lse + head + i0, a->delta + head + i0, 1, many);
      if (i0 < j0 + ROWS || a->start)
        for (int i = 0; i < many; i++) {
          const int64_t start = a->start ? a->start[b * n + i0 + i] : 0;
          for (int r = 0; r < ROWS; r++)
            if (j0 + r > i0 + i || j0 + r < start) s[i * ROWS + r] = ds[i * ROWS + r] = 0;
        }
      mix(ov, s, pull + i0 * row, row, many, value_width);
      mix(ok, ds, q + i0 * a->q_row, a->q_row, many, width);
    }
  }
  const int64_t to = (b * a->kv_heads + g) * n + j0;
  for (int r = 0; r < ROWS && j0 + r < n; r++) {
    for (int c = 0; c < width; c++) a->k_pull[(to + r) * width + c] = ok[c * ROWS + r] * a->scale;
    for (int c = 0; c < value_width; c++) a->v_pull[(to + r) * value_width + c] = ov[c * ROWS + r];
  }
}

/* Derivatives with respect to a block of queries. */
static void pull_queries(const Attention *a, int64_t b, int64_t h, int64_t i0, float *memory) {
  const int64_t n = a->length, g = h / (a->heads / a->kv_heads), row = a->heads * a->value_width;
  const int width = a->width, value_width = a->value_width;
  const float *q = a->q + b * a->q_batch + h * a->q_head;
  const float *k = a->k + b * a->k_batch + g * a->k_head, *v = a->v + b * a->v_batch + g * a->v_head;
  const float *pull = a->pull + (b * n * a->heads + h) * value_width;
  float *s = memory, *ds = s + (CHUNK + TILE) * ROWS, *queries = ds + (CHUNK + TILE) * ROWS;
  float *pulls = queries + width * ROWS, *o = pulls + value_width * ROWS;
  float lse[ROWS], delta[ROWS];
  int64_t start[ROWS], low = n, high = 0;
  for (int r = 0; r < ROWS; r++) {
    const int64_t i = i0 + r < n ? i0 + r : n - 1;
    lse[r] = a->lse[(b * a->heads + h) * n + i], delta[r] = a->delta[(b * a->heads + h) * n + i];
    start[r] = a->start ? a->start[b * n + i] : 0;
    if (start[r] < low) low = start[r];
    if (start[r] > high) high = start[r];
    for (int c = 0; c < width; c++) queries[c * ROWS + r] = q[i * a->q_row + c] * a->scale;
    for (int c = 0; c < value_width; c++) pulls[c * ROWS + r] = pull[i * row + c];
  }
  memset(o, 0, sizeof(float) * width * ROWS);
  const int64_t end = i0 + ROWS < n ? i0 + ROWS : n;
  for (int64_t j0 = low / CHUNK * CHUNK; j0 < end; j0 += CHUNK) {
    const int many = end - j0 < CHUNK ? end - j0 : CHUNK;
    score(s, queries, k + j0 * a->k_row, a->k_row, many, width);
    score(ds, pulls, v + j0 * a->v_row, a->v_row, many, value_width);
    slope(a, s, ds, lse, delta, 0, many);
    if (j0 + many - 1 > i0 || j0 < high)
      for (int j = 0; j < many; j++)
        for (int r = 0; r < ROWS; r++)
          if (j0 + j > i0 + r || j0 + j < start[r]) ds[j * ROWS + r] = 0;
    mix(o, ds, k + j0 * a->k_row, a->k_row, many, width);
  }
  for (int r = 0; r < ROWS && i0 + r < n; r++)
    for (int c = 0; c < width; c++)
      a->q_pull[((b * a->heads + h) * n + i0 + r) * width + c] = o[c * ROWS + r] * a->scale;
}

/* Derivatives of attention. Returns 1 where memory ran out, and then nothing is to be used. */
int pull(const Attention *a) {
  const int64_t blocks = (a->length + ROWS - 1) / ROWS;
  const int64_t keys = a->batch * a->kv_heads * blocks, queries = a->batch * a->heads * blocks;
  int failed = 0;
#pragma omp parallel num_threads((int)a->threads)
  {
    size_t rows = 2 * (CHUNK + TILE + a->width + a->value_width);
    float *memory = aligned_alloc(64, (rows * ROWS * sizeof(float) + 63) / 64 * 64);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    /* Early keys are seen by the most queries and late queries see the most keys: they come first. */
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < keys + queries; t++) {
      if (!memory) continue;
      const int64_t of = t < keys ? a->batch * a->kv_heads : a->batch * a->heads;
      const int64_t head = (t < keys ? t : t - keys) % of, at = (t < keys ? t : t - keys) / of;
      if (t < keys)
        pull_keys(a, head / a->kv_heads, head % a->kv_heads, at * ROWS, memory);
      else
        pull_queries(a, head / a->heads, head % a->heads, (blocks - 1 - at) * ROWS, memory);
    }
    free(memory);
  }
  return failed;
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
