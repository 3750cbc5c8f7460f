// Attention of a stream's segments, forward and backward, and to a cache. See attention.py and decoding.py, whose shapes
// these are. One key head of one chunk (segments with the same prefix) is a task: its result depends on no other chunk
// and no thread. All is in float: queries, keys and values are copied to where products of small blocks read them.
//
// A token's result has the same bits however its row is cut into passes: a score is a sum over the head's width and an
// output a sum over the keys, both in order and in one float, and `exponentials` sees exactly the keys of the token.

#include "numbers.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t PANEL = 2 * LANES;  // columns of a block: two vectors
constexpr int64_t ROWS = 6;           // rows of a block: its 12 sums fit in the registers
constexpr int64_t BLOCK = 8 * ROWS;   // queries whose scores are made at once
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// c [NUM, PANEL] = a [NUM, num] b [num, PANEL], or added to c.
template <bool ADD, int64_t NUM>
inline void multiply(int64_t num, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                     float* c, int64_t c_row) {
    Vector sums[NUM][2] = {};
    for (int64_t i = 0; i < num; i++, a += a_step, b += b_step) {
        Vector left = *(const Vector*)b, right = *(const Vector*)(b + LANES);
        for (int64_t row = 0; row < NUM; row++) {
            sums[row][0] += a[row * a_row] * left;
            sums[row][1] += a[row * a_row] * right;
        }
    }
    for (int64_t row = 0; row < NUM; row++, c += c_row) {
        Vector *left = (Vector*)c, *right = (Vector*)(c + LANES);
        *left = ADD ? *left + sums[row][0] : sums[row][0];
        *right = ADD ? *right + sums[row][1] : sums[row][1];
    }
}

// The same for `rows` up to ROWS, which is known where it is called: a block's last rows and a decoded token are few.
template <bool ADD, typename... Args>
inline void multiply_rows(int64_t rows, Args... args) {
    switch (rows) {
        case 1: return multiply<ADD, 1>(args...);
        case 2: return multiply<ADD, 2>(args...);
        case 3: return multiply<ADD, 3>(args...);
        case 4: return multiply<ADD, 4>(args...);
        case 5: return multiply<ADD, 5>(args...);
        default: return multiply<ADD, ROWS>(args...);
    }
}

struct Segment {
    int64_t start, length, prefix_start, num_prefix;
    int64_t num_keys() const { return num_prefix + length; }
};

struct Chunks {
    const Segment* segments;
    const int64_t* first;  // of each chunk, and one more
    int64_t num;
};

struct Shape {
    int64_t H, G, W;
    float scale;
    int64_t window;
    int64_t heads() const { return H / G; }
    int64_t width() const { return round_up(W, PANEL); }  // of a row in a buffer, zeros behind W
};

using Buffer = std::vector<float>;

inline Vector load_lanes(const float* x) { return *(const Vector*)x; }
inline Vector load_lanes(const bfloat16* x) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
    return (Vector)(__builtin_convertvector(*(const Halves*)x, Lanes) << 16);
}

// LANES rows of x become columns: into[w * PANEL + l] = x[l * stride + w] for LANES of w.
template <typename T>
inline void transpose(const T* x, int64_t stride, float* into) {
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int64_t l = 0; l < LANES; l++) rows[l] = load_lanes(x + l * stride);
    Lanes lane;
    for (int64_t l = 0; l < LANES; l++) lane[l] = l;
#pragma GCC unroll 4
    for (int64_t step = 1; step < LANES; step *= 2) {  // swaps the blocks of `step` beside the diagonal
        Lanes even = (lane & int32_t(step)) == 0;
        Lanes left = even ? lane : lane - int32_t(step) + int32_t(LANES);
        Lanes right = even ? lane + int32_t(step) : lane + int32_t(LANES);
#pragma GCC unroll 16
        for (int64_t l = 0; l < LANES; l++)
            if (!(l & step)) {
                Vector one = rows[l], other = rows[l + step];
                rows[l] = __builtin_shuffle(one, other, left), rows[l + step] = __builtin_shuffle(one, other, right);
            }
    }
#pragma GCC unroll 16
    for (int64_t w = 0; w < LANES; w++) *(Vector*)(into + w * PANEL) = rows[w];
}

enum Layout { AS_ROWS = 1, AS_COLUMNS = 2, AS_BOTH = 3 };

