// Neighbourhood attention, float32, forward and backward: 16 neighbouring queries of one row are one vector.
//
// Grids of one to three axes (missing ones have length 1), one dilation group at a time. For every query the window of
// an axis is [start, stop). Two ways to form the scores of a block of queries along the last axis:
//  - shifted: the windows of the lanes are neighbours too (start[lane] = start[0] + lane), so the keys that lane after
//    lane needs lie side by side in a copy of the keys with channels outside: no multiplication is wasted;
//  - broadcast: any windows; every key of their union meets every lane and what a lane does not see is masked. Where a
//    block has few lanes, as at the edges of a grid, several rows share a vector.
// `walk` makes the scores (keys x lanes) of block after block. The forward takes their softmax, subtracts the maximum
// and divides at the end; the backward takes exp(score - lse) instead and adds the block's share to every gradient.

#include "_cpp_vectors.h"

struct Block {
    long first, lanes, again;  // again: so many of its first lanes are lanes of the block before it too
    bool shifted;
};

static inline ivec splat_int(long x) { return ivec{} + static_cast<int32_t>(x); }

// q [b h X Y Z d], k [b n X Y Z d], v [b n X Y Z e], all contiguous; sizes: b h n X Y Z d e.
// bias: null or [h, 2 kernel0 - 1, 2 kernel1 - 1, 2 kernel2 - 1]. windows: start and stop of axis 0, 1, 2 in turn.
struct Problem {
    const float *q, *k, *v, *bias;
    const long *sizes, *kernel;
    const int* const* windows;
    float scale;
    long h, n, X, Y, Z, D, E, rows, N, group, padded;

    Problem(const float* q, const float* k, const float* v, const float* bias, const long* sizes,
            const int* const* windows, const long* kernel, float scale)
        : q(q), k(k), v(v), bias(bias), sizes(sizes), kernel(kernel), windows(windows), scale(scale), h(sizes[1]),
          n(sizes[2]), X(sizes[3]), Y(sizes[4]), Z(sizes[5]), D(sizes[6]), E(sizes[7]), rows(X * Y), N(rows * Z),
          group(h / n), padded(((Z + W + W - 1) / W | 1) * W) {}  // an odd number: no two channels in one set

    // Where the entries of one head's bias for a row of keys begin: add key - query of the last axis.
    long line(long head, long dx, long dy) const {
        return ((head * (2 * kernel[0] - 1) + dx + kernel[0] - 1) * (2 * kernel[1] - 1) + dy + kernel[1] - 1) *
                   (2 * kernel[2] - 1) + kernel[2] - 1;
    }
};

// One block of queries and its scores: those of key `low + j` of row keys[i] of the grid are scores + (i * width + j) * W.
struct Scored {
    const Block& block;
    long plane, head, x, y, used, low, width;
    const long* places;  // of each lane in [b h N]; lanes from `used` on repeat the last query
    const std::vector<long>& keys;
    const float* lanes_q;  // [d][lane], scaled
    float *scores, *turned_k, *turned_v;  // keys and values of the pair as [row][channel][padded], where blocks shift
    const float *own_k, *own_v;           // and as they are
    long total() const { return static_cast<long>(keys.size()) * width; }
};

// Blocks of the last axis: runs of windows that move by one are shifted where they fill a vector.
static std::vector<Block> blocks_of(const int* start2, const int* stop2, long Z) {
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
                const long last = z + whole - W, first = at < last ? at : last;
                blocks.push_back({first, W, at - first, true});
            }
            z += whole;
            continue;
        }
        // up to the next long run, in blocks of any windows
        long until = z + 1;
        while (until < Z && until - z < W && !(shifts && run_from(until, W) >= W)) ++until;
        blocks.push_back({z, until - z, 0, false});
        z = until;
    }
    return blocks;
}

// [lanes' places][channels] to [channels][lanes].
static inline void to_lanes(const float* x, const long* places, long channels, float* lanes) {
    const float* from[W];
    float* to[W];
    long c = 0;
    for (; c + W <= channels; c += W) {
        for (int i = 0; i < W; ++i) from[i] = x + places[i] * channels + c, to[i] = lanes + (c + i) * W;
        square(from, to);
    }
    for (; c < channels; ++c)
        for (int lane = 0; lane < W; ++lane) lanes[c * W + lane] = x[places[lane] * channels + c];
}

