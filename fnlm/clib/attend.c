/* Causal self-attention, and its gradient, from and to the rows of the joined projection.

   What happens between two products of a block in one call: QK norm, rotation, scores, softmax, weighted sum. Nothing
   as large as (T, T) is kept: the backward pass computes scores again, from each row's largest and its sum (Dao et al.
   2022, algorithm 4). The arithmetic is float, rows are float or bfloat16. One piece of work is a text and a key head
   with the query heads it serves: no result depends on the number of threads. */

#pragma GCC optimize("O3") /* vectors of all loops, as Clang makes of its -O2 */

#include "vector.h"
#include "heads.h"
#include "team.h"

enum { QUERIES = 32 }; /* at a time: their gradients are added to those of keys and values together */
enum { WIDEST = 256 }; /* K at most */

/* qkv (B, T, (H + 2 H_kv) K), y (B, T, H K), tops (B, H, T, 2); cos, sin (T or more, R); first (B, T) the first key seen, or NULL. */
typedef struct {
    const void *qkv, *g;
    void *y, *d_qkv;
    float *tops; /* the largest score of a row, and 1 / the sum of exp(score - largest) */
    const float *cos, *sin;
    const int64_t *first;
    void *cached_k, *cached_v;    /* (B, H_kv, S, K), apart by `by` entries along the first three; or NULL */
    const int64_t *past, *counts; /* (B,) with a cache */
    int64_t b, t, heads, kv_heads, k, rope, norm, window, bf16;
    int64_t by[3], longest, last; /* longest: the most keys of a text; last: of each text the last query alone */
    double scale, eps;
} attention;

typedef struct {
    const attention *a;
    atomic_llong next;
    atomic_int failed;
} job;

/* A thread's own room: floats in rows, and cells that are multiplied (heads.h), `across` those of the transpose. */
typedef struct {
    float *keys, *values, *d_keys, *d_values, *keys_across, *values_across, *key_cells, *value_cells;
    float *q, *y, *g, *d_q, *q_cells, *g_cells, *pair_cells, *delta; /* of QUERIES */
    float *scores, *d_scores, *score_cells;                          /* (QUERIES, T) */
} room;

static int64_t tall(const attention *a) { return padded(a->longest, QUERIES); }
static int64_t wide(const attention *a) { return padded(a->k, COLS); }
static int64_t pitch(const attention *a) { return (a->heads + 2 * a->kv_heads) * a->k; }

/* Zeroed, as what lies beyond T and K is read; NULL where there is no memory. */
static float *furnish(const attention *a, room *r) {
    float *at = NULL, **parts[] = {
        &r->keys, &r->values, &r->d_keys, &r->d_values, &r->keys_across, &r->values_across, &r->key_cells, &r->value_cells,
        &r->q, &r->y, &r->g, &r->d_q, &r->q_cells, &r->g_cells, &r->pair_cells, &r->delta,
        &r->scores, &r->d_scores, &r->score_cells};
    const int64_t sizes[] = {tall(a) * wide(a), QUERIES * wide(a), QUERIES * tall(a)}; /* of 8, 8 and 3 parts */
    const size_t bytes = (size_t)(8 * sizes[0] + 8 * sizes[1] + 3 * sizes[2]) * 4;
    if (posix_memalign((void **)&at, 64, bytes)) return NULL;
    memset(at, 0, bytes);
    float *all = at;
    for (int i = 0; i < 19; at += sizes[i++ / 8]) *parts[i] = at;
    return all;
}

static int64_t before(const attention *a, int64_t b) { return a->past ? a->past[b] : 0; }
static int64_t count(const attention *a, int64_t b) { return a->counts ? a->counts[b] : a->t; }

/* Where head `h` of q, k and v, counted together, is in the row of a position. */
static int64_t place(const attention *a, int64_t b, int64_t t, int64_t h) { return (b * a->t + t) * pitch(a) + h * a->k; }

INLINE void turned_of(const attention *a, int64_t b, int64_t t, int64_t h, float *to, const int64_t K) {
    widen(a->qkv, place(a, b, t, h), (int)a->bf16, to, K);
    if (a->norm) normalise(to, K, (int)a->norm, (float)a->eps);
    const int64_t at = (before(a, b) + t) * a->rope;
    if (a->rope) rotate(to, a->cos + at, a->sin + at, a->rope, 1.f);
}

/* Heads of usual sizes by code for them alone: half the time. */
#define SIZES(does)               \
    switch (a->k) {               \
        case 32: does(32); break; \
        case 64: does(64); break; \
        default: does(a->k);      \
    }

