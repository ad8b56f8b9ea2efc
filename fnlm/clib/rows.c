/* Norms and activations of a training step, and their gradients: one pass over the rows each, float or bfloat16.

   The arithmetic is float. Rows are dealt in blocks of a fixed size, and the sums over rows (gradients of weights) are
   those of the blocks, added in their order: no result depends on the number of threads. */

#pragma GCC optimize("O3") /* vectors of all loops, as Clang makes of its -O2 */

#include "vector.h"
#include "team.h"

enum { BLOCK = 64, PIECE = 1 << 13 }; /* rows of a norm; elements of an activation */

/* x, y, g, d_x, more (rows, n), n a multiple of LANES; weight, bias (n,) or NULL, in x's type; stats (rows, 2): the mean, and 1 / deviation.
   d_weight, d_bias (blocks, n) float, or NULL; `more` is added to d_x, or NULL. d_x may be g. */
typedef struct {
    const void *x, *weight, *bias, *g, *more;
    void *y, *d_x;
    float *stats, *d_weight, *d_bias;
    int64_t rows, n, kind, bf16;
    double eps;
} norm;

/* n elements, a multiple of LANES. y = f(a), or f(a, up), where y is not NULL; d_a and d_up, where d_a is not NULL: the
   gradients from that of y, g, or with g NULL the factors that it is to be multiplied by. */
typedef struct {
    const void *a, *up, *g;
    void *y, *d_a, *d_up;
    int64_t n, kind, bf16;
} activation;

typedef struct {
    const void *what;
    atomic_llong next;
    int64_t pieces;
} job;

INLINE vfloat get(const void *p, int64_t i, const int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : load((const float *)p + i);
}

INLINE void put(void *p, int64_t i, vfloat x, const int bf16) {
    if (bf16)
        store_bf16((uint16_t *)p + i, x);
    else
        store((float *)p + i, x);
}

INLINE void norm_row(const norm *m, int64_t row, const int bf16) {
    const int64_t n = m->n, at = row * n;
    vfloat sum = {0}, square = {0};
    float mean = 0;
    if (m->kind == LAYERNORM) {
        for (int64_t i = 0; i < n; i += LANES) sum += get(m->x, at + i, bf16);
        mean = total(sum) / (float)n;
    }
    for (int64_t i = 0; i < n; i += LANES) {
        const vfloat far = get(m->x, at + i, bf16) - mean;
        square += far * far;
    }
    const float rate = 1.f / sqrtf(total(square) / (float)n + (float)m->eps);
    for (int64_t i = 0; i < n; i += LANES) {
        vfloat y = (get(m->x, at + i, bf16) - mean) * rate;
        if (m->weight) y *= get(m->weight, i, bf16);
        if (m->bias) y += get(m->bias, i, bf16);
        put(m->y, at + i, y, bf16);
    }
    m->stats[2 * row] = mean, m->stats[2 * row + 1] = rate;
}

/* rate (g w - mean(g w) - y mean(g w y)) + more, y the norm without weights. */
INLINE void norm_row_back(const norm *m, int64_t row, float *d_weight, float *d_bias, const int bf16) {
    const int64_t n = m->n, at = row * n;
    const float mean = m->stats[2 * row], rate = m->stats[2 * row + 1];
    vfloat sum = {0}, along = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        const vfloat g = get(m->g, at + i, bf16), y = (get(m->x, at + i, bf16) - mean) * rate;
        const vfloat gw = m->weight ? g * get(m->weight, i, bf16) : g;
        sum += gw, along += gw * y;
        if (d_weight) store(d_weight + i, load(d_weight + i) + g * y);
        if (d_bias) store(d_bias + i, load(d_bias + i) + g);
    }
    const float middle = m->kind == LAYERNORM ? total(sum) / (float)n : 0.f, slope = total(along) / (float)n;
    for (int64_t i = 0; i < n; i += LANES) {
        const vfloat g = get(m->g, at + i, bf16), y = (get(m->x, at + i, bf16) - mean) * rate;
        vfloat d = rate * ((m->weight ? g * get(m->weight, i, bf16) : g) - middle - y * slope);
        if (m->more) d += get(m->more, at + i, bf16);
        put(m->d_x, at + i, d, bf16);
    }
}

