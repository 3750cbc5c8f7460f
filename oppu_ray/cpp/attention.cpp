// Attention of a stream's segments, forward and backward. See attention.py, whose shapes these are.
// One key head of one chunk (segments with the same prefix) is a task: what it computes depends on no other chunk and
// no thread. All is in float: queries, keys and values are copied to where products of small blocks read them.

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

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// c [ROWS, PANEL] = a [ROWS, num] b [num, PANEL], or added to c.
template <bool ADD>
inline void multiply(int64_t num, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                     float* c, int64_t c_row) {
    Vector sums[ROWS][2] = {};
    for (int64_t i = 0; i < num; i++, a += a_step, b += b_step) {
        Vector left = *(const Vector*)b, right = *(const Vector*)(b + LANES);
        for (int64_t row = 0; row < ROWS; row++) {
            sums[row][0] += a[row * a_row] * left;
            sums[row][1] += a[row * a_row] * right;
        }
    }
    for (int64_t row = 0; row < ROWS; row++, c += c_row) {
        Vector *left = (Vector*)c, *right = (Vector*)(c + LANES);
        *left = ADD ? *left + sums[row][0] : sums[row][0];
        *right = ADD ? *right + sums[row][1] : sums[row][1];
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

// Keys or values of one key head, as rows and as panels of columns: [keys / PANEL, W, PANEL].
struct Side {
    int64_t W, width;
    Buffer rows, columns;

    Side(const Shape& shape, int64_t max_keys)
        : W(shape.W), width(shape.width()), rows(max_keys * width), columns(round_up(max_keys, PANEL) * W) {}

    template <typename T>
    void read(const T* x, int64_t stride, int64_t num, int64_t at) {
        for (int64_t j = at; j < at + num; j++, x += stride) {
            float *row = &rows[j * width], *column = &columns[j / PANEL * PANEL * W + j % PANEL];
            for (int64_t w = 0; w < W; w++) row[w] = load(x[w]);
            for (int64_t w = 0; w < W; w++) column[w * PANEL] = row[w];
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
    int64_t padded() const { return round_up(num, ROWS); }
    // First row, of a block's first, that sees key j.
    int64_t first_to_see(int64_t j) const {
        int64_t row = (j - segment.num_prefix) * shape.heads() - begin;
        return std::clamp<int64_t>(row, 0, num);
    }

    template <typename T>
    void read(const T* x, float factor, Buffer& into) const {
        int64_t width = shape.width();
        std::fill_n(into.begin(), padded() * width, 0.0f);
        for (int64_t row = 0; row < num; row++) {
            const T* from = x + place(row);
            for (int64_t w = 0; w < shape.W; w++) into[row * width + w] = factor * load(from[w]);
        }
    }

    // a times each key's (or value's) row: [padded, stride], as far as the block's rows see.
    void scores(const Buffer& a, const Side& keys, Buffer& into, int64_t stride) const {
        for (int64_t j = 0; j < to(num - 1); j += PANEL)
            for (int64_t row = 0; row < padded(); row += ROWS)
                if (j < to(row + ROWS - 1))
                    multiply<false>(shape.W, &a[row * keys.width], keys.width, 1, &keys.columns[j * shape.W], PANEL,
                                    &into[row * stride + j], stride);
    }

    // Each row's weights times the keys' (or values') rows: [padded, width].
    void mix(const Buffer& weights, int64_t stride, const Side& keys, Buffer& into) const {
        for (int64_t w = 0; w < keys.width; w += PANEL)
            for (int64_t row = 0; row < padded(); row += ROWS)
                multiply<false>(to(row + ROWS - 1), &weights[row * stride], stride, 1, &keys.rows[w], keys.width,
                                &into[row * keys.width + w], keys.width);
    }

    // Add to each key what the rows that see it give it, weighted: [keys, width].
    void spread(const Buffer& weights, int64_t stride, const Buffer& rows, int64_t width, Buffer& onto) const {
        for (int64_t j = 0; j < to(num - 1); j += ROWS) {
            int64_t first = first_to_see(j);
            for (int64_t w = 0; w < width; w += PANEL)
                multiply<true>(num - first, &weights[first * stride + j], 1, stride, &rows[first * width + w], width,
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

template <typename T>
void forward(const Chunks& chunks, const Shape& shape, const T* q, const T* k, const T* v, T* out, float* lse,
             int threads) {
    int64_t stride = most_keys(chunks), width = shape.width();
#pragma omp parallel num_threads(threads)
    {
        Side keys(shape, stride), values(shape, stride);
        Buffer query(BLOCK * width), score(BLOCK * stride), sum(BLOCK * width);
        auto attend = [&](const Queries& block) {
            block.read(q, shape.scale, query);
            block.scores(query, keys, score, stride);
            for (int64_t row = 0; row < block.padded(); row++) {
                int64_t from = block.from(row), to = block.to(row);
                float* x = &score[row * stride];
                auto [most, sum_K] = exponentials(x + from, to - from);
                float inverse = 1 / sum_K;
                for (int64_t j = from; j < to; j++) x[j] *= inverse;
                std::fill(x, x + from, 0.0f);
                std::fill(x + to, x + block.to(row / ROWS * ROWS + ROWS - 1), 0.0f);
                if (row < block.num) lse[block.place(row) / shape.W] = most + std::log(sum_K);
            }
            block.mix(score, stride, values, sum);
            for (int64_t row = 0; row < block.num; row++)
                for (int64_t w = 0; w < shape.W; w++) store(out[block.place(row) + w], sum[row * width + w]);
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks.num * shape.G; task++)
            for_segments(chunks, task / shape.G, shape, task % shape.G, k, v, keys, values,
                         [&](const Segment& segment, int64_t) { for_blocks(segment, shape, task % shape.G, attend); });
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
        Side keys(shape, stride), values(shape, stride);
        Buffer query(BLOCK * width), towards(BLOCK * width), weight(BLOCK * stride), change(BLOCK * stride);
        Buffer given(BLOCK * width), onto_k((stride + ROWS) * width), onto_v((stride + ROWS) * width);
        auto attend = [&](const Queries& block) {
            block.read(q, shape.scale, query), block.read(grad, 1, towards);
            block.scores(query, keys, weight, stride), block.scores(towards, values, change, stride);
            int64_t last = round_up(block.to(block.num - 1), ROWS);
            for (int64_t row = 0; row < block.padded(); row++) {
                float *x = &weight[row * stride], *dx = &change[row * stride];
                int64_t from = last, to = last;  // of a row that is none
                if (row < block.num) {
                    from = block.from(row), to = block.to(row);
                    float norm = lse[block.place(row) / W], delta = 0;
                    const T* o = out + block.place(row);
                    for (int64_t w = 0; w < W; w++) delta += load(o[w]) * towards[row * width + w];
                    for (int64_t j = from; j < to; j++) x[j] = exponential(x[j] - norm);
                    for (int64_t j = from; j < to; j++) dx[j] = x[j] * (dx[j] - delta);
                }
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
    }

FOR_EACH_TYPE(ATTENTION)
