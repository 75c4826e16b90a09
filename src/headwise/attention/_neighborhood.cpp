// Neighbourhood attention, forward, float32: 16 neighbouring queries of one row are one vector.
//
// Grids of one to three axes (missing ones have length 1), one dilation group at a time. For every query the window of
// an axis is [start, stop). Two ways to form the scores of a block of queries along the last axis:
//  - shifted: the windows of the lanes are neighbours too (start[lane] = start[0] + lane), so the keys that lane after
//    lane needs lie side by side in a copy of the keys with channels outside: no multiplication is wasted;
//  - broadcast: any windows; every key of their union meets every lane and what a lane does not see is masked.
// The softmax keeps the scores of the block (keys x lanes), subtracts the maximum, and divides at the end.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
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

// acc[i] += a[d] * b[d * step + i * next ...] over d, where b is a vector (shifted) or one number (broadcast).
template <int N, bool SHIFTED>
static inline void products(const float* a, const float* b, long step, long next, long count, float* out) {
    vec acc[N];
    for (int i = 0; i < N; ++i) acc[i] = vec{};
    for (long d = 0; d < count; ++d) {
        const vec x = load(a + d * W);
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
    for (; i + 4 <= many; i += 4) products<4, SHIFTED>(a, b + i * next, step, next, count, out + i * W);
    for (; i < many; ++i) products<1, SHIFTED>(a, b + i * next, step, next, count, out + i * W);
}

// out[e] += sum over keys of weight * value, N channels at a time; rows of keys lie `row` apart.
template <int N, bool SHIFTED>
static inline void weighted(const float* p, const float* const* rows, long many, long keys, long step, long next,
                            float* out) {
    vec acc[N];
    for (int i = 0; i < N; ++i) acc[i] = vec{};
    for (long r = 0; r < many; ++r) {
        const float* v = rows[r];
        for (long j = 0; j < keys; ++j, p += W) {
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

// [rows, columns] to [columns, rows], rows `step` apart, in squares that stay in the first cache.
static void turn(const float* __restrict from, long rows, long columns, float* __restrict to, long step) {
    for (long r = 0; r < rows; r += 16)
        for (long c = 0; c < columns; ++c) {
            const long last = r + 16 < rows ? r + 16 : rows;
            for (long i = r; i < last; ++i) to[c * step + i] = from[i * columns + c];
        }
}

struct Block {
    long first, lanes;
    bool shifted;
};

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
    const long rows = X * Y, N = rows * Z, group = h / n, padded = Z + W;

    // Blocks of the last axis: runs of windows that move by one are shifted where they fill a vector.
    std::vector<Block> blocks;
    const long full = stop2[Z / 2] - start2[Z / 2];
    long z = 0;
    while (z < Z) {
        long run = z;
        while (run + 1 < Z && start2[run + 1] == start2[run] + 1 && stop2[run + 1] == stop2[run] + 1) ++run;
        const long length = run - z + 1;
        if (length >= W && full < 64) {
            for (long at = z; at <= run; at += W) blocks.push_back({at + W <= run + 1 ? at : run + 1 - W, W, true});
            z = run + 1;
            continue;
        }
        // up to the next long run, in blocks of any windows
        long until = z + 1;
        while (until < Z && until - z < W) {
            long other = until;
            while (other + 1 < Z && start2[other + 1] == start2[other] + 1 && stop2[other + 1] == stop2[other] + 1)
                ++other;
            if (other - until + 1 >= W && full < 64) break;
            ++until;
        }
        blocks.push_back({z, until - z, false});
        z = until;
    }
    bool any_shifted = false;
    for (const Block& block : blocks) any_shifted |= block.shifted;

    std::vector<float> turned_k, turned_v, lanes_q(D * W), lanes_out(E * W), scores;
    std::vector<const float*> values;
    long loaded = -1;
    for (long item = begin; item < end; ++item) {
        const long part = item % parts, pair = item / parts, batch = pair / n, kv = pair % n;
        const float* keys = k + pair * N * D;
        const float* vals = v + pair * N * E;
        if (any_shifted && loaded != pair) {
            loaded = pair;
            turned_k.resize(rows * D * padded);
            turned_v.resize(rows * E * padded);
            for (long r = 0; r < rows; ++r) {
                turn(keys + r * Z * D, Z, D, turned_k.data() + r * D * padded, padded);
                turn(vals + r * Z * E, Z, E, turned_v.data() + r * E * padded, padded);
            }
        }
        const long row_first = rows * part / parts, row_last = rows * (part + 1) / parts;
        for (long g = 0; g < group; ++g) {
            const long head = kv * group + g, plane = batch * h + head;
            for (long row = row_first; row < row_last; ++row) {
                const long x = row / Y, y = row % Y;
                for (const Block& block : blocks) {
                    const long first = block.first, last = block.first + block.lanes - 1;
                    for (long d = 0; d < D; ++d)
                        for (int lane = 0; lane < W; ++lane) {
                            const long at = first + lane <= last ? first + lane : last;
                            lanes_q[d * W + lane] = q[((plane * rows + row) * Z + at) * D + d] * scale;
                        }
                    long low = start2[first], high = stop2[first];
                    if (!block.shifted)
                        for (long at = first; at <= last; ++at) {
                            if (start2[at] < low) low = start2[at];
                            if (stop2[at] > high) high = stop2[at];
                        }
                    const long width = high - low;
                    const long many = static_cast<long>(stop0[x] - start0[x]) * (stop1[y] - start1[y]);
                    scores.resize(many * width * W);
                    values.clear();
                    float* at_scores = scores.data();
                    for (long xr = start0[x]; xr < stop0[x]; ++xr)
                        for (long yr = start1[y]; yr < stop1[y]; ++yr, at_scores += width * W) {
                            const long r = xr * Y + yr;
                            if (block.shifted) {
                                all_products<true>(lanes_q.data(), turned_k.data() + r * D * padded + low, padded, 1,
                                                   D, at_scores, width);
                                values.push_back(turned_v.data() + r * E * padded + low);
                            } else {
                                all_products<false>(lanes_q.data(), keys + (r * Z + low) * D, 1, D, D, at_scores,
                                                    width);
                                values.push_back(vals + (r * Z + low) * E);
                            }
                            const float* line = nullptr;
                            if (bias)
                                line = bias + ((head * (2 * kernel[0] - 1) + (xr - x + kernel[0] - 1)) *
                                                   (2 * kernel[1] - 1) + (yr - y + kernel[1] - 1)) *
                                                  (2 * kernel[2] - 1);
                            if (block.shifted) {
                                if (line)
                                    for (long j = 0; j < width; ++j) {
                                        float* s = at_scores + j * W;
                                        store(s, load(s) + line[low + j - first + kernel[2] - 1]);
                                    }
                                continue;
                            }
                            for (int lane = 0; lane < W; ++lane) {
                                const long at = first + lane <= last ? first + lane : last;
                                for (long j = 0; j < width; ++j) {
                                    float& s = at_scores[j * W + lane];
                                    if (low + j < start2[at] || low + j >= stop2[at])
                                        s = -std::numeric_limits<float>::infinity();
                                    else if (line)
                                        s += line[low + j - at + kernel[2] - 1];
                                }
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
                    for (int lane = 0; lane < block.lanes; ++lane) {
                        const long at = (plane * rows + row) * Z + first + lane;
                        for (long e = 0; e < E; ++e) out[at * E + e] = lanes_out[e * W + lane] * share[lane];
                        lse[at] = most[lane] + std::log(sum[lane]);
                    }
                }
            }
        }
    }
}