INLINE void norm_block(const norm *m, int64_t block, const int bf16) {
    const int64_t from = block * BLOCK, to = from + BLOCK < m->rows ? from + BLOCK : m->rows;
    if (!m->g) {
        for (int64_t row = from; row < to; row++) norm_row(m, row, bf16);
        return;
    }
    float *d_weight = m->d_weight ? m->d_weight + block * m->n : NULL;
    float *d_bias = m->d_bias ? m->d_bias + block * m->n : NULL;
    if (d_weight) memset(d_weight, 0, (size_t)m->n * 4);
    if (d_bias) memset(d_bias, 0, (size_t)m->n * 4);
    for (int64_t row = from; row < to; row++) norm_row_back(m, row, d_weight, d_bias, bf16);
}

static void norms(team *t, int id, int size, void *data) {
    (void)t, (void)id, (void)size;
    job *j = data;
    const norm *m = j->what;
    for (long long at; (at = atomic_fetch_add(&j->next, 1)) < j->pieces;)
        if (m->bf16)
            norm_block(m, at, 1);
        else
            norm_block(m, at, 0);
}

/* What is not a number stays none. */
INLINE vfloat positive(vfloat x) { return pick(x <= 0.f, all(0.f), x); }

/* f(x) and f'(x); of SwiGLU f is silu. */
INLINE void value_and_slope(const int kind, vfloat x, vfloat *value, vfloat *slope) {
    if (kind == GELU) { /* Phi as gelu in vector.h has it */
        const vfloat z = x * 0.70710678f, a = pick(z < 0.f, -z, z), e = vexp(-a * a), t = 1.f / (1.f + 0.3275911f * a);
        const vfloat tail = e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        const vfloat phi = 0.5f * pick(x < 0.f, tail, 2.f - tail);
        *value = x * phi, *slope = phi + x * 0.39894228f * e;
    } else if (kind == GELU_TANH) {
        const vfloat s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        *value = x * s, *slope = s + x * s * (1.f - s) * 1.5957691216f * (1.f + 0.134145f * x * x);
    } else if (kind == SWIGLU) {
        const vfloat s = sigmoid(x);
        *value = x * s, *slope = s + x * s * (1.f - s);
    } else {
        const vfloat r = positive(x);
        *value = kind == RELU ? r : r * r, *slope = kind == RELU ? pick(x <= 0.f, all(0.f), all(1.f)) : 2.f * r;
    }
}

INLINE void activate(const activation *m, int64_t from, int64_t to, const int kind, const int bf16) {
    const void *const in = m->a, *const ups = m->up, *const gs = m->g;
    void *const y = m->y, *const d_a = m->d_a, *const d_up = m->d_up;
    for (int64_t i = from; i < to; i += LANES) {
        const vfloat up = kind == SWIGLU ? get(ups, i, bf16) : all(1.f);
        vfloat value, slope;
        value_and_slope(kind, get(in, i, bf16), &value, &slope);
        if (y) put(y, i, value * up, bf16);
        if (!d_a) continue;
        const vfloat g = gs ? get(gs, i, bf16) : all(1.f);
        put(d_a, i, g * up * slope, bf16);
        if (kind == SWIGLU) put(d_up, i, g * value, bf16);
    }
}

#define KINDS(bf16)                                                              \
    switch (m->kind) {                                                           \
        case GELU: activate(m, from, to, GELU, bf16); break;                     \
        case GELU_TANH: activate(m, from, to, GELU_TANH, bf16); break;           \
        case RELU: activate(m, from, to, RELU, bf16); break;                     \
        case RELU2: activate(m, from, to, RELU2, bf16); break;                   \
        case SWIGLU: activate(m, from, to, SWIGLU, bf16); break;                 \
    }

static void activations(team *t, int id, int size, void *data) {
    (void)t, (void)id, (void)size;
    job *j = data;
    const activation *m = j->what;
    for (long long at; (at = atomic_fetch_add(&j->next, 1)) < j->pieces;) {
        const int64_t from = at * PIECE, to = from + PIECE < m->n ? from + PIECE : m->n;
        if (m->bf16)
            KINDS(1)
        else
            KINDS(0)
    }
}

/* Rows and elements come in multiples of this. */
int64_t fnlm_lanes(void) { return LANES; }

/* The blocks whose sums d_weight and d_bias hold. */
int64_t fnlm_norm_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

void fnlm_norm(const norm *m, int64_t threads) {
    job j = {.what = m, .pieces = fnlm_norm_blocks(m->rows)};
    run(norms, &j, (int)threads);
}

void fnlm_activate(const activation *m, int64_t threads) {
    job j = {.what = m, .pieces = (m->n + PIECE - 1) / PIECE};
    run(activations, &j, (int)threads);
}
