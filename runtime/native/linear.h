/* Products with packed weights. Every output is one chain of multiply-adds over the inner dimension, first to last:
   a row's bits do not depend on how many rows or threads there are.

   A packed weight is [blocks][inner][32]: 32 output columns side by side, read as one stream. */
#pragma once
#include "pool.h"
#include "vector.h"

#define COLUMNS 32 /* of a block: two vectors of 16 */

/* A tile is as many rows and columns as there are registers for its sums. */
#if defined(__AVX512F__)
#define MAX_ROWS 12
#define TILE_COLUMNS 32
#elif defined(__AVX__)
#define MAX_ROWS 6
#define TILE_COLUMNS 16
#elif defined(__aarch64__)
#define MAX_ROWS 6
#define TILE_COLUMNS 16
#else
#define MAX_ROWS 3
#define TILE_COLUMNS 16
#endif
#define TILE_REGISTERS (TILE_COLUMNS / REGISTER_FLOATS)

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

/* What a tile asks memory for while it computes, so that it never waits: of a block used once, the stream itself, a bit
   ahead; of a block used for several tiles, half of the next block, in turns. */
typedef enum { AHEAD, NEXT_BLOCK } Fetch;

#define AHEAD_BYTES 10240 /* measured: with 4 KB and less, 8 rows are a fifth slower; from 8 KB on it does not matter */
#define LINE 64

/* A step reads two cache lines of `at`; `next` + 64 * step is of the block after it. */
INLINE void fetch_lines(Fetch fetch, const void *at, const char *next, long step) {
    if (fetch == AHEAD) {
        __builtin_prefetch((const char *)at + AHEAD_BYTES);
        __builtin_prefetch((const char *)at + AHEAD_BYTES + LINE);
    }
    if (fetch == NEXT_BLOCK) __builtin_prefetch(next + step * LINE, 0, 2);
}

INLINE void multiply(int rows, Fetch fetch, const float *x, long stride, const float *w, const char *next, long inner,
                     float sums[][COLUMNS]) {
#pragma GCC unroll 2
    for (int part = 0; part < COLUMNS / TILE_COLUMNS; part++) {
        reg acc[MAX_ROWS][TILE_REGISTERS]; /* of fixed size: an array of variable length does not stay in registers */
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int i = 0; i < TILE_REGISTERS; i++) acc[row][i] = (reg){};
        const float *at = w + part * TILE_COLUMNS;
        for (long k = 0; k < inner; k++, at += COLUMNS) {
            reg weights[TILE_REGISTERS];
#pragma GCC unroll 8
            for (int i = 0; i < TILE_REGISTERS; i++) weights[i] = *(const reg *)(at + i * REGISTER_FLOATS);
            if (part == 0) fetch_lines(fetch, at, next, k);
#pragma GCC unroll 16
            for (int row = 0; row < rows; row++) {
                reg value = (reg){} + x[row * stride + k];
#pragma GCC unroll 8
                for (int i = 0; i < TILE_REGISTERS; i++) acc[row][i] += value * weights[i];
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int i = 0; i < TILE_REGISTERS; i++)
                *(reg *)(sums[row] + part * TILE_COLUMNS + i * REGISTER_FLOATS) = acc[row][i];
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

/* Bias, epilogue and the way to `y`. Not inlined: one chain of operations for a row, whatever tile it was in. */
static __attribute__((noinline)) void finish_rows(long rows, const float sums[][COLUMNS], const Linear *linear,
                                                  long block, Epilogue epilogue, float *y, long stride) {
    long column = block * (epilogue == SWIGLU ? LANES : COLUMNS), columns = linear->outer - column;
    vec bias[2] = {splat(0.0f), splat(0.0f)};
    for (int half = 0; half < 2 && linear->bias; half++) bias[half] = load(linear->bias + block * COLUMNS + half * LANES);
    for (long row = 0; row < rows; row++) {
        vec left = load(sums[row]) + bias[0], right = load(sums[row] + LANES) + bias[1];
        float *to = y + row * stride + column;
        if (epilogue == SWIGLU) {
            write_columns(to, left / (vec_exp(-left) + 1.0f) * right, columns, STORE);
            continue;
        }
        write_columns(to, left, columns, epilogue);
        if (columns > LANES) write_columns(to + LANES, right, columns - LANES, epilogue);
    }
}

/* The cases of a switch over numbers of rows, each one that the compiler knows. A tile that is not alone has at least
   half of MAX_ROWS, since tiles are even: 16 rows are 8 + 8, not 12 + 4. */
#if MAX_ROWS == 12
#define FEW_ROWS(call) call(1) call(2) call(3) call(4) call(5)
#define MANY_ROWS(call) call(6) call(7) call(8) call(9) call(10) call(11) call(12)
#elif MAX_ROWS == 6
#define FEW_ROWS(call) call(1) call(2)
#define MANY_ROWS(call) call(3) call(4) call(5) call(6)
#else
#define FEW_ROWS(call) call(1)
#define MANY_ROWS(call) call(2) call(3)
#endif

#define LONE_TILE(rows) \
    case rows: multiply(rows, AHEAD, x, stride, w, next, inner, sums); break;
#define TILE(rows) \
    case rows: multiply(rows, NEXT_BLOCK, x, stride, w, next, inner, sums); break;

INLINE void tile(long rows, int alone, const float *x, long stride, const float *w, const char *next, long inner,
                 float sums[][COLUMNS]) {
    if (alone)
        switch (rows) { FEW_ROWS(LONE_TILE) MANY_ROWS(LONE_TILE) }
    else
        switch (rows) { MANY_ROWS(TILE) }
}

INLINE long tile_rows(long rows, long turn, long turns) { return rows * (turn + 1) / turns - rows * turn / turns; }

/* What this thread takes of y = x W^T (+ bias), y += ..., or silu(gate) * up. */
static void multiply_floats(Pool *pool, const Linear *linear, Epilogue epilogue, const float *x, long x_stride, long rows,
                            float *y, long y_stride) {
    long turns = (rows + MAX_ROWS - 1) / MAX_ROWS, inner = linear->inner, blocks = linear_blocks(linear, epilogue);
    float sums[MAX_ROWS][COLUMNS];
    for (long first, last; take(pool, blocks, piece_size(pool, blocks), &first, &last);)
        for (long block = first; block < last; block++) {
            const float *w = linear->packed + block * inner * COLUMNS;
            const char *next = (const char *)(w + inner * COLUMNS);
            for (long row = 0, turn = 0; turn < turns; turn++) {
                long count = tile_rows(rows, turn, turns);
                const char *half = next + turn % 2 * inner * LINE;
                tile(count, turns == 1, x + row * x_stride, x_stride, w, half, inner, sums);
                finish_rows(count, sums, linear, block, epilogue, y + row * y_stride, y_stride);
                row += count;
            }
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