// Keys or values of one key head, as rows and as panels of columns: [keys / PANEL, W, PANEL].
struct Side {
    int64_t W, width;
    Layout layout;
    Buffer copies, columns;
    const float* rows;

    Side(const Shape& shape, int64_t max_keys, Layout layout)
        : W(shape.W), width(shape.width()), layout(layout), copies(layout & AS_ROWS ? max_keys * width : 0),
          columns(layout & AS_COLUMNS ? round_up(max_keys, PANEL) * W : 0), rows(copies.data()) {}

    // Rows that lie one after another already.
    template <typename T>
    void read_rows(const T* x, int64_t num) {
        if constexpr (std::is_same_v<T, float>)
            if (W == width) {
                rows = x;
                return;
            }
        read(x, W, num, 0);
    }

    template <typename T>
    void read(const T* x, int64_t stride, int64_t num, int64_t at) {
        if (layout & AS_ROWS)
            for (int64_t j = 0; j < num; j++)
                for (int64_t w = 0; w < W; w++) copies[(at + j) * width + w] = load(x[j * stride + w]);
        if (layout & AS_COLUMNS)
            for (int64_t j = at; j < at + num;) {
                const T* row = x + (j - at) * stride;
                float* column = &columns[j / PANEL * PANEL * W + j % PANEL];
                if (j % LANES == 0 && j + LANES <= at + num && W % LANES == 0) {
                    for (int64_t l = LANES; l < 2 * LANES; l++)  // the hardware does not foresee reading by columns
                        for (int64_t w = 0; w < W; w += 64 / sizeof(T)) __builtin_prefetch(row + l * stride + w);
                    for (int64_t w = 0; w < W; w += LANES) transpose(row + w, stride, column + w * PANEL);
                    j += LANES;
                } else {
                    for (int64_t w = 0; w < W; w++) column[w * PANEL] = load(row[w]);
                    j++;
                }
            }
    }
};

// A block of queries of one key head's query heads, token by token; row i is head i % heads of token i / heads.
struct Queries {
    const Segment& segment;
    const Shape& shape;
    int64_t g, begin, num;  // rows of the segment

    int64_t token(int64_t row) const { return (begin + row) / shape.heads(); }
    // Where a row's head of width W is in [T, H, W].
    int64_t place(int64_t row) const {
        int64_t heads = shape.heads();
        return ((segment.start + token(row)) * shape.H + g * heads + (begin + row) % heads) * shape.W;
    }
    // Keys that a row sees are [from, to).
    int64_t to(int64_t row) const { return segment.num_prefix + token(std::min(row, num - 1)) + 1; }
    int64_t from(int64_t row) const { return shape.window ? std::max<int64_t>(to(row) - shape.window, 0) : 0; }
    // First row, of a block's first, that sees key j.
    int64_t first_to_see(int64_t j) const {
        int64_t row = (j - segment.num_prefix) * shape.heads() - begin;
        return std::clamp<int64_t>(row, 0, num);
    }

    // `cos` and `sin` [T, W] turn each row by its token's angles, if they are given.
    template <typename T>
    void read(const T* x, float factor, Buffer& into, const T* cos = nullptr, const T* sin = nullptr) const {
        int64_t width = shape.width();
        std::vector<T> turned(shape.W);
        std::fill_n(into.begin(), num * width, 0.0f);
        for (int64_t row = 0; row < num; row++) {
            const T* from = x + place(row);
            int64_t angle = (segment.start + token(row)) * shape.W;
            if (cos) rotate(shape.W, from, cos + angle, sin + angle, turned.data()), from = turned.data();
            for (int64_t w = 0; w < shape.W; w++) into[row * width + w] = factor * load(from[w]);
        }
    }

    // a times each key's (or value's) row: [num, stride], as far as the block's rows see.
    void scores(const Buffer& a, const Side& keys, Buffer& into, int64_t stride) const {
        for (int64_t j = 0; j < to(num - 1); j += PANEL)
            for (int64_t row = 0; row < num; row += ROWS)
                if (j < to(row + ROWS - 1))
                    multiply_rows<false>(num - row, shape.W, &a[row * keys.width], keys.width, 1, &keys.columns[j * shape.W], PANEL,
                                    &into[row * stride + j], stride);
    }

