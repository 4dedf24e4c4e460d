/* One step of a dense decoder on the CPU, in float32 or with weights of 8 bits: rows in, hidden states out, keys and values written in place.

   All threads walk through the same phases with a barrier between them, so a step costs one call. No result depends on
   the number of threads, on the batch around a row or on how a prompt was cut into chunks. */
#include "attention.h"

#define ABI 3 /* of the structures below; checked when the library is loaded */

typedef struct {
    const float *input_norm, *qk_norm, *mlp_norm; /* qk_norm [heads + kv_heads, head_dim] or NULL */
    Linear qkv, out, gate_up, down;
    float *keys, *values; /* as in attention.h */
    long window;          /* 0: all positions */
} Layer;

typedef struct {
    long hidden, heads, kv_heads, head_dim, inner, layers, page_size;
    float epsilon;
    const float *embeddings; /* [vocab, hidden] */
    const float *norm;
    const Layer *layer;
} Decoder;

typedef struct {
    long rows, num_pieces, num_items, num_decodes;
    const int64_t *tokens, *positions, *slots;
    const float *cos, *sin; /* [positions, head_dim / 2] */
    const Piece *pieces;
    const Item *items;
    const int32_t *members; /* of decode items: indices of pieces */
    const int32_t *decodes; /* pieces of one row */
    const long *offsets;    /* per piece: its first segment's place in `partials` */
    float *hidden, *output, *qkv, *partials;
    Operand normed, mixed, inner; /* what products take */
    Scratch *scratch; /* one per thread */
    CodedRows coded;  /* the rows that the next product takes, where weights are coded */
} Step;

typedef struct {
    const Decoder *decoder;
    const Step *step;
} Run;

