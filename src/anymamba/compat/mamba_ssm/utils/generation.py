"""Generation with the state in `InferenceParams`, as in `mamba_ssm`."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anymamba.compat.mamba_ssm.refused import refusing
from anymamba.generation.sampling import keep_min_p, keep_top_k, keep_top_p

__getattr__ = refusing(__name__)

GenerateOutput = namedtuple("GenerateOutput", ["sequences", "scores"])


@dataclass
class InferenceParams:
    """The states of the layers between calls, and the position in the sequence."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Go back to the beginning; the next forward starts from a state of zeros."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """Set to -inf in place, row by row, tokens below min_p times the probability of the most likely token."""
    if 0.0 < min_p < 1.0:
        logits.copy_(keep_min_p(logits, min_p))


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set to -inf in place all but the k largest logits."""
    logits.copy_(keep_top_k(logits, top_k))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Set to -inf in place all but the most likely tokens, which together have the probability top_p."""
    if 0.0 < top_p < 1.0:
        logits.copy_(keep_top_p(logits, top_p))


def modify_logit_for_repetition_penalty(
    logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0
) -> Tensor:
    """Logits (batch, vocab), in which the tokens (batch, length) are less likely."""
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter(1, prev_output_tokens, score)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Token ids (batch,) drawn from logits (batch, vocab).

    Args:
        top_k: 1 takes the most likely token, 0 keeps all.
        top_p: keep the most likely tokens that together have this probability; 0 keeps all.
        min_p: keep tokens with at least this fraction of the probability of the most likely one; 0 keeps all.
        temperature: divides the logits, before top_p.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p must be between 0 and 1, got {top_p}")
    logits = logits.float()
    if top_k > 0:
        logits = keep_top_k(logits, min(top_k, logits.shape[-1]))
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    logits = logits / temperature
    if 0.0 < top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(-1)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> GenerateOutput:
    """Continue (batch, length) prompts to max_length, the prompt included.

    A row that has emitted an end token is filled up with end tokens. Generation stops when all rows have ended.

    Args:
        top_k, top_p, min_p, temperature: as in `sample`.
        repetition_penalty: above 1 makes tokens of the sequence less likely.
        eos_token_id: one or several end tokens.
        teacher_outputs: (batch, length) tokens to use instead of the model's own, as far as they go.
        vocab_size: ids from this one on are padding of the embedding and are never emitted.
        cg: run steps through `update_graph_cache`.
        enable_timing: print the time of prompt and steps to stdout.
        output_scores: keep the logits of each new token.
        streamer: an object with put(ids) and end().
    Returns sequences (batch, up to max_length) and scores, a tuple of (batch, vocab) logits.
    """
    batch, prompt_length = input_ids.shape
    ends = None if eos_token_id is None else torch.atleast_1d(torch.as_tensor(eos_token_id, device=input_ids.device))
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    if cg:
        model._decoding_cache = update_graph_cache(
            model, getattr(model, "_decoding_cache", None), batch, prompt_length, max_length
        )
        params = model._decoding_cache.inference_params
        params.reset(max_length, batch)

    def logits_after(ids: Tensor) -> Tensor:
        positions = torch.full((batch, 1), params.seqlen_offset, dtype=torch.long, device=ids.device)
        if params.seqlen_offset == 0:
            logits = model(ids, inference_params=params, num_last_tokens=1).logits.squeeze(1)
        elif cg:
            logits = model._decoding_cache.run(ids, positions, params.seqlen_offset).squeeze(1)
        else:
            logits = model(ids, positions, inference_params=params, num_last_tokens=1).logits.squeeze(1)
        return logits if vocab_size is None else logits[..., :vocab_size]

    def next_tokens(logits: Tensor) -> Tensor:
        if teacher_outputs is not None and teacher_outputs.shape[1] > params.seqlen_offset:
            return teacher_outputs[:, params.seqlen_offset]
        return sample(logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)

    start = time.perf_counter()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sequences, scores = [input_ids], []
    done = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    while params.seqlen_offset + sequences[-1].shape[1] < max_length and not bool(done.all()):
        ids = sequences[-1]
        logits = logits_after(ids)
        params.seqlen_offset += ids.shape[1]
        if output_scores:
            scores.append(logits.clone())
        if repetition_penalty != 1.0:
            logits = modify_logit_for_repetition_penalty(logits, torch.cat(sequences, dim=1), repetition_penalty)
        tokens = next_tokens(logits)
        if ends is not None:
            tokens = torch.where(done, ends[0], tokens)
            done |= torch.isin(tokens, ends)
        sequences.append(tokens[:, None])
        if streamer is not None:
            streamer.put(tokens.cpu())
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt processing + decoding time: {(time.perf_counter() - start) * 1000:.0f}ms")
    return GenerateOutput(torch.cat(sequences, dim=1), tuple(scores))


class GenerationMixin:
    """`generate` for models with `forward(input_ids, position_ids, inference_params, num_last_tokens)`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} must define allocate_inference_cache")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ) -> Tensor | GenerateOutput:
        """`decode` with this model: the sequences, or sequences and scores with return_dict_in_generate."""
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences


@dataclass
class DecodingCGCache:
    """Holds what runs a step; here it is the model itself, with separate `InferenceParams`."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: Any = None
    dtype: Any = None
    callables: dict[Any, Callable[..., Tensor]] = field(default_factory=dict)
    mempool: Any = None
    inference_params: Any = None
    run: Any = None


@torch.inference_mode()
def update_graph_cache(
    model: Any,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: Sequence[int] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """A cache whose `run(ids, position_ids, seqlen)` runs a step; no graph is captured, the model is called."""
    cache = cache or DecodingCGCache()
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if cache.inference_params is None or cache.max_batch_size < batch_size or cache.max_seqlen < max_seqlen:
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.device, cache.dtype = parameter.device, dtype or parameter.dtype
        params = InferenceParams(max_seqlen=max_seqlen, max_batch_size=batch_size, seqlen_offset=seqlen_og)
        cache.inference_params, cache.callables = params, {}
    for length in decoding_seqlens:
        cache.callables[batch_size, length] = capture_graph(
            model, cache.inference_params, batch_size, max_seqlen, length, n_warmups=n_warmups
        )
    if getattr(cache, "_batch", None) != batch_size:
        cache.inference_params.key_value_memory_dict = {}
        cache._batch = batch_size  # type: ignore[attr-defined]

    def run(ids: Tensor, position_ids: Tensor, seqlen: int) -> Tensor:
        return cache.callables[ids.shape[0], ids.shape[1]](ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model: Any,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """A function `run(ids, position_ids, seqlen)` that returns logits of the last tokens; it calls the model."""

    def run(new_input_ids: Tensor, new_position_ids: Tensor, seqlen: int) -> Tensor:
        inference_params.seqlen_offset = seqlen
        return model(
            new_input_ids, new_position_ids, inference_params=inference_params, num_last_tokens=decoding_seqlen
        ).logits

    return run
