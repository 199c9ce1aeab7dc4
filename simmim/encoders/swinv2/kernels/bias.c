/* The continuous position bias of each offset between two tokens of a window, MAX_BIAS · sigmoid(MLP(coordinates)), and its
   gradient. In torch these are twenty operators on a few hundred rows, whose calls take longer than their work.

   O offsets, K hidden values of the MLP, h heads. All numbers are float32. Functions return 0, or 1 if there is no memory. */
#include "share.h"

typedef struct {
    const float *coords;  /* (O, 2) */
    const float *weight1; /* (K, 2) */
    const float *bias1;   /* (K) */
    const float *weight2; /* (h, K) */
    long offsets, hidden, heads;
    int threads;
} Bias;

/* The weights in columns of K, padded with zeros: of the row coordinate, of the column coordinate, the bias, and of heads. */
typedef struct {
    float *row, *column, *start, *out;
} Columns;

INLINE long padded_hidden(const Bias *s) { return round_up(s->hidden, PAD); }

static Columns columns_of(const Bias *s, float *memory) {
    long k_pad = padded_hidden(s);
    Columns columns = {memory, memory + k_pad, memory + 2 * k_pad, memory + 3 * k_pad};
    for (long k = 0; k < s->hidden; k++) columns.row[k] = s->weight1[2 * k], columns.column[k] = s->weight1[2 * k + 1];
    memcpy(columns.start, s->bias1, s->hidden * 4);
    for (long head = 0; head < s->heads; head++)
        memcpy(columns.out + head * k_pad, s->weight2 + head * s->hidden, s->hidden * 4);
    return columns;
}

#define GROUP 4 /* offsets at a time: each weight is read once for them */

/* hidden (GROUP, K) = relu(weight1 · coordinates + bias1) for the offsets from `first` on; beyond the end, for the last one. */
INLINE void hidden_of(const Bias *s, const Columns *columns, long first, float *hidden) {
    for (long g = 0; g < GROUP; g++) {
        long offset = first + g < s->offsets ? first + g : s->offsets - 1;
        float row = s->coords[2 * offset], column = s->coords[2 * offset + 1], *to = hidden + g * padded_hidden(s);
        for (long k = 0; k < padded_hidden(s); k += LANES) {
            vec value = load(columns->row + k) * row + load(columns->column + k) * column + load(columns->start + k);
            store(to + k, vec_max(broadcast(0), value));
        }
    }
}

typedef struct {
    const Bias *bias;
    Columns columns;
    const float *table, *grad;
    float *out, *sums; /* the table (O, h), or the sums of each piece, as in `Columns` */
} Call;

#define OFFSETS_IN_PIECE 64 /* a multiple of GROUP */

static void forward_piece(const void *of, long piece, float *hidden) {
    const Call *call = of;
    const Bias *s = call->bias;
    long k_pad = padded_hidden(s);
    Range range = range_of(piece, s->offsets, OFFSETS_IN_PIECE);
    for (long first = range.first; first < range.last; first += GROUP) {
        hidden_of(s, &call->columns, first, hidden);
        for (long head = 0; head < s->heads; head++) {
            vec total[GROUP] = {0};
            for (long k = 0; k < k_pad; k += LANES)
                for (long g = 0; g < GROUP; g++)
                    total[g] += load(hidden + g * k_pad + k) * load(call->columns.out + head * k_pad + k);
            for (long g = 0; g < GROUP && first + g < range.last; g++)
                call->out[(first + g) * s->heads + head] = MAX_BIAS / (1 + expf(-sum_lanes(total[g])));
        }
    }
}

/* Writes table (O, h). */
int bias_forward(const Bias *s, float *table) {
    long k_pad = padded_hidden(s);
    float *weights = allocate_floats((3 + s->heads) * k_pad);
    if (!weights) return 1;
    Call call = {.bias = s, .columns = columns_of(s, weights), .out = table};
    int failed = share_pieces(forward_piece, &call, num_pieces(s->offsets, OFFSETS_IN_PIECE), s->threads, GROUP * k_pad);
    free(weights);
    return failed;
}

