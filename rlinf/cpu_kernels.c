/* What weights on a CPU need: products with them as they lie in memory, and a look at each byte of theirs on its way.
 *
 * Products of a decode step, out = x w^T + bias. A library's product reorders the weights first, at every call or once: at every call that costs more than the product of a few rows, and
 * once it costs a copy of the model for every new version of it. Here both factors are read along their rows, LANES numbers of the inner
 * dimension at a time, W rows of the weight by up to X rows of x, so nothing has to be reordered. Each number of the result is summed in the
 * same order whatever the number of rows and threads: lane by lane, then lanes pairwise, then what is left of the inner dimension.
 *
 * Compiled once for each instruction set (setup.py); rlinf/cpu_kernels.py takes the one that the CPU has.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define X 6 /* 24 sums, 4 weights and an x in 32 registers */
#define STREAM(to, words) _mm512_stream_si512((void *)(to), (__m512i)(words))
#define EVEN (ints){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}
#define ODD (ints){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}
#else
#define LANES 8
#define X 3 /* 12 sums and 4 weights in 16 registers */
#define STREAM(to, words) _mm256_stream_si256((void *)(to), (__m256i)(words))
#define EVEN (ints){0, 2, 4, 6, 8, 10, 12, 14}
#define ODD (ints){1, 3, 5, 7, 9, 11, 13, 15}
#endif
#define W 4
#define PANEL (1 << 15) /* weights that stay in the second cache while x goes by */
#define PARTS 8         /* of the weight for each thread: one that is held up leaves its own to the others */

/* The number of this file, as it was compiled. */
uint32_t rlinf_source(void) { return RLINF_SOURCE; }

#define INLINE static inline __attribute__((always_inline))
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t loose __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t shorts __attribute__((vector_size(4 * LANES)));
typedef uint64_t longs __attribute__((vector_size(4 * LANES)));

typedef struct {
  const float *x;    /* [m, k] */
  const char *w;     /* [n, k], fp32 or bf16 */
  const float *bias; /* [n] or NULL */
  float *out;        /* [m, n] */
  ptrdiff_t m, n, k;
  int bf16, parts, next;
} Product;

/* The first half of the lanes: sums of a's neighbours, the second: of b's. */
INLINE floats fold(floats a, floats b) { return __builtin_shuffle(a, b, EVEN) + __builtin_shuffle(a, b, ODD); }

INLINE floats weights(const char *w, ptrdiff_t at, int bf16) {
  if (!bf16) return *(const floats *)(w + 4 * at);
  return (floats)(__builtin_convertvector(*(const halves *)(w + 2 * at), words) << 16);
}

