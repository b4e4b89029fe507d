"""What goes wrong with a checkpoint's files."""


class CheckpointError(RuntimeError):
    """A checkpoint that is truncated, corrupt, of another model, or of a kind that is refused."""
