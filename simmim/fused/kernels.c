/* What stands between the matrix products of a Swin V2 block: scaled cosine attention inside shifted windows, the
   normalised branch that joins the main path, and GELU; forward and backward, each in one pass over memory.

   Shape letters as in simmim/swinv2.py: B images, T tokens of an image, M windows of an image, N tokens of a window, h
   heads, D channels of a head, C = h · D. Tensors are contiguous; `half` says that those which come from matrix products or
   go to them are bfloat16, not float32. Everything is computed in float32. Functions return 0, or 1 for want of memory. */
#include "vectors.h"

#define MASKED_LOGIT (-100.0f)
#define NO_TOKEN (-1e30f) /* logit of a column that only fills a vector */
#define SMALLEST_NORM 1e-12f

/* --- Attention --------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *qkv;          /* (B, T, 3, h, D), without biases */
    const float *q_bias;      /* (C) */
    const float *v_bias;      /* (C) */
    const float *scale;       /* (h), 1 / τ */
    const float *table;       /* (offsets, h), position bias of each offset */
    const int64_t *offset_of; /* (N, N), the offset of two tokens */
    const int32_t *token_of;  /* (M, N), where in the image a window's token is; -1 where it is padding */
    const uint8_t *region_of; /* (M, N): tokens of other regions than one's own are masked; NULL where none is */
    long images, tokens, windows, window_tokens, heads, head_dim, offsets;
    int half, threads;
} Attention;

/* Scratch of one thread: a window's head. Rows of N tokens are padded with rows of zeros to ROWS, columns to PAD. */
typedef struct {
    float *q, *k, *v;       /* (N, D): q normalised and scaled, k normalised */
    float *k_turned;        /* (D, N) */
    float *q_norm, *k_norm; /* (N), lengths */
    float *logits;          /* (ROWS, N) */
} Head;

INLINE long tokens_wide(const Attention *s) { return padded(s->window_tokens, PAD); }
INLINE long head_wide(const Attention *s) { return padded(s->head_dim, PAD); }

/* (h, N, N padded): what is added to the logits of each pair of tokens. */
static float *bias_of_pairs(const Attention *s) {
    long n = s->window_tokens, wide = tokens_wide(s);
    float *bias = floats(s->heads * n * wide);
    if (!bias) return NULL;
    for (long head = 0; head < s->heads; head++)
        for (long i = 0; i < n; i++) {
            float *row = bias + (head * n + i) * wide;
            for (long j = 0; j < n; j++) row[j] = s->table[s->offset_of[i * n + j] * s->heads + head];
            for (long j = n; j < wide; j++) row[j] = NO_TOKEN;
        }
    return bias;
}

static long head_floats(const Attention *s) {
    long wide = tokens_wide(s), dim = head_wide(s);
    return 3 * wide * dim + dim * wide + 2 * wide + ROWS * wide;
}

static Head head_in(float *memory, const Attention *s) {
    long wide = tokens_wide(s), dim = head_wide(s);
    Head head;
    head.q = memory, head.k = head.q + wide * dim, head.v = head.k + wide * dim;
    head.k_turned = head.v + wide * dim;
    head.q_norm = head.k_turned + dim * wide, head.k_norm = head.q_norm + wide;
    head.logits = head.k_norm + wide;
    return head;
}

/* x (D padded) to unit length and then times `by`; its length before, not below SMALLEST_NORM. */
INLINE float normalise(float *x, long dim, float by) {
    vec squares = all(0);
    for (long d = 0; d < dim; d += LANES) squares += load(x + d) * load(x + d);
    float length = sqrtf(sum(squares));
    length = length > SMALLEST_NORM ? length : SMALLEST_NORM;
    for (long d = 0; d < dim; d += LANES) store(x + d, load(x + d) * (by / length));
    return length;
}

/* Queries, keys and values of one head in one window, with biases; those of padding are the biases alone. */
static void gather(const Attention *s, Head *to, long image, long window, long head) {
    long n = s->window_tokens, d = s->head_dim, dim = head_wide(s), wide = tokens_wide(s), c = s->heads * d;
    const float *q_bias = s->q_bias + head * d, *v_bias = s->v_bias + head * d;
    for (long i = 0; i < n; i++) {
        long token = s->token_of[window * n + i];
        float *q = to->q + i * dim, *k = to->k + i * dim, *v = to->v + i * dim;
        if (token >= 0) {
            long at = ((image * s->tokens + token) * 3) * c + head * d;
            load_row(q, s->qkv, at, d, s->half);
            load_row(k, s->qkv, at + c, d, s->half);
            load_row(v, s->qkv, at + 2 * c, d, s->half);
        } else {
            memset(q, 0, d * 4), memset(k, 0, d * 4), memset(v, 0, d * 4);
        }
        for (long e = 0; e < d; e++) q[e] += q_bias[e], v[e] += v_bias[e];
        to->q_norm[i] = normalise(q, dim, s->scale[head]);
        to->k_norm[i] = normalise(k, dim, 1);
    }
    for (long i = 0; i < n; i++)
        for (long e = 0; e < d; e++) to->k_turned[e * wide + i] = to->k[i * dim + e];
}

