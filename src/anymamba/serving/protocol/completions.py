"""A request of /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.fields import read_fields
from anymamba.serving.protocol.formats import Form, read_form
from anymamba.serving.protocol.options import Options, read_options
from anymamba.serving.protocol.tables import COMPLETION

MOST_PROMPTS = 256


@dataclass(frozen=True)
class CompletionCall:
    """Texts to go on with."""

    options: Options
    prompts: tuple[str | list[int], ...]
    max_tokens: int
    n_top: int | None
    """Report log-probabilities and so many of the likeliest tokens; None: do not."""
    echo: bool
    best_of: int
    form: Form | None


def read_completion(body: Any) -> CompletionCall:
    """Check a body. Raises ApiError that names the wrong field."""
    values = read_fields(COMPLETION, body)
    options, prompts = read_options(values), read_prompts(values["prompt"])
    best_of = options.n if values["best_of"] is None else values["best_of"]
    if best_of < options.n:
        raise ApiError(400, f"best_of must be at least n, got {best_of} and {options.n}", param="best_of")
    if best_of > options.n and options.stream:
        raise ApiError(400, "best_of above n does not go with stream; leave one out", param="best_of")
    if best_of > 1 and options.session is not None:
        raise ApiError(400, "a session has one answer; leave out best_of or session", param="best_of")
    if options.session is not None and len(prompts) > 1:
        raise ApiError(400, "a session has one prompt; send several prompts as several requests", param="prompt")
    return CompletionCall(
        options=options,
        prompts=prompts,
        max_tokens=values["max_tokens"],
        n_top=values["logprobs"],
        echo=values["echo"],
        best_of=best_of,
        form=read_form(values),
    )


def read_prompts(value: Any) -> tuple[str | list[int], ...]:
    """The prompts: one or several texts, or one or several lists of ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_value("prompt", "a string, a list of strings, or lists of token ids", value)
    if not value:
        raise ApiError(400, "prompt is an empty list; give at least one prompt", param="prompt")
    if not isinstance(value[0], str | list):
        return (read_ids(value, "prompt"),)
    if len(value) > MOST_PROMPTS:
        raise ApiError(400, f"prompt must have at most {MOST_PROMPTS} prompts, got {len(value)}", param="prompt")
    for place, entry in enumerate(value):
        if type(entry) is not type(value[0]):
            raise wrong_value(f"prompt[{place}]", "of the same kind as the first prompt", entry)
    if isinstance(value[0], str):
        return tuple(value)
    return tuple(read_ids(entry, f"prompt[{place}]") for place, entry in enumerate(value))


def read_ids(value: Any, name: str) -> list[int]:
    """A list of token ids; whether the vocabulary has them is checked later."""
    if not isinstance(value, list):
        raise wrong_value(name, "a list of token ids", value)
    for place, entry in enumerate(value):
        if type(entry) is not int or entry < 0:
            raise wrong_value(f"{name}[{place}]", "a token id, an integer of at least 0", entry)
    return value
