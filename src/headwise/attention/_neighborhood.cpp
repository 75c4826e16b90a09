// Neighbourhood attention, float32, forward and backward: 16 neighbouring queries of one row are one vector.
//
// `walk` makes the scores (keys x lanes) of block after block. The forward takes their softmax, subtracts the maximum
// and divides at the end; the backward takes exp(score - lse) instead and adds the block's share to every gradient.

#include "_cpp_vectors.h"
#include "_neighborhood_walk.h"

// out [b h X Y Z e], lse [b h X Y Z].
extern "C" void headwise_neighborhood_forward(const float* q, const float* k, const float* v, float* out, float* lse,
                                              const float* bias, const long* sizes, const int* const* windows,
                                              const long* kernel, float scale, long parts, long begin, long end) {
    const Problem p(q, k, v, bias, sizes, windows, kernel, scale);
    std::vector<float> lanes_out(p.E * W);
    std::vector<const float*> rows;
    walk(p, parts, begin, end, [](long) {}, [&](const Scored& s) {
        const long total = s.total();
        vec most = load(s.scores);
        for (long j = 1; j < total; ++j) {
            const vec x = load(s.scores + j * W);
            most = x > most ? x : most;
        }
        vec sum = vec{};
        for (long j = 0; j < total; ++j) {
            const vec e = exponential(load(s.scores + j * W) - most);
            store(s.scores + j * W, e);
            sum += e;
        }
        sum_of_keys(p, s, s.scores, s.turned_v, s.own_v, p.E, rows, lanes_out.data());
        const vec share = 1.0f / sum;
        for (long e = 0; e < p.E; ++e) store(lanes_out.data() + e * W, load(lanes_out.data() + e * W) * share);
        from_lanes(lanes_out.data(), s.places, p.E, out);
        for (long lane = 0; lane < s.used; ++lane) lse[s.places[lane]] = most[lane] + std::log(sum[lane]);
    });
}

// Gradients of keys (or values) while an item is worked on: [row][z][channels filled up to whole vectors] from broadcast
// blocks, [row][channel][padded] from shifted ones, which are added to the first at the end.
struct Gradient {
    long channels, filled;
    std::vector<float> plain, store;
    float* turned = nullptr;

    explicit Gradient(long channels) : channels(channels), filled((channels + W - 1) / W * W) {}

    void clear(const Problem& p, bool shifts) {
        plain.assign(p.N * filled, 0.0f);
        if (!shifts) return;
        store.assign(p.rows * channels * p.padded + W, 0.0f);
        turned = aligned(store.data());
    }

    void add_turned(const Problem& p) {
        alignas(64) float tile[W * W];
        const float* from[W];
        float* to[W];
        for (int i = 0; i < W; ++i) to[i] = tile + i * W;
        for (long r = 0; r < p.rows; ++r)
            for (long c = 0; c < channels; c += W)
                for (long z = 0; z < p.Z; z += W) {
                    for (int i = 0; i < W; ++i)  // rows past the last channel repeat it and are not used
                        from[i] = turned + (r * channels + (c + i < channels ? c + i : channels - 1)) * p.padded + z;
                    square(from, to);
                    for (long i = 0; i < W && z + i < p.Z; ++i) {
                        float* at = plain.data() + (r * p.Z + z + i) * filled + c;
                        store_sum(at, tile + i * W);
                    }
                }
    }

    static void store_sum(float* at, const float* more) { ::store(at, load(at) + load(more)); }

    void write(long positions, float* to) const {
        for (long i = 0; i < positions; ++i)
            std::memcpy(to + i * channels, plain.data() + i * filled, channels * sizeof(float));
    }
};

// to[j] += sum over lanes of w[j][lane] * rows[lane], J keys at a time.
template <int J>
static inline void outer(const float* w, const float* rows, long lanes, long filled, float* to) {
    const auto some = [&](long c, auto vectors) {
        constexpr int C = decltype(vectors)::value;
        vec acc[J][C];
        for (int j = 0; j < J; ++j)
            for (int i = 0; i < C; ++i) acc[j][i] = load(to + j * filled + c + i * W);
        for (long lane = 0; lane < lanes; ++lane) {
            vec x[C];
            for (int i = 0; i < C; ++i) x[i] = load(rows + lane * filled + c + i * W);
            for (int j = 0; j < J; ++j)
                for (int i = 0; i < C; ++i) acc[j][i] += x[i] * w[j * W + lane];
        }
        for (int j = 0; j < J; ++j)
            for (int i = 0; i < C; ++i) store(to + j * filled + c + i * W, acc[j][i]);
    };
    long c = 0;
    for (; c + 2 * W <= filled; c += 2 * W) some(c, std::integral_constant<int, 2>{});
    if (c < filled) some(c, std::integral_constant<int, 1>{});
}

