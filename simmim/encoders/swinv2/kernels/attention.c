/* Scaled cosine attention inside shifted windows, forward and backward, each in one pass over memory.

   Shape letters as in simmim/swinv2.py: B images, T tokens of an image, M windows of an image, N tokens of a window, h
   heads, D channels of a head, C = h · D. Tensors are contiguous; `half` says that those which come from matrix products or
   go to them are bfloat16, not float32. Functions return 0, or 1 for want of memory.

   Logits are (q · k) · scale / |q| / |k| + bias: the product is of q and k as they come, so that bfloat16 loses nothing of
   them, and its factors, like everything that is no product, are float32. */
#include "product.h"

#define NO_TOKEN (-1e30f) /* logit of a column that only fills a vector */
#define SMALLEST_NORM 1e-12f
#define USUAL_HEAD 32 /* channels, for which loops are unrolled */

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

/* One head of one window, and how it is laid out: N and D padded to whole vectors, by rows and columns of zeros. */
typedef struct {
    int pairs;                       /* whether products are of pairs of bfloat16 */
    long number, window, image;
    long n, wide, d, dim;            /* tokens of the window, and padded; channels of the head, and padded */
    const float *q, *k, *v;          /* (N, D) */
    const float *q_by, *k_by;        /* (N): scale / |q| and 1 / |k| */
    const float *q_rows;             /* (N, D) for products along D */
    const float *k_turned, *v_turned; /* (D, N), likewise */
    const float *bias;               /* (N, N) */
    const uint8_t *region;           /* (N), or NULL where all are of one region */
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

/* Whether a window has tokens of several regions. */
static int is_divided(const uint8_t *region, long n) {
    for (long i = 1; i < n; i++)
        if (region[i] != region[0]) return 1;
    return 0;
}

/* 1 / |x| of x (D padded), whose length counts as SMALLEST_NORM where it is less. */
INLINE float inverse_length(const float *x, long dim) {
    vec squares = all(0);
    for (long e = 0; e < dim; e += LANES) squares += load(x + e) * load(x + e);
    float length = sqrtf(sum(squares));
    return 1 / (length > SMALLEST_NORM ? length : SMALLEST_NORM);
}

/* Scratch that `gather` needs of a thread, in floats. */
static long gathered_floats(const Attention *s) {
    long wide = tokens_wide(s), dim = head_wide(s);
    return 6 * wide * dim + 2 * wide + 2 * dim;
}

/* A row of D channels, padded, times 1 and plus `bias` (D padded); where there is no token, `bias` alone. */
INLINE void take_row(const Attention *s, float *to, const float *bias, long token, long at, long d, long dim) {
    if (token < 0) {
        memcpy(to, bias, dim * 4);
        return;
    }
    load_row(to, s->qkv, at, d, s->half);
    for (long e = 0; e < dim; e += LANES) store(to + e, load(to + e) + load(bias + e));
}

/* `gather`, where d may be a constant. */
INLINE Head gathered(const Attention *s, long job, const float *bias, float *memory, long d, int for_gradient) {
    long n = s->window_tokens, dim = padded(d, PAD), wide = tokens_wide(s), c = s->heads * d;
    int pairs = HAS_PAIRS && s->half;
    long number = job % s->heads, window = job / s->heads % s->windows, image = job / s->heads / s->windows;
    float *q = memory, *k = q + wide * dim, *v = k + wide * dim, *q_by = v + wide * dim, *k_by = q_by + wide;
    float *rows = k_by + wide, *k_turned = rows + wide * dim, *v_turned = k_turned + wide * dim;
    float *q_bias = v_turned + wide * dim, *v_bias = q_bias + dim;
    memcpy(q_bias, s->q_bias + number * d, d * 4), memcpy(v_bias, s->v_bias + number * d, d * 4);
    const int32_t *token_of = s->token_of + window * n;
    for (long i = 0; i < n; i++) {
        float *q_row = q + i * dim, *k_row = k + i * dim, *v_row = v + i * dim;
        long token = token_of[i], at = (image * s->tokens + token) * 3 * c + number * d;
        take_row(s, q_row, q_bias, token, at, d, dim);
        if (token >= 0) load_row(k_row, s->qkv, at + c, d, s->half);
        else memset(k_row, 0, dim * 4);
        take_row(s, v_row, v_bias, token, at + 2 * c, d, dim);
        if (pairs) { /* q is what the product takes it for */
            store_row(rows + i * dim / 2, 0, q_row, dim, 1);
            load_row(q_row, rows + i * dim / 2, 0, dim, 1);
        }
        q_by[i] = s->scale[number] * inverse_length(q_row, dim);
        k_by[i] = inverse_length(k_row, dim);
        turn_row(pairs, k_turned + i, wide, k_row, dim);
        if (for_gradient) turn_row(pairs, v_turned + i, wide, v_row, dim);
    }
    const uint8_t *region = s->region_of ? s->region_of + window * n : NULL;
    return (Head){
        .pairs = pairs, .number = number, .window = window, .image = image, .n = n, .wide = wide, .d = d, .dim = dim,
        .q = q, .k = k, .v = v, .q_by = q_by, .k_by = k_by, .q_rows = pairs ? rows : q, .k_turned = k_turned,
        .v_turned = v_turned, .bias = bias + number * n * wide,
        .region = region && is_divided(region, n) ? region : NULL,
    };
}

/* A head's queries, keys and values, with biases; those of padding are the biases alone. */
static Head gather(const Attention *s, long job, const float *bias, float *memory, int for_gradient) {
    if (s->head_dim == USUAL_HEAD) return gathered(s, job, bias, memory, USUAL_HEAD, for_gradient);
    return gathered(s, job, bias, memory, s->head_dim, for_gradient);
}

/* Logits of ROWS queries from `first` on, (ROWS, N padded). */
INLINE void logits_of(const Head *from, float *logits, long first) {
    long wide = from->wide, dim = from->dim, stride = steps(from->pairs, dim);
    product(from->pairs, from->q_rows + first * stride, stride, 1, from->k_turned, wide, logits, wide, from->d);
    for (long row = 0; row < ROWS && first + row < from->n; row++) {
        float *line = logits + row * wide, by = from->q_by[first + row];
        const float *bias = from->bias + (first + row) * wide;
        for (long j = 0; j < wide; j += LANES)
            store(line + j, load(line + j) * (load(from->k_by + j) * by) + load(bias + j));
        if (from->region) {
            uint8_t own = from->region[first + row];
            for (long j = 0; j < from->n; j++) line[j] += from->region[j] != own ? MASKED_LOGIT : 0;
        }
    }
}

/* out (B, T, C); log_sums (B, M, h, N), of each query's logits, for the backward pass, or NULL. */
int attention_forward(const Attention *s, void *out, float *log_sums) {
    long n = s->window_tokens, d = s->head_dim, wide = tokens_wide(s), dim = head_wide(s), c = s->heads * d;
    long jobs = s->images * s->windows * s->heads;
    long each = padded(gathered_floats(s) + wide * dim + 2 * ROWS * wide + ROWS * dim, LINE);
    float *bias = bias_of_pairs(s), *memory = floats(s->threads * each);
    if (!bias || !memory) return free(bias), free(memory), 1;
#pragma omp parallel num_threads(s->threads)
    {
        float *scratch = memory + THREAD * each, *lines = scratch + gathered_floats(s), *weights = lines + wide * dim;
        float *packed = weights + ROWS * wide, *mixed = packed + ROWS * wide;
        for (long job = first_of(jobs, THREAD, THREADS); job < first_of(jobs, THREAD + 1, THREADS); job++) {
            Head head = gather(s, job, bias, scratch, 0);
            const float *values = by_lines(head.pairs, lines, head.v, n, dim);
            const int32_t *token_of = s->token_of + head.window * n;
            float *log_sum = log_sums ? log_sums + ((head.image * s->windows + head.window) * s->heads + head.number) * n : NULL;
            for (long first = 0; first < n; first += ROWS) {
                float by[ROWS] = {0};
                logits_of(&head, weights, first);
                for (long row = 0; row < ROWS && first + row < n; row++) {
                    float *line = weights + row * wide;
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
                const float *rows = by_rows(head.pairs, packed, weights, ROWS, wide);
                product(head.pairs, rows, steps(head.pairs, wide), 1, values, dim, mixed, dim, n);
                for (long row = 0; row < ROWS && first + row < n; row++) {
                    long token = token_of[first + row];
                    if (token < 0) continue;
                    float *line = mixed + row * dim;
                    for (long e = 0; e < dim; e += LANES) store(line + e, load(line + e) * by[row]);
                    store_row(out, (head.image * s->tokens + token) * c + head.number * d, line, d, s->half);
                }
            }
        }
    }
    free(bias), free(memory);
    return 0;
}

/* From the gradient of scale · x / |x|, in place, that of x, `scale` being a constant, where by = scale / |x|. What it
   returns is the gradient of `scale`, times `scale`. */
INLINE float normalize_back(float *grad, const float *x, float by, float scale, long dim) {
    vec products = all(0);
    for (long e = 0; e < dim; e += LANES) products += load(grad + e) * load(x + e);
    float along = sum(products), inverse = by / scale;
    /* Where the length was too small to divide by, it is a constant. */
    float share = inverse * SMALLEST_NORM < 1 ? along * inverse * inverse : 0;
    for (long e = 0; e < dim; e += LANES) store(grad + e, (load(grad + e) - load(x + e) * share) * by);
    return along * by;
}

/* What a thread adds up over its heads: the gradients of biases of pairs (h, N, N padded), of q_bias and v_bias (C), and of
   scale (h). */
typedef struct {
    float *pairs, *q, *v, *scale;
} Sums;

INLINE Sums sums_in(const Attention *s, float *memory) {
    long c = s->heads * s->head_dim;
    float *q = memory + s->heads * s->window_tokens * tokens_wide(s);
    return (Sums){.pairs = memory, .q = q, .v = q + c, .scale = q + 2 * c};
}

/* The gradients of a head's rows, (N, D) each, to that of qkv; `normalize_back` for queries and keys. */
INLINE void scatter(
    const Attention *s, const Head *head, float *grad_q, float *grad_k, float *grad_v, void *grad_qkv, const Sums *sums, long d
) {
    long dim = padded(d, PAD), c = s->heads * d;
    const int32_t *token_of = s->token_of + head->window * head->n;
    float scale = s->scale[head->number], of_scale = 0, of_q[dim], of_v[dim];
    memset(of_q, 0, dim * 4), memset(of_v, 0, dim * 4);
    for (long i = 0; i < head->n; i++) {
        long at = (head->image * s->tokens + token_of[i]) * 3 * c + head->number * d;
        float *q = grad_q + i * dim, *k = grad_k + i * dim, *v = grad_v + i * dim;
        of_scale += normalize_back(q, head->q + i * dim, head->q_by[i], scale, dim);
        for (long e = 0; e < dim; e += LANES) {
            store(of_q + e, load(of_q + e) + load(q + e));
            store(of_v + e, load(of_v + e) + load(v + e));
        }
        if (token_of[i] < 0) continue;
        normalize_back(k, head->k + i * dim, head->k_by[i], 1, dim);
        store_row(grad_qkv, at, q, d, s->half);
        store_row(grad_qkv, at + c, k, d, s->half);
        store_row(grad_qkv, at + 2 * c, v, d, s->half);
    }
    for (long e = 0; e < d; e++) sums->q[head->number * d + e] += of_q[e], sums->v[head->number * d + e] += of_v[e];
    sums->scale[head->number] += of_scale / scale;
}

/* From grad_out (B, T, C): grad_qkv (B, T, 3, h, D), and in float32 grad_q_bias (C), grad_v_bias (C), grad_scale (h),
   grad_table (offsets, h). */
int attention_backward(
    const Attention *s, const float *log_sums, const void *grad_out, void *grad_qkv, float *grad_q_bias, float *grad_v_bias,
    float *grad_scale, float *grad_table
) {
    long n = s->window_tokens, d = s->head_dim, wide = tokens_wide(s), dim = head_wide(s), c = s->heads * d;
    long jobs = s->images * s->windows * s->heads, square = wide * wide, matrix = wide * dim;
    long each = padded(gathered_floats(s) + 2 * square + 8 * matrix + 4 * ROWS * wide, LINE);
    long a_thread = padded(s->heads * n * wide + 2 * c + s->heads, LINE);
    float *bias = bias_of_pairs(s), *memory = floats(s->threads * each), *totals = floats(s->threads * a_thread);
    if (!bias || !memory || !totals) return free(bias), free(memory), free(totals), 1;
#pragma omp parallel num_threads(s->threads)
    {
        float *scratch = memory + THREAD * each;
        float *weights_by_lines = scratch + gathered_floats(s), *slopes_by_lines = weights_by_lines + square;
        float *grad = slopes_by_lines + square, *grad_packed = grad + matrix, *grad_lines = grad_packed + matrix;
        float *k_lines = grad_lines + matrix, *q_lines = k_lines + matrix;
        float *grad_q = q_lines + matrix, *grad_k = grad_q + matrix, *grad_v = grad_k + matrix;
        float *some_weights = grad_v + matrix, *some_slopes = some_weights + ROWS * wide;
        float *of_keys = some_slopes + ROWS * wide;
        float *packed = of_keys + ROWS * wide;
        Sums sums = sums_in(s, totals + THREAD * a_thread);
        for (long job = first_of(jobs, THREAD, THREADS); job < first_of(jobs, THREAD + 1, THREADS); job++) {
            Head head = gather(s, job, bias, scratch, 1);
            int pairs = head.pairs;
            const int32_t *token_of = s->token_of + head.window * n;
            const float *log_sum = log_sums + ((head.image * s->windows + head.window) * s->heads + head.number) * n;
            for (long i = 0; i < n; i++) {
                long at = (head.image * s->tokens + token_of[i]) * c + head.number * d;
                if (token_of[i] >= 0) load_row(grad + i * dim, grad_out, at, d, s->half);
                else memset(grad + i * dim, 0, dim * 4);
            }
            const float *grads = by_rows(pairs, grad_packed, grad, wide, dim);
            const float *keys = by_lines(pairs, k_lines, head.k, n, dim);
            for (long first = 0; first < n; first += ROWS) {
                /* Rows that need not be packed are written where they are to stand. */
                float *weights = pairs ? some_weights : weights_by_lines + first * wide;
                float *slopes = pairs ? some_slopes : slopes_by_lines + first * wide;
                long stride = steps(pairs, dim), last = n - first < ROWS ? n - first : ROWS;
                logits_of(&head, weights, first);
                product(pairs, grads + first * stride, stride, 1, head.v_turned, wide, slopes, wide, d);
                for (long row = 0; row < last; row++) {
                    float *weight = weights + row * wide, *slope = slopes + row * wide, *of_key = of_keys + row * wide;
                    float *summed = sums.pairs + (head.number * n + first + row) * wide, by = head.q_by[first + row];
                    vec along = all(0);
                    for (long j = 0; j < wide; j += LANES) {
                        vec share = exponential(load(weight + j) - log_sum[first + row]);
                        store(weight + j, share);
                        along += share * load(slope + j);
                    }
                    float mean = sum(along);
                    for (long j = 0; j < wide; j += LANES) {
                        vec value = load(weight + j) * (load(slope + j) - mean);
                        store(summed + j, load(summed + j) + value);
                        store(slope + j, value * by);
                        store(of_key + j, value * load(head.k_by + j));
                    }
                }
                if (pairs) {
                    pack_lines(weights_by_lines, weights, first, last, wide);
                    pack_lines(slopes_by_lines, slopes, first, last, wide);
                }
                const float *rows = by_rows(pairs, packed, of_keys, ROWS, wide);
                product(pairs, rows, steps(pairs, wide), 1, keys, dim, grad_q + first * dim, dim, n);
            }
            const float *outs = by_lines(pairs, grad_lines, grad, n, dim), *queries = by_lines(pairs, q_lines, head.q, n, dim);
            for (long first = 0; first < n; first += ROWS) {
                product(pairs, weights_by_lines + first, 1, wide, outs, dim, grad_v + first * dim, dim, n);
                product(pairs, slopes_by_lines + first, 1, wide, queries, dim, grad_k + first * dim, dim, n);
            }
            if (d == USUAL_HEAD) scatter(s, &head, grad_q, grad_k, grad_v, grad_qkv, &sums, USUAL_HEAD);
            else scatter(s, &head, grad_q, grad_k, grad_v, grad_qkv, &sums, d);
        }
    }
    memset(grad_q_bias, 0, c * 4), memset(grad_v_bias, 0, c * 4), memset(grad_scale, 0, s->heads * 4);
    memset(grad_table, 0, s->offsets * s->heads * 4);
    for (long thread = 0; thread < s->threads; thread++) {
        Sums sums = sums_in(s, totals + thread * a_thread);
        for (long e = 0; e < c; e++) grad_q_bias[e] += sums.q[e], grad_v_bias[e] += sums.v[e];
        for (long head = 0; head < s->heads; head++) {
            grad_scale[head] += sums.scale[head];
            for (long i = 0; i < n; i++)
                for (long j = 0; j < n; j++)
                    grad_table[s->offset_of[i * n + j] * s->heads + head] += sums.pairs[(head * n + i) * wide + j];
        }
    }
    free(bias), free(memory), free(totals);
    return 0;
}
