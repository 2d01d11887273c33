/* The row loops of CPUs, for float32 logits: rows_torch.py and entries_torch.py, one token at a time.
 *
 * Those files specify what is computed; layout.py has the notation. A token's columns are one stretch of memory. Sums are
 * taken in float32 over BLOCK columns, then in double. Threads take one token after the other from a common counter, so
 * that a busy core delays its own token alone; they are the caller's, and this file needs no OpenMP library. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 1024 /* four rows of a block lie in the first-level cache */
#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define TOKENS for (int64_t i; (i = __atomic_fetch_add(job->next, 1, __ATOMIC_RELAXED)) < job->n;)
#define BLOCKS(start, width) \
    for (int64_t start = 0, width; start < columns && (width = columns - start < BLOCK ? columns - start : BLOCK); start += BLOCK)

enum { REVERSE_KL, FORWARD_KL, JSD, SAMPLED };

typedef union { float f; int32_t i; } Bits;

/* e^x to 2 ulp; 0 where that is below the least normal float32. For x <= 88. */
INLINE float exp_f32(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(bounded * 1.44269504f);
    float r = __builtin_fmaf(n, -0.693359375f, bounded);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;
    y = __builtin_fmaf(y, r, 1.3981999507e-3f);
    y = __builtin_fmaf(y, r, 8.3334519073e-3f);
    y = __builtin_fmaf(y, r, 4.1665795894e-2f);
    y = __builtin_fmaf(y, r, 1.6666665459e-1f);
    y = __builtin_fmaf(y, r, 5.0000001201e-1f);
    y = __builtin_fmaf(y, r * r, r) + 1.0f;
    Bits power = {.i = ((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : y * power.f;
}

/* e^x - 1 - x for |x| <= 0.35, without cancellation. */
INLINE float exp_rest(float x) {
    float y = 2.4801587e-5f;
    y = __builtin_fmaf(y, x, 1.9841270e-4f);
    y = __builtin_fmaf(y, x, 1.3888889e-3f);
    y = __builtin_fmaf(y, x, 8.3333333e-3f);
    y = __builtin_fmaf(y, x, 4.1666667e-2f);
    y = __builtin_fmaf(y, x, 1.6666667e-1f);
    return __builtin_fmaf(y, x, 0.5f) * x * x;
}

/* e^x - 1 of x <= 0. */
INLINE float expm1_f32(float x) {
    float small = exp_rest(x < -0.35f ? -0.35f : x) + x;
    return x > -0.35f ? small : exp_f32(x) - 1.0f;
}

/* log(1 + y) of -1 < y <= 0. */
INLINE float log1p_f32(float y) {
    Bits u = {.f = 1.0f + y};
    int32_t e = (u.i - 0x3f3504f3) >> 23;
    Bits m = {.i = u.i - e * (1 << 23)};
    float f = e == 0 ? y : m.f - 1.0f, z = f * f, p = 7.0376836292e-2f;
    p = __builtin_fmaf(p, f, -1.1514610310e-1f);
    p = __builtin_fmaf(p, f, 1.1676998740e-1f);
    p = __builtin_fmaf(p, f, -1.2420140846e-1f);
    p = __builtin_fmaf(p, f, 1.4249322787e-1f);
    p = __builtin_fmaf(p, f, -1.6668057665e-1f);
    p = __builtin_fmaf(p, f, 2.0000714765e-1f);
    p = __builtin_fmaf(p, f, -2.4999993993e-1f);
    p = __builtin_fmaf(p, f, 3.3333331174e-1f);
    float rest = __builtin_fmaf(-0.5f, z, __builtin_fmaf((float)e, -2.12194440e-4f, f * z * p));
    return f + rest + (float)e * 0.693359375f;
}

INLINE float tanh_f32(float x) {
    float size = __builtin_fabsf(x), z = x * x, y = -5.70498872745e-3f;
    y = __builtin_fmaf(y, z, 2.06390887954e-2f);
    y = __builtin_fmaf(y, z, -5.37397155531e-2f);
    y = __builtin_fmaf(y, z, 1.33314422036e-1f);
    y = __builtin_fmaf(y, z, -3.33332819422e-1f);
    float small = __builtin_fmaf(y * z, x, x), e = exp_f32(-2.0f * size);
    return size < 0.625f ? small : __builtin_copysignf((1.0f - e) / (1.0f + e), x);
}

/* logits = x * gain, or, with a cap > 0, cap * tanh(x * inner). */
typedef struct { float gain, inner, cap; } Transform;

/* The rows of n tokens in the order s t a w, and who takes which: ``next`` is shared by all threads. */
typedef struct {
    int64_t *next, n, columns;
    const float *rows[4];
    int64_t strides[4]; /* elements from one token to the next */
    Transform student, target;
    int64_t masked;
} Job;

INLINE float capped(float x, Transform of) { return x == -INFINITY ? x : of.cap * tanh_f32(x * of.inner); }

INLINE float transformed(float x, Transform of) { return of.cap > 0 ? capped(x, of) : x * of.gain; }

/* Where a block's logits are: as they lie in the tile, still to be multiplied with gain_of(), or capped in ``memory``. */
INLINE const float *load(const float *x, int64_t width, Transform of, float *memory) {
    if (!(of.cap > 0)) return x;
    PRAGMA(omp simd)
    for (int64_t k = 0; k < width; k++) memory[k] = capped(x[k], of);
    return memory;
}

INLINE float gain_of(Transform of) { return of.cap > 0 ? 1.0f : of.gain; }

/* What a logit has to be multiplied with to be y, where 1 - y^2 is the soft-cap's derivative. */
INLINE float unit_of(Transform of) { return of.cap > 0 ? 1.0f / of.cap : 0.0f; }

INLINE float derivative(float unit) {
    float slope = 1.0f - unit * unit;
    return slope < 0.0f ? 0.0f : slope;
}

INLINE float anchor(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

INLINE float row_maximum(const float *x, int64_t columns, Transform of) {
    float maximum = -INFINITY;
    PRAGMA(omp simd reduction(max : maximum))
    for (int64_t j = 0; j < columns; j++) maximum = x[j] > maximum ? x[j] : maximum;
    return transformed(maximum, of); /* which keeps the order; a NaN is met in the sums */
}

/* A weighted gap; 0 * inf is 0. */
#define PART(weight, gap) (masked && (weight) == 0.0f ? 0.0f : (weight) * (gap))

/* out: PAIR_STATE of layout.py */
INLINE void pair_token(const Job *job, const float *s, const float *t, int masked, double *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[2][BLOCK];
    float s_max = row_maximum(s, columns, job->student), t_max = row_maximum(t, columns, job->target);
    float s_at = anchor(s_max), t_at = anchor(t_max);
    double s_sum = 0, t_sum = 0, s_logit = 0, s_gap = 0, t_gap = 0;
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        float es = 0, et = 0, sl = 0, sg = 0, tg = 0;
        PRAGMA(omp simd reduction(+ : es, et, sl, sg, tg))
        for (int64_t k = 0; k < width; k++) {
            float sc = sx[k] * s_gain - s_at, tc = tx[k] * t_gain - t_at, ps = exp_f32(sc), pt = exp_f32(tc);
            es += ps, et += pt;
            sl += PART(ps, sc), sg += PART(ps, sc - tc), tg += PART(pt, tc - sc);
        }
        s_sum += es, t_sum += et, s_logit += sl, s_gap += sg, t_gap += tg;
    }
    double found[] = {s_max, s_sum, t_max, t_sum, s_logit, s_gap, t_gap};
    memcpy(out, found, sizeof found);
}

/* out: VGS_STATE of layout.py */
INLINE void four_token(const Job *job, const float *s, const float *t, const float *a, const float *w, int masked,
                       double *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[4][BLOCK], steered[BLOCK];
    float s_max = row_maximum(s, columns, job->student), t_max = row_maximum(t, columns, job->target);
    float a_max = row_maximum(a, columns, job->student), w_max = row_maximum(w, columns, job->target);
    float s_at = anchor(s_max), t_at = anchor(t_max), a_at = anchor(a_max), w_at = anchor(w_max), q_max = -INFINITY;
    double s_sum = 0, t_sum = 0, a_sum = 0, w_sum = 0, q_sum = 0;
    double s_logit = 0, s_gap = 0, s_prior_gap = 0, s_view_gap = 0, t_view_gap = 0, a_gap = 0;
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        const float *ax = load(a + start, width, job->student, memory[2]);
        const float *wx = load(w + start, width, job->target, memory[3]);
        float es = 0, et = 0, ea = 0, ew = 0, sl = 0, sg = 0, sp = 0, sv = 0, tv = 0, ag = 0, top = -INFINITY, eq = 0;
        PRAGMA(omp simd reduction(+ : es, et, ea, ew, sl, sg, sp, sv, tv, ag) reduction(max : top))
        for (int64_t k = 0; k < width; k++) {
            float sc = sx[k] * s_gain - s_at, tc = tx[k] * t_gain - t_at;
            float ac = ax[k] * s_gain - a_at, wc = wx[k] * t_gain - w_at;
            float ps = exp_f32(sc), pt = exp_f32(tc), pa = exp_f32(ac), prior = ac - wc, q = ac + (tc - wc);
            if (masked) { /* outside the support of the steered target, where its logarithm is -inf */
                prior = wc == -INFINITY ? -INFINITY : prior;
                q = wc == -INFINITY ? -INFINITY : q;
            }
            steered[k] = q;
            top = q > top ? q : top;
            es += ps, et += pt, ea += pa, ew += exp_f32(wc);
            sl += PART(ps, sc), sg += PART(ps, sc - tc), sp += PART(ps, prior);
            sv += PART(ps, sc - ac), tv += PART(pt, tc - wc), ag += PART(pa, ac - wc);
        }
        s_sum += es, t_sum += et, a_sum += ea, w_sum += ew;
        s_logit += sl, s_gap += sg, s_prior_gap += sp, s_view_gap += sv, t_view_gap += tv, a_gap += ag;
        if (top > q_max) {
            q_sum = q_sum == 0 ? 0 : q_sum * exp((double)q_max - top);
            q_max = top;
        }
        float at = anchor(q_max);
        PRAGMA(omp simd reduction(+ : eq))
        for (int64_t k = 0; k < width; k++) eq += exp_f32(steered[k] - at);
        q_sum += eq;
    }
    double found[] = {s_max, s_sum, t_max, t_sum, a_max, a_sum, w_max, w_sum, q_max, q_sum,
                      s_logit, s_gap, s_prior_gap, s_view_gap, t_view_gap, a_gap};
    memcpy(out, found, sizeof found);
}

#define ROW(index) (job->rows[index] + i * job->strides[index])

void pair_statistics(const Job *job, double *out) {
    TOKENS {
        if (job->masked) pair_token(job, ROW(0), ROW(1), 1, out + 7 * i);
        else pair_token(job, ROW(0), ROW(1), 0, out + 7 * i);
    }
}

void four_statistics(const Job *job, double *out) {
    TOKENS {
        if (job->masked) four_token(job, ROW(0), ROW(1), ROW(2), ROW(3), 1, out + 16 * i);
        else four_token(job, ROW(0), ROW(1), ROW(2), ROW(3), 0, out + 16 * i);
    }
}

/* Where gradients go, which may be the tiles of s and a themselves; ``text`` is NULL without a live prior. */
typedef struct {
    float *out, *text;
    int64_t stride, text_stride;
    const int64_t *chosen; /* columns of a policy term, which may lie outside; or NULL */
} Target;

/* What a policy term adds at its column: 0 outside and where that is masked. To be asked before ``s`` is overwritten. */
INLINE float pull(const Job *job, const float *s, const Target *to, int64_t i, float policy) {
    int64_t j = to->chosen ? to->chosen[i] : -1;
    if (j < 0 || j >= job->columns || s[j] == -INFINITY) return 0.0f;
    return policy * derivative(transformed(s[j], job->student) * unit_of(job->student));
}

INLINE void add_pull(float *out, const Target *to, int64_t i, float amount) {
    if (amount != 0.0f) out[to->chosen[i]] += amount;
}

typedef struct { float s_at, t_at, a_at, w_at, q_at, s_scale, q_scale, weight, mean, gamma, policy; } FourScalars;

INLINE void four_gradient_token(const Job *job, const float *s, const float *t, const float *a, const float *w,
                                FourScalars x, int masked, int live, float *out, float *out_text) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), s_unit = unit_of(job->student);
    float text_weight = x.weight * x.gamma, memory[4][BLOCK];
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        const float *ax = load(a + start, width, job->student, memory[2]);
        const float *wx = load(w + start, width, job->target, memory[3]);
        float *d_student = out + start, *d_text = live ? out_text + start : NULL;
        PRAGMA(omp simd)
        for (int64_t k = 0; k < width; k++) {
            float sl = sx[k] * s_gain, al = ax[k] * s_gain, sc = sl - x.s_at, tc = tx[k] * t_gain - x.t_at;
            float ac = al - x.a_at, wc = wx[k] * t_gain - x.w_at;
            float p = exp_f32(sc) * x.s_scale, prior = ac - wc, weighted = p * x.weight;
            if (live) {
                float q = ac + (tc - wc);
                if (masked) q = wc == -INFINITY ? -INFINITY : q;
                float d_a = (exp_f32(q - x.q_at) * x.q_scale - p) * text_weight * derivative(al * s_unit);
                if (masked) d_a = text_weight == 0.0f || ac == -INFINITY ? 0.0f : d_a;
                d_text[k] = d_a;
            }
            if (masked) prior = x.gamma == 0.0f ? 0.0f : prior;
            float d_s = ((sc - tc) * (1.0f + x.gamma) - prior * x.gamma - x.mean) * weighted;
            if (masked) d_s = weighted == 0.0f ? 0.0f : d_s;
            d_s = (d_s - x.policy * p) * derivative(sl * s_unit);
            if (masked) d_s = sc == -INFINITY ? 0.0f : d_s;
            d_student[k] = d_s;
        }
    }
}

