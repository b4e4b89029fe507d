"""Masked language modelling: some tokens of a batch are hidden, and the model predicts them from both sides.

Of the tokens, 15 % are labels: 80 % of those become the mask token, 10 % a random token, and 10 % stay. Special tokens
and unknown bases of DNA are never labels.

Source: BERT (arXiv:1810.04805), section 3.1; for DNA Caduceus (arXiv:2403.03234).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.data.batches import Batch
from anymamba.data.dna.tokenizer import MASK_ID, DnaTokenizer
from anymamba.data.tokenizer import Tokenizer

LABELLED, HIDDEN, CHANGED = 0.15, 0.8, 0.1
"""The share of tokens that are labels, and the shares of these that become the mask token and a random one."""
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")


class Masking(NamedTuple):
    """How the tokens of a run are hidden."""

    mask_id: int
    ordinary: Int[Tensor, " n_ordinary"]
    """The ids that may be labels, and from which random tokens are drawn."""
    seed: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, seed: int) -> Masking:
        """For a tokenizer. Raises ValueError if it has no mask token."""
        if isinstance(tokenizer, DnaTokenizer):
            return cls(MASK_ID, torch.tensor(sorted(set(tokenizer.encode("ACGTacgt")))), seed)
        found = (tokenizer.encode(name) for name in MASK_NAMES)
        mask_id = next((ids[0] for ids in found if len(ids) == 1), None)
        if mask_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name} has no mask token, which the objective mlm needs: one of "
                f"{', '.join(MASK_NAMES)}; add it to the tokenizer.json (--tokenizer), or train on a genome"
            )
        others = [i for i in range(tokenizer.vocab_size) if i not in (mask_id, tokenizer.eos_id)]
        return cls(mask_id, torch.tensor(others), seed)

    def apply(self, batch: Batch, *number: int, rows: tuple[int, int] = (0, 1)) -> Batch:
        """The batch with hidden tokens; its labels are the tokens at these places, and -100 elsewhere.

        The same seed and number hide the same tokens, so a resumed run goes on as it would have.

        Args:
            number: identifies the batch in the run.
            rows: (i, n) for a batch that is the i-th of n parts of a larger one; all parts together then hide what the
                larger one would.
        """
        ids = batch.input_ids
        words = np.random.SeedSequence([self.seed, *number]).generate_state(2)
        draw = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        part, n_parts = rows
        whole = (n_parts * ids.shape[0], ids.shape[1])
        own = slice(part * ids.shape[0], (part + 1) * ids.shape[0])
        chance = torch.rand(whole, generator=draw)[own]
        kind = torch.rand(whole, generator=draw)[own]
        other = self.ordinary[torch.randint(len(self.ordinary), whole, generator=draw)[own]].to(ids.dtype)
        chosen = torch.isin(ids, self.ordinary) & (chance < LABELLED)
        hidden = torch.where(chosen & (kind < HIDDEN), self.mask_id, ids)
        hidden = torch.where(chosen & (kind >= HIDDEN) & (kind < HIDDEN + CHANGED), other, hidden)
        return batch._replace(input_ids=hidden, labels=torch.where(chosen, ids, -100))