// And back; lanes without a query of their own write what the last one writes.
static inline void from_lanes(const float* lanes, const long* places, long channels, float* x) {
    const float* from[W];
    float* to[W];
    long c = 0;
    for (; c + W <= channels; c += W) {
        for (int i = 0; i < W; ++i) from[i] = lanes + (c + i) * W, to[i] = x + places[i] * channels + c;
        square(from, to);
    }
    for (; c < channels; ++c)
        for (int lane = 0; lane < W; ++lane) x[places[lane] * channels + c] = lanes[c * W + lane];
}

// out[c] = sum over the keys of a block of weight * number, lane by lane; weights lie as the scores do.
static void sum_of_keys(const Problem& p, const Scored& s, const float* weights, const float* turned, const float* own,
                        long channels, std::vector<const float*>& rows, float* out) {
    rows.clear();
    for (const long r : s.keys)
        rows.push_back(s.block.shifted ? turned + r * channels * p.padded + s.low : own + (r * p.Z + s.low) * channels);
    if (s.block.shifted)
        all_weighted<true>(weights, rows, s.width, 1, p.padded, channels, out);
    else
        all_weighted<false>(weights, rows, s.width, channels, 1, channels, out);
}

// Items [begin, end) of b * n * parts, each one key head and one part of the rows: `item_begins` with its number, then
// `finish` with every block of its queries.
template <typename Begins, typename Finish>
static void walk(const Problem& p, long parts, long begin, long end, Begins item_begins, Finish finish) {
    const float *q = p.q, *k = p.k, *v = p.v, *bias = p.bias;
    const long h = p.h, n = p.n, Y = p.Y, Z = p.Z, D = p.D, E = p.E, rows = p.rows, N = p.N, group = p.group;
    const long padded = p.padded;
    const float scale = p.scale;
    const int *start0 = p.windows[0], *stop0 = p.windows[1], *start1 = p.windows[2], *stop1 = p.windows[3];
    const int *start2 = p.windows[4], *stop2 = p.windows[5];
    const std::vector<Block> blocks = blocks_of(start2, stop2, Z);
    bool any_shifted = false;
    for (const Block& block : blocks) any_shifted |= block.shifted;

    float *turned_k = nullptr, *turned_v = nullptr;
    std::vector<float> store_k, store_v, lanes_q(D * W), scores;
    std::vector<long> row_keys;
    long loaded = -1;
    for (long item = begin; item < end; ++item) {
        item_begins(item);
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
                    to_lanes(q, places, D, lanes_q.data());
                    for (long d = 0; d < D; ++d) store(lanes_q.data() + d * W, load(lanes_q.data() + d * W) * scale);
                    const long width = high - low;
                    const long many = static_cast<long>(stop0[x] - start0[x]) * (high_y - low_y);
                    scores.resize(many * width * W);
                    row_keys.clear();
                    float* at_scores = scores.data();
                    for (long xr = start0[x]; xr < stop0[x]; ++xr)
                        for (long yr = low_y; yr < high_y; ++yr, at_scores += width * W) {
                            const long r = xr * Y + yr;
                            row_keys.push_back(r);
                            if (block.shifted) {
                                all_products<true>(lanes_q.data(), turned_k + r * D * padded + low, padded, 1,
                                                   D, at_scores, width);
                                if (bias) {
                                    const float* line = bias + p.line(head, xr - x, yr - y) + low - first;
                                    for (long j = 0; j < width; ++j)
                                        store(at_scores + j * W, load(at_scores + j * W) + line[j]);
                                }
                                continue;
                            }
                            all_products<false>(lanes_q.data(), keys + (r * Z + low) * D, 1, D, D, at_scores, width);
                            for (int lane = 0; bias && lane < W; ++lane) {
                                const long query = lane < used ? lane : used - 1;
                                const long at = first + query % block.lanes, own = y + query / block.lanes;
                                if (yr < start1[own] || yr >= stop1[own]) continue;
                                const float* line = bias + p.line(head, xr - x, yr - own) - at;
                                for (long j = start2[at]; j < stop2[at]; ++j)
                                    at_scores[(j - low) * W + lane] += line[j];
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
                    finish(Scored{block, plane, head, x, y, used, low, width, places, row_keys, lanes_q.data(),
                                  scores.data(), turned_k, turned_v, keys, vals});
                }
            }
        }
    }
}

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
