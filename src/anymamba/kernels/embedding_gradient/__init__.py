"""The kernel of the gradient of an embedding; `parts/embedding.py` chooses between it and torch's operations."""
