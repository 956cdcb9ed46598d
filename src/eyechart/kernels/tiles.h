/* What the kernels of the CPU share: a tile of scores, a tile of mixtures, and exponentials.
 *
 * Queries (or keys) lie along the vector lanes, so that everything said of a row is plain vertical
 * arithmetic. Only vector extensions of GCC and Clang are used; widths follow the instruction set.
 */
#ifndef EYECHART_TILES
#define EYECHART_TILES
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

#endif
