"""What the ONNX targets share: writing a program as ONNX, running it, looking into the runtime."""
