/* One step of a dense decoder on the CPU, in float32 or with weights of 8 bits: rows in, hidden states out, keys and values written in place.

   All threads walk through the same phases with a barrier between them, so a step costs one call. No result depends on
   the number of threads, on the batch around a row or on how a prompt was cut into chunks. */
#include "attention.h"
#include "linear_int8.h"

#define ABI 2 /* of the structures below; checked when the library is loaded */

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
    float *hidden, *normed, *qkv, *mixed, *inner, *partials;
    Scratch *scratch; /* one per thread */
    CodedRows coded;  /* the rows that the next product takes, where weights are coded */
} Step;

typedef struct {
    const Decoder *decoder;
    const Step *step;
} Run;

INLINE void rms_norm(const float *x, const float *weight, long size, float epsilon, float *y) {
    vec squares = splat(0.0f);
    for (long i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float scale = 1.0f / sqrtf(vec_sum(squares) / (float)size + epsilon);
    for (long i = 0; i < size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

static void norm_rows(const Pool *pool, int thread, const float *x, const float *weight, long rows, long size,
                      float epsilon, float *y) {
    long first, last;
    share(pool, thread, rows, &first, &last);
    for (long row = first; row < last; row++) rms_norm(x + row * size, weight, size, epsilon, y + row * size);
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

static void place_rows(const Pool *pool, int thread, const Decoder *decoder, const Layer *layer, const Step *step) {
    long first, last, turning = decoder->heads + decoder->kv_heads, head_dim = decoder->head_dim;
    share(pool, thread, step->rows, &first, &last);
    for (long row = first; row < last; row++) {
        float *qkv = step->qkv + row * (turning + decoder->kv_heads) * head_dim;
        const float *cos = step->cos + step->positions[row] * (head_dim / 2);
        const float *sin = step->sin + step->positions[row] * (head_dim / 2);
        for (long head = 0; head < turning; head++) {
            float *at = qkv + head * head_dim;
            if (layer->qk_norm) rms_norm(at, layer->qk_norm + head * head_dim, head_dim, decoder->epsilon, at);
            rotate(at, head_dim / 2, cos, sin);
        }
        for (long head = 0; head < decoder->kv_heads; head++)
            keep_row(decoder, layer, step->slots[row], head, qkv + (decoder->heads + head) * head_dim,
                     qkv + (turning + head) * head_dim);
    }
}

/* Items are given out one by one, since they differ in length. */
static void attend_rows(Pool *pool, int thread, const Decoder *decoder, const Layer *layer, const Step *step) {
    Cache cache = {layer->keys,      layer->values,     decoder->page_size, decoder->heads,
                   decoder->kv_heads, decoder->head_dim, layer->window};
    Scratch *scratch = step->scratch + thread;
    long work = step->num_items * decoder->kv_heads;
    for (long turn; (turn = atomic_fetch_add(&pool->next, 1)) < work;) {
        const Item *item = step->items + turn / decoder->kv_heads;
        long head = turn % decoder->kv_heads;
        if (item->segment < 0)
            attend_chunk(&cache, step->pieces + item->piece, item, head, step->qkv, step->mixed, scratch);
        else
            attend_decodes(&cache, step->pieces, step->members, item, head, step->qkv, step->partials, step->offsets, scratch);
    }
    if (!step->num_decodes) return;
    barrier(pool);
    long first, last;
    share(pool, thread, step->num_decodes, &first, &last);
    for (long i = first; i < last; i++)
        merge_decode(&cache, step->pieces, step->decodes[i], step->partials, step->offsets, step->mixed);
}

/* Code the rows that `linear` takes, each by the thread that has it in `share`. */
static void code_input(const Pool *pool, int thread, const Linear *linear, const float *x, const Step *step) {
    if (linear->codes) code_rows(pool, thread, x, step->rows, linear->inner, &step->coded);
}

static void product(const Pool *pool, int thread, const Linear *linear, Epilogue epilogue, const float *x,
                    const Step *step, float *y, long y_stride) {
    if (linear->codes)
        coded_share(pool, thread, linear, epilogue, &step->coded, step->rows, y, y_stride);
    else
        linear_share(pool, thread, linear, epilogue, x, linear->inner, step->rows, y, y_stride);
}

static void forward(Pool *pool, void *argument, int thread) {
    const Decoder *decoder = ((Run *)argument)->decoder;
    const Step *step = ((Run *)argument)->step;
    long hidden = decoder->hidden, q_floats = decoder->heads * decoder->head_dim;
    long qkv_floats = q_floats + 2 * decoder->kv_heads * decoder->head_dim, first, last;
    share(pool, thread, step->rows, &first, &last);
    for (long row = first; row < last; row++)
        memcpy(step->hidden + row * hidden, decoder->embeddings + step->tokens[row] * hidden, hidden * sizeof(float));
    for (const Layer *layer = decoder->layer; layer < decoder->layer + decoder->layers; layer++) {
        norm_rows(pool, thread, step->hidden, layer->input_norm, step->rows, hidden, decoder->epsilon, step->normed);
        code_input(pool, thread, &layer->qkv, step->normed, step);
        barrier(pool);
        product(pool, thread, &layer->qkv, STORE, step->normed, step, step->qkv, qkv_floats);
        barrier(pool);
        if (thread == 0) atomic_store(&pool->next, 0);
        place_rows(pool, thread, decoder, layer, step);
        barrier(pool);
        attend_rows(pool, thread, decoder, layer, step);
        barrier(pool);
        if (layer->out.codes) {
            code_input(pool, thread, &layer->out, step->mixed, step);
            barrier(pool);
        }
        product(pool, thread, &layer->out, ADD, step->mixed, step, step->hidden, hidden);
        barrier(pool);
        norm_rows(pool, thread, step->hidden, layer->mlp_norm, step->rows, hidden, decoder->epsilon, step->normed);
        code_input(pool, thread, &layer->gate_up, step->normed, step);
        barrier(pool);
        product(pool, thread, &layer->gate_up, SWIGLU, step->normed, step, step->inner, decoder->inner);
        barrier(pool);
        if (layer->down.codes) {
            code_input(pool, thread, &layer->down, step->inner, step);
            barrier(pool);
        }
        product(pool, thread, &layer->down, ADD, step->inner, step, step->hidden, hidden);
        barrier(pool);
    }
    norm_rows(pool, thread, step->hidden, decoder->norm, step->rows, hidden, decoder->epsilon, step->normed);
}

typedef struct {
    const Linear *linear;
    const float *x;
    float *y;
    long rows;
    CodedRows coded;
} Product;

static void multiply_rows(Pool *pool, void *argument, int thread) {
    const Product *one = argument;
    if (one->linear->codes) {
        code_rows(pool, thread, one->x, one->rows, one->linear->inner, &one->coded);
        barrier(pool);
        coded_share(pool, thread, one->linear, STORE, &one->coded, one->rows, one->y, one->linear->outer);
        return;
    }
    linear_share(pool, thread, one->linear, STORE, one->x, one->linear->inner, one->rows, one->y, one->linear->outer);
}

long caesura_abi(void) { return ABI; }

long caesura_scratch_bytes(void) { return sizeof(Scratch); }

/* Hidden states after the last norm are left in step->normed. */
void caesura_forward(Pool *pool, const Decoder *decoder, const Step *step) {
    Run run = {decoder, step};
    run_task(pool, forward, &run);
}

/* y [rows, outer] = x [rows, inner] W^T; `coded` is where the rows' codes go, if the weights are coded. */
void caesura_linear(Pool *pool, const Linear *linear, const float *x, float *y, long rows, const CodedRows *coded) {
    Product one = {linear, x, y, rows, *coded};
    run_task(pool, multiply_rows, &one);
}
