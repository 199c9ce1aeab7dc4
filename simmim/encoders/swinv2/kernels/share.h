/* Work that several threads share by demand. */
#include "vectors.h"

/* Does one piece of a call. `scratch` is memory of the thread, zeros before its first piece. */
typedef void Work(const void *call, long piece, float *scratch);

/* Runs `work` for each piece from 0 to `pieces`, in this thread and in up to `threads` - 1 others, each with `scratch_floats`
   of memory. Returns 0, or 1 if there is no memory. */
int share_pieces(Work *work, const void *call, long pieces, int threads, long scratch_floats);

/* The number of rows of `dim` numbers in a piece, a multiple of `multiple`: enough to be worth the taking. It does not depend
   on the number of threads: neither do sums over the rows of a piece, nor sums of those over the pieces. */
INLINE long rows_in_piece(long rows, long dim, long multiple) {
    const long usual_pieces = 128, least_numbers = 8192;
    long many = rows / usual_pieces + 1, least = least_numbers / dim + 1;
    return round_up(many > least ? many : least, multiple);
}

INLINE long num_pieces(long rows, long rows_of_one) { return (rows + rows_of_one - 1) / rows_of_one; }

/* The rows of a piece. */
typedef struct {
    long first, last;
} Range;

INLINE Range range_of(long piece, long rows, long rows_of_one) {
    long last = (piece + 1) * rows_of_one;
    return (Range){piece * rows_of_one, last < rows ? last : rows};
}
