/* Attention of a decode step: one new token for each slot, whose keys and values are written to the slot's place, then attended to.
 *
 * For one (slot, key head) after another: what a slot comes to does not depend on the others, and only as many positions are read as it has.
 * Positions go by in blocks, with a running maximum and sum (Milakov and Gimelshein 2018, Online normalizer calculation for softmax), all
 * in fp32. Within a thread's memory, numbers of bf16 origin stand as get_two() gives them: the order within a head does not matter.
 */
#include "vectors.h"

#define BLOCK 64     /* positions: their scores stay in the first cache */
#define HEADS 4      /* query heads at a time that share a key head */
#define MOST_DIM 256 /* of a head */

typedef struct {
  const void *queries; /* [slots, key heads * group, dim] */
  const void *keys;    /* [slots, key heads, dim], the new ones */
  const void *values;
  void *key_cache; /* [slots, key heads, capacity, dim] */
  void *value_cache;
  const int64_t *positions; /* [slots]: where the new token stands; it sees that many before it */
  void *out;                /* [slots, key heads * group, dim] */
  ptrdiff_t slots, heads, group, dim, capacity, query_stride, key_stride, value_stride; /* strides from slot to slot, in numbers */
  float scale;
  int bf16, next;
} Attention;

/* What a thread has of one (slot, key head) and up to HEADS query heads. */
typedef struct {
  float query[HEADS * MOST_DIM] __attribute__((aligned(64)));
  float sums[HEADS * MOST_DIM] __attribute__((aligned(64))); /* of weights by values */
  float scores[HEADS][BLOCK] __attribute__((aligned(64)));   /* then weights */
  float top[HEADS], total[HEADS], kept[HEADS];               /* running maximum and sum; what becomes of the sums before a block */
} Room;