/* A head of q or k in its place in the text. */
static void turned(const attention *a, int64_t b, int64_t t, int64_t h, float *to) {
#define TURNED(K) turned_of(a, b, t, h, to, K)
    SIZES(TURNED)
}

INLINE void turned_back_of(const attention *a, int64_t b, int64_t t, int64_t h, float *g, const int64_t K) {
    if (a->rope) rotate(g, a->cos + t * a->rope, a->sin + t * a->rope, a->rope, -1.f);
    if (a->norm) {
        float x[WIDEST];
        widen(a->qkv, place(a, b, t, h), (int)a->bf16, x, K);
        const float rate = normalise(x, K, (int)a->norm, (float)a->eps);
        normalise_back(g, x, rate, K, (int)a->norm);
    }
    narrow(a->d_qkv, place(a, b, t, h), (int)a->bf16, g, K);
}

/* The gradient of a head of q or k to that of the projection. */
static void turned_back(const attention *a, int64_t b, int64_t t, int64_t h, float *g) {
#define TURNED_BACK(K) turned_back_of(a, b, t, h, g, K)
    SIZES(TURNED_BACK)
}

/* Cells (rows x cols) as (cols x rows). */
static void transpose(const float *from, int64_t rows, int64_t cols, int64_t ld, float *to, int64_t ldt) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < cols; j++)
            EACH(l, LANES) to[j * ldt + i + l] = from[(i + l) * ld + j];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The first key that query t of text b sees. */
static int64_t begin(const attention *a, int64_t b, int64_t t) {
    const int64_t at = a->first ? a->first[b * a->t + t] : 0, near = before(a, b) + t + 1 - a->window;
    return a->window && near > at ? near : at;
}

/* The keys that any of the queries from t sees, in whole columns. */
static void span(const attention *a, int64_t b, int64_t t, int64_t n, int64_t *from, int64_t *to) {
    *from = begin(a, b, t);
    for (int64_t i = 1; i < n; i++) *from = least(*from, begin(a, b, t + i));
    *from = *from / COLS * COLS;
    *to = least(padded(before(a, b) + t + n, COLS), tall(a));
}

/* Scores of queries t to t + n (in r->q) with their keys; what is not seen has exp 0. */
INLINE void score(const attention *a, const room *r, int64_t b, int64_t t, int64_t n, int64_t from, int64_t to,
                  const int half) {
    const int64_t W = wide(a), L = tall(a);
    cells_of_rows(r->q, QUERIES, W, W, r->q_cells, W, half);
    product(r->q_cells, W, 1, r->keys_across + from, L, r->scores + from, L, QUERIES, to - from, W >> half, 0, half);
    for (int64_t i = 0; i < n; i++) {
        float *row = r->scores + i * L;
        for (int64_t j = from; j < begin(a, b, t + i); j++) row[j] = -INFINITY;
        for (int64_t j = before(a, b) + t + i + 1; j < to; j++) row[j] = -INFINITY;
    }
}

/* Row i of the scores becomes exp(score - top); returns the sum. */
static float exponents(float *row, int64_t from, int64_t to, float top) {
    vfloat sum[2] = {0};
    for (int64_t j = from; j < to; j += COLS) EACH(h, 2) {
        float *at = row + j + h * LANES;
        const vfloat x = load(at), p = pick(x == -INFINITY, all(0.f), vexp(x - top));
        store(at, p);
        sum[h] += p;
    }
    return total(sum[0] + sum[1]);
}

static float largest(const float *row, int64_t from, int64_t to) {
    vfloat top = all(-INFINITY);
    for (int64_t j = from; j < to; j += LANES) {
        const vfloat x = load(row + j);
        top = pick(x > top, x, top);
    }
    float found = top[0];
    for (int i = 1; i < LANES; i++) found = top[i] > found ? top[i] : found;
    return found;
}

/* Queries t to t + n of head h, scaled, in r->q; the rest of it 0. */
static void queries(const attention *a, room *r, int64_t b, int64_t t, int64_t n, int64_t h) {
    for (int64_t i = 0; i < QUERIES; i++) {
        float *q = r->q + i * wide(a);
        if (i < n)
            turned(a, b, t + i, h, q);
        for (int64_t j = 0; j < a->k; j++) q[j] = i < n ? q[j] * (float)a->scale : 0.f;
    }
}

