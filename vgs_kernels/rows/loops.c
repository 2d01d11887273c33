/* The row loops of CPUs, for float32 logits: rows_torch.py and entries_torch.py, one token at a time.
 *
 * Those files specify what is computed; layout.py has the notation. A token's columns are one stretch of memory. Sums
 * are taken in float32 over BLOCK columns, then in double. Threads take token after token from a common counter,
 * so that a busy core delays its own token alone; they are the caller's, and this file needs no OpenMP library. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 1024 /* four rows of a block lie in the first-level cache */
#if defined(__FMA__) || defined(__aarch64__) || defined(FP_FAST_FMAF)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else /* a call for each; nothing below needs the better rounding */
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define TOKENS for (int64_t i; (i = __atomic_fetch_add(job->next, 1, __ATOMIC_RELAXED)) < job->n;)
#define BLOCKS(start, width)                                                                                  \
    for (int64_t start = 0, width; width = columns - start < BLOCK ? columns - start : BLOCK, start < columns; \
         start += BLOCK)

enum { REVERSE_KL, FORWARD_KL, JSD, SAMPLED };
typedef union { float f; int32_t i; } Bits;

/* e^x to 2 ulp; 0 where that is below the least normal float32. For x <= 88. */
INLINE float exp_f32(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(bounded * 1.44269504f);
    float r = FMA(n, -0.693359375f, bounded);
    r = FMA(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;
    y = FMA(y, r, 1.3981999507e-3f), y = FMA(y, r, 8.3334519073e-3f);
    y = FMA(y, r, 4.1665795894e-2f), y = FMA(y, r, 1.6666665459e-1f);
    y = FMA(FMA(y, r, 5.0000001201e-1f), r * r, r) + 1.0f;
    Bits power = {.i = ((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : y * power.f;
}

/* e^x - 1 of x <= 0. */
INLINE float expm1_f32(float x) {
    float y = 2.4801587e-5f;
    y = FMA(y, x, 1.9841270e-4f), y = FMA(y, x, 1.3888889e-3f);
    y = FMA(y, x, 8.3333333e-3f), y = FMA(y, x, 4.1666667e-2f);
    float small = FMA(FMA(FMA(y, x, 1.6666667e-1f), x, 0.5f), x * x, x);
    return x > -0.35f ? small : exp_f32(x) - 1.0f;
}

/* log(1 + y) of -1 < y <= 0. */
INLINE float log1p_f32(float y) {
    Bits u = {.f = 1.0f + y};
    int32_t e = (u.i - 0x3f3504f3) >> 23;
    Bits m = {.i = u.i - e * (1 << 23)};
    float f = e == 0 ? y : m.f - 1.0f, z = f * f, p = 7.0376836292e-2f;
    p = FMA(p, f, -1.1514610310e-1f), p = FMA(p, f, 1.1676998740e-1f);
    p = FMA(p, f, -1.2420140846e-1f), p = FMA(p, f, 1.4249322787e-1f);
    p = FMA(p, f, -1.6668057665e-1f), p = FMA(p, f, 2.0000714765e-1f);
    p = FMA(p, f, -2.4999993993e-1f), p = FMA(p, f, 3.3333331174e-1f);
    float rest = FMA(-0.5f, z, FMA((float)e, -2.12194440e-4f, f * z * p));
    float found = f + rest + (float)e * 0.693359375f;
    return y == y ? found : y; /* the bits of a NaN are no number */
}

INLINE float tanh_f32(float x) {
    float size = __builtin_fabsf(x), z = x * x, y = -5.70498872745e-3f;
    y = FMA(y, z, 2.06390887954e-2f), y = FMA(y, z, -5.37397155531e-2f);
    y = FMA(y, z, 1.33314422036e-1f), y = FMA(y, z, -3.33332819422e-1f);
    float small = FMA(y * z, x, x), e = exp_f32(-2.0f * size);
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

/* Where a block's logits are: in the tile, still to be multiplied with gain_of(), or capped, in ``memory``. */
INLINE const float *load(const float *x, int64_t width, Transform of, float *memory) {
    if (!(of.cap > 0)) return x;
    PRAGMA(omp simd)
    for (int64_t k = 0; k < width; k++) memory[k] = capped(x[k], of);
    return memory;
}

INLINE float gain_of(Transform of) { return of.cap > 0 ? 1.0f : of.gain; }

/* Multiply a gradient by the soft-cap's derivative, 1 - tanh^2, at the logits that load() capped. */
INLINE void chain(float *gradient, const float *logits, int64_t width, Transform of) {
    if (!(of.cap > 0)) return;
    PRAGMA(omp simd)
    for (int64_t k = 0; k < width; k++) {
        float tanh = logits[k] / of.cap, slope = 1.0f - tanh * tanh;
        gradient[k] *= slope < 0.0f ? 0.0f : slope;
    }
}

INLINE float anchor(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

/* In lanes, for not every compiler reorders comparisons; a NaN is left to the sums. */
INLINE float highest(const float *x, int64_t n, float maximum) {
    float lanes[64];
    int64_t j = 0;
    for (int k = 0; k < 64; k++) lanes[k] = maximum;
    for (; j + 64 <= n; j += 64)
        for (int k = 0; k < 64; k++) lanes[k] = x[j + k] > lanes[k] ? x[j + k] : lanes[k];
    for (; j < n; j++) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
    for (int k = 0; k < 64; k++) maximum = lanes[k] > maximum ? lanes[k] : maximum;
    return maximum;
}

INLINE float row_maximum(const float *x, int64_t columns, Transform of) {
    return transformed(highest(x, columns, -INFINITY), of); /* which keeps the order */
}

/* A weighted gap; 0 * inf is 0. */
#define PART(weight, gap) (masked && (weight) == 0.0f ? 0.0f : (weight) * (gap))

/* p * (e^-gap - 1 + gap) of q = p * e^-gap: never negative, and of second order where the gap is small. */
INLINE float rest(float p, float q, float gap, int masked) {
    float y = FMA(-8.3333333e-3f, gap, 4.1666667e-2f), plain = PART(p, gap) - p + q;
    y = FMA(FMA(y, gap, -1.6666667e-1f), gap, 0.5f);
    return __builtin_fabsf(gap) < 0.1f ? p * gap * gap * y : plain;
}

/* a' + (t' - w'), and -inf outside the support of w, where its logarithm is -inf. */
INLINE float steered(float a, float t, float w, int masked) {
    float q = a + (t - w);
    return masked && w == -INFINITY ? -INFINITY : q;
}

/* out: PAIR_STATE and its RESTS of layout.py */
INLINE void pair_token(const Job *job, const float *s, const float *t, int masked, double *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[2][BLOCK];
    float s_max = row_maximum(s, columns, job->student), t_max = row_maximum(t, columns, job->target);
    float s_at = anchor(s_max), t_at = anchor(t_max);
    double s_sum = 0, t_sum = 0, s_logit = 0, s_gap = 0, t_gap = 0, s_rest = 0, t_rest = 0;
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        const float *tx = load(t + start, width, job->target, memory[1]);
        float es = 0, et = 0, sl = 0, sg = 0, tg = 0, sr = 0, tr = 0;
        PRAGMA(omp simd reduction(+ : es, et, sl, sg, tg, sr, tr))
        for (int64_t k = 0; k < width; k++) {
            float sc = sx[k] * s_gain - s_at, tc = tx[k] * t_gain - t_at, ps = exp_f32(sc), pt = exp_f32(tc);
            es += ps, et += pt;
            sl += PART(ps, sc), sg += PART(ps, sc - tc), tg += PART(pt, tc - sc);
            sr += rest(ps, pt, sc - tc, masked), tr += rest(pt, ps, tc - sc, masked);
        }
        s_sum += es, t_sum += et, s_logit += sl, s_gap += sg, t_gap += tg, s_rest += sr, t_rest += tr;
    }
    double found[] = {s_max, s_sum, t_max, t_sum, s_logit, s_gap, t_gap, s_rest, t_rest};
    memcpy(out, found, sizeof found);
}

/* out: VGS_STATE and its RESTS of layout.py */
INLINE void four_token(const Job *job, const float *s, const float *t, const float *a, const float *w, int masked,
                       double *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[4][BLOCK];
    float s_max = row_maximum(s, columns, job->student), t_max = row_maximum(t, columns, job->target);
    float a_max = row_maximum(a, columns, job->student), w_max = row_maximum(w, columns, job->target);
    float s_at = anchor(s_max), t_at = anchor(t_max), a_at = anchor(a_max), w_at = anchor(w_max), q_max = -INFINITY;
    double s_sum = 0, t_sum = 0, a_sum = 0, w_sum = 0, q_sum = 0;
    double s_logit = 0, s_gap = 0, s_prior_gap = 0, s_view_gap = 0, t_view_gap = 0, a_gap = 0;
    double s_rest = 0, s_view_rest = 0, t_view_rest = 0, a_rest = 0, q_rest = 0;
#define LOADED                                                                    \
    const float *tx = load(t + start, width, job->target, memory[1]);            \
    const float *ax = load(a + start, width, job->student, memory[2]);           \
    const float *wx = load(w + start, width, job->target, memory[3]);
    BLOCKS(start, width) {
        LOADED
        PRAGMA(omp simd)
        for (int64_t k = 0; k < width; k++)
            memory[0][k] = steered(ax[k] * s_gain - a_at, tx[k] * t_gain - t_at, wx[k] * t_gain - w_at, masked);
        q_max = highest(memory[0], width, q_max);
    }
    float q_at = anchor(q_max);
    BLOCKS(start, width) {
        const float *sx = load(s + start, width, job->student, memory[0]);
        LOADED
        float es = 0, et = 0, ea = 0, ew = 0, eq = 0, sl = 0, sg = 0, sp = 0, sv = 0, tv = 0, ag = 0;
        float sr = 0, svr = 0, tvr = 0, ar = 0, qr = 0;
        PRAGMA(omp simd reduction(+ : es, et, ea, ew, eq, sl, sg, sp, sv, tv, ag, sr, svr, tvr, ar, qr))
        for (int64_t k = 0; k < width; k++) {
            float sc = sx[k] * s_gain - s_at, tc = tx[k] * t_gain - t_at;
            float ac = ax[k] * s_gain - a_at, wc = wx[k] * t_gain - w_at;
            float qc = steered(ac, tc, wc, masked) - q_at, prior = masked && wc == -INFINITY ? -INFINITY : ac - wc;
            float ps = exp_f32(sc), pt = exp_f32(tc), pa = exp_f32(ac), pw = exp_f32(wc), pq = exp_f32(qc);
            es += ps, et += pt, ea += pa, ew += pw, eq += pq;
            sl += PART(ps, sc), sg += PART(ps, sc - tc), sp += PART(ps, prior);
            sv += PART(ps, sc - ac), tv += PART(pt, tc - wc), ag += PART(pa, ac - wc);
            sr += rest(ps, pt, sc - tc, masked), svr += rest(ps, pa, sc - ac, masked);
            tvr += rest(pt, pw, tc - wc, masked), ar += rest(pa, pw, ac - wc, masked);
            qr += rest(ps, pq, sc - qc, masked);
        }
        s_sum += es, t_sum += et, a_sum += ea, w_sum += ew, q_sum += eq;
        s_logit += sl, s_gap += sg, s_prior_gap += sp, s_view_gap += sv, t_view_gap += tv, a_gap += ag;
        s_rest += sr, s_view_rest += svr, t_view_rest += tvr, a_rest += ar, q_rest += qr;
    }
#undef LOADED
    double found[] = {s_max, s_sum, t_max, t_sum, a_max, a_sum, w_max, w_sum, q_max, q_sum,
                      s_logit, s_gap, s_prior_gap, s_view_gap, t_view_gap, a_gap,
                      s_rest, s_view_rest, t_view_rest, a_rest, q_rest};
    memcpy(out, found, sizeof found);
}

#define ROW(index) (job->rows[index] + i * job->strides[index])

void pair_statistics(const Job *job, double *out) {
    TOKENS {
        if (job->masked) pair_token(job, ROW(0), ROW(1), 1, out + 9 * i);
        else pair_token(job, ROW(0), ROW(1), 0, out + 9 * i);
    }
}

void four_statistics(const Job *job, double *out) {
    TOKENS {
        if (job->masked) four_token(job, ROW(0), ROW(1), ROW(2), ROW(3), 1, out + 21 * i);
        else four_token(job, ROW(0), ROW(1), ROW(2), ROW(3), 0, out + 21 * i);
    }
}

/* Where gradients go, which may be the tiles of s and a themselves; ``text`` is NULL without a live prior. */
typedef struct {
    float *out, *text;
    int64_t stride, text_stride;
    const int64_t *chosen; /* columns of a policy term, which may lie outside; or NULL */
} Target;

/* What a policy term adds at its column, 0 outside and where that is masked; asked before ``s`` is overwritten. */
INLINE float pull(const Job *job, const float *s, const Target *to, int64_t i, float policy) {
    int64_t j = to->chosen ? to->chosen[i] : -1;
    if (j < 0 || j >= job->columns || s[j] == -INFINITY) return 0.0f;
    float logit = transformed(s[j], job->student);
    chain(&policy, &logit, 1, job->student);
    return policy;
}

typedef struct { float s_at, t_at, a_at, w_at, q_at, s_scale, q_scale, weight, mean, gamma, policy; } FourScalars;

INLINE void four_gradient_token(const Job *job, const float *s, const float *t, const float *a, const float *w,
                                FourScalars x, int masked, int live, float *out, float *out_text) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target);
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
            float p = exp_f32(sc) * x.s_scale, prior = ac - wc;
            if (live) {
                float q = steered(ac, tc, wc, masked);
                float d_a = (exp_f32(q - x.q_at) * x.q_scale - p) * text_weight;
                if (masked) d_a = text_weight == 0.0f || al == -INFINITY ? 0.0f : d_a;
                d_text[k] = d_a;
            }
            if (masked) prior = x.gamma == 0.0f ? 0.0f : prior;
            float d_s = ((sc - tc) * (1.0f + x.gamma) - prior * x.gamma - x.mean) * p * x.weight;
            if (masked) d_s = p == 0.0f || x.weight == 0.0f ? 0.0f : d_s;
            d_s -= x.policy == 0.0f ? 0.0f : x.policy * p;
            if (masked) d_s = sl == -INFINITY ? 0.0f : d_s;
            d_student[k] = d_s;
        }
        chain(d_student, sx, width, job->student);
        if (live) chain(d_text, ax, width, job->student);
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
        if (amount != 0.0f) out[to->chosen[i]] += amount;
    }
}

typedef struct { float value, slope; } Entry;

/* An entry of a divergence and p times its derivative. */
INLINE Entry entry(float p, float q, float r, int kind, float beta, int masked) {
    Entry found;
    if (kind == REVERSE_KL || kind == SAMPLED) {
        float plain = PART(p, r);
        found.slope = kind == SAMPLED ? -q : plain;
        found.value = rest(p, q, r, masked);
    } else if (kind == FORWARD_KL) {
        found.slope = -q;
        found.value = rest(q, p, -r, masked);
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
INLINE void pair_totals_token(int kind, int masked, const Job *job, const float *s, const float *t, PairScalars x,
                              float beta, double *out) {
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
            v += found.value, sl += large ? 0.0f : found.slope;
            re += large ? 0.0f : p, to += large ? found.slope : 0.0f;
        }
        value += v, slope += sl, rest += re, top += to;
    }
    double found[] = {value, slope, rest, top};
    memcpy(out, found, sizeof found);
}

INLINE void pair_gradient_token(int kind, int masked, const Job *job, const float *s, const float *t, PairScalars x,
                                float beta, float *out) {
    int64_t columns = job->columns;
    float s_gain = gain_of(job->student), t_gain = gain_of(job->target), memory[2][BLOCK];
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
            d_s -= x.policy == 0.0f ? 0.0f : x.policy * p;
            if (masked) d_s = sl == -INFINITY ? 0.0f : d_s;
            here[k] = d_s;
        }
        chain(here, sx, width, job->student);
    }
}

