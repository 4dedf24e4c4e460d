/* Attention that reads the paged cache in place, for decodes and prefill chunks alike.

   One arithmetic for every row: positions are cut into segments of 256 and blocks of 64, counted from the context's
   start; a segment is an online softmax over its blocks (Milakov & Gimelshein 2018), and segments are merged first to
   last. A position that a row does not see adds an exact zero. So a row's bits depend on its own context alone, and

   Keys lie transposed within a page and a page is a multiple of 16 positions, so both are read where they lie, as
   streams: no gather, no copy, no transposition. It also means that

   - a segment whose pages several decoding contexts share is read once for all of them,
   - the segments of one long context can be worked on by several threads. */
#pragma once
#include "tiles.h"

#define BLOCK 64
#define SEGMENT 256
#define MAX_QUERIES 48 /* query rows worked on together: contexts (or positions) times heads of a KV head */
#define MAX_HEAD_DIM 256

typedef struct {
    const float *keys;   /* of one layer: [pages, kv_heads, head_dim, page_size] */
    const float *values; /* [pages, kv_heads, page_size, head_dim] */
    long page_size, heads, kv_heads, head_dim, window; /* window 0: all */
} Cache;

typedef struct {
    long first_row, rows, start; /* rows of the batch, at positions start, start + 1, ... */
    const int32_t *pages;
} Piece;

/* Decodes that share the pages of one segment (segment >= 0), or rows of one chunk over all its segments (-1). */
typedef struct {
    int32_t segment, count; /* rows */
    int32_t piece, offset;  /* chunk: first row within the piece; decodes: first of `count` members in `members` */
} Item;

typedef struct {
    float query[MAX_QUERIES][MAX_HEAD_DIM];     /* scaled */
    float weight[MAX_QUERIES][BLOCK];           /* scores, then exp */
    float sum[MAX_QUERIES], top[MAX_QUERIES];   /* of the segment */
    float mixed[MAX_QUERIES][MAX_HEAD_DIM];
    float total_sum[MAX_QUERIES], total_top[MAX_QUERIES];
    float total[MAX_QUERIES][MAX_HEAD_DIM];
    long begin[MAX_QUERIES], end[MAX_QUERIES];  /* positions seen: [begin, end) */
    const float *keys[SEGMENT / LANES], *values[SEGMENT / LANES]; /* of each 16 positions of the segment */
} Scratch;

/* Where each 16 positions of [from, to) lie, for one head. Past them, the last ones again: masked, never counted. */
static void find_groups(const Cache *cache, const int32_t *pages, long head, long from, long to, Scratch *scratch) {
    long head_floats = cache->head_dim * cache->page_size, groups = (to - from + LANES - 1) / LANES, i = 0;
    for (; i < groups; i++) {
        long position = from + i * LANES, within = position % cache->page_size;
        long base = ((long)pages[position / cache->page_size] * cache->kv_heads + head) * head_floats;
        scratch->keys[i] = cache->keys + base + within;
        scratch->values[i] = cache->values + base + within * cache->head_dim;
    }
    for (; i % (BLOCK / LANES); i++) {
        scratch->keys[i] = scratch->keys[groups - 1];
        scratch->values[i] = scratch->values[groups - 1];
    }
}

/* The hardware sees a stream coming only after its first lines, and a page's share of a head is a short one. */
INLINE void fetch_block(const Cache *cache, const Scratch *scratch, long group) {
    for (long part = 0; part < BLOCK / LANES; part++)
        for (long line = 0; line < cache->head_dim; line++) {
            __builtin_prefetch(scratch->keys[group + part] + line * cache->page_size);
            __builtin_prefetch(scratch->values[group + part] + line * LANES);
        }
}

#define MAX_TOGETHER 6 /* rows */

/* As many registers of a row as leave room for the others' sums. */
#if REGISTER_FLOATS == 8
#define AT_ONCE 2
#else
#define AT_ONCE 4
#endif

INLINE void score_rows(int rows, long first, const float *const *keys, const Cache *cache, Scratch *scratch) {
    for (long at = 0; at < BLOCK; at += AT_ONCE * REGISTER_FLOATS) {
        reg acc[MAX_TOGETHER][AT_ONCE];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) acc[row][i] = (reg){};
        for (long d = 0; d < cache->head_dim; d++) {
            reg key[AT_ONCE];
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++) {
                long position = at + i * REGISTER_FLOATS;
                key[i] = *(const reg *)(keys[position / LANES] + d * cache->page_size + position % LANES);
            }
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                reg value = (reg){} + scratch->query[first + row][d];
#pragma GCC unroll 4
                for (int i = 0; i < AT_ONCE; i++) acc[row][i] += value * key[i];
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
            for (int i = 0; i < AT_ONCE; i++)
                *(reg *)(scratch->weight[first + row] + at + i * REGISTER_FLOATS) = acc[row][i];
    }
}

