/* y = W x for a few x at once: W is read from memory once for all of them.

   What an x becomes does not depend on how many there are, nor on how rows are dealt to threads: along k every sum runs
   in LANES parts in the order of k, then these are added, then what is left at the end of a row.
   Where the processor multiplies bfloat16 and W is of it, so are the x (`inputs`). */

enum { FLOAT, BF16, INT8, INT4 };
enum { GROUP = 32, TOGETHER = 8 };
enum { ROWS = 64, NEAR = 3072 }; /* rows that stay in the cache for the next x; bytes of an x that do in the nearest */
#define AHEAD 9216 /* bytes, at least, from what is read to what is fetched: twice as fast as without, on Zen 5 */

/* n rows of k; scale: of a row (INT8) or of GROUP entries of a row (INT4), float or, with `half`, bfloat16. */
typedef struct {
    const void *w, *scale;
    const float *bias;
    int64_t n, k, kind, half;
} matrix;

INLINE float scale_at(const matrix *m, int64_t i) {
    return m->half ? bf16_to_float(((const uint16_t *)m->scale)[i]) : ((const float *)m->scale)[i];
}

INLINE int64_t row_bytes(int kind, int64_t k) {
    return kind == FLOAT ? 4 * k : kind == BF16 ? 2 * k : kind == INT8 ? k : k / 2;
}

INLINE vfloat weights_at(int kind, const char *row, int64_t k) {
    if (kind == FLOAT) return load((const float *)row + k);
    if (kind == BF16) return load_bf16((const uint16_t *)row + k);
    return load_int8((const int8_t *)row + k);
}

INLINE float weight_at(int kind, const char *row, int64_t k) {
    if (kind == FLOAT) return ((const float *)row)[k];
    if (kind == BF16) return bf16_to_float(((const uint16_t *)row)[k]);
    return (float)((const int8_t *)row)[k];
}

/* Steps 0 to 15 stand for -8 to 7 scales; entry i of a group is in the low half of byte i, i + 16 in the high one. */
INLINE vfloat steps_of(vint nibbles, float scale) {
#if LANES == 16
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vfloat)_mm512_permutexvar_ps((__m512i)nibbles, table * scale); /* looks at the low four bits alone */
#else
    return __builtin_convertvector((nibbles & 15) - 8, vfloat) * scale;
#endif
}

INLINE int halves(const matrix *m) { return HALVES && m->kind == BF16; }

static void round_all(uint16_t *to, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_bf16(to + i, load(x + i));
    for (; i < n; i++) to[i] = float_to_bf16(x[i]);
}

/* n numbers as `multiply` takes them for this matrix: themselves, or bfloat16 in `room`. */
static const void *inputs(const matrix *m, const float *x, int64_t n, void *room) {
    if (!halves(m)) return x;
    round_all(room, x, n);
    return room;
}

/* LANES entries of each row times those of each x, added to the sums. */
INLINE void along(const int kind, const int R, const int B, const char *w, int64_t bytes, const float **xs, int64_t k,
                  vfloat *sum) {
    vfloat v[4];
    EACH(r, R) v[r] = weights_at(kind, w + r * bytes, k);
    EACH(b, B) EACH(r, R) sum[r * B + b] += v[r] * load(xs[b] + k);
}

/* As `along`, for 2 LANES entries of bfloat16. */
INLINE void along_halves(const int R, const int B, const char *w, int64_t bytes, const char **xs, int64_t k, vfloat *sum) {
    vfloat v[4];
    EACH(r, R) v[r] = load((const float *)(w + r * bytes + 2 * k));
    EACH(b, B) EACH(r, R) sum[r * B + b] = add_pairs(sum[r * B + b], v[r], load((const float *)(xs[b] + 2 * k)));
}

/* What of k a tile adds up: `from` to `to`, and where the sums wait in between, unless that is all. */
typedef struct {
    int64_t from, to;
    vfloat *sums;
} part;

