/* Threads that do one piece of work together and meet at barriers.

   Where torch's OpenMP is known (`launch`), its threads are taken: a second team would wait for the cores on which they
   spin. Else there is a team of our own, made once and asleep between two calls; one call at a time has it. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SPINS = 4000, MOST = 256 };

typedef struct team {
    void (*work)(struct team *, int id, int size, void *data);
    void *data;
    atomic_int arrived, round, ids;
} team;

static inline void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait for all; a core that others want is given up after some microseconds. */
static void meet(team *t, int size) {
    if (size == 1) return;
    const int round = atomic_load(&t->round);
    if (atomic_fetch_add(&t->arrived, 1) == size - 1) {
        atomic_store(&t->arrived, 0);
        atomic_fetch_add(&t->round, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&t->round, memory_order_acquire) == round; spins++)
        if (spins < SPINS)
            rest();
        else
            sched_yield();
}

static void (*launch)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
static int (*team_size)(void);                                       /* omp_get_num_threads */

static void member(void *p) {
    team *t = p;
    t->work(t, atomic_fetch_add(&t->ids, 1), team_size(), t->data);
}

typedef struct {
    int id;
    unsigned long seen;
} birth;

static struct {
    pthread_mutex_t busy, lock;
    pthread_cond_t wake, done;
    team *job;
    int helpers, size, left;
    unsigned long number; /* of jobs so far */
    pid_t process;
    birth born[MOST];
} own;

static void *helper(void *p) {
    const birth *me = p;
    unsigned long seen = me->seen;
    for (;;) {
        pthread_mutex_lock(&own.lock);
        while (own.number == seen) pthread_cond_wait(&own.wake, &own.lock);
        seen = own.number;
        team *t = own.job;
        const int size = own.size;
        pthread_mutex_unlock(&own.lock);
        if (me->id >= size) continue;
        t->work(t, me->id, size, t->data);
        pthread_mutex_lock(&own.lock);
        if (--own.left == 0) pthread_cond_signal(&own.done);
        pthread_mutex_unlock(&own.lock);
    }
    return NULL;
}

/* As many helpers as there can be, `size` with the caller; a process that was forked has none. */
static int gathered(int size) {
    while (own.helpers < size - 1 && own.helpers < MOST - 1) {
        pthread_t thread;
        birth *me = &own.born[own.helpers];
        *me = (birth){own.helpers + 1, own.number};
        if (pthread_create(&thread, NULL, helper, me)) break;
        pthread_detach(thread);
        own.helpers++;
    }
    return own.helpers + 1 < size ? own.helpers + 1 : size;
}

static void run_own(team *t, int size) {
    static pthread_mutex_t first = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&first);
    if (own.process != getpid()) {
        memset(&own, 0, sizeof own);
        pthread_mutex_init(&own.busy, NULL);
        pthread_mutex_init(&own.lock, NULL);
        pthread_cond_init(&own.wake, NULL);
        pthread_cond_init(&own.done, NULL);
        own.process = getpid();
    }
    pthread_mutex_unlock(&first);
    pthread_mutex_lock(&own.busy);
    size = gathered(size);
    pthread_mutex_lock(&own.lock);
    own.job = t, own.size = size, own.left = size - 1, own.number++;
    pthread_cond_broadcast(&own.wake);
    pthread_mutex_unlock(&own.lock);
    t->work(t, 0, size, t->data);
    pthread_mutex_lock(&own.lock);
    while (own.left) pthread_cond_wait(&own.done, &own.lock);
    pthread_mutex_unlock(&own.lock);
    pthread_mutex_unlock(&own.busy);
}

/* work(team, id, size, data) on up to `threads` threads, this one among them, until all have ended. */
static void run(void (*work)(team *, int, int, void *), void *data, int threads) {
    team t = {.work = work, .data = data};
    if (threads <= 1)
        work(&t, 0, 1, data);
    else if (launch)
        launch(member, &t, (unsigned)threads, 0);
    else
        run_own(&t, threads);
}

/* torch's OpenMP, or NULL twice. */
void fnlm_team(void *gomp_parallel, void *omp_get_num_threads) {
    *(void **)&launch = gomp_parallel;
    *(void **)&team_size = omp_get_num_threads;
}
