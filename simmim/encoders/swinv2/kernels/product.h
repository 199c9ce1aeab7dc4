/* A small matrix product: of float32, of pairs of bfloat16, or of tiles of such pairs. */
#include "tiles.h"

/* How products are computed. */
enum { FLOATS, PAIRS, TILES };

/* Rows of the first factor and of the result of `product`. */
#if HAS_TILES
#define BLOCK TILE_ROWS
#else
#define BLOCK ROWS
#endif

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

INLINE vec make_pairs(vec first, vec second) {
    return (vec)(widen(float_to_bf16(first)) | widen(float_to_bf16(second)) << 16);
}
#endif

/* How products of float32, or with `bf16` of bfloat16, are computed here. */
INLINE int way_of_products(int bf16) {
    if (bf16 && has_matrix_unit()) return TILES;
    return bf16 && HAS_BF16_PAIRS ? PAIRS : FLOATS;
}

/* Lanes along k of a sum of `count` products. Tiles are filled up with zeros. */
INLINE long num_steps(int way, long count) {
    if (way == TILES) return round_up(count, 2 * TILE_STEPS) / 2;
    return way == PAIRS ? (count + 1) / 2 : count;
}

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

#if HAS_TILES
/* `tiles` tiles, from one to four, of c (TILE_ROWS, tiles · 16) = a · b. */
INLINE void multiply_tiles(
    int tiles, const float *a, long a_row, const float *b, long b_row, float *c, long c_row, long steps
) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (long i = 0; i < steps; i += TILE_STEPS) {
        const float *line = b + i * b_row;
        tile_load(4, a + i, a_row);
        tile_load(5, line, b_row);
        tile_multiply(0, 4, 5);
        if (tiles > 1) {
            tile_load(6, line + TILE_STEPS, b_row);
            tile_multiply(1, 4, 6);
        }
        if (tiles > 2) {
            tile_load(7, line + 2 * TILE_STEPS, b_row);
            tile_multiply(2, 4, 7);
        }
        if (tiles > 3) {
            tile_load(5, line + 3 * TILE_STEPS, b_row);
            tile_multiply(3, 4, 5);
        }
    }
    tile_store(0, c, c_row);
    if (tiles > 1) tile_store(1, c + TILE_STEPS, c_row);
    if (tiles > 2) tile_store(2, c + 2 * TILE_STEPS, c_row);
    if (tiles > 3) tile_store(3, c + 3 * TILE_STEPS, c_row);
}

/* TILE_ROWS rows of a product, in tiles side by side. */
INLINE void product_of_tiles(
    const float *a, long a_row, const float *b, long columns, float *c, long c_row, long steps
) {
    long first = 0;
    for (; first + 4 * TILE_STEPS <= columns; first += 4 * TILE_STEPS)
        multiply_tiles(4, a, a_row, b + first, columns, c + first, c_row, steps);
    for (; first + 2 * TILE_STEPS <= columns; first += 2 * TILE_STEPS)
        multiply_tiles(2, a, a_row, b + first, columns, c + first, c_row, steps);
    if (first < columns) multiply_tiles(1, a, a_row, b + first, columns, c + first, c_row, steps);
}
#endif

/* c (BLOCK, columns) = a · b. a(row, step) is at a[row · a_row + step · a_k], b is (steps, columns). By tiles, a_k is 1, and
   `steps` and `columns` are as long as tiles. */
static __attribute__((noinline)) void product(
    int way, const float *a, long a_row, long a_k, const float *b, long columns, float *c, long c_row, long steps
) {
#if HAS_TILES
    if (way == TILES) {
        product_of_tiles(a, a_row, b, columns, c, c_row, steps);
        return;
    }
#endif
    for (long row = 0; row < BLOCK; row += ROWS) {
        const float *from = a + row * a_row;
        float *to = c + row * c_row;
        if (way == PAIRS) product_rows(1, from, a_row, a_k, b, columns, to, c_row, steps);
        else product_rows(0, from, a_row, a_k, b, columns, to, c_row, steps);
    }
}

/* x (rows, columns) as an operand of products that sum over its columns: packed into `memory` as pairs of neighbors in a row,
   (rows, columns / 2); or x itself where products are of floats. */
INLINE const float *pack_in_rows(int way, float *memory, const float *x, long rows, long columns) {
    if (way == FLOATS) return x;
    store_row(memory, 0, x, rows * columns, 1);
    return memory;
}

/* x (rows, columns) as an operand of products that sum over its rows: packed into `memory` as pairs of neighbors in a column,
   (⌈rows / 2⌉, columns); or x itself where products are of floats. */
INLINE const float *pack_in_columns(int way, float *memory, const float *x, long rows, long columns) {
    if (way == FLOATS) return x;
    for (long row = 0; row < rows; row += 2)
        for (long c = 0; c < columns; c += LANES) {
            vec second = row + 1 < rows ? load(x + (row + 1) * columns + c) : broadcast(0);
            store(memory + row / 2 * columns + c, make_pairs(load(x + row * columns + c), second));
        }
    return memory;
}
