/* Scaled cosine attention in shifted windows: what both passes share. Each pass goes over memory once.

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

/* One head of one window. N and D are padded with zeros to whole vectors, or tiles. */
typedef struct {
    int way;                                  /* of products, see product.h */
    long index, window, image;
    long n, n_pad, d, d_pad;                  /* tokens of the window and channels of the head */
    const float *q, *k, *v;                   /* (N, D) */
    const float *q_factor, *k_factor;         /* (N): scale / |q| and 1 / |k| */
    const float *q_in_rows;                   /* (N, D), q for products that sum over D */
    const float *k_transposed, *v_transposed; /* (D, N), k and v for such products */
    const float *bias;                        /* (N, N) */
    const int32_t *region;                    /* (N), or NULL if the window has one label */
} Head;

INLINE int way_of(const Attention *s) { return way_of_products(s->bf16); }
INLINE long padded_tokens(const Attention *s) { return round_up(s->window_tokens, PAD); }
INLINE long padded_head_dim(const Attention *s) { return round_up(s->head_dim, way_of(s) == TILES ? 2 * TILE_STEPS : PAD); }

/* Lanes along k of sums over the tokens of a window, and as many as there is memory for. */
INLINE long token_steps(const Attention *s) { return num_steps(way_of(s), s->window_tokens); }
INLINE long padded_steps(const Attention *s) { return round_up(token_steps(s), PAD); }