void four_gradient(const Job *job, const FourScalars *scalars, const Target *to) {
    TOKENS {
        FourScalars x = scalars[i];
        const float *s = ROW(0), *t = ROW(1), *a = ROW(2), *w = ROW(3);
        float *out = to->out + i * to->stride, *text = to->text ? to->text + i * to->text_stride : NULL;
        float amount = pull(job, s, to, i, x.policy);
        if (text && job->masked) four_gradient_token(job, s, t, a, w, x, 1, 1, out, text);
        else if (text) four_gradient_token(job, s, t, a, w, x, 0, 1, out, text);
        else if (job->masked) four_gradient_token(job, s, t, a, w, x, 1, 0, out, text);
        else four_gradient_token(job, s, t, a, w, x, 0, 0, out, text);
        add_pull(out, to, i, amount);
    }
}

typedef struct { float value, slope; } Entry;

/* An entry of a divergence and p times its derivative. */
INLINE Entry entry(float p, float q, float r, int kind, float beta, int masked) {
    Entry found;
    float near = r < -0.1f ? -0.1f : (r > 0.1f ? 0.1f : r);
    int equal = r > -0.1f && r < 0.1f;
    if (kind == REVERSE_KL || kind == SAMPLED) {
        float plain = PART(p, r);
        found.slope = kind == SAMPLED ? -q : plain;
        found.value = equal ? p * exp_rest(-near) : plain - p + q;
    } else if (kind == FORWARD_KL) {
        found.slope = -q;
        found.value = equal ? q * exp_rest(near) : p - q - PART(q, r);
    } else {
        float share = beta == 0.5f ? 0.5f : (r < 0.0f ? 1.0f - beta : beta);
        float larger = log1p_f32(share * expm1_f32(r < 0.0f ? r : -r));
        found.slope = PART(p, (r < 0.0f ? r : 0.0f) - larger) * (1.0f - beta);
        found.value = found.slope - beta * PART(q, (r < 0.0f ? 0.0f : r) + larger);
    }
    return found;
}

