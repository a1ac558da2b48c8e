/* out = x w^T + bias for bf16 numbers on a CPU with matrix tiles (Intel AMX), with weights as they lie in memory.
 *
 * A tile instruction adds a tile of 16 rows x 16 pairs of bf16 numbers times one of 16 pairs x 16 columns to 16 x 16 sums in fp32. The rows
 * are 16 rows of the weight, which lie as it wants them; the columns are 16 rows of x, whose pairs have to be transposed first: x is small
 * beside the weight. So the sums come out transposed, and are turned back on their way to memory. A number of the result is summed in the
 * same order whatever the number of rows and threads.
 */
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

#define DEPTH (2 * SIDE)       /* numbers of the inner dimension in a tile */
#define PAIR (2 * SIDE)        /* rows of the weight, and of x, at a time: two tiles of each, four of sums */
#define PARTS 8                /* of the weight for each thread: one that is held up leaves its own to the others */
#define CHUNK (1 << 19)        /* bytes of x that stay in the second cache while a part of the weight goes by */

typedef struct {
  const uint16_t *x;  /* [m, k] */
  const uint16_t *w;  /* [n, k] */
  const float *bias;  /* [n] or NULL */
  void *out;          /* [m, n], bf16 or fp32 */
  uint32_t *turned;   /* x in tiles: [m / SIDE, k / DEPTH, SIDE, SIDE], both rounded up */
  ptrdiff_t m, n, k;
  ptrdiff_t depths, pairs; /* tiles of the inner dimension; pairs of tiles of x */
  int bf16, parts, next, ready;
} Product;

/* Whether the kernel lets this process use tiles; asked once, it says so for all threads (Documentation/arch/x86/xstate.rst). */
int rlinf_may_use_tiles(void) {
  const int request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

/* Row i's lane j becomes row j's lane i: halves of 2, 4, 8 and 16 rows change places. */
INLINE void transpose(words r[SIDE]) {
  const words lane = {LANE_NUMBERS};
#pragma GCC unroll 4
  for (uint32_t s = 1; s < SIDE; s *= 2) {
    const words from_other = (words)((lane & s) != 0) & (SIDE - s);
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++)
      if (!(i & s)) {
        const words a = r[i], b = r[i + s];
        r[i] = __builtin_shuffle(a, b, lane + from_other);
        r[i + s] = __builtin_shuffle(a, b, lane + s + from_other);
      }
  }
}

/* The numbers of one row that are left from j on, then zeros. */
INLINE words row(const uint16_t *numbers, ptrdiff_t j, ptrdiff_t k) {
  const ptrdiff_t left = k - j;
  return (words)_mm512_maskz_loadu_epi16(left < DEPTH ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0, numbers + j);
}

/* Rows SIDE i and on of x, zeros behind its last. */
static void turn(const Product *p, ptrdiff_t i) {
  words *to = (words *)(p->turned + i * p->depths * SIDE * SIDE);
  for (ptrdiff_t j = 0; j < p->depths; j++, to += SIDE) {
    words r[SIDE];
#pragma GCC unroll 16
    for (int c = 0; c < SIDE; c++) {
      const ptrdiff_t at = i * SIDE + c;
      r[c] = at < p->m ? row(p->x + at * p->k, j * DEPTH, p->k) : (words){0};
    }
    transpose(r);
#pragma GCC unroll 16
    for (int c = 0; c < SIDE; c++) to[c] = r[c];
  }
}

/* Sums of SIDE rows of the weight from r on by rows SIDE i and on of x, turned back. */
INLINE void put(const Product *p, const float sums[SIDE * SIDE], ptrdiff_t i, ptrdiff_t r) {
  words t[SIDE];
#pragma GCC unroll 16
  for (int c = 0; c < SIDE; c++) t[c] = ((const words *)sums)[c];
  transpose(t);
  floats bias = {0};
  if (p->bias) bias = get(p->bias, r, 0);
  const ptrdiff_t rows = p->m - i * SIDE < SIDE ? p->m - i * SIDE : SIDE;
#pragma GCC unroll 16
  for (int c = 0; c < SIDE; c++) {
    if (c >= rows) break;
    const floats value = (floats)t[c] + bias;
    const ptrdiff_t at = (i * SIDE + c) * p->n + r;
    if (p->bf16)
      _mm256_storeu_si256((void *)((uint16_t *)p->out + at), (__m256i)_mm512_cvtneps_pbh((__m512)value));
    else
      set(p->out, at, value, 0);
  }
}

/* SIDE rows of the weight from r and from s on by PAIR rows of x. next: where rows are that are wanted soon, of which `lines` cache lines are
 * fetched at each step. */
