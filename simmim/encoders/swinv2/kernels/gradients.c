/* Gradients of weights by a matrix unit: gᵀ · x, of bfloat16, in float32. Both factors lie row by row and the sum is over
   rows, so both have to be packed: g in tiles of its transpose, x in tiles of pairs. A general product packs by far smaller
   steps, or transposes first.

   R rows, O outputs (columns of g), I inputs (columns of x). O and I are multiples of TILE_ROWS. */
#include "tiles.h"

#define TILE_FLOATS (TILE_ROWS * TILE_STEPS)
#define GROUP (2 * TILE_STEPS)     /* rows of a tile */
#define GROUPS_OF_PIECE 4          /* packed at once by a thread */
#define BYTES_PACKED (1L << 19)    /* at a time, to stay in the cache, within these numbers of rows */
#define LEAST_ROWS 256
#define MOST_ROWS 4096
#define AHEAD 8                    /* rows that are fetched before they are packed */
#define BLOCK_TILES 6              /* width of a block of the result, which one thread computes; it is two tiles high */

typedef struct {
    const uint16_t *g, *x;
    float *g_tiles, *x_tiles; /* (O / TILE_ROWS or I / TILE_ROWS, groups) tiles of the rows from `first` to `last` */
    float *out;
    long outputs, inputs, first, last, groups;
} GradientCall;

/* The rows from `first` on of a matrix (R, columns), as many as a tile has, as pairs of neighboring rows: a tile (TILE_STEPS,
   TILE_ROWS) for each TILE_ROWS columns, `tile_lanes` from one tile to the next. Rows beyond `last` are zeros. Row by row, as the
   memory is read fastest. */
INLINE void pack_rows(const uint16_t *from, long first, long last, long columns, float *to, long tile_lanes) {
    for (long step = 0; step < TILE_STEPS; step++, to += TILE_ROWS) {
        long row = first + 2 * step;
        const uint16_t *low = from + row * columns, *high = low + columns;
        for (long c = 0; c < columns; c += LANES) {
            float *place = to + c / TILE_ROWS * tile_lanes + c % TILE_ROWS;
            wide_bits pairs = {0};
            __builtin_prefetch(low + c + AHEAD * columns), __builtin_prefetch(high + c + AHEAD * columns);
            if (row < last) pairs |= widen(*(const loose_bf16_bits *)(low + c));
            if (row + 1 < last) pairs |= widen(*(const loose_bf16_bits *)(high + c)) << 16;
            store(place, (vec)pairs);
        }
    }
}

static void pack_piece(const void *of, long piece, float *pairs) {
    const GradientCall *s = of;
    Range range = range_of(piece, s->groups, GROUPS_OF_PIECE);
    long lanes = s->groups * TILE_FLOATS; /* between neighboring tiles of a row of them */
    for (long group = range.first; group < range.last; group++) {
        long first = s->first + group * GROUP;
        pack_rows(s->x, first, s->last, s->inputs, s->x_tiles + group * TILE_FLOATS, lanes);
        pack_rows(s->g, first, s->last, s->outputs, pairs, TILE_FLOATS);
        for (long tile = 0; tile < s->outputs / TILE_ROWS; tile++)
            transpose(pairs + tile * TILE_FLOATS, TILE_STEPS, TILE_ROWS, s->g_tiles + group * TILE_FLOATS + tile * lanes);
    }
}

