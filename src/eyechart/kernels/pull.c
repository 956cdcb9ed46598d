/* Derivatives of attention with respect to queries, keys and values.
 *
 * Nothing of the forward pass is kept but the log-sum-exp of each row: scores are computed again,
 * once with keys along the lanes, for keys and values, and once with queries there.
 */
#include "tiles.h"

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
    for (int64_t i0 = j0; i0 < n; i0 += CHUNK) {
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
