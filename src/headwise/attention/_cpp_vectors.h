// Vectors of floats for the kernels of this folder: loads, exp, products of blocks, and squares turned over.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float vec __attribute__((vector_size(W * 4)));
typedef float loose __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));

static inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }
static inline vec splat(float x) { return vec{} + x; }

// Lanes I to I + W - 1 of two neighbouring vectors: cheaper than loading across the edge of a cache line each time.
template <int I>
static inline vec slide(vec low, vec high) {
#if defined(__AVX512F__)
    return reinterpret_cast<vec>(_mm512_alignr_epi32(reinterpret_cast<__m512i>(high), reinterpret_cast<__m512i>(low), I));
#else
    float both[2 * W];
    store(both, low);
    store(both + W, high);
    return load(both + I);
#endif
}

// exp(x) for x <= 0; exactly 0 below -87, and NaN stays NaN.
static inline vec exponential(vec x) {
    const vec low = splat(-87.0f);
    vec y = x < low ? low : x;
    const vec magic = splat(12582912.0f);
    vec n = y * 1.44269504088896341f + magic;
    n = n - magic;
    vec f = y - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    ivec e = (__builtin_convertvector(n, ivec) + 127) << 23;
    vec power;
    std::memcpy(&power, &e, sizeof power);
    vec r = p * power;
    return x < low ? vec{} : r;
}

#if defined(__AVX512F__)
constexpr bool SLIDES = true;
#else
constexpr bool SLIDES = false;
#endif

template <int... I>
static inline void add_slid(vec* acc, vec x, vec low, vec high, std::integer_sequence<int, I...>) {
    ((acc[I] += x * slide<I>(low, high)), ...);
}

template <int... I>
static inline vec sum_slid(vec acc, const vec* x, vec low, vec high, std::integer_sequence<int, I...>) {
    ((acc += x[I] * slide<I>(low, high)), ...);
    return acc;
}

// acc[i] += a[d] * b[d * step + i * next ...] over d, where b is a vector (shifted) or one number (broadcast).
template <int N, bool SHIFTED>
static inline void products(const float* a, const float* b, long step, long next, long count, float* out) {
    vec acc[N];
    for (int i = 0; i < N; ++i) acc[i] = vec{};
    for (long d = 0; d < count; ++d) {
        const vec x = load(a + d * W);
        if (SHIFTED && SLIDES) {  // next is 1
            const float* from = b + d * step;
            add_slid(acc, x, load(from), load(from + W), std::make_integer_sequence<int, N>{});
            continue;
        }
        for (int i = 0; i < N; ++i) {
            if (SHIFTED)
                acc[i] += x * load(b + d * step + i * next);
            else
                acc[i] += x * b[d * step + i * next];
        }
    }
    for (int i = 0; i < N; ++i) store(out + i * W, acc[i]);
}

template <bool SHIFTED>
static void all_products(const float* a, const float* b, long step, long next, long count, float* out, long many) {
    long i = 0;
    for (; i + 8 <= many; i += 8) products<8, SHIFTED>(a, b + i * next, step, next, count, out + i * W);
    const float* rest = b + i * next;
    float* to = out + i * W;
    switch (many - i) {  // all that are left at once: one accumulator alone waits for itself
        case 1: return products<1, SHIFTED>(a, rest, step, next, count, to);
        case 2: return products<2, SHIFTED>(a, rest, step, next, count, to);
        case 3: return products<3, SHIFTED>(a, rest, step, next, count, to);
        case 4: return products<4, SHIFTED>(a, rest, step, next, count, to);
        case 5: return products<5, SHIFTED>(a, rest, step, next, count, to);
        case 6: return products<6, SHIFTED>(a, rest, step, next, count, to);
        case 7: return products<7, SHIFTED>(a, rest, step, next, count, to);
        default: return;
    }
}

