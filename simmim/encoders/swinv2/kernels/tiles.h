/* Tiles of a matrix unit (AMX): 16 rows of 64 bytes. One instruction adds the product of two tiles of bfloat16, 16 × 32 and
   32 × 16, to a tile of float32. The second factor is of pairs that are neighbors along k, as in product.h. */
#include "share.h"

#define TILE_ROWS 16
#define TILE_STEPS 16 /* pairs in a row of the first factor, and rows of the second one */
#define NUM_TILES 8

#if defined(EMULATED_TILES)
#define HAS_TILES 1
static _Thread_local float tile_memory[NUM_TILES][TILE_ROWS][TILE_STEPS];

/* Tests define 1, or 0 for a system that refuses. */
INLINE int has_matrix_unit(void) { return EMULATED_TILES; }
INLINE void open_tiles(void) {}
INLINE void close_tiles(void) {}
#define tile_zero(tile) memset(tile_memory[tile], 0, sizeof tile_memory[tile])
#define tile_load(tile, from, stride) \
    for (long row_ = 0; row_ < TILE_ROWS; row_++) memcpy(tile_memory[tile][row_], (from) + row_ * (stride), 64)
#define tile_store(tile, to, stride) \
    for (long row_ = 0; row_ < TILE_ROWS; row_++) memcpy((to) + row_ * (stride), tile_memory[tile][row_], 64)
#define tile_multiply(sum, first, second) emulate_multiply(tile_memory[sum], tile_memory[first], tile_memory[second])

static void emulate_multiply(float (*sum)[TILE_STEPS], float (*first)[TILE_STEPS], float (*second)[TILE_STEPS]) {
    for (long row = 0; row < TILE_ROWS; row++)
        for (long step = 0; step < TILE_STEPS; step++)
            for (long column = 0; column < TILE_STEPS; column++) {
                uint16_t a[2], b[2];
                memcpy(a, &first[row][step], 4), memcpy(b, &second[step][column], 4);
                for (int i = 0; i < 2; i++) sum[row][column] += one_bf16_to_float(a[i]) * one_bf16_to_float(b[i]);
            }
}
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use tiles. Their memory is part of a thread's state only after a process has asked. */
INLINE int has_matrix_unit(void) {
    static atomic_int answer; /* 0 before the first call, then 1 for no and 2 for yes */
    const long request_permission = 0x1023, tile_data = 18;
    if (!answer) answer = syscall(SYS_arch_prctl, request_permission, tile_data) ? 1 : 2;
    return answer == 2;
}

/* Makes all tiles of a thread full ones. Other code of the thread, such as torch's products, may have had other tiles. */
INLINE void open_tiles(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } full = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&full);
}

/* After this a switch to another thread need not save tiles. */
INLINE void close_tiles(void) { _tile_release(); }

/* The compiler does not know that loads of tiles read memory: what is written before must be there. */
#define tile_load(tile, from, stride)             \
    do {                                          \
        __asm__ volatile("" ::: "memory");        \
        _tile_loadd(tile, from, (stride) * 4);    \
    } while (0)
#define tile_zero(tile) _tile_zero(tile)
#define tile_store(tile, to, stride) _tile_stored(tile, to, (stride) * 4)
#define tile_multiply(sum, first, second) _tile_dpbf16ps(sum, first, second)
#else
#define HAS_TILES 0
INLINE int has_matrix_unit(void) { return 0; }
INLINE void open_tiles(void) {}
INLINE void close_tiles(void) {}
#endif
