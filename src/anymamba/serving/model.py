"""The model that a server serves, with all that belongs to it, and engine requests made from checked calls."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anymamba.base import __version__
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.requests import KeptState, Request
from anymamba.generation.stepping import Stepper
from anymamba.models.language_model import LanguageModel
from anymamba.serving.limits import Limits
from anymamba.serving.protocol.answers import Answer, CompletionAnswer, Echo, Heading
from anymamba.serving.protocol.chat import ChatCall
from anymamba.serving.protocol.chat_answers import ChatAnswer
from anymamba.serving.protocol.completions import CompletionCall
from anymamba.serving.protocol.errors import ApiError, wrong_value
from anymamba.serving.protocol.formats import Form
from anymamba.serving.protocol.options import Options
from anymamba.serving.protocol.token_texts import TokenTexts
from anymamba.serving.sessions import OtherModelError, QuotaError, SessionStore, StoreError
from anymamba.serving.structured import GrammarMask, Grammars
from anymamba.serving.templates import ChatTemplate, unfinished
from anymamba.serving.worker import EngineThread

SHORT = 2000
"""Characters and tokens up to which a prompt is encoded in the thread of the event loop, in about a millisecond."""


@dataclass(frozen=True)
class Task:
    """What the engine does for a call, and what the client gets."""

    requests: Sequence[Request]
    answer: Answer
    options: Options
    owner: str


@dataclass
class ServedModel:
    """A loaded model behind an engine."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    worker: EngineThread
    template: ChatTemplate | None
    limits: Limits
    sessions: SessionStore | None = None
    created: int = 0
    texts: TokenTexts = field(init=False)
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.model.config.vocab_size)
        described = f"{__version__} {self.model.config} {self.tokenizer.fingerprint}"
        self.fingerprint = "fp_" + hashlib.sha256(described.encode()).hexdigest()[:12]
        self._can_be_invariant = Stepper(self.model).native is not None
        self._compilers = ThreadPoolExecutor(2, "anymamba-grammars")

    # ------------------------------------------------------------------------------------ calls

    async def completion(self, call: CompletionCall, owner: str) -> Task:
        """The task of a completion. Raises ApiError if it cannot be done."""
        self.require_served(call.options.model)
        mask = await self.mask(call.form)
        kept = await self.load_session(owner, call.options.session)
        is_short = kept is None and sum(map(len, call.prompts)) <= SHORT
        encode = partial(self._encode_all, call.prompts, kept)
        prompts = encode() if is_short else await asyncio.to_thread(encode)  # a thread takes longer than a short prompt
        for ids in prompts:
            self._check_length(ids, call.max_tokens, "prompt", "max_tokens")
        requests = [
            self._request(
                ids,
                call.options,
                n=call.best_of,
                max_new_tokens=call.max_tokens,
                n_top=call.n_top or 0,
                prompt_log_probabilities=call.n_top if call.echo else None,
                mask=mask,
                owner=owner,
                state=kept,
            )
            for ids in prompts
        ]
        echoes = [
            Echo(ids, prompt if isinstance(prompt, str) else self.decode(ids, "prompt"))
            for ids, prompt in zip(prompts, call.prompts if call.echo else (), strict=False)
        ]
        answer = CompletionAnswer(
            self._heading(call.options),
            self.texts,
            len(prompts),
            call.options.n,
            call.best_of,
            call.n_top,
            echoes=echoes,
        )
        return Task(requests, answer, call.options, owner)

    async def chat(self, call: ChatCall, owner: str) -> Task:
        """The task of a chat. Raises ApiError if it cannot be done."""
        self.require_served(call.options.model)
        template = self.require_template()
        mask = await self.mask(call.form)
        kept = await self.load_session(owner, call.options.session)
        ids = await asyncio.to_thread(lambda: self._encode(self.chat_text(call), kept))
        max_tokens = self.limits.chat_tokens if call.max_tokens is None else call.max_tokens
        self._check_length(ids, max_tokens, "messages", "max_completion_tokens")
        request = self._request(
            ids,
            call.options,
            n=call.options.n,
            max_new_tokens=max_tokens,
            n_top=call.n_top or 0,
            mask=mask,
            owner=owner,
            state=kept,
            stop=(*call.options.stop, *template.stop),
        )
        n = call.options.n
        answer = ChatAnswer(self._heading(call.options), self.texts, 1, n, n, call.n_top, tools=call.tools)
        return Task([request], answer, call.options, owner)

    def chat_text(self, call: ChatCall) -> str:
        """The text of a conversation."""
        tools = () if call.tools is None else call.tools.described
        text = self.require_template().render(
            call.messages, tools, add_generation_prompt=call.add_generation_prompt, values=call.template_values
        )
        return unfinished(text, call.messages[-1]["content"]) if call.continue_final_message else text

    # ------------------------------------------------------------------------------------ checks

    def require_served(self, model: str | None) -> None:
        """Raise ApiError for the name of another model."""
        if model is not None and model != self.name:
            raise ApiError(
                404,
                f"the model {model[:80]!r} does not exist here; the server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises ApiError if there is none."""
        if self.template is None:
            raise ApiError(
                400,
                "the model has no chat template; start the server with --chat-template FILE, chatml or plain, or use "
                "/v1/completions",
                param="messages",
                code="no_chat_template",
            )
        return self.template

    def _check_length(self, ids: Sequence[int], max_tokens: int, prompt: str, most: str) -> None:
        if len(ids) > self.limits.max_prompt:
            raise ApiError(
                400,
                f"{prompt} must have at most {self.limits.max_prompt:,} tokens, got {len(ids):,}",
                param=prompt,
                code="context_length_exceeded",
            )
        if max_tokens > self.limits.max_new_tokens:
            raise wrong_value(most, f"at most {self.limits.max_new_tokens}", max_tokens)

    def _check_engine(self, options: Options, n: int) -> None:
        """Raise ApiError for more rows than the engine has, and for a bias of ids that the model does not have."""
        beams, most, last = options.beams, self.worker.engine.max_rows, self.model.config.vocab_size - 1
        name, n_rows = ("best_of" if n > options.n else "n", n) if beams is None else ("num_beams", beams.num_beams)
        if n_rows > most:
            raise wrong_value(name, f"at most {most}, the answers that this server generates at once", n_rows)
        if (highest := max(options.logit_bias, default=0)) > last:
            raise wrong_value("logit_bias", f"for ids from 0 to {last}", highest)

    # ------------------------------------------------------------------------------------ parts of a request

    def _request(self, ids: Sequence[int], options: Options, *, n: int, **more: Any) -> Request:
        self._check_engine(options, n)
        return Request(
            prompt=ids,
            n=n,
            sampling=options.sampling,
            seed=options.seed,
            eos_id=None if options.ignore_eos else self.tokenizer.eos_id,
            logit_bias=options.logit_bias,
            frequency_penalty=options.frequency_penalty,
            presence_penalty=options.presence_penalty,
            keep_state=options.session is not None,
            beams=options.beams,
            invariant=options.seed is not None and options.beams is None and self._can_be_invariant,
            **{"stop": options.stop, **more},
        )

    def _heading(self, options: Options) -> Heading:
        eos_id = None if options.ignore_eos else self.tokenizer.eos_id
        return Heading(self.name, self.fingerprint, options.stream, options.include_usage, eos_id)

    def _encode_all(self, prompts: Sequence[str | list[int]], kept: KeptState | None) -> list[list[int]]:
        return [self._encode(prompt, kept) for prompt in prompts]

    def _encode(self, prompt: str | list[int], kept: KeptState | None) -> list[int]:
        """The ids of a prompt; a text that begins with that of a session's states gets the state's own ids there."""
        if isinstance(prompt, str):
            for known in () if kept is None else kept.candidates():
                before = self.tokenizer.decode(known.tokens)
                if before and prompt.startswith(before):
                    return [*known.tokens, *self.tokenizer.encode(prompt[len(before) :])]
            ids = self.tokenizer.encode(prompt)
        else:
            ids = self._checked_ids(prompt, "prompt")
        if not ids and self.tokenizer.eos_id is None:
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        return ids or [self.tokenizer.eos_id]  # type: ignore[list-item]

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        vocab_size = self.model.config.vocab_size
        if ids and max(ids) >= vocab_size:
            place, token = next((place, token) for place, token in enumerate(ids) if token >= vocab_size)
            raise ApiError(
                400,
                f"{param}[{place}] must be a token id from 0 to {vocab_size - 1}, got {token}",
                param=param,
                code="invalid_value",
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The name of the end token alone is that token, with every tokenizer."""
        eos_id = self.tokenizer.eos_id
        return [eos_id] if eos_id is not None and text == self.texts.text(eos_id) else self.tokenizer.encode(text)

    def decode(self, ids: list[int], param: str = "tokens") -> str:
        """The text of ids. Raises ApiError for ids that the tokenizer does not have."""
        most = self.tokenizer.vocab_size
        if ids and max(ids) >= most:
            raise ApiError(400, f"{param} must be ids from 0 to {most - 1}, got {max(ids)}", param=param)
        return self.tokenizer.decode(ids)

    async def mask(self, form: Form | None) -> GrammarMask | None:
        """The mask of a form. Raises ApiError if it cannot be compiled, or not in time."""
        if form is None:
            return None
        compilers: dict[str, Callable[[Any, str], GrammarMask]] = {
            "json": self.grammars.json_schema,
            "call": partial(self.grammars.json_schema, compact=True),
            "regex": self.grammars.regex,
            "choice": self.grammars.choice,
        }
        work = self._compilers.submit(compilers[form.kind], form.value, form.param)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), self.limits.compile_seconds)
        except TimeoutError:
            if work.cancel():  # it has not begun
                told = "schemas of other requests are being compiled; try again"
                raise ApiError(429, told, param=form.param, code="too_many_requests", retry_after=1) from None
            raise ApiError(
                400,
                f"{form.param} takes longer to compile than {self.limits.compile_seconds:g} seconds; simplify it",
                param=form.param,
                code="invalid_grammar",
            ) from None

    # ------------------------------------------------------------------------------------ sessions

    def require_sessions(self) -> SessionStore:
        """The store. Raises ApiError if there is none."""
        if self.sessions is None:
            raise ApiError(400, "the server keeps no sessions; start it with --sessions FOLDER", param="session")
        return self.sessions

    async def load_session(self, owner: str, name: str | None) -> KeptState | None:
        """The state of a session that exists. Raises ApiError if it cannot be used."""
        if name is None:
            return None
        store = self.require_sessions()
        await session_call(store.require_room, owner, name)  # rather now than after the answer
        return await session_call(store.load, owner, name)

    async def save_session(self, owner: str, name: str, kept: KeptState) -> None:
        """Keep a state; it is on disk afterwards. Raises ApiError if it cannot be kept."""
        await session_call(self.require_sessions().save, owner, name, kept)


async def session_call(call: Any, *arguments: Any) -> Any:
    """Call a store in another thread. Raises ApiError in place of its errors."""
    try:
        return await asyncio.to_thread(call, *arguments)
    except ValueError as error:
        raise ApiError(400, str(error), param="session", code="invalid_value") from None
    except OtherModelError as error:
        raise ApiError(409, str(error), param="session", code="session_of_another_model") from None
    except QuotaError as error:
        raise ApiError(403, str(error), param="session", code="quota_exceeded") from None
    except StoreError as error:
        raise ApiError(507, str(error), param="session", code="session_store") from None
