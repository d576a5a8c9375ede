// The device's streams, events, captures and graphs, with the rules of a capture, and its log.

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "device.h"

using namespace fake;

namespace {

// ------------------------------------------------------------------------------------------------- graphs and captures

struct Graph {
  std::vector<std::string> nodes;
  std::vector<Work> work;
};

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id owner;
  cudaStream_t origin;
  bool broken = false, ended = false;
  Graph* graph = new Graph;  // lives as long as the process, for who looks at its nodes later
};

struct Stream {
  std::shared_ptr<Capture> capture;
  long position = 0;  // of its last operation in the capture
  long joined = 0;    // the position up to which another stream of the capture has waited for it
};

struct Event {
  std::shared_ptr<Capture> capture;  // in which it was recorded
  cudaStream_t stream = nullptr;
  long position = 0;
};

std::map<cudaStream_t, Stream> streams;
std::set<std::shared_ptr<Capture>> active;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

// ------------------------------------------------------------------------------------------------------------- the log

std::map<std::string, std::vector<std::string>> logs;
std::vector<Graph*> captured;

bool is_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

// Stricter than CUDA, which lets the default stream work beside the capture of a stream that does not block, as torch's
// do not: such work is done once, at the capture, and is missing from the graph.
cudaError_t default_stream(cudaStream_t stream, const std::string& what) {
  if (!is_default(stream) || active.empty()) return cudaSuccess;
  return violation(what + " on the default stream during a capture", cudaErrorStreamCaptureImplicit);
}

}  // namespace

// -------------------------------------------------------------------------------------------- what the other files use

