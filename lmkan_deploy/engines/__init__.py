"""TensorRT engines: an ONNX model -> an engine and its manifest -> answers."""
