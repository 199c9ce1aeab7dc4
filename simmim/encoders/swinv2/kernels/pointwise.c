/* What stands between the matrix products of a Swin V2 block beside its attention: the normalized branch that joins the main
   path, and GELU; and before that of a merging, neighbors side by side; forward and backward, each in one pass over memory.

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

/* out (rows, C) from x (rows, C), both float32, where x may be NULL for 0; out_half (rows, C) the same in bfloat16, or NULL;
   moments (rows, 2), mean and 1 / deviation of each row, or NULL. */
int join_forward(const Join *s, const float *x, float *out, void *out_half, float *moments) {
    long wide = padded(s->dim, PAD), each = padded(2 * wide, LINE);
    float *memory = floats(s->threads * each);
    if (!memory) return 1;
#pragma omp parallel num_threads(s->threads)
    {
        float *y = memory + THREAD * each, *nothing = y + wide;
        for (long row = first_of(s->rows, THREAD, THREADS); row < first_of(s->rows, THREAD + 1, THREADS); row++) {
            float keep = s->keep ? s->keep[row / s->rows_an_image] : 1, total = 0, squares = 0;
            load_row(y, s->branch, row * s->dim, s->dim, s->half);
#pragma omp simd reduction(+ : total)
            for (long c = 0; c < s->dim; c++) total += y[c] += s->bias[c];
            float mean = total / s->dim;
#pragma omp simd reduction(+ : squares)
            for (long c = 0; c < s->dim; c++) squares += (y[c] - mean) * (y[c] - mean);
            float by = 1 / sqrtf(squares / s->dim + s->epsilon);
            const float *from = x ? x + row * s->dim : nothing;
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

/* Where the numbers are bfloat16, Φ(x) to 3e-7 and gelu'(x) to 7e-6, with neither exponential nor division, as
   1/2 + x · P(u): P has the least largest error of its degree for x of -5 to 5, beyond which both are as good as 0 or 1. They
   are in u = 2 (x / 5)² - 1: in x² itself terms would cancel. */
#define CURVE_END 5.0f
#define CDF_DEGREE 12
#define SLOPE_DEGREE 13
static const float CDF[] = {
    6.08721e-4f, -1.6132634e-3f, 1.7228173e-3f, -2.6855795e-3f, 6.4104917e-3f, -1.11643355e-2f, 1.6402183e-2f,
    -2.3268655e-2f, 3.144217e-2f, -4.044261e-2f, 5.1520523e-2f, -7.029628e-2f, 1.4136378e-1f,
};
static const float SLOPE[] = {
    -4.721046e-3f, 1.2106935e-2f, -1.0246893e-2f, 1.2638318e-2f, -3.47312e-2f, 5.6589477e-2f, -6.788703e-2f,
    7.820978e-2f, -8.445776e-2f, 8.0718756e-2f, -7.17865e-2f, 6.65437e-2f, -7.510933e-2f, 1.421341e-1f,
};

INLINE vec curve(vec x, const float *series, int degree) {
    x = smaller(all(CURVE_END), larger(all(-CURVE_END), x));
    vec u = x * x * (2 / (CURVE_END * CURVE_END)) - 1.0f, value = all(series[0]);
    for (int i = 1; i <= degree; i++) value = value * u + series[i];
    return x * value + 0.5f;
}

/* Some rows of `gelu_forward`, `half` a constant. */
INLINE void gelu_rows(const void *x, const float *bias, void *out, long first, long last, long dim, int half) {
    for (long row = first; row < last; row++)
        for (long c = 0; c < dim; c += LANES) {
            vec value = load_some(x, row * dim + c, dim - c, half) + load(bias + c), density;
            vec cdf = half ? curve(value, CDF, CDF_DEGREE) : normal_cdf(value, &density);
            store_some(out, row * dim + c, value * cdf, dim - c, half);
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
            vec cdf = half ? curve(value, CDF, CDF_DEGREE) : normal_cdf(value, &density);
            vec slope = half ? curve(value, SLOPE, SLOPE_DEGREE) : cdf + value * density;
            slope *= load_some(grad, row * dim + c, dim - c, half);
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

/* --- Patch merging: 2 × 2 neighbors side by side, column by column ----------------------------------------------------- */

typedef struct {
    long images, height, width, dim; /* of what is merged */
    int half, threads;
} Merging;

/* out (B, ⌈H/2⌉, ⌈W/2⌉, 2, 2, C), the column of the four before their row, from x (B, H, W, C), float32; zeros beyond its
   edges. */
int merging_forward(const Merging *s, const float *x, void *out) {
    long dim = s->dim, rows = (s->height + 1) / 2, columns = (s->width + 1) / 2;
    float *nothing = floats(dim);
    if (!nothing) return 1;
#pragma omp parallel num_threads(s->threads)
    {
        long lines = s->images * rows;
        for (long line = first_of(lines, THREAD, THREADS); line < first_of(lines, THREAD + 1, THREADS); line++)
            for (long place = 0; place < 4 * columns; place++) {
                long row = line % rows * 2 + place % 2, column = place / 2;
                int inside = row < s->height && column < s->width;
                const float *from = inside ? x + ((line / rows * s->height + row) * s->width + column) * dim : nothing;
                store_row(out, (line * columns * 4 + place) * dim, from, dim, s->half);
            }
    }
    free(nothing);
    return 0;
}

/* grad_x (B, H, W, C), float32, from the gradient of `out`. */
int merging_backward(const Merging *s, const void *grad, float *grad_x) {
    long dim = s->dim, rows = (s->height + 1) / 2, columns = (s->width + 1) / 2;
#pragma omp parallel num_threads(s->threads)
    {
        long lines = s->images * s->height;
        for (long line = first_of(lines, THREAD, THREADS); line < first_of(lines, THREAD + 1, THREADS); line++) {
            long row = line % s->height, merged = line / s->height * rows + row / 2;
            for (long column = 0; column < s->width; column++) {
                long place = merged * columns * 4 + column * 2 + row % 2;
                load_row(grad_x + (line * s->width + column) * dim, grad, place * dim, dim, s->half);
            }
        }
    }
    return 0;
}
