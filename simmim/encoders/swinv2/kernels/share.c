/* Threads that share the pieces of a call by demand. Each takes the next piece when it has done the last one, and a call waits
   for pieces alone, not for threads: one that another process keeps from running takes no piece, and the others do its part.
   OpenMP would wait for each thread at the end of each loop. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include "share.h"

#define MAX_HELPERS 255
#ifndef BEFORE_PIECE
#define BEFORE_PIECE(piece) /* a delay, in tests */
#endif
#define LOOKS 2000 /* at what is awaited, before a thread sleeps: some 50 µs, about what it takes to wake one */

typedef struct {
    Work *work;
    const void *call;
    float *scratch; /* of all threads */
    long pieces, scratch_floats;
    int members;          /* threads that have joined and the memory of which is in use */
    atomic_long next;     /* the first piece that no thread has taken */
    atomic_int busy;      /* helpers that have joined and not left */
} Job;

/* The threads of this process beside those that call `share_pieces`. They are started when they are first needed. */
static struct {
    pthread_mutex_t lock; /* of `job`, `wanted`, `helpers`, and of `members` of the job */
    pthread_cond_t start, end;
    Job *job;             /* that helpers may join, or NULL */
    int wanted;           /* helpers that may still join it */
    int helpers;
    atomic_int is_taken;  /* whether a call uses the helpers */
    atomic_uint calls;    /* changes when there is a job */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0, 0, 0};

INLINE void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void do_pieces(Job *job, int member) {
    float *scratch = job->scratch + member * job->scratch_floats;
    for (;;) {
        long piece = atomic_fetch_add(&job->next, 1);
        if (piece >= job->pieces) return;
        BEFORE_PIECE(piece);
        job->work(job->call, piece, scratch);
    }
}

static void *help(void *unused) {
    (void)unused;
    unsigned seen = atomic_load(&pool.calls) - 1;
    for (;;) {
        for (int look = 0; look < LOOKS && atomic_load(&pool.calls) == seen; look++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (!pool.job || !pool.wanted) pthread_cond_wait(&pool.start, &pool.lock);
        Job *job = pool.job;
        int member = job->members++;
        pool.wanted--;
        seen = atomic_load(&pool.calls);
        atomic_fetch_add(&job->busy, 1);
        pthread_mutex_unlock(&pool.lock);
        do_pieces(job, member);
        /* Its last access to the job, which the caller may give up at once. */
        if (atomic_fetch_sub(&job->busy, 1) == 1) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_broadcast(&pool.end);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

/* A forked process has no helpers. It is single-threaded until `share_pieces` starts some. */
static void forget_helpers(void) {
    pthread_mutex_init(&pool.lock, NULL), pthread_cond_init(&pool.start, NULL), pthread_cond_init(&pool.end, NULL);
    pool.job = NULL, pool.wanted = pool.helpers = 0;
    atomic_store(&pool.is_taken, 0);
}

/* Starts helpers until there are `count`, or as many as the system grants. The caller holds the lock. */
static void start_helpers(int count) {
    static int is_registered;
    if (!is_registered) is_registered = !pthread_atfork(NULL, NULL, forget_helpers);
    if (!is_registered) return;
    pthread_t thread;
    sigset_t all, usual; /* signals are for the threads that the program knows */
    sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &usual);
    while (pool.helpers < count && !pthread_create(&thread, NULL, help, NULL)) pool.helpers++, pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &usual, NULL);
}

int share_pieces(Work *work, const void *call, long pieces, int threads, long scratch_floats) {
    int helpers = threads - 1 < pieces - 1 ? threads - 1 : pieces - 1;
    if (helpers > MAX_HELPERS) helpers = MAX_HELPERS;
    /* Two calls at the same time: the second one does all by itself. */
    int is_alone = helpers < 1 || atomic_exchange(&pool.is_taken, 1);
    if (is_alone) helpers = 0;
    scratch_floats = round_up(scratch_floats + 1, LINE);
    float *scratch = allocate_floats((helpers + 1) * scratch_floats);
    if (scratch) {
        Job job = {work, call, scratch, pieces, scratch_floats, 1, 0, 0};
        if (!is_alone) {
            pthread_mutex_lock(&pool.lock);
            start_helpers(helpers);
            pool.job = &job, pool.wanted = helpers;
            atomic_fetch_add(&pool.calls, 1);
            if (helpers > 1) pthread_cond_broadcast(&pool.start);
            else pthread_cond_signal(&pool.start);
            pthread_mutex_unlock(&pool.lock);
        }
        do_pieces(&job, 0);
        if (!is_alone) {
            pthread_mutex_lock(&pool.lock);
            pool.job = NULL; /* nobody joins any more */
            pthread_mutex_unlock(&pool.lock);
            for (int look = 0; look < LOOKS && atomic_load(&job.busy); look++) pause_briefly();
            pthread_mutex_lock(&pool.lock);
            while (atomic_load(&job.busy)) pthread_cond_wait(&pool.end, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    if (!is_alone) atomic_store(&pool.is_taken, 0);
    free(scratch);
    return !scratch;
}
