// A CUDA device without kernels: memory is the host's, kernels do nothing, and captures follow CUDA's rules.
//
// It is preloaded ahead of libcudart, libcuda, cuBLAS and cuDNN. A process that runs under it uses torch's own
// dispatcher, allocator, autograd and CUDAGraph, Inductor and Triton's launcher; what they would launch is logged, with
// the nodes of every captured graph, and what a capture forbids is reported as a violation and breaks the capture.
// Copies and fills are done, in a graph at each replay; kernels are not: what they would compute is garbage.
//
// This file has libcudart's kernels, device and memory; captures.cpp its streams and graphs, and the rules.

#include <cxxabi.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "device.h"

using namespace fake;

namespace {

// -------------------------------------------------------------------------------------------------------------- memory

std::map<const char*, size_t> device_memory, page_locked_memory;

bool within(const std::map<const char*, size_t>& memory, const void* pointer) {
  LOCK;
  auto after = memory.upper_bound((const char*)pointer);
  if (after == memory.begin()) return false;
  auto [start, size] = *--after;
  return (const char*)pointer < start + size;
}

cudaError_t allocate(std::map<const char*, size_t>& memory, void** pointer, size_t size, const char* what) {
  if (auto error = unsafe(what)) return error;
  size = size ? size : 1;
  // zeros, and pages that nobody touches cost nothing
  *pointer = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  LOCK;
  memory[(const char*)*pointer] = size;
  return cudaSuccess;
}

cudaError_t release(std::map<const char*, size_t>& memory, void* pointer, const char* what) {
  if (auto error = unsafe(what)) return error;
  LOCK;
  auto found = memory.find((const char*)pointer);
  if (found == memory.end()) return pointer ? failed(cudaErrorInvalidValue) : cudaSuccess;
  munmap(pointer, found->second);
  memory.erase(found);
  return cudaSuccess;
}

// Contents of more bytes than that stay as they are: what clears a whole cache does so hundreds of times.
constexpr size_t LARGEST = 64 << 20;

void move(void* target, const void* source, size_t size) {
  if (size <= LARGEST) memmove(target, source, size);
}

bool reachable(const void* pointer) { return on_device(pointer) || page_locked(pointer); }

// ------------------------------------------------------------------------------------------------------------- kernels

std::map<const void*, std::string> kernels;  // by the address of their stub on the host

std::string kernel_name(const void* kernel) {
  LOCK;
  auto found = kernels.find(kernel);
  if (found == kernels.end()) return "unregistered kernel";
  int status;
  char* plain = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
  std::string name = plain ? plain : found->second;
  free(plain);
  return name;
}

}  // namespace

namespace fake {

bool on_device(const void* pointer) { return within(device_memory, pointer); }

bool page_locked(const void* pointer) { return within(page_locked_memory, pointer); }

int attribute(int which) {  // an H100's; what nobody has asked for is 0
  static const std::map<int, int> values = {
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
      {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
      {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
      {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
  };
  auto found = values.find(which);
  return found == values.end() ? 0 : found->second;
}

}  // namespace fake

extern "C" {

// ------------------------------------------------------------------------------------------------- kernels, registered

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  LOCK;
  kernels[stub] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}

thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;  // of kernel<<<...>>>, between its two halves

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return enqueue(stream, kernel_name(kernel));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return enqueue(stream, kernel_name(kernel));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void* kernel, void**) {
  return enqueue(launch->stream, kernel_name(kernel));
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->binaryVersion = 90, found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 4;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 4;
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------- the device

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  *found = {};
  strcpy(found->name, "no GPU: tests/support/fakecuda");
  found->major = 9, found->minor = 0, found->multiProcessorCount = 132, found->warpSize = 32;
  found->totalGlobalMem = 80ull << 30, found->l2CacheSize = 50 << 20;
  found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048, found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = 65536, found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = 232448, found->sharedMemPerMultiprocessor = 233472;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = 65535, found->maxGridSize[2] = 65535;
  found->maxThreadsDim[0] = 1024, found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->concurrentKernels = found->unifiedAddressing = found->streamPrioritiesSupported = found->managedMemory = 1;
  found->memoryBusWidth = 5120, found->textureAlignment = 512;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = attribute((int)which);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = 70ull << 30, *total = 80ull << 30;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorSymbolNotFound;
}

// -------------------------------------------------------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(device_memory, pointer, size, "cudaMalloc"); }
cudaError_t cudaFree(void* pointer) { return release(device_memory, pointer, "cudaFree"); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return allocate(page_locked_memory, pointer, size, "cudaHostAlloc");
}
cudaError_t cudaFreeHost(void* pointer) { return release(page_locked_memory, pointer, "cudaFreeHost"); }
cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  LOCK;
  page_locked_memory[(const char*)pointer] = size;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  LOCK;
  page_locked_memory.erase((const char*)pointer);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  *found = {};
  bool device = on_device(pointer), host = page_locked(pointer);
  found->type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->devicePointer = device || host ? (void*)pointer : nullptr;
  found->hostPointer = host ? (void*)pointer : nullptr;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbols[4096];
  *pointer = symbols;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  LOCK;
  bool from = on_device(source), to = on_device(target);
  std::string name = std::string("copy ") + (from ? "device" : "host") + " to " + (to ? "device" : "host");
  if (!is_capturing(stream)) return enqueue(stream, name, [=] { move(target, source, size); });
  if (!reachable(target) || !reachable(source))
    return violation(name + ", pageable, during a capture", cudaErrorStreamCaptureUnsupported);
  return enqueue(stream, name, [=] {
    if (reachable(target) && reachable(source))
      move(target, source, size);
    else
      report(name + ", replayed, of memory that was given back");
  });
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  if (auto error = waits_for(nullptr, "cudaMemcpy")) return error;
  move(target, source, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  return enqueue(stream, "fill", [=] {
    if (!reachable(target))
      report("fill, of memory that was given back");
    else if (size <= LARGEST)
      memset(target, value, size);
  });
}
cudaError_t cudaMemset(void* target, int value, size_t size) { return cudaMemsetAsync(target, value, size, nullptr); }

}  // extern "C"
