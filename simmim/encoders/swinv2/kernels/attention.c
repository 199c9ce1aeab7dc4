/* Scaled cosine attention in shifted windows, forward and backward, each in one pass over memory.

   Shape letters as in model.py: B images, T tokens of an image, M windows of an image, N tokens of a window, h heads, D
   channels of a head, C = h · D. Tensors are contiguous. With `bf16` inputs and outputs of matrix products are bfloat16, else
   float32. Functions return 0, or 1 if there is no memory.

   Logits are (q · k) · scale / |q| / |k| + bias. The product is of q and k themselves, so that they are not rounded a second
   time in bfloat16. The factors, like all that is not a product, are float32. */
#include "product.h"

#define FILLER_LOGIT (-1e30f) /* logit of a column of padding, which has no weight */
#define USUAL_HEAD_DIM 32 /* loops over a head's channels are unrolled for this number */

typedef struct {
    const void *qkv;          /* (B, T, 3, h, D), without biases */
    const float *q_bias;      /* (C) */
    const float *v_bias;      /* (C) */
    const float *scale;       /* (h), 1 / τ */
    const float *table;       /* (offsets, h), position bias of each offset */
    const int64_t *offset_of; /* (N, N), the offset of two tokens */
    const int32_t *token_of;  /* (M, N), the token of the image at each place of a window; -1 for padding */
    /* (label_rows, N), the label of each token, 4 · group + region, beyond which logits are masked; NULL for no labels. It has
       M rows, the same for all images, or B · M. */
    const uint8_t *region_of;
    long label_rows, images, tokens, windows, window_tokens, heads, head_dim, offsets;
    int bf16, threads;
} Attention;

/* One head of one window. N and D are padded with zeros to whole vectors. */
typedef struct {
    int pairs;                                /* whether products are of pairs of bfloat16, see product.h */
    long index, window, image;
    long n, n_pad, d, d_pad;                  /* tokens of the window and channels of the head */
    const float *q, *k, *v;                   /* (N, D) */
    const float *q_factor, *k_factor;         /* (N): scale / |q| and 1 / |k| */
    const float *q_in_rows;                   /* (N, D), q for products that sum over D */
    const float *k_transposed, *v_transposed; /* (D, N), k and v for such products */
    const float *bias;                        /* (N, N) */
    const uint8_t *region;                    /* (N), or NULL if the window has one label */
} Head;

INLINE long padded_tokens(const Attention *s) { return round_up(s->window_tokens, PAD); }
INLINE long padded_head_dim(const Attention *s) { return round_up(s->head_dim, PAD); }

/* Returns the position bias of each pair of tokens, (h, N, N padded). */
static float *bias_of_pairs(const Attention *s) {
    long n = s->window_tokens, n_pad = padded_tokens(s);
    float *bias = allocate_floats(s->heads * n * n_pad);
    if (!bias) return NULL;
    for (long head = 0; head < s->heads; head++)
        for (long i = 0; i < n; i++) {
            float *row = bias + (head * n + i) * n_pad;
            for (long j = 0; j < n; j++) row[j] = s->table[s->offset_of[i * n + j] * s->heads + head];
            for (long j = n; j < n_pad; j++) row[j] = FILLER_LOGIT;
        }
    return bias;
}

/* Whether a window has more than one label. */
static int has_regions(const uint8_t *region, long n) {
    for (long i = 1; i < n; i++)
        if (region[i] != region[0]) return 1;
    return 0;
}

/* 1 / |x| of x (D padded); at most 1 / SMALLEST_NORM. */
INLINE float inverse_length(const float *x, long d_pad) {
    vec squares = broadcast(0);
    for (long e = 0; e < d_pad; e += LANES) squares += load(x + e) * load(x + e);
    float length = sqrtf(sum_lanes(squares));
    return 1 / (length > SMALLEST_NORM ? length : SMALLEST_NORM);
}

/* Number of floats of scratch memory that `gather` uses per thread. */
static long gather_floats(const Attention *s) {
    long n_pad = padded_tokens(s), d_pad = padded_head_dim(s);
    return 6 * n_pad * d_pad + 2 * n_pad + 2 * d_pad;
}

