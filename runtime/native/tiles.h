/* Products on the matrix tiles of Intel's AMX: sums of 16 x 16 outputs, 16 multiply-adds of vectors in one instruction.

   Float32 through bfloat16. A float is the exact sum of three bfloat16 (its 24 bits cut into 8 + 8 + 8), and of the nine
   partial products of two such sums the six large ones are added up in float32. What is left out is below 2^-21 of a
   product and about 2^-24 of it on average, as much as one rounding of a float32 product. An output is one chain over
   the inner dimension, 32 positions and then the six products at a time, so as in linear.h a row's bits depend on
   nothing but the row, and few rows are computed with the same instructions as many.

   Weights stay float32 in memory, since few rows wait for it, and are cut as they come; rows are cut once for all
   columns. Denormal parts count as zero. */
#pragma once
#include "linear_int8.h"

#define TILE_ROWS 16
#define TILE_BYTES 1024
#define PARTS 3
#define STEP 32 /* inner positions that a bfloat16 tile holds */
#define PAIR_ROWS (2 * TILE_ROWS)
#define STEP_BYTES (PARTS * TILE_BYTES)
#define CODED_STEP 64 /* ... of codes */
#define PANEL_ROWS 256        /* at most, worked on together */
#define PANEL_BYTES (5 << 18) /* of their parts, which stay in the second cache meanwhile */

/* Rows for a product: floats [rows][width] or, where `parts` is set, each float cut in three: [16 rows][step][part][16][32]
   for every 16 rows, zeros where a step is wider than the rows. */
typedef struct {
    float *rows;
    char *parts;
    long width;
} Operand;

static long num_steps(long inner) { return (inner + STEP - 1) / STEP; }

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAVE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

/* The kernel gives tiles only to a process that has asked for them. */
static int ask_for_tiles(void) { return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA); }

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Tiles 0 1 and 2 3: sums of two times 16 rows with the left and the right 16 columns; 4 and 5: the rows; 6 and 7: the
   weights. Of up to 16 rows in parts: 0 to 3: sums with the columns of two blocks; 4 to 6: the parts; 7: the weights.
   Rows that are not there cost nothing. */
static void shape_tiles(long rows, int in_parts) {
    TileShapes shapes = {.palette = 1};
    int upper = rows < TILE_ROWS ? rows : TILE_ROWS, lower = rows - upper < TILE_ROWS ? rows - upper : TILE_ROWS;
    int second = lower ? lower : upper;
    int of[8] = {upper, upper, second, second, upper, second, in_parts && !lower ? upper : TILE_ROWS, TILE_ROWS};
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = of[tile];
    }
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* or the compiler may leave out what it does not see read */
    _tile_loadconfig(&shapes);
}

INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

#define SUM_STRIDE (COLUMNS * 4)

INLINE void load_sums(const void *from) {
    _tile_loadd(0, from, SUM_STRIDE);
    _tile_loadd(1, (const char *)from + 64, SUM_STRIDE);
    _tile_loadd(2, (const char *)from + TILE_ROWS * SUM_STRIDE, SUM_STRIDE);
    _tile_loadd(3, (const char *)from + TILE_ROWS * SUM_STRIDE + 64, SUM_STRIDE);
}

INLINE void store_sums(int two, void *to) {
    _tile_stored(0, to, SUM_STRIDE);
    _tile_stored(1, (char *)to + 64, SUM_STRIDE);
    if (!two) return;
    _tile_stored(2, (char *)to + TILE_ROWS * SUM_STRIDE, SUM_STRIDE);
    _tile_stored(3, (char *)to + TILE_ROWS * SUM_STRIDE + 64, SUM_STRIDE);
}

INLINE void store_right_sums(void *to) {
    _tile_stored(2, to, SUM_STRIDE);
    _tile_stored(3, (char *)to + 64, SUM_STRIDE);
}

/* -- cutting floats ------------------------------------------------------------------------------------------------ */

INLINE __m512i cut(vec *value) { /* the upper 8 bits of the mantissa; `value` is what is left */
    __m512i upper = _mm512_and_si512((__m512i)*value, _mm512_set1_epi32((int)0xffff0000));
    *value -= (vec)upper;
    return upper;
}

/* Two inner positions of 16 columns side by side. */
INLINE void store_both(char *to, __m512i even, __m512i odd) {
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
}

