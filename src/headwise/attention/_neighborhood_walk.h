// Blocks of queries of a neighbourhood and their scores: what forward and backward share.
//
// Grids of one to three axes (missing ones have length 1), one dilation group at a time. For every query the window of
// an axis is [start, stop). Two ways to form the scores of a block of queries along the last axis:
//  - shifted: the windows of the lanes are neighbours too (start[lane] = start[0] + lane), so the keys that lane after
//    lane needs lie side by side in a copy of the keys with channels outside: no multiplication is wasted;
//  - broadcast: any windows; every key of their union meets every lane and what a lane does not see is masked. Where a
//    block has few lanes, as at the edges of a grid, several rows share a vector.
#pragma once

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
