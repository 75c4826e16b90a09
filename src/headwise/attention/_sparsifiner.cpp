// Sparsifiner in use, float32: which keys a query keeps, and softmax attention over them alone.
//
// The choice, for one query: of its m coefficients the `few` largest, the scores of n keys as the sum of as many rows of
// the basis (each product added with one rounding, lower vectors first), and of those the `width` largest; of equal ones
// the earlier, in both. Numbers are compared as integers, which order floats from 0 on as they are, so any input gives
// exactly as many places as were asked for, all inside the row.
//
// The attention, for ROWS queries together: keys, then values, are copied tile by tile into the first cache, and every
// query takes from a tile what it keeps, for its places ascend. Logits of kept keys exist for these queries alone.

#include "_cpp_vectors.h"

#include <algorithm>

constexpr long ROWS = 128;   // queries together
constexpr int32_t TILE = 128;  // keys of a tile, a power of two

static inline long filled(long x) { return (x + W - 1) / W * W; }

static inline ivec load_int(const float* p) {
    const vec x = load(p);
    ivec bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline int32_t as_int(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float as_float(int64_t bits) {
    const int32_t low = static_cast<int32_t>(bits);
    float x;
    std::memcpy(&x, &low, sizeof x);
    return x;
}

// How many of x[0 .. n) are at least `least`, compared as integers; x is filled up to whole vectors with the least one.
static long count_from(const float* x, long n, int32_t least) {
    const ivec bound = ivec{} + least;
#if defined(__AVX512F__)
    long count = 0, more = 0, i = 0;
    const auto kept = [&](long at) {
        return __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_loadu_si512(x + at), reinterpret_cast<__m512i>(bound)));
    };
    for (; i + 2 * W <= n; i += 2 * W) count += kept(i), more += kept(i + W);
    for (; i < n; i += W) count += kept(i);
    return count + more;
#else
    ivec found{};
    for (long i = 0; i < n; i += W) found -= load_int(x + i) >= bound;
    long sum = 0;
    for (int i = 0; i < W; ++i) sum += found[i];
    return sum;
#endif
}

// Places of the `many` largest of x[0 .. n), 1 <= many <= n, ascending, the earlier of equal ones. x has room for whole
// vectors, `to` for W more than `many`. begins: null, or where the places of each tile begin in `to`, and the last end.
static void largest(float* x, long n, long many, int32_t* to, int32_t* begins) {
    for (long i = n; i < filled(n); ++i) x[i] = as_float(INT32_MIN);
    int64_t low = as_int(x[0]), high = low;
    long start = 0;
    if (n >= W) {
        ivec least = load_int(x), most = least;
        for (start = W; start + W <= n; start += W) {
            const ivec one = load_int(x + start);
            most = one > most ? one : most;
            least = one < least ? one : least;
        }
        for (int i = 0; i < W; ++i) low = std::min<int64_t>(low, least[i]), high = std::max<int64_t>(high, most[i]);
    }
    for (; start < n; ++start) {
        low = std::min<int64_t>(low, as_int(x[start]));
        high = std::max<int64_t>(high, as_int(x[start]));
    }
    ++high;
    // At least `many` numbers are >= low, fewer are >= high: guess between them, by the counts or in the middle.
    long from_low = n, from_high = 0;
    for (int round = 0; high - low > 1 && from_low != many; ++round) {
        int64_t guess = low + (high - low) / 2;
        if (round % 3 != 2) {
            const float a = as_float(low), b = as_float(high);
            const float x = a + (b - a) * (static_cast<float>(from_low - many) / static_cast<float>(from_low - from_high));
            if (as_int(x) > low && as_int(x) < high) guess = as_int(x);
        }
        const long found = count_from(x, n, static_cast<int32_t>(guess));
        if (found >= many)
            low = guess, from_low = found;
        else
            high = guess, from_high = found;
    }
    // All above `low`, and the first of those that equal it.
    long ties = from_low == many ? n : many - from_high;
    long count = 0;
    const int32_t bound = static_cast<int32_t>(low);
    long i = 0;
#if defined(__AVX512F__)
    if (ties == n) {
        ivec places;
        for (int lane = 0; lane < W; ++lane) places[lane] = lane;
        for (; i + W <= n; i += W, places += W) {
            if (begins && i % TILE == 0) begins[i / TILE] = static_cast<int32_t>(count);
            const __m512i bits = _mm512_loadu_si512(x + i);
            const __mmask16 kept = _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(bound));
            const __m512i some = _mm512_maskz_compress_epi32(kept, reinterpret_cast<__m512i>(places));
            _mm512_storeu_si512(to + count, some);
            count += __builtin_popcount(kept);
        }
    }
