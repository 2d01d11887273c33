// A stand-in for cuBLAS and cuBLASLt: products are written to the log, and nothing is multiplied. Types are spelt out as
// the libraries pass them, as their headers need more than a wheel has: handles are pointers, enumerations are ints.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "log.h"

typedef void *handle;
typedef int status;
#define DONE return 0

static const char *type_name(int type) {
  switch (type) {
    case 0: return "float32";
    case 1: return "float64";
    case 2: return "float16";
    case 14: return "bfloat16";
    default: return "other";
  }
}
static const char *wrong(const void *a, const void *b, const void *c) {
  return emulation_on_device(a) && emulation_on_device(b) && emulation_on_device(c) ? "" : " BAD pointer";
}

static void product(const char *ta, const char *tb, long m, long n, long k, int at, int bt, int ct, double beta,
                    int epilogue, const char *problem) {
  emulation_log("product %s%s %ld %ld %ld %s %s %s beta %g epilogue %d%s", ta, tb, m, n, k, type_name(at), type_name(bt),
                type_name(ct), beta, epilogue, problem);
}
static const char *letter(int operation) { return operation == 0 ? "N" : operation == 1 ? "T" : "C"; }

size_t cublasGetCudartVersion(void) { return 13000; }
status cublasCreate_v2(handle *h) {
  *h = calloc(1, 64);
  DONE;
}
status cublasDestroy_v2(handle h) { DONE; }
status cublasSetStream_v2(handle h, void *stream) { DONE; }
status cublasSetWorkspace_v2(handle h, void *workspace, size_t n) { DONE; }
status cublasGetMathMode(handle h, int *mode) {
  *mode = 0;
  DONE;
}
status cublasSetMathMode(handle h, int mode) { DONE; }
status cublasGetPointerMode_v2(handle h, int *mode) {
  *mode = 0;
  DONE;
}
status cublasSetPointerMode_v2(handle h, int mode) { DONE; }

status cublasGemmEx(handle h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda,
                    const void *b, int bt, int ldb, const void *beta, void *c, int ct, int ldc, int compute, int algo) {
  product(letter(ta), letter(tb), m, n, k, at, bt, ct, *(const float *)beta, 1, wrong(a, b, c));
  DONE;
}
status cublasSgemm_v2(handle h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                      const float *b, int ldb, const float *beta, float *c, int ldc) {
  product(letter(ta), letter(tb), m, n, k, 0, 0, 0, *beta, 1, wrong(a, b, c));
  DONE;
}
status cublasDgemm_v2(handle h, int ta, int tb, int m, int n, int k, const double *alpha, const double *a, int lda,
                      const double *b, int ldb, const double *beta, double *c, int ldc) {
  product(letter(ta), letter(tb), m, n, k, 1, 1, 1, *beta, 1, wrong(a, b, c));
  DONE;
}
status cublasSgemmEx(handle h, int ta, int tb, int m, int n, int k, const float *alpha, const void *a, int at, int lda,
                     const void *b, int bt, int ldb, const float *beta, void *c, int ct, int ldc) {
  product(letter(ta), letter(tb), m, n, k, at, bt, ct, *beta, 1, wrong(a, b, c));
  DONE;
}
status cublasGemmStridedBatchedEx(handle h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                                  int at, int lda, long long sa, const void *b, int bt, int ldb, long long sb,
                                  const void *beta, void *c, int ct, int ldc, long long sc, int count, int compute,
                                  int algo) {
  product(letter(ta), letter(tb), m, (long)n * count, k, at, bt, ct, *(const float *)beta, 1, wrong(a, b, c));
  DONE;
}
status cublasSgemmStridedBatched(handle h, int ta, int tb, int m, int n, int k, const float *alpha, const float *a,
                                 int lda, long long sa, const float *b, int ldb, long long sb, const float *beta,
                                 float *c, int ldc, long long sc, int count) {
  product(letter(ta), letter(tb), m, (long)n * count, k, 0, 0, 0, *beta, 1, wrong(a, b, c));
  DONE;
}
status cublasDgemmStridedBatched(handle h, int ta, int tb, int m, int n, int k, const double *alpha, const double *a,
                                 int lda, long long sa, const double *b, int ldb, long long sb, const double *beta,
                                 double *c, int ldc, long long sc, int count) {
  product(letter(ta), letter(tb), m, (long)n * count, k, 1, 1, 1, *beta, 1, wrong(a, b, c));
  DONE;
}
status cublasSdot_v2(handle h, int n, const float *x, int ix, const float *y, int iy, float *out) { DONE; }
status cublasDdot_v2(handle h, int n, const double *x, int ix, const double *y, int iy, double *out) { DONE; }
status cublasDotEx(handle h, int n, const void *x, int xt, int ix, const void *y, int yt, int iy, void *out, int ot,
                   int et) {
  DONE;
}
status cublasSgemv_v2(handle h, int t, int m, int n, const float *alpha, const float *a, int lda, const float *x, int ix,
                      const float *beta, float *y, int iy) {
  product(letter(t), "N", m, 1, n, 0, 0, 0, *beta, 1, wrong(a, x, y));
  DONE;
}
status cublasDgemv_v2(handle h, int t, int m, int n, const double *alpha, const double *a, int lda, const double *x,
                      int ix, const double *beta, double *y, int iy) {
  product(letter(t), "N", m, 1, n, 1, 1, 1, *beta, 1, wrong(a, x, y));
  DONE;
}

