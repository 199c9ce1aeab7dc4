/* A small matrix product, of float32 or of pairs of bfloat16. */
#include "vectors.h"

/* Numbers may be pairs of bfloat16 in place of float32, two along k: a lane's product is then the sum of both, in float32.
   `paired` makes a pair of `first` and `second`, lane by lane. */
#ifdef __AVX512BF16__
#define HAS_PAIRS 1
INLINE vec plus_product(vec total, float factor, vec line, int pairs) {
    if (!pairs) return total + factor * line;
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_ps(factor), (__m512bh)line);
}

INLINE vec paired(vec first, vec second) {
    const half_words alternate = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vec)_mm512_permutexvar_epi16((__m512i)alternate, (__m512i)both);
}
#else
#define HAS_PAIRS 0
INLINE vec plus_product(vec total, float factor, vec line, int pairs) { return (void)pairs, total + factor * line; }
INLINE vec paired(vec first, vec second) { return (void)second, first; } /* nobody asks where there are no pairs */
#endif

/* c (ROWS, vectors · LANES) = Σ_k a(row, k) · b (k, ·), where a(row, k) stands at a[row · a_row + k · a_k]. */
INLINE void tile(
    int pairs, int vectors, const float *a, long a_row, long a_k, const float *b, long b_row, float *c, long c_row, long k
) {
    vec total[ROWS][3];
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) total[row][v] = all(0);
    for (long i = 0; i < k; i++) {
        vec line[3];
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) line[v] = load(b + i * b_row + v * LANES);
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++) {
            float factor = a[row * a_row + i * a_k];
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++)
                total[row][v] = plus_product(total[row][v], factor, line[v], pairs);
        }
    }
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) store(c + row * c_row + v * LANES, total[row][v]);
}

/* ROWS rows of a product with any number of columns, a multiple of LANES; tiles of like width, none wider than three. `pairs`
   is a constant. */
INLINE void some_rows(
    int pairs, const float *a, long a_row, long a_k, const float *b, long columns, float *c, long c_row, long k
) {
    long vectors = columns / LANES, tiles = (vectors + 2) / 3, at = 0;
    for (long t = 0; t < tiles; t++) {
        long wide = vectors * (t + 1) / tiles - at;
        const float *from = b + at * LANES;
        float *to = c + at * LANES;
        if (wide == 3) tile(pairs, 3, a, a_row, a_k, from, columns, to, c_row, k);
        else if (wide == 2) tile(pairs, 2, a, a_row, a_k, from, columns, to, c_row, k);
        else tile(pairs, 1, a, a_row, a_k, from, columns, to, c_row, k);
        at += wide;
    }
}

/* How many products of numbers, or of pairs of them, a sum of `count` takes. */
INLINE long steps(int pairs, long count) { return pairs ? (count + 1) / 2 : count; }

/* c (ROWS, columns) = a · b over k numbers: a(row, step) stands at a[row · a_row + step · a_k], b is (steps, columns). */
static __attribute__((noinline)) void product(
    int pairs, const float *a, long a_row, long a_k, const float *b, long columns, float *c, long c_row, long k
) {
    if (pairs) some_rows(1, a, a_row, a_k, b, columns, c, c_row, steps(1, k));
    else some_rows(0, a, a_row, a_k, b, columns, c, c_row, k);
}

/* x (rows, columns) for products along its columns, and, `by_lines`, along its rows: as it is, or packed into `memory` as
   pairs of neighbors, (rows, columns / 2) or (⌈rows / 2⌉, columns). */
INLINE const float *by_rows(int pairs, float *memory, const float *x, long rows, long columns) {
    if (!pairs) return x;
    store_row(memory, 0, x, rows * columns, 1);
    return memory;
}

/* Packs rows of x as those from `first`, which is even, of a whole that is `by_lines`. */
INLINE void pack_lines(float *whole, const float *x, long first, long rows, long columns) {
    for (long row = 0; row < rows; row += 2)
        for (long c = 0; c < columns; c += LANES) {
            vec second = row + 1 < rows ? load(x + (row + 1) * columns + c) : all(0);
            store(whole + (first + row) / 2 * columns + c, paired(load(x + row * columns + c), second));
        }
}

INLINE const float *by_lines(int pairs, float *memory, const float *x, long rows, long columns) {
    if (!pairs) return x;
    pack_lines(memory, x, 0, rows, columns);
    return memory;
}

/* A row of x as a column, of numbers or of pairs, of what is `wide`. */
INLINE void turn_row(int pairs, float *to, long wide, const float *x, long count) {
    float packed[steps(pairs, count)];
    const float *from = by_rows(pairs, packed, x, 1, count);
    for (long e = 0; e < steps(pairs, count); e++) to[e * wide] = from[e];
}