#if HAS_TILES
/* Adds the products of `rows` and `columns` tiles, one or two of each, over all groups to `out`; with `begin` to 0. */
INLINE void add_tiles(const GradientCall *s, long row, long column, int rows, int columns, int begin) {
    const float *a = s->g_tiles + row * s->groups * TILE_FLOATS, *a_next = a + s->groups * TILE_FLOATS;
    const float *b = s->x_tiles + column * s->groups * TILE_FLOATS, *b_next = b + s->groups * TILE_FLOATS;
    float *out = s->out + row * TILE_ROWS * s->inputs + column * TILE_ROWS, *next = out + TILE_ROWS * s->inputs;
    if (begin) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, out, s->inputs);
        if (columns > 1) tile_load(1, out + TILE_ROWS, s->inputs);
        if (rows > 1) tile_load(2, next, s->inputs);
        if (rows > 1 && columns > 1) tile_load(3, next + TILE_ROWS, s->inputs);
    }
    for (long i = 0; i < s->groups * TILE_FLOATS; i += TILE_FLOATS) {
        tile_load(4, a + i, TILE_STEPS);
        tile_load(6, b + i, TILE_STEPS);
        tile_multiply(0, 4, 6);
        if (columns > 1) {
            tile_load(7, b_next + i, TILE_STEPS);
            tile_multiply(1, 4, 7);
        }
        if (rows > 1) {
            tile_load(5, a_next + i, TILE_STEPS);
            tile_multiply(2, 5, 6);
            if (columns > 1) tile_multiply(3, 5, 7);
        }
    }
    tile_store(0, out, s->inputs);
    if (columns > 1) tile_store(1, out + TILE_ROWS, s->inputs);
    if (rows > 1) tile_store(2, next, s->inputs);
    if (rows > 1 && columns > 1) tile_store(3, next + TILE_ROWS, s->inputs);
}

static void multiply_piece(const void *of, long piece, float *unused) {
    const GradientCall *s = of;
    (void)unused;
    long row_tiles = s->outputs / TILE_ROWS, column_tiles = s->inputs / TILE_ROWS;
    long across = num_pieces(column_tiles, BLOCK_TILES), row = piece / across * 2;
    Range columns = range_of(piece % across, column_tiles, BLOCK_TILES);
    open_tiles();
    for (long column = columns.first; column < columns.last; column += 2) {
        int begin = s->first == 0, two_rows = row + 1 < row_tiles, two_columns = column + 1 < columns.last;
        if (two_rows && two_columns) add_tiles(s, row, column, 2, 2, begin);
        else if (two_rows) add_tiles(s, row, column, 2, 1, begin);
        else if (two_columns) add_tiles(s, row, column, 1, 2, begin);
        else add_tiles(s, row, column, 1, 1, begin);
    }
    close_tiles();
}
#else
static void multiply_piece(const void *of, long piece, float *unused) { (void)of, (void)piece, (void)unused; }
#endif

/* Whether `weight_gradient` works here. */
int has_weight_gradient(void) { return has_matrix_unit(); }

/* From g (R, O) and x (R, I), bfloat16, to out (O, I) float32. Returns 0, or 1 if there is no memory. */
int weight_gradient(const void *g, const void *x, float *out, long rows, long outputs, long inputs, int threads) {
    long most = BYTES_PACKED / (2 * (outputs + inputs)) / GROUP * GROUP;
    most = most < LEAST_ROWS ? LEAST_ROWS : most > MOST_ROWS ? MOST_ROWS : most;
    long floats = round_up(rows < most ? rows : most, GROUP) / 2;
    float *memory = aligned_alloc(LINE, (outputs + inputs) * floats * 4);
    if (!memory) return 1;
    int failed = 0;
    for (long first = 0; first < rows && !failed; first += most) {
        long last = rows - first < most ? rows : first + most, groups = num_pieces(last - first, GROUP);
        GradientCall call = {
            .g = g, .x = x, .g_tiles = memory, .x_tiles = memory + outputs * groups * TILE_STEPS, .out = out,
            .outputs = outputs, .inputs = inputs, .first = first, .last = last, .groups = groups,
        };
        long blocks = num_pieces(outputs / TILE_ROWS, 2) * num_pieces(inputs / TILE_ROWS, BLOCK_TILES);
        failed = share_pieces(pack_piece, &call, num_pieces(groups, GROUPS_OF_PIECE), threads, outputs * TILE_STEPS);
        failed = failed || share_pieces(multiply_piece, &call, blocks, threads, 0);
    }
    free(memory);
    return failed;
}
