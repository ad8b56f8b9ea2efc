/* AdamW, and the sum of squares of gradients: one pass over memory each, with no copy in another type.

   Parameters are float, gradients and moments float or bfloat16; the arithmetic is float. Elements are taken in blocks,
   whose sums are added in their order: nothing depends on the number of threads. */

#pragma GCC optimize("O3") /* vectors of all loops, as Clang makes of its -O2 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include "team.h"

enum { BLOCK = 1 << 14, LANES = 32 };

typedef struct {
    float *p;
    void *g, *m, *v;
    int64_t n;
} leaf;

typedef struct {
    double rate, b1, b2, eps, decay, correct1, correct2, divisor;
} settings;

typedef struct {
    const leaf *leaves;
    int64_t blocks, g_bf16, m_bf16;
    settings by;
    double *sums;
    atomic_llong next;
} job;

static inline float widened(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* To nearest, ties to even; what is not a number stays none. */
static inline uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x == x ? (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : 0x7FC0;
}

static inline float get(const void *p, int64_t i, int bf16) {
    return bf16 ? widened(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static inline void put(void *p, int64_t i, float x, int bf16) {
    if (bf16)
        ((uint16_t *)p)[i] = narrowed(x);
    else
        ((float *)p)[i] = x;
}

static int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

/* The next block: its leaf, and its elements from *from to *to. NULL where there is none. */
static const leaf *next(job *j, long long *block, int64_t *from, int64_t *to) {
    *block = atomic_fetch_add(&j->next, 1);
    if (*block >= j->blocks) return NULL;
    int64_t at = *block;
    const leaf *l = j->leaves;
    while (at >= blocks_of(l->n)) at -= blocks_of(l++->n);
    *from = at * BLOCK, *to = *from + BLOCK < l->n ? *from + BLOCK : l->n;
    return l;
}

/* p (1 - rate decay) - rate m' / (sqrt v' + eps): Loshchilov and Hutter 2019, algorithm 2. */
static inline __attribute__((always_inline)) void update(
    const settings *by, const leaf *l, int64_t from, int64_t to, int g_bf16, int m_bf16) {
    const float new1 = (float)(1 - by->b1), new2 = (float)(1 - by->b2), old2 = (float)by->b2, eps = (float)by->eps;
    const float stays = (float)(1 - by->rate * by->decay), pace = (float)(by->rate / by->correct1);
    const float root = (float)(1 / sqrt(by->correct2)), divisor = (float)by->divisor;
    float *restrict p = l->p;
    void *restrict m = l->m, *restrict v = l->v;
    const void *restrict g = l->g;
    for (int64_t i = from; i < to; i++) {
        const float x = get(g, i, g_bf16) / divisor, before = get(m, i, m_bf16);
        const float mean = before + new1 * (x - before), square = old2 * get(v, i, m_bf16) + new2 * x * x;
        put(m, i, mean, m_bf16);
        put(v, i, square, m_bf16);
        p[i] = stays * p[i] - pace * mean / (sqrtf(square) * root + eps);
    }
}

static void adamw(team *t, int id, int size, void *data) {
    (void)t, (void)id, (void)size;
    job *j = data;
    long long block;
    int64_t from, to;
    for (const leaf *l; (l = next(j, &block, &from, &to));)
        if (j->g_bf16)
            j->m_bf16 ? update(&j->by, l, from, to, 1, 1) : update(&j->by, l, from, to, 1, 0);
        else
            j->m_bf16 ? update(&j->by, l, from, to, 0, 1) : update(&j->by, l, from, to, 0, 0);
}

/* In floats, LANES sums side by side over a few numbers each, so that none grows large. */
static inline __attribute__((always_inline)) double squares(const void *g, int64_t from, int64_t to, int bf16) {
    double all = 0;
    for (int64_t i = from; i < to; i += 64 * LANES) {
        float part[LANES] = {0};
        const int64_t end = i + 64 * LANES < to ? i + 64 * LANES : to;
        int64_t k = i;
        for (; k + LANES <= end; k += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                const float x = get(g, k + lane, bf16);
                part[lane] += x * x;
            }
        for (int lane = 0; k < end; k++, lane++) {
            const float x = get(g, k, bf16);
            part[lane] += x * x;
        }
        for (int lane = 0; lane < LANES; lane++) all += part[lane];
    }
    return all;
}

static void sums(team *t, int id, int size, void *data) {
    (void)t, (void)id, (void)size;
    job *j = data;
    long long block;
    int64_t from, to;
    for (const leaf *l; (l = next(j, &block, &from, &to));)
        j->sums[block] = j->g_bf16 ? squares(l->g, from, to, 1) : squares(l->g, from, to, 0);
}

static int64_t blocks_of_all(const leaf *leaves, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) blocks += blocks_of(leaves[i].n);
    return blocks;
}

static int crew(const job *j, int64_t threads) { return (int)(threads < j->blocks ? threads : j->blocks); }

void fnlm_adamw(const leaf *leaves, int64_t count, int64_t g_bf16, int64_t m_bf16, const settings *by, int64_t threads) {
    job j = {.leaves = leaves, .blocks = blocks_of_all(leaves, count), .g_bf16 = g_bf16, .m_bf16 = m_bf16, .by = *by};
    run(adamw, &j, crew(&j, threads));
}

/* The sum of the squares of all g; -1 where there is no memory. */
double fnlm_square_sum(const leaf *leaves, int64_t count, int64_t g_bf16, int64_t threads) {
    job j = {.leaves = leaves, .blocks = blocks_of_all(leaves, count), .g_bf16 = g_bf16};
    j.sums = malloc(((size_t)j.blocks + 1) * sizeof(double));
    if (!j.sums) return -1;
    run(sums, &j, crew(&j, threads));
    double all = 0;
    for (int64_t i = 0; i < j.blocks; i++) all += j.sums[i];
    free(j.sums);
    return all;
}
