/* Pixels of 8 bits resized by the bilinear filter, antialiased: along one axis, rounded to 8 bits, then along the other, in
   the order, with the weights and with the sums of Pillow, so that the results are equal. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE4_1__
#include <immintrin.h>
#endif

#define BITS 22 /* of a weight behind the point: of 32, a pixel takes 8, and 2 are left for sums */
#define HALF (1 << (BITS - 1))
#define LANES 4 /* of a pixel that is made along a row; 1 or 3 of them are used */
#define ROWS 4 /* that are made at a time */

/* As wide as the processor's registers: of vectors that are wider, compilers keep sums in memory. */
#if defined(__AVX512F__)
#define AT_ONCE 4 /* rows in a vector */
#elif defined(__AVX2__)
#define AT_ONCE 2
#else
#define AT_ONCE 1
#endif
#define PARTS (ROWS / AT_ONCE)

typedef int32_t pixels __attribute__((vector_size(4 * AT_ONCE * LANES)));

typedef struct {
    long size, most; /* results, and the pixels that one may look at */
    int32_t *first, *count, *weights;
} taps;

/* The weights of the pixels that make each result, where [start, end) of an axis of `length` pixels becomes `size` ones.
   Returns 1 where there is no memory. */
static int make_taps(taps *t, long length, float start, float end, long size)
{
    double scale = (double)(end - start) / size, reach = scale < 1 ? 1 : scale;
    t->size = size;
    t->most = (long)ceil(reach) * 2 + 1;
    t->first = malloc(size * (t->most + 2) * sizeof(int32_t));
    double *shares = malloc(t->most * sizeof(double));
    if (!t->first || !shares) {
        free(shares);
        return 1;
    }
    t->count = t->first + size;
    t->weights = t->count + size;
    for (long i = 0; i < size; i++) {
        double center = start + (i + 0.5) * scale, total = 0;
        long low = (long)(center - reach + 0.5), high = (long)(center + reach + 0.5);
        low = low < 0 ? 0 : low;
        high = high > length ? length : high;
        for (long k = 0; k < high - low; k++) {
            double distance = fabs((k + low - center + 0.5) * (1 / reach));
            shares[k] = distance < 1 ? 1 - distance : 0;
            total += shares[k];
        }
        for (long k = 0; k < high - low; k++)
            t->weights[i * t->most + k] = (int32_t)(0.5 + (total != 0 ? shares[k] / total : shares[k]) * (1 << BITS));
        t->first[i] = low;
        t->count[i] = high - low;
    }
    free(shares);
    return 0;
}

/* The source pixels that an axis of the result looks at: from `*low` on, below `*high`. */
static void range_of(const taps *t, long *low, long *high)
{
    *low = t->first[0];
    *high = t->first[t->size - 1] + t->count[t->size - 1];
}

/* Result i along columns: rows of `length` bytes, `stride` apart, the first of them the one that the axis begins at, to one
   row. */
static void mix_rows(const taps *t, long i, const uint8_t *in, long stride, long length, int32_t *restrict sums,
                     uint8_t *restrict out)
{
    for (long j = 0; j < length; j++)
        sums[j] = HALF;
    for (long k = 0; k < t->count[i]; k++) {
        const uint8_t *row = in + (t->first[i] - t->first[0] + k) * stride;
        int32_t weight = t->weights[i * t->most + k];
        for (long j = 0; j < length; j++)
            sums[j] += row[j] * weight;
    }
    for (long j = 0; j < length; j++)
        out[j] = (uint8_t)(sums[j] >> BITS);
}

/* ROWS rows of pixels, (width, bands), to numbers: (width, ROWS, LANES). */
static void widen_rows(const uint8_t *const *rows, long width, long bands, int32_t *restrict out)
{
    long x = 0;
#ifdef __SSE4_1__
    for (; bands == 3 && x < width - 1; x++) /* four bytes at once, which the last pixel does not have */
        for (long row = 0; row < ROWS; row++) {
            int32_t four;
            memcpy(&four, rows[row] + x * 3, sizeof four);
            _mm_store_si128((__m128i *)out + x * ROWS + row, _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
        }
#endif
    for (; x < width; x++)
        for (long row = 0; row < ROWS; row++)
            for (long lane = 0; lane < LANES; lane++)
                out[(x * ROWS + row) * LANES + lane] = lane < bands ? rows[row][x * bands + lane] : 0;
}

/* Numbers of a pixel in ROWS rows to bytes. */
static void narrow(const int32_t *in, uint8_t *restrict out)
{
#ifdef __SSE4_1__
    const __m128i *row = (const __m128i *)in;
    __m128i low = _mm_packus_epi32(row[0], row[1]), high = _mm_packus_epi32(row[2], row[3]);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(low, high));
#else
    for (long i = 0; i < ROWS * LANES; i++)
        out[i] = (uint8_t)in[i];
#endif
}

