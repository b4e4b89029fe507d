"""Generation and published checkpoints."""
