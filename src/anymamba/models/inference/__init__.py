"""Language models for inference: packed weights, and one native call per token where the model allows it."""