/* One row of six tiles [part][half], from two inner positions of 32 columns. */
INLINE void cut_weights(vec even, vec odd, char *to) {
    store_both(to, cut(&even), cut(&odd));
    store_both(to + 2 * TILE_BYTES, cut(&even), cut(&odd));
    store_both(to + 4 * TILE_BYTES, (__m512i)even, cut(&odd));
}

#define AHEAD_FLOATS (AHEAD_BYTES / 4)
#define NEAR_BYTES 2048

/* Memory is asked for what lies far ahead to come into the second cache, which can wait for more lines at a time than
   the first, and then from there into the first: measured, a tenth and more faster than into the first at once. */
INLINE void fetch_line(const void *far, const void *near) {
    __builtin_prefetch(far, 0, 2);
    __builtin_prefetch(near);
}

/* `ahead`: how many floats further on memory is asked for what comes later. */
INLINE void cut_positions(const float *w, long ahead, char *to) {
    for (int line = 0; line < 2 * COLUMNS; line += LANES) fetch_line(w + ahead + line, w + NEAR_BYTES / 4 + line);
    cut_weights(load(w), load(w + COLUMNS), to);
    cut_weights(load(w + LANES), load(w + COLUMNS + LANES), to + TILE_BYTES);
}

/* Inner positions [step * 32, ...) of a block: six tiles [part][half]. */
INLINE void cut_step(const float *w, long step, long inner, char *to) {
    long left = inner - step * STEP;
    w += step * STEP * COLUMNS;
    if (left >= STEP) {
        for (int row = 0; row < TILE_ROWS; row++) cut_positions(w + 2 * row * COLUMNS, AHEAD_FLOATS, to + row * 64);
        return;
    }
    for (int row = 0; row < TILE_ROWS; row++)
        for (int half = 0; half < 2; half++) {
            const float *at = w + 2 * row * COLUMNS + half * LANES;
            cut_weights(2 * row < left ? load(at) : splat(0.0f), 2 * row + 1 < left ? load(at + COLUMNS) : splat(0.0f),
                        to + half * TILE_BYTES + row * 64);
        }
}

/* Sixteen floats of a row, at a column that is a multiple of 16. */
INLINE void cut_columns(vec value, char *parts, long steps, long row, long column) {
    char *to = parts + (row / TILE_ROWS * steps + column / STEP) * STEP_BYTES + row % TILE_ROWS * 64 + column % STEP * 2;
    for (int part = 0; part < PARTS; part++) {
        __m512i upper = cut(&value);
        _mm256_store_si256((__m256i *)(to + part * TILE_BYTES), _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
    }
}

/* -- float32 ------------------------------------------------------------------------------------------------------- */

INLINE void load_rows(const char *rows, long apart) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + apart, 64);
}

INLINE void load_columns(const char *columns) {
    _tile_loadd(6, columns, 64);
    _tile_loadd(7, columns + TILE_BYTES, 64);
}

INLINE void add_products(void) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Cuts rows [first, last) of the six tiles of a step; nothing where `w` is NULL. */
INLINE void cut_some(const float *w, long ahead, char *to, int first, int last) {
    if (!w) return;
#pragma GCC unroll 16
    for (int row = first; row < last; row++) cut_positions(w + 2 * row * COLUMNS, ahead, to + row * 64);
}

/* 32 inner positions of 32 rows and 32 columns: six products in the order that loads the fewest tiles. The
   weights of a later step, `w`, are cut in between: other parts of the processor do that. */
INLINE void add_step(const char *rows, long apart, const char *columns, const float *w, char *to) {
    load_rows(rows, apart);
    load_columns(columns + 4 * TILE_BYTES);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 0, 3);
    load_columns(columns + 2 * TILE_BYTES);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 3, 6);
    load_rows(rows + TILE_BYTES, apart);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 6, 9);
    load_columns(columns);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 9, 12);
    load_rows(rows, apart);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 12, 14);
    load_rows(rows + 2 * TILE_BYTES, apart);
    add_products();
    cut_some(w, AHEAD_FLOATS, to, 14, 16);
}

/* 17 to 32 rows: sums stay in their tiles while the weights stream by, one step cut ahead. */
static void add_few(const char *rows, const float *w, long inner, float sums[][COLUMNS]) {
    long steps = num_steps(inner), whole = inner / STEP, apart = steps * STEP_BYTES;
    char cuts[2][2 * STEP_BYTES] __attribute__((aligned(64)));
    zero_sums();
    cut_step(w, 0, inner, cuts[0]);
    for (long step = 0; step < steps; step++, rows += STEP_BYTES) {
        char *next = cuts[(step + 1) % 2];
        if (step + 1 < whole) {
            add_step(rows, apart, cuts[step % 2], w + (step + 1) * STEP * COLUMNS, next);
            continue;
        }
        if (step + 1 < steps) cut_step(w, step + 1, inner, next);
        add_step(rows, apart, cuts[step % 2], NULL, NULL);
    }
    store_sums(1, sums);
}

