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

}  // namespace

#define DECODING(T, NAME)                                                                                              \
    void add_lora_rows_##NAME(int64_t B, int64_t I, int64_t O, int64_t R, const T* x, T* y, const int64_t* slot,       \
                              const float* scaling, const T* a, int64_t a_slot, const T* b, int64_t b_slot,            \
                              int64_t b_out, int64_t b_rank, int threads) {                                            \
        add_lora(B, I, O, R, x, y, slot, scaling, a, a_slot, b, b_slot, b_out, b_rank, threads);                       \
    }

FOR_EACH_TYPE(DECODING)