static inline ivec lanes_in_turn() {
    ivec lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane;
}

// The sum of the lanes from number `first` on.
static inline float sum_from(vec x, long first) {
    x = lanes_in_turn() >= splat_int(first) ? x : vec{};
    if (W == 16) x += slide<W / 2>(x, x);
    x += slide<4>(x, x), x += slide<2>(x, x), x += slide<1>(x, x);
    return x[0];
}

template <int... I>
static inline void rotated(vec x, vec* to, std::integer_sequence<int, I...>) {  // to[i][lane] = x[lane - i]
    ((to[I] = slide<(W - I) % W>(x, x)), ...);
}

// rows[r][c][j + lane] += x[c][lane] * w[r][j][lane] for K neighbouring j of every row of a shifted block. Turned by j
// lanes, a product falls into the vector at rows[r] from lane j on, and into the next one below that.
template <int K>
static inline void spread(const float* x, const float* w, long width, long again, long channels, long padded,
                          const std::vector<float*>& rows, std::vector<float>& turned) {
    constexpr auto steps = std::make_integer_sequence<int, K>{};
    const long many = static_cast<long>(rows.size());
    turned.resize(many * K * 2 * W);
    const ivec lane = lanes_in_turn();
    for (long r = 0; r < many; ++r) {
        for (int i = 0; i < K; ++i) {
            vec own = load(w + (r * width + i) * W), all[K];
            own = lane >= splat_int(again) ? own : vec{};
            rotated(own, all, steps);
            const ivec here = lane >= splat_int(i);
            store(turned.data() + (r * K + i) * 2 * W, here ? all[i] : vec{});
            store(turned.data() + (r * K + i) * 2 * W + W, here ? vec{} : all[i]);
        }
    }
    for (long c = 0; c < channels; ++c) {
        vec all[K];
        rotated(load(x + c * W), all, steps);
        const float* weight = turned.data();
        for (long r = 0; r < many; ++r, weight += K * 2 * W) {
            float* at = rows[r] + c * padded;
            vec low = load(at), high = load(at + W);
            for (int i = 0; i < K; ++i) {
                low += all[i] * load(weight + i * 2 * W);
                high += all[i] * load(weight + i * 2 * W + W);
            }
            store(at, low), store(at + W, high);
        }
    }
}

struct Scratch {
    std::vector<float> rows, turned;
    std::vector<float*> targets;
};

// gradient[key] += sum over lanes of weights[key][lane] * x[channel][lane].
static void spread_to_keys(const Problem& p, const Scored& s, const float* weights, const float* x, Gradient& gradient,
                           Scratch& scratch) {
    const long many = static_cast<long>(s.keys.size()), channels = gradient.channels, filled = gradient.filled;
    if (s.block.shifted) {
        scratch.targets.clear();
        for (const long r : s.keys) scratch.targets.push_back(gradient.turned + r * channels * p.padded + s.low);
        const auto some = [&](long j, auto count) {
            constexpr int K = decltype(count)::value;
            spread<K>(x, weights + j * W, s.width, s.block.again, channels, p.padded, scratch.targets, scratch.turned);
            for (float*& at : scratch.targets) at += K;
        };
        long j = 0;
        for (; j + 7 <= s.width; j += 7) some(j, std::integral_constant<int, 7>{});
        for (; j + 3 <= s.width; j += 3) some(j, std::integral_constant<int, 3>{});
        for (; j < s.width; ++j) some(j, std::integral_constant<int, 1>{});
        return;
    }
    scratch.rows.assign(W * filled, 0.0f);
    for (long c = 0; c < channels; ++c)
        for (long lane = 0; lane < s.used; ++lane) scratch.rows[lane * filled + c] = x[c * W + lane];
    for (long r = 0; r < many; ++r) {
        const float* w = weights + r * s.width * W;
        float* to = gradient.plain.data() + (s.keys[r] * p.Z + s.low) * filled;
        long j = 0;
        for (; j + 4 <= s.width; j += 4) outer<4>(w + j * W, scratch.rows.data(), s.used, filled, to + j * filled);
        for (; j < s.width; ++j) outer<1>(w + j * W, scratch.rows.data(), s.used, filled, to + j * filled);
    }
}