/* Sums `tile` += 16 rows times 16 columns' part 0, 1 or 2, in the order of add_step. The number of a tile has to stand in
   the source. */
#define ADD_COLUMNS(tile, part, columns)           \
    do {                                           \
        _tile_loadd(7, columns, 64);               \
        if (part == 0) _tile_dpbf16ps(tile, 5, 7); \
        _tile_dpbf16ps(tile, 4, 7);                \
        if (part == 1) _tile_dpbf16ps(tile, 5, 7); \
        if (part == 0) _tile_dpbf16ps(tile, 6, 7); \
    } while (0)

/* Up to 16 rows and two blocks, whose sums do not wait for one another; the products in the order of add_step. */
static void add_blocks(const char *rows, const float *left, const float *right, long inner, float sums[][COLUMNS],
                       float right_sums[][COLUMNS]) {
    long steps = num_steps(inner), whole = inner / STEP;
    char cuts[2][2][2 * STEP_BYTES] __attribute__((aligned(64)));
    zero_sums();
    cut_step(left, 0, inner, cuts[0][0]);
    cut_step(right, 0, inner, cuts[0][1]);
    for (long step = 0; step < steps; step++, rows += STEP_BYTES) {
        char *a = cuts[step % 2][0], *b = cuts[step % 2][1], *next_a = cuts[(step + 1) % 2][0], *next_b = next_a + 2 * STEP_BYTES;
        const float *w = left + (step + 1) * STEP * COLUMNS, *v = right + (step + 1) * STEP * COLUMNS;
        long ahead = AHEAD_FLOATS;
        if ((step + 1) * STEP * COLUMNS + ahead >= inner * COLUMNS) ahead += inner * COLUMNS; /* the next two blocks */
        if (step + 1 >= whole) {
            w = v = NULL;
            if (step + 1 < steps) {
                cut_step(left, step + 1, inner, next_a);
                cut_step(right, step + 1, inner, next_b);
            }
        }
        _tile_loadd(4, rows, 64);
        _tile_loadd(5, rows + TILE_BYTES, 64);
        _tile_loadd(6, rows + 2 * TILE_BYTES, 64);
        ADD_COLUMNS(0, 2, a + 4 * TILE_BYTES);
        ADD_COLUMNS(1, 2, a + 5 * TILE_BYTES);
        ADD_COLUMNS(2, 2, b + 4 * TILE_BYTES);
        ADD_COLUMNS(3, 2, b + 5 * TILE_BYTES);
        cut_some(w, ahead, next_a, 0, 6);
        ADD_COLUMNS(0, 1, a + 2 * TILE_BYTES);
        ADD_COLUMNS(1, 1, a + 3 * TILE_BYTES);
        cut_some(w, ahead, next_a, 6, 10);
        ADD_COLUMNS(2, 1, b + 2 * TILE_BYTES);
        ADD_COLUMNS(3, 1, b + 3 * TILE_BYTES);
        cut_some(w, ahead, next_a, 10, 16);
        ADD_COLUMNS(0, 0, a);
        cut_some(v, ahead, next_b, 0, 4);
        ADD_COLUMNS(1, 0, a + TILE_BYTES);
        cut_some(v, ahead, next_b, 4, 8);
        ADD_COLUMNS(2, 0, b);
        cut_some(v, ahead, next_b, 8, 12);
        ADD_COLUMNS(3, 0, b + TILE_BYTES);
        cut_some(v, ahead, next_b, 12, 16);
    }
    store_sums(0, sums);
    store_right_sums(right_sums);
}

#define ROWS_FOR_MANY 96 /* fewer pass in pairs of tiles, each of which hides the cutting: measured */
#define STEPS_AT_ONCE 8  /* whose cut weights are kept while all rows of a panel pass */