typedef struct { float s_at, t_at, s_scale, t_scale, shift, weight, mean, top, policy, saturated; } PairScalars;

/* out: SUMS of entries_torch.py */
INLINE void pair_totals_token(const Job *job, const float *s, const float *t, PairScalars x, int kind, float beta,
                              int masked, double *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[2][BLOCK];
    double value = 0, slope = 0, rest = 0, top = 0;
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        float v = 0, sl = 0, re = 0, to = 0;
        PRAGMA(omp simd reduction(+ : v, sl, re, to))
        for (int64_t k = 0; k < width; k++) {
            float sc = sx[k] * s_gain - x.s_at, tc = tx[k] * t_gain - x.t_at;
            float p = exp_f32(sc) * x.s_scale, q = exp_f32(tc) * x.t_scale;
            Entry found = entry(p, q, sc - tc - x.shift, kind, beta, masked);
            int large = p > x.saturated;
            v += found.value, sl += large ? 0.0f : found.slope, re += large ? 0.0f : p, to += large ? found.slope : 0.0f;
        }
        value += v, slope += sl, rest += re, top += to;
    }
    double found[] = {value, slope, rest, top};
    memcpy(out, found, sizeof found);
}

INLINE void pair_gradient_token(const Job *job, const float *s, const float *t, PairScalars x, int kind, float beta,
                                int masked, float *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), s_unit = unit_of(job->student);
    float memory[2][BLOCK];
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        float *here = out + start;
        PRAGMA(omp simd)
        for (int64_t k = 0; k < width; k++) {
            float sl = sx[k] * s_gain, sc = sl - x.s_at, tc = tx[k] * t_gain - x.t_at, p = exp_f32(sc) * x.s_scale;
            float q = kind == REVERSE_KL || kind == JSD ? 0.0f : exp_f32(tc) * x.t_scale;
            float slope = entry(p, q, sc - tc - x.shift, kind, beta, masked).slope;
            float d_s = (p > x.saturated ? x.top : slope - p * x.mean) * x.weight;
            if (masked) d_s = x.weight == 0.0f ? 0.0f : d_s;
            d_s = (d_s - x.policy * p) * derivative(sl * s_unit);
            if (masked) d_s = sc == -INFINITY ? 0.0f : d_s;
            here[k] = d_s;
        }
    }
}