static void backward_piece(const void *of, long piece, float *hidden) {
    const Call *call = of;
    const Bias *s = call->bias;
    const float *table = call->table, *grad = call->grad;
    long k_pad = padded_hidden(s), heads = s->heads;
    float *slopes = hidden + GROUP * k_pad, *sums = call->sums + piece * (3 + heads) * k_pad;
    Range range = range_of(piece, s->offsets, OFFSETS_IN_PIECE);
    for (long first = range.first; first < range.last; first += GROUP) {
        float row[GROUP] = {0}, column[GROUP] = {0};
        hidden_of(s, &call->columns, first, hidden);
        memset(slopes, 0, GROUP * heads * 4);
        for (long g = 0; g < GROUP && first + g < range.last; g++) {
            row[g] = s->coords[2 * (first + g)], column[g] = s->coords[2 * (first + g) + 1];
            for (long head = 0; head < heads; head++) {
                float value = table[(first + g) * heads + head];
                slopes[g * heads + head] = grad[(first + g) * heads + head] * value * (1 - value / MAX_BIAS);
            }
        }
        for (long k = 0; k < k_pad; k += LANES) {
            vec grad_hidden[GROUP] = {0}, row_sum = broadcast(0), column_sum = broadcast(0), start_sum = broadcast(0);
            for (long head = 0; head < heads; head++) {
                float *weight_sums = sums + (3 + head) * k_pad + k;
                vec weight_sum = load(weight_sums), weight = load(call->columns.out + head * k_pad + k);
                for (long g = 0; g < GROUP; g++) {
                    grad_hidden[g] += weight * slopes[g * heads + head];
                    weight_sum += load(hidden + g * k_pad + k) * slopes[g * heads + head];
                }
                store(weight_sums, weight_sum);
            }
            for (long g = 0; g < GROUP; g++) {
                vec slope = blend(load(hidden + g * k_pad + k) <= 0, broadcast(0), grad_hidden[g]);
                row_sum += slope * row[g], column_sum += slope * column[g], start_sum += slope;
            }
            store(sums + k, load(sums + k) + row_sum);
            store(sums + k_pad + k, load(sums + k_pad + k) + column_sum);
            store(sums + 2 * k_pad + k, load(sums + 2 * k_pad + k) + start_sum);
        }
    }
}

/* From table (O, h) and its gradient to grad_weight1 (K, 2), grad_bias1 (K) and grad_weight2 (h, K). */
int bias_backward(
    const Bias *s, const float *table, const float *grad, float *grad_weight1, float *grad_bias1, float *grad_weight2
) {
    long k_pad = padded_hidden(s), heads = s->heads, num_weights = (3 + heads) * k_pad;
    long pieces = num_pieces(s->offsets, OFFSETS_IN_PIECE);
    float *weights = allocate_floats(num_weights), *sums = allocate_floats(pieces * num_weights);
    if (!weights || !sums) return free(weights), free(sums), 1;
    Call call = {.bias = s, .columns = columns_of(s, weights), .table = table, .grad = grad, .sums = sums};
    int failed = share_pieces(backward_piece, &call, pieces, s->threads, GROUP * (k_pad + heads));
    for (long piece = 1; piece < pieces; piece++)
        for (long i = 0; i < num_weights; i++) sums[i] += sums[piece * num_weights + i];
    for (long k = 0; k < s->hidden; k++) grad_weight1[2 * k] = sums[k], grad_weight1[2 * k + 1] = sums[k_pad + k];
    memcpy(grad_bias1, sums + 2 * k_pad, s->hidden * 4);
    for (long head = 0; head < heads; head++)
        memcpy(grad_weight2 + head * s->hidden, sums + (3 + head) * k_pad, s->hidden * 4);
    free(weights), free(sums);
    return failed;
}
