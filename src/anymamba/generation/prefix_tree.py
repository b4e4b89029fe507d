"""States after the beginnings of prompts, found by the longest match of tokens.

A tree of tokens for each owner: an edge has a run of tokens, and a node may hold the state after all tokens on its
path. A prompt finds the deepest node on its path that holds a state. So a hit may end at any token, wherever a state
was kept: at the ends of prompts and answers, where prompts have branched, and every so many tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.generation.requests import KeptState
from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import map_state, state_bytes


class _Node:
    """The end of a run of tokens."""

    def __init__(self, parent: _Node | None, run: Int[np.ndarray, " length"], depth: int) -> None:
        self.parent, self.run, self.depth = parent, run, depth
        self.children: dict[int, _Node] = {}
        self.held: tuple[LanguageModelState, Tensor] | None = None  # the state after `depth` tokens, and its logits


class PrefixTree:
    """Keeps states up to a number of bytes; those used least recently are dropped.

    Args:
        memory: bytes of states to keep.
        every: tokens between two states of a long text; an edit re-reads fewer than that.
        shared: whether owners find each other's states. Then the time of an answer tells what others have asked.
    """

    def __init__(self, memory: int, *, every: int = 512, shared: bool = False) -> None:
        self._memory, self.every, self._shared = memory, every, shared
        self._roots: dict[str, _Node] = {}
        self._used: OrderedDict[_Node, int] = OrderedDict()  # bytes of the nodes with a state, least recent first
        self.nbytes = 0
        """Bytes of the states that are kept."""

    def __len__(self) -> int:
        """Number of states that are kept."""
        return len(self._used)

    def find(self, owner: str, tokens: Sequence[int]) -> tuple[KeptState | None, list[int]]:
        """The state after as many of the tokens as possible, and the lengths after which states should be kept.

        These are the place where the tokens leave the tree, each multiple of `every`, and the end.
        """
        ids = np.array(tokens, np.int64)
        node, n_matched = self._walk(owner, ids)
        while node is not None and (node.held is None or node.depth > n_matched):
            node = node.parent
        n_kept = 0
        kept = None
        if node is not None and node.held is not None:
            self._used.move_to_end(node)
            n_kept = node.depth
            kept = KeptState(tuple(tokens[:n_kept]), *node.held)
        places = {*range(self.every, len(ids), self.every), n_matched, len(ids)}
        return kept, sorted(place for place in places if place > n_kept)

    def keep(self, owner: str, tokens: Sequence[int], model: LanguageModelState, logits: Tensor) -> None:
        """Keep a state.

        Args:
            tokens: all tokens that it has read.
            model: the state, one row. It is copied.
            logits: (1, vocab_size), of the next token.
        """
        size = state_bytes((model, logits))
        if size > self._memory or not len(tokens):
            return
        node = self._node(owner, np.array(tokens, np.int64))
        if node.held is None:
            node.held = map_state(torch.clone, (model, logits))
            self.nbytes += size
            self._used[node] = size
        self._used.move_to_end(node)
        while self.nbytes > self._memory:
            self._drop(next(iter(self._used)))

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
        child = _Node(node, ids[n_matched:], len(ids))
        node.children[int(ids[n_matched])] = child
        return child

    def _drop(self, node: _Node) -> None:
        """Drop the state of a node, and the nodes that are not needed any more."""
        node.held = None
        self.nbytes -= self._used.pop(node)
        while node.held is None and not node.children and node.parent is not None:
            del node.parent.children[int(node.run[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}


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
