/* The backward pass of attention. Weights are computed again from the logits and the sums that the forward pass left. */
#include "attention.h"

/* What it reads and writes, see `attention_backward`. */
typedef struct {
    const Attention *attention;
    const float *bias; /* of pairs, (h, N, N padded) */
    const float *log_sums;
    const void *grad_out;
    void *grad_qkv;
    float *sums; /* (pieces, `sums_of_piece`) */
    float *grad_table;
    long chunks, windows_of_one, heads_of_one; /* pieces of a head; windows and heads in a piece */
} Call;

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
    long d_pad = head->d_pad, c = s->heads * d;
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

/* Scratch memory for a head of a window, beside that of `gather`. */
typedef struct {
    float *weights, *slopes;                     /* (steps, N), of all queries, in columns */
    float *grad;                                 /* (N, D), of the head's output */
    float *grad_q, *grad_k, *grad_v;             /* (N, D) */
    float *grad_rows;                            /* (N, D), packed in rows */
    float *grad_columns, *k_columns, *q_columns; /* (steps, D), packed in columns */
    float *transposed, *result;                  /* (D, steps) and (D, N) */
    float *weight_rows, *slope_rows;             /* (BLOCK, N), where those above are packed */
    float *key_slopes;                           /* (BLOCK, N or steps) */
} Buffers;

/* Returns the number of floats of all buffers, which lie from `memory` on unless that is NULL. */
static long place_buffers(const Attention *s, float *memory, Buffers *b) {
    long n_pad = padded_tokens(s), d_pad = padded_head_dim(s), steps = padded_steps(s), total = 0;
    struct {
        float **buffer;
        long floats;
    } parts[] = {
        {&b->weights, steps * n_pad},
        {&b->slopes, steps * n_pad},
        {&b->grad, n_pad * d_pad},
        {&b->grad_q, n_pad * d_pad},
        {&b->grad_k, n_pad * d_pad},
        {&b->grad_v, n_pad * d_pad},
        {&b->grad_rows, n_pad * d_pad},
        {&b->grad_columns, steps * d_pad},
        {&b->k_columns, steps * d_pad},
        {&b->q_columns, steps * d_pad},
        {&b->transposed, steps * d_pad},
        {&b->result, n_pad * d_pad},
        {&b->weight_rows, BLOCK * n_pad},
        {&b->slope_rows, BLOCK * n_pad},
        {&b->key_slopes, BLOCK * (steps > n_pad ? steps : n_pad)},
    };
    for (unsigned i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (memory) *parts[i].buffer = memory + total;
        total += parts[i].floats;
    }
    return total;
}

/* A head of a window on its way back. */
typedef struct {
    const Head *head;
    const Buffers *buffers;
    const float *grad_in_rows, *k_in_columns; /* operands of products */
    const float *log_sum;                     /* (N) */
    float *bias_sums;                         /* (N, N padded) */
    long steps, stride;                       /* of sums over tokens, and from one row of such a sum's operand to the next */
} Back;

/* Replaces the products (N) of a query and all keys by the query's weights. Returns their mean gradient; `slopes` (N) are the
   gradients of weights. */
INLINE float weights_back(const Back *s, float *line, const float *slopes, long query, int packed, int regions) {
    vec inner = broadcast(0);
    for (long j = 0; j < s->head->n_pad; j += LANES) {
        vec weight = weight_of(logits_of(s->head, line, query, j, regions) - s->log_sum[query], packed);
        store(line + j, weight);
        inner += weight * load(slopes + j);
    }
    return sum_lanes(inner);
}

/* From weights and their gradients, of `count` queries from `first` + `row` on, one or with `packed` one or two, the gradients of
   logits are added to `bias_sums`. Those of products with keys are written times 1 / |k| to `key_slopes`, for the gradient of q,
   and times scale / |q| to `slopes`, for that of k. */
