/* What stands between the matrix products of a Swin V2 block beside its attention: the normalised branch that joins the main
   path, and GELU; forward and backward, each in one pass over memory.

   B images, T tokens of an image, C channels. Tensors are contiguous; `half` says that those which come from matrix products
   or go to them are bfloat16, not float32. Everything is computed in float32. Functions return 0, or 1 for want of memory. */
#include "vectors.h"

/* --- A branch joins the main path: x + keep · norm(branch + bias) --------------------------------------------------- */

typedef struct {
    const void *branch;  /* (rows, C), a matrix product without its bias */
    const float *bias;   /* (C) */
    const float *gain;   /* (C), of the norm */
    const float *shift;  /* (C) */
    const float *keep;   /* (images), 0 or 1 / (1 - rate) of stochastic depth; NULL for 1 */
    long rows, rows_an_image, dim;
    float epsilon;
    int half, threads;
} Join;

/* out (rows, C) from x (rows, C), both float32; out_half (rows, C) the same in bfloat16, or NULL; moments (rows, 2), mean
   and 1 / deviation of each row, or NULL. */
int join_forward(const Join *s, const float *x, float *out, void *out_half, float *moments) {
    long wide = padded(s->dim, PAD), each = padded(wide, LINE);
    float *memory = floats(s->threads * each);
    if (!memory) return 1;
#pragma omp parallel num_threads(s->threads)
    {
        float *y = memory + THREAD * each;
        for (long row = first_of(s->rows, THREAD, THREADS); row < first_of(s->rows, THREAD + 1, THREADS); row++) {
            float keep = s->keep ? s->keep[row / s->rows_an_image] : 1, total = 0, squares = 0;
            load_row(y, s->branch, row * s->dim, s->dim, s->half);
#pragma omp simd reduction(+ : total)
            for (long c = 0; c < s->dim; c++) total += y[c] += s->bias[c];
            float mean = total / s->dim;
#pragma omp simd reduction(+ : squares)
            for (long c = 0; c < s->dim; c++) squares += (y[c] - mean) * (y[c] - mean);
            float by = 1 / sqrtf(squares / s->dim + s->epsilon);
            const float *from = x + row * s->dim;
            float *to = out + row * s->dim;
#pragma omp simd
            for (long c = 0; c < s->dim; c++) to[c] = from[c] + keep * ((y[c] - mean) * by * s->gain[c] + s->shift[c]);
            if (out_half) store_row(out_half, row * s->dim, to, s->dim, 1);
            if (moments) moments[2 * row] = mean, moments[2 * row + 1] = by;
        }
    }
    free(memory);
    return 0;
}

#define SUMMED_ROWS 64 /* are added up by themselves first: sums of many thousand rows keep their digits */

/* From grad (rows, C), float32, of the output: grad_branch (rows, C), and in float32 grad_bias, grad_gain, grad_shift, (C)
   each. The gradient of x is `grad` itself. Where grad_half (rows, C), of out_half, is not NULL, all this is of the sum of
   both, which goes to `both` (rows, C). */
int join_backward(
    const Join *s, const float *moments, const float *grad, const void *grad_half, float *both, void *grad_branch,
    float *grad_bias, float *grad_gain, float *grad_shift
) {
    long dim = s->dim, wide = padded(dim, PAD), each = padded(8 * wide, LINE);
    float *memory = floats(s->threads * each);
    if (!memory) return 1;
#pragma omp parallel num_threads(s->threads)
    {
        float *y = memory + THREAD * each, *g = y + wide, *some = g + wide, *whole = some + 3 * wide;
        long last = first_of(s->rows, THREAD + 1, THREADS), count = 0;
        for (long row = first_of(s->rows, THREAD, THREADS); row < last; row++) {
            float keep = s->keep ? s->keep[row / s->rows_an_image] : 1, mean = moments[2 * row], by = moments[2 * row + 1];
            float total = 0, product = 0;
            const float *from = grad + row * dim;
            if (grad_half) {
                float *whole_row = both + row * dim;
                load_row(g, grad_half, row * dim, dim, 1);
#pragma omp simd
                for (long c = 0; c < dim; c++) whole_row[c] = from[c] + g[c];
                from = whole_row;
            }
            load_row(y, s->branch, row * dim, dim, s->half);
#pragma omp simd reduction(+ : total, product)
            for (long c = 0; c < dim; c++) {
                float unit = (y[c] + s->bias[c] - mean) * by, mine = keep * from[c];
                some[wide + c] += mine * unit;
                some[2 * wide + c] += mine;
                mine *= s->gain[c];
                y[c] = unit, g[c] = mine;
                total += mine, product += mine * unit;
            }
            total /= dim, product /= dim;
#pragma omp simd
            for (long c = 0; c < dim; c++) {
                g[c] = by * (g[c] - total - y[c] * product);
                some[c] += g[c];
            }
            store_row(grad_branch, row * dim, g, dim, s->half);
            if (++count % SUMMED_ROWS == 0 || row + 1 == last) {
                for (long c = 0; c < 3 * wide; c++) whole[c] += some[c], some[c] = 0;
            }
        }
    }
    float *sums[3] = {grad_bias, grad_gain, grad_shift};
    for (int what = 0; what < 3; what++) {
        memset(sums[what], 0, dim * 4);
        for (long thread = 0; thread < s->threads; thread++)
            for (long c = 0; c < dim; c++) sums[what][c] += memory[thread * each + (5 + what) * wide + c];
    }
    free(memory);
    return 0;
}

