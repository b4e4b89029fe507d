"""`anymamba reproduce`: the zero-shot tasks of the paper on a published model, beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import tyro

from anymamba.console.flags import read_flags
from anymamba.console.output import print_json, say

PEERS = {
    "mamba-130m": ("Mamba-130M", "Pythia-160M"),
    "mamba-370m": ("Mamba-370M", "Pythia-410M"),
    "mamba-790m": ("Mamba-790M", "Pythia-1B"),
    "mamba-1.4b": ("Mamba-1.4B", "Pythia-1.4B"),
    "mamba-2.8b": ("Mamba-2.8B", "Pythia-2.8B"),
}
"""The rows of table 3 that stand beside each model."""
NOTE = (
    "Ours have the prompts of lm-eval and the files in the folder. The paper has the test sets of ARC and all of "
    "HellaSwag. Its rows are of the size that was asked for, whatever the model is."
)


@dataclass(frozen=True)
class ReproduceOptions:
    """Evaluate published weights on the zero-shot tasks of table 3 of the paper, beside the paper's numbers.

    It needs the tasks' files, whose names an error says, and lm-eval: pip install "anymamba[lm-eval]".
    """

    name: Annotated[
        Literal["mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b"],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="NAME"),
    ]
    """The size, which chooses the paper's rows."""
    data: Path
    """Folder with the tasks' files."""
    model: str | None = None
    """The weights: a folder, a .gguf file or a name on the hub; defaults to state-spaces/NAME-hf on the hub."""
    documents: int | None = None
    """Documents of each task; defaults to all."""
    out: Path | None = None
    """Folder for the task files (for lm-eval --include_path) and scores.json; defaults to none."""
    device: str = "auto"
    """cpu, cuda, cuda:1, xpu, mps; auto takes the first of cuda, xpu, mps and cpu that can be used here."""
    threads: int | None = None
    """CPU threads; defaults to torch's choice."""
    no_verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load the model without comparing its files with their digests."""
    json: bool = False
    """Print the scores as one JSON object."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba reproduce`."""
    options = read_flags(ReproduceOptions, "reproduce", arguments)
    from anymamba.base.files import write_text
    from anymamba.base.sizes import require_sizes
    from anymamba.console.runtime import set_threads
    from anymamba.lab.zero_shot import TASKS, evaluate, read_documents, table_3, write_tasks
    from anymamba.ops.devices import usable_device

    if options.documents is not None:
        require_sizes(documents=options.documents)
    set_threads(options.threads)
    model = options.model or f"state-spaces/{options.name}-hf"
    documents = read_documents(options.data, tuple(TASKS), options.documents)
    with TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        write_tasks(folder / "tasks", documents)
        say(f"evaluating {model} on {sum(map(len, documents.values())):,} documents")
        device, verify = str(usable_device(options.device)), not options.no_verify
        scores = evaluate(model, folder / "tasks", tuple(TASKS), device, verify)
    counts = {name: len(own) for name, own in documents.items()}
    if options.out is not None:
        write_text(
            options.out / "scores.json", json.dumps({"model": model, "scores": scores, "documents": counts}) + "\n"
        )
        say(f"wrote {options.out / 'scores.json'} and the tasks beside it")
    if options.json:
        print_json({"model": model, "scores": scores, "documents": counts})
    else:
        print(f"{table_3({f'{options.name}, ours': scores}, PEERS[options.name])}\n\n{NOTE}")