INLINE void slopes_back(const Back *s, long first, long row, long count, const float *mean, int packed) {
    const Buffers *b = s->buffers;
    long n_pad = s->head->n_pad, query = first + row, step = query / 2 * n_pad;
    const float *weights = packed ? b->weight_rows + row * n_pad : b->weights + query * n_pad;
    float *slopes = packed ? b->slope_rows + row * n_pad : b->slopes + query * n_pad;
    for (long j = 0; j < n_pad; j += LANES) {
        vec weight[2] = {broadcast(0), broadcast(0)}, scaled[2] = {broadcast(0), broadcast(0)};
        for (long i = 0; i < count; i++) {
            weight[i] = load(weights + i * n_pad + j);
            vec slope = weight[i] * (load(slopes + i * n_pad + j) - mean[i]), by_key = slope * load(s->head->k_factor + j);
            float *sums = s->bias_sums + (query + i) * n_pad + j, *keys = b->key_slopes + (row + i) * s->stride;
            store(sums, load(sums) + slope);
            scaled[i] = slope * s->head->q_factor[query + i];
            if (packed) *(loose_bf16_bits *)((uint16_t *)keys + j) = float_to_bf16(by_key);
            else store(keys + j, by_key), store(slopes + j, scaled[i]);
        }
        if (!packed) continue;
        store(b->weights + step + j, make_pairs(weight[0], weight[1]));
        store(b->slopes + step + j, make_pairs(scaled[0], scaled[1]));
    }
}

/* All of that for BLOCK queries from `first` on, and the gradient of q. */
INLINE void queries_back(const Back *s, long first, int packed, int regions) {
    const Head *head = s->head;
    const Buffers *b = s->buffers;
    long n_pad = head->n_pad, d_pad = head->d_pad, last = head->n - first < BLOCK ? head->n - first : BLOCK;
    float *weights = packed ? b->weight_rows : b->weights + first * n_pad, mean[BLOCK];
    float *slopes = packed ? b->slope_rows : b->slopes + first * n_pad;
    products_of_rows(head, head->q_in_rows, first, head->k_transposed, weights);
    products_of_rows(head, s->grad_in_rows, first, head->v_transposed, slopes);
    for (long row = 0; row < last; row++)
        mean[row] = weights_back(s, weights + row * n_pad, slopes + row * n_pad, first + row, packed, regions);
    for (long row = 0; row < last; row += 1 + packed) {
        if (packed && row + 1 < last) slopes_back(s, first, row, 2, mean + row, packed);
        else slopes_back(s, first, row, 1, mean + row, packed);
    }
    product(head->way, b->key_slopes, s->stride, 1, s->k_in_columns, d_pad, b->grad_q + first * d_pad, d_pad, s->steps);
}

/* out (N, D) = matrixᵀ · x. `matrix` (steps, N) and `x` (steps, D) are in columns. */
static void product_of_columns(const Back *s, const float *matrix, const float *x, float *out) {
    const Head *head = s->head;
    const Buffers *b = s->buffers;
    long n_pad = head->n_pad, d_pad = head->d_pad, steps = s->steps;
    if (head->way == TILES) { /* a product's first factor lies in rows: outᵀ = xᵀ · matrix */
        transpose(x, steps, d_pad, b->transposed);
        for (long e = 0; e < d_pad; e += BLOCK)
            product(TILES, b->transposed + e * steps, steps, 1, matrix, n_pad, b->result + e * n_pad, n_pad, steps);
        transpose(b->result, d_pad, n_pad, out);
        return;
    }
    for (long first = 0; first < head->n; first += BLOCK)
        product(head->way, matrix + first, 1, n_pad, x, d_pad, out + first * d_pad, d_pad, steps);
}

