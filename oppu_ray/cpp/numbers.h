// Numbers as tensors hold them, and what is computed with them one or a vector at a time.
#pragma once

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

// Cephes' expf, within 2 units of the last place: unlike libm's, in arithmetic done for many numbers at once.
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

struct Exponentials {
    float most, sum;
};

// Scores to exponentials of what they are below the highest: a softmax before its division.
inline Exponentials exponentials(float* x, int64_t num) {
    float most = x[0], sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < num; i++) most = x[i] > most ? x[i] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < num; i++) sum += x[i] = exponential(x[i] - most);
    return {most, sum};
}

// A head of width W by its token's angles.
template <typename T>
void rotate(int64_t W, const T* x, const T* cos, const T* sin, T* __restrict out) {
    for (int64_t i = 0, j = W / 2; j < W; i++, j++) {
        float first = load(x[i]), second = load(x[j]);
        store(out[i], first * load(cos[i]) - second * load(sin[i]));
        store(out[j], second * load(cos[j]) + first * load(sin[j]));
    }
}

// The gradient of `rotate`.
template <typename T>
void rotate_back(int64_t W, const T* grad, const T* cos, const T* sin, T* __restrict out) {
    for (int64_t i = 0, j = W / 2; j < W; i++, j++) {
        float first = load(grad[i]), second = load(grad[j]);
        store(out[i], first * load(cos[i]) + second * load(sin[j]));
        store(out[j], second * load(cos[j]) - first * load(sin[i]));
    }
}

}  // namespace

// A function for each type of tensor, for ctypes.
#define FOR_EACH_TYPE(DEFINE)  \
    extern "C" {               \
    DEFINE(float, float32)     \
    DEFINE(bfloat16, bfloat16) \
    }
