/* A scan of weights on their way: copy, checksum, and whether all values are finite, in one pass over memory. */
#include "vectors.h"

#ifdef __AVX512F__
#define STREAM(to, words) _mm512_stream_si512((void *)(to), (__m512i)(words))
#else
#define STREAM(to, words) _mm256_stream_si256((void *)(to), (__m256i)(words))
#endif

/* The number of these files, as they were compiled. */
uint32_t rlinf_source(void) { return RLINF_SOURCE; }

typedef uint16_t shorts __attribute__((vector_size(4 * LANES)));
typedef uint64_t longs __attribute__((vector_size(4 * LANES)));

/* A run of bytes on its way: `bytes` of them, copied to `to` unless that is NULL. sum: their share of the checksum of
 * rlinf/weights/scan.py, the sum of (2 i + 1) times word i modulo 2^64, the first word here being number `first`; bytes behind the last
 * word are the low ones of another. not_finite: 1 if they hold a value that is not finite, one whose exponent's bits are all ones. exponent:
 * those bits in a word, of one fp32 or two 16-bit values (0: nothing is looked for); unit: the lowest of them in 16 bits, so that all of them
 * and it make a carry. */
typedef struct {
  const char *from;
  char *to;
  int64_t bytes;
  uint64_t first, sum;
  uint32_t exponent;
  uint16_t unit, not_finite;
} Run;

/* The sum without products: with A the running sum of a lane and B that of all A so far, B after T words is the sum of (T - t) times word t. */
static void scan(Run *run) {
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
  run->not_finite = run->exponent && carry >> 15;
}

void rlinf_scan(Run *runs, ptrdiff_t n) {
  for (ptrdiff_t i = 0; i < n; i++) scan(runs + i);
}