#endif
    for (; i < n; ++i) {
        if (begins && i % TILE == 0) begins[i / TILE] = static_cast<int32_t>(count);
        const int32_t bits = as_int(x[i]);
        if (bits > bound || (bits == bound && ties-- > 0)) to[count++] = static_cast<int32_t>(i);
    }
    if (begins) begins[(n + TILE - 1) / TILE] = static_cast<int32_t>(count);
}

// The scores of a row are sums of these rows of the basis.
static void sum_of_rows(const float* basis, long n, const int32_t* rows, const float* weights, long few, float* to) {
    long i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        vec acc[4] = {};
        for (long r = 0; r < few; ++r) {
            const float* from = basis + rows[r] * n + i;
            for (int u = 0; u < 4; ++u) acc[u] += load(from + u * W) * weights[r];
        }
        for (int u = 0; u < 4; ++u) store(to + i + u * W, acc[u]);
    }
    for (; i < n; ++i) {
        float sum = 0;
        for (long r = 0; r < few; ++r) sum = __builtin_fmaf(basis[rows[r] * n + i], weights[r], sum);
        to[i] = sum;
    }
}

struct Choice {
    const float* basis;  // [m n]
    long n, m, few, width;
    std::vector<float> coefficients, scores, weights;
    std::vector<int32_t> vectors;

    Choice(const float* basis, const long* sizes)
        : basis(basis), n(sizes[0]), m(sizes[1]), few(sizes[2]), width(sizes[3]), coefficients(filled(m)),
          scores(filled(n)), weights(few), vectors(few + W) {}

    // Places of the keys of one query; returns 0, or NaN where its coefficients are no numbers.
    float of(const float* row, int32_t* to, int32_t* begins) {
        std::memcpy(coefficients.data(), row, m * sizeof(float));
        largest(coefficients.data(), m, few, vectors.data(), nullptr);
        float sum = 0;
        for (long r = 0; r < few; ++r) sum += weights[r] = coefficients[vectors[r]];
        sum_of_rows(basis, n, vectors.data(), weights.data(), few, scores.data());
        largest(scores.data(), n, width, to, begins);
        return 0 * sum;
    }
};

// sizes: n keys, m basis vectors, few of them for a query, width kept keys; coefficients [rows m], to [rows width].
extern "C" void headwise_sparsifiner_choose(const float* coefficients, const float* basis, int32_t* to,
                                            const long* sizes, long begin, long end) {
    Choice choice(basis, sizes);
    std::vector<int32_t> places(choice.width + W);
    for (long row = begin; row < end; ++row) {
        choice.of(coefficients + row * choice.m, places.data(), nullptr);
        std::memcpy(to + row * choice.width, places.data(), choice.width * sizeof(int32_t));
    }
}

// to[j] = a . key places[j] of the tile, for 1 to W keys of C vectors, or of `channels` where C is 0; what follows them
// in `to` has no meaning.
template <int C>
static inline void dots(const float* a, const int32_t* places, long count, const float* tile, long channels, float* to) {
    const long step = C ? C * W : channels;
    vec sums[W], own[C ? C : 1];
    for (int c = 0; c < C; ++c) own[c] = load(a + c * W);
    for (long j = 0; j < count; ++j) {
        const float* b = tile + (places[j] & (TILE - 1)) * step;
        vec even = (C ? own[0] : load(a)) * load(b), odd{};
        for (long c = 1; c < step / W; ++c) (c % 2 ? odd : even) += (C ? own[c] : load(a + c * W)) * load(b + c * W);
        sums[j] = even + odd;
    }
    for (long j = count; j < W; ++j) sums[j] = vec{};
    store(to, lane_sums(sums));
}

// acc[c] += sum over keys of weight * value, in registers where there are few channels.
template <int C>
static inline void add_values(const float* weights, const int32_t* places, long count, const float* tile, long step,
                              float* acc) {
    vec sum[C];
    for (int c = 0; c < C; ++c) sum[c] = load(acc + c * W);
    for (long j = 0; j < count; ++j)
        for (int c = 0; c < C; ++c) sum[c] += load(tile + (places[j] & (TILE - 1)) * step + c * W) * weights[j];
    for (int c = 0; c < C; ++c) store(acc + c * W, sum[c]);
}

// x[token t] of one head begins at x + t * step; the last of `count` tokens are followed by zeros up to whole vectors.
static void copy_tile(const float* x, long step, long count, long channels, float* to) {
    for (long t = 0; t < count; ++t) {
        std::memcpy(to + t * filled(channels), x + t * step, channels * sizeof(float));
        std::fill(to + t * filled(channels) + channels, to + (t + 1) * filled(channels), 0.0f);
    }
}