#define OF_KIND(call)                                                      \
    switch (2 * kind + (job->masked != 0)) {                               \
    case 2 * REVERSE_KL: call(REVERSE_KL, 0); break;                       \
    case 2 * REVERSE_KL + 1: call(REVERSE_KL, 1); break;                   \
    case 2 * FORWARD_KL: call(FORWARD_KL, 0); break;                       \
    case 2 * FORWARD_KL + 1: call(FORWARD_KL, 1); break;                   \
    case 2 * JSD: call(JSD, 0); break;                                     \
    case 2 * JSD + 1: call(JSD, 1); break;                                 \
    case 2 * SAMPLED: call(SAMPLED, 0); break;                             \
    case 2 * SAMPLED + 1: call(SAMPLED, 1); break;                         \
    }

void pair_totals(const Job *job, const PairScalars *scalars, int64_t kind, float beta, double *out) {
    TOKENS {
        const float *s = ROW(0), *t = ROW(1);
#define CALL(k, m) pair_totals_token(job, s, t, scalars[i], k, beta, m, out + 4 * i)
        OF_KIND(CALL)
#undef CALL
    }
}

void pair_gradient(const Job *job, const PairScalars *scalars, int64_t kind, float beta, const Target *to) {
    TOKENS {
        const float *s = ROW(0), *t = ROW(1);
        float *out = to->out + i * to->stride, amount = pull(job, s, to, i, scalars[i].policy);
#define CALL(k, m) pair_gradient_token(job, s, t, scalars[i], k, beta, m, out)
        OF_KIND(CALL)
#undef CALL
        add_pull(out, to, i, amount);
    }
}

/* For tests: each function at n numbers. */
void functions(const float *x, int64_t n, float *exps, float *rests, float *expm1s, float *log1ps, float *tanhs) {
    for (int64_t i = 0; i < n; i++) {
        exps[i] = exp_f32(x[i]), rests[i] = exp_rest(x[i]), expm1s[i] = expm1_f32(x[i]);
        log1ps[i] = log1p_f32(x[i]), tanhs[i] = tanh_f32(x[i]);
    }
}
