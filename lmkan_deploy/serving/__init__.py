"""A server for the Open Inference Protocol (KServe V2) over HTTP and gRPC."""