/* Loads a row of D channels and adds `bias` (D padded). For padding, `token` -1, it is the bias alone. */
INLINE void load_row_with_bias(const Attention *s, float *to, const float *bias, long token, long offset, long d, long d_pad) {
    if (token < 0) {
        memcpy(to, bias, d_pad * 4);
        return;
    }
    load_row(to, s->qkv, offset, d, s->bf16);
    for (long e = 0; e < d_pad; e += LANES) store(to + e, load(to + e) + load(bias + e));
}

/* `gather` for any d, which may be a constant. */
INLINE Head gather_any(const Attention *s, long job, const float *bias, float *memory, long d, int for_gradient) {
    long n = s->window_tokens, d_pad = round_up(d, PAD), n_pad = padded_tokens(s), c = s->heads * d;
    int pairs = HAS_BF16_PAIRS && s->bf16;
    long index = job % s->heads, window = job / s->heads % s->windows, image = job / s->heads / s->windows;
    float *q = memory, *k = q + n_pad * d_pad, *v = k + n_pad * d_pad, *q_factor = v + n_pad * d_pad;
    float *k_factor = q_factor + n_pad, *packed_rows = k_factor + n_pad;
    float *k_transposed = packed_rows + n_pad * d_pad, *v_transposed = k_transposed + n_pad * d_pad;
    float *q_bias = v_transposed + n_pad * d_pad, *v_bias = q_bias + d_pad;
    memcpy(q_bias, s->q_bias + index * d, d * 4), memcpy(v_bias, s->v_bias + index * d, d * 4);
    const int32_t *token_of = s->token_of + window * n;
    for (long i = 0; i < n; i++) {
        float *q_row = q + i * d_pad, *k_row = k + i * d_pad, *v_row = v + i * d_pad;
        long token = token_of[i], offset = (image * s->tokens + token) * 3 * c + index * d;
        load_row_with_bias(s, q_row, q_bias, token, offset, d, d_pad);
        if (token >= 0) load_row(k_row, s->qkv, offset + c, d, s->bf16);
        else memset(k_row, 0, d_pad * 4);
        load_row_with_bias(s, v_row, v_bias, token, offset + 2 * c, d, d_pad);
        if (pairs) { /* q is rounded, as in the product */
            store_row(packed_rows + i * d_pad / 2, 0, q_row, d_pad, 1);
            load_row(q_row, packed_rows + i * d_pad / 2, 0, d_pad, 1);
        }
        q_factor[i] = s->scale[index] * inverse_length(q_row, d_pad);
        k_factor[i] = inverse_length(k_row, d_pad);
        store_transposed(pairs, k_transposed + i, n_pad, k_row, d_pad);
        if (for_gradient) store_transposed(pairs, v_transposed + i, n_pad, v_row, d_pad);
    }
    const uint8_t *region = s->region_of ? s->region_of + (image * s->windows + window) % s->label_rows * n : NULL;
    return (Head){
        .pairs = pairs, .index = index, .window = window, .image = image, .n = n, .n_pad = n_pad, .d = d, .d_pad = d_pad,
        .q = q, .k = k, .v = v, .q_factor = q_factor, .k_factor = k_factor, .q_in_rows = pairs ? packed_rows : q,
        .k_transposed = k_transposed, .v_transposed = v_transposed, .bias = bias + index * n * n_pad,
        .region = region && has_regions(region, n) ? region : NULL,
    };
}

/* Loads queries, keys and values of a head of a window, with their biases. For padding they are the biases alone. */
static Head gather(const Attention *s, long job, const float *bias, float *memory, int for_gradient) {
    if (s->head_dim == USUAL_HEAD_DIM) return gather_any(s, job, bias, memory, USUAL_HEAD_DIM, for_gradient);
    return gather_any(s, job, bias, memory, s->head_dim, for_gradient);
}