INLINE void tile(const Product *p, ptrdiff_t pair, ptrdiff_t r, ptrdiff_t s, const char *next, int lines) {
  const ptrdiff_t k = p->k, whole = k / DEPTH, stride = 2 * k;
  const uint16_t *upper = p->w + r * k, *lower = p->w + s * k;
  const uint32_t *left = p->turned + 2 * pair * p->depths * SIDE * SIDE, *right = left + p->depths * SIDE * SIDE;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (ptrdiff_t j = 0; j < p->depths; j++, left += SIDE * SIDE, right += SIDE * SIDE) {
    if (j < whole) {
      _tile_loadd(4, upper + j * DEPTH, stride);
      _tile_loadd(5, lower + j * DEPTH, stride);
      for (int line = 0; line < lines; line++) __builtin_prefetch(next + (j * lines + line) * 64, 0, 2);
    } else {
      words rest[2][SIDE];
      for (int c = 0; c < SIDE; c++) rest[0][c] = row(upper + c * k, j * DEPTH, k), rest[1][c] = row(lower + c * k, j * DEPTH, k);
      WRITTEN;
      _tile_loadd(4, rest[0], 64);
      _tile_loadd(5, rest[1], 64);
    }
    _tile_loadd(6, left, 64);
    _tile_loadd(7, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  put(p, sums[0], 2 * pair, r);
  put(p, sums[2], 2 * pair, s);
  if ((2 * pair + 1) * SIDE < p->m) {
    put(p, sums[1], 2 * pair + 1, r);
    put(p, sums[3], 2 * pair + 1, s);
  }
}

/* All of x by rows first to last of the weight, at least SIDE of them; the last tiles share rows where the number is not theirs. */
static void rows(const Product *p, ptrdiff_t first, ptrdiff_t last) {
  const ptrdiff_t fit = CHUNK / (p->depths * PAIR * DEPTH * 2), chunk = fit > 0 ? fit : 1;
  for (ptrdiff_t start = 0; start < p->pairs; start += chunk) {
    const ptrdiff_t end = start + chunk < p->pairs ? start + chunk : p->pairs;
    for (ptrdiff_t r = first; r < last; r += PAIR) {
      const ptrdiff_t upper = r + SIDE <= last ? r : last - SIDE, lower = r + PAIR <= last ? r + SIDE : last - SIDE;
      /* every tile fetches its share of the next rows: memory is never idle */
      const ptrdiff_t lines = r + 2 * PAIR <= last && start == 0 ? (PAIR + end - 1) / end : 0, share = lines * (p->k / DEPTH) * 64;
      const char *next = (const char *)(p->w + (r + PAIR) * p->k);
      for (ptrdiff_t pair = start; pair < end; pair++)
        tile(p, pair, upper, lower, next + pair * share, pair * lines < PAIR ? lines : 0);
    }
  }
}

/* What each thread of the team does: first tiles of x, then, once all of those are there, parts of the weight, until none is left. */
static void work(void *data) {
  Product *p = data;
  const int blocks = 2 * p->pairs;
  shape_tiles(0, 0);
  int item;
  while ((item = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < blocks + p->parts) {
    if (item < blocks) {
      turn(p, item);
      __atomic_fetch_add(&p->ready, 1, __ATOMIC_RELEASE);
      continue;
    }
    while (__atomic_load_n(&p->ready, __ATOMIC_ACQUIRE) < blocks) sched_yield();
    const ptrdiff_t part = item - blocks, units = p->n / SIDE;
    rows(p, units * part / p->parts * SIDE, part + 1 == p->parts ? p->n : units * (part + 1) / p->parts * SIDE);
  }
  _tile_release();
}

/* x [m, k] and w [n, k] are bf16, bias [n] fp32 or NULL, out [m, n] bf16 or fp32; all contiguous, n >= 16. room: for x in tiles, 64-byte
 * aligned, m rounded up to 32 times k rounded up to 32 numbers. */
void rlinf_linear_amx(Team *team, int threads, const void *x, const void *w, const float *bias, void *out, int bf16, void *room, ptrdiff_t m,
                      ptrdiff_t n, ptrdiff_t k) {
  const ptrdiff_t parts = PARTS * threads, most = n / (2 * PAIR) ? n / (2 * PAIR) : 1;
  Product product = {x, w, bias, out, room, m, n, k, (k + DEPTH - 1) / DEPTH, (m + PAIR - 1) / PAIR, bf16, (int)(parts < most ? parts : most), 0, 0};
  run(team, threads, work, &product);
}