/* Returns the position bias of each pair of tokens, (h, N, N padded). */
INLINE float *bias_of_pairs(const Attention *s) {
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
INLINE int has_regions(const uint8_t *region, long n) {
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
INLINE long gather_floats(const Attention *s) {
    long n_pad = padded_tokens(s), d_pad = padded_head_dim(s);
    return 7 * n_pad * d_pad + 3 * n_pad + 2 * d_pad;
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

/* x (N, D) for products that sum over D, as the second factor. `memory` is (N, D). */
INLINE void transpose_rows(int way, const float *x, long n_pad, long d_pad, float *memory, float *to) {
    transpose(pack_in_rows(way, memory, x, n_pad, d_pad), n_pad, way == FLOATS ? d_pad : d_pad / 2, to);
}

/* `gather` for any d, which may be a constant. */
INLINE Head gather_any(const Attention *s, long job, const float *bias, float *memory, long d, int for_gradient) {
    int way = way_of(s);
    long n = s->window_tokens, d_pad = padded_head_dim(s), n_pad = padded_tokens(s), c = s->heads * d;
    long index = job % s->heads, window = job / s->heads % s->windows, image = job / s->heads / s->windows;
    float *q = memory, *k = q + n_pad * d_pad, *v = k + n_pad * d_pad, *q_factor = v + n_pad * d_pad;
    float *k_factor = q_factor + n_pad, *packed_rows = k_factor + n_pad;
    float *k_transposed = packed_rows + n_pad * d_pad, *v_transposed = k_transposed + n_pad * d_pad;
    float *q_bias = v_transposed + n_pad * d_pad, *v_bias = q_bias + d_pad, *other_rows = v_bias + d_pad;
    int32_t *region_lanes = (int32_t *)(other_rows + n_pad * d_pad);
    memcpy(q_bias, s->q_bias + index * d, d * 4), memcpy(v_bias, s->v_bias + index * d, d * 4);
    const int32_t *token_of = s->token_of + window * n;
    for (long i = 0; i < n; i++) {
        float *q_row = q + i * d_pad, *k_row = k + i * d_pad, *v_row = v + i * d_pad;
        long token = token_of[i], offset = (image * s->tokens + token) * 3 * c + index * d;
        load_row_with_bias(s, q_row, q_bias, token, offset, d, d_pad);
        if (token >= 0) load_row(k_row, s->qkv, offset + c, d, s->bf16);
        else memset(k_row, 0, d_pad * 4);
        load_row_with_bias(s, v_row, v_bias, token, offset + 2 * c, d, d_pad);
        if (way != FLOATS) { /* q is rounded, as in the product */
            store_row(packed_rows + i * d_pad / 2, 0, q_row, d_pad, 1);
            load_row(q_row, packed_rows + i * d_pad / 2, 0, d_pad, 1);
        }
        q_factor[i] = s->scale[index] * inverse_length(q_row, d_pad);
        k_factor[i] = inverse_length(k_row, d_pad);
    }
    transpose_rows(way, k, n_pad, d_pad, other_rows, k_transposed);
    if (for_gradient) transpose_rows(way, v, n_pad, d_pad, other_rows, v_transposed);
    const uint8_t *region = s->region_of ? s->region_of + (image * s->windows + window) % s->label_rows * n : NULL;
    int several = region && has_regions(region, n);
    if (several)
        for (long i = 0; i < n; i++) region_lanes[i] = region[i];
    return (Head){
        .way = way, .index = index, .window = window, .image = image, .n = n, .n_pad = n_pad, .d = d, .d_pad = d_pad,
        .q = q, .k = k, .v = v, .q_factor = q_factor, .k_factor = k_factor, .q_in_rows = way == FLOATS ? q : packed_rows,
        .k_transposed = k_transposed, .v_transposed = v_transposed, .bias = bias + index * n * n_pad,
        .region = several ? region_lanes : NULL,
    };
}

/* Loads queries, keys and values of a head of a window, with their biases. For padding they are the biases alone. */
INLINE Head gather(const Attention *s, long job, const float *bias, float *memory, int for_gradient) {
    if (s->head_dim == USUAL_HEAD_DIM) return gather_any(s, job, bias, memory, USUAL_HEAD_DIM, for_gradient);
    return gather_any(s, job, bias, memory, s->head_dim, for_gradient);
}

/* Has what a job reads or writes fetched: the rows of its tokens in `x` (B, T, parts, h, D). They lie far from each other. */
INLINE void fetch_tokens(const Attention *s, long job, const void *x, long parts, int write) {
    long n = s->window_tokens, d = s->head_dim, c = s->heads * d;
    long index = job % s->heads, window = job / s->heads % s->windows, image = job / s->heads / s->windows;
    for (long i = 0; i < n; i++) {
        long token = s->token_of[window * n + i], offset = (image * s->tokens + token) * parts * c + index * d;
        if (token < 0) continue;
        for (long part = 0; part < parts; part++) fetch_row(x, offset + part * c, d, s->bf16, write);
    }
}

/* Writes rows · other (BLOCK, N padded): the products of BLOCK rows (N, D) from `first` on with keys or values. */
INLINE void products_of_rows(const Head *head, const float *rows, long first, const float *other, float *to) {
    long stride = head->way == FLOATS ? head->d_pad : head->d_pad / 2;
    product(head->way, rows + first * stride, stride, 1, other, head->n_pad, to, head->n_pad, num_steps(head->way, head->d));
}

/* The logits of a query and the keys from `j` on. `products` are those of q and k, (N); `regions` is whether labels count. */
INLINE vec logits_of(const Head *head, const float *products, long query, long j, int regions) {
    vec factor = load(head->k_factor + j) * head->q_factor[query];
    vec value = load(products + j) * factor + load(head->bias + query * head->n_pad + j);
    if (regions) {
        ivec other = load_integers(head->region + j) ^ head->region[query]; /* 1 to 3 for another region of the same group */
        vec masked = blend(other >= REGIONS, broadcast(OTHER_GROUP_LOGIT), broadcast(MASKED_LOGIT));
        value += blend(other != 0, masked, broadcast(0));
    }
    return value;
}

/* e^x, exactly 0 where nothing passes. */
INLINE vec weight_of(vec x, int packed) { return packed ? rough_exponential_or_0(x) : exponential_or_0(x); }
