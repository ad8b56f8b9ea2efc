/* One token of each of some texts through all blocks, to logits: the mathematics of fnlm/decode.py in one call.

   Weights are float, bfloat16, int8 or int4, activations float. Each text's numbers come about in one order, whatever
   the others are and however many threads there are. Letters as in fnlm/forward.py: D, H, K, F, V; n tokens. */

#include "vector.h"
#include "products.h"
#include "team.h"

typedef struct {
    const float *w, *b;
} affine;

typedef struct {
    affine attn_norm, q_norm, k_norm, mlp_norm;
    matrix qkv, out, gate, up, down;
} block;

typedef struct {
    const block *blocks;
    affine norm;
    matrix head;
    const float *cos, *sin, *slopes; /* (S, R/2) each; (H,) or NULL */
    int64_t layers, d, heads, kv_heads, head_dim, ff, rms, mlp, parallel, qk_norm, rope, window;
    double eps, scale, logits, softcap;
} model;

/* Of a text: its k, v (L, H_kv, S, K), apart by `by` entries along the first three. */
typedef struct {
    int64_t bf16, by[3];
} cache;

typedef struct {
    const model *m;
    const cache *c;
    float *x, *y, *q, *a, *h, *h2, *logits, *own; /* own: of each thread, `room` floats, `packed` more for inputs */
    void *const *k, *const *v; /* of each token's text */
    const int64_t *pos;
    int64_t n, wanted, room, packed;
} step;

static void normalise(const model *m, affine p, const float *x, int64_t n, float *out) {
    float mean = 0, square = 0;
    vfloat sum = {0};
    int64_t i = 0;
    if (!m->rms) {
        for (; i + LANES <= n; i += LANES) sum += load(x + i);
        mean = total(sum);
        for (; i < n; i++) mean += x[i];
        mean /= (float)n;
    }
    for (i = 0, sum = all(0); i + LANES <= n; i += LANES) {
        const vfloat far = load(x + i) - mean;
        sum += far * far;
    }
    square = total(sum);
    for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    const float rate = 1.f / sqrtf(square / (float)n + (float)m->eps);
    for (i = 0; i + LANES <= n; i += LANES) {
        const vfloat v = (load(x + i) - mean) * rate;
        store(out + i, (p.w ? v * load(p.w + i) : v) + (p.b ? load(p.b + i) : all(0)));
    }
    for (; i < n; i++) {
        const float v = (x[i] - mean) * rate;
        out[i] = (p.w ? v * p.w[i] : v) + (p.b ? p.b[i] : 0.f);
    }
}

static void normalise_all(const step *s, affine p, const float *x, float *out) {
    for (int64_t b = 0; b < s->n; b++) normalise(s->m, p, x + b * s->m->d, s->m->d, out + b * s->m->d);
}

/* The part of `n` units of thread `id`. */
static void share(int64_t n, int id, int size, int64_t unit, int64_t *from, int64_t *to) {
    const int64_t units = (n + unit - 1) / unit;
    *from = units * id / size * unit;
    *to = units * (id + 1) / size * unit;
    if (*to > n) *to = n;
}

