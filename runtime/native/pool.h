/* A few threads that work on one task together. They spin briefly between tasks, then sleep. */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

/* A pause is 16 to 60 ns. Who waits longer sleeps: to a core that idles the kernel brings the thread that is waited for,
   if it has lost its own to somebody else. But to be woken takes longer than most waits. */
#define SPINS_IN_TASK 4000
#define SPINS_BETWEEN_TASKS 60000

typedef struct Pool Pool;
typedef void (*Task)(Pool *pool, void *argument, int thread);

struct Pool {
    int threads;
    pthread_t *workers;
    Task task;
    void *argument;
    atomic_uint epoch;           /* grows with every task */
    atomic_uint arrived, passed; /* the barrier */
    atomic_long next;            /* pieces of this phase's work that have been taken */
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
    atomic_store(&pool->next, 0);
    advance(pool, &pool->passed);
}

/* Takes the next `each` of this phase's `count` units: [*first, *last). 0 when none are left. Pieces go to whoever comes
   for them, so a thread that has lost its core for a while holds up one piece and not its share of the phase. */
static inline int take(Pool *pool, long count, long each, long *first, long *last) {
    *first = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed) * each;
    *last = *first + each < count ? *first + each : count;
    return *first < count;
}

#define PIECES_EACH 4 /* of a phase, for every thread: enough to even out, few enough to be read as a stream */

static inline long piece_size(const Pool *pool, long count) {
    long size = count / (pool->threads * PIECES_EACH);
    return size ? size : 1;
}

static void *work(void *argument) {
    Worker self = *(Worker *)argument;
    free(argument);
    for (unsigned seen = 0;; seen++) {
        await(self.pool, &self.pool->epoch, seen, SPINS_BETWEEN_TASKS);
        if (atomic_load(&self.pool->stopping)) return NULL;
        self.pool->task(self.pool, self.pool->argument, self.thread);
        barrier(self.pool);
    }
}

/* Runs `task` on all threads, the caller among them. One caller at a time. */
static void run_task(Pool *pool, Task task, void *argument) {
    pool->task = task;
    pool->argument = argument;
    advance(pool, &pool->epoch);
    task(pool, argument, 0);
    barrier(pool);
}

void caesura_pool_close(Pool *pool) {
    atomic_store(&pool->stopping, 1);
    advance(pool, &pool->epoch);
    for (int i = 0; i < pool->threads - 1; i++) pthread_join(pool->workers[i], NULL);
    free(pool->workers);
    free(pool);
}

/* NULL when threads or memory cannot be had. */
static Pool *open_pool(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->workers = calloc(threads, sizeof *pool->workers);
    pool->threads = 1;
    for (int thread = 1; thread < threads && pool->workers; thread++) {
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
