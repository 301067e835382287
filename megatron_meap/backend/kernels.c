/* The element-wise parts of a transformer over bf16 numbers, each in one pass over memory; arithmetic in 32 bits.

`native.py` compiles this for the processor at hand. Loops over rows are shared among the threads of PyTorch's OpenMP;
those over a row are written so that GCC and Clang vectorise them. Matrices are contiguous unless strides are given. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t num;

#define ROWS _Pragma("omp parallel for schedule(static)")
#define VECTOR _Pragma("omp simd")

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline bf16 narrow(float x) { /* to the nearest, ties to even; a NaN of arithmetic stays one */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float exponential(float x) { /* within 2e-7, relatively; 0 below -87.7, finite above 88 */
    x = x < -88.0f ? -88.0f : x; /* where the exponent of 2 is -127, whose bits are those of 0 */
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* out = x * inverse * weight, inverse = 1 / root mean square: x and out [rows, h], weight [h], inverse [rows]. */
void rms_norm(const bf16 *x, const float *weight, float eps, num rows, num h, bf16 *out, float *inverse) {
    ROWS
    for (num i = 0; i < rows; i++) {
        const bf16 *in = x + i * h;
        bf16 *to = out + i * h;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (num j = 0; j < h; j++) sum += wide(in[j]) * wide(in[j]);
        float scale = inverse[i] = 1 / sqrtf(sum / h + eps);
        VECTOR
        for (num j = 0; j < h; j++) to[j] = narrow(wide(in[j]) * scale * weight[j]);
    }
}

/* Gradients of x, and of the weight in parts [parts, h], zeros before: which rows are added up in which order does not
depend on the threads. */
void rms_norm_backward(const bf16 *grad, const bf16 *x, const float *weight, const float *inverse, num rows, num h,
                       bf16 *dx, num parts, float *dweights) {
    ROWS
    for (num part = 0; part < parts; part++) {
        float *dweight = dweights + part * h;
        for (num i = rows * part / parts; i < rows * (part + 1) / parts; i++) {
            const bf16 *g = grad + i * h, *in = x + i * h;
            bf16 *to = dx + i * h;
            float scale = inverse[i], sum = 0;
#pragma omp simd reduction(+ : sum)
            for (num j = 0; j < h; j++) {
                float along = wide(g[j]) * wide(in[j]);
                sum += along * weight[j];
                dweight[j] += along * scale;
            }
            float back = sum * scale * scale * scale / h;
            VECTOR
            for (num j = 0; j < h; j++) to[j] = narrow(wide(g[j]) * weight[j] * scale - wide(in[j]) * back);
        }
    }
}

/* out = silu(gate) * up: x [rows, 2f], gate first, out [rows, f]. */
void swiglu(const bf16 *x, num rows, num f, bf16 *out) {
    ROWS
    for (num i = 0; i < rows; i++) {
        const bf16 *gate = x + 2 * i * f, *up = gate + f;
        bf16 *to = out + i * f;
        VECTOR
        for (num j = 0; j < f; j++) to[j] = narrow(wide(gate[j]) * wide(up[j]) / (1 + exponential(-wide(gate[j]))));
    }
}

void swiglu_backward(const bf16 *grad, const bf16 *x, num rows, num f, bf16 *dx) {
    ROWS
    for (num i = 0; i < rows; i++) {
        const bf16 *g = grad + i * f, *gate = x + 2 * i * f, *up = gate + f;
        bf16 *dgate = dx + 2 * i * f, *dup = dgate + f;
        VECTOR
        for (num j = 0; j < f; j++) {
            float a = wide(gate[j]), sigmoid = 1 / (1 + exponential(-a));
            dup[j] = narrow(wide(g[j]) * a * sigmoid);
            dgate[j] = narrow(wide(g[j]) * wide(up[j]) * sigmoid * (1 + a * (1 - sigmoid)));
        }
    }
}

/* Rotary positions, half-split: x [s, heads, d] with two strides, cos and sin [s, turned], out contiguous. */
void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, num s, num heads, num d, num turned, num stride_s,
            num stride_head, bf16 *out) {
    num half = turned / 2;
    ROWS
    for (num i = 0; i < s; i++) {
        const bf16 *c = cos + i * turned, *n = sin + i * turned;
        for (num k = 0; k < heads; k++) {
            const bf16 *in = x + i * stride_s + k * stride_head;
            bf16 *to = out + (i * heads + k) * d;
            VECTOR
            for (num j = 0; j < half; j++) {
                float a = wide(in[j]), b = wide(in[j + half]);
                to[j] = narrow(a * wide(c[j]) - b * wide(n[j]));
                to[j + half] = narrow(b * wide(c[j + half]) + a * wide(n[j + half]));
            }
            memcpy(to + turned, in + turned, (d - turned) * sizeof *to);
        }
    }
}

static inline float largest(const bf16 *x, num count) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (num j = 0; j < count; j++) most = wide(x[j]) > most ? wide(x[j]) : most;
    return most;
}

/* Of every row of the logits [rows, v]: the largest, and the sum of the exponentials of the distances from it. */
void row_sums(const bf16 *logits, num rows, num v, float *most, float *sums) {
    ROWS
    for (num i = 0; i < rows; i++) {
        const bf16 *x = logits + i * v;
        float top = most[i] = largest(x, v), sum = 0;
#pragma omp simd reduction(+ : sum)
        for (num j = 0; j < v; j++) sum += exponential(wide(x[j]) - top);
        sums[i] = sum;
    }
}

/* The gradient of cross-entropy over the logits: (probability - 1 at the target, none where it is -1) * scale. */
void cross_entropy_backward(bf16 *logits, const float *log_sum, const num *target, const float *scale, num rows,
                            num v) {
    ROWS
    for (num i = 0; i < rows; i++) {
        bf16 *x = logits + i * v;
        num at = target[i];
        float right = at < 0 ? 0 : (exponential(wide(x[at]) - log_sum[i]) - 1) * scale[i];
        VECTOR
        for (num j = 0; j < v; j++) x[j] = narrow(exponential(wide(x[j]) - log_sum[i]) * scale[i]);
        if (at >= 0) x[at] = narrow(right);
    }
}

/* Causal attention, a block of queries: row r of the scores [rows, width] sees first + r % block + 1 columns. */
void seen_largest(const bf16 *scores, num rows, num width, num block, num first, float *most) {
    ROWS
    for (num i = 0; i < rows; i++) most[i] = largest(scores + i * width, first + i % block + 1);
}

/* Replaces scores by exp(scale * score) where they are seen, by 0 elsewhere; sums [rows], or none, of the rounded ones. */
void seen_exponentials(bf16 *scores, num rows, num width, num block, num first, float scale, float *sums) {
    ROWS
    for (num i = 0; i < rows; i++) {
        bf16 *x = scores + i * width;
        num seen = first + i % block + 1;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (num j = 0; j < seen; j++) {
            x[j] = narrow(exponential(wide(x[j]) * scale));
            sum += wide(x[j]);
        }
        memset(x + seen, 0, (width - seen) * sizeof *x);
        if (sums) sums[i] = sum;
    }
}
