/* The products of a decode step, out = x w^T + bias, with weights as they lie in memory.
 *
 * A library's product reorders the weights first, at every call or once: at every call that costs more than the product of a few rows, and
 * once it costs a copy of the model for every new version of it. Here both factors are read along their rows, LANES numbers of the inner
 * dimension at a time, W rows of the weight by up to X rows of x, so nothing has to be reordered. Each number of the result is summed in the
 * same order whatever the number of rows and threads: lane by lane, then lanes pairwise, then what is left of the inner dimension. Where the
 * CPU multiplies pairs of bf16 numbers (AVX512_BF16), bf16 by bf16 is done so; where it multiplies whole tiles, see tiles.c.
 *
 * Compiled once for each instruction set (setup.py), as all files here; rlinf/kernels/cpu.py takes the one that the CPU has.
 */
#include "vectors.h"

#ifdef __AVX512F__
#define X 6 /* 24 sums, 4 weights and an x in 32 registers */
#else
#define X 3 /* 12 sums and 4 weights in 16 registers */
#endif
#define W 4
#define PANEL (1 << 15) /* weights that stay in the second cache while x goes by */
#define PARTS 8         /* of the weight for each thread: one that is held up leaves its own to the others */

/* What is multiplied. In PAIRS the result is bf16 or fp32, else fp32. */
enum { FP32 = 0, BF16_WEIGHT = 1, PAIRS = 2 };

typedef struct {
  const char *x;     /* [m, k], fp32; in PAIRS bf16 */
  const char *w;     /* [n, k], fp32 or bf16 */
  const float *bias; /* [n] or NULL */
  char *out;         /* [m, n] */
  ptrdiff_t m, n, k;
  int kind, rounded, parts, next; /* rounded: the result is bf16 */
} Product;

/* of a weight */
#define BYTES_OF(kind) BYTES((kind) != FP32)

/* Adds x by W rows of the weight to the sums of each lane, and returns how much of the inner dimension that was. */
INLINE ptrdiff_t add(floats sum[X][W], const float *x, const char *w, ptrdiff_t k, int rows, int kind) {
  ptrdiff_t j = 0;
  for (; j + LANES <= k; j += LANES) {
    floats v[W];
#pragma GCC unroll 4
    for (int b = 0; b < W; b++) v[b] = get(w, b * k + j, kind != FP32);
#pragma GCC unroll 6
    for (int a = 0; a < rows; a++) {
      floats u = *(const floats *)(x + a * k + j);
#pragma GCC unroll 4
      for (int b = 0; b < W; b++) sum[a][b] += u * v[b];
    }
  }
  return j;
}

/* The same for pairs of bf16 numbers, all of the inner dimension. */
INLINE void add_pairs(floats sum[X][W], const uint16_t *x, const uint16_t *w, ptrdiff_t k, int rows) {
#ifdef __AVX512BF16__
  for (ptrdiff_t j = 0; j < k; j += 2 * LANES) {
    const __mmask32 left = k - j < 2 * LANES ? ((__mmask32)1 << (k - j)) - 1 : ~(__mmask32)0;
    __m512i v[W];
#pragma GCC unroll 4
    for (int b = 0; b < W; b++) v[b] = _mm512_maskz_loadu_epi16(left, w + b * k + j);
#pragma GCC unroll 6
    for (int a = 0; a < rows; a++) {
      const __m512i u = _mm512_maskz_loadu_epi16(left, x + a * k + j);
#pragma GCC unroll 4
      for (int b = 0; b < W; b++) sum[a][b] = (floats)_mm512_dpbf16_ps((__m512)sum[a][b], (__m512bh)u, (__m512bh)v[b]);
    }
  }
#else
  (void)sum, (void)x, (void)w, (void)k, (void)rows; /* rlinf_multiplies_pairs says that nobody comes here */
#endif
}

/* W results side by side. */
INLINE void put(const Product *p, ptrdiff_t at, const float value[W]) {
#ifdef __AVX512BF16__
  if (p->rounded) {
    _mm_storel_epi64((void *)(p->out + 2 * at), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(value)));
    return;
  }
#endif
  memcpy(p->out + 4 * at, value, W * sizeof *value);
}