/* mixed += weight * values, `width` registers of the head at a time. */
INLINE void mix_rows(int rows, int width, long first, const float *const *values, long head_dim, long at, long count,
                     Scratch *scratch) {
    reg acc[MAX_TOGETHER][AT_ONCE];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) acc[row][i] = *(const reg *)(scratch->mixed[first + row] + at + i * REGISTER_FLOATS);
    for (long t = 0; t < count; t++) {
        const float *value = values[t / LANES] + t % LANES * head_dim + at;
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            reg weight = (reg){} + scratch->weight[first + row][t];
#pragma GCC unroll 4
            for (int i = 0; i < width; i++) acc[row][i] += weight * *(const reg *)(value + i * REGISTER_FLOATS);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) *(reg *)(scratch->mixed[first + row] + at + i * REGISTER_FLOATS) = acc[row][i];
}

/* As many rows at a time as there are registers for; how they are grouped does not change a row. */
#define ROWS_AT_A_TIME(call)                   \
    for (long row = 0; row < queries;) switch (queries - row) { \
            case 1: call(1) break;             \
            case 2: call(2) break;             \
            case 3: call(3) break;             \
            case 4: call(4) break;             \
            case 5: call(5) break;             \
            default: call(6) break;            \
        }

static void score_block(long queries, const float *const *keys, const Cache *cache, Scratch *scratch) {
#define SCORE(rows) score_rows(rows, row, keys, cache, scratch); row += rows;
    ROWS_AT_A_TIME(SCORE)
}

static void mix_block(long queries, const float *const *values, long head_dim, long count, Scratch *scratch) {
    long at = 0;
#define MIX(rows) mix_rows(rows, AT_ONCE, row, values, head_dim, at, count, scratch); row += rows;
    for (; at + AT_ONCE * REGISTER_FLOATS <= head_dim; at += AT_ONCE * REGISTER_FLOATS) ROWS_AT_A_TIME(MIX)
#if AT_ONCE * REGISTER_FLOATS > LANES
#define MIX2(rows) mix_rows(rows, 2, row, values, head_dim, at, count, scratch); row += rows;
#define MIX1(rows) mix_rows(rows, 1, row, values, head_dim, at, count, scratch); row += rows;
    for (; at + 2 * LANES <= head_dim; at += 2 * LANES) ROWS_AT_A_TIME(MIX2)
    for (; at < head_dim; at += LANES) ROWS_AT_A_TIME(MIX1)
#endif
}

/* Scores of one block into weights, and the row's running maximum, sum and mix rescaled to them. */
static void soften(long row, long at, long head_dim, Scratch *scratch) {
    long low = scratch->begin[row] - at, high = scratch->end[row] - at;
    float *weight = scratch->weight[row];
    if (low >= BLOCK || high <= 0) {
        memset(weight, 0, BLOCK * sizeof *weight);
        return;
    }
    for (long t = 0; t < low; t++) weight[t] = -INFINITY;
    for (long t = high < 0 ? 0 : high; t < BLOCK; t++) weight[t] = -INFINITY;
    Parts top = {load(weight)}, sum = {splat(0.0f)};
    for (long t = LANES; t < BLOCK; t += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; i++)
            top.part[i] = larger(top.part[i], *(const reg *)(weight + t + i * REGISTER_FLOATS));
    float before = scratch->top[row], now = vec_max(top.whole);
    now = before > now ? before : now;
    for (long t = 0; t < BLOCK; t += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; i++) {
            reg *at_once = (reg *)(weight + t + i * REGISTER_FLOATS);
            *at_once = reg_exp(*at_once - now);
            sum.part[i] += *at_once;
        }
    float shrink = exp_one(before - now);
    scratch->top[row] = now;
    scratch->sum[row] = scratch->sum[row] * shrink + vec_sum(sum.whole);
    for (long d = 0; d < head_dim; d += LANES) store(scratch->mixed[row] + d, load(scratch->mixed[row] + d) * shrink);
}

/* Online softmax over positions [from, to) of a segment, for all queries in scratch. */
static void attend_segment(const Cache *cache, const int32_t *pages, long head, long from, long to, long queries,
                           Scratch *scratch) {
    for (long row = 0; row < queries; row++) {
        scratch->top[row] = -INFINITY;
        scratch->sum[row] = 0.0f;
        memset(scratch->mixed[row], 0, cache->head_dim * sizeof(float));
    }
    find_groups(cache, pages, head, from, to, scratch);
    for (long at = from; at < to; at += BLOCK) {
        long group = (at - from) / LANES;
        if (at + BLOCK < to) fetch_block(cache, scratch, group + BLOCK / LANES);
        score_block(queries, scratch->keys + group, cache, scratch);
        for (long row = 0; row < queries; row++) soften(row, at, cache->head_dim, scratch);
        mix_block(queries, scratch->values + group, cache->head_dim, to - at < BLOCK ? to - at : BLOCK, scratch);
    }
}

/* total <- total merged with a segment's (top, sum, mixed). A segment without visible positions has sum 0. */
INLINE void merge(float *total_top, float *total_sum, float *total, float top, float sum, const float *mixed, long head_dim) {
    if (sum == 0.0f) return;
    float now = *total_top > top ? *total_top : top;
    float old_share = exp_one(*total_top - now), new_share = exp_one(top - now);
    *total_top = now;
    *total_sum = *total_sum * old_share + sum * new_share;
    for (long d = 0; d < head_dim; d += LANES) store(total + d, load(total + d) * old_share + load(mixed + d) * new_share);
}

