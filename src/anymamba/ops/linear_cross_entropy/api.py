"""The cross-entropy of logits that a linear map gives: its contract and its public function."""

from jaxtyping import Float, Int
from torch import Tensor

from anymamba.kernels.linear_cross_entropy.arguments import Hidden, LossArguments
from anymamba.ops import dispatch
from anymamba.ops.linear_cross_entropy.checks import checked
from anymamba.ops.linear_cross_entropy.registration import OP, run


def linear_cross_entropy(
    x: Hidden,
    weight: Float[Tensor, "vocab d_model"],
    labels: Int[Tensor, " tokens"],
    *,
    backend: str | None = None,
) -> Float[Tensor, ""]:
    """The sum of -log softmax(x weight^T)[label] over tokens, in nats, without the logits of all tokens at once.

    Logits have the dtype of x and weight, or that of autocast; the loss is computed in float32 or wider.

    Args:
        x: (tokens, d_model).
        weight: (vocab, d_model), of the dtype of x unless autocast is on.
        labels: (tokens,), integers; -100 is not counted.
        backend: as in `selective_scan`.
    Returns the loss, a scalar; gradients flow to x and weight. Where a kernel serves, forward computes them with the
    loss, and keeps (tokens + vocab) x d_model numbers for backward.
    Raises ValueError for shapes, TypeError for dtypes, RuntimeError when a named backend cannot serve.
    """
    arguments = checked(LossArguments(x, weight, labels))
    return run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments))