static void add_many(long count, const char *rows, const float *w, long inner, float sums[][COLUMNS]) {
    long steps = num_steps(inner), apart = steps * STEP_BYTES;
    char cuts[STEPS_AT_ONCE][2 * STEP_BYTES] __attribute__((aligned(64)));
    for (long first = 0; first < steps; first += STEPS_AT_ONCE) {
        long some = steps - first < STEPS_AT_ONCE ? steps - first : STEPS_AT_ONCE;
        for (long step = 0; step < some; step++) cut_step(w, first + step, inner, cuts[step]);
        for (long row = 0; row < count; row += PAIR_ROWS) {
            const char *at = rows + row / TILE_ROWS * apart + first * STEP_BYTES;
            if (first) load_sums(sums[row]);
            else zero_sums();
            for (long step = 0; step < some; step++) add_step(at + step * STEP_BYTES, apart, cuts[step], NULL, NULL);
            store_sums(1, sums[row]);
        }
    }
}

static void finish_cut(long count, const float sums[][COLUMNS], const Linear *linear, long block, long first,
                       const Operand *to) {
    float gated[PANEL_ROWS][LANES] __attribute__((aligned(64)));
    long column = block * LANES, steps = num_steps(to->width);
    if (linear->outer - column < LANES) memset(gated, 0, sizeof gated);
    finish_rows(count, sums, linear, block, SWIGLU, gated[0] - column, LANES);
    for (long row = 0; row < count; row++) cut_columns(load(gated[row]), to->parts, steps, first + row, column);
}

INLINE void finish_block(long count, const float sums[][COLUMNS], const Linear *linear, long block, Epilogue epilogue,
                         long first, const Operand *to) {
    if (to->parts) finish_cut(count, sums, linear, block, first, to);
    else finish_rows(count, sums, linear, block, epilogue, to->rows + first * to->width, to->width);
}

static long panel_rows(long inner) {
    long rows = PANEL_BYTES / (num_steps(inner) * STEP_BYTES / TILE_ROWS) / PAIR_ROWS * PAIR_ROWS;
    return rows < PAIR_ROWS ? PAIR_ROWS : rows < PANEL_ROWS ? rows : PANEL_ROWS;
}

/* As multiply_floats, of rows that have been cut; panel by panel of rows. */
static void multiply_cut(Pool *pool, const Linear *linear, Epilogue epilogue, const Operand *x, long rows,
                         const Operand *to) {
    long inner = linear->inner, blocks = linear_blocks(linear, epilogue), each = piece_size(pool, blocks);
    if (rows <= TILE_ROWS) each = (each + 1) / 2 * 2;
    if (rows >= ROWS_FOR_MANY) each = 1;
    long pieces = (blocks + each - 1) / each, panel = panel_rows(inner), panels = (rows + panel - 1) / panel;
    float sums[PANEL_ROWS][COLUMNS] __attribute__((aligned(64)));
    shape_tiles(rows, 1);
    for (long piece, end; take(pool, pieces * panels, 1, &piece, &end);) {
        long row = piece / pieces * panel, count = rows - row < panel ? rows - row : panel;
        const char *from = x->parts + row / TILE_ROWS * num_steps(inner) * STEP_BYTES;
        long block = piece % pieces * each, last = block + each < blocks ? block + each : blocks;
        for (; block < last; block++) {
            const float *w = linear->packed + block * inner * COLUMNS;
            if (rows <= TILE_ROWS) {
                int pair = block + 1 < last;
                add_blocks(from, w, pair ? w + inner * COLUMNS : w, inner, sums, sums + TILE_ROWS);
                finish_block(count, sums, linear, block, epilogue, row, to);
                if (pair) finish_block(count, sums + TILE_ROWS, linear, ++block, epilogue, row, to);
                continue;
            }
            if (count >= ROWS_FOR_MANY) add_many(count, from, w, inner, sums);
            else
                for (long at = 0; at < count; at += PAIR_ROWS)
                    add_few(from + at / TILE_ROWS * num_steps(inner) * STEP_BYTES, w, inner, sums + at);
            finish_block(count, sums, linear, block, epilogue, row, to);
        }
    }
}

/* -- 8-bit codes --------------------------------------------------------------------------------------------------- */

#define CODED_ROWS_AT_LEAST 5   /* fewer are faster without tiles; sums of integers are the same */
#define CODED_STEPS_AT_ONCE 12
#define CODED_STEP_BYTES (CODED_STEP * COLUMNS)

