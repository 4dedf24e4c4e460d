/* Products of 8-bit codes: x W^T with weights coded once per output column, rows coded as they come.

   weight = column scale * code, codes -127..127;  x = row scale * (code - zero), codes 0..255. So

       sum x w = row scale * column scale * (sum of code products - zero * sum of the column's codes).

   The sums are of integers and exact, in whatever order and with whatever instructions they are made, so a row's bits
   depend on neither its neighbours nor the machine. Up to MAX_CODED_INNER terms they fit in 32 bits.

   Packed codes are [blocks][groups][32][4]: of 32 columns, 4 inner positions side by side, read as one stream. */
#pragma once
#include "linear.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define GROUP 4 /* inner positions whose products one instruction adds up */
#define PAIRED 8 /* inner positions are padded to a multiple, with codes that count for nothing */
#define MAX_CODED_INNER 65536 /* 65536 * 255 * 127 < 2^31 */

typedef struct {
    uint8_t *codes; /* [rows][stride]; 32 rows at a time may be read */
    float *scale;   /* [rows] */
    int32_t *zero;  /* [rows] */
    long stride;    /* bytes */
} CodedRows;

typedef uint8_t bytes __attribute__((vector_size(REGISTER_FLOATS), aligned(1), may_alias));

static long num_groups(long inner) { return (inner + PAIRED - 1) / PAIRED * (PAIRED / GROUP); }

INLINE int32_t four_codes(const uint8_t *from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

/* The next sixteen of a row; past its end, zeros. */
INLINE vec load_some(const float *x, long left) {
    if (left >= LANES) return load(x);
    float some[LANES] = {0};
    memcpy(some, x, left * sizeof *x);
    return load(some);
}

/* Code one row, with zeros up to `padded` (a multiple of 16). Zero is always a code of its own. A row with infinities or NaN gets NaN as its scale, so that they
   are seen in the result as they would be without codes. Not inlined: one chain of operations for every row. */
static __attribute__((noinline)) void code_row(const float *x, long size, long padded, uint8_t *codes, float *scale,
                                               int32_t *zero) {
    Parts low = {splat(0.0f)}, high = low, broken = low;
    for (long i = 0; i < size; i += LANES) {
        Parts some = {load_some(x + i, size - i)};
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; j++) {
            low.part[j] = choose(some.part[j] < low.part[j], some.part[j], low.part[j]);
            high.part[j] = larger(some.part[j], high.part[j]);
            broken.part[j] += some.part[j] * 0.0f;
        }
    }
    float least = -vec_max(-low.whole), most = vec_max(high.whole), step = (most - least) / 255.0f;
    if (vec_sum(broken.whole) != 0.0f || !(step < INFINITY)) {
        *scale = NAN;
        *zero = 0;
        memset(codes, 0, padded);
        return;
    }
    float inverse = step > 1e-30f ? 1.0f / step : 0.0f;
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    float from_zero = (-least * inverse + magic) - magic;
    *scale = inverse > 0.0f ? step : 0.0f;
    *zero = (int32_t)from_zero;
    for (long i = 0; i < size; i += LANES) {
        Parts some = {load_some(x + i, size - i)};
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; j++) {
            const reg zero_reg = {}, most_reg = zero_reg + 255.0f;
            reg code = ((some.part[j] * inverse + magic) - magic) + from_zero;
            code = choose(code > most_reg, most_reg, larger(code, zero_reg));
            *(bytes *)(codes + i + j * REGISTER_FLOATS) = __builtin_convertvector(__builtin_convertvector(code, ireg), bytes);
        }
    }
    memset(codes + size, 0, padded - size);
}

/* sums[row][column] of a block's 32 columns. */
#if defined(__AVX512VNNI__)

