// What the kernels of all providers need: a node's tensors, checked and mapped onto the C
// interface, and errors that name the node.
#ifndef LMKAN_ONNXRUNTIME_NODE_H_
#define LMKAN_ONNXRUNTIME_NODE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "lookup2d_op.h"

namespace lmkan::ort {

inline constexpr size_t kMessageSize = 512;

// A node of a session.
struct Node {
  const Lookup2dOp* op = nullptr;
  const OrtApi* api = nullptr;
  std::string name;

  size_t num_constants() const { return op->is_quantized() ? 2 : 1; }  // table, scale
};

// x and y of one call, as rows.
struct Rows {
  int64_t count = 0;
  const void* x = nullptr;
  void* y = nullptr;
};

// Fills in a node. Throws std::bad_alloc.
OrtStatus* ReadNode(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                    Node* node);

// An error of a node: "LMKAN2D node "name": message".
OrtStatus* Error(const Node& node, const char* message);

// Describes a table where it lies; `scale` is null for tables of floats.
OrtStatus* DescribeTable(const Node& node, const OrtValue* table, const OrtValue* scale,
                         lmkan_table_desc* desc);

// The same of the table that a call brings.
OrtStatus* DescribeTableOf(const Node& node, OrtKernelContext* context, lmkan_table_desc* desc);

// Checks x and allocates y. Without rows the pointers stay null.
OrtStatus* MapRows(const Node& node, OrtKernelContext* context, const lmkan_table_desc& desc,
                   Rows* rows);

}  // namespace lmkan::ort

#endif  // LMKAN_ONNXRUNTIME_NODE_H_
