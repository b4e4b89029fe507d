"""Frozen splits: fixed by hashes, kept in a file that notices changes."""

from __future__ import annotations

import json
import random

import pytest

from anymamba.data.dna import reverse_complement
from anymamba.data.dna.labelled import Sequence
from anymamba.evaluation.dna.splits import FrozenSplit, make_split, n_shared


def sequences(n: int, split=None, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)
    return [Sequence(str(i), "".join(draw.choices("ACGT", k=20)), str(i % 2), split) for i in range(n)]


def test_a_split_is_fixed_and_of_the_wanted_size():
    rows = sequences(2000)
    split = make_split(rows)
    assert split == make_split(rows[::-1]) and split != make_split(rows, seed=1)
    parts = split.parts(rows)
    assert abs(len(parts["test"]) - 400) < 80 and abs(len(parts["valid"]) - 200) < 60
    assert sum(map(len, parts.values())) == 2000
    fewer = make_split(rows[:1000])
    assert set(fewer.digests["test"]) <= set(split.digests["test"])  # adding others changes nothing


def test_equal_sequences_and_reverse_complements_stay_together():
    rows = sequences(300)
    rows += [one._replace(text=reverse_complement(one.text).lower()) for one in rows] + rows
    parts = make_split(rows).parts(rows)
    where = [{one.canonical for one in part} for part in parts.values()]
    assert not where[0] & where[1] and not where[0] & where[2] and not where[1] & where[2]
    assert n_shared(parts) == 0


def test_splits_of_the_data_are_kept():
    rows = [*sequences(200, "train"), *sequences(50, "test", 1)]
    rows.append(rows[0]._replace(split="test", text=reverse_complement(rows[0].text)))
    parts = make_split(rows, valid=0.2).parts(rows)
    assert {one.split for one in parts["test"]} == {"test"} and len(parts["test"]) == 51
    assert {one.split for one in parts["valid"]} == {"train"} and 15 < len(parts["valid"]) < 70
    assert n_shared(parts) == (rows[0] in parts["train"])
    given = [*rows, *sequences(30, "valid", 2)]
    assert {one.split for one in make_split(given).parts(given)["valid"]} == {"valid"}


def test_what_was_trained_on_is_found_whatever_its_label_split_and_strand():
    rows = [*sequences(200, "train"), *sequences(50, "test", 1)]
    rows[0] = rows[0]._replace(text="UUGCUUAACG", label="0")
    split = make_split(rows)
    trained = split.parts(rows)["train"]
    assert split.n_trained(rows, ["0", "1"]) == len(trained) < 200
    other = [one._replace(text=reverse_complement(one.text).lower(), label="9", split=None) for one in rows]
    assert split.n_trained(other, ["0", "1"]) == len(trained)
    assert split.n_trained([one._replace(text=one.text.replace("T", "U")) for one in other], ["0", "1"]) == len(trained)
    assert split.n_trained(sequences(100, None, 5), ["0", "1"]) == 0
    bare = [one._replace(split=None) for one in rows]
    fresh = make_split(bare)
    wanted = len(fresh.digests["train"])
    assert fresh.n_trained([one._replace(split="test") for one in bare], ["0", "1"]) == wanted


def test_a_file_is_read_again_and_notices_changes(tmp_path):
    rows, path = sequences(200), tmp_path / "split.json"
    split = make_split(rows)
    split.save(path)
    assert FrozenSplit.load(path) == split
    with pytest.raises(ValueError, match="1 sequences are new or have another label, 1 are missing"):
        split.parts([rows[0]._replace(label="9"), *rows[1:]])
    with pytest.raises(ValueError, match="0 sequences are new or have another label, 1 are missing"):
        split.parts(rows[1:])
    values = json.loads(path.read_text())
    values["sequences"]["test"].append(values["sequences"]["train"].pop())
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has been changed: its digest does not fit"):
        FrozenSplit.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not the file of a split"):
        FrozenSplit.load(path)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (sequences(50), {"valid": 0.6, "test": 0.5}, "with a sum below 1"),
        (sequences(2), {}, "is empty; give more"),
        ([*sequences(50, "train"), *sequences(50, None, 1)], {}, "some sequences have a split and others have none"),
        (sequences(50, "train"), {}, "needs train and test, got train"),
    ],
)
def test_refusals(rows, options, words):
    with pytest.raises(ValueError, match=words):
        make_split(rows, **options)
