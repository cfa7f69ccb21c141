"""Checkpoint -> ONNX: the exporter, the operator's ONNX definition, and the graph passes."""