/* Writes the logits of ROWS queries from `first` on, (ROWS, N padded). */
INLINE void logits_of(const Head *from, float *logits, long first) {
    long n_pad = from->n_pad, d_pad = from->d_pad, stride = num_steps(from->pairs, d_pad);
    product(from->pairs, from->q_in_rows + first * stride, stride, 1, from->k_transposed, n_pad, logits, n_pad, from->d);
    for (long row = 0; row < ROWS && first + row < from->n; row++) {
        float *line = logits + row * n_pad, factor = from->q_factor[first + row];
        const float *bias = from->bias + (first + row) * n_pad;
        for (long j = 0; j < n_pad; j += LANES)
            store(line + j, load(line + j) * (load(from->k_factor + j) * factor) + load(bias + j));
        if (from->region) {
            uint8_t own = from->region[first + row];
            for (long j = 0; j < from->n; j++) {
                uint8_t other = from->region[j] ^ own; /* 1 to 3 for another region of the same group */
                line[j] += other >= REGIONS ? OTHER_GROUP_LOGIT : other ? MASKED_LOGIT : 0;
            }
        }
    }
}

/* What a pass reads and writes, see below. */
typedef struct {
    const Attention *attention;
    const float *bias; /* of pairs, (h, N, N padded) */
    void *out;
    float *log_sums;
    const void *grad_out;
    void *grad_qkv;
    float *sums;       /* (pieces, `sums_of_piece`) */
    float *grad_table;
    long chunks, windows_of_one, heads_of_one; /* pieces of a head; windows and heads in a piece */
} Call;

/* The `job` of `gather` is a head of a window, and so is a piece. */
static void forward_piece(const void *of, long job, float *scratch) {
    const Call *call = of;
    const Attention *s = call->attention;
    long n = s->window_tokens, d = s->head_dim, n_pad = padded_tokens(s), d_pad = padded_head_dim(s), c = s->heads * d;
    float *v_columns_memory = scratch + gather_floats(s), *weights = v_columns_memory + n_pad * d_pad;
    float *packed = weights + ROWS * n_pad, *mixed = packed + ROWS * n_pad;
    Head head = gather(s, job, call->bias, scratch, 0);
    const float *v_in_columns = pack_in_columns(head.pairs, v_columns_memory, head.v, n, d_pad);
    const int32_t *token_of = s->token_of + head.window * n;
    long first_query = ((head.image * s->windows + head.window) * s->heads + head.index) * n;
    float *log_sum = call->log_sums ? call->log_sums + first_query : NULL;
    for (long first = 0; first < n; first += ROWS) {
        float factor[ROWS] = {0};
        logits_of(&head, weights, first);
        for (long row = 0; row < ROWS && first + row < n; row++) {
            float *line = weights + row * n_pad;
            vec maximum = load(line), total = broadcast(0);
            for (long j = LANES; j < n_pad; j += LANES) maximum = vec_max(maximum, load(line + j));
            float largest_logit = max_lane(maximum);
            for (long j = 0; j < n_pad; j += LANES) {
                vec weight = exponential_or_0(load(line + j) - largest_logit);
                store(line + j, weight);
                total += weight;
            }
            float sum_of_weights = sum_lanes(total);
            factor[row] = 1 / sum_of_weights;
            if (log_sum) log_sum[first + row] = largest_logit + logf(sum_of_weights);
        }
        const float *packed_rows = pack_in_rows(head.pairs, packed, weights, ROWS, n_pad);
        product(head.pairs, packed_rows, num_steps(head.pairs, n_pad), 1, v_in_columns, d_pad, mixed, d_pad, n);
        for (long row = 0; row < ROWS && first + row < n; row++) {
            long token = token_of[first + row];
            if (token < 0) continue;
            float *line = mixed + row * d_pad;
            for (long e = 0; e < d_pad; e += LANES) store(line + e, load(line + e) * factor[row]);
            store_row(call->out, (head.image * s->tokens + token) * c + head.index * d, line, d, s->bf16);
        }
    }
}

