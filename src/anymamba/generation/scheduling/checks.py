"""Whether an engine can serve a request."""

from __future__ import annotations

from anymamba.base.sizes import require_at_least, require_sizes
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prompts import check_prompts
from anymamba.generation.requests import Request
from anymamba.generation.stops import StopMatcher


def check_request(
    request: Request, vocab_size: int, max_rows: int, tokenizer: Tokenizer | None, is_invariant: bool
) -> list[int]:
    """The prompt's tokens. Raises ValueError or TypeError for a request that an engine cannot serve.

    Args:
        vocab_size: of the model.
        max_rows: of the engine.
        tokenizer: the engine's.
        is_invariant: whether the model's logits have the same bits in any batch.
    """
    (prompt,) = check_prompts([request.prompt], vocab_size, request.eos_id)
    require_at_least("max_new_tokens", request.max_new_tokens, 0)
    require_at_least("n_top", request.n_top, 0)
    require_sizes(n=request.n)
    n_scores = request.prompt_log_probabilities
    if n_scores is not None and not 0 <= n_scores <= vocab_size:
        raise ValueError(f"prompt_log_probabilities must be 0 to {vocab_size}, the vocabulary, got {n_scores}")
    StopMatcher(request.stop)
    if request.n_rows > max_rows:
        name = "n" if request.beams is None else "num_beams"
        raise ValueError(f"{name} must be at most the engine's {max_rows} rows, got {request.n_rows}; raise max_rows")
    if request.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer to turn tokens into text; the engine has none")
    outside = [token for token in request.logit_bias if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"logit_bias must have ids of the vocabulary, 0 to {vocab_size - 1}, got {outside[0]}")
    if request.beams is not None:
        _check_beams(request)
    if request.invariant and not is_invariant:
        raise ValueError(
            "invariant=True needs the compiled step, which this model does not have; use a plain Mamba on a CPU, made "
            "by for_inference, or leave it out"
        )
    return prompt.tolist()


def _check_beams(request: Request) -> None:
    assert request.beams is not None
    if request.n > request.beams.num_beams:
        raise ValueError(f"n must be at most num_beams, got {request.n} and {request.beams.num_beams}")
    if request.is_adjusted:
        raise ValueError("a beam search takes no logit_bias, penalties or mask; leave them or beams out")
