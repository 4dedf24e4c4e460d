/* Products with packed weights. Every output is one chain of multiply-adds over the inner dimension, first to last:
   a row's bits do not depend on how many rows or threads there are.

   A packed weight is [blocks][inner][32]: 32 output columns side by side, read as one stream. */
#pragma once
#include "pool.h"
#include "vector.h"

#define COLUMNS 32 /* of a block: two vectors */
#if defined(__AVX512F__)
#define MAX_ROWS 12 /* accumulators in registers: rows * 2 vectors */
#else
#define MAX_ROWS 3
#endif

typedef enum { STORE, ADD, SWIGLU } Epilogue;

typedef struct {
    const float *packed, *bias; /* bias may be NULL */
    long inner, outer;          /* outer: columns of the result (of one half, for SWIGLU) */
    const int8_t *codes;        /* instead of `packed`, see linear_int8.h; else NULL */
    const float *scales;        /* of the coded columns */
    const int32_t *totals;      /* of the codes of each column */
} Linear;

static long num_blocks(long columns) { return (columns + COLUMNS - 1) / COLUMNS; }

/* SWIGLU blocks hold 16 gate columns, then the 16 up columns they are multiplied with. */
static long linear_blocks(const Linear *linear, Epilogue epilogue) {
    return epilogue == SWIGLU ? (linear->outer + LANES - 1) / LANES : num_blocks(linear->outer);
}

INLINE void multiply(int rows, const float *x, long stride, const float *w, long inner, vec acc[][2]) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) acc[row][0] = acc[row][1] = splat(0.0f);
    for (long k = 0; k < inner; k++, w += COLUMNS) {
        vec left = load(w), right = load(w + LANES);
        __builtin_prefetch(w + 16 * COLUMNS);
        __builtin_prefetch(w + 16 * COLUMNS + LANES);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            vec value = splat(x[row * stride + k]);
            acc[row][0] += value * left;
            acc[row][1] += value * right;
        }
    }
}

INLINE void write_columns(float *to, vec value, long columns, Epilogue epilogue) {
    if (columns >= LANES) {
        if (epilogue == ADD) value += load(to);
        store(to, value);
        return;
    }
    for (long lane = 0; lane < columns; lane++) to[lane] = epilogue == ADD ? to[lane] + value[lane] : value[lane];
}

INLINE void finish_block(int rows, vec acc[][2], const Linear *linear, long block, Epilogue epilogue, float *y, long stride) {
    if (epilogue == SWIGLU) {
        long column = block * LANES, columns = linear->outer - column;
        for (int row = 0; row < rows; row++) {
            vec gate = acc[row][0], up = acc[row][1];
            if (linear->bias) {
                gate += load(linear->bias + block * COLUMNS);
                up += load(linear->bias + block * COLUMNS + LANES);
            }
            write_columns(y + row * stride + column, gate / (vec_exp(-gate) + 1.0f) * up, columns, STORE);
        }
        return;
    }
    long column = block * COLUMNS, columns = linear->outer - column;
    for (int row = 0; row < rows; row++) {
        for (int half = 0; half < 2 && columns > half * LANES; half++) {
            vec value = acc[row][half];
            if (linear->bias) value += load(linear->bias + column + half * LANES);
            write_columns(y + row * stride + column + half * LANES, value, columns - half * LANES, epilogue);
        }
    }
}

#define TILE(rows)                                                        \
    case rows: {                                                          \
        vec acc[rows][2];                                                 \
        multiply(rows, x, x_stride, w, linear->inner, acc);               \
        finish_block(rows, acc, linear, block, epilogue, y, y_stride);    \
        break;                                                            \
    }

INLINE void tile(int rows, const float *x, long x_stride, const float *w, const Linear *linear, long block,
                 Epilogue epilogue, float *y, long y_stride) {
    switch (rows) {
        TILE(1)
        TILE(2)
        TILE(3)
#if MAX_ROWS > 3
        TILE(4)
        TILE(5)
        TILE(6)
        TILE(7)
        TILE(8)
        TILE(9)
        TILE(10)
        TILE(11)
        TILE(12)
#endif
    }
}

#define BLOCKS_OF(epilogue)                                                                                  \
    for (long block = first; block < last; block++) {                                                        \
        const float *w = linear->packed + block * linear->inner * COLUMNS;                                   \
        for (long row = 0, turn = 0; row < rows; turn++) {                                                   \
            long count = (rows * (turn + 1)) / turns - row; /* even tiles: 16 rows are 8 + 8, not 12 + 4 */  \
            tile(count, x + row * x_stride, x_stride, w, linear, block, epilogue, y + row * y_stride, y_stride); \
            row += count;                                                                                    \
        }                                                                                                    \
    }                                                                                                        \
    break;

/* This thread's share of y = x W^T (+ bias), y += ..., or silu(gate) * up. */
static void linear_share(const Pool *pool, int thread, const Linear *linear, Epilogue epilogue, const float *x,
                         long x_stride, long rows, float *y, long y_stride) {
    long first, last, turns = (rows + MAX_ROWS - 1) / MAX_ROWS;
    share(pool, thread, linear_blocks(linear, epilogue), &first, &last);
    switch (epilogue) {
        case STORE: BLOCKS_OF(STORE)
        case ADD: BLOCKS_OF(ADD)
        case SWIGLU: BLOCKS_OF(SWIGLU)
    }
}

/* weights [outer, inner] -> packed [blocks][inner][32], missing columns zero. */
void caesura_pack(const float *weights, long outer, long inner, float *packed) {
    for (long block = 0; block < num_blocks(outer); block++)
        for (long k = 0; k < inner; k++)
            for (long lane = 0; lane < COLUMNS; lane++) {
                long column = block * COLUMNS + lane;
                *packed++ = column < outer ? weights[column * inner + k] : 0.0f;
            }
}

/* gate and up [outer, inner] each, one after the other -> SWIGLU blocks. */
void caesura_pack_gate_up(const float *weights, long outer, long inner, float *packed) {
    for (long block = 0; block < (outer + LANES - 1) / LANES; block++)
        for (long k = 0; k < inner; k++)
            for (long lane = 0; lane < COLUMNS; lane++) {
                long column = block * LANES + lane % LANES, row = column + (lane < LANES ? 0 : outer);
                *packed++ = column < outer ? weights[row * inner + k] : 0.0f;
            }
}