/* A head of q or k in its place in the text: QK norm, then RoPE's rotation of halves. */
static void turn(const model *m, affine norm, float *x, int64_t pos) {
    if (m->qk_norm) normalise(m, norm, x, m->head_dim, x);
    const int64_t half = m->rope / 2;
    const float *cos = m->cos + pos * half, *sin = m->sin + pos * half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vfloat first = load(x + i), second = load(x + i + half);
        store(x + i, first * load(cos + i) - second * load(sin + i));
        store(x + i + half, second * load(cos + i) + first * load(sin + i));
    }
    for (; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

static int64_t place(const cache *c, int64_t layer, int64_t head, int64_t pos) {
    return layer * c->by[0] + head * c->by[1] + pos * c->by[2];
}

static void remember(const cache *c, void *to, int64_t at, const float *x, int64_t n) {
    if (c->bf16)
        round_all((uint16_t *)to + at, x, n);
    else
        memcpy((float *)to + at, x, (size_t)n * 4);
}

static void project(const step *s, const block *p, int id, int size, float *mine) {
    const model *m = s->m;
    const int64_t rows = p->qkv.n;
    int64_t from, to;
    share(rows, id, size, 8, &from, &to);
    normalise_all(s, p->attn_norm, s->x, mine);
    const void *in = inputs(&p->qkv, mine, s->n * m->d, mine + s->room);
    multiply(&p->qkv, from, to, in, m->d, s->n, s->q, rows);
}

/* Whole heads of q, k and v of each token in their places: q stays, k and v go to the cache. */
static void put(const step *s, const block *p, int64_t layer, int id, int size) {
    const model *m = s->m;
    const int64_t K = m->head_dim, H = m->heads, A = H + 2 * m->kv_heads;
    int64_t from, to;
    share(s->n * A, id, size, 1, &from, &to);
    for (int64_t i = from; i < to; i++) {
        const int64_t b = i / A, head = i % A, kv = (head - H) % m->kv_heads;
        float *x = s->q + i * K;
        if (head < H + m->kv_heads) turn(m, head < H ? p->q_norm : p->k_norm, x, s->pos[b]);
        if (head >= H)
            remember(s->c, (head < H + m->kv_heads ? s->k : s->v)[b], place(s->c, layer, kv, s->pos[b]), x, K);
    }
}

INLINE vfloat cached(const int bf16, const void *p, int64_t at) {
    return bf16 ? load_bf16((const uint16_t *)p + at) : load((const float *)p + at);
}

INLINE float cached1(const int bf16, const void *p, int64_t at) {
    return bf16 ? bf16_to_float(((const uint16_t *)p)[at]) : ((const float *)p)[at];
}

/* q k^T of R positions one after another, `by` entries apart. */
INLINE void scores(const int bf16, const int R, const float *q, const void *k, int64_t at, int64_t by, int64_t K,
                   float *out) {
    vfloat sum[8];
    int64_t i = 0;
    EACH(r, R) sum[r] = (vfloat){0};
    for (; i + LANES <= K; i += LANES) EACH(r, R) sum[r] += load(q + i) * cached(bf16, k, at + r * by + i);
    totals(R, sum, out);
    for (; i < K; i++) EACH(r, R) out[r] += q[i] * cached1(bf16, k, at + r * by + i);
}

/* N vectors of the weighted sum of values. */
INLINE void values(const int bf16, const int N, const float *p, const void *v, int64_t at, int64_t by, int64_t count,
                   float scale, float *out) {
    vfloat sum[4];
    EACH(i, N) sum[i] = (vfloat){0};
    for (int64_t s = 0; s < count; s++) EACH(i, N) sum[i] += p[s] * cached(bf16, v, at + s * by + i * LANES);
    EACH(i, N) store(out + i * LANES, sum[i] * scale);
}

/* exp(p - max) in place, and 1 / their sum. */
static float soften(float *p, int64_t count) {
    vfloat most = all(-INFINITY);
    float sum, lanes[LANES];
    int64_t i;
    for (i = count; i % LANES; i++) p[i] = -INFINITY;
    for (i = 0; i < count; i += LANES) most = pick(load(p + i) > most, load(p + i), most);
    store(lanes, most);
    float top = lanes[0];
    for (i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    vfloat sums = {0};
    for (i = 0; i < count; i += LANES) {
        const vfloat e = vexp(load(p + i) - top);
        store(p + i, e);
        if (i + LANES <= count) sums += e;
    }
    sum = total(sums);
    for (i = count - count % LANES; i < count; i++) sum += p[i];
    return 1.f / sum;
}

/* Ask for entries `at` to `at` + n of a cache, which the processor does not foresee: each head's lie elsewhere. */
INLINE void fetch(const int bf16, const void *p, int64_t at, int64_t n) {
    const int64_t size = bf16 ? 2 : 4;
    for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch((const char *)p + at * size + i);
}

/* softmax(q k^T scale + bias) v of one head of one text; p has room for the scores. */
INLINE void look(const int bf16, const step *s, int64_t layer, int64_t b, int64_t head, float *p) {
    const model *m = s->m;
    const int64_t K = m->head_dim, pos = s->pos[b], by = s->c->by[2];
    const void *k = s->k[b], *v = s->v[b];
    const int64_t first = m->window && pos + 1 > m->window ? pos + 1 - m->window : 0, count = pos + 1 - first;
    const int64_t at = place(s->c, layer, head / (m->heads / m->kv_heads), first);
    float *q = s->q + (b * (m->heads + 2 * m->kv_heads) + head) * K, *out = s->a + (b * m->heads + head) * K;
    int64_t i = 0;
    fetch(bf16, k, at, (count < 16 ? count : 16) * by);
    for (int64_t j = 0; j < K; j++) q[j] *= (float)m->scale;
    for (; i + 8 <= count; i += 8) {
        if (i + 24 <= count) fetch(bf16, k, at + (i + 16) * by, 8 * by);
        fetch(bf16, v, at + i * by, 8 * by);
        scores(bf16, 8, q, k, at + i * by, by, K, p + i);
    }
    for (; i < count; i++) scores(bf16, 1, q, k, at + i * by, by, K, p + i);
    if (m->slopes)
        for (i = 0; i < count; i++) p[i] -= m->slopes[head] * (float)(count - 1 - i);
    const float scale = soften(p, count);
    for (i = 0; i + 4 * LANES <= K; i += 4 * LANES) values(bf16, 4, p, v, at + i, by, count, scale, out + i);
    for (; i + LANES <= K; i += LANES) values(bf16, 1, p, v, at + i, by, count, scale, out + i);
    for (; i < K; i++) {
        float sum = 0;
        for (int64_t j = 0; j < count; j++) sum += p[j] * cached1(bf16, v, at + j * by + i);
        out[i] = sum * scale;
    }
}

/* Threads take the tokens of long prompts in turn: the later ones see more. */
static void attend(const step *s, int64_t layer, int id, int size, float *p) {
    const int64_t H = s->m->heads, long_ = s->n >= 4 * size;
    int64_t from = id * H, to = s->n * H;
    if (!long_) share(s->n * H, id, size, 1, &from, &to);
    for (int64_t i = from; i < to; i += long_ && i % H == H - 1 ? (size - 1) * H + 1 : 1)
        if (s->c->bf16)
            look(1, s, layer, i / H, i % H, p);
        else
            look(0, s, layer, i / H, i % H, p);
}

INLINE vfloat activation(const int64_t kind, vfloat x, vfloat up) {
    const vfloat positive = pick(x > all(0), x, x * 0.f);
    if (kind == SWIGLU) return x * sigmoid(x) * up;
    if (kind == GELU) return gelu(x);
    if (kind == GELU_TANH) return gelu_tanh(x);
    return kind == RELU ? positive : positive * positive;
}

/* In place, entries that end in the midst of a vector as well. */
static void activate(int64_t kind, float *h, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(h + i, activation(kind, load(h + i), load(up + i)));
    if (i == n) return;
    float end[2][LANES] = {{0}};
    memcpy(end[0], h + i, (size_t)(n - i) * 4);
    memcpy(end[1], up + i, (size_t)(n - i) * 4);
    store(end[0], activation(kind, load(end[0]), load(end[1])));
    memcpy(h + i, end[0], (size_t)(n - i) * 4);
}

static void widen(const step *s, const block *p, int id, int size, float *mine) {
    const model *m = s->m;
    int64_t from, to;
    share(m->ff, id, size, 16, &from, &to);
    normalise_all(s, p->mlp_norm, m->parallel ? s->x : s->y, mine);
    const void *in = inputs(&p->up, mine, s->n * m->d, mine + s->room);
    if (m->mlp == SWIGLU) multiply(&p->gate, from, to, halves(&p->gate) ? in : mine, m->d, s->n, s->h, m->ff);
    multiply(&p->up, from, to, in, m->d, s->n, m->mlp == SWIGLU ? s->h2 : s->h, m->ff);
    for (int64_t b = 0; b < s->n; b++) {
        float *h = s->h + b * m->ff + from;
        activate(m->mlp, h, m->mlp == SWIGLU ? s->h2 + b * m->ff + from : h, to - from);
    }
}

static void plus(const float *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) + load(out + i));
    for (; i < n; i++) out[i] += x[i];
}

