/* The forward pass of attention. */
#include "attention.h"

/* What it reads and writes, see `attention_forward`. */
typedef struct {
    const Attention *attention;
    const float *bias; /* of pairs, (h, N, N padded) */
    void *out;
    float *log_sums;
    long jobs_of_one; /* in a piece */
} Call;

/* Replaces the products (N) of a query and all keys by e^(logit - the largest one) and, with `packed`, writes these weights as
   bfloat16 there. Returns the sum of the weights. */
INLINE float weights_of_query(const Head *head, float *line, long query, float *packed, float *largest, int regions) {
    long n_pad = head->n_pad;
    vec maximum = broadcast(-INFINITY), total = broadcast(0);
    for (long j = 0; j < n_pad; j += LANES) {
        vec logits = logits_of(head, line, query, j, regions);
        store(line + j, logits);
        maximum = vec_max(maximum, logits);
    }
    *largest = max_lane(maximum);
    for (long j = 0; j < n_pad; j += LANES) {
        vec weight = weight_of(load(line + j) - *largest, packed != NULL);
        if (packed) *(loose_bf16_bits *)((uint16_t *)packed + j) = float_to_bf16(weight);
        else store(line + j, weight);
        total += weight;
    }
    return sum_lanes(total);
}

/* A head of a window, which is the `job` of `gather`. */
static void forward_job(const Call *call, long job, float *scratch) {
    const Attention *s = call->attention;
    int way = way_of(s);
    long n = s->window_tokens, d = s->head_dim, n_pad = padded_tokens(s), d_pad = padded_head_dim(s), c = s->heads * d;
    long steps = token_steps(s), stride = padded_steps(s);
    float *v_columns_memory = scratch + gather_floats(s), *products = v_columns_memory + stride * d_pad;
    float *packed = products + BLOCK * n_pad, *mixed = packed + BLOCK * stride;
    fetch_tokens(s, job, s->qkv, 3, 0);
    Head head = gather(s, job, call->bias, scratch, 0);
    fetch_tokens(s, job, call->out, 1, 1);
    const float *v_in_columns = pack_in_columns(way, v_columns_memory, head.v, n, d_pad);
    const int32_t *token_of = s->token_of + head.window * n;
    long first_query = ((head.image * s->windows + head.window) * s->heads + head.index) * n;
    float *log_sum = call->log_sums ? call->log_sums + first_query : NULL;
    for (long first = 0; first < n; first += BLOCK) {
        float factor[BLOCK] = {0};
        products_of_rows(&head, head.q_in_rows, first, head.k_transposed, products);
        for (long row = 0; row < BLOCK && first + row < n; row++) {
            float *line = products + row * n_pad, *to = way == FLOATS ? NULL : packed + row * stride, largest, sum;
            if (!to && !head.region) sum = weights_of_query(&head, line, first + row, NULL, &largest, 0);
            else if (!to) sum = weights_of_query(&head, line, first + row, NULL, &largest, 1);
            else if (!head.region) sum = weights_of_query(&head, line, first + row, to, &largest, 0);
            else sum = weights_of_query(&head, line, first + row, to, &largest, 1);
            factor[row] = 1 / sum;
            if (log_sum) log_sum[first + row] = largest + logf(sum);
        }
        if (way == FLOATS) product(way, products, n_pad, 1, v_in_columns, d_pad, mixed, d_pad, steps);
        else product(way, packed, stride, 1, v_in_columns, d_pad, mixed, d_pad, steps);
        for (long row = 0; row < BLOCK && first + row < n; row++) {
            long token = token_of[first + row];
            if (token < 0) continue;
            float *line = mixed + row * d_pad;
            for (long e = 0; e < d_pad; e += LANES) store(line + e, load(line + e) * factor[row]);
            store_row(call->out, (head.image * s->tokens + token) * c + head.index * d, line, d, s->bf16);
        }
    }
}

static void forward_piece(const void *of, long piece, float *scratch) {
    const Call *call = of;
    const Attention *s = call->attention;
    Range jobs = range_of(piece, s->images * s->windows * s->heads, call->jobs_of_one);
    if (way_of(s) == TILES) open_tiles();
    for (long job = jobs.first; job < jobs.last; job++) forward_job(call, job, scratch);
    if (way_of(s) == TILES) close_tiles();
}

/* Writes out (B, T, C) and, for the backward pass, log_sums (B, M, h, N), the log-sum-exp of each query's logits, or NULL. */
int attention_forward(const Attention *s, void *out, float *log_sums) {
    long n_pad = padded_tokens(s), d_pad = padded_head_dim(s);
    float *bias = bias_of_pairs(s);
    if (!bias) return 1;
    long jobs = s->images * s->windows * s->heads, jobs_of_one = rows_in_piece(jobs, s->window_tokens * s->window_tokens, 1);
    Call call = {.attention = s, .bias = bias, .out = out, .log_sums = log_sums, .jobs_of_one = jobs_of_one};
    long steps = padded_steps(s), scratch = gather_floats(s) + steps * d_pad + BLOCK * (n_pad + steps + d_pad);
    int failed = share_pieces(forward_piece, &call, num_pieces(jobs, jobs_of_one), s->threads, scratch);
    free(bias);
    return failed;
}
