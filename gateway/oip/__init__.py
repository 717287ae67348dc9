"""KServe's Open Inference Protocol v2, for text: what Triton's vLLM backend takes and gives."""
