"""What goes wrong with a checkpoint's files, and what other programs make of them."""


class CheckpointError(RuntimeError):
    """A checkpoint that is truncated, corrupt, of another model, or of a kind that is refused."""


class CheckpointWarning(UserWarning):
    """A checkpoint was written whole, but another program that reads it will do something otherwise."""