/* A head of a window, which is the `job` of `gather`. */
static void backward_job(const Call *call, long job, const Buffers *b, float *scratch, const Sums *sums) {
    const Attention *s = call->attention;
    long n = s->window_tokens, d = s->head_dim, n_pad = padded_tokens(s), d_pad = padded_head_dim(s), c = s->heads * d;
    fetch_tokens(s, job, s->qkv, 3, 0);
    fetch_tokens(s, job, call->grad_out, 1, 0);
    Head head = gather(s, job, call->bias, scratch, 1);
    const int32_t *token_of = s->token_of + head.window * n;
    for (long i = 0; i < n; i++) {
        long offset = (head.image * s->tokens + token_of[i]) * c + head.index * d;
        if (token_of[i] >= 0) load_row(b->grad + i * d_pad, call->grad_out, offset, d, s->bf16);
        else memset(b->grad + i * d_pad, 0, d_pad * 4);
    }
    Back back = {
        .head = &head, .buffers = b, .grad_in_rows = pack_in_rows(head.way, b->grad_rows, b->grad, n_pad, d_pad),
        .k_in_columns = pack_in_columns(head.way, b->k_columns, head.k, n, d_pad),
        .log_sum = call->log_sums + ((head.image * s->windows + head.window) * s->heads + head.index) * n,
        .bias_sums = sums->pairs, .steps = token_steps(s), .stride = head.way == FLOATS ? n_pad : padded_steps(s),
    };
    for (long first = 0; first < n; first += BLOCK) {
        if (head.way == FLOATS && !head.region) queries_back(&back, first, 0, 0);
        else if (head.way == FLOATS) queries_back(&back, first, 0, 1);
        else if (!head.region) queries_back(&back, first, 1, 0);
        else queries_back(&back, first, 1, 1);
    }
    fetch_tokens(s, job, call->grad_qkv, 3, 1);
    product_of_columns(&back, b->weights, pack_in_columns(head.way, b->grad_columns, b->grad, n, d_pad), b->grad_v);
    product_of_columns(&back, b->slopes, pack_in_columns(head.way, b->q_columns, head.q, n, d_pad), b->grad_k);
    if (d == USUAL_HEAD_DIM) scatter(s, &head, b->grad_q, b->grad_k, b->grad_v, call->grad_qkv, sums, USUAL_HEAD_DIM);
    else scatter(s, &head, b->grad_q, b->grad_k, b->grad_v, call->grad_qkv, sums, d);
}

static void backward_piece(const void *of, long piece, float *scratch) {
    const Call *call = of;
    const Attention *s = call->attention;
    long group = piece / call->chunks, chunk = piece % call->chunks;
    Buffers buffers;
    place_buffers(s, scratch + gather_floats(s), &buffers);
    Range windows = range_of(chunk, s->images * s->windows, call->windows_of_one);
    Range heads = range_of(group, s->heads, call->heads_of_one);
    if (way_of(s) == TILES) open_tiles();
    for (long window = windows.first; window < windows.last; window++)
        for (long head = heads.first; head < heads.last; head++) {
            Sums sums = sums_in(s, call->sums + (head * call->chunks + chunk) * sums_of_piece(s));
            backward_job(call, window * s->heads + head, &buffers, scratch, &sums);
        }
    if (way_of(s) == TILES) close_tiles();
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
    long d = s->head_dim, windows = s->images * s->windows;
    long floats = sums_of_piece(s), most_chunks = limited(MOST_FLOATS_OF_SUMS / (s->heads * floats), 1, USUAL_PIECES);
    long chunks = limited(windows / LEAST_WINDOWS, 1, most_chunks), windows_of_one = num_pieces(windows, chunks);
    chunks = num_pieces(windows, windows_of_one);
    long heads_of_one = limited(s->heads * chunks / USUAL_PIECES, 1, MOST_HEADS);
    float *bias = bias_of_pairs(s), *sums = allocate_floats(s->heads * chunks * floats);
    if (!bias || !sums) return free(bias), free(sums), 1;
    Call call = {
        .attention = s, .bias = bias, .log_sums = log_sums, .grad_out = grad_out, .grad_qkv = grad_qkv, .sums = sums,
        .grad_table = grad_table, .chunks = chunks, .windows_of_one = windows_of_one, .heads_of_one = heads_of_one,
    };
    Buffers unused;
    long scratch = gather_floats(s) + place_buffers(s, NULL, &unused);
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
