// One decoding step, one new token for each of B rows: LoRA and attention to the cache. See decoding.py, whose shapes
// these are. A row's numbers are computed in an order that does not depend on who else is in the batch.

#include "numbers.h"

namespace {

template <typename T>
void add_lora(int64_t B, int64_t I, int64_t O, int64_t R, const T* x, T* y, const int64_t* slot, const float* scaling,
              const T* a, int64_t a_slot, const T* b, int64_t b_slot, int64_t b_out, int64_t b_rank, int threads) {
    constexpr int64_t BLOCK = 64;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < B; row++) {
        if (scaling[row] == 0) continue;
        std::vector<float> low(R);
        for (int64_t r = 0; r < R; r++) low[r] = dot(x + row * I, a + slot[row] * a_slot + r * I, I) * scaling[row];
        for (int64_t start = 0; start < O; start += BLOCK) {
            const T* b_RO = b + slot[row] * b_slot + start * b_out;
            T* y_O = y + row * O + start;
            int64_t num = std::min(BLOCK, O - start);
            float added[BLOCK] = {};
            for (int64_t r = 0; r < R; r++)
                for (int64_t o = 0; o < num; o++) added[o] += low[r] * load(b_RO[r * b_rank + o * b_out]);
            for (int64_t o = 0; o < num; o++) store(y_O[o], load(y_O[o]) + added[o]);
        }
    }
}

// One row's queries of one key head, `heads` of them, over `num` keys. WIDTH is W where it is known here, else 0.
template <typename T, int64_t WIDTH>
void attend_head(int64_t heads, int64_t W, int64_t num, const T* queries, const T* keys, const T* values, float scale,
                 T* out) {
    constexpr int64_t BLOCK = 64;  // keys that stay in the nearest cache while all heads read them
    if (WIDTH) W = WIDTH;
    std::vector<float> scores(heads * num), sums(heads * W);
    for (int64_t start = 0; start < num; start += BLOCK)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t p = start; p < std::min(start + BLOCK, num); p++)
                scores[h * num + p] = scale * dot(queries + h * W, keys + p * W, W);
    for (int64_t h = 0; h < heads; h++) {
        float *score = &scores[h * num], sum = exponentials(score, num).sum;
        for (int64_t p = 0; p < num; p++) score[p] /= sum;
    }
    for (int64_t start = 0; start < num; start += BLOCK)
        for (int64_t h = 0; h < heads; h++) {
            float known[WIDTH ? WIDTH : 1], *sum = WIDTH ? known : &sums[h * W];  // kept in registers where it is known
            if (WIDTH) std::copy_n(&sums[h * W], W, sum);
            for (int64_t p = start; p < std::min(start + BLOCK, num); p++)
                for (int64_t w = 0; w < W; w++) sum[w] += scores[h * num + p] * load(values[p * W + w]);
            if (WIDTH) std::copy_n(sum, W, &sums[h * W]);
        }
    for (int64_t i = 0; i < heads * W; i++) store(out[i], sums[i]);
}

template <typename T>
void attend(int64_t B, int64_t H, int64_t G, int64_t W, const T* q, const T* k, const T* v, const T* cos, const T* sin,
            T* keys, T* values, int64_t row_stride, int64_t head_stride, const int64_t* lengths, int64_t window,
            float scale, T* out, int threads) {
    int64_t heads = H / G;
#pragma omp parallel for num_threads(threads)
    for (int64_t item = 0; item < B * G; item++) {
        int64_t row = item / G, place = row * row_stride + item % G * head_stride, last = lengths[row];
        int64_t first = window ? std::max<int64_t>(last + 1 - window, 0) : 0;
        std::vector<T> queries(heads * W);
        auto turn = [&](const T* x, T* to) {
            if (cos) rotate(W, x, cos + row * W, sin + row * W, to);
            else std::copy_n(x, W, to);
        };
        for (int64_t h = 0; h < heads; h++) turn(q + (item * heads + h) * W, &queries[h * W]);
        turn(k + item * W, keys + place + last * W);
        std::copy_n(v + item * W, W, values + place + last * W);
        (W == 64 ? attend_head<T, 64> : W == 128 ? attend_head<T, 128> : attend_head<T, 0>)(
            heads, W, last + 1 - first, queries.data(), keys + place + first * W, values + place + first * W, scale,
            out + item * heads * W);
    }
}

}  // namespace

#define DECODING(T, NAME)                                                                                              \
    void add_lora_rows_##NAME(int64_t B, int64_t I, int64_t O, int64_t R, const T* x, T* y, const int64_t* slot,       \
                              const float* scaling, const T* a, int64_t a_slot, const T* b, int64_t b_slot,            \
                              int64_t b_out, int64_t b_rank, int threads) {                                            \
        add_lora(B, I, O, R, x, y, slot, scaling, a, a_slot, b, b_slot, b_out, b_rank, threads);                       \
    }                                                                                                                  \
    void attend_rows_##NAME(int64_t B, int64_t H, int64_t G, int64_t W, const T* q, const T* k, const T* v,            \
                            const T* cos, const T* sin, T* keys, T* values, int64_t row_stride, int64_t head_stride,   \
                            const int64_t* lengths, int64_t window, float scale, T* out, int threads) {                \
        attend(B, H, G, W, q, k, v, cos, sin, keys, values, row_stride, head_stride, lengths, window, scale, out,      \
               threads);                                                                                               \
    }

FOR_EACH_TYPE(DECODING)
