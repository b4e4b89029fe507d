"""`anymamba generate`: continues prompts with a model; the text is streamed to stdout token by token."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.console.flags import read_flags
from anymamba.console.output import print_json, say
from anymamba.console.profiling import StepProfile
from anymamba.console.prompts import Prompt, read_prompts
from anymamba.console.runtime import Runtime, load_model, open_model
from anymamba.console.sampling import FILTERS, SamplingFlags, checked_sampling
from anymamba.console.speculation import SpeculationFlags, check_speculation, open_speculation
from anymamba.console.speed import Speed

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

    from anymamba.data.tokenizer import Tokenizer
    from anymamba.generation.generate import TokenStream
    from anymamba.generation.sampling import SamplingConfig
    from anymamba.generation.speculation import Speculation
    from anymamba.models.language_model import LanguageModel


@dataclass(frozen=True)
class GenerateOptions:
    """Continue prompts with a model. One prompt is streamed token by token; several run in batches.

    A prompt given as text is printed before its continuation; one from a file is not. The results have the order of
    the prompts on the command line.
    """

    model: Path
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; may be repeated. Write --prompt=TEXT for text that starts with a dash."""
    prompt_file: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File with text to continue, - for stdin; may be repeated."""
    prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """JSONL file with a prompt in each row, and a name for its results in the field `name` or `id`; - for stdin."""
    prompt_field: str = "prompt"
    """The field of a row that holds the prompt."""
    num_samples: int = 1
    """Continuations of each prompt. A prompt is read once."""
    batch_size: int = 32
    """Most continuations at once; the text does not change, except for rounding."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingFlags] = field(default_factory=SamplingFlags)
    num_beams: int = 1
    """More than 1 searches for the likeliest text with that many beams, without sampling."""
    guesses: tyro.conf.OmitArgPrefixes[SpeculationFlags] = field(default_factory=SpeculationFlags)
    tokenizer: Path | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the model's own."""
    profile: Path | None = None
    """Folder for a profile of the first tokens: a trace for Perfetto or TensorBoard. A table goes to stderr."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of text."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


class Result(NamedTuple):
    """One continuation of a prompt."""

    name: str
    """Of the prompt."""
    prompt: str
    sample: int
    """Its number among the continuations of the prompt, from 1."""
    text: str
    n_tokens: int
    finish_reason: str


class Job(NamedTuple):
    """What is to be generated, and with which model."""

    options: GenerateOptions
    sampling: SamplingConfig
    prompts: list[Prompt]
    ids: list[Int[np.ndarray, " length"]]
    """Of each prompt."""
    tokenizer: Tokenizer
    model: LanguageModel
    speed: Speed
    speculation: Speculation | None


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba generate`."""
    options = read_flags(GenerateOptions, "generate", arguments)
    sampling = checked_options(options)
    profile = (
        None if options.profile is None else StepProfile(options.profile, "generate", ("prompt", "token", "search"))
    )
    given = {"--prompt": options.prompt, "--prompt-file": options.prompt_file, "--prompts": options.prompts}
    prompts = read_prompts(arguments, given, options.prompt_field)
    checkpoint, tokenizer = open_model(options.model, options.tokenizer, options.runtime)
    ids = encode_prompts(prompts, tokenizer, checkpoint.config.vocab_size)
    model = load_model(checkpoint, options.runtime)
    speculation = open_speculation(options.guesses, options.runtime, model, tokenizer)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show is not an error
    speed = Speed(profile)
    job = Job(options, sampling, prompts, ids, tokenizer, model, speed, speculation)
    if len(prompts) == options.num_samples == options.num_beams == 1 and not options.json:
        print_stream(job)
    elif options.json:
        results = [result._asdict() for result in continue_all(job)]
        print_json({"model": str(options.model), "seed": options.sampling.seed, "results": results})
    else:
        print_all(job)
    speed.finish()
    say(speed.summary())


def checked_options(options: GenerateOptions) -> SamplingConfig:
    """The filters. Raises ValueError if a flag is out of range, or if it would have no effect beside another."""
    config = checked_sampling(options.sampling)
    require_at_least("--num-beams", options.num_beams, 1)
    require_at_least("--num-samples", options.num_samples, 1)
    require_at_least("--batch-size", options.batch_size, 1)
    check_speculation(options.guesses)
    if options.num_beams > 1 and options.guesses != SpeculationFlags():
        raise ValueError(f"--num-beams {options.num_beams} searches without guesses; leave out --speculate and --draft")
    default, flags = SamplingFlags(), (*FILTERS, "seed")
    changed = any(getattr(options.sampling, name) != getattr(default, name) for name in flags)
    if options.num_beams > 1 and (changed or options.num_samples > 1):
        names = ", ".join("--" + name.replace("_", "-") for name in (*flags, "num_samples"))
        raise ValueError(f"--num-beams {options.num_beams} searches and does not sample; leave out {names}")
    if options.num_samples > 1 and config.is_greedy:
        raise ValueError(
            f"--temperature 0 gives the same text {options.num_samples} times; leave out --num-samples, or give a "
            "temperature above 0"
        )
    return config


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, vocab_size: int
) -> list[Int[np.ndarray, " length"]]:
    """The ids of the prompts. Raises ValueError for a prompt that the tokenizer or the model cannot read."""
    from anymamba.generation.prompts import check_prompts

    return check_prompts([tokenizer.encode(prompt.text) for prompt in prompts], vocab_size, tokenizer.eos_id)