/* All results along ROWS rows, (width, bands), `stride` bytes apart, whose first pixels are those that the axis begins at:
   (ROWS, size, LANES). The last of `count` rows stands in for those behind it. */
static void mix_pixels(const taps *t, const uint8_t *in, long stride, long count, long width, long bands,
                       int32_t *restrict wide, uint8_t *restrict out)
{
    long size = t->size;
    const uint8_t *rows[ROWS];
    for (long row = 0; row < ROWS; row++)
        rows[row] = in + (row < count ? row : count - 1) * stride;
    widen_rows(rows, width, bands, wide);
    for (long i = 0; i < size; i++) {
        const pixels *from = (const pixels *)wide + (t->first[i] - t->first[0]) * PARTS;
        const int32_t *weights = t->weights + i * t->most;
        pixels sums[PARTS];
        for (long part = 0; part < PARTS; part++)
            sums[part] = (pixels){} + HALF;
        for (long k = 0; k < t->count[i]; k++)
            for (long part = 0; part < PARTS; part++)
                sums[part] += from[k * PARTS + part] * weights[k];
        for (long part = 0; part < PARTS; part++)
            sums[part] >>= BITS;
        uint8_t bytes[ROWS * LANES];
        narrow((const int32_t *)sums, bytes);
        for (long row = 0; row < ROWS; row++)
            memcpy(out + (row * size + i) * LANES, bytes + row * LANES, LANES);
    }
}

/* A row, (width, LANES), as row i of (bands, height, width). */
static void store_row(const uint8_t *restrict row, long i, long width, long height, long bands, uint8_t *restrict out)
{
    for (long band = 0; band < bands; band++)
        for (long x = 0; x < width; x++)
            out[(band * height + i) * width + x] = row[x * LANES + band];
}

/* Resize a box of an image of 1 or 3 bands.

   in: the image's pixel (left, top) as `origin` gives it; the rows are `stride` bytes apart, and hold all that the filter
       looks at.
   width, height: of the whole image.
   box: left, top, right, bottom in it.
   columns_first: along columns, and then along rows.
   out: (bands, out_height, out_width).
   Returns 1 where there is no memory. */
int resample(const uint8_t *in, long stride, long bands, const long *origin, long width, long height, const float *box,
             long out_width, long out_height, int columns_first, uint8_t *out)
{
    taps across = {0}, down = {0};
    uint8_t *rows = NULL, *line = NULL;
    int32_t *wide = NULL, *sums = NULL;
    int failed = 1;
    if (make_taps(&across, width, box[0], box[2], out_width) || make_taps(&down, height, box[1], box[3], out_height))
        goto end;
    long left, right, top, bottom;
    range_of(&across, &left, &right);
    range_of(&down, &top, &bottom);
    long columns = right - left, count = bottom - top, longest = columns > out_width ? columns : out_width;
    in += (top - origin[1]) * stride + (left - origin[0]) * bands;
    rows = malloc(columns_first ? ROWS * columns * bands : (count + ROWS - 1) * out_width * LANES);
    line = malloc(ROWS * out_width * LANES);
    wide = aligned_alloc(sizeof(pixels) * PARTS, columns * sizeof(pixels) * PARTS);
    sums = malloc(longest * LANES * sizeof(int32_t));
    if (!rows || !line || !wide || !sums)
        goto end;
    if (columns_first)
        for (long i = 0; i < out_height; i += ROWS) {
            long made = out_height - i < ROWS ? out_height - i : ROWS;
            for (long row = 0; row < made; row++)
                mix_rows(&down, i + row, in, stride, columns * bands, sums, rows + row * columns * bands);
            mix_pixels(&across, rows, columns * bands, made, columns, bands, wide, line);
            for (long row = 0; row < made; row++)
                store_row(line + row * out_width * LANES, i + row, out_width, out_height, bands, out);
        }
    else {
        for (long y = 0; y < count; y += ROWS)
            mix_pixels(&across, in + y * stride, stride, count - y, columns, bands, wide, rows + y * out_width * LANES);
        for (long i = 0; i < out_height; i++) {
            mix_rows(&down, i, rows, out_width * LANES, out_width * LANES, sums, line);
            store_row(line, i, out_width, out_height, bands, out);
        }
    }
    failed = 0;
end:
    free(across.first);
    free(down.first);
    free(rows);
    free(line);
    free(wide);
    free(sums);
    return failed;
}
