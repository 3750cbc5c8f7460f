// Norms, gates, rotary embedding and losses, forward and backward: each row alone. See kernels.py.

#include "numbers.h"

namespace {

constexpr int64_t FEW = 1 << 15;  // numbers for which waking a second thread costs more than it saves

template <typename T>
void rms_norm(int64_t num, int64_t D, const T* x_TD, const float* weight, float eps, T* out_TD, int threads) {
#pragma omp parallel for num_threads(threads) if (num * D > FEW)
    for (int64_t t = 0; t < num; t++) {
        const T* x = x_TD + t * D;
        T* out = out_TD + t * D;
        float inverse = 1 / std::sqrt(dot(x, x, D) / D + eps);
        for (int64_t i = 0; i < D; i++) store(out[i], load(x[i]) * inverse * weight[i]);
    }
}

// The gradient with respect to x, plus `onto` where there is one.
template <typename T>
void rms_norm_gradient(int64_t num, int64_t D, const T* grad_TD, const T* x_TD, const float* weight, float eps,
                       const T* onto_TD, T* out_TD, int threads) {
#pragma omp parallel for num_threads(threads) if (num * D > FEW)
    for (int64_t t = 0; t < num; t++) {
        const T *grad = grad_TD + t * D, *x = x_TD + t * D;
        T* out = out_TD + t * D;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < D; i++) sum += load(grad[i]) * weight[i] * load(x[i]);
        float inverse = 1 / std::sqrt(dot(x, x, D) / D + eps), along = sum / D * inverse * inverse;
        auto gradient = [=](int64_t i) { return (load(grad[i]) * weight[i] - load(x[i]) * along) * inverse; };
        if (onto_TD)
            for (int64_t i = 0; i < D; i++) store(out[i], gradient(i) + load(onto_TD[t * D + i]));
        else
            for (int64_t i = 0; i < D; i++) store(out[i], gradient(i));
    }
}

template <typename T>
void gated(int64_t num, const T* gate, const T* up, T* out, int threads) {
#pragma omp parallel for simd num_threads(threads) if (num > FEW)
    for (int64_t i = 0; i < num; i++) {
        float x = load(gate[i]);
        store(out[i], x / (1 + exponential(-x)) * load(up[i]));
    }
}

template <typename T>
void gated_gradient(int64_t num, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int threads) {
#pragma omp parallel for simd num_threads(threads) if (num > FEW)
    for (int64_t i = 0; i < num; i++) {
        float x = load(gate[i]), sigmoid = 1 / (1 + exponential(-x)), y = load(grad[i]) * sigmoid;
        store(grad_gate[i], y * load(up[i]) * (1 + x * (1 - sigmoid)));
        store(grad_up[i], y * x);
    }
}

template <bool BACK, typename T>
void rotate_all(int64_t num, int64_t H, int64_t W, const T* x, const T* cos, const T* sin, T* out, int threads) {
#pragma omp parallel for num_threads(threads) if (num * H * W > FEW)
    for (int64_t t = 0; t < num; t++)
        for (int64_t head = t * H; head < t * H + H; head++)
            (BACK ? rotate_back<T> : rotate<T>)(W, x + head * W, cos + t * W, sin + t * W, out + head * W);
}

template <typename T>
float log_sum(const T* x, int64_t num) {
    float most = load(x[0]), sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < num; i++) most = load(x[i]) > most ? load(x[i]) : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < num; i++) sum += exponential(load(x[i]) - most);
    return most + std::log(sum);
}

template <typename T>
void token_losses(int64_t num, int64_t V, const T* logits, const int64_t* targets, float* losses, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < num; t++) losses[t] = log_sum(logits + t * V, V) - load(logits[t * V + targets[t]]);
}

template <typename T>
void token_loss_gradient(int64_t num, int64_t V, const T* logits_TV, const int64_t* targets, const float* weights,
                         T* out_TV, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < num; t++) {
        const T* logits = logits_TV + t * V;
        T* out = out_TV + t * V;
        float norm = log_sum(logits, V), weight = weights[t];
        for (int64_t i = 0; i < V; i++) store(out[i], exponential(load(logits[i]) - norm) * weight);
        store(out[targets[t]], (std::exp(load(logits[targets[t]]) - norm) - 1) * weight);
    }
}

}  // namespace

#define ELEMENTWISE(T, NAME)                                                                                           \
    void rms_norm_##NAME(int64_t num, int64_t D, const T* x, const float* weight, float eps, T* out, int threads) {    \
        rms_norm(num, D, x, weight, eps, out, threads);                                                                \
    }                                                                                                                  \
    void rms_norm_gradient_##NAME(int64_t num, int64_t D, const T* grad, const T* x, const float* weight, float eps,   \
                                  const T* onto, T* out, int threads) {                                                \
        rms_norm_gradient(num, D, grad, x, weight, eps, onto, out, threads);                                           \
    }                                                                                                                  \
    void gated_##NAME(int64_t num, const T* gate, const T* up, T* out, int threads) {                                  \
        gated(num, gate, up, out, threads);                                                                            \
    }                                                                                                                  \
    void gated_gradient_##NAME(int64_t num, const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,       \
                               int threads) {                                                                          \
        gated_gradient(num, grad, gate, up, grad_gate, grad_up, threads);                                              \
    }                                                                                                                  \
    void rotate_##NAME(int64_t num, int64_t H, int64_t W, const T* x, const T* cos, const T* sin, T* out,              \
                       int threads) {                                                                                  \
        rotate_all<false>(num, H, W, x, cos, sin, out, threads);                                                       \
    }                                                                                                                  \
    void rotate_back_##NAME(int64_t num, int64_t H, int64_t W, const T* x, const T* cos, const T* sin, T* out,         \
                            int threads) {                                                                             \
        rotate_all<true>(num, H, W, x, cos, sin, out, threads);                                                        \
    }                                                                                                                  \
    void token_losses_##NAME(int64_t num, int64_t V, const T* logits, const int64_t* targets, float* losses,           \
                             int threads) {                                                                            \
        token_losses(num, V, logits, targets, losses, threads);                                                        \
    }                                                                                                                  \
    void token_loss_gradient_##NAME(int64_t num, int64_t V, const T* logits, const int64_t* targets,                   \
                                    const float* weights, T* out, int threads) {                                       \
        token_loss_gradient(num, V, logits, targets, weights, out, threads);                                           \
    }

FOR_EACH_TYPE(ELEMENTWISE)
