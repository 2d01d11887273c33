// A stand-in for the CUDA runtime, to be preloaded under a CUDA build of PyTorch: memory of the device is memory of the
// host, and launches are written to a log. No kernel is executed.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "log.h"

#define DONE return cudaSuccess

// The log.

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *text;
static size_t length, capacity;
static int logging;
static size_t most_moved = -1;  // bytes: what larger copies would move stays untouched, and costs nothing

void emulation_log(const char *format, ...) {
  if (!logging) return;
  char line[4096];
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (n >= (int)sizeof line) n = sizeof line - 1;
  pthread_mutex_lock(&lock);
  if (length + n + 2 > capacity) {
    capacity = 2 * (length + n + 2) + (1 << 20);
    text = realloc(text, capacity);
  }
  memcpy(text + length, line, n);
  length += n;
  text[length++] = '\n';
  text[length] = 0;
  pthread_mutex_unlock(&lock);
}

void emulation_start(void) {
  pthread_mutex_lock(&lock);
  length = 0;
  if (text) text[0] = 0;
  pthread_mutex_unlock(&lock);
  logging = 1;
}

const char *emulation_stop(void) {
  logging = 0;
  return text ? text : "";
}

void emulation_move(size_t most) { most_moved = most; }

// Memory.

#define MOST_RANGES 65536
static struct {
  char *start;
  size_t bytes;
} ranges[MOST_RANGES];
static int range_count;
static const size_t total_bytes = 141ul << 30, block_bytes = 4096;

static void *reserve(size_t bytes) {
  bytes = bytes ? (bytes + block_bytes - 1) / block_bytes * block_bytes : block_bytes;
  char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return NULL;
  pthread_mutex_lock(&lock);
  int slot = 0;
  while (slot < range_count && ranges[slot].start) slot++;
  if (slot == MOST_RANGES) abort();
  if (slot == range_count) range_count++;
  ranges[slot].start = start;
  ranges[slot].bytes = bytes;
  pthread_mutex_unlock(&lock);
  return start;
}

int emulation_holds(const void *address, size_t bytes) {
  const char *at = address;
  for (int i = 0; i < range_count; i++)
    if (ranges[i].start && at >= ranges[i].start && at + bytes <= ranges[i].start + ranges[i].bytes) return 1;
  return 0;
}

int emulation_on_device(const void *address) { return emulation_holds(address, 1); }

static const char *side(const void *address) { return emulation_on_device(address) ? "device" : "host"; }

cudaError_t cudaMalloc(void **p, size_t n) {
  *p = reserve(n);
  emulation_log("allocate %zu", n);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *p) {
  for (int i = 0; p && i < range_count; i++)
    if (ranges[i].start == p) {
      munmap(p, ranges[i].bytes);
      ranges[i].start = NULL;
    }
  DONE;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) {
  *p = calloc(1, n ? n : 1);
  DONE;
}
cudaError_t cudaFreeHost(void *p) {
  free(p);
  DONE;
}
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) { DONE; }
cudaError_t cudaHostUnregister(void *p) { DONE; }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = total_bytes;
  *unused = total_bytes - (1ul << 30);
  DONE;
}
static cudaError_t copy(void *to, const void *from, size_t n, const char *waits) {
  emulation_log("copy %s %s %zu%s", side(from), side(to), n, waits);
  if (n <= most_moved) memmove(to, from, n);
  DONE;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { return copy(to, from, n, " wait"); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) {
  return copy(to, from, n, "");
}
static cudaError_t set(void *at, int value, size_t n) {
  emulation_log("set %zu%s", n, emulation_holds(at, n) ? "" : " BAD out of bounds");
  if (n <= most_moved && emulation_holds(at, n)) memset(at, value, n);
  DONE;
}
cudaError_t cudaMemset(void *at, int value, size_t n) { return set(at, value, n); }
cudaError_t cudaMemsetAsync(void *at, int value, size_t n, cudaStream_t s) { return set(at, value, n); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = emulation_on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = emulation_on_device(p) ? 0 : -2;
  a->devicePointer = emulation_on_device(p) ? (void *)p : NULL;
  DONE;
}
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  *p = reserve(1 << 16);
  DONE;
}

