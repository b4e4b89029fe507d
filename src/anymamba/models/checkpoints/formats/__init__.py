"""The file formats: model folders, the original archives, GGUF. Each reads and writes any family of models."""