/* Whether a window has tokens of several regions. */
static int is_divided(const Attention *s, long window) {
    if (!s->region_of) return 0;
    const uint8_t *region = s->region_of + window * s->window_tokens;
    for (long i = 1; i < s->window_tokens; i++)
        if (region[i] != region[0]) return 1;
    return 0;
}

/* Logits of ROWS queries from `first` on, (ROWS, N padded). */
INLINE void logits_of(
    const Attention *s, const Head *from, const float *bias, float *logits, long first, long window, long head, int divided
) {
    long n = s->window_tokens, wide = tokens_wide(s), dim = head_wide(s);
    some_rows(0, from->q + first * dim, dim, 1, from->k_turned, wide, logits, wide, wide, s->head_dim);
    for (long row = 0; row < ROWS && first + row < n; row++) {
        float *line = logits + row * wide;
        const float *added = bias + (head * n + first + row) * wide;
        for (long j = 0; j < wide; j += LANES) store(line + j, load(line + j) + load(added + j));
        if (divided) {
            const uint8_t *region = s->region_of + window * n;
            for (long j = 0; j < n; j++) line[j] += region[j] != region[first + row] ? MASKED_LOGIT : 0;
        }
    }
}

/* Pairs of rows of x (rows, columns, a multiple of LANES), lane by lane: (⌈rows / 2⌉, columns); the last may lack its
   second, which is 0. */
INLINE void pair_rows(float *to, const float *x, long rows, long columns) {
    for (long row = 0; row < rows; row += 2)
        for (long c = 0; c < columns; c += LANES) {
            vec second = row + 1 < rows ? load(x + (row + 1) * columns + c) : all(0);
            store_pairs(to + row / 2 * columns + c, paired(load(x + row * columns + c), second));
        }
}

/* out (B, T, C); log_sums (B, M, h, N), of each query's logits, for the backward pass, or NULL. */
int attention_forward(const Attention *s, void *out, float *log_sums) {
    long n = s->window_tokens, d = s->head_dim, wide = tokens_wide(s), dim = head_wide(s), c = s->heads * d;
    long a_head = s->images * s->windows, jobs = a_head * s->heads;
    int pairs = HAS_PAIRS && s->half; /* weights times values in bfloat16, as their products' type is */
    long each = padded(head_floats(s) + ROWS * dim + padded(n, 2) / 2 * dim + ROWS * wide / 2, LINE);
    float *bias = bias_of_pairs(s), *memory = floats(s->threads * each);
    if (!bias || !memory) return free(bias), free(memory), 1;
#pragma omp parallel num_threads(s->threads)
    {
        Head head = head_in(memory + THREAD * each, s);
        float *mixed = memory + THREAD * each + head_floats(s);
        float *v_pairs = mixed + ROWS * dim, *weight_pairs = v_pairs + padded(n, 2) / 2 * dim;
        for (long job = first_of(jobs, THREAD, THREADS); job < first_of(jobs, THREAD + 1, THREADS); job++) {
            long number = job % s->heads, image = job / s->heads / s->windows, window = job / s->heads % s->windows;
            int divided = is_divided(s, window);
            float *log_sum = log_sums ? log_sums + ((image * s->windows + window) * s->heads + number) * n : NULL;
            gather(s, &head, image, window, number);
            if (pairs) pair_rows(v_pairs, head.v, n, dim);
            for (long first = 0; first < n; first += ROWS) {
                float by[ROWS] = {0};
                logits_of(s, &head, bias, head.logits, first, window, number, divided);
                for (long row = 0; row < ROWS && first + row < n; row++) {
                    float *line = head.logits + row * wide;
                    vec most = load(line), total = all(0);
                    for (long j = LANES; j < wide; j += LANES) most = larger(most, load(line + j));
                    float top = largest(most);
                    for (long j = 0; j < wide; j += LANES) {
                        vec weight = exponential(load(line + j) - top);
                        store(line + j, weight);
                        total += weight;
                    }
                    float whole = sum(total);
                    by[row] = 1 / whole;
                    if (log_sum) log_sum[first + row] = top + logf(whole);
                }
                if (pairs) {
                    store_row(weight_pairs, 0, head.logits, ROWS * wide, 1);
                    some_rows(1, weight_pairs, wide / 2, 1, v_pairs, dim, mixed, dim, dim, (n + 1) / 2);
                } else {
                    some_rows(0, head.logits, wide, 1, head.v, dim, mixed, dim, dim, n);
                }
                for (long row = 0; row < ROWS && first + row < n; row++) {
                    long token = s->token_of[window * n + first + row];
                    if (token < 0) continue;
                    float *line = mixed + row * dim;
                    for (long e = 0; e < dim; e += LANES) store(line + e, load(line + e) * by[row]);
                    store_row(out, (image * s->tokens + token) * c + number * d, line, d, s->half);
                }
            }
        }
    }
    free(bias), free(memory);
    return 0;
}

