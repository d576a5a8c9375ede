// What the libraries of the device share. See runtime.cpp for what the device is.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>
#include <string>

namespace fake {

extern std::recursive_mutex mutex;  // of all that the device holds
#define LOCK std::lock_guard<std::recursive_mutex> lock(fake::mutex)

using Work = std::function<void()>;

// Puts an operation on a stream: a node of the stream's capture, or, outside a capture, done at once. `work` is what
// the operation does to memory; kernels have none.
cudaError_t enqueue(cudaStream_t stream, const std::string& name, Work work = nullptr);

// What CUDA calls potentially unsafe: refused, as a violation, to a thread that captures, unless the thread has asked
// for the relaxed mode, as torch's allocator does around its cudaMalloc.
cudaError_t unsafe(const std::string& what);

// The same of a wait for a stream, which nobody may wait for while it captures.
cudaError_t waits_for(cudaStream_t stream, const std::string& what);

// Reports what is forbidden; the second one also breaks every capture under way, and gives the error back.
void report(const std::string& what);
cudaError_t violation(const std::string& what, cudaError_t error);

// The error, which cudaGetLastError will tell of.
cudaError_t failed(cudaError_t error);

bool is_capturing(cudaStream_t stream);

// Whether a pointer lies in memory of the device, or of the host but page-locked.
bool on_device(const void* pointer);
bool page_locked(const void* pointer);

// An attribute of the device: the runtime's and the driver's numbers for them are the same.
int attribute(int which);

}  // namespace fake
