/* Sixteen floats at a time, in the compiler's portable vector types: AVX-512, AVX2 or NEON, whatever -march gives. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* A register of this processor, and how many of its registers the sixteen take. */
#if defined(__AVX512F__)
#define REGISTER_FLOATS 16
#elif defined(__AVX__)
#define REGISTER_FLOATS 8
#else
#define REGISTER_FLOATS 4
#endif
#define REGISTERS (LANES / REGISTER_FLOATS)

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef float reg __attribute__((vector_size(REGISTER_FLOATS * 4), aligned(4), may_alias));
typedef int32_t ireg __attribute__((vector_size(REGISTER_FLOATS * 4), aligned(4), may_alias));

/* What is wider than a register lives in memory, and the compiler takes its comparisons, conversions and shuffles apart
   into single floats. So those, and inner loops, work on registers. */
typedef union {
    vec whole;
    reg part[REGISTERS];
} Parts;

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec splat(float value) { return (vec){} + value; }
INLINE reg choose(ireg mask, reg yes, reg no) { return (reg)((mask & (ireg)yes) | (~mask & (ireg)no)); }

/* exp; below -80 exactly 0, at 0 exactly 1, above 88 as at 88. Cephes' reduction, degree 6. */
INLINE reg reg_exp(reg x) {
    const reg zero = {}, least = zero - 80.0f, most = zero + 88.0f;
    ireg tiny = x < least;
    reg clamped = choose(tiny, zero, choose(x > most, most, x));
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    reg n = (clamped * 1.44269504f + magic) - magic;
    reg r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    reg p = zero + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    ireg power = (__builtin_convertvector(n, ireg) + 127) << 23;
    return choose(tiny, zero, p * (reg)power);
}

INLINE vec vec_exp(vec x) {
    Parts parts = {x};
#pragma GCC unroll 4
    for (int i = 0; i < REGISTERS; i++) parts.part[i] = reg_exp(parts.part[i]);
    return parts.whole;
}

INLINE float exp_one(float x) { return reg_exp((reg){} + x)[0]; }

/* Every lane with the one `apart` lanes from it. */
#if REGISTER_FLOATS == 16
#define SWAPPED(v, apart)                                                                                             \
    __builtin_shufflevector(v, v, 0 ^ apart, 1 ^ apart, 2 ^ apart, 3 ^ apart, 4 ^ apart, 5 ^ apart, 6 ^ apart,        \
                            7 ^ apart, 8 ^ apart, 9 ^ apart, 10 ^ apart, 11 ^ apart, 12 ^ apart, 13 ^ apart,          \
                            14 ^ apart, 15 ^ apart)
#elif REGISTER_FLOATS == 8
#define SWAPPED(v, apart)                                                                                             \
    __builtin_shufflevector(v, v, 0 ^ apart, 1 ^ apart, 2 ^ apart, 3 ^ apart, 4 ^ apart, 5 ^ apart, 6 ^ apart, 7 ^ apart)
#else
#define SWAPPED(v, apart) __builtin_shufflevector(v, v, 0 ^ apart, 1 ^ apart, 2 ^ apart, 3 ^ apart)
#endif

INLINE reg sum_of(reg a, reg b) { return a + b; }
INLINE reg larger(reg a, reg b) { return choose(a > b, a, b); }

/* Sixteen lanes to one, those 8 apart first, then 4, 2 and 1: in a fixed order, so that a result never depends on what
   stands beside it nor on the registers there are. Gives the last two in lanes 0 and 1. */
INLINE reg fold(vec v, reg (*join)(reg, reg)) {
    Parts parts = {v};
#pragma GCC unroll 4
    for (int apart = REGISTERS / 2; apart; apart /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < apart; i++) parts.part[i] = join(parts.part[i], parts.part[i + apart]);
    reg last = parts.part[0];
#if REGISTER_FLOATS == 16
    last = join(last, SWAPPED(last, 8));
#endif
#if REGISTER_FLOATS >= 8
    last = join(last, SWAPPED(last, 4));
#endif
    return join(last, SWAPPED(last, 2));
}

INLINE float vec_sum(vec v) {
    reg last = fold(v, sum_of);
    return last[0] + last[1];
}

INLINE float vec_max(vec v) {
    reg last = fold(v, larger);
    return last[0] > last[1] ? last[0] : last[1];
}
