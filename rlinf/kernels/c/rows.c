/* What a transformer does to each row of numbers by itself: RMSNorm, the gated SiLU and the rotation by position, forward and backward, in
 * fp32 and rounded once.
 *
 * Rows are dealt out in parts of a fixed size, so that sums over rows do not depend on the number of threads.
 */
#include "vectors.h"

#define PART 16 /* rows; a gradient that is summed over rows is summed over each part first */

typedef struct {
  const void *x, *gate, *grad, *weight;
  void *out, *out_gate;
  float *scale; /* [n] of RMSNorm: 1 / root of the mean square */
  float *sums;  /* [parts, width] of RMSNorm's backward pass: gradient of the weight, part by part */
  ptrdiff_t n, width, stride, grad_stride, out_stride; /* strides from row to row, in numbers */
  const void *cos, *sin; /* [n, half] of the rotation, rows `turn_stride` apart */
  ptrdiff_t heads, turn_stride;
  float eps, sign; /* sign of the sine: the other one turns back */
  int bf16, next;
} Rows;

/* out = x / root(mean(x^2) + eps) * weight; what is left of a row beyond whole vectors number by number. */
INLINE void norm(const Rows *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  const ptrdiff_t width = p->width, whole = width / LANES * LANES;
  for (ptrdiff_t i = first; i < last; i++) {
    const ptrdiff_t x = i * p->stride, out = i * width;
    floats squares = {0};
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats v = get(p->x, x + d, bf16);
      squares += v * v;
    }
    float total = sum(squares);
    for (ptrdiff_t d = whole; d < width; d++) total += get_one(p->x, x + d, bf16) * get_one(p->x, x + d, bf16);
    const float scale = 1.0f / __builtin_sqrtf(total / width + p->eps);
    for (ptrdiff_t d = 0; d < whole; d += LANES) set(p->out, out + d, get(p->x, x + d, bf16) * scale * get(p->weight, d, bf16), bf16);
    for (ptrdiff_t d = whole; d < width; d++)
      set_one(p->out, out + d, get_one(p->x, x + d, bf16) * scale * get_one(p->weight, d, bf16), bf16);
    if (p->scale) p->scale[i] = scale;
  }
}

/* With y = x * scale: grad of x = scale * (w g - y mean(w g y)), of w = sum over rows of g y. */
INLINE void norm_back(const Rows *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  const ptrdiff_t width = p->width, whole = width / LANES * LANES;
  float *sums = p->sums + first / PART * width;
  memset(sums, 0, width * sizeof *sums);
  for (ptrdiff_t i = first; i < last; i++) {
    const ptrdiff_t x = i * p->stride, g = i * p->grad_stride, out = i * width;
    const float scale = p->scale[i];
    floats dots = {0};
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats y = get(p->x, x + d, bf16) * scale, grad = get(p->grad, g + d, bf16);
      set(sums, d, get(sums, d, 0) + grad * y, 0);
      dots += grad * get(p->weight, d, bf16) * y;
    }
    float mean = sum(dots);
    for (ptrdiff_t d = whole; d < width; d++) {
      const float y = get_one(p->x, x + d, bf16) * scale, grad = get_one(p->grad, g + d, bf16);
      sums[d] += grad * y;
      mean += grad * get_one(p->weight, d, bf16) * y;
    }
    mean /= width;
    for (ptrdiff_t d = 0; d < whole; d += LANES) {
      const floats y = get(p->x, x + d, bf16) * scale;
      set(p->out, out + d, scale * (get(p->grad, g + d, bf16) * get(p->weight, d, bf16) - y * mean), bf16);
    }
    for (ptrdiff_t d = whole; d < width; d++) {
      const float y = get_one(p->x, x + d, bf16) * scale;
      set_one(p->out, out + d, scale * (get_one(p->grad, g + d, bf16) * get_one(p->weight, d, bf16) - y * mean), bf16);
    }
  }
}

/* out = gate * sigmoid(gate) * x */
INLINE floats gated(floats gate, floats x) { return gate / (1.0f + exponential(-gate)) * x; }

INLINE void silu(const Rows *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t i = first; i < last; i++)
    for (ptrdiff_t d = 0; d < p->width; d += LANES) {
      const ptrdiff_t at = d + LANES <= p->width ? d : p->width - LANES; /* the last vector may overlap the one before */
      set(p->out, i * p->out_stride + at, gated(get(p->gate, i * p->stride + at, bf16), get(p->x, i * p->stride + at, bf16)), bf16);
    }
}

INLINE void silu_back(const Rows *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  for (ptrdiff_t i = first; i < last; i++)
    for (ptrdiff_t d = 0; d < p->width; d += LANES) {
      const ptrdiff_t at = d + LANES <= p->width ? d : p->width - LANES;
      const floats gate = get(p->gate, i * p->stride + at, bf16), x = get(p->x, i * p->stride + at, bf16);
      const floats grad = get(p->grad, i * p->grad_stride + at, bf16), sigmoid = 1.0f / (1.0f + exponential(-gate));
      set(p->out, i * p->out_stride + at, grad * gate * sigmoid, bf16);
      set(p->out_gate, i * p->out_stride + at, grad * x * sigmoid * (1.0f + gate * (1.0f - sigmoid)), bf16);
    }
}

