"""Our language models as the model type `anymamba` of lm-eval (EleutherAI's evaluation harness).

Importing this registers it: `simple_evaluate(model="anymamba", model_args={"pretrained": "runs/x"}, ...)`. Scores are
those of the type `hf` with the same weights, and do not depend on the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anymamba.compat.lm_eval.loading import ids_before_texts, load_model, special_id
from anymamba.compat.lm_eval.scoring import PASS_TOKENS, Row, batches, score
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.checkpoints import find_tokenizer
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.models.weight_formats import Weights
from anymamba.parts.state import state_bytes

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'lm-eval is needed here ({error}); pip install "anymamba[lm-eval]"') from error

STATE_BYTES = 1 << 28
"""Approximate bytes of all states held at once, when the batch size is "auto"."""
GENERATED_ROWS = 64
"""Most prompts that are continued at once, when the batch size is "auto"."""
HARNESS_DEVICE = "cuda:0"
"""The default device of lm-eval's command line, even on machines without a GPU."""
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Generation options that are passed on unchanged."""

eval_logger = logging.getLogger("lm_eval.models.anymamba")  # a child of lm-eval's logger, with its handler and level

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""One request: the texts (None for a window of a longer text), the ids of the context and of the continuation."""


@register_model("anymamba")
class AnymambaLM(TemplateLM):
    """The lm-eval model that runs a `LanguageModel`.

    Args:
        pretrained: a model folder, a .gguf file, a name on the Hugging Face hub, or a LanguageModel, which is used as
            it is, on its device.
        tokenizer: a tokenizer.json, a folder that holds one, or a Tokenizer; defaults to the model's own.
        dtype: dtype of the weights: "float32", "bfloat16", "float16", "float64", or "auto" for the dtype of the file;
            defaults to float32.
        device: cpu, cuda, cuda:1, xpu, mps; defaults to the first of cuda, xpu, mps and cpu that can be used.
        batch_size: most requests in one pass; "auto" runs as many as fit. Results do not depend on it.
        max_batch_size: upper bound of "auto".
        max_length: most tokens that the model reads at once, as in `hf`: longer contexts lose their beginning, longer
            texts are cut into windows. The model itself has no such limit.
        max_gen_toks: tokens to generate by default; a task may give its own number.
        add_bos_token: whether every text begins with the beginning-of-text id; defaults to what tokenizer.json does.
        prefix_token_id: the id used for an empty context; defaults to the beginning-of-text id, else the end-of-text
            id.
        revision: revision of a repository on the hub.
        weights: pack the model for inference, in "float32", "bfloat16", "int8" or "int4", on a CPU or CUDA; in place of
            dtype.
        verify: compare the files with the digests or checksums that they have, as `from_pretrained` does.
    Raises ValueError for options out of range, FileNotFoundError and CheckpointError as `from_pretrained` does.
    """

    def __init__(
        self,
        pretrained: str | Path | LanguageModel,
        tokenizer: str | Path | Tokenizer | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        revision: str | None = None,
        weights: Weights | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size if batch_size == "auto" else _at_least_one("batch_size", batch_size)
        self.max_batch_size = None if max_batch_size is None else _at_least_one("max_batch_size", max_batch_size)
        self.max_length = _at_least_one("max_length", max_length)
        self.max_gen_toks = _at_least_one("max_gen_toks", max_gen_toks)
        self.model = load_model(pretrained, dtype, device, revision, weights, verify).eval()
        self.model.require_causal("cannot score texts")
        self._device = self.model.embedding.weight.device
        name = None if isinstance(pretrained, LanguageModel) else pretrained
        vocab_size = self.model.config.vocab_size
        self.tokenizer: Any = find_tokenizer(name, tokenizer, vocab_size=vocab_size, revision=revision)
        self._eos_id = special_id(self.tokenizer, "eos_token", self.tokenizer.eos_id)
        bos_id = special_id(self.tokenizer, "bos_token", self._eos_id)
        self._prefix_id = bos_id if prefix_token_id is None else prefix_token_id
        if add_bos_token is None:
            self._before_texts = ids_before_texts(self.tokenizer)
        else:
            self._before_texts = [_required(bos_id, self.tokenizer)] if add_bos_token else []

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> AnymambaLM:
        """Create it from `--model_args` and lm-eval's batch_size, max_batch_size and device; the former override."""
        added = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if added.get("device") == HARNESS_DEVICE and not torch.cuda.is_available():
            del added["device"]
        return cls(**{**added, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> AnymambaLM:
        """The same from `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text. Raises ValueError if the tokenizer has none."""
        return _required(self._eos_id, self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """The id used for an empty context. Raises ValueError if there is none."""
        return _required(self._prefix_id, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """A name of the mapping from text to ids, for caches."""
        return f"{self.tokenizer.name}-{self.tokenizer.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of a text. Ids that texts begin with are put first, unless they are there or False is given."""
        ids = self.tokenizer.encode(string)
        before = [] if add_special_tokens is False else self._before_texts
        return ids if ids[: len(before)] == before else before + ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Raises ValueError: there are no templates, and lm-eval calls this only to apply one."""
        raise ValueError("the model type anymamba has no chat templates; leave --apply_chat_template out")

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model that lm-eval writes next to the results."""
        model, dtype = self.model, str(self.model.embedding.weight.dtype)
        if isinstance(model, InferenceModel):
            dtype = ", ".join(sorted(set(model.weight_formats.values())))
        return {"model_num_parameters": model.n_parameters(), "model_dtype": dtype}

    # --------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts in nats, in windows of max_length tokens; each token is predicted once."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_probability, _) in zip(owners, answers, strict=True):
            totals[number] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each request, the continuation's log-probability in nats, and whether greedy decoding gives it."""
        rows = [self._cut(number, *request) for number, request in enumerate(requests)]
        n_cut = sum(len(row.context) < len(request[1]) for row, request in zip(rows, requests, strict=True))
        if n_cut:
            eval_logger.warning(
                f"{n_cut} of {len(rows)} contexts lose their beginning: with the continuation they exceed max_length="
                f"{self.max_length}; the model has no such limit, raise it with --model_args max_length=N"
            )
        answers: list[tuple[float, bool]] = []
        with tqdm(total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in batches(rows, self._most_rows):
                for answer in score(self.model, batch):
                    texts = requests[len(answers)][0]
                    answers.append(answer)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(batch))
        return answers

    def _cut(self, number: int, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Row:
        """A request cut on the left, so that the model reads at most max_length tokens."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"continuation {'' if texts is None else repr(texts[1][:40])} of request {number} must have 1 to "
                f"max_length={self.max_length} tokens, got {len(continuation)}; raise it with --model_args max_length=N"
            )
        return Row(context[-(self.max_length + 1 - len(continuation)) :], continuation)

    @property
    def _most_rows(self) -> int:
        """Most rows in one pass."""
        if self.batch_size != "auto":
            return int(self.batch_size)
        fit = max(1, STATE_BYTES // max(1, state_bytes(self.model.init_state(1))))
        return min(fit, self.max_batch_size or fit)

    # --------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end-of-text id or max_gen_toks tokens.

        Decoding is greedy unless the temperature is above 0. Then the tokens of a request depend on torch's seed
        (`--seed`) and on the request's number, not on its batch. Raises ValueError for unknown generation options.
        """
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        order = Collator(
            [(number, request.args[1]) for number, request in enumerate(requests)],
            sort_fn=lambda item: -len(prompts[item[0]]),
            group_fn=lambda item: item[1],
            group_by="gen_kwargs",
        )
        rows = self._most_rows if self.batch_size != "auto" else min(self._most_rows, GENERATED_ROWS)
        texts: list[str] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for batch in order.get_batched(n=rows):
                numbers = [number for number, _ in batch]
                new = self._continue([prompts[number] for number in numbers], numbers, batch[0][1])
                for number, text in zip(numbers, new, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                texts += new
                bar.update(len(batch))
        return order.get_original(texts)

    def _continue(self, prompts: list[list[int]], numbers: list[int], gen_kwargs: dict[str, Any]) -> list[str]:
        """The continuations of prompts that share their options."""
        n_tokens, stop, sampling = generation_options(gen_kwargs, self.max_gen_toks)
        room = self.max_length - n_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks must be below max_length={self.max_length}, got {n_tokens}; raise it with --model_args "
                "max_length=N"
            )
        output = generate(
            self.model,
            [prompt[-room:] for prompt in prompts],
            self.tokenizer,
            max_new_tokens=n_tokens,
            sampling=sampling,
            eos_id=self._eos_id,
            stop=stop,
            seed=[(torch.initial_seed() + number) % (1 << 64) for number in numbers],
            prefill_chunk=max(1, PASS_TOKENS // len(prompts)),
        )
        assert output.texts is not None, "there is a tokenizer"
        return output.texts


def generation_options(gen_kwargs: dict[str, Any], max_gen_toks: int) -> tuple[int, list[str], SamplingConfig]:
    """The most tokens to generate, stop strings and sampling, from the generation_kwargs of a task.

    Raises ValueError for an unknown option and names it.
    """
    options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    stop = handle_stop_sequences(options.pop("until"), eos=None)
    n_tokens, do_sample = options.pop("max_gen_toks"), options.pop("do_sample")
    temperature = float(options.pop("temperature", 0.0))
    if do_sample and temperature == 0:
        raise ValueError("do_sample=True needs a temperature above 0; give one, or leave do_sample out to be greedy")
    sampling = {name: options.pop(name) for name in SAMPLING if name in options}
    if sampling.get("top_k") == 0:  # in transformers 0 means no such filter
        del sampling["top_k"]
    if options.get("num_beams") == 1:  # in tasks 1 means no beam search
        del options["num_beams"]
    if options:
        known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *SAMPLING))
        raise ValueError(f"unknown generation options {', '.join(options)}; anymamba has {known}")
    return n_tokens, stop, SamplingConfig(temperature=temperature, **sampling)


def _at_least_one(name: str, value: int | str) -> int:
    """A count; lm-eval's command line gives batch_size as a string."""
    if not str(value).isdecimal() or int(value) < 1:
        other = ' or "auto"' if name == "batch_size" else ""
        raise ValueError(f"{name} must be an integer of at least 1{other}, got {value!r}")
    return int(value)


def _required(token: int | None, tokenizer: Tokenizer) -> int:
    if token is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has no token that texts begin or end with; pass the id of one as "
            f"prefix_token_id=N"
        )
    return token
