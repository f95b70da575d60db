// NVIDIA's driver library as far as backends/cuda/driver.py calls it, on host memory: for tests of
// the real cuda.bindings without a GPU. Work waits in its stream until it is waited for.
//   STUB_DRIVER   version it reports, 12040      STUB_FREE   bytes that are free
//   STUB_GPUS     how many there are
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <string>
#include <vector>
#define __global__
struct Place { long long x; };
static Place blockIdx, blockDim, threadIdx;
#include ROW_CU

typedef std::vector<std::function<void()>> Work;
struct Stream { Work work; Work *capture; };
typedef void (*Kernel)(const Run *, const Call *);
static long long number(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text == nullptr ? otherwise : atoll(text);
}
static void add(void *stream, std::function<void()> piece) {
    Stream *s = (Stream *)stream;
    (s->capture == nullptr ? s->work : *s->capture).push_back(piece);
}
static void drain(void *stream) {
    for (auto &piece : ((Stream *)stream)->work) piece();
    ((Stream *)stream)->work.clear();
}

extern "C" {
int cuInit(unsigned) { return number("STUB_GPUS", 1) > 0 ? 0 : 100; }
int cuDriverGetVersion(int *version) { *version = (int)number("STUB_DRIVER", 12040); return 0; }
int cuDeviceGetCount(int *count) { *count = (int)number("STUB_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int) { *context = (void *)0x77; return 0; }
int cuCtxSetCurrent(void *context) { return context == (void *)0x77 ? 0 : 201; }
int cuDeviceGetAttribute(int *value, int what, int) { *value = what == 75 ? 9 : 0; return 0; }
int cuDeviceGetName(char *name, int size, int) { strncpy(name, "Stub GPU", size); return 0; }
int cuMemGetInfo(size_t *free, size_t *total) {
    *free = number("STUB_FREE", 1ll << 30); *total = 1ll << 33; return 0;
}
int cuMemAlloc(void **address, size_t size) {
    if ((long long)size > number("STUB_FREE", 1ll << 30)) return 2;
    *address = aligned_alloc(256, (size + 255) / 256 * 256);
    memset(*address, 0xff, size);
    return 0;
}
int cuMemFree(void *address) { free(address); return 0; }
int cuMemAllocHost(void **address, size_t size) { *address = malloc(size); return 0; }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuStreamCreate(void **stream, unsigned flags) {
    *stream = new Stream{{}, nullptr}; return flags == 1 ? 0 : 1;
}
int cuStreamDestroy(void *stream) { delete (Stream *)stream; return 0; }
static int move(void *to, const void *of, size_t size, void *stream) {
    add(stream, [=] { memcpy(to, of, size); }); return 0;
}
int cuMemcpyHtoDAsync(void *to, const void *of, size_t n, void *s) { return move(to, of, n, s); }
int cuMemcpyDtoHAsync(void *to, const void *of, size_t n, void *s) { return move(to, of, n, s); }
int cuMemcpyDtoDAsync(void *to, const void *of, size_t n, void *s) { return move(to, of, n, s); }
int cuModuleLoadData(void **module, const char *ptx) {
    *module = (void *)0x88; return strstr(ptx, ".entry advance(") == nullptr ? 218 : 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    static std::map<std::string, Kernel> known{
        {"feed", feed}, {"advance", advance}, {"next_row", next_row}};
    *function = (void *)known.at(name);
    return module == (void *)0x88 ? 0 : 400;
}
int cuLaunchKernel(void *kernel, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                   unsigned, unsigned, void *stream, void **arguments, void **) {
    const Run *run = *(const Run **)arguments[0];
    const Call *call = *(const Call **)arguments[1];
    add(stream, [=] {
        blockDim.x = threads;
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
                ((Kernel)kernel)(run, call);
    });
    return 0;
}
int cuStreamSynchronize(void *stream) { drain(stream); return 0; }
int cuEventCreate(void **event, unsigned) { *event = new void *(nullptr); return 0; }
int cuEventRecord(void *event, void *stream) { *(void **)event = stream; return 0; }
int cuEventSynchronize(void *event) { drain(*(void **)event); return 0; }
int cuEventDestroy(void *event) { delete (void **)event; return 0; }
int cuStreamBeginCapture(void *stream, int mode) {
    ((Stream *)stream)->capture = new Work; return mode == 1 ? 0 : 1;
}
int cuStreamEndCapture(void *stream, void **graph) {
    *graph = ((Stream *)stream)->capture; ((Stream *)stream)->capture = nullptr; return 0;
}
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    *exec = new Work(*(Work *)graph); return 0;
}
int cuGraphDestroy(void *graph) { delete (Work *)graph; return 0; }
int cuGraphLaunch(void *exec, void *stream) {
    for (auto &piece : *(Work *)exec) add(stream, piece);
    return 0;
}
int cuGraphExecDestroy(void *exec) { delete (Work *)exec; return 0; }
int cuGetProcAddress_v2(const char *name, void **found, int, unsigned long long, int *status) {
    *found = dlsym(RTLD_DEFAULT, name);
    Dl_info here, there;
    dladdr((void *)cuGetProcAddress_v2, &here);
    if (*found != nullptr && dladdr(*found, &there) && strcmp(here.dli_fname, there.dli_fname) != 0)
        *found = nullptr;
    if (*found == nullptr) *found = dlsym(dlopen(here.dli_fname, RTLD_LAZY), name);
    if (status != nullptr) *status = *found == nullptr;
    return *found == nullptr ? 500 : 0;
}
}