/* Writes out (B, T, C) and, for the backward pass, log_sums (B, M, h, N), the log-sum-exp of each query's logits, or NULL. */
int attention_forward(const Attention *s, void *out, float *log_sums) {
    long n_pad = padded_tokens(s), d_pad = padded_head_dim(s);
    float *bias = bias_of_pairs(s);
    if (!bias) return 1;
    Call call = {.attention = s, .bias = bias, .out = out, .log_sums = log_sums};
    long scratch = gather_floats(s) + n_pad * d_pad + 2 * ROWS * n_pad + ROWS * d_pad;
    int failed = share_pieces(forward_piece, &call, s->images * s->windows * s->heads, s->threads, scratch);
    free(bias);
    return failed;
}

/* Replaces the gradient of scale · x / |x| by that of x, given factor = scale / |x|. Returns the gradient of `scale`, times
   `scale`. */
INLINE float normalize_back(float *grad, const float *x, float factor, float scale, long d_pad) {
    vec products = broadcast(0);
    for (long e = 0; e < d_pad; e += LANES) products += load(grad + e) * load(x + e);
    float inner = sum_lanes(products), inverse = factor / scale;
    /* A norm below SMALLEST_NORM was replaced by that constant, which has no gradient. */
    float share = inverse * SMALLEST_NORM < 1 ? inner * inverse * inverse : 0;
    for (long e = 0; e < d_pad; e += LANES) store(grad + e, (load(grad + e) - load(x + e) * share) * factor);
    return inner * factor;
}

/* Sums over the windows of one piece for one of its heads: the gradients of the position bias of pairs (N, N padded), of
   q_bias and v_bias (D padded) and of scale. */
typedef struct {
    float *pairs, *q, *v, *scale;
} Sums;

INLINE long sums_of_piece(const Attention *s) {
    return s->window_tokens * padded_tokens(s) + 2 * padded_head_dim(s) + PAD;
}

INLINE Sums sums_in(const Attention *s, float *memory) {
    float *q = memory + s->window_tokens * padded_tokens(s), *v = q + padded_head_dim(s);
    return (Sums){.pairs = memory, .q = q, .v = v, .scale = v + padded_head_dim(s)};
}

/* Stores the gradients of a head's queries, keys and values, (N, D) each, in that of qkv, and adds to the sums. */
INLINE void scatter(
    const Attention *s, const Head *head, float *grad_q, float *grad_k, float *grad_v, void *grad_qkv, const Sums *sums, long d
) {
    long d_pad = round_up(d, PAD), c = s->heads * d;
    const int32_t *token_of = s->token_of + head->window * head->n;
    float scale = s->scale[head->index], sum_scale = 0, sum_q[d_pad], sum_v[d_pad];
    memset(sum_q, 0, d_pad * 4), memset(sum_v, 0, d_pad * 4);
    for (long i = 0; i < head->n; i++) {
        long offset = (head->image * s->tokens + token_of[i]) * 3 * c + head->index * d;
        float *q = grad_q + i * d_pad, *k = grad_k + i * d_pad, *v = grad_v + i * d_pad;
        sum_scale += normalize_back(q, head->q + i * d_pad, head->q_factor[i], scale, d_pad);
        for (long e = 0; e < d_pad; e += LANES) {
            store(sum_q + e, load(sum_q + e) + load(q + e));
            store(sum_v + e, load(sum_v + e) + load(v + e));
        }
        if (token_of[i] < 0) continue;
        normalize_back(k, head->k + i * d_pad, head->k_factor[i], 1, d_pad);
        store_row(grad_qkv, offset, q, d, s->bf16);
        store_row(grad_qkv, offset + c, k, d, s->bf16);
        store_row(grad_qkv, offset + 2 * c, v, d, s->bf16);
    }
    for (long e = 0; e < d; e++) sums->q[e] += sum_q[e], sums->v[e] += sum_v[e];
    *sums->scale += sum_scale / scale;
}