/* R rows of W times B x, both known to the compiler: the sums stay in registers. Of the B, `count` are there. */
INLINE void tile(const int kind, const int R, const int B, const matrix *m, int64_t row, part p, const void *x,
                 int64_t ldx, int count, float *y, int64_t ldy) {
    const int half = HALVES && kind == BF16;
    const int64_t bytes = row_bytes(kind, m->k);
    const char *w = (const char *)m->w + row * bytes, *packed[TOGETHER];
    const float *xs[TOGETHER];
    const int64_t turn = R * bytes, ahead = (AHEAD + turn - 1) / turn * turn; /* nothing is fetched twice */
    vfloat sum[4 * TOGETHER];
    float scale[4], ends[4 * TOGETHER];
    int64_t k = p.from;
    EACH(b, B) packed[b] = (const char *)x + (b < count ? b : 0) * ldx * (half ? 2 : 4);
    EACH(b, B) xs[b] = (const float *)packed[b];
    if (p.from)
        EACH(r, R) EACH(b, B) sum[r * B + b] = p.sums[r * B + b];
    else
        EACH(r, R) EACH(b, B) sum[r * B + b] = (vfloat){0};
    if (kind == INT4) {
        for (; k < p.to; k += GROUP) {
            EACH(r, R) scale[r] = scale_at(m, (row + r) * (m->k / GROUP) + k / GROUP);
            EACH(r, R) __builtin_prefetch(w + r * bytes + k / 2 + ahead);
            EACH(i, GROUP / LANES) {
                const int high = i * LANES >= GROUP / 2, at = i * LANES - high * (GROUP / 2);
                vfloat v[4];
                EACH(r, R) {
                    vint bits = load_uint8((const uint8_t *)w + r * bytes + k / 2 + at);
                    v[r] = steps_of(high ? bits >> 4 : bits, scale[r]);
                }
                EACH(b, B) EACH(r, R) sum[r * B + b] += v[r] * load(xs[b] + k + i * LANES);
            }
        }
    } else if (half) {
        for (; k + 2 * LANES <= p.to; k += 2 * LANES) {
            EACH(r, R) __builtin_prefetch(w + r * bytes + 2 * k + ahead);
            along_halves(R, B, w, bytes, packed, k, sum);
        }
    } else {
        for (; k + 2 * LANES <= p.to; k += 2 * LANES) {
            EACH(r, R) __builtin_prefetch(w + r * bytes + row_bytes(kind, k) + ahead);
            EACH(i, 2) along(kind, R, B, w, bytes, xs, k + i * LANES, sum);
        }
        if (k + LANES <= p.to) {
            along(kind, R, B, w, bytes, xs, k, sum);
            k += LANES;
        }
    }
    if (p.to < m->k) {
        EACH(r, R) EACH(b, B) p.sums[r * B + b] = sum[r * B + b];
        return;
    }
    totals(R * B, sum, ends);
    for (int r = 0; r < R; r++)
        for (int b = 0; b < count; b++) {
            float s = ends[r * B + b];
            for (int64_t i = k; i < m->k; i++)
                s += weight_at(kind, w + r * bytes, i) * (half ? bf16_to_float(((const uint16_t *)packed[b])[i]) : xs[b][i]);
            if (kind == INT8) s *= scale_at(m, row + r);
            y[b * ldy + row + r] = m->bias ? s + m->bias[row + r] : s;
        }
}

#define TILES(B, R)                                                                                  \
    {                                                                                                \
        int64_t r = from;                                                                            \
        for (; r + R <= to; r += R, p.sums += R * B) tile(kind, R, B, m, r, p, x, ldx, count, y, ldy); \
        for (; r < to; r++, p.sums += B) tile(kind, 1, B, m, r, p, x, ldx, count, y, ldy);           \
    }

INLINE void some(const int kind, const matrix *m, int64_t from, int64_t to, part p, const void *x, int64_t ldx, int count,
                 float *y, int64_t ldy) {
    if (count == 1)
        TILES(1, 4)
    else if (count == 2)
        TILES(2, 4)
    else if (count <= 4)
        TILES(4, 4)
    else
        TILES(8, 2)
}

/* Rows `from` to `to` of W x + bias for each of `count` x, as `inputs` gives them, (count, k) apart by ldx -> (count, n)
   apart by ldy. Where eight x do not stay in the nearest cache beside the rows, they are taken in parts along k. */
static void multiply(const matrix *m, int64_t from, int64_t to, const void *x, int64_t ldx, int64_t count, float *y,
                     int64_t ldy) {
    vfloat sums[ROWS * TOGETHER];
    const int size = halves(m) ? 2 : 4;
    const int64_t fits = count > TOGETHER / 2 ? NEAR / size : m->k, step = m->k > fits + fits / 2 ? fits : m->k;
    const int64_t block = count > TOGETHER || step < m->k ? ROWS : to - from;
    for (int64_t row = from; row < to; row += block)
        for (int64_t b = 0; b < count; b += TOGETHER)
            for (int64_t k = 0; k < m->k; k += step) {
                const int few = count - b < TOGETHER ? (int)(count - b) : TOGETHER;
                const int64_t end = row + block < to ? row + block : to;
                const part p = {k, k + step < m->k ? k + step : m->k, sums};
                const void *xb = (const char *)x + b * ldx * size;
                float *yb = y + b * ldy;
                switch (m->kind) {
                    case FLOAT: some(FLOAT, m, row, end, p, xb, ldx, few, yb, ldy); break;
                    case BF16: some(BF16, m, row, end, p, xb, ldx, few, yb, ldy); break;
                    case INT8: some(INT8, m, row, end, p, xb, ldx, few, yb, ldy); break;
                    case INT4: some(INT4, m, row, end, p, xb, ldx, few, yb, ldy); break;
                }
            }
}
