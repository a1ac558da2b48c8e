/* What the files here have in common: vectors of as many lanes as the instruction set has, numbers in memory that are fp32 or bf16, teams of
 * threads, tiles. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define EVEN (ints){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}
#define ODD (ints){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}
#else
#define LANES 8
#define LANE_NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#define EVEN (ints){0, 2, 4, 6, 8, 10, 12, 14}
#define ODD (ints){1, 3, 5, 7, 9, 11, 13, 15}
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* wherever they lie */
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint32_t loose __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

/* GOMP_parallel of the OpenMP library that torch's operations use: a second library's threads would fight for the cores. */
typedef void Team(void (*function)(void *), void *data, unsigned threads, unsigned flags);

INLINE void run(Team *team, int threads, void (*function)(void *), void *data) {
  if (threads > 1)
    team(function, data, threads, 0);
  else
    function(data);
}

/* Rows to whoever is free: name_work(p), with a p that has n rows, bf16 and a `next` that begins at 0, has name(p, first, last, bf16) do
 * `part` of them at a time. */
#define DEAL_OUT(name, Type, part)                                                                           \
  static void name##_work(void *data) {                                                                      \
    Type *p = data;                                                                                          \
    ptrdiff_t first;                                                                                         \
    while ((first = part * (ptrdiff_t)__atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n) {           \
      const ptrdiff_t last = first + part < p->n ? first + part : p->n;                                      \
      if (p->bf16)                                                                                           \
        name(p, first, last, 1);                                                                             \
      else                                                                                                   \
        name(p, first, last, 0);                                                                             \
    }                                                                                                        \
  }

#define BYTES(bf16) ((bf16) ? 2 : 4)

INLINE floats all(float value) { return (floats){0} + value; }

INLINE floats max(floats a, floats b) {
#ifdef __AVX512F__
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

/* LANES numbers from number `at` on. */
INLINE floats get(const void *from, ptrdiff_t at, int bf16) {
  if (!bf16) return *(const floats *)((const char *)from + 4 * at);
  return (floats)(__builtin_convertvector(*(const halves *)((const char *)from + 2 * at), words) << 16);
}

INLINE float get_one(const void *from, ptrdiff_t at, int bf16) {
  if (!bf16) return ((const float *)from)[at];
  const uint32_t word = (uint32_t)((const uint16_t *)from)[at] << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}

/* bf16 is rounded to the nearest, to the even one of two. */
INLINE void set(void *to, ptrdiff_t at, floats value, int bf16) {
  if (bf16) {
    const words w = (words)value, rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;
    *(halves *)((char *)to + 2 * at) = __builtin_convertvector(rounded, halves);
  } else {
    *(floats *)((char *)to + 4 * at) = value;
  }
}

INLINE void set_one(void *to, ptrdiff_t at, float value, int bf16) {
  uint32_t w;
  memcpy(&w, &value, sizeof w);
  if (bf16)
    ((uint16_t *)to)[at] = (w + 0x7fff + (w >> 16 & 1)) >> 16;
  else
    ((float *)to)[at] = value;
}

/* 2 * LANES numbers from number `at` on, of bf16 first the even and then the odd ones: that takes half the instructions of two get(). */
INLINE void get_two(floats two[2], const void *from, ptrdiff_t at, int bf16) {
  if (bf16) {
    const words both = *(const loose *)((const char *)from + 2 * at);
    two[0] = (floats)(both << 16), two[1] = (floats)(both & 0xffff0000);
  } else {
    two[0] = get(from, at, 0), two[1] = get(from, at + LANES, 0);
  }
}

/* The way back. */
INLINE void set_two(void *to, ptrdiff_t at, const floats two[2], int bf16) {
  if (bf16) {
    const words a = (words)two[0], b = (words)two[1];
    const words even = a + 0x7fff + (a >> 16 & 1), odd = b + 0x7fff + (b >> 16 & 1);
    *(loose *)((char *)to + 2 * at) = (even >> 16) | (odd & 0xffff0000);
  } else {
    set(to, at, two[0], 0), set(to, at + LANES, two[1], 0);
  }
}

/* The first half of the lanes: sums of a's neighbours, the second: of b's. */
INLINE floats fold(floats a, floats b) { return __builtin_shuffle(a, b, EVEN) + __builtin_shuffle(a, b, ODD); }

/* The sums of four vectors' lanes, in the first four lanes. */
INLINE floats sums_of(floats a, floats b, floats c, floats d) {
  floats s = fold(fold(a, b), fold(c, d));
  for (int lanes = LANES; lanes > 4; lanes /= 2) s = fold(s, s);
  return s;
}

INLINE float sum(floats a) {
  for (int lanes = LANES; lanes > 1; lanes /= 2) a = fold(a, a);
  return a[0];
}

INLINE float largest(floats a) {
  for (int lanes = LANES; lanes > 1; lanes /= 2) a = max(__builtin_shuffle(a, a, EVEN), __builtin_shuffle(a, a, ODD));
  return a[0];
}

/* e^x to about 1e-7 of it; 0 below -87, infinity above 88.7, NaN of NaN. Cephes' polynomial of what is left of x beside a multiple of ln 2. */
INLINE floats exponential(floats x) {
  const floats magic = all(0x1.8p23f); /* adding it rounds to a whole number, in the low bits */
  const floats n = x * 1.44269504088896341f + magic, whole = n - magic;
  floats r = x - whole * 0.693359375f;
  r -= whole * -2.12194440e-4f;
  floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const words power = ((words)n << 23) + (words)p; /* times 2 to the whole number */
  const words low = (words)(x < -87.0f), high = (words)(x > 88.7f), nan = (words)(x != x);
  const words bounded = (power & ~(low | high)) | ((words)all(__builtin_inff()) & high);
  return (floats)((bounded & ~nan) | ((words)x & nan));
}

#ifdef __AMX_BF16__
#define SIDE 16 /* rows of a tile, and its 4-byte columns */
#define WRITTEN __asm__ volatile("" ::: "memory") /* GCC's tile loads do not tell it which memory they read */

/* For this thread, until _tile_release(): all tiles are as large as can be, but those of `few` (a bit for each) have so many columns only. */
INLINE void shape_tiles(int few, int columns) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape __attribute__((aligned(64))) = {.palette = 1};
  for (int t = 0; t < 8; t++) shape.bytes[t] = 4 * (few >> t & 1 ? columns : SIDE), shape.rows[t] = SIDE;
  WRITTEN;
  _tile_loadconfig(&shape);
}
#endif
