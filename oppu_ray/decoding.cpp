// One decoding step, one new token for each of B rows: what stands between its matrix products. See decoding.py.
// Shapes as there. A row's numbers are computed in an order that does not depend on who else is in the batch.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline void store(float& to, float x) { to = x; }
inline void store(bfloat16& to, float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    to.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}

// Cephes' expf, within 2 units of the last place: unlike libm's, in arithmetic done for eight numbers at once.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;  // not a number stays so
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * std::bit_cast<float>((int32_t(n) + 127) << 23);
}

template <typename T>
float dot(const T* x, const T* y, int64_t num) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < num; i++) sum += load(x[i]) * load(y[i]);
    return sum;
}

template <typename T>
void rms_norm(int64_t B, int64_t D, const T* x, const T* weight, float eps, T* out) {
    for (int64_t row = 0; row < B; row++, x += D, out += D) {
        float inverse = 1 / std::sqrt(dot(x, x, D) / D + eps);
        for (int64_t i = 0; i < D; i++) store(out[i], load(x[i]) * inverse * load(weight[i]));
    }
}

template <typename T>
void gated(int64_t num, T* gate, const T* up, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < num; i++) {
        float x = load(gate[i]);
        store(gate[i], x / (1 + exponential(-x)) * load(up[i]));
    }
}

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

// x by its row's angles, or as it is where there are none.
template <typename T>
void rotate(int64_t row, int64_t W, const T* x, const T* cos, const T* sin, T* out) {
    if (!cos) {
        std::copy_n(x, W, out);
        return;
    }
    cos += row * W, sin += row * W;
    for (int64_t i = 0, j = W / 2; j < W; i++, j++) {
        float first = load(x[i]), second = load(x[j]);
        store(out[i], first * load(cos[i]) - second * load(sin[i]));
        store(out[j], second * load(cos[j]) + first * load(sin[j]));
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
        float *score = &scores[h * num], most = *std::max_element(score, score + num), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t p = 0; p < num; p++) sum += score[p] = exponential(score[p] - most);
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
        for (int64_t h = 0; h < heads; h++) rotate(row, W, q + (item * heads + h) * W, cos, sin, &queries[h * W]);
        rotate(row, W, k + item * W, cos, sin, keys + place + last * W);
        std::copy_n(v + item * W, W, values + place + last * W);
        (W == 64 ? attend_head<T, 64> : W == 128 ? attend_head<T, 128> : attend_head<T, 0>)(
            heads, W, last + 1 - first, queries.data(), keys + place + first * W, values + place + first * W, scale,
            out + item * heads * W);
    }
}

}  // namespace

#define FOR(T, NAME)                                                                                                   \
    void rms_norm_##NAME(int64_t B, int64_t D, const T* x, const T* weight, float eps, T* out) {                       \
        rms_norm(B, D, x, weight, eps, out);                                                                           \
    }                                                                                                                  \
    void gated_##NAME(int64_t num, T* gate, const T* up, int threads) { gated(num, gate, up, threads); }               \
    void add_lora_##NAME(int64_t B, int64_t I, int64_t O, int64_t R, const T* x, T* y, const int64_t* slot,            \
                         const float* scaling, const T* a, int64_t a_slot, const T* b, int64_t b_slot, int64_t b_out,  \
                         int64_t b_rank, int threads) {                                                                \
        add_lora(B, I, O, R, x, y, slot, scaling, a, a_slot, b, b_slot, b_out, b_rank, threads);                       \
    }                                                                                                                  \
    void attend_##NAME(int64_t B, int64_t H, int64_t G, int64_t W, const T* q, const T* k, const T* v, const T* cos,   \
                       const T* sin, T* keys, T* values, int64_t row_stride, int64_t head_stride,                      \
                       const int64_t* lengths, int64_t window, float scale, T* out, int threads) {                     \
        attend(B, H, G, W, q, k, v, cos, sin, keys, values, row_stride, head_stride, lengths, window, scale, out,      \
               threads);                                                                                               \
    }

extern "C" {
FOR(float, float32)
FOR(bfloat16, bfloat16)
}
