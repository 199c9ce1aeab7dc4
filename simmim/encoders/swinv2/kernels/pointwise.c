/* What is between the matrix products of a Swin V2 block, except its attention: the sum of the main path and a normalized
   branch, and GELU. And what is before the product of a patch merging: the concatenation of neighbors. Forward and backward
   pass, each in one pass over memory.

   B images, T tokens of an image, C channels. Tensors are contiguous. With `bf16` inputs and outputs of matrix products are
   bfloat16, else float32. All computations are float32. Functions return 0, or 1 if there is no memory. */
#include "share.h"

/* --- join: x + drop_factor · norm(branch + bias) -------------------------------------------------------------------- */

typedef struct {
    const void *branch;        /* (rows, C), a matrix product without its bias */
    const float *bias;         /* (C) */
    const float *norm_weight;  /* (C) */
    const float *norm_bias;    /* (C) */
    const float *drop_factors; /* (B), 0 or 1 / (1 - rate) of stochastic depth; NULL for 1 */
    long rows, rows_per_image, dim;
    float epsilon;
    int bf16, threads;
} Join;

/* What a pass reads and writes, see below. */
typedef struct {
    const Join *join;
    const float *x, *grad;
    const void *grad_bf16;
    float *out, *moments, *grad_sum, *sums;
    void *out_bf16, *grad_branch;
    long rows_of_one; /* rows in a piece */
} JoinCall;

static void join_piece(const void *of, long piece, float *y) {
    const JoinCall *call = of;
    const Join *s = call->join;
    float *zeros = y + round_up(s->dim, PAD), *moments = call->moments;
    Range range = range_of(piece, s->rows, call->rows_of_one);
    for (long row = range.first; row < range.last; row++) {
        float drop_factor = s->drop_factors ? s->drop_factors[row / s->rows_per_image] : 1, total = 0, squares = 0;
        load_row(y, s->branch, row * s->dim, s->dim, s->bf16);
#pragma omp simd reduction(+ : total)
        for (long c = 0; c < s->dim; c++) total += y[c] += s->bias[c];
        float mean = total / s->dim;
#pragma omp simd reduction(+ : squares)
        for (long c = 0; c < s->dim; c++) squares += (y[c] - mean) * (y[c] - mean);
        float rstd = 1 / sqrtf(squares / s->dim + s->epsilon);
        const float *from = call->x ? call->x + row * s->dim : zeros;
        float *to = call->out + row * s->dim;
#pragma omp simd
        for (long c = 0; c < s->dim; c++)
            to[c] = from[c] + drop_factor * ((y[c] - mean) * rstd * s->norm_weight[c] + s->norm_bias[c]);
        if (call->out_bf16) store_row(call->out_bf16, row * s->dim, to, s->dim, 1);
        if (moments) moments[2 * row] = mean, moments[2 * row + 1] = rstd;
    }
}

/* From x (rows, C), or NULL for 0, to out (rows, C), both float32; out_bf16 (rows, C), the same in bfloat16, or NULL; moments
   (rows, 2), the mean and 1 / deviation of each row, or NULL. */
int join_forward(const Join *s, const float *x, float *out, void *out_bf16, float *moments) {
    long rows_of_one = rows_in_piece(s->rows, s->dim, 1);
    JoinCall call = {
        .join = s, .x = x, .out = out, .out_bf16 = out_bf16, .moments = moments, .rows_of_one = rows_of_one,
    };
    return share_pieces(join_piece, &call, num_pieces(s->rows, rows_of_one), s->threads, 2 * round_up(s->dim, PAD));
}

#define SUMMED_ROWS 64 /* Sums over many thousand rows are sums of partial sums over 64, which are more precise. */

