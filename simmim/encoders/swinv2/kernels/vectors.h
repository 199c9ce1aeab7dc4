/* Vectors of floats by the compiler's own extension, rows of float32 or bfloat16, memory and threads. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

/* A tile of the product is ROWS × 3 vectors: it must fit the registers beside one row of three. */
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
#define PAD 16 /* floats: what rows of scratch are padded to, a multiple of LANES and ROWS */
#define LINE 64 /* bytes */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef int16_t half_words __attribute__((vector_size(LANES * 4)));
typedef uint16_t loose_half_bits __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec x) { *(loose_vec *)to = x; }
INLINE vec all(float x) { return (vec){} + x; }
INLINE long padded(long count, long to) { return (count + to - 1) / to * to; }
INLINE vec choose(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
#ifdef __AVX512F__ /* one instruction, which GCC does not make of a choice between vectors */
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec times_power_of_two(vec x, vec n) { return (vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
INLINE float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
INLINE vec times_power_of_two(vec x, vec n) { return x * (vec)((__builtin_convertvector(n, ivec) + 127) << 23); }

INLINE float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}

INLINE float largest(vec x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}
#endif

/* e^x to about one unit in the last place, for x up to 88; below -87 it stays; NaN of NaN, which `larger` takes from its
   second operand. */
INLINE vec exponential(vec x) {
    x = larger(all(-87.0f), x);
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds: 1.5 · 2^23 leaves no bits for a fraction */
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return times_power_of_two(p, n);
}

/* --- Rows: float32, or bfloat16 where `half` says so ------------------------------------------------------------- */

#ifdef __AVX512F__ /* GCC widens each half of them by itself and puts both together */
INLINE vec widened(half_bits x) { return (vec)((wide_bits)_mm512_cvtepu16_epi32((__m256i)x) << 16); }
#else
INLINE vec widened(half_bits x) { return (vec)(__builtin_convertvector(x, wide_bits) << 16); }
#endif

#ifdef __AVX512BF16__
INLINE half_bits narrowed(vec x) { return (half_bits)_mm512_cvtneps_pbh((__m512)x); }
#else
INLINE half_bits narrowed(vec x) { /* to the nearest, ties to even; NaN stays NaN */
    wide_bits bits = (wide_bits)x;
    wide_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    wide_bits number = (wide_bits)(x == x);
    return __builtin_convertvector((number & rounded) | (~number & ((bits >> 16) | 0x40)), half_bits);
}
#endif

INLINE float widened_one(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t narrowed_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

INLINE void load_row(float *to, const void *from, long offset, long count, int half) {
    long i = 0;
    if (!half) {
        memcpy(to, (const float *)from + offset, count * 4);
        return;
    }
    const uint16_t *bits = (const uint16_t *)from + offset;
    for (; i + LANES <= count; i += LANES) store(to + i, widened(*(const loose_half_bits *)(bits + i)));
    for (; i < count; i++) to[i] = widened_one(bits[i]);
}

INLINE void store_row(void *to, long offset, const float *from, long count, int half) {
    long i = 0;
    if (!half) {
        memcpy((float *)to + offset, from, count * 4);
        return;
    }
    uint16_t *bits = (uint16_t *)to + offset;
    for (; i + LANES <= count; i += LANES) *(loose_half_bits *)(bits + i) = narrowed(load(from + i));
    for (; i < count; i++) bits[i] = narrowed_one(from[i]);
}

/* LANES numbers from `at` on, or fewer, `count`, and zeros after them. */
INLINE vec load_some(const void *from, long at, long count, int half) {
    if (count >= LANES && half) return widened(*(const loose_half_bits *)((const uint16_t *)from + at));
    if (count >= LANES) return load((const float *)from + at);
    float few[LANES] = {0};
    load_row(few, from, at, count, half);
    return load(few);
}

INLINE void store_some(void *to, long at, vec x, long count, int half) {
    if (count >= LANES && half) *(loose_half_bits *)((uint16_t *)to + at) = narrowed(x);
    else if (count >= LANES) store((float *)to + at, x);
    else {
        float few[LANES];
        store(few, x);
        store_row(to, at, few, count, half);
    }
}

/* --- Memory and threads ------------------------------------------------------------------------------------------ */

INLINE float *floats(long count) { /* zeros, on a cache line; NULL where there is no memory */
    long bytes = padded(count * 4 + LINE, LINE);
    void *memory = aligned_alloc(LINE, bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

/* The part of `count` that is this thread's: the same for the same number of threads, so that sums are too. There may be
   fewer threads than were asked for. */
#ifdef _OPENMP
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif
INLINE long first_of(long count, long thread, long threads) { return count * thread / threads; }
