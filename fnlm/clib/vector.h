/* Vectors of floats in the compiler's own extension (GCC, Clang), so that one text serves every processor.

   LANES floats fill a register; -DFNLM_PORTABLE takes four, which every processor has. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && !defined(FNLM_PORTABLE)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && !defined(FNLM_PORTABLE)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* As fnlm/clib/rows.py numbers them. */
enum { PLAIN, LAYERNORM, RMSNORM };
enum { GELU, GELU_TANH, RELU, RELU2, SWIGLU };

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));
typedef int8_t vbyte __attribute__((vector_size(LANES)));
typedef uint8_t vubyte __attribute__((vector_size(LANES)));

INLINE vfloat load(const float *p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vfloat v) { memcpy(p, &v, sizeof v); }

INLINE vfloat all(float x) { return x - (vfloat){0}; }

INLINE vfloat load_bf16(const uint16_t *p) {
    vhalf h;
    memcpy(&h, p, sizeof h);
#if LANES == 16
    vuint u = (vuint)_mm512_cvtepu16_epi32((__m256i)h);
#elif LANES == 8
    vuint u = (vuint)_mm256_cvtepu16_epi32((__m128i)h);
#else
    vuint u = __builtin_convertvector(h, vuint);
#endif
    return (vfloat)(u << 16);
}

INLINE vfloat load_int8(const int8_t *p) {
    vbyte b;
    memcpy(&b, p, sizeof b);
#if LANES == 16
    vint i = (vint)_mm512_cvtepi8_epi32((__m128i)b);
#elif LANES == 8
    vint i = (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vint i = __builtin_convertvector(b, vint);
#endif
    return __builtin_convertvector(i, vfloat);
}

INLINE vint load_uint8(const uint8_t *p) {
    vubyte b;
    memcpy(&b, p, sizeof b);
#if LANES == 16
    return (vint)_mm512_cvtepu8_epi32((__m128i)b);
#elif LANES == 8
    return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(b, vint);
#endif
}

INLINE float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* To nearest, ties to even, as torch rounds; NaN stays one. */
INLINE uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if (f != f) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE void store_bf16(uint16_t *p, vfloat v) {
#if LANES == 16 && defined(__AVX512BF16__)
    const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    for (int i = 0; i < LANES; i++) p[i] = float_to_bf16(v[i]);
#endif
}

/* bfloat16 in the lower half of each lane. */
INLINE vuint bf16_bits(vfloat v) {
#if LANES == 16 && defined(__AVX512BF16__)
    return (vuint)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    vuint bits;
    for (int i = 0; i < LANES; i++) bits[i] = float_to_bf16(v[i]);
    return bits;
#endif
}

/* sum + a b, of pairs of bfloat16 in each lane; HALVES: whether the processor can. */
#if LANES == 16 && defined(__AVX512BF16__)
enum { HALVES = 1 };
INLINE vfloat add_pairs(vfloat sum, vfloat a, vfloat b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
enum { HALVES = 0 };
INLINE vfloat add_pairs(vfloat sum, vfloat a, vfloat b) { return sum + a * b; } /* never called */
#endif

INLINE float total(vfloat v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}

#if LANES == 16
/* Sums of halves, as total takes them, of a and b beside each other. */
INLINE __m512 fold(const int step, __m512 a, __m512 b) {
    if (step == 0) return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    if (step == 1) return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    if (step == 2) return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

INLINE __m512 fold4(const vfloat *v) {
    return fold(1, fold(0, (__m512)v[0], (__m512)v[1]), fold(0, (__m512)v[2], (__m512)v[3]));
}
#endif

/* total of each of n vectors, to the bit; of 8 or 16 in a third of the instructions. */
INLINE void totals(const int n, const vfloat *v, float *out) {
    int i = 0;
#if LANES == 16
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (; i + 8 <= n; i += i + 16 <= n ? 16 : 8) {
        const __m512 first = fold(2, fold4(v + i), fold4(v + i + 4));
        const __m512 second = i + 16 <= n ? fold(2, fold4(v + i + 8), fold4(v + i + 12)) : first;
        const __m512 all = _mm512_permutexvar_ps(order, fold(3, first, second));
        memcpy(out + i, &all, i + 16 <= n ? 64 : 32);
    }
#endif
    for (; i < n; i++) out[i] = total(v[i]);
}

INLINE vfloat pick(vint mask, vfloat yes, vfloat no) { return (vfloat)((mask & (vint)yes) | (~mask & (vint)no)); }

/* exp, to 2e-7 of itself: 2^n times a polynomial on half a power of two either side (Cephes' coefficients). */
INLINE vfloat vexp(vfloat x) {
#if LANES == 16
    x = (vfloat)_mm512_max_ps((__m512)all(-87.f), (__m512)x); /* the second, x, where it is not a number */
    const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    const vfloat magic = all(12582912.f);
    x = pick(x < all(-87.f), all(-87.f), x);
    x = pick(x > all(88.f), all(88.f), x);
    const vfloat n = (x * 1.44269504f + magic) - magic;
#endif
    vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vfloat p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
#if LANES == 16
    return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vfloat)((__builtin_convertvector(n, vint) + 127) << 23);
#endif
}

INLINE vfloat sigmoid(vfloat x) { return 1.f / (1.f + vexp(-x)); }

/* x Phi(x), from erfc by Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most. */
INLINE vfloat gelu(vfloat x) {
    vfloat z = x * 0.70710678f, a = pick(z < 0.f, -z, z);
    vfloat t = 1.f / (1.f + 0.3275911f * a);
    vfloat p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    vfloat tail = p * vexp(-a * a);
    return 0.5f * x * pick(x < 0.f, tail, 2.f - tail);
}

/* 0.5 x (1 + tanh u) = x sigmoid(2 u). */
INLINE vfloat gelu_tanh(vfloat x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }
