"""What completions and chats have in common: how tokens are chosen, where an answer ends, and how it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anymamba.generation.requests import Beams
from anymamba.generation.sampling import SamplingConfig
from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.fields import Number, read_fields
from anymamba.serving.protocol.tables import MOST_STOPS, STREAM_OPTIONS


@dataclass(frozen=True)
class Options:
    """The checked fields that do not depend on the endpoint."""

    model: str | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    sampling: SamplingConfig
    beams: Beams | None
    seed: int | None
    logit_bias: dict[int, float]
    frequency_penalty: float
    presence_penalty: float
    session: str | None


def read_options(values: Mapping[str, Any]) -> Options:
    """Take the common options out of the values of a table.

    Raises ApiError that names the wrong field.
    """
    stream, n = values["stream"], values["n"]
    if values["stream_options"] is not None and not stream:
        raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
    streaming = read_fields(STREAM_OPTIONS, values["stream_options"] or {}, "stream_options.")
    if n > 1 and values["session"] is not None:
        raise ApiError(400, f"a session has one answer, and n is {n}; leave out n or session", param="n")
    return Options(
        model=values["model"],
        n=n,
        stop=read_stop(values["stop"]),
        stream=stream,
        include_usage=streaming["include_usage"],
        ignore_eos=values["ignore_eos"],
        sampling=read_sampling(values),
        beams=read_beams(values),
        seed=None if values["seed"] is None else values["seed"] % (1 << 64),
        logit_bias=read_logit_bias(values["logit_bias"]),
        frequency_penalty=values["frequency_penalty"],
        presence_penalty=values["presence_penalty"],
        session=values["session"],
    )


def read_sampling(values: Mapping[str, Any]) -> SamplingConfig:
    """The filters."""
    top_k = values["top_k"]
    return SamplingConfig(
        temperature=values["temperature"],
        top_k=top_k if top_k is not None and top_k > 0 else None,
        top_p=values["top_p"],
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
    )


def read_beams(values: Mapping[str, Any]) -> Beams | None:
    """How to search, or None. Raises ApiError for options that a search does not have."""
    if values["num_beams"] == 1:
        return None
    changed = {
        "logit_bias": bool(values["logit_bias"]),
        "top_p": values["top_p"] not in (None, 1.0),
        "top_k": (values["top_k"] or 0) > 0,
        "min_p": bool(values["min_p"]),
        "repetition_penalty": values["repetition_penalty"] != 1.0,
        "frequency_penalty": values["frequency_penalty"] != 0.0,
        "presence_penalty": values["presence_penalty"] != 0.0,
        "best_of": (values.get("best_of") or 1) > 1,
        "tools": bool(values.get("tools")),
        "response_format": (values["response_format"] or {}).get("type", "text") != "text",
        **{name: values[name] is not None for name in ("structured_outputs", "guided_json", "guided_regex")},
        "guided_choice": values["guided_choice"] is not None,
    }
    if values["n"] > values["num_beams"]:
        raise ApiError(400, f"n must be at most num_beams, got {values['n']} and {values['num_beams']}", param="n")
    for name, is_changed in changed.items():
        if is_changed:
            raise ApiError(400, f"{name} does not go with num_beams, which searches; leave one out", param=name)
    return Beams(values["num_beams"], values["length_penalty"])


def read_stop(value: Any) -> tuple[str, ...]:
    """The stop strings; entries that are null are left out, as some clients send them."""
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise wrong_value("stop", "a string or a list of strings", value)
    strings = [string for string in strings if string is not None]
    if len(strings) > MOST_STOPS:
        raise ApiError(400, f"stop must have at most {MOST_STOPS} strings, got {len(strings)}", param="stop")
    for place, string in enumerate(strings):
        if not isinstance(string, str) or not string:
            raise wrong_value(f"stop[{place}]", "a string that is not empty", string)
    return tuple(strings)


def read_logit_bias(value: dict[str, Any] | None) -> dict[int, float]:
    """The bias of each id; the ids are checked against the vocabulary later."""
    bias, number = {}, Number(-100, 100)
    for key, added in (value or {}).items():
        if not key.isdecimal() or len(key) > 12:
            raise ApiError(
                400,
                f"logit_bias must have token ids as keys, got {key[:80]!r}",
                param="logit_bias",
                code="invalid_value",
            )
        bias[int(key)] = number.read(added, f"logit_bias.{key}")
    return bias