static void join_back_piece(const void *of, long piece, float *y) {
    const JoinCall *call = of;
    const Join *s = call->join;
    long dim = s->dim, c_pad = round_up(dim, PAD), count = 0;
    float *g = y + c_pad, *partial = g + c_pad, *totals = call->sums + piece * 3 * c_pad;
    Range range = range_of(piece, s->rows, call->rows_of_one);
    for (long row = range.first; row < range.last; row++) {
        float drop_factor = s->drop_factors ? s->drop_factors[row / s->rows_per_image] : 1;
        float mean = call->moments[2 * row], rstd = call->moments[2 * row + 1], total = 0, product = 0;
        const float *from = call->grad + row * dim;
        if (call->grad_bf16) {
            float *sum_row = call->grad_sum + row * dim;
            load_row(g, call->grad_bf16, row * dim, dim, 1);
#pragma omp simd
            for (long c = 0; c < dim; c++) sum_row[c] = from[c] + g[c];
            from = sum_row;
        }
        load_row(y, s->branch, row * dim, dim, s->bf16);
#pragma omp simd reduction(+ : total, product)
        for (long c = 0; c < dim; c++) {
            float unit = (y[c] + s->bias[c] - mean) * rstd, grad_norm = drop_factor * from[c];
            partial[c_pad + c] += grad_norm * unit;
            partial[2 * c_pad + c] += grad_norm;
            grad_norm *= s->norm_weight[c];
            y[c] = unit, g[c] = grad_norm;
            total += grad_norm, product += grad_norm * unit;
        }
        total /= dim, product /= dim;
#pragma omp simd
        for (long c = 0; c < dim; c++) {
            g[c] = rstd * (g[c] - total - y[c] * product);
            partial[c] += g[c];
        }
        store_row(call->grad_branch, row * dim, g, dim, s->bf16);
        if (++count % SUMMED_ROWS == 0 || row + 1 == range.last) {
            for (long c = 0; c < 3 * c_pad; c++) totals[c] += partial[c], partial[c] = 0;
        }
    }
}

/* From grad (rows, C) float32, the gradient of `out`, to grad_branch (rows, C), and grad_bias, grad_norm_weight and
   grad_norm_bias, (C) float32 each. The gradient of x is `grad` itself. If grad_bf16 (rows, C), the gradient of `out_bf16`, is
   not NULL, the sum of both takes the place of `grad` and is written to grad_sum (rows, C). */
int join_backward(
    const Join *s, const float *moments, const float *grad, const void *grad_bf16, float *grad_sum, void *grad_branch,
    float *grad_bias, float *grad_norm_weight, float *grad_norm_bias
) {
    long dim = s->dim, c_pad = round_up(dim, PAD), rows_of_one = rows_in_piece(s->rows, dim, SUMMED_ROWS);
    long pieces = num_pieces(s->rows, rows_of_one);
    float *sums = allocate_floats(pieces * 3 * c_pad);
    if (!sums) return 1;
    JoinCall call = {
        .join = s, .grad = grad, .grad_bf16 = grad_bf16, .grad_sum = grad_sum, .moments = (float *)moments, .sums = sums,
        .grad_branch = grad_branch, .rows_of_one = rows_of_one,
    };
    int failed = share_pieces(join_back_piece, &call, pieces, s->threads, 5 * c_pad);
    float *outputs[3] = {grad_bias, grad_norm_weight, grad_norm_bias};
    for (int i = 0; i < 3; i++) {
        memset(outputs[i], 0, dim * 4);
        for (long piece = 0; piece < pieces; piece++)
            for (long c = 0; c < dim; c++) outputs[i][c] += sums[(piece * 3 + i) * c_pad + c];
    }
    free(sums);
    return failed;
}

/* --- GELU: x · Φ(x), not by tanh, of a matrix product and its bias --------------------------------------------------- */