static void backward_piece(const void *of, long piece, float *scratch) {
    const Call *call = of;
    const Attention *s = call->attention;
    long n = s->window_tokens, d = s->head_dim, n_pad = padded_tokens(s), d_pad = padded_head_dim(s), c = s->heads * d;
    long square = n_pad * n_pad, matrix = n_pad * d_pad, group = piece / call->chunks, chunk = piece % call->chunks;
    float *weights_packed = scratch + gather_floats(s), *slopes_packed = weights_packed + square;
    float *grad = slopes_packed + square, *grad_rows_memory = grad + matrix;
    float *grad_columns_memory = grad_rows_memory + matrix, *k_columns_memory = grad_columns_memory + matrix;
    float *q_columns_memory = k_columns_memory + matrix;
    float *grad_q = q_columns_memory + matrix, *grad_k = grad_q + matrix, *grad_v = grad_k + matrix;
    float *weight_rows = grad_v + matrix, *slope_rows = weight_rows + ROWS * n_pad;
    float *key_slopes = slope_rows + ROWS * n_pad;
    float *packed = key_slopes + ROWS * n_pad;
    Range windows = range_of(chunk, s->images * s->windows, call->windows_of_one);
    Range heads = range_of(group, s->heads, call->heads_of_one);
    long num_heads = heads.last - heads.first, jobs = (windows.last - windows.first) * num_heads;
    for (long job = 0; job < jobs; job++) {
        long window = windows.first + job / num_heads, index = heads.first + job % num_heads;
        Sums sums = sums_in(s, call->sums + (index * call->chunks + chunk) * sums_of_piece(s));
        Head head = gather(s, window * s->heads + index, call->bias, scratch, 1);
        int pairs = head.pairs;
        const int32_t *token_of = s->token_of + head.window * n;
        const float *log_sum = call->log_sums + ((head.image * s->windows + head.window) * s->heads + head.index) * n;
        for (long i = 0; i < n; i++) {
            long offset = (head.image * s->tokens + token_of[i]) * c + head.index * d;
            if (token_of[i] >= 0) load_row(grad + i * d_pad, call->grad_out, offset, d, s->bf16);
            else memset(grad + i * d_pad, 0, d_pad * 4);
        }
        const float *grad_in_rows = pack_in_rows(pairs, grad_rows_memory, grad, n_pad, d_pad);
        const float *k_in_columns = pack_in_columns(pairs, k_columns_memory, head.k, n, d_pad);
        for (long first = 0; first < n; first += ROWS) {
            /* Without packing, rows are written to their final place. */
            float *weights = pairs ? weight_rows : weights_packed + first * n_pad;
            float *slopes = pairs ? slope_rows : slopes_packed + first * n_pad;
            long stride = num_steps(pairs, d_pad), last = n - first < ROWS ? n - first : ROWS;
            logits_of(&head, weights, first);
            product(pairs, grad_in_rows + first * stride, stride, 1, head.v_transposed, n_pad, slopes, n_pad, d);
            for (long row = 0; row < last; row++) {
                float *weight = weights + row * n_pad, *slope = slopes + row * n_pad;
                float *key_slope = key_slopes + row * n_pad, factor = head.q_factor[first + row];
                float *bias_sums = sums.pairs + (first + row) * n_pad;
                vec inner = broadcast(0);
                for (long j = 0; j < n_pad; j += LANES) {
                    vec share = exponential_or_0(load(weight + j) - log_sum[first + row]);
                    store(weight + j, share);
                    inner += share * load(slope + j);
                }
                float mean = sum_lanes(inner);
                for (long j = 0; j < n_pad; j += LANES) {
                    vec value = load(weight + j) * (load(slope + j) - mean);
                    store(bias_sums + j, load(bias_sums + j) + value);
                    store(slope + j, value * factor);
                    store(key_slope + j, value * load(head.k_factor + j));
                }
            }
            if (pairs) {
                pack_part_in_columns(weights_packed, weights, first, last, n_pad);
                pack_part_in_columns(slopes_packed, slopes, first, last, n_pad);
            }
            const float *packed_rows = pack_in_rows(pairs, packed, key_slopes, ROWS, n_pad);
            product(pairs, packed_rows, num_steps(pairs, n_pad), 1, k_in_columns, d_pad, grad_q + first * d_pad, d_pad, n);
        }
        const float *grad_in_columns = pack_in_columns(pairs, grad_columns_memory, grad, n, d_pad);
        const float *q_in_columns = pack_in_columns(pairs, q_columns_memory, head.q, n, d_pad);
        for (long first = 0; first < n; first += ROWS) {
            product(pairs, weights_packed + first, 1, n_pad, grad_in_columns, d_pad, grad_v + first * d_pad, d_pad, n);
            product(pairs, slopes_packed + first, 1, n_pad, q_in_columns, d_pad, grad_k + first * d_pad, d_pad, n);
        }
        if (d == USUAL_HEAD_DIM) scatter(s, &head, grad_q, grad_k, grad_v, call->grad_qkv, &sums, USUAL_HEAD_DIM);
        else scatter(s, &head, grad_q, grad_k, grad_v, call->grad_qkv, &sums, d);
    }
}

