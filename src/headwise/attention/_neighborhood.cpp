// Neighbourhood attention, forward, float32: 16 neighbouring queries of one row are one vector.
//
// Grids of one to three axes (missing ones have length 1), one dilation group at a time. For every query the window of
// an axis is [start, stop). Two ways to form the scores of a block of queries along the last axis:
//  - shifted: the windows of the lanes are neighbours too (start[lane] = start[0] + lane), so the keys that lane after
//    lane needs lie side by side in a copy of the keys with channels outside: no multiplication is wasted;
//  - broadcast: any windows; every key of their union meets every lane and what a lane does not see is masked. Where a
//    block has few lanes, as at the edges of a grid, several rows share a vector.
// The softmax keeps the scores of the block (keys x lanes), subtracts the maximum, and divides at the end.

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

struct Block {
    long first, lanes;
    bool shifted;
};

static inline ivec splat_int(long x) { return ivec{} + static_cast<int32_t>(x); }

extern "C" int headwise_neighborhood_lanes() { return W; }

// q [b h X Y Z d], k [b n X Y Z d], v [b n X Y Z e], out [b h X Y Z e], lse [b h X Y Z], all contiguous.
// bias: null or [h, 2 kernel0 - 1, 2 kernel1 - 1, 2 kernel2 - 1]. windows: start and stop of axis 0, 1, 2 in turn.
// Works on items [begin, end) of b * n * parts: one key head and one part of axis 0 (or of axis 1 where 0 is short).
extern "C" void headwise_neighborhood_forward(const float* q, const float* k, const float* v, float* out, float* lse,
                                              const float* bias, const long* sizes, const int* const* windows,
                                              const long* kernel, float scale, long parts, long begin, long end) {
    const long h = sizes[1], n = sizes[2], X = sizes[3], Y = sizes[4], Z = sizes[5], D = sizes[6], E = sizes[7];
    const int *start0 = windows[0], *stop0 = windows[1], *start1 = windows[2], *stop1 = windows[3];
    const int *start2 = windows[4], *stop2 = windows[5];
    const long rows = X * Y, N = rows * Z, group = h / n;
    const long lines = (Z + W + W - 1) / W, padded = (lines | 1) * W;  // an odd number: no two channels in one set

    // Blocks of the last axis: runs of windows that move by one are shifted where they fill a vector.
    std::vector<Block> blocks;
    const bool shifts = stop2[Z / 2] - start2[Z / 2] < 64;
    const auto run_from = [&](long z, long most) {  // how many windows from z on, up to `most`, move by one
        long length = 1;
        while (length < most && z + length < Z && start2[z + length] == start2[z + length - 1] + 1 &&
               stop2[z + length] == stop2[z + length - 1] + 1)
            ++length;
        return length;
    };
    long z = 0;
    while (z < Z) {
        const long length = shifts ? run_from(z, Z) : 1;
        if (length >= W) {
            // A few that are left over go with the edge after them, which has lanes to spare.
            const long left = length % W, edge = Z - z - length;
            const long whole = left + edge <= W / 2 ? length - left : length;
            for (long at = z; at < z + whole; at += W) {
                const long last = z + whole - W;
                blocks.push_back({at < last ? at : last, W, true});
            }
            z += whole;
            continue;
        }
        // up to the next long run, in blocks of any windows
        long until = z + 1;
        while (until < Z && until - z < W && !(shifts && run_from(until, W) >= W)) ++until;
        blocks.push_back({z, until - z, false});
        z = until;
    }
    bool any_shifted = false;
    for (const Block& block : blocks) any_shifted |= block.shifted;

    float *turned_k = nullptr, *turned_v = nullptr;
    std::vector<float> store_k, store_v, lanes_q(D * W), lanes_out(E * W), scores;
    std::vector<const float*> values;
    long loaded = -1;
    for (long item = begin; item < end; ++item) {
        const long part = item % parts, pair = item / parts, batch = pair / n, kv = pair % n;
        const float* keys = k + pair * N * D;
        const float* vals = v + pair * N * E;
        if (any_shifted && loaded != pair) {
            loaded = pair;
            store_k.resize(rows * D * padded + W);
            store_v.resize(rows * E * padded + W);
            turned_k = aligned(store_k.data()), turned_v = aligned(store_v.data());
            for (long r = 0; r < rows; ++r) {
                turn(keys + r * Z * D, Z, D, turned_k + r * D * padded, padded);
                turn(vals + r * Z * E, Z, E, turned_v + r * E * padded, padded);
            }
        }
        const long row_first = rows * part / parts, row_last = rows * (part + 1) / parts;
        for (long g = 0; g < group; ++g) {
            const long head = kv * group + g, plane = batch * h + head;
            for (const Block& block : blocks) {
                long count = 1;
                for (long row = row_first; row < row_last; row += count) {
                    const long x = row / Y, y = row % Y, first = block.first;
                    // Rows of one plane that share the vector: lane l is query first + l % lanes of row + l / lanes.
                    count = block.shifted ? 1 : W / block.lanes;
                    if (count > row_last - row) count = row_last - row;
                    if (count > Y - y) count = Y - y;
                    const long used = count * block.lanes;
                    long places[W];
                    ivec from_y, until_y, from_z, until_z;
                    long low = start2[first], high = stop2[first], low_y = start1[y], high_y = stop1[y];
                    long inner_low = low, inner_high = high, inner_low_y = low_y, inner_high_y = high_y;
                    for (int lane = 0; lane < W; ++lane) {
                        const long own = lane < used ? lane : used - 1;
                        const long at = first + own % block.lanes, down = own / block.lanes;
                        places[lane] = (plane * rows + row + down) * Z + at;
                        if (block.shifted) continue;
                        const long zs[2] = {start2[at], stop2[at]}, ys[2] = {start1[y + down], stop1[y + down]};
                        from_z[lane] = zs[0], until_z[lane] = zs[1], from_y[lane] = ys[0], until_y[lane] = ys[1];
                        low = zs[0] < low ? zs[0] : low, inner_low = zs[0] > inner_low ? zs[0] : inner_low;
                        high = zs[1] > high ? zs[1] : high, inner_high = zs[1] < inner_high ? zs[1] : inner_high;
                        low_y = ys[0] < low_y ? ys[0] : low_y, inner_low_y = ys[0] > inner_low_y ? ys[0] : inner_low_y;
                        high_y = ys[1] > high_y ? ys[1] : high_y;
                        inner_high_y = ys[1] < inner_high_y ? ys[1] : inner_high_y;
                    }
                    const float* from[W];
                    float* to[W];
                    long d = 0;
                    for (; d + W <= D; d += W) {
                        for (int i = 0; i < W; ++i)
                            from[i] = q + places[i] * D + d, to[i] = lanes_q.data() + (d + i) * W;
                        square(from, to);
                    }
                    for (; d < D; ++d)
                        for (int lane = 0; lane < W; ++lane) lanes_q[d * W + lane] = q[places[lane] * D + d];
                    for (d = 0; d < D; ++d) store(lanes_q.data() + d * W, load(lanes_q.data() + d * W) * scale);
                    const long width = high - low;
                    const long many = static_cast<long>(stop0[x] - start0[x]) * (high_y - low_y);
                    scores.resize(many * width * W);
                    values.clear();
                    float* at_scores = scores.data();
                    for (long xr = start0[x]; xr < stop0[x]; ++xr)
                        for (long yr = low_y; yr < high_y; ++yr, at_scores += width * W) {
                            const long r = xr * Y + yr;
                            // Entry [yr - y, low - first] of the table of this plane of keys.
                            const float* table = nullptr;
                            if (bias)
                                table = bias + (head * (2 * kernel[0] - 1) + (xr - x + kernel[0] - 1)) *
                                                   (2 * kernel[1] - 1) * (2 * kernel[2] - 1);
                            if (block.shifted) {
                                all_products<true>(lanes_q.data(), turned_k + r * D * padded + low, padded, 1,
                                                   D, at_scores, width);
                                values.push_back(turned_v + r * E * padded + low);
                                if (table) {
                                    const float* line = table + (yr - y + kernel[1] - 1) * (2 * kernel[2] - 1);
                                    for (long j = 0; j < width; ++j) {
                                        float* s = at_scores + j * W;
                                        store(s, load(s) + line[low + j - first + kernel[2] - 1]);
                                    }
                                }
                                continue;
                            }
                            all_products<false>(lanes_q.data(), keys + (r * Z + low) * D, 1, D, D, at_scores, width);
                            values.push_back(vals + (r * Z + low) * E);
                            for (int lane = 0; table && lane < W; ++lane) {
                                const long query = lane < used ? lane : used - 1;
                                const long at = first + query % block.lanes, own = y + query / block.lanes;
                                if (yr < start1[own] || yr >= stop1[own]) continue;
                                const float* line = table + (yr - own + kernel[1] - 1) * (2 * kernel[2] - 1);
                                for (long j = start2[at]; j < stop2[at]; ++j)
                                    at_scores[(j - low) * W + lane] += line[j - at + kernel[2] - 1];
                            }
                            const bool whole = yr >= inner_low_y && yr < inner_high_y;
                            const ivec here = splat_int(yr), seen = (here >= from_y) & (here < until_y);
                            for (long j = 0; j < width; ++j) {
                                if (whole && low + j >= inner_low && low + j < inner_high) {
                                    j = inner_high - low - 1;  // keys that every lane sees
                                    continue;
                                }
                                const ivec key = splat_int(low + j);
                                const ivec sees = seen & (key >= from_z) & (key < until_z);
                                float* s = at_scores + j * W;
                                store(s, sees ? load(s) : splat(-std::numeric_limits<float>::infinity()));
                            }
                        }
                    const long total = many * width;
                    vec most = load(scores.data());
                    for (long j = 1; j < total; ++j) {
                        const vec s = load(scores.data() + j * W);
                        most = s > most ? s : most;
                    }
                    vec sum = vec{};
                    for (long j = 0; j < total; ++j) {
                        const vec e = exponential(load(scores.data() + j * W) - most);
                        store(scores.data() + j * W, e);
                        sum += e;
                    }
                    if (block.shifted)
                        all_weighted<true>(scores.data(), values, width, 1, padded, E, lanes_out.data());
                    else
                        all_weighted<false>(scores.data(), values, width, E, 1, E, lanes_out.data());
                    const vec share = 1.0f / sum;
                    for (long e = 0; e < E; ++e) store(lanes_out.data() + e * W, load(lanes_out.data() + e * W) * share);
                    long e = 0;
                    for (; e + W <= E; e += W) {  // lanes without a query of their own repeat the last one's
                        for (int i = 0; i < W; ++i)
                            from[i] = lanes_out.data() + (e + i) * W, to[i] = out + places[i] * E + e;
                        square(from, to);
                    }
                    for (; e < E; ++e)
                        for (long lane = 0; lane < used; ++lane) out[places[lane] * E + e] = lanes_out[e * W + lane];
                    for (long lane = 0; lane < used; ++lane) lse[places[lane]] = most[lane] + std::log(sum[lane]);
                }
            }
        }
    }
}
