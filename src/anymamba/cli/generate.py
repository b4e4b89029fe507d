"""`anymamba generate`: continues prompts with a model; the text is streamed to stdout token by token."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.cli.flags import read_flags
from anymamba.cli.output import print_json
from anymamba.cli.runtime import Runtime, load_model, open_model

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

    from anymamba.data.tokenizer import Tokenizer
    from anymamba.generation.sampling import SamplingConfig
    from anymamba.models.language_model import LanguageModel

STDIN = "-"


@dataclass(frozen=True)
class GenerateOptions:
    """Continue prompts with a model. One prompt is streamed token by token; several run as one batch.

    A prompt given as text is printed before its continuation; one from a file is not.
    """

    model: Path
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be repeated. Write --prompt=TEXT for text that starts with a dash."""
    prompt_file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File with text to continue, - for stdin; may be repeated."""
    max_new_tokens: int = 256
    """Most tokens to generate for each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Sample among tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """A value above 1 makes tokens that have occurred less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be repeated."""
    num_beams: int = 1
    """More than 1 searches for the likeliest text with that many beams, without sampling."""
    seed: int = 0
    """The same seed gives the same text."""
    tokenizer: Path | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the model's own."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


class Continuation(NamedTuple):
    """The continuation of one prompt."""

    text: str
    n_tokens: int
    finish_reason: str


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba generate`."""
    options = read_flags(GenerateOptions, "generate", arguments)
    sampling = checked_sampling(options)
    prompts = read_prompts(options)
    checkpoint, tokenizer = open_model(options.model, options.tokenizer, options.runtime)
    ids = encode_prompts(prompts, tokenizer, checkpoint.config.vocab_size)
    model = load_model(checkpoint, options.runtime)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is not an error
    if len(prompts) == 1 and options.num_beams == 1 and not options.json:
        print_stream(model, tokenizer, prompts[0], ids[0], options, sampling)
        return
    continuations = continue_all(model, tokenizer, ids, options, sampling)
    if options.json:
        print_json(as_object(options, prompts, continuations))
    else:
        print_all(options, prompts, continuations)


def checked_sampling(options: GenerateOptions) -> SamplingConfig:
    """The sampling flags. Raises ValueError if a flag is out of range, or if beam search would ignore it."""
    from anymamba.generation.sampling import RowDraws, SamplingConfig
    from anymamba.generation.stops import StopMatcher

    require_at_least("--max-new-tokens", options.max_new_tokens, 0)
    require_at_least("--num-beams", options.num_beams, 1)
    RowDraws(options.seed, 1)
    StopMatcher(options.stop)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    config = SamplingConfig(**{name: getattr(options, name) for name in names})
    if options.num_beams > 1 and (config != SamplingConfig() or options.seed != 0):
        flags = ", ".join("--" + name.replace("_", "-") for name in (*names, "seed"))
        raise ValueError(f"--num-beams {options.num_beams} searches and does not sample; leave out {flags}")
    return config


def encode_prompts(
    prompts: Sequence[str | bytes], tokenizer: Tokenizer, vocab_size: int
) -> list[Int[np.ndarray, " length"]]:
    """The ids of the prompts. Raises ValueError for a prompt that the tokenizer or the model cannot read."""
    from anymamba.generation.prompts import check_prompts

    return check_prompts([tokenizer.encode(prompt) for prompt in prompts], vocab_size, tokenizer.eos_id)


def read_prompts(options: GenerateOptions) -> list[str | bytes]:
    """The prompts of the flags, then those of the files, byte for byte.

    Raises ValueError without any prompt and FileNotFoundError for a file that is not there.
    """
    files = [sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes() for name in options.prompt_file]
    prompts: list[str | bytes] = [*options.prompt, *files]
    if not prompts:
        raise ValueError("no prompt; give one with --prompt TEXT or --prompt-file PATH (- for stdin)")
    return prompts


def print_stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | bytes,
    ids: Int[np.ndarray, " length"],
    options: GenerateOptions,
    sampling: SamplingConfig,
) -> None:
    """Print one continuation while it is generated."""
    from anymamba.generation.generate import stream_text

    steps = stream_text(
        model,
        tokenizer,
        ids,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        seed=options.seed,
    )
    print(echo(prompt), end="", flush=True)
    for piece in steps:
        print(piece, end="", flush=True)
    print()


def continue_all(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[Int[np.ndarray, " length"]],
    options: GenerateOptions,
    sampling: SamplingConfig,
) -> list[Continuation]:
    """Continue all prompts as one batch, by sampling or by beam search."""
    from anymamba.generation.beam import beam_search
    from anymamba.generation.generate import generate

    limit, stop = options.max_new_tokens, options.stop
    if options.num_beams != 1:
        found = beam_search(model, ids, tokenizer, num_beams=options.num_beams, max_new_tokens=limit, stop=stop)
        return [Continuation(best.text or "", len(best.ids), best.finish_reason) for best, *_ in found]
    output = generate(model, ids, tokenizer, max_new_tokens=limit, sampling=sampling, stop=stop, seed=options.seed)
    rows = zip(output.texts or [], output.ids, output.finish_reasons, strict=True)
    return [Continuation(text, len(tokens), reason) for text, tokens, reason in rows]


def print_all(options: GenerateOptions, prompts: Sequence[str | bytes], continuations: Sequence[Continuation]) -> None:
    """Print prompts and continuations one after the other; several are separated by a line with their number."""
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True), 1):
        if len(prompts) > 1:
            print(f"==> {number} of {len(prompts)} <==")
        print(echo(prompt) + continuation.text)


def echo(prompt: str | bytes) -> str:
    """A prompt as it is printed before its continuation."""
    return "" if isinstance(prompt, bytes) else text_of(prompt)


def text_of(prompt: str | bytes) -> str:
    """A prompt as text that can be printed, even if its bytes are not valid UTF-8."""
    data = prompt if isinstance(prompt, bytes) else prompt.encode("utf-8", "surrogateescape")
    return data.decode("utf-8", errors="replace")


def as_object(
    options: GenerateOptions, prompts: Sequence[str | bytes], continuations: Sequence[Continuation]
) -> dict[str, Any]:
    """What --json prints."""
    results = [{"prompt": text_of(p)} | c._asdict() for p, c in zip(prompts, continuations, strict=True)]
    return {"model": str(options.model), "seed": options.seed, "results": results}
