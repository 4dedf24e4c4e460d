/* A few threads that work on one task together. They spin briefly between tasks, then sleep. */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* A pause is 16 to 60 ns. Who waits longer sleeps: to a core that idles the kernel brings the thread that is waited for,
   if it has lost its own to somebody else. But to be woken takes longer than most waits. */
#define SPINS_IN_TASK 4000
#define SPINS_BETWEEN_TASKS 60000

typedef struct Pool Pool;
typedef void (*Task)(Pool *pool, void *argument);

/* What has been taken of a thread's share of this phase's pieces. In a cache line of its own: its thread alone uses it,
   until another has none left. */
typedef struct {
    _Alignas(64) atomic_long taken;
} Share;

struct Pool {
    int threads;
    pthread_t *workers;
    Task task;
    void *argument;
    atomic_uint epoch;           /* grows with every task */
    atomic_uint arrived, passed; /* the barrier */
    Share *shares;               /* one per thread */
    int tiles;                   /* products may use the matrix tiles of tiles.h */
    atomic_int sleeping, stopping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

typedef struct {
    Pool *pool;
    int thread;
} Worker;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Until `word` is not `seen` any more. */
static void await(Pool *pool, atomic_uint *word, unsigned seen, int spins) {
    while (spins--) {
        if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(word) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
}

/* Lets those go on who await `word`. */
static void advance(Pool *pool, atomic_uint *word) {
    atomic_fetch_add(word, 1);
    if (!atomic_load(&pool->sleeping)) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

/* The end of a phase: nobody goes on before all have arrived. */
static void barrier(Pool *pool) {
    unsigned turn = atomic_load(&pool->passed);
    if (atomic_fetch_add(&pool->arrived, 1) < (unsigned)pool->threads - 1) {
        await(pool, &pool->passed, turn, SPINS_IN_TASK);
        return;
    }
    atomic_store(&pool->arrived, 0);
    for (int i = 0; i < pool->threads; i++) atomic_store_explicit(&pool->shares[i].taken, 0, memory_order_relaxed);
    advance(pool, &pool->passed);
}

static _Thread_local int this_thread; /* its number in the pool it works for */

/* Takes `each` of this phase's `count` units: [*first, *last). 0 when none are left. A thread takes the pieces of its own
   share one after the other, as memory likes it, and then from the others' shares: one that has lost its core for a
   while holds up one piece and not its share of the phase. */
static inline int take(Pool *pool, long count, long each, long *first, long *last) {
    long pieces = (count + each - 1) / each;
    for (int turn = 0, owner = this_thread; turn < pool->threads; turn++, owner = (owner + 1) % pool->threads) {
        long begin = pieces * owner / pool->threads, size = pieces * (owner + 1) / pool->threads - begin;
        atomic_long *taken = &pool->shares[owner].taken;
        if (atomic_load_explicit(taken, memory_order_relaxed) >= size) continue;
        long piece = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (piece >= size) continue;
        *first = (begin + piece) * each;
        *last = *first + each < count ? *first + each : count;
        return 1;
    }
    return 0;
}

#define PIECES_EACH 4 /* of a phase, for every thread: enough to even out, few enough to be read as a stream */

static inline long piece_size(const Pool *pool, long count) {
    long size = count / (pool->threads * PIECES_EACH);
    return size ? size : 1;
}

static void *work(void *argument) {
    Worker self = *(Worker *)argument;
    free(argument);
    this_thread = self.thread;
    for (unsigned seen = 0;; seen++) {
        await(self.pool, &self.pool->epoch, seen, SPINS_BETWEEN_TASKS);
        if (atomic_load(&self.pool->stopping)) return NULL;
        self.pool->task(self.pool, self.pool->argument);
        barrier(self.pool);
    }
}

/* Runs `task` on all threads, the caller among them. One caller at a time. */
static void run_task(Pool *pool, Task task, void *argument) {
    this_thread = 0;
    pool->task = task;
    pool->argument = argument;
    advance(pool, &pool->epoch);
    task(pool, argument);
    barrier(pool);
}

void caesura_pool_close(Pool *pool) {
    atomic_store(&pool->stopping, 1);
    advance(pool, &pool->epoch);
    for (int i = 0; i < pool->threads - 1; i++) pthread_join(pool->workers[i], NULL);
    free(pool->workers);
    free(pool->shares);
    free(pool);
}

/* NULL when threads or memory cannot be had. */
static Pool *open_pool(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc(threads, sizeof *pool->workers);
    pool->shares = aligned_alloc(_Alignof(Share), threads * sizeof *pool->shares);
    pool->threads = 1;
    if (!pool->workers || !pool->shares) {
        caesura_pool_close(pool);
        return NULL;
    }
    memset(pool->shares, 0, threads * sizeof *pool->shares);
    for (int thread = 1; thread < threads; thread++) {
        Worker *self = malloc(sizeof *self);
        if (self) *self = (Worker){pool, thread};
        if (!self || pthread_create(&pool->workers[thread - 1], NULL, work, self)) {
            free(self);
            caesura_pool_close(pool);
            return NULL;
        }
        pool->threads++;
    }
    return pool;
}