    // Each row's weights times the keys' (or values') rows: [num, width].
    void mix(const Buffer& weights, int64_t stride, const Side& keys, Buffer& into) const {
        for (int64_t w = 0; w < keys.width; w += PANEL)
            for (int64_t row = 0; row < num; row += ROWS)
                multiply_rows<false>(num - row, to(row + ROWS - 1), &weights[row * stride], stride, 1, &keys.rows[w], keys.width,
                                &into[row * keys.width + w], keys.width);
    }

    // Add to each key what the rows that see it give it, weighted: [keys, width].
    void spread(const Buffer& weights, int64_t stride, const Buffer& rows, int64_t width, Buffer& onto) const {
        for (int64_t j = 0; j < to(num - 1); j += ROWS) {
            int64_t first = first_to_see(j);
            for (int64_t w = 0; w < width; w += PANEL)
                multiply<true, ROWS>(num - first, &weights[first * stride + j], 1, stride, &rows[first * width + w], width,
                               &onto[j * width + w], width);
        }
    }
};

// Do `work(segment, offset)` for each segment of a chunk, with its keys and values, and its prefix's before them, in
// `keys` and `values`; `offset` is where the segment's first key of head g is in [T, G, W].
template <typename T, typename Do>
void for_segments(const Chunks& chunks, int64_t chunk, const Shape& shape, int64_t g, const T* k, const T* v,
                  Side& keys, Side& values, Do&& work) {
    int64_t step = shape.G * shape.W, first = chunks.first[chunk];
    auto read = [&](int64_t start, int64_t num, int64_t at) {
        int64_t offset = start * step + g * shape.W;
        keys.read(k + offset, step, num, at), values.read(v + offset, step, num, at);
        return offset;
    };
    read(chunks.segments[first].prefix_start, chunks.segments[first].num_prefix, 0);
    for (int64_t s = first; s < chunks.first[chunk + 1]; s++) {
        const Segment& segment = chunks.segments[s];
        work(segment, read(segment.start, segment.length, segment.num_prefix));
    }
}

template <typename Do>
void for_blocks(const Segment& segment, const Shape& shape, int64_t g, Do&& work) {
    int64_t num = segment.length * shape.heads();
    for (int64_t begin = 0; begin < num; begin += BLOCK)
        work(Queries{segment, shape, g, begin, std::min(BLOCK, num - begin)});
}

// Columns of a row of scores: what `spread` reads past the last key is in it.
int64_t most_keys(const Chunks& chunks) {
    int64_t most = 0;
    for (int64_t i = 0; i < chunks.first[chunks.num]; i++) most = std::max(most, chunks.segments[i].num_keys());
    return round_up(most, PANEL) + LANES;
}

// Attention of blocks of queries, one after another.
struct Attending {
    int64_t stride;
    Buffer query, score, sum;

    Attending(const Shape& shape, int64_t stride)
        : stride(stride), query(BLOCK * shape.width()), score(BLOCK * stride), sum(BLOCK * shape.width()) {}

    // `query` holds the block's rows; `lse` [T, H] takes the logarithms of the softmax's sums, if it is given. Not inlined,
    // so that a token read in a stream, read into a cache and decoded goes through the same instructions.
    template <typename T>
    __attribute__((noinline)) void attend(const Queries& block, const Side& keys, const Side& values, T* out, float* lse) {
        int64_t width = keys.width;
        block.scores(query, keys, score, stride);
        for (int64_t row = 0; row < block.num; row++) {
            int64_t from = block.from(row), to = block.to(row);
            float* x = &score[row * stride];
            auto [most, sum_K] = exponentials(x + from, to - from);
            float inverse = 1 / sum_K;
            for (int64_t j = from; j < to; j++) x[j] *= inverse;
            std::fill(x, x + from, 0.0f);
            std::fill(x + to, x + block.to(row / ROWS * ROWS + ROWS - 1), 0.0f);
            if (lse) lse[block.place(row) / block.shape.W] = most + std::log(sum_K);
        }
        block.mix(score, stride, values, sum);
        for (int64_t row = 0; row < block.num; row++)
            for (int64_t w = 0; w < block.shape.W; w++) store(out[block.place(row) + w], sum[row * width + w]);
    }
};

