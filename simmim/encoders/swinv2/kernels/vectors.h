/* Vectors of floats (the compiler's vector extension), rows of float32 or bfloat16, and memory. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* A tile of the matrix product is ROWS × 3 vectors. It must fit into the registers together with three more vectors. */
#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#elif defined(__ARM_NEON)
#define LANES 4
#define ROWS 8
#else
#define LANES 4
#define ROWS 4
#endif
#define PAD 16 /* rows of scratch memory are padded to a multiple of this number of floats; a multiple of LANES and ROWS */
#define LINE 64 /* bytes of a cache line */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef int32_t loose_ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t bf16_bits __attribute__((vector_size(LANES * 2)));
typedef int16_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t loose_bf16_bits __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE ivec load_integers(const int32_t *from) { return *(const loose_ivec *)from; }
INLINE vec broadcast(float x) { return (vec){} + x; }
INLINE long round_up(long count, long to) { return (count + to - 1) / to * to; }
INLINE vec blend(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
#ifdef __AVX512F__ /* one instruction, which GCC does not generate from `blend` */
INLINE vec vec_max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec vec_min(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec times_power_of_two(vec x, vec n) { return (vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
INLINE float sum_lanes(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float max_lane(vec x) { return _mm512_reduce_max_ps((__m512)x); }

/* LANES × LANES lanes: to = fromᵀ. */
INLINE void transpose_square(const float *from, long from_row, float *to, long to_row) {
    __m512 in[16], out[16];
    _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) in[i] = _mm512_loadu_ps(from + i * from_row);
    _Pragma("GCC unroll 4") for (int i = 0; i < 16; i += 4) { /* four rows at a time: 4 × 4 blocks become columns */
        __m512d low_a = (__m512d)_mm512_unpacklo_ps(in[i], in[i + 1]), high_a = (__m512d)_mm512_unpackhi_ps(in[i], in[i + 1]);
        __m512d low_b = (__m512d)_mm512_unpacklo_ps(in[i + 2], in[i + 3]);
        __m512d high_b = (__m512d)_mm512_unpackhi_ps(in[i + 2], in[i + 3]);
        out[i] = (__m512)_mm512_unpacklo_pd(low_a, low_b), out[i + 1] = (__m512)_mm512_unpackhi_pd(low_a, low_b);
        out[i + 2] = (__m512)_mm512_unpacklo_pd(high_a, high_b), out[i + 3] = (__m512)_mm512_unpackhi_pd(high_a, high_b);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) { /* quarter q of out[i + 4 r] is column 4 q + i of rows 4 r to 4 r + 3 */
        __m512 even_a = _mm512_shuffle_f32x4(out[i], out[i + 4], 0x88), odd_a = _mm512_shuffle_f32x4(out[i], out[i + 4], 0xdd);
        __m512 even_b = _mm512_shuffle_f32x4(out[i + 8], out[i + 12], 0x88);
        __m512 odd_b = _mm512_shuffle_f32x4(out[i + 8], out[i + 12], 0xdd);
        _mm512_storeu_ps(to + i * to_row, _mm512_shuffle_f32x4(even_a, even_b, 0x88));
        _mm512_storeu_ps(to + (i + 4) * to_row, _mm512_shuffle_f32x4(odd_a, odd_b, 0x88));
        _mm512_storeu_ps(to + (i + 8) * to_row, _mm512_shuffle_f32x4(even_a, even_b, 0xdd));
        _mm512_storeu_ps(to + (i + 12) * to_row, _mm512_shuffle_f32x4(odd_a, odd_b, 0xdd));
    }
}
#else
INLINE vec vec_max(vec a, vec b) { return blend(a > b, a, b); }
INLINE vec vec_min(vec a, vec b) { return blend(a < b, a, b); }
INLINE vec times_power_of_two(vec x, vec n) { return x * (vec)((__builtin_convertvector(n, ivec) + 127) << 23); }

INLINE float sum_lanes(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

INLINE float max_lane(vec x) {
    float maximum = x[0];
    for (int lane = 1; lane < LANES; lane++) maximum = x[lane] > maximum ? x[lane] : maximum;
    return maximum;
}
#endif

/* to (columns, rows) = fromᵀ, of lanes. */
INLINE void transpose(const float *from, long rows, long columns, float *to) {
#ifdef __AVX512F__
    if (rows % LANES == 0 && columns % LANES == 0) {
        for (long row = 0; row < rows; row += LANES)
            for (long column = 0; column < columns; column += LANES)
                transpose_square(from + row * columns + column, columns, to + column * rows + row, rows);
        return;
    }
#endif
    for (long row = 0; row < rows; row++)
        for (long column = 0; column < columns; column++) to[column * rows + row] = from[row * columns + column];
}

/* e^x to about one unit in the last place, for x up to 88. Below -87 it is constant. NaN gives NaN: `vec_max` returns its
   second operand where one is NaN. */
INLINE vec exponential(vec x) {
    x = vec_max(broadcast(-87.0f), x);
    /* Rounds to an integer: beside 1.5 · 2^23 no bits are left for a fraction. */
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return times_power_of_two(p, n);
}

/* As `exponential`, and exactly 0 below -87: a weight by which nothing passes. */
INLINE vec exponential_or_0(vec x) { return (vec)(~(x < broadcast(-87.0f)) & (ivec)exponential(x)); }

/* e^x to 3e-6 of it, and up to the rounding of x, for weights that bfloat16 rounds; exactly 0 below -87. */
INLINE vec rough_exponential_or_0(vec x) {
#ifdef __AVX512F__
    __m512 power = (__m512)(x * 1.44269504f), whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT);
    vec r = (vec)_mm512_sub_ps(power, whole), p = broadcast(9.568450041e-3f);
    p = p * r + 5.591827631e-2f;
    p = p * r + 2.402480990e-1f;
    p = p * r + 6.931217909e-1f;
    p = p * r + 9.999992251e-1f;
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(counts, (__m512)p, whole);
#else
    return exponential_or_0(x);
#endif
}

/* --- rows of float32, or of bfloat16 if `bf16` is set ------------------------------------------------------------- */

#ifdef __AVX512F__ /* GCC would convert each half of the vector by itself and join them */
INLINE wide_bits widen(bf16_bits x) { return (wide_bits)_mm512_cvtepu16_epi32((__m256i)x); }
#else
INLINE wide_bits widen(bf16_bits x) { return __builtin_convertvector(x, wide_bits); }
#endif
INLINE vec bf16_to_float(bf16_bits x) { return (vec)(widen(x) << 16); }

#ifdef __AVX512BF16__
INLINE bf16_bits float_to_bf16(vec x) { return (bf16_bits)_mm512_cvtneps_pbh((__m512)x); }
#else
INLINE bf16_bits float_to_bf16(vec x) { /* rounds to the nearest, ties to even; NaN stays NaN */
    wide_bits bits = (wide_bits)x;
    wide_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    wide_bits number = (wide_bits)(x == x);
    return __builtin_convertvector((number & rounded) | (~number & ((bits >> 16) | 0x40)), bf16_bits);
}
#endif

INLINE float one_bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t one_float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

/* Has the cache lines of a row fetched while other work goes on, for reading or to `write` them. */
INLINE void fetch_row(const void *from, long offset, long count, int bf16, int write) {
    const char *first = (const char *)from + offset * (bf16 ? 2 : 4), *last = first + count * (bf16 ? 2 : 4) - 1;
    for (const char *line = first; line < last; line += LINE) {
        if (write) __builtin_prefetch(line, 1);
        else __builtin_prefetch(line, 0);
    }
}

INLINE void load_row(float *to, const void *from, long offset, long count, int bf16) {
    long i = 0;
    if (!bf16) {
        memcpy(to, (const float *)from + offset, count * 4);
        return;
    }
    const uint16_t *bits = (const uint16_t *)from + offset;
    for (; i + LANES <= count; i += LANES) store(to + i, bf16_to_float(*(const loose_bf16_bits *)(bits + i)));
    for (; i < count; i++) to[i] = one_bf16_to_float(bits[i]);
}

INLINE void store_row(void *to, long offset, const float *from, long count, int bf16) {
    long i = 0;
    if (!bf16) {
        memcpy((float *)to + offset, from, count * 4);
        return;
    }
    uint16_t *bits = (uint16_t *)to + offset;
    for (; i + LANES <= count; i += LANES) *(loose_bf16_bits *)(bits + i) = float_to_bf16(load(from + i));
    for (; i < count; i++) bits[i] = one_float_to_bf16(from[i]);
}

/* LANES numbers at `offset`; if `count` is less, `count` numbers and zeros. */
INLINE vec load_partial(const void *from, long offset, long count, int bf16) {
    if (count >= LANES && bf16) return bf16_to_float(*(const loose_bf16_bits *)((const uint16_t *)from + offset));
    if (count >= LANES) return load((const float *)from + offset);
    float padded[LANES] = {0};
    load_row(padded, from, offset, count, bf16);
    return load(padded);
}

INLINE void store_partial(void *to, long offset, vec x, long count, int bf16) {
    if (count >= LANES && bf16) *(loose_bf16_bits *)((uint16_t *)to + offset) = float_to_bf16(x);
    else if (count >= LANES) store((float *)to + offset, x);
    else {
        float padded[LANES];
        store(padded, x);
        store_row(to, offset, padded, count, bf16);
    }
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

INLINE float *allocate_floats(long count) { /* zeros, aligned to a cache line; NULL if there is no memory */
    long bytes = round_up(count * 4 + LINE, LINE);
    void *memory = aligned_alloc(LINE, bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}
