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
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t bf16_bits __attribute__((vector_size(LANES * 2)));
typedef int16_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t loose_bf16_bits __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE vec broadcast(float x) { return (vec){} + x; }
INLINE long round_up(long count, long to) { return (count + to - 1) / to * to; }
INLINE vec blend(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
#ifdef __AVX512F__ /* one instruction, which GCC does not generate from `blend` */
INLINE vec vec_max(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec vec_min(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec times_power_of_two(vec x, vec n) { return (vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
INLINE float sum_lanes(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float max_lane(vec x) { return _mm512_reduce_max_ps((__m512)x); }
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

/* --- rows of float32, or of bfloat16 if `bf16` is set ------------------------------------------------------------- */

#ifdef __AVX512F__ /* GCC would convert each half of the vector by itself and join them */
INLINE vec bf16_to_float(bf16_bits x) { return (vec)((wide_bits)_mm512_cvtepu16_epi32((__m256i)x) << 16); }
#else
INLINE vec bf16_to_float(bf16_bits x) { return (vec)(__builtin_convertvector(x, wide_bits) << 16); }
#endif

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