/* Rows i to i + rows of x by rows r to r + W of the weight. */
INLINE void tile(const Product *p, ptrdiff_t i, ptrdiff_t r, int rows, int kind) {
  const ptrdiff_t k = p->k;
  const float *x = (const float *)p->x + i * k; /* but in PAIRS */
  const char *w = p->w + r * k * BYTES_OF(kind);
  floats sum[X][W];
#pragma GCC unroll 6
  for (int a = 0; a < rows; a++)
#pragma GCC unroll 4
    for (int b = 0; b < W; b++) sum[a][b] = (floats){0};
  ptrdiff_t done = k;
  if (kind == PAIRS)
    add_pairs(sum, (const uint16_t *)p->x + i * k, (const uint16_t *)w, k, rows);
  else
    done = add(sum, x, w, k, rows, kind);
#pragma GCC unroll 6
  for (int a = 0; a < rows; a++) {
    const floats s = sums_of(sum[a][0], sum[a][1], sum[a][2], sum[a][3]);
    float out[W];
    memcpy(out, &s, sizeof out);
    for (ptrdiff_t q = done; q < k; q++)
      for (int b = 0; b < W; b++) out[b] += x[a * k + q] * get_one(w, b * k + q, kind != FP32);
    if (p->bias)
      for (int b = 0; b < W; b++) out[b] += p->bias[r + b];
    put(p, (i + a) * p->n + r, out);
  }
}

INLINE void tiles(const Product *p, ptrdiff_t i, ptrdiff_t r, int kind) {
  switch (p->m - i) {
    case 1: return tile(p, i, r, 1, kind);
    case 2: return tile(p, i, r, 2, kind);
#if X > 3
    case 3: return tile(p, i, r, 3, kind);
    case 4: return tile(p, i, r, 4, kind);
    case 5: return tile(p, i, r, 5, kind);
#endif
    default: return tile(p, i, r, X, kind);
  }
}

/* All of x by rows first to last of the weight: panels of them that stay in the cache, while x goes by. */
INLINE void rows(const Product *p, ptrdiff_t first, ptrdiff_t last, int kind) {
  const ptrdiff_t row = p->k * BYTES_OF(kind), panel = PANEL / p->k / W * W > W ? PANEL / p->k / W * W : W;
  const ptrdiff_t share = W * row * X / (p->m + X - 1);
  for (ptrdiff_t start = first; start < last; start += panel) {
    const ptrdiff_t end = start + panel < last ? start + panel : last;
    for (ptrdiff_t i = 0; i < p->m; i += X)
      for (ptrdiff_t r = start; r < end; r += W) {
        if (end < last) { /* each tile fetches its share of the next panel */
          const char *next = p->w + (r + panel) * row + i / X * share;
          for (ptrdiff_t at = 0; at < share; at += 64) __builtin_prefetch(next + at, 0, 2);
        }
        tiles(p, i, r + W <= last ? r : last - W, kind);
      }
  }
}

/* What each thread of the team does: parts of the weight's rows until none is left. Every part has at least W rows. */
static void work(void *data) {
  Product *p = data;
  int part;
  while ((part = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->parts) {
    const ptrdiff_t first = p->n / W * part / p->parts * W;
    const ptrdiff_t last = part + 1 == p->parts ? p->n : p->n / W * (part + 1) / p->parts * W;
    switch (p->kind) {
      case FP32: rows(p, first, last, FP32); break;
      case BF16_WEIGHT: rows(p, first, last, BF16_WEIGHT); break;
      default: rows(p, first, last, PAIRS);
    }
  }
}

/* Whether kind 2 of rlinf_linear can be had. */
int rlinf_multiplies_pairs(void) {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

/* kind 0: x [m, k] and w [n, k] are fp32. 1: w is bf16. 2: x and w are bf16, out [m, n] too if rounded. Else out is fp32, as is bias [n],
 * or NULL. All contiguous, n >= 4. */
void rlinf_linear(Team *team, int threads, int kind, const void *x, const void *w, const float *bias, void *out, int rounded, ptrdiff_t m,
                  ptrdiff_t n, ptrdiff_t k) {
  const ptrdiff_t parts = PARTS * threads, most = n / (4 * W) ? n / (4 * W) : 1;
  Product product = {x, w, bias, out, m, n, k, kind, rounded, (int)(parts < most ? parts : most), 0};
  run(team, threads, work, &product);
}