template <typename T>
void forward(const Chunks& chunks, const Shape& shape, const T* q, const T* k, const T* v, T* out, float* lse,
             int threads) {
    int64_t stride = most_keys(chunks);
#pragma omp parallel num_threads(threads)
    {
        Side keys(shape, stride, AS_COLUMNS), values(shape, stride, AS_ROWS);
        Attending attending(shape, stride);
        auto attend = [&](const Queries& block) {
            block.read(q, shape.scale, attending.query);
            attending.attend(block, keys, values, out, lse);
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks.num * shape.G; task++)
            for_segments(chunks, task / shape.G, shape, task % shape.G, k, v, keys, values,
                         [&](const Segment& segment, int64_t) { for_blocks(segment, shape, task % shape.G, attend); });
    }
}

// One layer of a cache, [rows, G, positions, W] each.
template <typename T>
struct Cache {
    T *keys, *values;
    int64_t row_stride, head_stride;
};

// Keep the tokens' keys and values, and attend to all that their rows hold then. A segment's `prefix_start` is its row of
// the cache and `num_prefix` how many positions that holds before.
template <typename T>
void cached(const Segment* segments, int64_t num, const Shape& shape, const T* q, const T* k, const T* v, const T* cos,
            const T* sin, const Cache<T>& cache, T* out, int threads) {
    int64_t W = shape.W, most = 0;
    for (int64_t s = 0; s < num; s++) most = std::max(most, segments[s].num_keys());
    int64_t stride = round_up(most, PANEL) + LANES;
#pragma omp parallel num_threads(threads)
    {
        Side keys(shape, stride, AS_COLUMNS), values(shape, stride, AS_ROWS);
        Attending attending(shape, stride);
        auto place = [&](int64_t task) {
            return segments[task / shape.G].prefix_start * cache.row_stride + task % shape.G * cache.head_stride;
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num * shape.G; task++) {
            const Segment& segment = segments[task / shape.G];
            for (int64_t l = 0; l < segment.length; l++) {
                int64_t token = segment.start + l, from = (token * shape.G + task % shape.G) * W;
                int64_t to = place(task) + (segment.num_prefix + l) * W;
                if (cos) rotate(W, k + from, cos + token * W, sin + token * W, cache.keys + to);
                else std::copy_n(k + from, W, cache.keys + to);
                std::copy_n(v + from, W, cache.values + to);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num * shape.G; task++) {
            Segment segment = segments[task / shape.G];
            int64_t unseen = shape.window ? std::max<int64_t>(segment.num_prefix + 1 - shape.window, 0) : 0;
            int64_t from = place(task) + unseen * W;
            segment.num_prefix -= unseen;
            keys.read(cache.keys + from, W, segment.num_keys(), 0);
            values.read_rows(cache.values + from, segment.num_keys());
            for_blocks(segment, shape, task % shape.G, [&](const Queries& block) {
                block.read(q, shape.scale, attending.query, cos, sin);
                attending.attend(block, keys, values, out, nullptr);
            });
        }
    }
}

template <typename T>
void backward(const Chunks& chunks, const Shape& shape, const T* q, const T* k, const T* v, const T* out,
              const float* lse, const T* grad, T* grad_q, float* grad_k, float* grad_v, int threads) {
    int64_t stride = most_keys(chunks), width = shape.width(), W = shape.W, step = shape.G * W;
    // What a chunk's segments give the keys and values of their common prefix.
    std::vector<Buffer> prefix_k(chunks.num * shape.G), prefix_v(chunks.num * shape.G);
#pragma omp parallel num_threads(threads)
    {
        Side keys(shape, stride, AS_BOTH), values(shape, stride, AS_COLUMNS);
        Buffer query(BLOCK * width), towards(BLOCK * width), weight(BLOCK * stride), change(BLOCK * stride);
        Buffer given(BLOCK * width), onto_k((stride + ROWS) * width), onto_v((stride + ROWS) * width);
        auto attend = [&](const Queries& block) {
            block.read(q, shape.scale, query), block.read(grad, 1, towards);
            block.scores(query, keys, weight, stride), block.scores(towards, values, change, stride);
            int64_t last = round_up(block.to(block.num - 1), ROWS);
            for (int64_t row = 0; row < block.num; row++) {
                float *x = &weight[row * stride], *dx = &change[row * stride];
                int64_t from = block.from(row), to = block.to(row);
                float norm = lse[block.place(row) / W], delta = 0;
                const T* o = out + block.place(row);
                for (int64_t w = 0; w < W; w++) delta += load(o[w]) * towards[row * width + w];
                for (int64_t j = from; j < to; j++) x[j] = exponential(x[j] - norm);
                for (int64_t j = from; j < to; j++) dx[j] = x[j] * (dx[j] - delta);
                std::fill(x, x + from, 0.0f), std::fill(x + to, x + last, 0.0f);
                std::fill(dx, dx + from, 0.0f), std::fill(dx + to, dx + last, 0.0f);
            }
            block.mix(change, stride, keys, given);
            for (int64_t row = 0; row < block.num; row++)
                for (int64_t w = 0; w < W; w++)
                    store(grad_q[block.place(row) + w], shape.scale * given[row * width + w]);
            block.spread(change, stride, query, width, onto_k);
            block.spread(weight, stride, towards, width, onto_v);
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks.num * shape.G; task++) {
            int64_t chunk = task / shape.G, g = task % shape.G;
            int64_t own = chunks.segments[chunks.first[chunk]].num_prefix * width;  // where a segment's own keys begin
            for (Buffer* onto : {&onto_k, &onto_v}) std::fill_n(onto->begin(), own, 0.0f);
            for_segments(chunks, chunk, shape, g, k, v, keys, values, [&](const Segment& segment, int64_t offset) {
                for (Buffer* onto : {&onto_k, &onto_v})
                    std::fill_n(onto->begin() + own, (segment.length + ROWS) * width, 0.0f);
                for_blocks(segment, shape, g, attend);
                for (int64_t l = 0; l < segment.length; l++) {
                    std::copy_n(&onto_k[own + l * width], W, grad_k + offset + l * step);
                    std::copy_n(&onto_v[own + l * width], W, grad_v + offset + l * step);
                }
            });
            prefix_k[task].assign(onto_k.begin(), onto_k.begin() + own);
            prefix_v[task].assign(onto_v.begin(), onto_v.begin() + own);
        }
#pragma omp for
        for (int64_t g = 0; g < shape.G; g++)
            for (int64_t chunk = 0; chunk < chunks.num; chunk++) {
                const Segment& segment = chunks.segments[chunks.first[chunk]];
                const Buffer &own_k = prefix_k[chunk * shape.G + g], &own_v = prefix_v[chunk * shape.G + g];
                for (int64_t j = 0; j < segment.num_prefix; j++) {
                    int64_t at = (segment.prefix_start + j) * step + g * W;
                    for (int64_t w = 0; w < W; w++) grad_k[at + w] += own_k[j * width + w];
                    for (int64_t w = 0; w < W; w++) grad_v[at + w] += own_v[j * width + w];
                }
            }
    }
}

}  // namespace