// gradient[head, key - query] += gradients of the scores.
static void add_bias(const Problem& p, const Scored& s, const float* changes, float* gradient) {
    const int *start1 = p.windows[2], *stop1 = p.windows[3], *start2 = p.windows[4], *stop2 = p.windows[5];
    for (const long r : s.keys) {
        const long dx = r / p.Y - s.x, yr = r % p.Y;
        if (s.block.shifted) {  // lanes differ in the query, not in key - query
            float* line = gradient + p.line(s.head, dx, yr - s.y) + s.low - s.block.first;
            for (long j = 0; j < s.width; ++j) line[j] += sum_from(load(changes + j * W), s.block.again);
            changes += s.width * W;
            continue;
        }
        for (long lane = 0; lane < s.used; ++lane) {
            const long at = s.block.first + lane % s.block.lanes, own = s.y + lane / s.block.lanes;
            if (yr < start1[own] || yr >= stop1[own]) continue;
            float* line = gradient + p.line(s.head, dx, yr - own) - at;
            for (long j = start2[at]; j < stop2[at]; ++j)
                line[j] += changes[(j - s.low) * W + lane];
        }
        changes += s.width * W;
    }
}

// grad_out [b h X Y Z e], lse and offset [b h X Y Z], where offset = sum(grad_out * out) - grad_lse; grad_q like q,
// grad_k and grad_v [parts, as k and v], grad_bias null or [b * parts, as bias] and filled with zeros: an item writes
// no other item's gradients.
extern "C" void headwise_neighborhood_backward(const float* q, const float* k, const float* v, const float* grad_out,
                                               const float* lse, const float* offset, float* grad_q, float* grad_k,
                                               float* grad_v, float* grad_bias, const float* bias, const long* sizes,
                                               const int* const* windows, const long* kernel, float scale, long parts,
                                               long begin, long end) {
    const Problem p(q, k, v, bias, sizes, windows, kernel, scale);
    const long pairs = sizes[0] * p.n, table = p.h * (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1);
    bool shifts = false;
    for (const Block& block : blocks_of(windows[4], windows[5], p.Z)) shifts |= block.shifted;
    Gradient of_k(p.D), of_v(p.E);
    Scratch scratch;
    std::vector<float> weights, lanes_out(p.E * W), lanes_q(p.D * W);
    std::vector<const float*> rows;
    long current = -1;
    const auto item_ends = [&] {
        if (current < 0) return;
        if (shifts) of_k.add_turned(p), of_v.add_turned(p);
        const long at = (current % parts * pairs + current / parts) * p.N;
        of_k.write(p.N, grad_k + at * p.D);
        of_v.write(p.N, grad_v + at * p.E);
    };
    const auto item_begins = [&](long item) {
        item_ends();
        current = item;
        of_k.clear(p, shifts), of_v.clear(p, shifts);
    };
    walk(p, parts, begin, end, item_begins, [&](const Scored& s) {
        const long total = s.total(), many = static_cast<long>(s.keys.size());
        to_lanes(grad_out, s.places, p.E, lanes_out.data());
        vec norm, less;
        for (int lane = 0; lane < W; ++lane) norm[lane] = lse[s.places[lane]], less[lane] = offset[s.places[lane]];
        weights.resize(total * W);
        for (long r = 0; r < many; ++r) {  // grad_out . value
            float* to = weights.data() + r * s.width * W;
            if (s.block.shifted)
                all_products<true>(lanes_out.data(), s.turned_v + s.keys[r] * p.E * p.padded + s.low, p.padded, 1, p.E,
                                   to, s.width);
            else
                all_products<false>(lanes_out.data(), s.own_v + (s.keys[r] * p.Z + s.low) * p.E, 1, p.E, p.E, to,
                                    s.width);
        }
        float* changes = s.scores;
        for (long j = 0; j < total; ++j) {
            const vec weight = exponential(load(s.scores + j * W) - norm);
            store(changes + j * W, weight * (load(weights.data() + j * W) - less));
            store(weights.data() + j * W, weight);
        }
        sum_of_keys(p, s, changes, s.turned_k, s.own_k, p.D, rows, lanes_q.data());
        for (long d = 0; d < p.D; ++d) store(lanes_q.data() + d * W, load(lanes_q.data() + d * W) * scale);
        from_lanes(lanes_q.data(), s.places, p.D, grad_q);
        spread_to_keys(p, s, changes, s.lanes_q, of_k, scratch);
        spread_to_keys(p, s, weights.data(), lanes_out.data(), of_v, scratch);
        if (grad_bias) add_bias(p, s, changes, grad_bias + (current / parts / p.n * parts + current % parts) * table);
    });
    item_ends();
}
