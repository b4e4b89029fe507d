"""Generating with guesses from the text so far, against generating without.

The model has the shape of mamba-130m and random weights. What it says is given: its logits are computed and a token is
drawn from them, but then the next token of a given text is taken. So passes, steps and sampling have their real costs,
and the texts are real.

    python -m benchmarks.speculation
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from anymamba.generation.generate import TokenStream
from anymamba.generation.sampling import SamplingConfig
from anymamba.generation.speculation import Speculation
from anymamba.models.inference import InferenceModel
from anymamba.models.presets import preset
from benchmarks.timing import interleaved, machine, table

N_GUESSES = 8
COLORS = ["red", "green", "blue", "black"]
WANTED = {"a file edited": 1.8, "a table copied": 1.8, "prose": 0.97}
"""Tokens per second over those without speculation, at least."""


class Told(TokenStream):
    """A stream that says a given text."""

    def __init__(self, *args, told: Iterable[int], **options) -> None:
        super().__init__(*args, **options)
        self._told = iter(told)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        _, log_probabilities = super()._choose(logits)
        return torch.tensor([next(self._told)]), log_probabilities


def texts() -> dict[str, tuple[str, str]]:
    """A prompt and what is said after it, by name."""
    file = Path(textwrap.__file__).read_text(encoding="utf-8")
    edited = file.replace("width", "columns").replace("self.fix_sentence_endings", "self.two_spaces")
    rows = [f"{i:03d}, {(i * 7919) % 1000:03d}, {COLORS[i * i % 4]}, {i % 7}\n" for i in range(120)]
    prose = "\n".join(pydoc_data.topics.topics[name] for name in ("with", "import", "numbers"))
    return {
        "a file edited": (file, edited),
        "a table copied": ("".join(rows), "".join(rows)),
        "prose": (prose[:1500], prose[1500:]),
    }


def ids_of(text: str, known: dict[str, int]) -> list[int]:
    """Words and other characters as ids; new ones are added."""
    return [known.setdefault(piece, len(known) + 1) for piece in re.findall(r" ?\w+|\s+|.", text)]


def run(weights: list[str], n_tokens: int, repeats: int) -> str:
    """Measure and return the Markdown of the results."""
    rows = []
    for name in weights:
        torch.manual_seed(0)
        model = InferenceModel.random(preset("mamba-130m"), name)
        known: dict[str, int] = {}
        for title, (before, after) in texts().items():
            prompt, told = ids_of(before, known)[:300], ids_of(after, known)
            rows.append([name, title, *compare(model, prompt, told[:n_tokens], repeats, WANTED[title])])
    header = ["weights", "text", "tokens/s without", "tokens/s with", "ratio (wanted)", "right of guessed", "passes"]
    return table(header, rows) + f"\n\nAt most {N_GUESSES} tokens are guessed at once, and {n_tokens} generated.\n"


def compare(model: InferenceModel, prompt: list[int], told: list[int], repeats: int, wanted: float) -> list[str]:
    """The columns of a text. The prompt is read before the time starts."""
    options = {"max_new_tokens": len(told), "sampling": SamplingConfig(temperature=0.8, top_p=0.95)}

    def opened(speculation: Speculation | None) -> Told:
        return Told(model, [prompt], told=told, speculation=speculation, **options)

    waiting = {name: [opened(s) for _ in range(repeats + 1)] for name, s in CANDIDATES.items()}
    last = waiting["with"][0]
    found = interleaved({name: lambda name=name: list(waiting[name].pop()) for name in CANDIDATES}, repeats)
    rates = {name: len(told) / seconds for name, seconds in found.items()}
    report, ratio = last.speculation, rates["with"] / rates["without"]
    assert report is not None
    return [
        f"{rates['without']:.1f}",
        f"{rates['with']:.1f}",
        f"**{ratio:.2f}** ({wanted})",
        f"{report.n_right} of {report.n_guessed}",
        str(report.n_passes),
    ]


CANDIDATES = {"without": None, "with": Speculation(N_GUESSES)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    print(machine(), "\n")
    print(run(arguments.weights, arguments.tokens, arguments.repeats))