namespace fake {

std::recursive_mutex mutex;

cudaError_t failed(cudaError_t error) { return last_error = error; }

void report(const std::string& what) {
  LOCK;
  logs["violations"].push_back(what);
  fprintf(stderr, "[fakecuda] violation: %s\n", what.c_str());
}

cudaError_t violation(const std::string& what, cudaError_t error) {
  LOCK;
  report(what);
  for (auto& capture : active) capture->broken = true;
  return failed(error);
}

bool is_capturing(cudaStream_t stream) {
  LOCK;
  return streams[stream].capture != nullptr;
}

cudaError_t unsafe(const std::string& what) {
  LOCK;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto& capture : active) {
    bool own = capture->owner == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (own || global) return violation(what + " during a capture", cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t waits_for(cudaStream_t stream, const std::string& what) {
  LOCK;
  if (streams[stream].capture) return violation(what + " of a capturing stream", cudaErrorStreamCaptureUnsupported);
  return unsafe(what);
}

cudaError_t enqueue(cudaStream_t handle, const std::string& name, Work work) {
  LOCK;
  if (auto error = default_stream(handle, name)) return error;
  Stream& stream = streams[handle];
  if (!stream.capture) {
    logs["operations"].push_back(name);
    if (work) work();
    return cudaSuccess;
  }
  if (stream.capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
  stream.position++;
  stream.capture->graph->nodes.push_back(name);
  if (work) stream.capture->graph->work.push_back(std::move(work));
  return cudaSuccess;
}

}  // namespace fake

extern "C" {

// ------------------------------------------------------------------------------ what a test asks the device, by ctypes

// The lines of a log: "operations" (what ran outside captures), "violations", "missing" (functions that were called and
// that the device lacks), "replays" and "graphs" (how many nodes each graph had that was launched, or captured), or
// "graph" (the nodes of that one). Good until the next call.
const char* fake_log(const char* name, long graph) {
  LOCK;
  static std::string text;
  text.clear();
  if (!strcmp(name, "graphs"))
    for (Graph* g : captured) text += std::to_string(g->nodes.size()) + "\n";
  else if (!strcmp(name, "graph"))
    for (auto& node : captured.at(graph)->nodes) text += node + "\n";
  else
    for (auto& line : logs[name]) text += line + "\n";
  return text.c_str();
}

void fake_clear() {
  LOCK;
  for (auto name : {"operations", "violations", "replays"}) logs[name].clear();
  captured.clear();
}

int fake_missing(const char* name) {
  LOCK;
  logs["missing"].push_back(name);
  fprintf(stderr, "[fakecuda] the device has no %s\n", name);
  return failed(cudaErrorNotSupported);
}

// -------------------------------------------------------------------------------------------------------------- errors

cudaError_t cudaGetLastError() {
  auto error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing one";
    case cudaErrorStreamCaptureUnjoined: return "capture sequence contains unjoined work";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    default: return "another error of the device without kernels";
  }
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ----------------------------------------------------------------------------------------------------- streams, events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  LOCK;
  *stream = (cudaStream_t) new char;  // a handle of its own
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits_for(stream, "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return waits_for(stream, "cudaStreamQuery"); }
cudaError_t cudaDeviceSynchronize() {
  LOCK;
  if (active.empty()) return cudaSuccess;
  return violation("cudaDeviceSynchronize during a capture", cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream, "host function", [=] { function(data); });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return enqueue(stream, "host function", [=] { function(stream, cudaSuccess, data); });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  LOCK;
  if (auto error = default_stream(stream, "cudaEventRecord")) return error;
  auto& at = streams[stream];
  *(Event*)handle = {at.capture, stream, at.position};
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
bool is_captured(const Event& event) { return event.capture && !event.capture->ended; }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCK;
  if (is_captured(*(Event*)event)) return violation("cudaEventQuery of a captured event", cudaErrorCapturedEvent);
  return unsafe("cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  LOCK;
  if (is_captured(*(Event*)event)) return violation("cudaEventSynchronize of a captured event", cudaErrorCapturedEvent);
  return unsafe("cudaEventSynchronize");
}
// Everything takes as long, lest what is tuned by the clock differ from run to run.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited, unsigned) {
  LOCK;
  Event& event = *(Event*)waited;
  if (auto error = default_stream(handle, "cudaStreamWaitEvent")) return error;
  Stream& stream = streams[handle];
  if (!is_captured(event)) {
    bool dependent = stream.capture && event.stream;
    if (!dependent) return cudaSuccess;
    return violation("a capturing stream waits for an event from outside", cudaErrorStreamCaptureIsolation);
  }
  if (stream.capture && stream.capture != event.capture)
    return violation("one capture waits for another", cudaErrorStreamCaptureMerge);
  if (!stream.capture) stream = {event.capture, 0, 0};  // it joins the capture
  Stream& from = streams[event.stream];
  from.joined = std::max(from.joined, event.position);
  stream.position++;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------- captures and graphs

cudaStreamCaptureStatus status_of(const Stream& stream) {
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  LOCK;
  *status = status_of(streams[stream]);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
  LOCK;
  Stream& stream = streams[handle];
  *status = status_of(stream);
  if (id) *id = stream.capture ? stream.capture->id : 0;
  if (graph) *graph = stream.capture ? (cudaGraph_t)stream.capture->graph : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  LOCK;
  static unsigned long long last_id = 0;
  if (is_default(handle)) return failed(cudaErrorStreamCaptureUnsupported);
  Stream& stream = streams[handle];
  if (stream.capture) return failed(cudaErrorIllegalState);
  stream = {std::make_shared<Capture>(Capture{++last_id, mode, std::this_thread::get_id(), handle}), 0, 0};
  active.insert(stream.capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCK;
  auto capture = streams[handle].capture;
  *graph = nullptr;
  if (!capture) return failed(cudaErrorIllegalState);
  bool joined = true;
  for (auto& [other, stream] : streams) {
    if (stream.capture != capture) continue;
    joined &= other == capture->origin || stream.joined == stream.position;
    stream = {};
  }
  capture->ended = true;
  active.erase(capture);
  if (capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
  if (!joined) return violation("a capture ends ahead of work in another stream", cudaErrorStreamCaptureUnjoined);
  captured.push_back(capture->graph);
  *graph = (cudaGraph_t)capture->graph;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Graph* graph = (Graph*)executable;
  return enqueue(stream, "graph", [=] {
    logs["replays"].push_back(std::to_string(graph->nodes.size()));
    for (auto& work : graph->work) work();
  });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = ((Graph*)graph)->nodes.size();
  return cudaSuccess;
}

}  // extern "C"
