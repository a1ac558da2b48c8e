/* Softmax of causal attention in training, between two matrix products: scores become weights, gradients of weights become those of scores.
 *
 * In place, row by row, in fp32, rounded once; keys that a query does not see are not read and get 0.
 */
#include "vectors.h"

#define PART 8 /* rows */

typedef struct {
  void *scores;        /* or the gradient of the weights */
  const void *weights;
  ptrdiff_t n, length, size; /* [n, size]; row number i of `length`, a query, sees size - length + 1 + i keys */
  float scale;
  int bf16, next;
} Scores;

INLINE void softmax(const Scores *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t row = first; row < last; row++) {
    const ptrdiff_t at = row * p->size, seen = p->size - p->length + 1 + row % p->length, whole = seen / LANES * LANES;
    floats most = all(-__builtin_inff());
    for (ptrdiff_t d = 0; d < whole; d += LANES) most = max(most, get(p->scores, at + d, bf16));
    float top = largest(most);
    for (ptrdiff_t d = whole; d < seen; d++) {
      const float score = get_one(p->scores, at + d, bf16);
      if (score > top || score != score) top = score;
    }
    float rest[LANES];
    floats added = {0};
    for (ptrdiff_t d = 0; d < whole; d += LANES) added += exponential((get(p->scores, at + d, bf16) - top) * p->scale);
    for (ptrdiff_t d = whole; d < whole + LANES; d++)
      rest[d - whole] = d < seen ? (get_one(p->scores, at + d, bf16) - top) * p->scale : -__builtin_inff();
    const floats tail = exponential(get(rest, 0, 0));
    const float by = 1.0f / sum(added + tail);
    for (ptrdiff_t d = 0; d < whole; d += LANES)
      set(p->scores, at + d, exponential((get(p->scores, at + d, bf16) - top) * p->scale) * by, bf16);
    for (ptrdiff_t d = whole; d < seen; d++) set_one(p->scores, at + d, tail[d - whole] * by, bf16);
    memset((char *)p->scores + (at + seen) * BYTES(bf16), 0, (p->size - seen) * BYTES(bf16));
  }
}

/* With weights w and their gradient g: that of the scores is scale * w (g - sum(w g)). */
INLINE void softmax_back(const Scores *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t row = first; row < last; row++) {
    const ptrdiff_t at = row * p->size, seen = p->size - p->length + 1 + row % p->length, whole = seen / LANES * LANES;
    floats dots = {0};
    for (ptrdiff_t d = 0; d < whole; d += LANES) dots += get(p->weights, at + d, bf16) * get(p->scores, at + d, bf16);
    float mean = sum(dots);
    for (ptrdiff_t d = whole; d < seen; d++) mean += get_one(p->weights, at + d, bf16) * get_one(p->scores, at + d, bf16);
    for (ptrdiff_t d = 0; d < whole; d += LANES)
      set(p->scores, at + d, get(p->weights, at + d, bf16) * (get(p->scores, at + d, bf16) - mean) * p->scale, bf16);
    for (ptrdiff_t d = whole; d < seen; d++)
      set_one(p->scores, at + d, get_one(p->weights, at + d, bf16) * (get_one(p->scores, at + d, bf16) - mean) * p->scale, bf16);
    memset((char *)p->scores + (at + seen) * BYTES(bf16), 0, (p->size - seen) * BYTES(bf16));
  }
}

DEAL_OUT(softmax, Scores, PART)
DEAL_OUT(softmax_back, Scores, PART)

/* scores [n * length, size], size >= length, fp32 or bf16, become softmax(scale * scores). */
void rlinf_softmax(Team *team, int threads, void *scores, ptrdiff_t n, ptrdiff_t length, ptrdiff_t size, float scale, int bf16) {
  Scores p = {.scores = scores, .n = n * length, .length = length, .size = size, .scale = scale, .bf16 = bf16};
  run(team, threads, softmax_work, &p);
}

/* grad, that of the weights, becomes that of the scores. */
void rlinf_softmax_back(Team *team, int threads, const void *weights, void *grad, ptrdiff_t n, ptrdiff_t length, ptrdiff_t size, float scale,
                        int bf16) {
  Scores p = {.scores = grad, .weights = weights, .n = n * length, .length = length, .size = size, .scale = scale, .bf16 = bf16};
  run(team, threads, softmax_back_work, &p);
}