INLINE void multiply_codes(int rows, Fetch fetch, const uint8_t *x, long stride, const int8_t *w, const char *next,
                           long groups, int32_t sums[][COLUMNS]) {
    const int chains = rows <= 2 ? 2 : 1; /* one or two rows alone would wait for their own sums */
    __m512i acc[MAX_ROWS][2][2];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int chain = 0; chain < chains; chain++) acc[row][chain][0] = acc[row][chain][1] = _mm512_setzero_si512();
    for (long group = 0; group < groups; group += chains) {
#pragma GCC unroll 2
        for (int chain = 0; chain < chains; chain++, w += COLUMNS * GROUP, x += GROUP) {
            __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
            fetch_lines(fetch, w, next, group + chain);
#pragma GCC unroll 16
            for (int row = 0; row < rows; row++) {
                __m512i value = _mm512_set1_epi32(four_codes(x + row * stride));
                acc[row][chain][0] = _mm512_dpbusd_epi32(acc[row][chain][0], value, left);
                acc[row][chain][1] = _mm512_dpbusd_epi32(acc[row][chain][1], value, right);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i sum = acc[row][0][half];
            if (chains == 2) sum = _mm512_add_epi32(sum, acc[row][1][half]);
            _mm512_storeu_si512(sums[row] + half * LANES, sum);
        }
}

#elif defined(__AVX2__)

#if defined(__AVXVNNI__)
#define PART_COLUMNS 16 /* worked on at once: two registers of 8 sums */
#define PART_ROWS 6
INLINE __m256i code_operand(const uint8_t *x) { return _mm256_set1_epi32(four_codes(x)); }
INLINE __m256i add_products(__m256i acc, __m256i value, const int8_t *w, int i) {
    return _mm256_dpbusd_avx_epi32(acc, value, _mm256_loadu_si256((const __m256i *)w + i));
}
#else
/* The 8-bit multiply-add of AVX2 saturates, so codes are widened to 16 bits, and sums come as pairs to be added. */
#define PART_COLUMNS 8 /* two registers of 4 pairs */
#define PART_ROWS 4
INLINE __m256i code_operand(const uint8_t *x) { return _mm256_cvtepu8_epi16(_mm_set1_epi32(four_codes(x))); }
INLINE __m256i add_products(__m256i acc, __m256i value, const int8_t *w, int i) {
    __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w + i));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(value, weights));
}
#endif

INLINE void multiply_few(int rows, Fetch fetch, const uint8_t *x, long stride, const int8_t *w, const char *next,
                         long groups, int32_t sums[][COLUMNS]) {
    for (int part = 0; part < COLUMNS / PART_COLUMNS; part++) {
        const int8_t *at = w + part * PART_COLUMNS * GROUP;
        __m256i acc[MAX_ROWS][2];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) acc[row][0] = acc[row][1] = _mm256_setzero_si256();
        for (long group = 0; group < groups; group++, at += COLUMNS * GROUP) {
            if (part == 0) fetch_lines(fetch, at, next, group);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                __m256i value = code_operand(x + row * stride + group * GROUP);
                acc[row][0] = add_products(acc[row][0], value, at, 0);
                acc[row][1] = add_products(acc[row][1], value, at, 1);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t *to = sums[row] + part * PART_COLUMNS;
#if defined(__AVXVNNI__)
            _mm256_storeu_si256((__m256i *)to, acc[row][0]);
            _mm256_storeu_si256((__m256i *)to + 1, acc[row][1]);
#else
            /* pairs are added within each 128 bits: columns 0 1 4 5 2 3 6 7 */
            __m256i both = _mm256_hadd_epi32(acc[row][0], acc[row][1]);
            _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(both, 0xd8));
#endif
        }
    }
}

INLINE void multiply_codes(int rows, Fetch fetch, const uint8_t *x, long stride, const int8_t *w, const char *next,
                           long groups, int32_t sums[][COLUMNS]) {
    const int first = rows > PART_ROWS ? 3 : rows; /* more need more registers than there are */
    multiply_few(first, fetch, x, stride, w, next, groups, sums);
    if (rows > first) multiply_few(rows - first, fetch, x + first * stride, stride, w, next, groups, sums + first);
}

#else

INLINE void multiply_codes(int rows, Fetch fetch, const uint8_t *x, long stride, const int8_t *w, const char *next,
                           long groups, int32_t sums[][COLUMNS]) {
    memset(sums, 0, rows * sizeof *sums);
    for (long group = 0; group < groups; group++, w += COLUMNS * GROUP, x += GROUP) {
        fetch_lines(fetch, w, next, group);
        for (int row = 0; row < rows; row++)
            for (int column = 0; column < COLUMNS; column++) {
                int32_t sum = 0;
                for (int i = 0; i < GROUP; i++) sum += (int32_t)x[row * stride + i] * w[column * GROUP + i];
                sums[row][column] += sum;
            }
    }
}

#endif