/* Adds the sums of a head's pieces, and those of pairs to the gradients of their offsets. */
static void sum_pieces(const void *of, long head, float *unused) {
    const Call *call = of;
    const Attention *s = call->attention;
    long n = s->window_tokens, n_pad = padded_tokens(s), floats = sums_of_piece(s);
    float *sums = call->sums + head * call->chunks * floats;
    (void)unused;
    for (long chunk = 1; chunk < call->chunks; chunk++)
        for (long i = 0; i < floats; i++) sums[i] += sums[chunk * floats + i];
    for (long offset = 0; offset < s->offsets; offset++) call->grad_table[offset * s->heads + head] = 0;
    for (long i = 0; i < n; i++)
        for (long j = 0; j < n; j++) call->grad_table[s->offset_of[i * n + j] * s->heads + head] += sums[i * n_pad + j];
}

#define USUAL_PIECES 24                /* enough for the threads of most processors */
#define LEAST_WINDOWS 16               /* of a piece: its sums cost little beside them */
#define MOST_HEADS 4                   /* of a piece: neighbors in memory, whose sums stay in the cache */
#define MOST_FLOATS_OF_SUMS (1L << 24) /* of all pieces, unless one piece per head is more */

INLINE long limited(long value, long least, long most) { return value < least ? least : value > most ? most : value; }

/* From grad_out (B, T, C) to grad_qkv (B, T, 3, h, D), and in float32 grad_q_bias (C), grad_v_bias (C), grad_scale (h) and
   grad_table (offsets, h). */
int attention_backward(
    const Attention *s, const float *log_sums, const void *grad_out, void *grad_qkv, float *grad_q_bias, float *grad_v_bias,
    float *grad_scale, float *grad_table
) {
    long n_pad = padded_tokens(s), d = s->head_dim, d_pad = padded_head_dim(s), windows = s->images * s->windows;
    long floats = sums_of_piece(s), most_chunks = limited(MOST_FLOATS_OF_SUMS / (s->heads * floats), 1, USUAL_PIECES);
    long chunks = limited(windows / LEAST_WINDOWS, 1, most_chunks), windows_of_one = num_pieces(windows, chunks);
    chunks = num_pieces(windows, windows_of_one);
    long heads_of_one = limited(s->heads * chunks / USUAL_PIECES, 1, MOST_HEADS);
    float *bias = bias_of_pairs(s), *sums = allocate_floats(s->heads * chunks * floats);
    if (!bias || !sums) return free(bias), free(sums), 1;
    Call call = {
        .attention = s, .bias = bias, .log_sums = (float *)log_sums, .grad_out = grad_out, .grad_qkv = grad_qkv, .sums = sums,
        .grad_table = grad_table, .chunks = chunks, .windows_of_one = windows_of_one, .heads_of_one = heads_of_one,
    };
    long scratch = gather_floats(s) + 2 * n_pad * n_pad + 8 * n_pad * d_pad + 4 * ROWS * n_pad;
    int failed = share_pieces(backward_piece, &call, num_pieces(s->heads, heads_of_one) * chunks, s->threads, scratch);
    failed = failed || share_pieces(sum_pieces, &call, s->heads, s->threads, 0);
    for (long head = 0; head < s->heads; head++) {
        Sums total = sums_in(s, sums + head * chunks * floats);
        memcpy(grad_q_bias + head * d, total.q, d * 4), memcpy(grad_v_bias + head * d, total.v, d * 4);
        grad_scale[head] = *total.scale;
    }
    free(bias), free(sums);
    return failed;
}
