"""`anymamba lm-eval`: lm-eval's own command line, with our models as its model type."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HELP = """\
usage: anymamba lm-eval [run] --model_args pretrained=MODEL[,NAME=VALUE...] --tasks TASK[,TASK...] [OPTIONS]
       anymamba lm-eval ls tasks | validate --tasks TASK

Run tasks of lm-eval (EleutherAI's evaluation harness) on a model: a folder, a .gguf file, or a name on the hub.

All arguments are lm-eval's own. Two defaults differ: --model is anymamba, and with it --batch_size is auto.

  anymamba lm-eval run --help        lm-eval's options
  anymamba lm-eval ls tasks          list of its tasks; --include_path FOLDER adds your own

--model_args of anymamba:
  pretrained       folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub
  tokenizer        a tokenizer.json or a folder that holds one; defaults to the model's own
  dtype            float32 (the default), bfloat16, float16, float64, or auto: as stored
  device           cpu, cuda, cuda:1, xpu, mps; defaults to the first of cuda, xpu, mps and cpu that can be used
  max_length       most tokens that the model reads at once (2048); the model itself has no limit
  max_gen_toks     tokens to generate unless a task says otherwise (256)
  add_bos_token    true or false: begin every text with the beginning-of-text token; defaults to tokenizer.json's rule
  prefix_token_id  stands for an empty context; defaults to the beginning-of-text token, else the end-of-text token
  revision         of a repository on the hub
  weights          float32, bfloat16, int8 or int4: pack the weights for inference, on a CPU or CUDA, in place of dtype
  verify           true (the default) or false: compare the model's files with their digests

It needs lm-eval: pip install "anymamba[lm-eval]"."""


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba lm-eval`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0 if arguments else 2)
    importlib.import_module("anymamba.compat.lm_eval")  # registers the model type, or says what to install
    from lm_eval.__main__ import cli_evaluate

    with command_line(["anymamba lm-eval", *complete(arguments)]):
        cli_evaluate()


@contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Set sys.argv, from which lm-eval takes its arguments, while the body runs."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def complete(arguments: Sequence[str]) -> list[str]:
    """The arguments with our defaults added, where neither the arguments nor their --config file give a value."""
    if arguments[0] in ("ls", "validate"):
        return list(arguments)
    rest = list(arguments[1:] if arguments[0] == "run" else arguments)
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name, short in (("config", "-C"), ("model", "-M"), ("batch_size", "-b")):
        parser.add_argument(f"--{name}", short)
    given = {name: value for name, value in vars(parser.parse_known_args(rest)[0]).items() if value is not None}
    if "config" in given:
        from lm_eval.config.evaluate_config import EvaluatorConfig

        given = {**EvaluatorConfig.load_yaml_config(given["config"]), **given}
    added = [] if "model" in given else ["--model", "anymamba"]
    if given.get("model", "anymamba") == "anymamba" and "batch_size" not in given:
        added += ["--batch_size", "auto"]
    return ["run", *added, *rest]
