"""The prefix tree: the longest match of tokens is found, within a budget, apart for each owner."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hash_model import HashModel, HashState
from test_engine import Client, alone, finish

from anymamba.generation.engine import Engine
from anymamba.generation.prefix_tree import PrefixTree
from anymamba.generation.sampling import SamplingConfig
from anymamba.generation.state_folder import StateFolder
from anymamba.parts.state import state_bytes

GREEDY = SamplingConfig(temperature=0)
SIZE = 8 + 4  # bytes of a state and its logits below


def keep(tree: PrefixTree, tokens: list[int], owner: str = "") -> None:
    tree.keep(owner, tokens, HashState((torch.full((1, 1), len(tokens)),)), torch.full((1, 1), float(len(tokens))))


def found(tree: PrefixTree, tokens: list[int], owner: str = "") -> tuple[int, ...]:
    kept, _ = tree.find(owner, tokens)
    if kept is None:
        return ()
    assert kept.model.layers[0].item() == kept.logits.item() == len(kept.tokens)
    return kept.tokens


def test_the_longest_match_is_found_at_any_token():
    """Against a search over all that was kept, with random texts that share beginnings."""
    rng = np.random.default_rng(0)
    tree, kept = PrefixTree(1 << 20), set()
    for _ in range(300):
        tokens = tuple(rng.integers(0, 2, rng.integers(1, 12)).tolist())
        fits = [other for other in kept if tokens[: len(other)] == other]
        assert found(tree, tokens) == max(fits, key=len, default=())
        if rng.random() < 0.5:
            keep(tree, tokens)
            kept.add(tokens)
    assert len(tree) == len(kept) and tree.nbytes == SIZE * len(kept)


def test_the_least_recently_used_are_dropped():
    rng = np.random.default_rng(1)
    tree, order = PrefixTree(10 * SIZE), []
    for _ in range(400):
        tokens = tuple(rng.integers(0, 3, rng.integers(1, 7)).tolist())
        fits = [other for other in order if tokens[: len(other)] == other]
        best = max(fits, key=len, default=())
        assert found(tree, tokens) == best
        if best:
            order.remove(best)
            order.append(best)
        keep(tree, tokens)
        order = [*(other for other in order if other != tokens), tokens][-10:]
        assert len(tree) == len(order) and tree.nbytes <= 10 * SIZE


def test_owners_do_not_find_each_others_states_unless_they_share():
    for shared in (False, True):
        tree = PrefixTree(1 << 20, shared=shared)
        keep(tree, [1, 2, 3], "a")
        assert found(tree, [1, 2, 3, 4], "a") == (1, 2, 3)
        assert found(tree, [1, 2, 3, 4], "b") == ((1, 2, 3) if shared else ())


def test_states_are_to_be_kept_at_branches_and_every_so_many_tokens():
    tree = PrefixTree(1 << 20, every=4)
    assert tree.find("", list(range(10))) == (None, [4, 8, 10])
    keep(tree, list(range(10)))
    kept, places = tree.find("", [0, 1, 2, 3, 4, 99, 98, 97, 96])
    assert kept is None and places == [4, 5, 8, 9]
    keep(tree, [0, 1, 2, 3, 4])
    kept, places = tree.find("", [0, 1, 2, 3, 4, 99, 98])
    assert len(kept.tokens) == 5 and places == [7]


def test_a_tree_forgets_everything_it_drops():
    tree = PrefixTree(2 * SIZE)
    for i in range(50):
        keep(tree, [i, 1, 2], owner=str(i))
    assert len(tree) == 2 and len(tree._roots) == 2
    with pytest.raises(ValueError, match="every"):
        PrefixTree(10, every=0)


# ------------------------------------------------------------------------------------------- with an engine


def answer(engine: Engine, prompt: list[int], **options) -> Client:
    client = Client(engine, prompt=prompt, max_new_tokens=12, sampling=GREEDY, **options)
    finish(engine)
    assert client.ids[0] == alone(engine._model, prompt, max_new_tokens=12, sampling=GREEDY)
    return client


def test_only_new_tokens_are_read():
    model = HashModel()
    engine = Engine(model, prefix_tree=PrefixTree(1 << 20, every=16))
    prompt = np.random.default_rng(0).integers(0, 13, 100).tolist()
    first = answer(engine, prompt)
    assert first.read.n_cached == 0
    turn = [*prompt, *first.ids[0]]
    assert answer(engine, [*turn, 1, 2, 3]).read.n_cached == len(turn) - 1  # the last token was never read
    assert answer(engine, prompt).read.n_cached == 100  # the whole prompt: nothing is read
    assert answer(engine, [*prompt[:50], 7, *prompt[51:]]).read.n_cached == 48  # an edit: less than 16 are read again
    assert answer(engine, [*prompt[:50], 8, *prompt[51:]]).read.n_cached == 50  # the branch itself was kept
    assert answer(engine, [*prompt[:50], 8, *prompt[51:]], owner="b").read.n_cached == 0


def test_long_answers_are_kept_on_the_way():
    model = HashModel()
    engine = Engine(model, prefix_tree=PrefixTree(1 << 20, every=16))
    client = Client(engine, prompt=[1, 2], max_new_tokens=60, sampling=GREEDY)
    finish(engine)
    other = [1, 2, *client.ids[0][:40], 5, 6]
    other[-2] = (client.ids[0][40] + 1) % 13
    assert answer(engine, other).read.n_cached == 32


def test_scores_of_a_prompt_use_the_tree():
    model = HashModel(padding=1.0)
    engine = Engine(model, prefix_tree=PrefixTree(1 << 20, every=16))
    prompt = np.random.default_rng(0).integers(0, 13, 100).tolist()
    plain = Client(engine, prompt=prompt, max_new_tokens=0)
    options = {"max_new_tokens": 1, "sampling": GREEDY}
    first = Client(engine, prompt=[*prompt, 1], prompt_log_probabilities=2, **options)
    finish(engine)
    second = Client(engine, prompt=[*prompt, 2], prompt_log_probabilities=1, **options)
    third = Client(engine, prompt=[*prompt, 3], prompt_log_probabilities=3, **options)
    finish(engine)
    assert plain.read.n_cached == first.read.n_cached == third.read.n_cached == 0  # scores were not known, or too few
    assert second.read.n_cached >= 96
    for client, ids in ((first, [*prompt, 1]), (second, [*prompt, 2]), (third, [*prompt, 3])):
        assert [score.token for score in client.read.scores] == ids[1:]
        for i in (0, 50, 98, 99):
            wanted = model.next_log_probabilities(ids[: i + 1], with_padding=True)
            assert client.read.scores[i].log_probability == pytest.approx(wanted[ids[i + 1]].item(), abs=1e-5)
            assert len(client.read.scores[i].top) == {1: 2, 2: 1, 3: 3}[ids[-1]]


# ------------------------------------------------------------------------------------------- a folder


def test_states_that_memory_has_no_room_for_go_to_a_folder(mamba, tmp_path):
    (tmp_path / "prefix-state-7").write_text("of an earlier process")
    size = state_bytes((mamba.init_state(1), torch.zeros(1, 37)))
    tree = PrefixTree(3 * size, every=8, folder=StateFolder(tmp_path, mamba, 4 * size))
    engine = Engine(mamba, prefix_tree=tree)
    prompt = np.random.default_rng(0).integers(0, 37, 50).tolist()
    answer(engine, prompt)
    assert tree.nbytes == 3 * size and tree.stored_nbytes == 4 * size
    tree._folder.flush()
    assert len(list(tmp_path.iterdir())) == 4
    assert answer(engine, [*prompt[:35], (prompt[35] + 1) % 37]).read.n_cached == 32  # from the folder
    assert tree.nbytes <= 3 * size and tree.stored_nbytes <= 4 * size
    tree._folder.flush()
    assert len(list(tmp_path.iterdir())) == tree.stored_nbytes // size


def test_a_folder_that_fails_only_costs_reading_again(mamba, tmp_path):
    size = state_bytes((mamba.init_state(1), torch.zeros(1, 37)))
    tree = PrefixTree(2 * size, every=8, folder=StateFolder(tmp_path / "states", mamba, 100 * size))
    engine = Engine(mamba, prefix_tree=tree)
    prompt = np.random.default_rng(0).integers(0, 37, 50).tolist()
    answer(engine, prompt)
    tree._folder.flush()
    for path in (tmp_path / "states").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert answer(engine, [*prompt[:20], (prompt[20] + 1) % 37]).read.n_cached == 0
    tree._folder.flush()
    shutil.rmtree(tmp_path / "states")
    (tmp_path / "states").write_text("no folder any more")
    assert answer(engine, prompt[::-1]).read.n_cached == 0
    assert tree.nbytes <= 2 * size
