/* A small matrix product of float32, or of pairs of bfloat16. */
#include "share.h"

/* A lane holds a float32, or with `pairs` two bfloat16 that are neighbors along k, the summed dimension. The product of two
   pairs is the sum of both products, in float32. `make_pairs` joins the lanes of `first` and `second` to pairs. */
#ifdef __AVX512BF16__
#define HAS_BF16_PAIRS 1
INLINE vec multiply_add(vec total, float factor, vec line, int pairs) {
    if (!pairs) return total + factor * line;
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_ps(factor), (__m512bh)line);
}

INLINE vec make_pairs(vec first, vec second) {
    const words alternate = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vec)_mm512_permutexvar_epi16((__m512i)alternate, (__m512i)both);
}
#else
#define HAS_BF16_PAIRS 0
INLINE vec multiply_add(vec total, float factor, vec line, int pairs) { return (void)pairs, total + factor * line; }
INLINE vec make_pairs(vec first, vec second) { return (void)second, first; } /* not called without pairs */
#endif

/* c (ROWS, vectors · LANES) = Σ_k a(row, k) · b (k, ·), with a(row, k) at a[row · a_row + k · a_k]. */
INLINE void tile(
    int pairs, int vectors, const float *a, long a_row, long a_k, const float *b, long b_row, float *c, long c_row, long k
) {
    vec total[ROWS][3];
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) total[row][v] = broadcast(0);
    for (long i = 0; i < k; i++) {
        vec line[3];
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) line[v] = load(b + i * b_row + v * LANES);
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {
            float factor = a[row * a_row + i * a_k];
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++)
                total[row][v] = multiply_add(total[row][v], factor, line[v], pairs);
        }
    }
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) store(c + row * c_row + v * LANES, total[row][v]);
}

/* ROWS rows of a product with any number of columns, a multiple of LANES, in tiles of one to three vectors of nearly equal
   width. `pairs` is a constant. */
INLINE void product_rows(
    int pairs, const float *a, long a_row, long a_k, const float *b, long columns, float *c, long c_row, long k
) {
    long vectors = columns / LANES, tiles = (vectors + 2) / 3, first = 0;
    for (long t = 0; t < tiles; t++) {
        long width = vectors * (t + 1) / tiles - first;
        const float *from = b + first * LANES;
        float *to = c + first * LANES;
        if (width == 3) tile(pairs, 3, a, a_row, a_k, from, columns, to, c_row, k);
        else if (width == 2) tile(pairs, 2, a, a_row, a_k, from, columns, to, c_row, k);
        else tile(pairs, 1, a, a_row, a_k, from, columns, to, c_row, k);
        first += width;
    }
}

/* Number of lanes along k for a sum of `count` products. */
INLINE long num_steps(int pairs, long count) { return pairs ? (count + 1) / 2 : count; }

/* c (ROWS, columns) = a · b, a sum of k products. a(row, step) is at a[row · a_row + step · a_k], b is (steps, columns). */
static __attribute__((noinline)) void product(
    int pairs, const float *a, long a_row, long a_k, const float *b, long columns, float *c, long c_row, long k
) {
    if (pairs) product_rows(1, a, a_row, a_k, b, columns, c, c_row, num_steps(1, k));
    else product_rows(0, a, a_row, a_k, b, columns, c, c_row, k);
}

/* x (rows, columns) as an operand of products that sum over its columns: with `pairs`, packed into `memory` as pairs of
   neighbors in a row, (rows, columns / 2); else x itself. */
INLINE const float *pack_in_rows(int pairs, float *memory, const float *x, long rows, long columns) {
    if (!pairs) return x;
    store_row(memory, 0, x, rows * columns, 1);
    return memory;
}

/* Packs rows of x, which are those from `first` on of a larger matrix, into its `pack_in_columns`. `first` is even. */
INLINE void pack_part_in_columns(float *whole, const float *x, long first, long rows, long columns) {
    for (long row = 0; row < rows; row += 2)
        for (long c = 0; c < columns; c += LANES) {
            vec second = row + 1 < rows ? load(x + (row + 1) * columns + c) : broadcast(0);
            store(whole + (first + row) / 2 * columns + c, make_pairs(load(x + row * columns + c), second));
        }
}

/* x (rows, columns) as an operand of products that sum over its rows: with `pairs`, packed into `memory` as pairs of neighbors
   in a column, (⌈rows / 2⌉, columns); else x itself. */
INLINE const float *pack_in_columns(int pairs, float *memory, const float *x, long rows, long columns) {
    if (!pairs) return x;
    pack_part_in_columns(memory, x, 0, rows, columns);
    return memory;
}

/* Stores x (count), packed if `pairs` is set, as a column of a matrix whose rows have `width` lanes. */
INLINE void store_transposed(int pairs, float *to, long width, const float *x, long count) {
    float packed[num_steps(pairs, count)];
    const float *from = pack_in_rows(pairs, packed, x, 1, count);
    for (long e = 0; e < num_steps(pairs, count); e++) to[e * width] = from[e];
}
