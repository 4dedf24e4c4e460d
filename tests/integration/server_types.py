"""OpenAI's own types, to check every answer and event by."""

from __future__ import annotations

from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
KINDS: dict[str, type[Any]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "response": Response,
    "model": Model,
}


def checked(body: Any) -> Any:
    """A body or an event, after OpenAI's type for it has taken it. Those of other protocols pass."""
    if isinstance(body, dict):
        kind = KINDS.get(body.get("object", ""))
        if kind is not None and not body.get("deleted"):
            kind.model_validate(_known_to_types(body))
        elif str(body.get("type", "")).startswith("response."):
            STREAM_EVENT.validate_python(body)
    return body


def _known_to_types(body: dict[str, Any]) -> dict[str, Any]:
    """Without two nulls of text completions that the service itself has and its types do not: the reason of a choice
    that still streams, and the logprob of an echoed prompt's first token."""
    if body["object"] != "text_completion":
        return body
    choices = []
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        if logprobs is not None and logprobs["token_logprobs"][:1] == [None]:
            logprobs = {name: values[1:] for name, values in logprobs.items()}
        choices.append({**choice, "logprobs": logprobs, "finish_reason": choice["finish_reason"] or "stop"})
    return {**body, "choices": choices}