INLINE float norm_scale(const float *x, long size, float epsilon) {
    vec squares = splat(0.0f);
    for (long i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    return 1.0f / sqrtf(vec_sum(squares) / (float)size + epsilon);
}

INLINE void norm_head(float *x, const float *weight, long size, float epsilon) {
    float scale = norm_scale(x, size, epsilon);
    for (long i = 0; i < size; i += LANES) store(x + i, load(x + i) * scale * load(weight + i));
}

static void code_rows(const Operand *x, long first, long last, const CodedRows *to) {
    long padded = (x->width + CODED_STEP - 1) / CODED_STEP * CODED_STEP;
    for (long row = first; row < last; row++)
        code_row(x->rows + row * x->width, x->width, padded, to->codes + row * to->stride, to->scale + row, to->zero + row);
}

/* Normed rows for the product `next` (NULL: none). */
static void norm_rows(Pool *pool, const float *weight, float epsilon, const Step *step, const Linear *next, const Operand *to) {
    long size = to->width;
    for (long first, last; take(pool, step->rows, piece_size(pool, step->rows), &first, &last);) {
        for (long row = first; row < last; row++) {
            const float *x = step->hidden + row * size;
            float scale = norm_scale(x, size, epsilon);
            for (long i = 0; i < size; i += LANES) put(to, row, i, load(x + i) * scale * load(weight + i));
        }
        if (next && next->codes) code_rows(to, first, last, &step->coded);
    }
}

/* Halves of a head are rotated against each other, as Hugging Face lays them out. */
INLINE void rotate(float *head, long half, const float *cos, const float *sin) {
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        vec a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

INLINE void keep_row(const Decoder *decoder, const Layer *layer, long slot, long head, const float *key, const float *value) {
    long page = slot / decoder->page_size, within = slot % decoder->page_size;
    long base = (page * decoder->kv_heads + head) * decoder->head_dim * decoder->page_size;
    for (long d = 0; d < decoder->head_dim; d++) layer->keys[base + d * decoder->page_size + within] = key[d];
    memcpy(layer->values + base + within * decoder->head_dim, value, decoder->head_dim * sizeof(float));
}

static void place_row(const Decoder *decoder, const Layer *layer, const Step *step, long row) {
    long turning = decoder->heads + decoder->kv_heads, head_dim = decoder->head_dim;
    float *qkv = step->qkv + row * (turning + decoder->kv_heads) * head_dim;
    const float *cos = step->cos + step->positions[row] * (head_dim / 2);
    const float *sin = step->sin + step->positions[row] * (head_dim / 2);
    for (long head = 0; head < turning; head++) {
        float *at = qkv + head * head_dim;
        if (layer->qk_norm) norm_head(at, layer->qk_norm + head * head_dim, head_dim, decoder->epsilon);
        rotate(at, head_dim / 2, cos, sin);
    }
    for (long head = 0; head < decoder->kv_heads; head++)
        keep_row(decoder, layer, step->slots[row], head, qkv + (decoder->heads + head) * head_dim,
                 qkv + (turning + head) * head_dim);
}

static void place_rows(Pool *pool, const Decoder *decoder, const Layer *layer, const Step *step) {
    for (long first, last; take(pool, step->rows, piece_size(pool, step->rows), &first, &last);)
        for (long row = first; row < last; row++) place_row(decoder, layer, step, row);
}

static void attend_rows(Pool *pool, const Decoder *decoder, const Layer *layer, const Step *step) {
    Cache cache = {layer->keys,      layer->values,     decoder->page_size, decoder->heads,
                   decoder->kv_heads, decoder->head_dim, layer->window};
    Scratch *scratch = step->scratch + this_thread;
    for (long turn, end; take(pool, step->num_items * decoder->kv_heads, 1, &turn, &end);) {
        const Item *item = step->items + turn / decoder->kv_heads;
        long head = turn % decoder->kv_heads;
        if (item->segment < 0)
            attend_chunk(&cache, step->pieces + item->piece, item, head, step->qkv, &step->mixed, scratch);
        else
            attend_decodes(&cache, step->pieces, step->members, item, head, step->qkv, step->partials, step->offsets, scratch);
    }
    if (!step->num_decodes) return;
    barrier(pool);
    for (long i, end; take(pool, step->num_decodes, 1, &i, &end);)
        merge_decode(&cache, step->pieces, step->decodes[i], step->partials, step->offsets, &step->mixed);
}

/* Where weights are coded, a phase that codes the rows of `x` before them. */
static void code_phase(Pool *pool, const Linear *linear, const Operand *x, const Step *step) {
    if (!linear->codes) return;
    for (long first, last; take(pool, step->rows, piece_size(pool, step->rows), &first, &last);)
        code_rows(x, first, last, &step->coded);
    barrier(pool);
}

static void multiply_rows(Pool *pool, const Linear *linear, Epilogue epilogue, const Operand *x, const CodedRows *coded,
                          long rows, const Operand *to) {
    if (linear->codes && pool->tiles && rows >= CODED_ROWS_AT_LEAST)
        multiply_coded_in_tiles(pool, linear, epilogue, coded, rows, to->rows, to->width);
    else if (linear->codes)
        multiply_coded(pool, linear, epilogue, coded, rows, to->rows, to->width);
    else if (x->parts)
        multiply_cut(pool, linear, epilogue, x, rows, to);
    else
        multiply_floats(pool, linear, epilogue, x->rows, x->width, rows, to->rows, to->width);
}

static void product(Pool *pool, const Linear *linear, Epilogue epilogue, const Operand *x, const Step *step,
                    const Operand *to) {
    multiply_rows(pool, linear, epilogue, x, &step->coded, step->rows, to);
    barrier(pool);
}

static void forward(Pool *pool, void *argument) {
    const Decoder *decoder = ((Run *)argument)->decoder;
    const Step *step = ((Run *)argument)->step;
    const Operand hidden = {step->hidden, NULL, decoder->hidden};
    const Operand qkv = {step->qkv, NULL, (decoder->heads + 2 * decoder->kv_heads) * decoder->head_dim};
    const Operand *normed = &step->normed, *mixed = &step->mixed, *inner = &step->inner;
    for (long first, last; take(pool, step->rows, piece_size(pool, step->rows), &first, &last);)
        for (long row = first; row < last; row++)
            memcpy(step->hidden + row * decoder->hidden, decoder->embeddings + step->tokens[row] * decoder->hidden,
                   decoder->hidden * sizeof(float));
    barrier(pool);
    for (const Layer *layer = decoder->layer; layer < decoder->layer + decoder->layers; layer++) {
        norm_rows(pool, layer->input_norm, decoder->epsilon, step, &layer->qkv, normed);
        barrier(pool);
        product(pool, &layer->qkv, STORE, normed, step, &qkv);
        place_rows(pool, decoder, layer, step);
        barrier(pool);
        attend_rows(pool, decoder, layer, step);
        barrier(pool);
        code_phase(pool, &layer->out, mixed, step);
        product(pool, &layer->out, ADD, mixed, step, &hidden);
        norm_rows(pool, layer->mlp_norm, decoder->epsilon, step, &layer->gate_up, normed);
        barrier(pool);
        product(pool, &layer->gate_up, SWIGLU, normed, step, inner);
        code_phase(pool, &layer->down, inner, step);
        product(pool, &layer->down, ADD, inner, step, &hidden);
    }
    const Operand last = {step->output, NULL, decoder->hidden};
    norm_rows(pool, decoder->norm, decoder->epsilon, step, NULL, &last);
    release_tiles(pool);
}

typedef struct {
    const Linear *linear;
    Operand x, y;
    char *parts; /* where the rows go that are cut */
    long rows;
    CodedRows coded;
} Product;

static void multiply_alone(Pool *pool, void *argument) {
    const Product *one = argument;
    Operand x = one->x;
    if (one->linear->codes || one->parts) {
        Operand cut = {NULL, one->parts, x.width};
        for (long first, last; take(pool, one->rows, piece_size(pool, one->rows), &first, &last);)
            if (one->linear->codes) code_rows(&x, first, last, &one->coded);
            else for (long row = first; row < last; row++)
                for (long i = 0; i < x.width; i += LANES) put(&cut, row, i, load_some(x.rows + row * x.width + i, x.width - i));
        barrier(pool);
        if (one->parts) x = cut;
    }
    multiply_rows(pool, one->linear, STORE, &x, &one->coded, one->rows, &one->y);
    release_tiles(pool);
}

long caesura_abi(void) { return ABI; }

long caesura_scratch_bytes(void) { return sizeof(Scratch); }

/* Hidden states after the last norm are left in step->output. */
void caesura_forward(Pool *pool, const Decoder *decoder, const Step *step) {
    Run run = {decoder, step};
    run_task(pool, forward, &run);
}

/* y [rows, outer] = x [rows, inner] W^T. Rows go to `coded` if the weights are coded, to `parts` if that is not NULL. */
void caesura_linear(Pool *pool, const Linear *linear, float *x, float *y, long rows, const CodedRows *coded, char *parts) {
    Product one = {linear, {x, NULL, linear->inner}, {y, NULL, linear->outer}, parts, rows, *coded};
    run_task(pool, multiply_alone, &one);
}

Pool *caesura_open(int threads) {
    Pool *pool = open_pool(threads);
    if (pool) pool->tiles = ask_for_tiles();
    return pool;
}

/* Bytes that `rows` rows of that width take when they are cut; 0 when products take them as they are. */
long caesura_cut_bytes(const Pool *pool, long rows, long width) {
    return pool->tiles ? (rows + PAIR_ROWS - 1) / PAIR_ROWS * 2 * num_steps(width) * STEP_BYTES : 0;
}
