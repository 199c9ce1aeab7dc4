/* The continuous position bias of each offset between two tokens of a window, 16 · sigmoid(MLP(offset)), and its gradient.
   In pieces it is twenty passes over a few hundred rows, which take longer to ask for than to do.

   O offsets, K hidden values of the MLP, h heads. All is float32. Functions return 0, or 1 for want of memory. */
#include "vectors.h"

typedef struct {
    const float *coords;  /* (O, 2) */
    const float *weight1; /* (K, 2) */
    const float *bias1;   /* (K) */
    const float *weight2; /* (h, K) */
    long offsets, hidden, heads;
    int threads;
} Bias;

/* The weights by columns, rows padded with zeros. */
typedef struct {
    float *row, *column, *start, *out;
} Columns;

INLINE long wide_of(const Bias *s) { return padded(s->hidden, PAD); }

static Columns columns_of(const Bias *s, float *memory) {
    long wide = wide_of(s);
    Columns by = {memory, memory + wide, memory + 2 * wide, memory + 3 * wide};
    for (long k = 0; k < s->hidden; k++) by.row[k] = s->weight1[2 * k], by.column[k] = s->weight1[2 * k + 1];
    memcpy(by.start, s->bias1, s->hidden * 4);
    for (long head = 0; head < s->heads; head++) memcpy(by.out + head * wide, s->weight2 + head * s->hidden, s->hidden * 4);
    return by;
}

#define GROUP 4 /* offsets at a time, for which each weight is read once */

/* hidden (GROUP, K) = relu(weight1 · offset + bias1) of the offsets from `first` on; of the last one where there are fewer. */
INLINE void hidden_of(const Bias *s, const Columns *by, long first, float *hidden) {
    for (long g = 0; g < GROUP; g++) {
        long offset = first + g < s->offsets ? first + g : s->offsets - 1;
        float row = s->coords[2 * offset], column = s->coords[2 * offset + 1], *to = hidden + g * wide_of(s);
        for (long k = 0; k < wide_of(s); k += LANES)
            store(to + k, larger(all(0), load(by->row + k) * row + load(by->column + k) * column + load(by->start + k)));
    }
}

/* table (O, h) */
int bias_forward(const Bias *s, float *table) {
    long wide = wide_of(s), each = padded(GROUP * wide, LINE);
    float *weights = floats((3 + s->heads) * wide), *memory = floats(s->threads * each);
    if (!weights || !memory) return free(weights), free(memory), 1;
    Columns by = columns_of(s, weights);
#pragma omp parallel num_threads(s->threads)
    {
        float *hidden = memory + THREAD * each;
        long last = first_of(s->offsets, THREAD + 1, THREADS);
        for (long first = first_of(s->offsets, THREAD, THREADS); first < last; first += GROUP) {
            hidden_of(s, &by, first, hidden);
            for (long head = 0; head < s->heads; head++) {
                vec total[GROUP] = {0};
                for (long k = 0; k < wide; k += LANES)
                    for (long g = 0; g < GROUP; g++) total[g] += load(hidden + g * wide + k) * load(by.out + head * wide + k);
                for (long g = 0; g < GROUP && first + g < last; g++)
                    table[(first + g) * s->heads + head] = 16 / (1 + expf(-sum(total[g])));
            }
        }
    }
    free(weights), free(memory);
    return 0;
}

/* From table (O, h) and its gradient: grad_weight1 (K, 2), grad_bias1 (K), grad_weight2 (h, K). */
int bias_backward(
    const Bias *s, const float *table, const float *grad, float *grad_weight1, float *grad_bias1, float *grad_weight2
) {
    long wide = wide_of(s), all_weights = (3 + s->heads) * wide, heads = s->heads;
    long each = padded(GROUP * (wide + heads) + all_weights, LINE);
    float *weights = floats(all_weights), *memory = floats(s->threads * each);
    if (!weights || !memory) return free(weights), free(memory), 1;
    Columns by = columns_of(s, weights);
#pragma omp parallel num_threads(s->threads)
    {
        float *sums = memory + THREAD * each, *hidden = sums + all_weights, *slopes = hidden + GROUP * wide;
        long last = first_of(s->offsets, THREAD + 1, THREADS);
        for (long first = first_of(s->offsets, THREAD, THREADS); first < last; first += GROUP) {
            float row[GROUP] = {0}, column[GROUP] = {0};
            hidden_of(s, &by, first, hidden);
            memset(slopes, 0, GROUP * heads * 4);
            for (long g = 0; g < GROUP && first + g < last; g++) {
                row[g] = s->coords[2 * (first + g)], column[g] = s->coords[2 * (first + g) + 1];
                for (long head = 0; head < heads; head++) {
                    float value = table[(first + g) * heads + head];
                    slopes[g * heads + head] = grad[(first + g) * heads + head] * value * (1 - value / 16);
                }
            }
            for (long k = 0; k < wide; k += LANES) {
                vec of_hidden[GROUP] = {0}, of_row = all(0), of_column = all(0), of_start = all(0);
                for (long head = 0; head < heads; head++) {
                    float *sum_of_weight = sums + (3 + head) * wide + k;
                    vec of_weight = load(sum_of_weight), weight = load(by.out + head * wide + k);
                    for (long g = 0; g < GROUP; g++) {
                        of_hidden[g] += weight * slopes[g * heads + head];
                        of_weight += load(hidden + g * wide + k) * slopes[g * heads + head];
                    }
                    store(sum_of_weight, of_weight);
                }
                for (long g = 0; g < GROUP; g++) {
                    vec mine = choose(load(hidden + g * wide + k) <= 0, all(0), of_hidden[g]);
                    of_row += mine * row[g], of_column += mine * column[g], of_start += mine;
                }
                store(sums + k, load(sums + k) + of_row);
                store(sums + wide + k, load(sums + wide + k) + of_column);
                store(sums + 2 * wide + k, load(sums + 2 * wide + k) + of_start);
            }
        }
    }
    for (long thread = 1; thread < s->threads; thread++)
        for (long i = 0; i < all_weights; i++) memory[i] += memory[thread * each + i];
    for (long k = 0; k < s->hidden; k++) grad_weight1[2 * k] = memory[k], grad_weight1[2 * k + 1] = memory[wide + k];
    memcpy(grad_bias1, memory + 2 * wide, s->hidden * 4);
    for (long head = 0; head < heads; head++)
        memcpy(grad_weight2 + head * s->hidden, memory + (3 + head) * wide, s->hidden * 4);
    free(weights), free(memory);
    return 0;
}