INLINE void forward_head(const attention *a, room *r, int64_t b, int64_t h, const int half) {
    const int64_t W = wide(a), K = a->k, L = tall(a), end = count(a, b);
    for (int64_t t = a->last && end ? end - 1 : 0, n; t < end; t += n) {
        int64_t from, to;
        n = least(QUERIES, end - t);
        queries(a, r, b, t, n, h);
        span(a, b, t, n, &from, &to);
        score(a, r, b, t, n, from, to, half);
        float unkept[2 * QUERIES], *tops = a->tops ? a->tops + ((b * a->heads + h) * a->t + t) * 2 : unkept;
        for (int64_t i = 0; i < n; i++) {
            tops[2 * i] = largest(r->scores + i * L, from, to);
            tops[2 * i + 1] = 1.f / exponents(r->scores + i * L, from, to, tops[2 * i]);
        }
        cells_of_rows(r->scores + from, QUERIES, to - from, L, r->score_cells, L, half);
        product(r->score_cells, L, 1, r->value_cells + (from >> half) * W, W, r->y, W, QUERIES, W, (to - from) >> half, 0, half);
        for (int64_t i = 0; i < n; i++) {
            float *y = r->y + i * W;
            for (int64_t j = 0; j < K; j++) y[j] *= tops[2 * i + 1];
            narrow(a->y, ((b * a->t + t + i) * a->heads + h) * K, (int)a->bf16, y, K);
        }
    }
}

/* The weights of queries t to t + n but for the sums that divide them, which divide g instead, the gradient of y; and
   delta, the gradient of these sums. */
static void recall(const attention *a, const room *r, int64_t b, int64_t h, int64_t t, int64_t n, int64_t from, int64_t to) {
    const int64_t W = wide(a), K = a->k, L = tall(a);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = ((b * a->t + t + i) * a->heads + h) * K;
        const float *top = a->tops + ((b * a->heads + h) * a->t + t + i) * 2;
        widen(a->g, at, (int)a->bf16, r->g + i * W, K);
        for (int64_t j = 0; j < K; j++) r->g[i * W + j] *= top[1];
        widen(a->y, at, (int)a->bf16, r->y + i * W, K);
        r->delta[i] = dot(r->g + i * W, r->y + i * W, K);
        exponents(r->scores + i * L, from, to, top[0]);
    }
    for (int64_t i = n; i < QUERIES; i++) {
        memset(r->g + i * W, 0, (size_t)K * 4);
        memset(r->scores + i * L + from, 0, (size_t)(to - from) * 4);
        r->delta[i] = 0;
    }
}

INLINE void backward_head(const attention *a, room *r, int64_t b, int64_t h, const int half) {
    const int64_t W = wide(a), K = a->k, L = tall(a), some = QUERIES >> half;
    for (int64_t t = 0, n; t < a->t; t += n) {
        int64_t from, to;
        n = least(QUERIES, a->t - t);
        queries(a, r, b, t, n, h);
        span(a, b, t, n, &from, &to);
        score(a, r, b, t, n, from, to, half);
        recall(a, r, b, h, t, n, from, to);
        float *P = r->scores + from, *dP = r->d_scores + from, *cells = r->score_cells;
        cells_of_rows(r->g, QUERIES, W, W, r->g_cells, W, half);
        product(r->g_cells, W, 1, r->values_across + from, L, dP, L, QUERIES, to - from, W >> half, 0, half);
        for (int64_t i = 0; i < QUERIES; i++)
            for (int64_t j = 0; j < to - from; j++) dP[i * L + j] = P[i * L + j] * (dP[i * L + j] - r->delta[i]);
        cells_of_rows(dP, QUERIES, to - from, L, cells, L, half);
        product(cells, L, 1, r->key_cells + (from >> half) * W, W, r->d_q, W, QUERIES, W, (to - from) >> half, 0, half);
        cells_of_pairs(dP, QUERIES, to - from, L, cells, L, half);
        cells_of_pairs(r->q, QUERIES, W, W, r->pair_cells, W, half);
        product(cells, 1, L, r->pair_cells, W, r->d_keys + from * W, W, to - from, W, some, 1, half);
        cells_of_pairs(P, QUERIES, to - from, L, cells, L, half);
        cells_of_pairs(r->g, QUERIES, W, W, r->pair_cells, W, half);
        product(cells, 1, L, r->pair_cells, W, r->d_values + from * W, W, to - from, W, some, 1, half);
        for (int64_t i = 0; i < n; i++) {
            float *g = r->d_q + i * W;
            for (int64_t j = 0; j < K; j++) g[j] *= (float)a->scale;
            turned_back(a, b, t + i, h, g);
        }
    }
}

