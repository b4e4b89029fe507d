"""The fields of each endpoint's requests."""

from __future__ import annotations

from anymamba.serving.protocol.fields import (
    Any_,
    Boolean,
    Field,
    Integer,
    ListOf,
    Number,
    Object,
    OneOf,
    Refused,
    Text,
)

MOST_CHOICES = 64
MOST_TOP = 20
"""Most log-probabilities of each token, as OpenAI has it."""
MOST_STOPS = 16
MOST_TOKENS = 1 << 31
LONGEST_NAME = 256
"""Characters of a session's name, as the stores have it, and of a cache key."""

_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_STOP = Any_({"anyOf": [{"type": "string"}, {**_STRINGS, "maxItems": MOST_STOPS}, {"type": "null"}]})

SAMPLING = {
    "temperature": Field(Number(0, 100), 1.0, "Divides the logits; 0 takes the likeliest token."),
    "top_p": Field(
        Number(0, 1, open_below=True), None, "Draw among the likeliest tokens with this probability in all."
    ),
    "top_k": Field(Integer(-1, MOST_TOKENS), None, "Draw among the k likeliest tokens; 0 and -1 keep all. Extension."),
    "min_p": Field(Number(0, 1), None, "Draw among tokens with this share of the likeliest's probability. Extension."),
    "repetition_penalty": Field(
        Number(0, 100, open_below=True), 1.0, "Above 1 makes earlier tokens less likely. Extension."
    ),
    "num_beams": Field(Integer(1, 64), 1, "More than 1 searches for the likeliest text. Extension."),
    "length_penalty": Field(Number(-10, 10), 1.0, "Above 0 favours long texts in a search. Extension."),
    "frequency_penalty": Field(Number(-2, 2), 0.0, "Makes tokens less likely for each time they occur in the answer."),
    "presence_penalty": Field(Number(-2, 2), 0.0, "Makes tokens of the answer less likely."),
    "logit_bias": Field(Object(), None, "Token ids and what is added to their logits, -100 to 100."),
    "seed": Field(Integer(-(1 << 63), (1 << 64) - 1), None, "The same seed gives the same text."),
}

COMMON = {
    "model": Field(Text(), None, "The model's name, as in /v1/models; defaults to the one served."),
    "n": Field(Integer(1, MOST_CHOICES), 1, "Answers."),
    "stop": Field(_STOP, None, "Text that ends an answer, or a list of such texts."),
    "stream": Field(Boolean(), False, "Send the answer piece by piece as server-sent events."),
    "stream_options": Field(Object(), None, "include_usage: end a stream with the counts of tokens."),
    "ignore_eos": Field(Boolean(), False, "Go on after the token that ends a text. Extension."),
    **SAMPLING,
    "session": Field(Text(1, LONGEST_NAME), None, "The name of a state that is kept on disk. Extension."),
    "prompt_cache_key": Field(Text(0, LONGEST_NAME), None, "A hint: requests with the same key share a beginning."),
    "response_format": Field(Object(), None, "text, json_object, json_schema, or regex (extension)."),
    "structured_outputs": Field(Object(), None, "json, regex or choice, as vLLM has it. Extension."),
    "guided_json": Field(Any_({}), None, "A JSON schema, as vLLM has it. Extension."),
    "guided_regex": Field(Text(1), None, "A regular expression, as vLLM has it. Extension."),
    "guided_choice": Field(ListOf(Text(1), 1000, 1), None, "The possible answers, as vLLM has it. Extension."),
    "user": Field(Text(), None, "Not used."),
    "min_tokens": Field(Refused("answers have no least length", (0,))),
    "stop_token_ids": Field(Refused("stop strings and the end token end answers", ([],))),
    "prompt_logprobs": Field(Refused("echo with logprobs of /v1/completions reports them")),
    "guided_grammar": Field(Refused("give guided_regex or guided_json")),
    "use_beam_search": Field(Refused("give num_beams", (False,))),
}

COMPLETION = {
    "prompt": Field(
        Any_({"anyOf": [{"type": "string"}, _STRINGS, _IDS, {"type": "array", "items": _IDS}]}),
        None,
        "A text, a list of texts, a list of token ids, or a list of such lists.",
        required=True,
    ),
    **COMMON,
    "max_tokens": Field(Integer(0, MOST_TOKENS), 16, "Most tokens of an answer; 0 only scores the prompt."),
    "logprobs": Field(Integer(0, MOST_TOP), None, "Report log-probabilities, and so many of the likeliest tokens."),
    "echo": Field(Boolean(), False, "Repeat the prompt before the answer."),
    "best_of": Field(Integer(1, MOST_CHOICES), None, "Generate so many answers and return the n likeliest."),
    "suffix": Field(Refused("the model reads from left to right and cannot fill in before a text", ("",))),
}

CHAT = {
    "messages": Field(ListOf(Object(), 10_000, 1), None, "The conversation so far.", required=True),
    **COMMON,
    "max_tokens": Field(Integer(1, MOST_TOKENS), None, "Older name of max_completion_tokens."),
    "max_completion_tokens": Field(Integer(1, MOST_TOKENS), None, "Most tokens of an answer."),
    "logprobs": Field(Boolean(), False, "Report the log-probability of each token."),
    "top_logprobs": Field(Integer(0, MOST_TOP), None, "Report so many of the likeliest tokens, too; needs logprobs."),
    "tools": Field(ListOf(Object(), 128), None, "Functions that the model may call."),
    "tool_choice": Field(Any_({}), None, "auto, none, required, or the function to call."),
    "parallel_tool_calls": Field(Boolean(), None, "Taken, but an answer has at most one call if one is required."),
    "add_generation_prompt": Field(Boolean(), True, "Whether the answer's header follows the messages. Extension."),
    "continue_final_message": Field(Boolean(), False, "Go on with the last message, an answer. Extension."),
    "chat_template_kwargs": Field(Object(), None, "More variables of the chat template. Extension."),
    "metadata": Field(Object(), None, "Not used."),
    "safety_identifier": Field(Text(), None, "Not used."),
    "service_tier": Field(OneOf(("auto", "default", "flex", "priority", "scale")), None, "Not used."),
    "store": Field(Refused("conversations are not stored here; session keeps a state", (False,))),
    "functions": Field(Refused("give tools", ([],))),
    "function_call": Field(Refused("give tool_choice", ("none", "auto"))),
    "modalities": Field(Refused("answers are text", (["text"],))),
    "audio": Field(Refused("answers are text")),
    "prediction": Field(Refused("there is no speculation over a given text")),
    "web_search_options": Field(Refused("the server does not search")),
    "reasoning_effort": Field(Refused("the model has no reasoning mode", ("none",))),
    "verbosity": Field(Refused("ask for it in a message", ("medium",))),
    "chat_template": Field(Refused("the server's operator chooses the template with --chat-template")),
}

STREAM_OPTIONS = {
    "include_usage": Field(Boolean(), False),
    "include_obfuscation": Field(Boolean(), False),
}

TOKENIZE = {
    "model": COMMON["model"],
    "prompt": Field(Text(), None, "The text."),
    "messages": Field(ListOf(Object(), 10_000, 1), None, "A conversation in place of a text."),
    "add_generation_prompt": CHAT["add_generation_prompt"],
    "return_token_strs": Field(Boolean(), False, "Return the text of each token, too."),
}

DETOKENIZE = {
    "model": COMMON["model"],
    "tokens": Field(Any_(_IDS), None, "Token ids.", required=True),
}