/* Each head's halves a, b become a cos - b sin, b cos + a sin; width: of a half. */
INLINE void rotate(const Rows *p, ptrdiff_t first, ptrdiff_t last, int bf16) {
  const ptrdiff_t half = p->width;
  for (ptrdiff_t i = first; i < last; i++)
    for (ptrdiff_t head = 0; head < p->heads; head++)
      for (ptrdiff_t d = 0; d < half; d += LANES) {
        const ptrdiff_t at = d + LANES <= half ? d : half - LANES, turn = i * p->turn_stride + at;
        const ptrdiff_t x = i * p->stride + 2 * head * half + at, out = 2 * (i * p->heads + head) * half + at;
        const floats cos = get(p->cos, turn, bf16), sin = get(p->sin, turn, bf16) * p->sign;
        const floats a = get(p->x, x, bf16), b = get(p->x, x + half, bf16);
        set(p->out, out, a * cos - b * sin, bf16);
        set(p->out, out + half, b * cos + a * sin, bf16);
      }
}

/* A thread that sleeps takes as long to wake as this many numbers to compute. */
INLINE int team_for(int threads, ptrdiff_t n, ptrdiff_t width) { return n * width < 1 << 17 ? 1 : threads; }

DEAL_OUT(norm, Rows, PART)
DEAL_OUT(norm_back, Rows, PART)
DEAL_OUT(silu, Rows, PART)
DEAL_OUT(silu_back, Rows, PART)
DEAL_OUT(rotate, Rows, PART)

/* x [n, width], rows `stride` apart, and weight [width] of one type; out [n, width]; scale [n] or NULL. */
void rlinf_norm(Team *team, int threads, const void *x, const void *weight, void *out, float *scale, ptrdiff_t n, ptrdiff_t width,
                ptrdiff_t stride, float eps, int bf16) {
  Rows p = {.x = x, .weight = weight, .out = out, .scale = scale, .n = n, .width = width, .stride = stride, .eps = eps, .bf16 = bf16};
  run(team, team_for(threads, n, width), norm_work, &p);
}

/* grad [n, width], rows `grad_stride` apart; out: gradient of x; sums [n / PART rounded up, width]: that of the weight, part by part. */
void rlinf_norm_back(Team *team, int threads, const void *x, const void *weight, const void *grad, float *scale, void *out, float *sums,
                     ptrdiff_t n, ptrdiff_t width, ptrdiff_t stride, ptrdiff_t grad_stride, int bf16) {
  Rows p = {.x = x, .weight = weight, .grad = grad, .scale = scale, .out = out, .sums = sums, .n = n, .width = width, .stride = stride,
            .grad_stride = grad_stride, .bf16 = bf16};
  run(team, team_for(threads, n, width), norm_back_work, &p);
}

/* gate and x [n, width], rows `stride` apart, width >= LANES; out [n, width]. */
void rlinf_silu(Team *team, int threads, const void *gate, const void *x, void *out, ptrdiff_t n, ptrdiff_t width, ptrdiff_t stride, int bf16) {
  Rows p = {.x = x, .gate = gate, .out = out, .n = n, .width = width, .stride = stride, .out_stride = width, .bf16 = bf16};
  run(team, team_for(threads, n, width), silu_work, &p);
}

/* grad [n, width]; the gradients of gate and x go to out_gate and out, rows `out_stride` apart. */
void rlinf_silu_back(Team *team, int threads, const void *gate, const void *x, const void *grad, void *out_gate, void *out, ptrdiff_t n,
                     ptrdiff_t width, ptrdiff_t stride, ptrdiff_t grad_stride, ptrdiff_t out_stride, int bf16) {
  Rows p = {.x = x, .gate = gate, .grad = grad, .out = out, .out_gate = out_gate, .n = n, .width = width, .stride = stride,
            .grad_stride = grad_stride, .out_stride = out_stride, .bf16 = bf16};
  run(team, team_for(threads, n, width), silu_back_work, &p);
}

/* x [n, heads, 2 * half], rows `stride` apart, half >= LANES; cos and sin [n, half], rows `turn_stride` apart; out [n, heads, 2 * half]. */
void rlinf_rotate(Team *team, int threads, const void *x, const void *cos, const void *sin, void *out, ptrdiff_t n, ptrdiff_t heads,
                  ptrdiff_t half, ptrdiff_t stride, ptrdiff_t turn_stride, float sign, int bf16) {
  Rows p = {.x = x, .cos = cos, .sin = sin, .out = out, .n = n, .heads = heads, .width = half, .stride = stride, .turn_stride = turn_stride,
            .sign = sign, .bf16 = bf16};
  run(team, team_for(threads, n, heads * half), rotate_work, &p);
}