/* Scores of `count` positions, and numbers without a meaning up to a multiple of four. */
INLINE void score(Room *room, const char *keys, ptrdiff_t dim, ptrdiff_t count, int n, int bf16) {
  for (ptrdiff_t t = 0; t < count; t += 4) {
    const char *k[4]; /* the last position once more where there are fewer than four */
    for (int i = 0; i < 4; i++) k[i] = keys + (t + i < count ? t + i : count - 1) * dim * BYTES(bf16);
    floats sum[HEADS][4];
#pragma GCC unroll 4
    for (int a = 0; a < n; a++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[a][i] = (floats){0};
    for (ptrdiff_t d = 0; d < dim; d += 2 * LANES) {
      floats v[4][2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) get_two(v[i], k[i], d, bf16);
#pragma GCC unroll 4
      for (int a = 0; a < n; a++) {
        const floats even = get(room->query, a * dim + d, 0), odd = get(room->query, a * dim + d + LANES, 0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[a][i] += even * v[i][0], sum[a][i] += odd * v[i][1];
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < n; a++) {
      const floats four = sums_of(sum[a][0], sum[a][1], sum[a][2], sum[a][3]);
      memcpy(room->scores[a] + t, &four, 4 * sizeof(float));
    }
  }
}

#ifdef __AMX_BF16__
#define TILES_DIM 128 /* at most: tiles 4 to 7 hold the queries */

INLINE int by_tiles(const Attention *p) { return p->bf16 && p->dim <= TILES_DIM && p->capacity % SIDE == 0; }

/* The bf16 queries in pairs: room->query as [dim / 2, HEADS] words, in tiles 4 and on. */
INLINE void load_queries(Room *room, const uint16_t *queries, ptrdiff_t dim, int n) {
  uint32_t *to = (uint32_t *)room->query;
  for (ptrdiff_t d = 0; d < dim / 2; d++)
    for (int a = 0; a < HEADS; a++) {
      uint32_t pair = 0;
      if (a < n) memcpy(&pair, queries + a * dim + 2 * d, sizeof pair);
      to[d * HEADS + a] = pair;
    }
  WRITTEN;
  _tile_loadd(4, to, 4 * HEADS);
  if (dim > 32) _tile_loadd(5, to + SIDE * HEADS, 4 * HEADS);
  if (dim > 64) _tile_loadd(6, to + 2 * SIDE * HEADS, 4 * HEADS);
  if (dim > 96) _tile_loadd(7, to + 3 * SIDE * HEADS, 4 * HEADS);
}

INLINE void score_by_tiles(Room *room, const uint16_t *keys, ptrdiff_t dim, ptrdiff_t count, float scale) {
  float found[SIDE * HEADS] __attribute__((aligned(64))); /* [position, head] */
  for (ptrdiff_t t = 0; t < count; t += SIDE) {
    const uint16_t *k = keys + t * dim;
    _tile_zero(0);
    _tile_loadd(1, k, 2 * dim);
    _tile_dpbf16ps(0, 1, 4);
    if (dim > 32) {
      _tile_loadd(1, k + 32, 2 * dim);
      _tile_dpbf16ps(0, 1, 5);
    }
    if (dim > 64) {
      _tile_loadd(1, k + 64, 2 * dim);
      _tile_dpbf16ps(0, 1, 6);
    }
    if (dim > 96) {
      _tile_loadd(1, k + 96, 2 * dim);
      _tile_dpbf16ps(0, 1, 7);
    }
    _tile_stored(0, found, 4 * HEADS);
    const floats a = get(found, 0, 0), b = get(found, 16, 0), c = get(found, 32, 0), d = get(found, 48, 0);
    const ints first = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const ints halves_of = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
      set(room->scores[h], t, scale * __builtin_shuffle(__builtin_shuffle(a, b, first + h), __builtin_shuffle(c, d, first + h), halves_of), 0);
  }
}
#endif

/* Adds weights by values to the sums, those times `kept` first. */
INLINE void add_values(Room *room, const char *values, ptrdiff_t dim, ptrdiff_t count, int n, int bf16) {
  for (ptrdiff_t d = 0; d < dim; d += 2 * LANES) {
    floats s[HEADS][2];
#pragma GCC unroll 4
    for (int a = 0; a < n; a++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) s[a][i] = get(room->sums, a * dim + d + i * LANES, 0) * room->kept[a];
    for (ptrdiff_t t = 0; t < count; t++) {
      floats v[2];
      get_two(v, values, t * dim + d, bf16);
#pragma GCC unroll 4
      for (int a = 0; a < n; a++) s[a][0] += room->scores[a][t] * v[0], s[a][1] += room->scores[a][t] * v[1];
    }
#pragma GCC unroll 4
    for (int a = 0; a < n; a++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) set(room->sums, a * dim + d + i * LANES, s[a][i], 0);
  }
}

/* Scores become weights, under the maximum so far. */
INLINE void weigh(Room *room, ptrdiff_t count, int n) {
  for (int a = 0; a < n; a++) {
    for (ptrdiff_t t = count; t < BLOCK; t++) room->scores[a][t] = -__builtin_inff();
    floats most = all(room->top[a]);
    for (ptrdiff_t t = 0; t < BLOCK; t += LANES) most = max(most, get(room->scores[a], t, 0));
    const float now = largest(most);
    floats added = {0};
    for (ptrdiff_t t = 0; t < BLOCK; t += LANES) {
      const floats weight = exponential(get(room->scores[a], t, 0) - now);
      set(room->scores[a], t, weight, 0);
      added += weight;
    }
    room->kept[a] = exponential(all(room->top[a] - now))[0];
    room->total[a] = room->total[a] * room->kept[a] + sum(added);
    room->top[a] = now;
  }
}

INLINE void fetch(const char *from, ptrdiff_t bytes) {
  for (ptrdiff_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
}

/* n query heads, from number `first` of the key head's on, of one slot. */
INLINE void attend_heads(const Attention *p, ptrdiff_t slot, ptrdiff_t head, ptrdiff_t first, int n, int bf16, int tiles) {
  const ptrdiff_t dim = p->dim, length = p->positions[slot] + 1, at = head * p->group + first;
  const ptrdiff_t cache = (slot * p->heads + head) * p->capacity * dim * BYTES(bf16);
  const char *keys = (const char *)p->key_cache + cache, *values = (const char *)p->value_cache + cache;
  const char *queries = (const char *)p->queries + (slot * p->query_stride + at * dim) * BYTES(bf16);
  Room room;
  for (int a = 0; a < n; a++) room.top[a] = -__builtin_inff(), room.total[a] = 0;
  for (ptrdiff_t i = 0; i < n * dim; i += 2 * LANES) {
    floats two[2];
    get_two(two, queries, i, bf16);
    set(room.query, i, two[0] * p->scale, 0), set(room.query, i + LANES, two[1] * p->scale, 0);
    set(room.sums, i, (floats){0}, 0), set(room.sums, i + LANES, (floats){0}, 0);
  }
#ifdef __AMX_BF16__
  if (tiles) load_queries(&room, (const uint16_t *)queries, dim, n);
#endif
  const ptrdiff_t block = BLOCK * dim * BYTES(bf16);
  for (ptrdiff_t start = 0; start < length; start += BLOCK) {
    const ptrdiff_t count = length - start < BLOCK ? length - start : BLOCK, offset = start * dim * BYTES(bf16);
    fetch(values + offset, block);
#ifdef __AMX_BF16__
    if (tiles)
      score_by_tiles(&room, (const uint16_t *)(keys + offset), dim, count, p->scale);
    else
#endif
      score(&room, keys + offset, dim, count, n, bf16);
    fetch(start + BLOCK < length ? keys + offset + block : keys + p->capacity * dim * BYTES(bf16), block); /* or the next head's */
    weigh(&room, count, n);
    add_values(&room, values + offset, dim, count, n, bf16);
  }
  for (int a = 0; a < n; a++)
    for (ptrdiff_t d = 0; d < dim; d += 2 * LANES) {
      const floats two[2] = {get(room.sums, a * dim + d, 0) / room.total[a], get(room.sums, a * dim + d + LANES, 0) / room.total[a]};
      set_two(p->out, (slot * p->heads * p->group + at + a) * dim + d, two, bf16);
    }
}

INLINE void attend(const Attention *p, ptrdiff_t slot, ptrdiff_t head, int bf16, int tiles) {
  const ptrdiff_t row = p->dim * BYTES(bf16), to = ((slot * p->heads + head) * p->capacity + p->positions[slot]) * row;
  memcpy((char *)p->key_cache + to, (const char *)p->keys + slot * p->key_stride * BYTES(bf16) + head * row, row);
  memcpy((char *)p->value_cache + to, (const char *)p->values + slot * p->value_stride * BYTES(bf16) + head * row, row);
  ptrdiff_t first = 0;
  for (; first + HEADS <= p->group; first += HEADS) attend_heads(p, slot, head, first, HEADS, bf16, tiles);
  switch (p->group - first) {
    case 1: attend_heads(p, slot, head, first, 1, bf16, tiles); break;
    case 2: attend_heads(p, slot, head, first, 2, bf16, tiles); break;
    case 3: attend_heads(p, slot, head, first, 3, bf16, tiles); break;
  }
}

static void work(void *data) {
  Attention *p = data;
  int item, tiles = 0;
#ifdef __AMX_BF16__
  tiles = by_tiles(p);
  if (tiles) shape_tiles(~2, HEADS); /* 1: 16 positions x 32 numbers of the keys; of queries 16 pairs x HEADS, sums accordingly */
#endif
  while ((item = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->slots * p->heads)
    if (tiles)
      attend(p, item / p->heads, item % p->heads, 1, 1);
    else if (p->bf16)
      attend(p, item / p->heads, item % p->heads, 1, 0);
    else
      attend(p, item / p->heads, item % p->heads, 0, 0);
#ifdef __AMX_BF16__
  if (tiles) _tile_release();
#endif
}

/* sizes: the struct's, from slots to value_stride. dim is a multiple of 2 * LANES, at most MOST_DIM; everything is fp32 or bf16. */
void rlinf_decode_attention(Team *team, int threads, const void *queries, const void *keys, const void *values, void *key_cache,
                            void *value_cache, const int64_t *positions, void *out, const ptrdiff_t *sizes, float scale, int bf16) {
  Attention p = {queries, keys, values, key_cache, value_cache, positions, out, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                 sizes[5], sizes[6], sizes[7], scale, bf16, 0};
  run(team, threads, work, &p);
}
