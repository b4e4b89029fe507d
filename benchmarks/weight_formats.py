"""What packed weights cost in quality: bits per byte on held-out text in every format, for two models trained here.

Both read Python's standard library as bytes, as `anymamba demo` does; the held-out files are the same in all rows.

    python -m benchmarks.weight_formats [--minutes 3 10] [--folder runs/weight-formats]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from anymamba.data.stdlib_corpus import is_held_out, standard_library_files
from anymamba.data.table import TokenTable, build_token_table
from anymamba.data.tokenizer import load_tokenizer
from anymamba.evaluation.inference_speed import weight_bytes
from anymamba.evaluation.perplexity import evaluate
from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import format_table
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig
from anymamba.training.trainer import train
from benchmarks.timing import machine, table

MODELS = {
    "demo": ModelConfig(d_model=256, n_layers=3, vocab_size=257),
    "ten-million": ModelConfig(d_model=512, n_layers=6, vocab_size=257),
}
FORMATS = ("float32", "bfloat16", "int8", "q6_k", "int4", "q4_k")
LIMITS = {"int8": 0.1, "int4": 3.0}
"""Largest loss in percent of float32's bits per byte."""
ALONE = {
    "in_proj": "q4_0",
    "out_proj": "q4_0",
    "x_proj": "q8_0",
    "dt_proj": "bfloat16",
    "embedding": "q6_k",
}
"""The tensors that are packed alone, to see which of them cost what, and their formats with int4."""
EVALUATED_BYTES = 60_000


def trained(name: str, minutes: float, folder: Path) -> LanguageModel:
    """The model of that name; it is trained for so long if its folder is not there."""
    run = folder / name
    if not run.exists():
        files = [str(file) for file in standard_library_files() if not is_held_out(file)]
        rate = OptimizerConfig(learning_rate=3e-3, min_learning_rate=2e-4, warmup_steps=50)
        config = TrainConfig(
            data=DataConfig(paths=tuple(files), held_out_fraction=0, piece=1024),
            model=MODELS[name],
            optimizer=rate,
            steps=1_000_000,
            max_minutes=minutes,
            batch_size=16,
            context=64,
            precision="bfloat16",
            log=(),
            eval_tokens=0,
            sample_tokens=0,
            keep_best=False,
            checkpoint_every=1_000_000,
        )
        train(config, run)
    return LanguageModel.from_pretrained(run).eval()


def held_out() -> TokenTable:
    """The first held-out files of the standard library."""
    files, size = [], 0
    for file in filter(is_held_out, standard_library_files()):
        if size < EVALUATED_BYTES and file.stat().st_size < EVALUATED_BYTES // 4:
            files.append(str(file))
            size += file.stat().st_size
    with tempfile.TemporaryDirectory() as cache:
        return build_token_table(files, load_tokenizer(None), cache_dir=cache)


def section(name: str, model: LanguageModel, text: TokenTable) -> str:
    """The tables of one model."""
    eos = load_tokenizer(None).eos_id

    def bits(packed: InferenceModel) -> float:
        found = evaluate(packed, text, eos).bits_per_byte
        assert found is not None
        return found

    base, rows = bits(InferenceModel.of(model)), []
    for weights in FORMATS:
        packed = InferenceModel.of(model, format_table(model.config, weights))
        found = bits(packed)
        loss = 100 * (found / base - 1)
        limit = LIMITS.get(weights)
        verdict = "" if limit is None else f" (at most {limit} %{'' if loss <= limit else ', **missed**'})"
        rows.append([weights, f"{weight_bytes(packed) / 1e6:.2f}", f"{found:.4f}", f"{loss:+.3f} %{verdict}"])
    alone = []
    for part, format in ALONE.items():
        formats = {key: format if part in key else "float32" for key in format_table(model.config, "float32")}
        found = bits(InferenceModel.of(model, formats))
        alone.append([part, format, f"{100 * (found / base - 1):+.3f} %"])
    head = f"### {name}: {model.n_parameters():,} parameters\n\n"
    first = table(["weights", "MB", "bits per byte", "against float32"], rows)
    return f"{head}{first}\n\nOne kind of tensor packed alone:\n\n{table(['tensor', 'format', 'loss'], alone)}\n"


def run(minutes: list[float], folder: Path) -> str:
    """Train, measure and return the Markdown of the results."""
    text = held_out()
    models = zip(MODELS, minutes, strict=True)
    sections = [section(name, trained(name, time, folder), text) for name, time in models]
    return f"{text.n_bytes:,} bytes of {text.n_documents} held-out files.\n\n" + "\n".join(sections)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, nargs=2, default=[3.0, 10.0], help="of training, for each model")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are kept, and found again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{machine()}\n\n{run(options.minutes, options.folder or Path(temporary))}")
