"""States after the beginnings of prompts, found by the longest match of tokens.

A tree of tokens for each owner: an edge has a run of tokens, and a node may hold the state after all tokens on its
path. A prompt finds the deepest node on its path that holds a state. So a hit may end at any token, wherever a state
was kept: at the ends of prompts and answers, where prompts have branched, and every so many tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.generation.requests import KeptState, PromptScores
from anymamba.generation.state_folder import StateFolder
from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import map_state, state_bytes


class Held(NamedTuple):
    """What is kept after some tokens."""

    model: LanguageModelState
    logits: Tensor
    scores: PromptScores | None

    def has_scores(self, n_top: int | None) -> bool:
        """Whether it has as many scores as are wanted."""
        return n_top is None or (self.scores is not None and self.scores.n_top >= n_top)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return state_bytes((self.model, self.logits)) + (0 if self.scores is None else self.scores.nbytes)


class _Node:
    """The end of a run of tokens."""

    def __init__(self, parent: _Node | None, run: Int[np.ndarray, " length"], depth: int) -> None:
        self.parent, self.run, self.depth = parent, run, depth
        self.children: dict[int, _Node] = {}
        self.held: Held | None = None  # after `depth` tokens, in memory
        self.key: str | None = None  # of the same in a folder


class PrefixTree:
    """Keeps states up to a number of bytes. Those used least recently go to a folder, if there is one, or are dropped.

    Args:
        memory: bytes of states to keep in memory.
        every: tokens between two states of a long text; an edit re-reads fewer than that.
        shared: whether owners find each other's states. Then the time of an answer tells what others have asked.
        folder: takes the states that memory has no room for.
    """

    def __init__(
        self, memory: int, *, every: int = 512, shared: bool = False, folder: StateFolder | None = None
    ) -> None:
        require_sizes(every=every)
        self._memory, self.every, self._shared, self._folder = memory, every, shared, folder
        self._roots: dict[str, _Node] = {}
        self._used: OrderedDict[_Node, int] = OrderedDict()  # bytes of the nodes in memory, least recent first
        self._stored: OrderedDict[_Node, int] = OrderedDict()  # the same for those in the folder
        self.nbytes = 0
        """Bytes of the states in memory."""
        self.stored_nbytes = 0
        """Bytes of the states in the folder."""

    def __len__(self) -> int:
        """Number of states that are kept."""
        return len(self._used) + len(self._stored)

    def find(self, owner: str, tokens: Sequence[int], n_top: int | None = None) -> tuple[KeptState | None, list[int]]:
        """The state after as many of the tokens as possible, and the lengths after which states should be kept.

        These are the place where the tokens leave the tree, each multiple of `every`, and the end.

        Args:
            n_top: find only states with the scores of their tokens and so many of the likeliest ones; None: any.
        """
        ids = np.array(tokens, np.int32)
        node, n_matched = self._walk(owner, ids)
        held = None
        while node is not None and held is None:
            held = self._held(node, n_top) if node.depth <= n_matched else None
            node = node if held is not None else node.parent
        kept, n_kept = None, 0
        if node is not None and held is not None:
            n_kept = node.depth
            kept = KeptState(tuple(tokens[:n_kept]), *held)
        places = {*range(self.every, len(ids), self.every), n_matched, len(ids)}
        return kept, sorted(place for place in places if place > n_kept)

    def keep(
        self,
        owner: str,
        tokens: Sequence[int],
        model: LanguageModelState,
        logits: Tensor,
        scores: PromptScores | None = None,
    ) -> None:
        """Keep a state.

        Args:
            tokens: all tokens that it has read.
            model: the state, one row, which must not be written to any more. It is copied if it is not in the CPU's
                memory, or is a part of larger tensors.
            logits: (1, vocab_size), of the next token; they are treated as the state is.
            scores: of the tokens after the first, if they are known.
        """
        if not len(tokens) or state_bytes((model, logits)) > self._memory:
            return
        node = self._node(owner, np.array(tokens, np.int32))
        if node.held is None:
            self._forget_stored(node)
            self._put(node, Held(*map_state(_own, (model, logits)), scores))
        elif scores is not None and not node.held.has_scores(scores.n_top):
            self._put(node, node.held._replace(scores=scores))
        self._used.move_to_end(node)
        self._make_room()

    def _held(self, node: _Node, n_top: int | None) -> Held | None:
        """What a node keeps, if it has the scores; it counts as used, and comes back from the folder."""
        if node.held is not None:
            if not node.held.has_scores(n_top):
                return None
            self._used.move_to_end(node)
            return node.held
        if node.key is None or n_top is not None:
            return None
        assert self._folder is not None
        found = self._folder.load(node.key)
        self._forget_stored(node)
        if found is None:
            return None
        held = Held(*found, None)
        self._put(node, held)
        self._make_room()
        return held

    def _put(self, node: _Node, held: Held) -> None:
        self.nbytes += held.nbytes - self._used.pop(node, 0)
        node.held, self._used[node] = held, held.nbytes

    def _make_room(self) -> None:
        """Move or drop the states used least recently until the budgets are kept."""
        while self.nbytes > self._memory:
            node, size = self._used.popitem(last=False)
            self.nbytes -= size
            held, node.held = node.held, None
            if self._folder is not None and held is not None:
                node.key = self._folder.save(held.model, held.logits)
                self._stored[node] = size
                self.stored_nbytes += size
            self._prune(node)
        while self._folder is not None and self.stored_nbytes > self._folder.most_bytes:
            node = next(iter(self._stored))
            self._forget_stored(node)
            self._prune(node)

    def _forget_stored(self, node: _Node) -> None:
        if node.key is not None:
            assert self._folder is not None
            self._folder.delete(node.key)
            self.stored_nbytes -= self._stored.pop(node)
            node.key = None

    def _walk(self, owner: str, ids: Int[np.ndarray, " length"]) -> tuple[_Node | None, int]:
        """The last node whose run begins to match, and how many tokens match."""
        node = self._roots.get("" if self._shared else owner)
        while node is not None:
            child = node.children.get(int(ids[node.depth])) if node.depth < len(ids) else None
            if child is None:
                return node, node.depth
            n_same = _n_same(child.run, ids[node.depth :])
            if n_same < len(child.run):
                return child, node.depth + n_same
            node = child
        return None, 0

    def _node(self, owner: str, ids: Int[np.ndarray, " length"]) -> _Node:
        """The node at the end of these tokens; it is made if there is none."""
        root = self._roots.setdefault("" if self._shared else owner, _Node(None, ids[:0], 0))
        node, n_matched = self._walk(owner, ids)
        node = node or root
        if n_matched < node.depth:
            node = _split(node, n_matched)
        if n_matched == len(ids):
            return node
        child = _Node(node, ids[n_matched:].copy(), len(ids))
        node.children[int(ids[n_matched])] = child
        return child

    def _prune(self, node: _Node) -> None:
        """Remove nodes that keep nothing and lead to nothing, from this one up."""
        while node.held is None and node.key is None and not node.children and node.parent is not None:
            del node.parent.children[int(node.run[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}


def _own(tensor: Tensor) -> Tensor:
    """A tensor in the CPU's memory that keeps no other one alive."""
    is_whole = tensor.is_cpu and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_whole else tensor.to("cpu", copy=True)


def _n_same(a: Int[np.ndarray, " m"], b: Int[np.ndarray, " n"]) -> int:
    """How many tokens two runs begin with in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _split(node: _Node, depth: int) -> _Node:
    """Put a node into the run that ends at this one."""
    assert node.parent is not None
    cut = depth - node.parent.depth
    middle = _Node(node.parent, node.run[:cut], depth)
    node.parent.children[int(node.run[0])] = middle
    node.parent, node.run = middle, node.run[cut:]
    middle.children[int(node.run[0])] = node
    return middle