/* --- GELU: x · Φ(x), exact, of a matrix product and its bias ---------------------------------------------------------- */

/* Φ(x) to 1e-7 and the density φ(x), by formula 7.1.26 of Abramowitz and Stegun, which both need exp(-x² / 2). */
INLINE vec normal_cdf(vec x, vec *density) {
    vec size = larger(x, -x) * 0.70710678f;
    vec t = 1.0f / (size * 0.3275911f + 1.0f);
    vec e = exponential(x * x * -0.5f);
    vec series = (((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    vec tail = series * t * e * 0.5f;
    *density = e * 0.39894228f;
    return choose(x > 0, 1.0f - tail, tail);
}

/* Some rows of `gelu_forward`, `half` a constant. */
INLINE void gelu_rows(const void *x, const float *bias, void *out, long first, long last, long dim, int half) {
    for (long row = first; row < last; row++)
        for (long c = 0; c < dim; c += LANES) {
            vec value = load_some(x, row * dim + c, dim - c, half) + load(bias + c), density;
            store_some(out, row * dim + c, value * normal_cdf(value, &density), dim - c, half);
        }
}

/* out (rows, C) = gelu(x + bias). */
int gelu_forward(const void *x, const float *bias, void *out, long rows, long dim, int half, int threads) {
    float *added = floats(padded(dim, PAD));
    if (!added) return 1;
    memcpy(added, bias, dim * 4);
#pragma omp parallel num_threads(threads)
    {
        long first = first_of(rows, THREAD, THREADS), last = first_of(rows, THREAD + 1, THREADS);
        if (half) gelu_rows(x, added, out, first, last, dim, 1);
        else gelu_rows(x, added, out, first, last, dim, 0);
    }
    free(added);
    return 0;
}

/* Some rows of `gelu_backward`, `half` a constant; some and whole (C) add up the bias's gradient. */
INLINE void gelu_rows_back(
    const void *x, const float *bias, void *grad, void *out, float *some, float *whole, long first, long last, long dim,
    int half
) {
    for (long row = first; row < last; row++) {
        for (long c = 0; c < dim; c += LANES) {
            vec value = load_some(x, row * dim + c, dim - c, half) + load(bias + c), density;
            vec cdf = normal_cdf(value, &density);
            vec slope = load_some(grad, row * dim + c, dim - c, half) * (cdf + value * density);
            store_some(out, row * dim + c, value * cdf, dim - c, half);
            store_some(grad, row * dim + c, slope, dim - c, half);
            store(some + c, load(some + c) + slope);
        }
        if ((row - first) % SUMMED_ROWS == SUMMED_ROWS - 1 || row + 1 == last) {
            for (long c = 0; c < dim; c++) whole[c] += some[c], some[c] = 0;
        }
    }
}

/* out (rows, C) = gelu(x + bias) again, and grad (rows, C) of it becomes that of x; grad_bias (C), float32. */
int gelu_backward(
    const void *x, const float *bias, void *grad, void *out, float *grad_bias, long rows, long dim, int half, int threads
) {
    long wide = padded(dim, LINE), each = 2 * wide;
    float *memory = floats(threads * each + wide);
    if (!memory) return 1;
    float *added = memory + threads * each;
    memcpy(added, bias, dim * 4);
#pragma omp parallel num_threads(threads)
    {
        float *some = memory + THREAD * each, *whole = some + wide;
        long first = first_of(rows, THREAD, THREADS), last = first_of(rows, THREAD + 1, THREADS);
        if (half) gelu_rows_back(x, added, grad, out, some, whole, first, last, dim, 1);
        else gelu_rows_back(x, added, grad, out, some, whole, first, last, dim, 0);
    }
    memset(grad_bias, 0, dim * 4);
    for (long thread = 0; thread < threads; thread++)
        for (long c = 0; c < dim; c++) grad_bias[c] += memory[thread * each + wide + c];
    free(memory);
    return 0;
}
