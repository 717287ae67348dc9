"""What weight files say of themselves: safetensors and GGUF headers, read without the weights."""