#define ATTENTION(T, NAME)                                                                                             \
    void segments_forward_##NAME(int64_t num, const int64_t* segments, const int64_t* first, int64_t H, int64_t G,     \
                                 int64_t W, float scale, int64_t window, const T* q, const T* k, const T* v, T* out,   \
                                 float* lse, int threads) {                                                            \
        forward(Chunks{(const Segment*)segments, first, num}, Shape{H, G, W, scale, window}, q, k, v, out, lse,        \
                threads);                                                                                              \
    }                                                                                                                  \
    void segments_backward_##NAME(int64_t num, const int64_t* segments, const int64_t* first, int64_t H, int64_t G,    \
                                  int64_t W, float scale, int64_t window, const T* q, const T* k, const T* v,          \
                                  const T* out, const float* lse, const T* grad, T* grad_q, float* grad_k,             \
                                  float* grad_v, int threads) {                                                        \
        backward(Chunks{(const Segment*)segments, first, num}, Shape{H, G, W, scale, window}, q, k, v, out, lse, grad, \
                 grad_q, grad_k, grad_v, threads);                                                                     \
    }                                                                                                                  \
    void attend_cached_##NAME(int64_t num, const int64_t* segments, int64_t H, int64_t G, int64_t W, float scale,      \
                              int64_t window, const T* q, const T* k, const T* v, const T* cos, const T* sin, T* keys, \
                              T* values, int64_t row_stride, int64_t head_stride, T* out, int threads) {               \
        cached((const Segment*)segments, num, Shape{H, G, W, scale, window}, q, k, v, cos, sin,                        \
               Cache<T>{keys, values, row_stride, head_stride}, out, threads);                                         \
    }

FOR_EACH_TYPE(ATTENTION)
