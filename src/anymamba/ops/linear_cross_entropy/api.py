"""The cross-entropy of the logits of a linear map: its public function and contract."""

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
    """Sum -log softmax(x weight^T)[label] over tokens, in nats, without holding the logits of all tokens at once.

    Logits have the dtype of x and weight, or that of autocast; the loss is computed in float32 or wider.

    Args:
        x: (tokens, d_model).
        weight: (vocab, d_model), in the dtype of x unless autocast is on.
        labels: (tokens,), integers; tokens with label -100 are not counted. Another label outside the vocabulary raises
            IndexError or RuntimeError on a CPU; on a GPU, which is not waited for, the loss is NaN.
        backend: as in `selective_scan`.
    Returns the loss, a scalar; gradients flow to x and weight. A kernel computes the gradients in the forward pass and
    keeps (tokens + vocab) x d_model numbers for backward.
    Raises ValueError for wrong shapes, TypeError for wrong dtypes, RuntimeError if a named backend cannot serve.
    """
    arguments = checked(LossArguments(x, weight, labels))
    return run(arguments, dispatch.resolve(OP, x.device.type, backend, arguments))
