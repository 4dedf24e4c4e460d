/* Sixteen floats at a time, in the compiler's portable vector types: AVX-512, AVX2 or NEON, whatever -march gives. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec splat(float value) { return (vec){} + value; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* exp; below -80 exactly 0, at 0 exactly 1, above 88 as at 88. Cephes' reduction, degree 6. */
INLINE vec vec_exp(vec x) {
    ivec tiny = x < splat(-80.0f);
    vec clamped = choose(tiny, splat(0.0f), choose(x > splat(88.0f), splat(88.0f), x));
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    vec n = (clamped * 1.44269504f + magic) - magic;
    vec r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return choose(tiny, splat(0.0f), p * (vec)power);
}

INLINE float exp_one(float x) { return vec_exp(splat(x))[0]; }

/* Every lane with the one `apart` lanes from it. */
#define SWAPPED(v, apart)                                                                                             \
    __builtin_shufflevector(v, v, 0 ^ apart, 1 ^ apart, 2 ^ apart, 3 ^ apart, 4 ^ apart, 5 ^ apart, 6 ^ apart,        \
                            7 ^ apart, 8 ^ apart, 9 ^ apart, 10 ^ apart, 11 ^ apart, 12 ^ apart, 13 ^ apart,          \
                            14 ^ apart, 15 ^ apart)

/* In a fixed order, so that a result never depends on what stands beside it. */
INLINE float vec_sum(vec v) {
    v += SWAPPED(v, 8);
    v += SWAPPED(v, 4);
    v += SWAPPED(v, 2);
    return v[0] + v[1];
}

INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE float vec_max(vec v) {
    v = larger(v, SWAPPED(v, 8));
    v = larger(v, SWAPPED(v, 4));
    v = larger(v, SWAPPED(v, 2));
    return v[0] > v[1] ? v[0] : v[1];
}
