/* Heads of queries, keys and values as rows of floats: norm, rotation, and their gradients; products of small matrices.

   Rows have `wide` columns, K of them used: a multiple of 2 LANES, the others 0. What is multiplied lies in cells of four
   bytes, a float or, with `half`, two bfloat16 that follow each other along the sum. */

enum { ROWS = LANES == 16 ? 8 : 4, COLS = 2 * LANES };

INLINE int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

INLINE vfloat multiplied(vfloat sum, float a, vfloat b, const int half) {
    return half ? add_pairs(sum, all(a), b) : sum + a * b;
}

/* Rows of floats as cells: as they are, or two neighbours in one. */
INLINE void cells_of_rows(const float *from, int64_t rows, int64_t cols, int64_t ld, float *to, int64_t ldt, const int half) {
    for (int64_t i = 0; i < rows; i++)
        if (half)
            for (int64_t j = 0; j < cols; j += LANES) store_bf16((uint16_t *)(to + i * ldt) + j, load(from + i * ld + j));
        else
            memcpy(to + i * ldt, from + i * ld, (size_t)cols * 4);
}

/* Rows of floats as cells: as they are, or what stands below each other in one. */
INLINE void cells_of_pairs(const float *from, int64_t rows, int64_t cols, int64_t ld, float *to, int64_t ldt, const int half) {
    if (!half) {
        cells_of_rows(from, rows, cols, ld, to, ldt, 0);
        return;
    }
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < cols; j += LANES) {
            const vuint upper = bf16_bits(load(from + i * ld + j)), lower = bf16_bits(load(from + (i + 1) * ld + j));
            store(to + i / 2 * ldt + j, (vfloat)(upper | lower << 16));
        }
}

/* ROWS x COLS of C = A B, or added to C; cell (i, j) of A is at a[i * down + j * right]. */
INLINE void product_tile(const float *a, int64_t down, int64_t right, const float *b, int64_t ldb, float *c, int64_t ldc,
                         int64_t inner, const int add, const int half) {
    vfloat sum[ROWS][2];
    EACH(i, ROWS) EACH(h, 2) sum[i][h] = add ? load(c + i * ldc + h * LANES) : (vfloat){0};
    for (int64_t j = 0; j < inner; j++) {
        const vfloat left = load(b + j * ldb), next = load(b + j * ldb + LANES);
        EACH(i, ROWS) {
            const float x = a[i * down + j * right];
            sum[i][0] = multiplied(sum[i][0], x, left, half);
            sum[i][1] = multiplied(sum[i][1], x, next, half);
        }
    }
    EACH(i, ROWS) EACH(h, 2) store(c + i * ldc + h * LANES, sum[i][h]);
}

/* C (rows x cols) = A B, or added to C; rows and cols are multiples of ROWS and COLS, `inner` counts cells. */
INLINE void product(const float *a, int64_t down, int64_t right, const float *b, int64_t ldb, float *c, int64_t ldc,
                    int64_t rows, int64_t cols, int64_t inner, const int add, const int half) {
    for (int64_t j = 0; j < cols; j += COLS)
        for (int64_t i = 0; i < rows; i += ROWS)
            product_tile(a + i * down, down, right, b + j, ldb, c + i * ldc + j, ldc, inner, add, half);
}

INLINE void widen(const void *from, int64_t at, int bf16, float *to, int64_t n) {
    if (!bf16) {
        memcpy(to, (const float *)from + at, (size_t)n * 4);
        return;
    }
    const int64_t whole = n - n % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, load_bf16((const uint16_t *)from + at + i));
    for (int64_t i = whole; i < n; i++) to[i] = bf16_to_float(((const uint16_t *)from)[at + i]);
}

INLINE void narrow(void *to, int64_t at, int bf16, const float *from, int64_t n) {
    if (!bf16) {
        memcpy((float *)to + at, from, (size_t)n * 4);
        return;
    }
    const int64_t whole = n - n % LANES;
    for (int64_t i = 0; i < whole; i += LANES) store_bf16((uint16_t *)to + at + i, load(from + i));
    for (int64_t i = whole; i < n; i++) ((uint16_t *)to)[at + i] = float_to_bf16(from[i]);
}

/* The sum of x[i] y[i]; in LANES parts, then what is left. */
INLINE float dot(const float *x, const float *y, int64_t n) {
    const int64_t whole = n - n % LANES;
    vfloat sum = {0};
    for (int64_t i = 0; i < whole; i += LANES) sum += load(x + i) * load(y + i);
    float s = total(sum);
    for (int64_t i = whole; i < n; i++) s += x[i] * y[i];
    return s;
}

/* The mean of x, which LayerNorm takes away; 0 for other norms. */
INLINE float mean_of(const float *x, int64_t n, int norm) {
    if (norm != LAYERNORM) return 0.f;
    const int64_t whole = n - n % LANES;
    vfloat sum = {0};
    for (int64_t i = 0; i < whole; i += LANES) sum += load(x + i);
    float s = total(sum);
    for (int64_t i = whole; i < n; i++) s += x[i];
    return s / (float)n;
}

/* x becomes its norm without weights (y); returns what it was multiplied by. */
INLINE float normalise(float *x, int64_t n, int norm, float eps) {
    const float mean = mean_of(x, n, norm);
    for (int64_t i = 0; i < n; i++) x[i] -= mean;
    const float rate = 1.f / sqrtf(dot(x, x, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) x[i] *= rate;
    return rate;
}

/* g becomes the gradient of x from that of its norm y: rate (g - mean g - y mean(g y)). */
INLINE void normalise_back(float *g, const float *y, float rate, int64_t n, int norm) {
    const float mean = mean_of(g, n, norm), along = dot(g, y, n) / (float)n;
    for (int64_t i = 0; i < n; i++) g[i] = rate * (g[i] - mean - y[i] * along);
}

/* RoPE on one head, in place; `turn` -1 turns back. Tables are a row each of (T, R): sin is negative in its first half. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t rope, float turn) {
    const int64_t half = rope / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] + turn * sin[i] * second;
        x[i + half] = second * cos[i + half] + turn * sin[i + half] * first;
    }
}
