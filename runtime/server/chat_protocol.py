"""OpenAI's chat request, with every bound in the types. Unknown fields are accepted and ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from caesura.runtime.server import limits
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.params import ResponseFormat, SamplingFields
from msgspec import Meta

# Arguments of chat templates that clients may set. Templates themselves never come from a request.
TEMPLATE_ARGUMENTS = frozenset(
    {"enable_thinking", "thinking", "preserve_thinking", "reasoning_effort", "date_string", "strip_thinking"}
)


class CalledFunction(msgspec.Struct):
    """The function of a tool call in a message."""

    name: limits.Name
    arguments: limits.Text | dict[str, Any] | None = None


class MessageToolCall(msgspec.Struct):
    """A tool call in a message."""

    function: CalledFunction
    id: limits.Id = ""
    type: Literal["function"] = "function"


class ContentPart(msgspec.Struct):
    """A part of a message. Only text is understood."""

    type: limits.Id
    text: limits.Text | None = None
    refusal: limits.Text | None = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: limits.Text | Annotated[list[ContentPart], Meta(max_length=limits.MAX_MESSAGES)] | None = None
    name: limits.Id | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=limits.MAX_CALLS)] | None = None
    tool_call_id: limits.Id | None = None
    reasoning_content: limits.Text | None = None

    def text(self, index: int) -> str:
        """The content as one text. Raises ApiError for parts that are no text; nothing is ever fetched."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        texts = []
        for part in self.content:
            if part.type not in ("text", "input_text", "output_text", "refusal", "reasoning_text"):
                where = f"messages[{index}].content"
                raise ApiError(400, f"{where}: parts of type {part.type!r} are not supported, only text", param=where)
            texts.append(part.text or part.refusal or "")
        return "\n".join(texts)


class FunctionSpec(msgspec.Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    description: limits.Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """An entry of ``tools``."""

    function: FunctionSpec
    type: Literal["function"] = "function"

    def spec(self) -> dict[str, Any]:
        """The function as templates and grammars want it."""
        out: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            out["description"] = self.function.description
        out["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return out


class NamedFunction(msgspec.Struct):
    """The function of a named ``tool_choice``."""

    name: limits.Name


class NamedChoice(msgspec.Struct):
    """``tool_choice`` that names one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class ChatRequest(SamplingFields, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_tokens: limits.NewTokens | None = None
    max_completion_tokens: limits.NewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: limits.TopLogprobs | None = None
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: limits.Id | None = None
    chat_template_kwargs: Annotated[dict[limits.Id, Any], Meta(max_length=limits.MAX_METADATA)] | None = None
    continue_final_message: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    @property
    def budget(self) -> int | None:
        """The limit on new tokens, under its newer or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def choice(self) -> str:
        """``tool_choice`` as the runtime takes it: auto, none, required or a name."""
        if isinstance(self.tool_choice, NamedChoice):
            return self.tool_choice.function.name
        if not self.tools:
            return "none"
        return self.tool_choice or "auto"

    def check(self) -> None:
        """What the types cannot say."""
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        if isinstance(self.tool_choice, NamedChoice):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                message = f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools"
                raise ApiError(400, message, param="tool_choice")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.metadata is not None and len(self.metadata) > limits.MAX_METADATA:
            raise ApiError(400, f"metadata has more than {limits.MAX_METADATA} entries", param="metadata")
        for name in self.chat_template_kwargs or ():
            if name not in TEMPLATE_ARGUMENTS:
                allowed = ", ".join(sorted(TEMPLATE_ARGUMENTS))
                message = f"chat_template_kwargs may hold {allowed}; not {name[:40]!r}"
                raise ApiError(400, message, param="chat_template_kwargs")

    def template_arguments(self) -> dict[str, Any]:
        """Arguments for the chat template."""
        out = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            out.setdefault("reasoning_effort", self.reasoning_effort)
        return out