/* The last step reads weights past the end of its block, times codes of zero. */
INLINE void add_codes(int two, const uint8_t *rows, long stride, const int8_t *columns) {
    _tile_loadd(4, rows, stride);
    if (two) _tile_loadd(5, rows + TILE_ROWS * stride, stride);
    _tile_loadd(6, columns, COLUMNS * GROUP);
    _tile_loadd(7, columns + TILE_ROWS * GROUP, COLUMNS * GROUP);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (!two) return;
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
}

INLINE void add_few_codes(int two, const CodedRows *x, long row, const int8_t *w, long steps, int32_t sums[][COLUMNS]) {
    zero_sums();
    for (long step = 0; step < steps; step++, w += CODED_STEP_BYTES) {
        for (long line = 0; line < CODED_STEP_BYTES; line += LINE) fetch_line(w + AHEAD_BYTES + line, w + NEAR_BYTES + line);
        add_codes(two, x->codes + row * x->stride + step * CODED_STEP, x->stride, w);
    }
    store_sums(two, sums);
}

static void add_many_codes(long count, const CodedRows *x, long first_row, const int8_t *w, long steps,
                           int32_t sums[][COLUMNS]) {
    for (long first = 0; first < steps; first += CODED_STEPS_AT_ONCE) {
        long end = first + CODED_STEPS_AT_ONCE < steps ? first + CODED_STEPS_AT_ONCE : steps;
        for (long row = 0; row < count; row += PAIR_ROWS) {
            const uint8_t *codes = x->codes + (first_row + row) * x->stride;
            if (first) load_sums(sums[row]);
            else zero_sums();
            for (long step = first; step < end; step++)
                add_codes(1, codes + step * CODED_STEP, x->stride, w + step * CODED_STEP_BYTES);
            store_sums(1, sums[row]);
        }
    }
}

/* As multiply_coded. */
static void multiply_coded_in_tiles(Pool *pool, const Linear *linear, Epilogue epilogue, const CodedRows *x, long rows,
                                    float *y, long y_stride) {
    long blocks = linear_blocks(linear, epilogue), each = piece_size(pool, blocks);
    long pieces = (blocks + each - 1) / each, panels = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
    long block_bytes = num_groups(linear->inner) * COLUMNS * GROUP, steps = (linear->inner + CODED_STEP - 1) / CODED_STEP;
    int32_t sums[PANEL_ROWS][COLUMNS] __attribute__((aligned(64)));
    float values[PANEL_ROWS][COLUMNS] __attribute__((aligned(64)));
    shape_tiles(rows, 0);
    for (long piece, end; take(pool, pieces * panels, 1, &piece, &end);) {
        long row = piece / pieces * PANEL_ROWS, count = rows - row < PANEL_ROWS ? rows - row : PANEL_ROWS;
        for (long block = piece % pieces * each; block < blocks && block < (piece % pieces + 1) * each; block++) {
            const int8_t *w = linear->codes + block * block_bytes;
            if (rows <= TILE_ROWS) add_few_codes(0, x, row, w, steps, sums);
            else if (rows <= PAIR_ROWS) add_few_codes(1, x, row, w, steps, sums);
            else add_many_codes(count, x, row, w, steps, sums);
            scale_sums(count, sums, linear, block, x, row, values);
            finish_rows(count, values, linear, block, epilogue, y + row * y_stride, y_stride);
        }
    }
}

static void release_tiles(const Pool *pool) {
    if (pool->tiles) _tile_release(); /* or the kernel keeps them for this thread at every switch */
}

#else /* no tiles */

#define CODED_ROWS_AT_LEAST 0
static int ask_for_tiles(void) { return 0; }
static void release_tiles(const Pool *pool) { (void)pool; }
INLINE void cut_columns(vec value, char *parts, long steps, long row, long column) {
    (void)value, (void)parts, (void)steps, (void)row, (void)column;
}
static void multiply_cut(Pool *pool, const Linear *linear, Epilogue epilogue, const Operand *x, long rows, const Operand *to) {
    (void)pool, (void)linear, (void)epilogue, (void)x, (void)rows, (void)to;
}
static void multiply_coded_in_tiles(Pool *pool, const Linear *linear, Epilogue epilogue, const CodedRows *x, long rows,
                                    float *y, long y_stride) {
    (void)pool, (void)linear, (void)epilogue, (void)x, (void)rows, (void)y, (void)y_stride;
}

#endif

/* Sixteen floats of a row to where a product will read them. */
INLINE void put(const Operand *to, long row, long column, vec value) {
    if (to->parts) cut_columns(value, to->parts, num_steps(to->width), row, column);
    else store(to->rows + row * to->width + column, value);
}