// cuBLASLt: descriptions of a product and of its matrices, which are opaque to a caller.

struct description {
  int transpose_a, transpose_b, epilogue;
};
struct matrix {
  int type;
  uint64_t rows, columns;
};
// Attributes: cublasLtMatmulDescAttributes_t.
enum { TRANSPOSE_A = 3, TRANSPOSE_B = 4, EPILOGUE = 7 };

size_t cublasLtGetVersion(void) { return 130000; }
status cublasLtMatmulDescCreate(struct description **d, int compute, int scale) {
  *d = calloc(1, sizeof **d);
  (*d)->epilogue = 1;
  DONE;
}
status cublasLtMatmulDescDestroy(struct description *d) {
  free(d);
  DONE;
}
status cublasLtMatmulDescSetAttribute(struct description *d, int name, const void *value, size_t n) {
  if (name == TRANSPOSE_A) d->transpose_a = *(const int *)value;
  if (name == TRANSPOSE_B) d->transpose_b = *(const int *)value;
  if (name == EPILOGUE) d->epilogue = *(const int *)value;
  DONE;
}
status cublasLtMatrixLayoutCreate(struct matrix **m, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
  *m = calloc(1, sizeof **m);
  **m = (struct matrix){type, rows, columns};
  DONE;
}
status cublasLtMatrixLayoutDestroy(struct matrix *m) {
  free(m);
  DONE;
}
status cublasLtMatrixLayoutSetAttribute(struct matrix *m, int name, const void *value, size_t n) { DONE; }
status cublasLtMatmulPreferenceCreate(void **p) {
  *p = calloc(1, 64);
  DONE;
}
status cublasLtMatmulPreferenceDestroy(void *p) {
  free(p);
  DONE;
}
status cublasLtMatmulPreferenceSetAttribute(void *p, int name, const void *value, size_t n) { DONE; }
// Results are as large as cublasLtMatmulHeuristicResult_t: an algorithm of 64 bytes, workspace, state, waves, reserve.
status cublasLtMatmulAlgoGetHeuristic(handle h, void *d, void *a, void *b, void *c, void *out, void *p, int wanted,
                                      void *results, int *found) {
  memset(results, 0, 64 + 8 + 4 + 4 + 16);
  *found = 1;
  DONE;
}
status cublasLtMatmul(handle h, struct description *d, const void *alpha, const void *a, struct matrix *ma,
                      const void *b, struct matrix *mb, const void *beta, const void *c, struct matrix *mc, void *out,
                      struct matrix *mo, const void *algo, void *workspace, size_t n, void *stream) {
  product(letter(d->transpose_a), letter(d->transpose_b), mo->rows, mo->columns,
          d->transpose_a ? ma->rows : ma->columns, ma->type, mb->type, mo->type, *(const float *)beta, d->epilogue,
          wrong(a, b, out));
  DONE;
}
