// What the device (see runtime.cpp) has of cuBLAS and cuDNN. A product or a convolution is one operation. The functions
// of cuBLAS that only compute are generated beside this file from torch's own symbols; cuDNN's descriptors of tensors
// are the real library's, which needs no device for them.

#include "device.h"

#include <cudnn.h>

#include <cstring>
#include <map>

namespace {

constexpr int FAILED = 14;  // CUBLAS_STATUS_INTERNAL_ERROR

std::map<const void*, cudaStream_t> stream_of_handle;

void set_stream(const void* handle, cudaStream_t stream) {
  LOCK;
  stream_of_handle[handle] = stream;
}

cudaStream_t stream_of(const void* handle) {
  LOCK;
  return stream_of_handle[handle];
}

template <class T>
int create(T* handle) {
  *handle = (T) new char[256]();
  return 0;
}

}  // namespace

extern "C" {

// A computation on the stream of a library's handle: what every generated function does.
int fake_computation(const char* name, const void* handle) {
  return fake::enqueue(stream_of(handle), name) ? FAILED : 0;
}

// -------------------------------------------------------------------------------------------------------------- cuBLAS

int cublasCreate_v2(void** handle) { return create(handle); }
int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  set_stream(handle, stream);
  return 0;
}
int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}

// Its header wants more headers than come with torch, hence no types here. What torch reads of a heuristic's answer:
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

size_t cublasLtGetVersion() { return 130100; }
int cublasLtMatmulDescCreate(void** made, int, int) { return create(made); }
int cublasLtMatmulPreferenceCreate(void** made) { return create(made); }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return create(made); }
int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* count) {
  found[0] = {};
  *count = 1;
  return 0;
}
int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t stream) {
  return fake::enqueue(stream, "cublasLtMatmul") ? FAILED : 0;
}

// --------------------------------------------------------------------------------------------------------------- cuDNN

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { return (cudnnStatus_t)create(handle); }
cudnnStatus_t cudnnDestroy(cudnnHandle_t) { return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  set_stream(handle, stream);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  *stream = stream_of(handle);
  return CUDNN_STATUS_SUCCESS;
}

// Descriptors of the graph interface. torch describes an operation, then a plan for it, and executes the plan: a plan
// is named by the last convolution that its thread has described.
struct Descriptor {
  const char* name;
};
static thread_local const char* described = "cudnn";

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* made) {
  if (type == CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR) described = "cudnn: convolution";
  if (type == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR) described = "cudnn: gradient by data";
  if (type == CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR) described = "cudnn: gradient by weight";
  *made = (cudnnBackendDescriptor_t) new Descriptor{described};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  delete (Descriptor*)descriptor;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(
    cudnnBackendDescriptor_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t, int64_t, const void*) {
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }

static size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    default: return 4;
  }
}

// Everything asked of an engine is 0, its workspace too; it has no notes, and descriptors come as the caller made them.
cudnnStatus_t cudnnBackendGetAttribute(
    cudnnBackendDescriptor_t, cudnnBackendAttributeName_t, cudnnBackendAttributeType_t type, int64_t requested,
    int64_t* count, void* values) {
  bool notes = type == CUDNN_TYPE_NUMERICAL_NOTE || type == CUDNN_TYPE_BEHAVIOR_NOTE;
  if (count) *count = notes ? 0 : 1;
  if (notes || type == CUDNN_TYPE_BACKEND_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
  if (values && requested > 0) memset(values, 0, size_of(type) * requested);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t) {
  auto error = fake::enqueue(stream_of(handle), ((Descriptor*)plan)->name);
  return error ? CUDNN_STATUS_EXECUTION_FAILED : CUDNN_STATUS_SUCCESS;
}

}  // extern "C"