// The device: an H200's limits.

static int attribute(enum cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    default: return 0;
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
  *value = attribute(name);
  DONE;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "emulated, no GPU");
  p->totalGlobalMem = total_bytes;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->managedMemory = 1;
  DONE;
}
cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  DONE;
}
cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  DONE;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  DONE;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  DONE;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int device) {
  snprintf(s, n, "0000:00:00.0");
  DONE;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
  *can = 0;
  DONE;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  static void *driver;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
  *f = driver ? dlsym(driver, name) : NULL;
  if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}

// Streams and events: everything has happened by the time that a call returns. What would make the host wait is logged.

static cudaError_t waited(const char *what) {
  emulation_log("wait %s", what);
  DONE;
}
static long handles = 0x1000;
cudaError_t cudaDeviceSynchronize(void) { return waited("device"); }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return waited("stream"); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return waited("event"); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  DONE;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  *s = (void *)handles++;
  DONE;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) { DONE; }
cudaError_t cudaStreamQuery(cudaStream_t s) { DONE; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { DONE; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = cudaStreamCaptureStatusNone;
  DONE;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id,
                                     cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                     size_t *n) {
  *c = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  DONE;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *user, unsigned flags) {
  f(s, cudaSuccess, user);
  DONE;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) { DONE; }
cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = (void *)handles++;
  DONE;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { DONE; }
cudaError_t cudaEventQuery(cudaEvent_t e) { DONE; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { DONE; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { DONE; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = 1;
  DONE;
}
cudaError_t cudaGetLastError(void) { DONE; }
cudaError_t cudaPeekAtLastError(void) { DONE; }

// Kernels of PyTorch, by the names under which they register.

static struct kernel {
  const void *function;
  const char *name;
} *kernels;
static int kernel_count, kernel_capacity, sorted_count;

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **h, char *v, char *address, const char *name, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **h, const char *f, char *df, const char *name, int limit, void *t, void *b, void *bd,
                            void *gd, int *w) {
  if (kernel_count == kernel_capacity) {
    kernel_capacity = kernel_capacity ? 2 * kernel_capacity : 1 << 16;
    kernels = realloc(kernels, kernel_capacity * sizeof *kernels);
  }
  kernels[kernel_count++] = (struct kernel){f, name};
}
static int by_address(const void *a, const void *b) {
  const struct kernel *x = a, *y = b;
  return x->function < y->function ? -1 : x->function > y->function;
}
static const char *name_of(const void *function) {
  if (sorted_count != kernel_count) {
    qsort(kernels, kernel_count, sizeof *kernels, by_address);
    sorted_count = kernel_count;
  }
  struct kernel key = {function, NULL}, *found = bsearch(&key, kernels, kernel_count, sizeof *kernels, by_address);
  return found ? found->name : "unknown";
}
static cudaError_t launch(const void *f, dim3 grid, dim3 block, size_t shared) {
  int bad = !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !block.x ||
            (size_t)block.x * block.y * block.z > 1024 || shared > 232448;
  emulation_log("kernel %s %u %u %u%s", name_of(f), grid.x, grid.y, grid.z, bad ? " BAD configuration" : "");
  return bad ? cudaErrorInvalidConfiguration : cudaSuccess;
}
static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t *)stream = pushed.stream;
  DONE;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) {
  return launch(f, grid, block, shared);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) {
  return launch((const void *)f, grid, block, shared);
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
  *k = (cudaKernel_t)f;
  DONE;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  DONE;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { DONE; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared,
                                                                   unsigned flags) {
  *n = 2048 / (threads ? threads : 1);
  DONE;
}
