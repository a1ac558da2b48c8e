/* A token's log-probability from its row of logits, in fp32: what training reads from logits, and the gradient that takes their place.
 *
 * The logits have the precision of the weights; a row is read twice on the way forth and written once on the way back. Rows are alone.
 */
#include "vectors.h"

typedef struct {
  void *logits;           /* [n, width] */
  const int64_t *columns; /* [n]: of the target token */
  float *top;             /* [n]: largest logit */
  float *sums;            /* [3, n]: of e^(z - top), z - top of the target, sum of (z - top) e^(z - top); z = logit / temperature */
  const float *lse, *entropy, *by_logprob, *by_entropy; /* [n]: log of the sum of e^z; gradients by temperature; by_entropy may be NULL */
  const uint8_t *mine;    /* [n]: whether the target's column is one of ours */
  ptrdiff_t n, width, valid; /* columns beyond `valid` are padding */
  float scale;            /* 1 / temperature */
  int bf16, next;
} Head;

INLINE void find_top(const Head *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t i = first; i < last; i++) {
    const ptrdiff_t at = i * p->width, whole = p->valid / LANES * LANES;
    floats most = all(-__builtin_inff()), nan = {0};
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats z = get(p->logits, at + d, bf16);
      most = max(most, z);
      nan += z * 0.0f; /* max() may lose what is not a number */
    }
    float top = largest(most) + sum(nan);
    for (ptrdiff_t d = whole; d < p->valid; d++) {
      const float z = get_one(p->logits, at + d, bf16);
      top = z > top || z != z ? z : top;
    }
    p->top[i] = top;
  }
}

INLINE void add_up(const Head *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t i = first; i < last; i++) {
    const ptrdiff_t at = i * p->width, whole = p->valid / LANES * LANES;
    const float top = p->top[i];
    floats total[2] = {{0}, {0}}, dot[2] = {{0}, {0}};
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats below = (get(p->logits, at + d, bf16) - top) * p->scale, weight = exponential(below);
      total[d / LANES % 2] += weight;
      dot[d / LANES % 2] += weight * below;
    }
    float sums[2] = {sum(total[0] + total[1]), sum(dot[0] + dot[1])};
    for (ptrdiff_t d = whole; d < p->valid; d++) {
      const float below = (get_one(p->logits, at + d, bf16) - top) * p->scale, weight = exponential(all(below))[0];
      sums[0] += weight, sums[1] += weight * below;
    }
    p->sums[i] = sums[0];
    p->sums[p->n + i] = (get_one(p->logits, at + p->columns[i], bf16) - top) * p->scale;
    p->sums[2 * p->n + i] = sums[1];
  }
}

/* d logprob / dz = [target] - p; d entropy / dz = -p (z - E z), E z = lse - entropy. Padding gets 0. */
INLINE void back(const Head *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t i = first; i < last; i++) {
    const ptrdiff_t at = i * p->width, whole = p->valid / LANES * LANES, column = p->columns[i];
    const float lse = p->lse[i], by_logprob = p->by_logprob[i];
    const float by_entropy = p->by_entropy ? p->by_entropy[i] : 0, entropy = p->entropy[i];
    const float target = get_one(p->logits, at + column, bf16) * p->scale - lse;
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats below = get(p->logits, at + d, bf16) * p->scale - lse, weight = exponential(below);
      set(p->logits, at + d, -weight * (by_logprob + by_entropy * (below + entropy)), bf16);
    }
    for (ptrdiff_t d = whole; d < p->valid; d++) {
      const float below = get_one(p->logits, at + d, bf16) * p->scale - lse, weight = exponential(all(below))[0];
      set_one(p->logits, at + d, -weight * (by_logprob + by_entropy * (below + entropy)), bf16);
    }
    for (ptrdiff_t d = p->valid; d < p->width; d++) set_one(p->logits, at + d, 0, bf16);
    if (p->mine[i]) {
      const float weight = exponential(all(target))[0];
      set_one(p->logits, at + column, by_logprob - weight * (by_logprob + by_entropy * (target + entropy)), bf16);
    }
  }
}

DEAL_OUT(find_top, Head, 1)
DEAL_OUT(add_up, Head, 1)
DEAL_OUT(back, Head, 1)

/* logits [n, width] of fp32 or bf16; top [n]: the largest of the first `valid` columns; -infinity where there is none. */
void rlinf_head_top(Team *team, int threads, void *logits, float *top, ptrdiff_t n, ptrdiff_t width, ptrdiff_t valid, int bf16) {
  Head p = {.logits = logits, .top = top, .n = n, .width = width, .valid = valid, .bf16 = bf16};
  run(team, threads, find_top_work, &p);
}

/* sums [3, n]: see above. */
void rlinf_head_sums(Team *team, int threads, void *logits, const int64_t *columns, float *top, float *sums, ptrdiff_t n, ptrdiff_t width,
                     ptrdiff_t valid, float scale, int bf16) {
  Head p = {.logits = logits, .columns = columns, .top = top, .sums = sums, .n = n, .width = width, .valid = valid, .scale = scale, .bf16 = bf16};
  run(team, threads, add_up_work, &p);
}

/* The logits become their gradient; by_entropy is NULL where the entropy has none. */
void rlinf_head_back(Team *team, int threads, void *logits, const int64_t *columns, const uint8_t *mine, const float *lse, const float *entropy,
                     const float *by_logprob, const float *by_entropy, ptrdiff_t n, ptrdiff_t width, ptrdiff_t valid, float scale, int bf16) {
  Head p = {.logits = logits, .columns = columns, .mine = mine, .lse = lse, .entropy = entropy, .by_logprob = by_logprob,
            .by_entropy = by_entropy, .n = n, .width = width, .valid = valid, .scale = scale, .bf16 = bf16};
  run(team, threads, back_work, &p);
}