// coefficients [b h p m]; q [b h p d], k [b h n d], v [b h n e] with channels side by side, steps: floats from batch to
// batch, head to head and token to token of q, k, v in turn; out [b h p e] contiguous.
// sizes: n m few width h p d e. Works on items [begin, end) of b * h * ceil(p / ROWS).
extern "C" void headwise_sparsifiner_attend(const float* coefficients, const float* basis, const float* q,
                                            const float* k, const float* v, float* out, const long* sizes,
                                            const long* steps, float scale, long begin, long end) {
    Choice choice(basis, sizes);
    const long n = sizes[0], m = sizes[1], width = sizes[3], h = sizes[4], p = sizes[5], D = sizes[6], E = sizes[7];
    const long blocks = (p + ROWS - 1) / ROWS, d = filled(D), e = filled(E), room = width + W;
    const long many = (n + TILE - 1) / TILE;
    std::vector<int32_t> places(ROWS * room), begins(ROWS * (many + 1));
    std::vector<float> queries(ROWS * d), logits(ROWS * room), sums(ROWS * e), tile(TILE * std::max(d, e));
    for (long item = begin; item < end; ++item) {
        const long pair = item / blocks, first = item % blocks * ROWS, rows = std::min(ROWS, p - first);
        const auto head = [&](const float* x, int which) {
            return x + pair / h * steps[3 * which] + pair % h * steps[3 * which + 1];
        };
        const float *own_q = head(q, 0), *own_k = head(k, 1), *own_v = head(v, 2);
        for (long r = 0; r < rows; ++r) {
            const long row = pair * p + first + r;
            const float poison =
                choice.of(coefficients + row * m, places.data() + r * room, begins.data() + r * (many + 1));
            copy_tile(own_q + (first + r) * steps[2], 0, 1, D, queries.data() + r * d);
            for (long c = 0; c < d; ++c) queries[r * d + c] = queries[r * d + c] * scale + poison;
        }
        // Calls use(row, number of its first place in the tile, how many, the places) for all that have any.
        const auto tiles = [&](const float* x, long step, long channels, auto use) {
            for (long t = 0; t < many; ++t) {
                const long start = t * TILE;
                copy_tile(x + start * step, step, std::min<long>(TILE, n - start), channels, tile.data());
                for (long r = 0; r < rows; ++r) {
                    const int32_t *own = begins.data() + r * (many + 1) + t, from = own[0], count = own[1] - from;
                    if (count) use(r, from, count, places.data() + r * room + from);
                }
            }
        };
        tiles(own_k, steps[5], D, [&](long r, long from, long count, const int32_t* own) {
            float* to = logits.data() + r * room + from;
            for (long j = 0; j < count; j += W) {  // what is left over is written over later
                const auto form = d == 2 * W ? dots<2> : d == 4 * W ? dots<4> : dots<0>;
                form(queries.data() + r * d, own + j, std::min<long>(W, count - j), tile.data(), d, to + j);
            }
        });
        for (long r = 0; r < rows; ++r) {
            float* own = logits.data() + r * room;
            const float none = -std::numeric_limits<float>::infinity();
            for (long j = width; j < filled(width); ++j) own[j] = none;
            vec most = load(own), sum = vec{};
            for (long j = W; j < width; j += W) {
                const vec x = load(own + j);
                most = x > most ? x : most;
            }
            float top = most[0], total = 0;
            for (int i = 1; i < W; ++i) top = most[i] > top ? most[i] : top;
            for (long j = 0; j < width; j += W) {
                const vec x = exponential(load(own + j) - top);
                store(own + j, x);
                sum += x;
            }
            for (int i = 0; i < W; ++i) total += sum[i];
            for (long j = 0; j < width; j += W) store(own + j, load(own + j) * (1 / total));
        }
        std::fill(sums.begin(), sums.end(), 0.0f);
        tiles(own_v, steps[8], E, [&](long r, long from, long count, const int32_t* own) {
            const float* weights = logits.data() + r * room + from;
            float* to = sums.data() + r * e;
            long c = 0;
            for (; c + 4 * W <= e; c += 4 * W)
                add_values<4>(weights, own, count, tile.data() + c, e, to + c);
            for (; c < e; c += W) add_values<1>(weights, own, count, tile.data() + c, e, to + c);
        });
        for (long r = 0; r < rows; ++r)
            std::memcpy(out + (pair * p + first + r) * E, sums.data() + r * e, E * sizeof(float));
    }
}
