"""`anymamba train --help`, names of flags in other programs, and the completion of shells."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from anymamba.cli.completion import VALUES, WITHOUT_FLAGS, bash, fish, verb_flags
from anymamba.cli.train_help import EXAMPLES, FIRST
from anymamba.console.help import Flag, flags_in
from anymamba.console.synonyms import SYNONYMS
from anymamba.models.presets import PRESETS


@pytest.fixture(scope="module")
def flags() -> dict[str, list[Flag]]:
    return {verb: verb_flags(verb) for verb in SYNONYMS}


def test_the_help_is_short_and_names_every_option_but_those_of_one_layer(run, flags):
    code, text, _ = run("train", "--help")
    assert code == 0 and len(FIRST) == 10
    first, _, rest = text.partition("examples:")
    assert all(f"  {name} " in first for name in FIRST) and all(example in rest for example in EXAMPLES)
    places = [first.index(f"\n  {name} ") for name in FIRST]
    assert places == sorted(places), "in the order of FIRST"
    assert [f.names for f in flags["train"] if f.names[0].count(".") < 2 and not any(n in text for n in f.names)] == []
    assert sum(name in text for name in PRESETS) < 10, "presets are named, not listed in full"
    assert len(text.splitlines()) < 66 and max(map(len, text.splitlines())) <= 100
    assert run("train", "-h")[1] == text


def test_the_full_help_explains_every_option(run, flags):
    text = run("train", "--help-all")[1]
    assert all(name in text for flag in flags["train"] for name in flag.names) and len(flags["train"]) > 100


def test_flags_are_read_from_a_help(flags):
    found = {flag.names: flag for flag in flags["train"]}
    assert found["--steps",].value == "INT" and found["--steps",].help.startswith("Optimizer steps.")
    assert found["--precision",].choices == ["float32", "bfloat16"] and found["--steps",].choices == []
    carry = found["--carry-state", "--no-carry-state"]
    assert (carry.value, carry.group, found["--data.workers",].group) == ("", "", "data")
    short = {flag.names: flag for flag in flags["convert"]}["--shard-bytes",]
    assert short.value == "INT" and short.help.startswith("Weights beyond") and flags_in("nothing") == []


@pytest.mark.parametrize("verb", SYNONYMS)
def test_synonyms_lead_to_flags_that_exist_and_are_none(verb, flags):
    names = {name for flag in flags[verb] for name in flag.names}
    assert set(SYNONYMS[verb].values()) <= names
    assert set(SYNONYMS[verb]) & names == set()


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["train", "--lr", "3e-4"], "--learning-rate"),
        (["train", "--batch_size", "3", "--seq_len=4"], "--context"),
        (["train", "--output-dir", "x"], "--out"),
        (["generate", "--max-tokens", "3"], "--max-new-tokens"),
    ],
)
def test_a_synonym_is_told(refused, words, flag):
    assert f"did you mean {flag}? anymamba {words[0]} --help lists the flags" in refused(2, *words)


# ------------------------------------------------------------------------------------------------- completion

VERB_FLAGS = {
    "train": [
        Flag(("--preset",), "NAME", "Sizes (default: None)", ""),
        Flag(("--precision",), "{float32,bfloat16}", "The model's dtype", ""),
        Flag(("--verify", "--no-verify"), "", "Compare", ""),
    ],
    "completion": [],
}


def completed(*words: str) -> list[str]:
    """What bash offers after these words."""
    array = " ".join(f"'{word}'" for word in words)
    call = f'COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _anymamba; echo "${{COMPREPLY[@]}}"'
    text = f"{bash(VERB_FLAGS, zsh=False)}\n{call}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path, monkeypatch):
    assert completed("anymamba", "tr") == ["train"]
    assert completed("anymamba", "train", "--p") == ["--preset", "--precision"]
    assert completed("anymamba", "train", "--no") == ["--no-verify"]
    assert completed("anymamba", "train", "--precision", "b") == ["bfloat16"]
    assert completed("anymamba", "train", "--preset", "mamba-1") == ["mamba-130m", "mamba-1.4b"]
    assert completed("anymamba", "completion", "z") == ["zsh"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    assert completed("anymamba", "train", "--data", "te") == ["texts"]


def test_fish_and_zsh():
    script = fish(VERB_FLAGS)
    line = "complete -c anymamba -n '__fish_seen_subcommand_from train' -l precision -x -a 'float32 bfloat16' -d "
    assert line in script and "-l no-verify -d Compare" in script and "default" not in script
    assert bash(VERB_FLAGS, zsh=True).startswith("#compdef anymamba\nautoload -U +X bashcompinit")
    assert ("train", "--preset") in VALUES


def test_every_verb_is_in_the_script_that_is_printed(run):
    from anymamba.cli.app import VERBS

    code, out, _ = run("completion", "bash")
    assert code == 0 and all(f"    {verb}) words='--" in out for verb in set(VERBS) - set(WITHOUT_FLAGS))
    assert "'train --log') values='tensorboard wandb mlflow trackio'" in out