/* out = x + W in, this thread's rows. */
static void add(const step *s, const matrix *w, const float *from_in, const float *x, float *out, int id, int size, float *mine) {
    const int64_t d = s->m->d;
    const void *in = inputs(w, from_in, s->n * w->k, mine + s->room);
    int64_t from, to;
    share(d, id, size, 4, &from, &to);
    multiply(w, from, to, in, w->k, s->n, out, d);
    for (int64_t b = 0; b < s->n; b++) plus(x + b * d + from, to - from, out + b * d + from);
}

static void blocks(team *t, int id, int size, void *data) {
    const step *s = data;
    const model *m = s->m;
    float *mine = s->own + id * (s->room + s->packed);
    for (int64_t layer = 0; layer < m->layers; layer++) {
        const block *p = &m->blocks[layer];
        project(s, p, id, size, mine);
        meet(t, size);
        put(s, p, layer, id, size);
        meet(t, size);
        attend(s, layer, id, size, mine);
        meet(t, size);
        add(s, &p->out, s->a, s->x, s->y, id, size, mine);
        meet(t, size);
        widen(s, p, id, size, mine);
        meet(t, size);
        add(s, &p->down, s->h, s->y, s->x, id, size, mine);
        meet(t, size);
    }
    int64_t from, to;
    const int64_t skip = s->n - s->wanted;
    share(m->head.n, id, size, 4, &from, &to);
    normalise_all(s, m->norm, s->x, mine);
    const void *in = inputs(&m->head, mine + skip * m->d, s->wanted * m->d, mine + s->room);
    multiply(&m->head, from, to, in, m->d, s->wanted, s->logits, m->head.n);
    if (m->logits == 1 && !m->softcap) return;
    for (int64_t b = 0; b < s->wanted; b++)
        for (int64_t i = from; i < to; i++) {
            float *y = s->logits + b * m->head.n + i;
            *y *= (float)m->logits;
            if (m->softcap) *y = (float)m->softcap * tanhf(*y / (float)m->softcap);
        }
}