INLINE void take_query(const Cache *cache, const float *queries, long row, long position, long head, long at, Scratch *scratch) {
    long group = cache->heads / cache->kv_heads;
    float scale = 1.0f / sqrtf((float)cache->head_dim);
    for (long g = 0; g < group; g++) {
        const float *from = queries + row * (cache->heads + 2 * cache->kv_heads) * cache->head_dim + (head * group + g) * cache->head_dim;
        for (long d = 0; d < cache->head_dim; d += LANES) store(scratch->query[at + g] + d, load(from + d) * scale);
        scratch->end[at + g] = position + 1;
        scratch->begin[at + g] = cache->window && position + 1 > cache->window ? position + 1 - cache->window : 0;
    }
}

/* Rows [item->offset, + item->count) of a chunk, over all segments. */
static void attend_chunk(const Cache *cache, const Piece *piece, const Item *item, long head, const float *queries,
                         const Operand *out, Scratch *scratch) {
    long group = cache->heads / cache->kv_heads, head_dim = cache->head_dim, count = item->count * group;
    for (long i = 0; i < item->count; i++)
        take_query(cache, queries, piece->first_row + item->offset + i, piece->start + item->offset + i, head, i * group, scratch);
    for (long row = 0; row < count; row++) {
        scratch->total_top[row] = -INFINITY;
        scratch->total_sum[row] = 0.0f;
        memset(scratch->total[row], 0, head_dim * sizeof(float));
    }
    long end = scratch->end[count - 1];
    for (long from = scratch->begin[0] / SEGMENT * SEGMENT; from < end; from += SEGMENT) {
        attend_segment(cache, piece->pages, head, from, end < from + SEGMENT ? end : from + SEGMENT, count, scratch);
        for (long row = 0; row < count; row++)
            merge(&scratch->total_top[row], &scratch->total_sum[row], scratch->total[row], scratch->top[row],
                  scratch->sum[row], scratch->mixed[row], head_dim);
    }
    for (long i = 0; i < item->count; i++)
        for (long g = 0; g < group; g++) {
            long row = i * group + g;
            for (long d = 0; d < head_dim; d += LANES)
                put(out, piece->first_row + item->offset + i, (head * group + g) * head_dim + d,
                    load(scratch->total[row] + d) / scratch->total_sum[row]);
        }
}

/* Where a decode's partial result of a segment lies: top, sum, padding, then mixed; one per head. */
INLINE float *partial(float *partials, const long *offsets, long piece, long segment, const Cache *cache, long head) {
    return partials + ((offsets[piece] + segment) * cache->heads + head) * (cache->head_dim + LANES);
}

/* One segment for all its members. */
static void attend_decodes(const Cache *cache, const Piece *pieces, const int32_t *members, const Item *item, long head,
                           const float *queries, float *partials, const long *offsets, Scratch *scratch) {
    long group = cache->heads / cache->kv_heads, longest = 0, earliest = INT64_MAX;
    for (long i = 0; i < item->count; i++) {
        const Piece *piece = pieces + members[item->offset + i];
        take_query(cache, queries, piece->first_row, piece->start, head, i * group, scratch);
        if (piece->start + 1 > longest) longest = piece->start + 1;
        if (scratch->begin[i * group] < earliest) earliest = scratch->begin[i * group];
    }
    long from = (long)item->segment * SEGMENT, to = longest < from + SEGMENT ? longest : from + SEGMENT;
    if (earliest >= to) return; /* behind everybody's window */
    attend_segment(cache, pieces[members[item->offset]].pages, head, from, to, item->count * group, scratch);
    for (long i = 0; i < item->count; i++)
        for (long g = 0; g < group; g++) {
            float *to_part = partial(partials, offsets, members[item->offset + i], item->segment, cache, head * group + g);
            to_part[0] = scratch->top[i * group + g];
            to_part[1] = scratch->sum[i * group + g];
            memcpy(to_part + LANES, scratch->mixed[i * group + g], cache->head_dim * sizeof(float));
        }
}

/* All segments of one decode, merged first to last. */
static void merge_decode(const Cache *cache, const Piece *pieces, long piece, float *partials, const long *offsets,
                         const Operand *out) {
    long end = pieces[piece].start + 1;
    long begin = cache->window && end > cache->window ? end - cache->window : 0;
    for (long head = 0; head < cache->heads; head++) {
        float top = -INFINITY, sum = 0.0f, total[MAX_HEAD_DIM] = {0};
        for (long segment = begin / SEGMENT; segment * SEGMENT < end; segment++) {
            const float *part = partial(partials, offsets, piece, segment, cache, head);
            merge(&top, &sum, total, part[0], part[1], part + LANES, cache->head_dim);
        }
        for (long d = 0; d < cache->head_dim; d += LANES)
            put(out, pieces[piece].first_row, head * cache->head_dim + d, load(total + d) / sum);
    }
}