INLINE float weight(const char *w, ptrdiff_t at, int bf16) {
  if (!bf16) return ((const float *)w)[at];
  uint32_t word = (uint32_t)((const uint16_t *)w)[at] << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

/* Rows i to i + rows of x by rows r to r + W of the weight. */
INLINE void tile(const Product *p, ptrdiff_t i, ptrdiff_t r, int rows, int bf16) {
  const ptrdiff_t k = p->k;
  const float *x = p->x + i * k;
  const char *w = p->w + r * k * (bf16 ? 2 : 4);
  floats sum[X][W];
#pragma GCC unroll 6
  for (int a = 0; a < rows; a++)
#pragma GCC unroll 4
    for (int b = 0; b < W; b++) sum[a][b] = (floats){0};
  ptrdiff_t j = 0;
  for (; j + LANES <= k; j += LANES) {
    floats v[W];
#pragma GCC unroll 4
    for (int b = 0; b < W; b++) v[b] = weights(w, b * k + j, bf16);
#pragma GCC unroll 6
    for (int a = 0; a < rows; a++) {
      floats u = *(const floats *)(x + a * k + j);
#pragma GCC unroll 4
      for (int b = 0; b < W; b++) sum[a][b] += u * v[b];
    }
  }
#pragma GCC unroll 6
  for (int a = 0; a < rows; a++) {
    floats s = fold(fold(sum[a][0], sum[a][1]), fold(sum[a][2], sum[a][3]));
    for (int lanes = LANES; lanes > 4; lanes /= 2) s = fold(s, s); /* the first W lanes are the sums in the end */
    float *out = p->out + (i + a) * p->n + r;
    memcpy(out, &s, W * sizeof *out);
    if (j < k)
      for (int b = 0; b < W; b++)
        for (ptrdiff_t q = j; q < k; q++) out[b] += x[a * k + q] * weight(w, b * k + q, bf16);
    if (p->bias)
      for (int b = 0; b < W; b++) out[b] += p->bias[r + b];
  }
}

INLINE void tiles(const Product *p, ptrdiff_t i, ptrdiff_t r, int bf16) {
  switch (p->m - i) {
    case 1: return tile(p, i, r, 1, bf16);
    case 2: return tile(p, i, r, 2, bf16);
#if X > 3
    case 3: return tile(p, i, r, 3, bf16);
    case 4: return tile(p, i, r, 4, bf16);
    case 5: return tile(p, i, r, 5, bf16);
#endif
    default: return tile(p, i, r, X, bf16);
  }
}

/* All of x by rows first to last of the weight: panels of them that stay in the cache, while x goes by. */
INLINE void rows(const Product *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  const ptrdiff_t panel = PANEL / p->k / W * W > W ? PANEL / p->k / W * W : W;
  const ptrdiff_t bytes = panel * p->k * (bf16 ? 2 : 4), share = W * p->k * (bf16 ? 2 : 4) * X / (p->m + X - 1);
  for (ptrdiff_t start = first; start < last; start += panel) {
    const ptrdiff_t end = start + panel < last ? start + panel : last;
    for (ptrdiff_t i = 0; i < p->m; i += X)
      for (ptrdiff_t r = start; r < end; r += W) {
        if (end < last) { /* each tile fetches its share of the next panel */
          const char *next = p->w + r * p->k * (bf16 ? 2 : 4) + bytes + i / X * share;
          for (ptrdiff_t at = 0; at < share; at += 64) __builtin_prefetch(next + at, 0, 2);
        }
        tiles(p, i, r + W <= last ? r : last - W, bf16);
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
    if (p->bf16)
      rows(p, first, last, 1);
    else
      rows(p, first, last, 0);
  }
}

/* GOMP_parallel of the OpenMP library that the caller's other operations use: a second library's threads would fight for the cores. */
typedef void Team(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* x [m, k] and out [m, n] are fp32, w [n, k] is fp32 or bf16, bias [n] fp32 or NULL; all contiguous, n >= 4. */
void rlinf_linear(Team *team, int threads, const float *x, const void *w, int bf16, const float *bias, float *out, ptrdiff_t m, ptrdiff_t n,
                  ptrdiff_t k) {
  const ptrdiff_t parts = PARTS * threads, most = n / (4 * W) ? n / (4 * W) : 1;
  Product product = {x, w, bias, out, m, n, k, bf16, (int)(parts < most ? parts : most), 0};
  if (threads > 1)
    team(work, &product, threads, 0);
  else
    work(&product);
}

/* A run of bytes on its way: `bytes` of them, copied to `to` unless that is NULL. sum: their share of the checksum of
 * rlinf/weights/buckets.py, the sum of (2 i + 1) times word i modulo 2^64, the first word here being number `first`; bytes behind the last
 * word are the low ones of another. spoiled: 1 if they hold a value that is not finite, one whose exponent's bits are all ones. exponent:
 * those bits in a word, of one fp32 or two 16-bit values (0: nothing is looked for); unit: the lowest of them in 16 bits, so that all of them
 * and it make a carry. */
typedef struct {
  const char *from;
  char *to;
  int64_t bytes;
  uint64_t first, sum;
  uint32_t exponent;
  uint16_t unit, spoiled;
} Run;

/* The sum without products: with A the running sum of a lane and B that of all A so far, B after T words is the sum of (T - t) times word t. */
static void look(Run *run) {
  const char *from = run->from;
  char *to = run->to;
  const uint64_t first = run->first;
  const int64_t turns = run->bytes / (int64_t)sizeof(words);
  const words mask = (words){0} + run->exponent;
  const int stream = to && (uintptr_t)to % sizeof(words) == 0;
  longs a_even = {0}, b_even = {0}, a_odd = {0}, b_odd = {0};
  shorts carries = {0};
  for (int64_t t = 0; t < turns; t++) {
    const words w = *(const loose *)(from + t * sizeof(words));
    if (stream)
      STREAM(to + t * sizeof(words), w); /* past the cache: nobody here reads it again */
    else if (to)
      memcpy(to + t * sizeof(words), &w, sizeof w);
    a_even += (longs)w & 0xffffffff;
    b_even += a_even;
    a_odd += (longs)w >> 32;
    b_odd += a_odd;
    carries |= (shorts)(w & mask) + run->unit;
  }
  if (stream) _mm_sfence();
  uint64_t sum = 0;
  for (int l = 0; l < LANES / 2; l++) {
    sum += (2 * first + 1 + 4 * l) * a_even[l] + 2 * LANES * (turns * a_even[l] - b_even[l]);
    sum += (2 * first + 3 + 4 * l) * a_odd[l] + 2 * LANES * (turns * a_odd[l] - b_odd[l]);
  }
  uint16_t carry = 0;
  for (int l = 0; l < 2 * LANES; l++) carry |= carries[l];
  for (int64_t at = turns * sizeof(words); at < run->bytes; at += 4) {
    const size_t here = run->bytes - at < 4 ? run->bytes - at : 4;
    uint32_t word = 0;
    memcpy(&word, from + at, here);
    if (to) memcpy(to + at, from + at, here);
    sum += (2 * (first + at / 4) + 1) * (uint64_t)word;
    carry |= (uint16_t)(word & run->exponent) + run->unit;
    carry |= (uint16_t)((word & run->exponent) >> 16) + run->unit;
  }
  run->sum = sum;
  run->spoiled = run->exponent && carry >> 15;
}

void rlinf_look(Run *runs, ptrdiff_t n) {
  for (ptrdiff_t i = 0; i < n; i++) look(runs + i);
}