/* x (n, D): the embeddings of n tokens, overwritten; k, v, pos (n,): the cache of each one's text, and where it goes
   there. logits (wanted, V): of the last ones. Returns 0, or -1 where there is no memory. */
int fnlm_step(const model *m, const cache *c, float *x, void *const *k, void *const *v, const int64_t *pos, int64_t n,
              int64_t wanted, float *logits, int64_t threads) {
    const int64_t A = (m->heads + 2 * m->kv_heads) * m->head_dim;
    int64_t longest = 0;
    if (threads > MOST) threads = MOST;
    for (int64_t b = 0; b < n; b++) longest = pos[b] + 1 > longest ? pos[b] + 1 : longest;
    int64_t room = n * m->d > longest + LANES ? n * m->d : longest + LANES;
    room = (room + 31) / 32 * 32;
    int64_t widest = m->d > m->ff ? m->d : m->ff;
    if (m->heads * m->head_dim > widest) widest = m->heads * m->head_dim;
    const int64_t packed = (n * widest / 2 + 63) / 32 * 32;
    const int64_t each = m->d + A + m->heads * m->head_dim + 2 * m->ff;
    float *all = malloc((size_t)(n * each + threads * (room + packed)) * sizeof(float));
    if (!all) return -1;
    step s = {.m = m, .c = c, .x = x, .k = k, .v = v, .pos = pos, .n = n, .wanted = wanted, .room = room, .packed = packed, .logits = logits};
    s.y = all, s.q = s.y + n * m->d, s.a = s.q + n * A, s.h = s.a + n * m->heads * m->head_dim;
    s.h2 = s.h + n * m->ff, s.own = s.h2 + n * m->ff;
    run(blocks, &s, (int)threads);
    free(all);
    return 0;
}

int64_t fnlm_lanes(void) { return LANES; }