#define OF_KIND(function, ...)                                                            \
    if (kind == REVERSE_KL && job->masked) function(REVERSE_KL, 1, __VA_ARGS__);          \
    else if (kind == REVERSE_KL) function(REVERSE_KL, 0, __VA_ARGS__);                    \
    else if (kind == FORWARD_KL) function(FORWARD_KL, 1, __VA_ARGS__);                    \
    else if (kind == JSD && job->masked) function(JSD, 1, __VA_ARGS__);                   \
    else if (kind == JSD) function(JSD, 0, __VA_ARGS__);                                  \
    else function(SAMPLED, 1, __VA_ARGS__);

void pair_totals(const Job *job, const PairScalars *scalars, int64_t kind, float beta, double *out) {
    TOKENS {
        OF_KIND(pair_totals_token, job, ROW(0), ROW(1), scalars[i], beta, out + 4 * i)
    }
}

void pair_gradient(const Job *job, const PairScalars *scalars, int64_t kind, float beta, const Target *to) {
    TOKENS {
        const float *s = ROW(0), *t = ROW(1);
        float *out = to->out + i * to->stride, amount = pull(job, s, to, i, scalars[i].policy);
        OF_KIND(pair_gradient_token, job, s, t, scalars[i], beta, out)
        if (amount != 0.0f) out[to->chosen[i]] += amount;
    }
}

/* For tests: each function at n numbers; ``rests`` are of p = 1. */
void functions(const float *x, int64_t n, float *exps, float *rests, float *expm1s, float *log1ps, float *tanhs) {
    for (int64_t i = 0; i < n; i++) {
        exps[i] = exp_f32(x[i]), rests[i] = rest(1.0f, exp_f32(-x[i]), x[i], 0);
        expm1s[i] = expm1_f32(x[i]), log1ps[i] = log1p_f32(x[i]), tanhs[i] = tanh_f32(x[i]);
    }
}