/* Φ(x) to 1e-7 by formula 7.1.26 of Abramowitz and Stegun, and the density φ(x). Both contain exp(-x² / 2). */
INLINE vec normal_cdf(vec x, vec *density) {
    vec z = vec_max(x, -x) * 0.70710678f;
    vec t = 1.0f / (z * 0.3275911f + 1.0f);
    vec gaussian = exponential(x * x * -0.5f);
    vec series = (((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
    vec tail = series * t * gaussian * 0.5f;
    *density = gaussian * 0.39894228f;
    return blend(x > 0, 1.0f - tail, tail);
}

/* For bfloat16: Φ(x) to 3e-7 and gelu'(x) to 7e-6 without exponential and division, as 1/2 + x · P(u). P is the minimax
   polynomial of its degree for x from -5 to 5. Beyond, both functions are close enough to 0 or 1. The argument is
   u = 2 (x / 5)² - 1, because in powers of x² the terms would cancel. */
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
    x = vec_min(broadcast(CURVE_END), vec_max(broadcast(-CURVE_END), x));
    vec u = x * x * (2 / (CURVE_END * CURVE_END)) - 1.0f, value = broadcast(series[0]);
    for (int i = 1; i <= degree; i++) value = value * u + series[i];
    return x * value + 0.5f;
}

/* Rows `first` to `last` of `gelu_forward`, where `bf16` is a constant. */
INLINE void gelu_rows(const void *x, const float *bias, void *out, long first, long last, long dim, int bf16) {
    for (long row = first; row < last; row++)
        for (long c = 0; c < dim; c += LANES) {
            vec value = load_partial(x, row * dim + c, dim - c, bf16) + load(bias + c), density;
            vec cdf = bf16 ? curve(value, CDF, CDF_DEGREE) : normal_cdf(value, &density);
            store_partial(out, row * dim + c, value * cdf, dim - c, bf16);
        }
}

typedef struct {
    const void *x;
    float *bias; /* (C padded) */
    void *grad, *out;
    float *sums; /* (pieces, C padded), of the gradient of the bias */
    long rows, dim, rows_of_one;
    int bf16;
} GeluCall;

static void gelu_piece(const void *of, long piece, float *unused) {
    const GeluCall *call = of;
    Range range = range_of(piece, call->rows, call->rows_of_one);
    (void)unused;
    if (call->bf16) gelu_rows(call->x, call->bias, call->out, range.first, range.last, call->dim, 1);
    else gelu_rows(call->x, call->bias, call->out, range.first, range.last, call->dim, 0);
}

/* out (rows, C) = gelu(x + bias). */
int gelu_forward(const void *x, const float *bias, void *out, long rows, long dim, int bf16, int threads) {
    float *padded_bias = allocate_floats(round_up(dim, PAD));
    if (!padded_bias) return 1;
    memcpy(padded_bias, bias, dim * 4);
    long rows_of_one = rows_in_piece(rows, dim, 1);
    GeluCall call = {
        .x = x, .bias = padded_bias, .out = out, .rows = rows, .dim = dim, .rows_of_one = rows_of_one, .bf16 = bf16,
    };
    int failed = share_pieces(gelu_piece, &call, num_pieces(rows, rows_of_one), threads, 0);
    free(padded_bias);
    return failed;
}

/* Rows `first` to `last` of `gelu_backward`, where `bf16` is a constant. `partial` and `totals` (C) sum the gradient of the
   bias. */
INLINE void gelu_rows_back(
    const void *x, const float *bias, void *grad, void *out, float *partial, float *totals, long first, long last, long dim,
    int bf16
) {
    for (long row = first; row < last; row++) {
        for (long c = 0; c < dim; c += LANES) {
            vec value = load_partial(x, row * dim + c, dim - c, bf16) + load(bias + c), density;
            vec cdf = bf16 ? curve(value, CDF, CDF_DEGREE) : normal_cdf(value, &density);
            vec slope = bf16 ? curve(value, SLOPE, SLOPE_DEGREE) : cdf + value * density;
            slope *= load_partial(grad, row * dim + c, dim - c, bf16);
            store_partial(out, row * dim + c, value * cdf, dim - c, bf16);
            store_partial(grad, row * dim + c, slope, dim - c, bf16);
            store(partial + c, load(partial + c) + slope);
        }
        if ((row - first) % SUMMED_ROWS == SUMMED_ROWS - 1 || row + 1 == last) {
            for (long c = 0; c < dim; c++) totals[c] += partial[c], partial[c] = 0;
        }
    }
}

static void gelu_back_piece(const void *of, long piece, float *partial) {
    const GeluCall *call = of;
    Range range = range_of(piece, call->rows, call->rows_of_one);
    float *totals = call->sums + piece * round_up(call->dim, PAD);
    if (call->bf16)
        gelu_rows_back(
            call->x, call->bias, call->grad, call->out, partial, totals, range.first, range.last, call->dim, 1
        );
    else
        gelu_rows_back(
            call->x, call->bias, call->grad, call->out, partial, totals, range.first, range.last, call->dim, 0
        );
}

/* Recomputes out (rows, C) = gelu(x + bias), replaces grad (rows, C), the gradient of `out`, by that of x, and writes
   grad_bias (C) float32. */
int gelu_backward(
    const void *x, const float *bias, void *grad, void *out, float *grad_bias, long rows, long dim, int bf16, int threads
) {
    long c_pad = round_up(dim, PAD), rows_of_one = rows_in_piece(rows, dim, SUMMED_ROWS);
    long pieces = num_pieces(rows, rows_of_one);
    float *memory = allocate_floats((pieces + 1) * c_pad);
    if (!memory) return 1;
    GeluCall call = {
        .x = x, .bias = memory + pieces * c_pad, .grad = grad, .out = out, .sums = memory, .rows = rows, .dim = dim,
        .rows_of_one = rows_of_one, .bf16 = bf16,
    };
    memcpy(call.bias, bias, dim * 4);
    int failed = share_pieces(gelu_back_piece, &call, pieces, threads, c_pad);
    memset(grad_bias, 0, dim * 4);
    for (long piece = 0; piece < pieces; piece++)
        for (long c = 0; c < dim; c++) grad_bias[c] += memory[piece * c_pad + c];
    free(memory);
    return failed;
}

/* --- patch merging: the concatenation of 2 × 2 neighbors --------------------------------------------------------------- */

typedef struct {
    long images, height, width, dim; /* of the map before merging */
    int bf16, threads;
} Merging;

typedef struct {
    const Merging *merging;
    const float *x, *zeros; /* zeros (C) */
    const void *grad;
    void *out;
    float *grad_x;
    long lines, lines_of_one; /* lines of the merged map, or of that before merging */
} MergingCall;

static void merging_piece(const void *of, long piece, float *unused) {
    const MergingCall *call = of;
    const Merging *s = call->merging;
    long dim = s->dim, rows = (s->height + 1) / 2, columns = (s->width + 1) / 2;
    Range range = range_of(piece, call->lines, call->lines_of_one);
    (void)unused;
    for (long line = range.first; line < range.last; line++)
        for (long place = 0; place < 4 * columns; place++) {
            long row = line % rows * 2 + place % 2, column = place / 2;
            int inside = row < s->height && column < s->width;
            long offset = ((line / rows * s->height + row) * s->width + column) * dim;
            const float *from = inside ? call->x + offset : call->zeros;
            store_row(call->out, (line * columns * 4 + place) * dim, from, dim, s->bf16);
        }
}

/* From x (B, H, W, C) float32 to out (B, ⌈H/2⌉, ⌈W/2⌉, 2, 2, C), the four neighbors in column-major order; zeros beyond the
   edges of the map. */
int merging_forward(const Merging *s, const float *x, void *out) {
    long lines = s->images * ((s->height + 1) / 2), lines_of_one = rows_in_piece(lines, s->width * s->dim, 1);
    float *zeros = allocate_floats(s->dim);
    if (!zeros) return 1;
    MergingCall call = {.merging = s, .x = x, .zeros = zeros, .out = out, .lines = lines, .lines_of_one = lines_of_one};
    int failed = share_pieces(merging_piece, &call, num_pieces(lines, lines_of_one), s->threads, 0);
    free(zeros);
    return failed;
}

static void merging_back_piece(const void *of, long piece, float *unused) {
    const MergingCall *call = of;
    const Merging *s = call->merging;
    long dim = s->dim, rows = (s->height + 1) / 2, columns = (s->width + 1) / 2;
    Range range = range_of(piece, call->lines, call->lines_of_one);
    (void)unused;
    for (long line = range.first; line < range.last; line++) {
        long row = line % s->height, merged = line / s->height * rows + row / 2;
        for (long column = 0; column < s->width; column++) {
            long place = merged * columns * 4 + column * 2 + row % 2;
            load_row(call->grad_x + (line * s->width + column) * dim, call->grad, place * dim, dim, s->bf16);
        }
    }
}

/* From grad, the gradient of `out`, to grad_x (B, H, W, C) float32. */
int merging_backward(const Merging *s, const void *grad, float *grad_x) {
    long lines = s->images * s->height, lines_of_one = rows_in_piece(lines, s->width * s->dim, 1);
    MergingCall call = {.merging = s, .grad = grad, .grad_x = grad_x, .lines = lines, .lines_of_one = lines_of_one};
    return share_pieces(merging_back_piece, &call, num_pieces(lines, lines_of_one), s->threads, 0);
}