def print_stream(job: Job) -> None:
    """Print one continuation while it is generated."""
    print(job.prompts[0].readable() if job.prompts[0].echo else "", end="", flush=True)
    try:
        for step in job.speed.steps(lambda: open_stream(job, [(0, 0)])):
            print(step.texts[0], end="", flush=True)
    finally:
        print()


def print_all(job: Job) -> None:
    """Print the results of each batch when it is done; several have a line with their number and name."""
    n_prompts, n_samples = len(job.prompts), job.options.num_samples
    for number, result in enumerate(continue_all(job)):
        prompt = job.prompts[number // n_samples]
        if n_prompts * n_samples > 1:
            sample = f", sample {result.sample} of {n_samples}" if n_samples > 1 else ""
            print(f"==> {number // n_samples + 1} of {n_prompts}: {result.name}{sample} <==")
        print((prompt.readable() if prompt.echo else "") + result.text, flush=True)


def continue_all(job: Job) -> Iterator[Result]:
    """All results, in the order of the prompts, batch by batch."""
    rows = list(product(range(len(job.prompts)), range(job.options.num_samples)))
    for start in range(0, len(rows), job.options.batch_size):
        batch = rows[start : start + job.options.batch_size]
        yield from continue_by_search(job, batch) if job.options.num_beams > 1 else continue_by_sampling(job, batch)


def continue_by_sampling(job: Job, rows: Sequence[tuple[int, int]]) -> list[Result]:
    """The results of a batch. A row is the number of a prompt and of one of its samples."""
    texts, counts, reasons = [""] * len(rows), [0] * len(rows), ["length"] * len(rows)
    for step in job.speed.steps(lambda: open_stream(job, rows)):
        for row, text, reason in zip(step.rows, step.texts, step.finish_reasons, strict=True):
            texts[row] += text
            counts[row] += 1
            reasons[row] = reason or reasons[row]
    results = []
    for (number, sample), whole, n_tokens, why in zip(rows, texts, counts, reasons, strict=True):
        prompt = job.prompts[number]
        results.append(Result(prompt.name, prompt.readable(), sample + 1, whole, n_tokens, why))
    return results


def open_stream(job: Job, rows: Sequence[tuple[int, int]]) -> TokenStream:
    """The stream of a batch. Several samples of a prompt share its state."""
    import torch

    from anymamba.generation.generate import stream
    from anymamba.generation.prompts import read_prompts as read_ids
    from anymamba.parts.state import select_rows

    flags = job.options.sampling
    prompts, state = [job.ids[number] for number, _ in rows], None
    if job.options.num_samples > 1:
        numbers = list(dict.fromkeys(number for number, _ in rows))
        read = read_ids(job.model, [job.ids[number] for number in numbers], eos_id=job.tokenizer.eos_id)
        places = torch.tensor([numbers.index(number) for number, _ in rows], device=read.logits.device)
        prompts, state = [prompt[:0] for prompt in prompts], select_rows(read, places)
    return stream(
        job.model,
        prompts,
        job.tokenizer,
        max_new_tokens=flags.max_new_tokens,
        sampling=job.sampling,
        stop=flags.stop,
        seed=[(flags.seed, sample * len(job.prompts) + number) for number, sample in rows],
        state=state,
        speculation=job.speculation,
    )


def continue_by_search(job: Job, rows: Sequence[tuple[int, int]]) -> list[Result]:
    """The likeliest continuation of each prompt that beam search finds."""
    from anymamba.generation.beam import beam_search

    options, numbers = job.options, [number for number, _ in rows]
    with job.speed.search():
        found = beam_search(
            job.model,
            [job.ids[number] for number in numbers],
            job.tokenizer,
            num_beams=options.num_beams,
            max_new_tokens=options.sampling.max_new_tokens,
            stop=options.sampling.stop,
        )
    results: list[Result] = []
    for number, (best, *_) in zip(numbers, found, strict=True):
        prompt = job.prompts[number]
        results.append(Result(prompt.name, prompt.readable(), 1, best.text or "", len(best.ids), best.finish_reason))
    job.speed.tokens += sum(result.n_tokens for result in results)
    return results