// out[e] += sum over keys of weight * value, N channels at a time; rows of keys lie `row` apart.
template <int N, bool SHIFTED>
static inline void weighted(const float* p, const float* const* rows, long many, long keys, long step, long next,
                            float* out) {
    vec acc[N];
    for (int i = 0; i < N; ++i) acc[i] = vec{};
    for (long r = 0; r < many; ++r) {
        const float* v = rows[r];
        long j = 0;
        if (SHIFTED && SLIDES) {  // step is 1
            for (; j + 7 <= keys; j += 7, p += 7 * W) {
                vec x[7];
                for (int i = 0; i < 7; ++i) x[i] = load(p + i * W);
                for (int i = 0; i < N; ++i) {
                    const float* from = v + j + i * next;
                    acc[i] = sum_slid(acc[i], x, load(from), load(from + W), std::make_integer_sequence<int, 7>{});
                }
            }
            for (; j + 3 <= keys; j += 3, p += 3 * W) {
                vec x[3];
                for (int i = 0; i < 3; ++i) x[i] = load(p + i * W);
                for (int i = 0; i < N; ++i) {
                    const float* from = v + j + i * next;
                    acc[i] = sum_slid(acc[i], x, load(from), load(from + W), std::make_integer_sequence<int, 3>{});
                }
            }
        }
        for (; j < keys; ++j, p += W) {
            const vec x = load(p);
            for (int i = 0; i < N; ++i) {
                if (SHIFTED)
                    acc[i] += x * load(v + j * step + i * next);
                else
                    acc[i] += x * v[j * step + i * next];
            }
        }
    }
    for (int i = 0; i < N; ++i) store(out + i * W, acc[i]);
}

template <bool SHIFTED>
static void all_weighted(const float* p, std::vector<const float*>& rows, long keys, long step, long next,
                         long channels, float* out) {
    long e = 0;
    const long many = static_cast<long>(rows.size());
    for (; e + 8 <= channels; e += 8) {
        weighted<8, SHIFTED>(p, rows.data(), many, keys, step, next, out + e * W);
        for (auto& row : rows) row += 8 * next;
    }
    for (; e < channels; ++e) {
        weighted<1, SHIFTED>(p, rows.data(), many, keys, step, next, out + e * W);
        for (auto& row : rows) row += next;
    }
}

// W rows of W numbers to W columns: to[c][r] = from[r][c].
static inline void square(const float* const* from, float* const* to) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from[i]);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    const auto pairs = [](__m512 x, __m512 y, bool high) {
        const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
    };
    for (int i = 0; i < 16; i += 4) {  // r[i + c]: columns c, 4 + c, 8 + c, 12 + c of rows i to i + 3
        r[i] = pairs(t[i], t[i + 2], false);
        r[i + 1] = pairs(t[i], t[i + 2], true);
        r[i + 2] = pairs(t[i + 1], t[i + 3], false);
        r[i + 3] = pairs(t[i + 1], t[i + 3], true);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_ps(to[i], _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(to[i + 8], _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    }
#else
    for (int r = 0; r < W; ++r)
        for (int c = 0; c < W; ++c) to[c][r] = from[r][c];
#endif
}

// The sums of the lanes of W vectors, as one.
static inline vec lane_sums(const vec* x) {
#if defined(__AVX512F__)
    // Four vectors are folded into one with their sums in each quarter, and four of those into one again.
    const auto fold = [](vec x, vec y) {
        const __m512 a = reinterpret_cast<__m512>(x), b = reinterpret_cast<__m512>(y);
        return _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    };
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512d a = fold(x[4 * i], x[4 * i + 1]), b = fold(x[4 * i + 2], x[4 * i + 3]);
        four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    };
    const __m512 a = halves(four[0], four[1]), b = halves(four[2], four[3]);
    return reinterpret_cast<vec>(_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
#else
    vec sums;
    for (int i = 0; i < W; ++i) {
        float sum = 0;
        for (int j = 0; j < W; ++j) sum += x[i][j];
        sums[i] = sum;
    }
    return sums;
#endif
}

// [rows, columns] to [columns, rows], rows `step` apart.
static void turn(const float* from, long rows, long columns, float* to, long step) {
    const long squares = SLIDES ? columns / W * W : 0;
    const float* lines[W];
    float* targets[W];
    for (long r = 0; r < rows; r += W) {
        const long last = r + W < rows ? r + W : rows;
        long c = 0;
        for (; last - r == W && c < squares; c += W) {
            for (int i = 0; i < W; ++i) lines[i] = from + (r + i) * columns + c, targets[i] = to + (c + i) * step + r;
            square(lines, targets);
        }
        for (; c < columns; ++c)
            for (long i = r; i < last; ++i) to[c * step + i] = from[i * columns + c];
    }
}

static float* aligned(float* p) {
    const std::uintptr_t size = W * sizeof(float), at = reinterpret_cast<std::uintptr_t>(p);
    return reinterpret_cast<float*>((at + size - 1) / size * size);
}