/* From sums to values. Not inlined: the same chain of operations for a row whatever tile it was in. */
static __attribute__((noinline)) void scale_sums(long rows, const int32_t sums[][COLUMNS], const Linear *linear,
                                                 long block, const CodedRows *x, long first, float values[][COLUMNS]) {
    const float *scales = linear->scales + block * COLUMNS;
    const int32_t *totals = linear->totals + block * COLUMNS;
    for (long row = 0; row < rows; row++)
        for (int column = 0; column < COLUMNS; column += REGISTER_FLOATS) {
            ireg sum = *(const ireg *)(sums[row] + column) - *(const ireg *)(totals + column) * x->zero[first + row];
            reg scale = *(const reg *)(scales + column) * x->scale[first + row];
            *(reg *)(values[row] + column) = __builtin_convertvector(sum, reg) * scale;
        }
}

#define LONE_CODED_TILE(rows) \
    case rows: multiply_codes(rows, AHEAD, x, stride, w, next, groups, sums); break;
#define CODED_TILE(rows) \
    case rows: multiply_codes(rows, NEXT_BLOCK, x, stride, w, next, groups, sums); break;

INLINE void coded_tile(long rows, int alone, const uint8_t *x, long stride, const int8_t *w, const char *next,
                       long groups, int32_t sums[][COLUMNS]) {
    if (alone)
        switch (rows) { FEW_ROWS(LONE_CODED_TILE) MANY_ROWS(LONE_CODED_TILE) }
    else
        switch (rows) { MANY_ROWS(CODED_TILE) }
}

/* As multiply_floats, of rows that have been coded. */
static void multiply_coded(Pool *pool, const Linear *linear, Epilogue epilogue, const CodedRows *x, long rows, float *y,
                           long y_stride) {
    long turns = (rows + MAX_ROWS - 1) / MAX_ROWS, groups = num_groups(linear->inner);
    long blocks = linear_blocks(linear, epilogue);
    int32_t sums[MAX_ROWS][COLUMNS];
    float values[MAX_ROWS][COLUMNS];
    for (long first, last; take(pool, blocks, piece_size(pool, blocks), &first, &last);)
        for (long block = first; block < last; block++) {
            const int8_t *w = linear->codes + block * groups * COLUMNS * GROUP;
            const char *next = (const char *)(w + groups * COLUMNS * GROUP);
            for (long row = 0, turn = 0; turn < turns; turn++) {
                long count = tile_rows(rows, turn, turns);
                const char *half = next + turn % 2 * groups * LINE;
                coded_tile(count, turns == 1, x->codes + row * x->stride, x->stride, w, half, groups, sums);
                scale_sums(count, sums, linear, block, x, row, values);
                finish_rows(count, values, linear, block, epilogue, y + row * y_stride, y_stride);
                row += count;
            }
        }
}

/* Code one column. The scale is NaN when a weight is. */
static float code_column(const float *weights, long inner, int8_t *codes, long step, int32_t *total) {
    float most = 0.0f, broken = 0.0f;
    for (long k = 0; k < inner; k++) {
        most = fabsf(weights[k]) > most ? fabsf(weights[k]) : most;
        broken += weights[k] * 0.0f;
    }
    float scale = most / 127.0f;
    *total = 0;
    if (broken != 0.0f || !(scale > 1e-30f)) return broken != 0.0f ? NAN : 0.0f; /* codes stay zero */
    for (long k = 0; k < inner; k++) {
        long code = lrintf(weights[k] / scale);
        codes[k / GROUP * step + k % GROUP] = (int8_t)(code > 127 ? 127 : code < -127 ? -127 : code);
        *total += codes[k / GROUP * step + k % GROUP];
    }
    return scale;
}

/* weights [outer, inner] (gated: gate and up, [outer, inner] each, one after the other) -> packed codes, which must be
   zeros before; scales and totals [blocks * 32]. */
void caesura_pack_int8(const float *weights, long outer, long inner, int gated, int8_t *codes, float *scales,
                       int32_t *totals) {
    long width = gated ? LANES : COLUMNS, groups = num_groups(inner);
    for (long block = 0; block < (outer + width - 1) / width; block++)
        for (long lane = 0; lane < COLUMNS; lane++) {
            long column = block * width + lane % width, at = block * COLUMNS + lane;
            scales[at] = 0.0f;
            totals[at] = 0;
            if (column >= outer) continue;
            const float *from = weights + (column + (lane >= width ? outer : 0)) * inner;
            scales[at] = code_column(from, inner, codes + (block * groups * COLUMNS + lane) * GROUP, COLUMNS * GROUP,
                                     totals + at);
        }
}