/* A new key and value to the cache. */
static void remember(const attention *a, room *r, int64_t b, int64_t t, int64_t g) {
    const int64_t at = b * a->by[0] + g * a->by[1] + (before(a, b) + t) * a->by[2], size = a->bf16 ? 2 : 4;
    turned(a, b, t, a->heads + g, r->keys);
    narrow(a->cached_k, at, (int)a->bf16, r->keys, a->k);
    const char *value = (const char *)a->qkv + place(a, b, t, a->heads + a->kv_heads + g) * size;
    memcpy((char *)a->cached_v + at * size, value, (size_t)(a->k * size));
}

/* The keys and values of key head `g`, all positions; 0 where a text has ended and another of the batch has not. */
INLINE void gather(const attention *a, room *r, int64_t b, int64_t g, const int half) {
    const int64_t W = wide(a), L = tall(a), all = before(a, b) + count(a, b);
    if (a->cached_k)
        for (int64_t t = 0; t < count(a, b); t++) remember(a, r, b, t, g);
    for (int64_t t = 0; t < all; t++) {
        const int64_t at = b * a->by[0] + g * a->by[1] + t * a->by[2];
        if (a->cached_k)
            widen(a->cached_k, at, (int)a->bf16, r->keys + t * W, a->k);
        else
            turned(a, b, t, a->heads + g, r->keys + t * W);
        if (a->cached_k)
            widen(a->cached_v, at, (int)a->bf16, r->values + t * W, a->k);
        else
            widen(a->qkv, place(a, b, t, a->heads + a->kv_heads + g), (int)a->bf16, r->values + t * W, a->k);
    }
    memset(r->keys + all * W, 0, (size_t)((L - all) * W) * 4);
    memset(r->values + all * W, 0, (size_t)((L - all) * W) * 4);
    cells_of_rows(r->keys, L, W, W, r->key_cells, W, half);
    transpose(r->key_cells, L, W >> half, W, r->keys_across, L);
}

INLINE void forward_piece(const attention *a, room *r, int64_t b, int64_t g, const int half) {
    const int64_t served = a->heads / a->kv_heads, W = wide(a);
    gather(a, r, b, g, half);
    cells_of_pairs(r->values, tall(a), W, W, r->value_cells, W, half);
    for (int64_t h = g * served; h < (g + 1) * served; h++) forward_head(a, r, b, h, half);
}

INLINE void backward_piece(const attention *a, room *r, int64_t b, int64_t g, const int half) {
    const int64_t served = a->heads / a->kv_heads, v = a->heads + a->kv_heads + g, W = wide(a), L = tall(a);
    gather(a, r, b, g, half);
    cells_of_pairs(r->keys, L, W, W, r->key_cells, W, half);
    cells_of_rows(r->values, L, W, W, r->value_cells, W, half);
    transpose(r->value_cells, L, W >> half, W, r->values_across, L);
    memset(r->d_keys, 0, (size_t)(L * W) * 4);
    memset(r->d_values, 0, (size_t)(L * W) * 4);
    for (int64_t h = g * served; h < (g + 1) * served; h++) backward_head(a, r, b, h, half);
    for (int64_t t = 0; t < a->t; t++) {
        turned_back(a, b, t, a->heads + g, r->d_keys + t * W);
        narrow(a->d_qkv, place(a, b, t, v), (int)a->bf16, r->d_values + t * W, a->k);
    }
}

static void piece(const attention *a, room *r, int64_t b, int64_t g) {
    const int half = HALVES && a->bf16;
    if (a->g && half) backward_piece(a, r, b, g, 1);
    if (a->g && !half) backward_piece(a, r, b, g, 0);
    if (!a->g && half) forward_piece(a, r, b, g, 1);
    if (!a->g && !half) forward_piece(a, r, b, g, 0);
}

static void work(team *t, int id, int size, void *data) {
    (void)t, (void)id, (void)size;
    job *j = data;
    room r;
    float *own = furnish(j->a, &r);
    if (own == NULL) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (long long at; (at = atomic_fetch_add(&j->next, 1)) < j->a->b * j->a->kv_heads;)
        piece(j->a, &r, at / j->a->kv_heads, at % j->a->kv_heads);
    free(own);
}

/* y and tops, or with the gradient `g` of y that of qkv. 0, or 1 where there is no memory. */
int64_t fnlm_attend(const attention *a, int64_t threads) {
    job j = {.a = a};
    run(work, &j, (int)threads);
    return atomic_load(&j.failed);
}
