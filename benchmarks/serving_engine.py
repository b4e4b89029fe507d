"""The engine under the server: many clients at once, the second turn of a conversation, and tokens while a long prompt
is read. The peer is llama.cpp, with a sequence for each client, driven by its own batches.

    python -m benchmarks.serving_engine [--repeats 3] [--only throughput,turns,gaps,tree,bits]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anymamba.generation.engine import Engine
from anymamba.generation.prefix_tree import PrefixTree
from anymamba.generation.requests import Event, NewToken, Request
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.presets import preset
from benchmarks.timing import interleaved, machine, table

CLIENTS = (1, 8, 32)
PROMPT, ANSWER = 128, 128
TURN, LONG = 12_000, 32_000
WANTED_THROUGHPUT, WANTED_TURN, WANTED_GAP, WANTED_TREE = 1.5, 0.02, 3.0, 0.02
GREEDY = SamplingConfig(temperature=0)


def prompt_of(length: int, seed: int) -> list[int]:
    """Random ids."""
    return np.random.default_rng(seed).integers(0, 50_000, length).tolist()


def finish(engine: Engine) -> None:
    """Run all that was submitted."""
    while engine.step():
        pass


# ------------------------------------------------------------------------------------------------- throughput


def ours(model: InferenceModel, n_clients: int) -> Callable[[], object]:
    """A function that serves so many clients from their prompts to the ends of their answers."""
    engine = Engine(model, max_rows=n_clients)

    def run() -> None:
        n_tokens: list[Event] = []
        for client in range(n_clients):
            request = Request(prompt=prompt_of(PROMPT, client), max_new_tokens=ANSWER, sampling=GREEDY)
            engine.submit(request, n_tokens.append)
        finish(engine)
        assert sum(isinstance(event, NewToken) for event in n_tokens) == n_clients * ANSWER

    return run


class Llama:
    """llama.cpp with some sequences."""

    def __init__(self, path: Path, n_sequences: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_sequences * 2 * (PROMPT + ANSWER)
        params.n_batch = n_sequences * PROMPT
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp did not make a context"
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(n_sequences * PROMPT, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, sequence, whether its logits are wanted); returns the likeliest next tokens."""
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.n_tokens = len(tokens)
        status = self.api.llama_decode(self.context, self.batch)
        assert status == 0, f"llama_decode gave {status}"
        found = [self.api.llama_get_logits_ith(self.context, i) for i, t in enumerate(tokens) if t[3]]
        return [int(np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax()) for logits in found]

    def run(self, n_clients: int) -> None:
        """Serve so many clients."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        prompts = [prompt_of(PROMPT, client) for client in range(n_clients)]
        last = PROMPT - 1
        batch = [(t, i, client, i == last) for client, ids in enumerate(prompts) for i, t in enumerate(ids)]
        ids = self.decode(batch)
        for step in range(ANSWER - 1):
            ids = self.decode([(token, PROMPT + step, client, True) for client, token in enumerate(ids)])


def throughput(model: InferenceModel, repeats: int) -> str:
    """A table with a row for each number of clients."""
    rows, alone = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        model.save_pretrained(path, format="gguf")
        for n_clients in CLIENTS:
            llama = Llama(path, n_clients) if importlib.util.find_spec("llama_cpp") else None
            candidates = {"ours": ours(model, n_clients)}
            if llama is not None:
                candidates["llama"] = partial(llama.run, n_clients)
            rates = {name: n_clients * ANSWER / s for name, s in interleaved(candidates, repeats).items()}
            rate, theirs = rates["ours"], rates.get("llama")
            alone = alone or rate
            rows.append(
                [
                    str(n_clients),
                    f"{rate:,.0f}",
                    "-" if theirs is None else f"{theirs:,.0f}",
                    "-" if theirs is None else f"{rate / theirs:.2f} ({WANTED_THROUGHPUT})",
                    f"{rate / alone:.1f}",
                ]
            )
    return table(["clients", "tokens/s", "llama.cpp", "ratio (wanted)", "against 1 client"], rows)


# ------------------------------------------------------------------------------------------------- turns and gaps


def first_token_seconds(engine: Engine, prompt: list[int], n_new: int = 16) -> tuple[float, list[int]]:
    """Seconds to the first token of an answer, and its tokens."""
    times: list[float] = []
    ids: list[int] = []

    def take(event: Event) -> None:
        if isinstance(event, NewToken):
            times.append(time.perf_counter())
            ids.append(event.id)

    start = time.perf_counter()
    engine.submit(Request(prompt=prompt, max_new_tokens=n_new, sampling=GREEDY), take)
    finish(engine)
    return times[0] - start, ids


def turns(model: InferenceModel, repeats: int) -> str:
    """The first token of a second turn after a long first one, against that of a cold one."""
    cold, warm = [], []
    for repeat in range(repeats):
        engine = Engine(model, prefix_tree=PrefixTree(1 << 30))
        prompt = prompt_of(TURN, repeat)
        seconds, answer = first_token_seconds(engine, prompt)
        cold.append(seconds)
        warm.append(first_token_seconds(engine, prompt + answer + prompt_of(20, 99))[0])
    share = min(warm) / min(cold)
    row = [f"{min(cold):.2f} s", f"{min(warm) * 1e3:.1f} ms", f"{share:.2%} ({WANTED_TURN:.0%})"]
    return table([f"cold, {TURN:,} tokens", "second turn", "share (wanted)"], [row])


def gaps_of(engine: Engine, n_rows: int, long: list[int] | None) -> tuple[list[float], float]:
    """Seconds between tokens of running rows, all the time or while a long prompt is read; and seconds of this."""
    last: dict[int, float] = {}
    gaps: list[float] = []
    done: list[Event] = []

    def sink(row: int) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            now = time.perf_counter()
            if isinstance(event, NewToken):
                if row in last:
                    gaps.append(now - last[row])
                last[row] = now

        return take

    rows = [
        engine.submit(Request(prompt=prompt_of(PROMPT, i), max_new_tokens=10**6, sampling=GREEDY), sink(i))
        for i in range(n_rows)
    ]
    for _ in range(60):
        engine.step()
    gaps.clear()
    start = time.perf_counter()
    if long is not None:
        engine.submit(Request(prompt=long, max_new_tokens=1, sampling=GREEDY), done.append)
    for _ in iter(lambda: bool(done) if long is not None else len(gaps) >= 300 * n_rows, True):
        engine.step()
    seconds = time.perf_counter() - start
    for row in rows:
        engine.cancel(row)
    finish(engine)
    return gaps, seconds


def gaps(model: InferenceModel) -> str:
    """Gaps between tokens while nothing else happens and while a long prompt is read."""
    rows = []
    for n_rows in (1, 8):
        engine = Engine(model)
        idle, _ = gaps_of(engine, n_rows, None)
        busy, seconds = gaps_of(engine, n_rows, prompt_of(LONG, 7))
        p99 = [statistics.quantiles(found, n=100)[98] * 1e3 for found in (idle, busy)]
        rows.append(
            [str(n_rows), *(f"{ms:.1f} ms" for ms in p99), f"{p99[1] / p99[0]:.2f} ({WANTED_GAP})", f"{seconds:.1f} s"]
        )
    return table(["rows", "p99 idle", f"p99 while {LONG:,} tokens are read", "ratio (wanted)", "reading takes"], rows)


def tree_cost(model: InferenceModel, repeats: int) -> str:
    """What the prefix tree costs prompts that match nothing."""
    engines = {"with": Engine(model, prefix_tree=PrefixTree(1 << 28)), "without": Engine(model)}
    seeds: Iterator[int] = iter(range(1000, 10_000))

    def read(engine: Engine) -> Callable[[], object]:
        return lambda: first_token_seconds(engine, prompt_of(4096, next(seeds)), 1)

    found = interleaved({name: read(engine) for name, engine in engines.items()}, repeats)
    share = found["with"] / found["without"] - 1
    row = [*(f"{found[name]:.3f} s" for name in engines), f"{share:+.1%} ({WANTED_TREE:.0%})"]
    return table(["4,096 new tokens with the tree", "without", "cost (wanted)"], [row])


def bits(model: InferenceModel, repeats: int) -> str:
    """What it costs to read a prompt so that a row has the same bits in any batch, as the engine does for all requests.
    A step has them in any case."""
    same = InferenceModel(model.config, model.packed_weights(), other_parameters(model), invariant=True)
    ids = torch.tensor([prompt_of(512, 0)])
    with torch.inference_mode():
        found = interleaved(
            {name: partial(m, ids, num_last_logits=1) for name, m in (("any", model), ("same", same))}, 3 * repeats
        )
    row = [*(f"{1e3 * found[name]:.1f} ms" for name in ("any", "same")), f"{found['same'] / found['any']:.2f}"]
    return table(["512 tokens", "with the same bits in any batch", "ratio"], [row])


def other_parameters(model: InferenceModel) -> dict[str, torch.Tensor]:
    """All parameters that are not packed."""
    packed = model.packed_weights()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in packed}


def run(repeats: int, only: list[str]) -> str:
    """Measure and return the Markdown of the results."""
    torch.manual_seed(0)
    model = InferenceModel.random(preset("mamba-130m"), "int8")
    parts: dict[str, Callable[[], str]] = {
        "throughput": lambda: throughput(model, repeats),
        "turns": lambda: turns(model, repeats),
        "gaps": lambda: gaps(model),
        "tree": lambda: tree_cost(model, 4 * repeats),
        "bits": lambda: bits(model, repeats),
    }
    found = [f"**{name}**\n\n{measure()}" for name, measure in parts.items() if name in only]
    return "\n\n".join([machine(), "A model of 130m parameters in int8 with random weights.", *found])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="throughput,turns,gaps,tree,bits", help="parts, separated by commas")
    arguments = parser.parse_args()
    print(run(arguments.repeats, arguments.only.split(",")))


if __name__ == "__main__":
    main()
