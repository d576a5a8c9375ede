// libcuda's part of the device (see runtime.cpp): what Triton's and Inductor's launchers call.

#include "device.h"

#include <map>

namespace {

struct Kernel {
  std::string name;
};

CUresult load(CUmodule* module) {
  if (fake::unsafe("a module load")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *module = (CUmodule) new Kernel;  // Triton's modules have one kernel each
  return CUDA_SUCCESS;
}

CUresult launch(CUfunction kernel, CUstream stream) {
  return (CUresult)fake::enqueue((cudaStream_t)stream, "triton: " + ((Kernel*)kernel)->name);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult result, const char** text) {
  *text = cudaGetErrorString((cudaError_t)result);  // their numbers are the same
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult result, const char** text) { return cuGetErrorString(result, text); }
CUresult cuDeviceGet(CUdevice* device, int) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = fake::attribute(which);
  return CUDA_SUCCESS;
}

static CUcontext context = (CUcontext)0x10;  // only compared
CUresult cuCtxGetCurrent(CUcontext* current) {
  *current = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice) { return cuCtxGetCurrent(retained); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void*) { return load(module); }
CUresult cuModuleLoad(CUmodule* module, const char*) { return load(module); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) { return load(module); }
CUresult cuModuleGetFunction(CUfunction* kernel, CUmodule module, const char* name) {
  ((Kernel*)module)->name = name;
  *kernel = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(
    CUfunction kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream stream, void**,
    void**) {
  return launch(kernel, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction kernel, void**, void**) {
  return launch(kernel, configuration->hStream);
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  if (!fake::on_device((void*)pointer) && !fake::page_locked((void*)pointer)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)value = pointer;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  *count = 4;
  return CUDA_SUCCESS;
}

}  // extern "C"