/* The gradient of a normalised x from that of `by` · x / length, in place: `unit` is by · x / length. */
INLINE void normalise_back(float *grad, const float *unit, float length, float by, long dim) {
    vec product = all(0);
    for (long d = 0; d < dim; d += LANES) product += load(grad + d) * load(unit + d);
    /* Where the length was too small to divide by, it is a constant. */
    float along = length > SMALLEST_NORM ? sum(product) / (by * by) : 0;
    for (long d = 0; d < dim; d += LANES) store(grad + d, (load(grad + d) - load(unit + d) * along) * (by / length));
}

/* From grad_out (B, T, C): grad_qkv (B, T, 3, h, D), and in float32 grad_q_bias (C), grad_v_bias (C), grad_scale (h),
   grad_table (offsets, h). */
int attention_backward(
    const Attention *s, const float *log_sums, const void *grad_out, void *grad_qkv, float *grad_q_bias, float *grad_v_bias,
    float *grad_scale, float *grad_table
) {
    long n = s->window_tokens, d = s->head_dim, wide = tokens_wide(s), dim = head_wide(s), c = s->heads * d;
    long a_head = s->images * s->windows, jobs = a_head * s->heads;
    long squares = wide * wide, table = s->heads * n * wide;
    int pairs = HAS_PAIRS && s->half;
    /* Of a thread: the head; weights and gradients of logits; gradients in and of q; turned values and gradients; pairs. */
    long of_pairs_too = squares / 2 + wide * dim;
    long each = padded(head_floats(s) + 2 * squares + 2 * wide * dim + 3 * dim * wide + dim + of_pairs_too, LINE);
    long sums = padded(table + 2 * c + s->heads, LINE);
    float *bias = bias_of_pairs(s), *memory = floats(s->threads * each), *totals = floats(s->threads * sums);
    if (!bias || !memory || !totals) return free(bias), free(memory), free(totals), 1;
#pragma omp parallel num_threads(s->threads)
    {
        Head head = head_in(memory + THREAD * each, s);
        float *weights = memory + THREAD * each + head_floats(s), *grad_logits = weights + squares;
        float *grad = grad_logits + squares, *grad_q = grad + wide * dim, *v_turned = grad_q + wide * dim;
        float *grad_k = v_turned + dim * wide, *grad_v = grad_k + dim * wide, *row_grad = grad_v + dim * wide;
        /* Weights by pairs of queries; the output's gradient by pairs of channels and of tokens. */
        float *weight_pairs = row_grad + dim, *grad_pairs = weight_pairs + squares / 2;
        float *grads_paired = grad_pairs + wide * dim / 2, *v_pairs = v_turned;
        float *of_pairs = totals + THREAD * sums, *of_q = of_pairs + table, *of_v = of_q + c, *of_scale = of_v + c;
        for (long job = first_of(jobs, THREAD, THREADS); job < first_of(jobs, THREAD + 1, THREADS); job++) {
            long number = job % s->heads, image = job / s->heads / s->windows, window = job / s->heads % s->windows;
            int divided = is_divided(s, window);
            float scale = s->scale[number];
            const float *log_sum = log_sums + ((image * s->windows + window) * s->heads + number) * n;
            gather(s, &head, image, window, number);
            for (long i = 0; i < n; i++) {
                long token = s->token_of[window * n + i];
                if (token >= 0) load_row(grad + i * dim, grad_out, (image * s->tokens + token) * c + number * d, d, s->half);
                else memset(grad + i * dim, 0, dim * 4);
                if (!pairs)
                    for (long e = 0; e < d; e++) v_turned[e * wide + i] = head.v[i * dim + e];
            }
            if (pairs) {
                float row_pairs[dim / 2];
                for (long i = 0; i < n; i++) {
                    store_row(row_pairs, 0, head.v + i * dim, dim, 1);
                    for (long p = 0; p < dim / 2; p++) v_pairs[p * wide + i] = row_pairs[p];
                }
                store_row(grad_pairs, 0, grad, wide * dim, 1);
                pair_rows(grads_paired, grad, n, dim);
            }
            for (long first = 0; first < n; first += ROWS) {
                float *weight = weights + first * wide, *slope = grad_logits + first * wide;
                logits_of(s, &head, bias, weight, first, window, number, divided);
                if (pairs)
                    some_rows(1, grad_pairs + first * dim / 2, dim / 2, 1, v_pairs, wide, slope, wide, wide, dim / 2);
                else
                    some_rows(0, grad + first * dim, dim, 1, v_turned, wide, slope, wide, wide, d);
                for (long row = 0; row < ROWS && first + row < n; row++) {
                    float *w = weight + row * wide, *g = slope + row * wide;
                    float *summed = of_pairs + (number * n + first + row) * wide;
                    vec product = all(0);
                    for (long j = 0; j < wide; j += LANES) {
                        vec share = exponential(load(w + j) - log_sum[first + row]);
                        store(w + j, share);
                        product += share * load(g + j);
                    }
                    float mean = sum(product);
                    for (long j = 0; j < wide; j += LANES) {
                        vec value = load(w + j) * (load(g + j) - mean);
                        store(g + j, value);
                        store(summed + j, load(summed + j) + value);
                    }
                }
            }
            if (pairs) pair_rows(weight_pairs, weights, n, wide);
            for (long first = 0; first < dim; first += ROWS) {
                float *to = grad_v + first * wide;
                if (pairs) some_rows(1, grads_paired + first, 1, dim, weight_pairs, wide, to, wide, wide, (n + 1) / 2);
                else some_rows(0, grad + first, 1, dim, weights, wide, to, wide, wide, n);
                some_rows(0, head.q + first, 1, dim, grad_logits, wide, grad_k + first * wide, wide, wide, n);
            }
            for (long first = 0; first < n; first += ROWS)
                some_rows(0, grad_logits + first * wide, wide, 1, head.k, dim, grad_q + first * dim, dim, dim, n);
            float turned = 0;
            for (long i = 0; i < n; i++) {
                long token = s->token_of[window * n + i];
                long at = ((image * s->tokens + token) * 3) * c + number * d;
                float *q = grad_q + i * dim;
                vec along = all(0);
                for (long e = 0; e < dim; e += LANES) along += load(q + e) * load(head.q + i * dim + e);
                turned += sum(along);
                normalise_back(q, head.q + i * dim, head.q_norm[i], scale, dim);
                for (long e = 0; e < d; e++) of_q[number * d + e] += q[e];
                if (token >= 0) store_row(grad_qkv, at, q, d, s->half);
                for (long e = 0; e < d; e++) row_grad[e] = grad_v[e * wide + i];
                for (long e = 0; e < d; e++) of_v[number * d + e] += row_grad[e];
                if (token < 0) continue;
                store_row(grad_qkv, at + 2 * c, row_grad, d, s->half);
                for (long e = 0; e < dim; e++) row_grad[e] = e < d ? grad_k[e * wide + i] : 0;
                normalise_back(row_grad, head.k + i * dim, head.k_norm[i], 1, dim);
                store_row(grad_qkv, at + c, row_grad, d, s->half);
            }
            of_scale[number] += turned / scale;
        }
    }
    memset(grad_q_bias, 0, c * 4), memset(grad_v_bias, 0, c * 4), memset(grad_scale, 0, s->heads * 4);
    memset(grad_table, 0, s->offsets * s->heads * 4);
    for (long thread = 0; thread < s->threads; thread++) {
        const float *of_pairs = totals + thread * sums, *of_q = of_pairs + table, *of_v = of_q + c, *of_scale = of_v + c;
        for (long e = 0; e < c; e++) grad_q_bias[e] += of_q[e], grad_v_bias[e] += of_v[e];
        for (long head = 0; head < s->heads; head++) {
            grad_scale[head] += of_scale[head];
            for (long i = 0; i < n; i++)
                for (long j = 0; j < n; j++)
                    grad_table[s->offset_of[i * n + j] * s->heads + head] += of_pairs[(head * n + i) * wide + j];
        }
    }
    free(bias), free(memory), free(totals);
    return 0;
}

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
   each. The gradient of x is `grad` itself. */
int join_backward(
    const Join *s, const float *moments, const float *grad, void *grad_branch, float *grad_bias, float *grad_gain,
    float *grad_shift
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
