"""OpenAI's Responses request, with every bound in the types. What this server cannot do is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from caesura.runtime.server import limits
from caesura.runtime.server.chat_protocol import (
    ChatRequest,
    ContentPart,
    FunctionSpec,
    Message,
    NamedChoice,
    NamedFunction,
    Tool,
)
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.params import JsonSchemaSpec, ResponseFormat, SamplingFields
from msgspec import Meta

LOGPROBS = "message.output_text.logprobs"
Content = limits.Text | Annotated[list[ContentPart], Meta(max_length=limits.MAX_MESSAGES)]


class InputItem(msgspec.Struct, omit_defaults=True):
    """An item of ``input``: a message, a function call, its output, or reasoning. ``type`` says which."""

    type: limits.Id | None = None
    id: limits.Id | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: limits.Id | None = None
    name: limits.Id | None = None
    arguments: limits.Text | None = None
    output: Content | None = None
    status: limits.Id | None = None
    summary: Annotated[list[ContentPart], Meta(max_length=limits.MAX_MESSAGES)] | None = None


class ResponseTool(msgspec.Struct):
    """An entry of ``tools``: a function, flat."""

    type: limits.Id
    name: Annotated[str, Meta(max_length=64)] = ""
    description: limits.Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    """``tool_choice`` that names one function."""

    type: limits.Id
    name: limits.Id | None = None


class TextFormat(msgspec.Struct, rename={"json_schema": "schema"}, omit_defaults=True):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"]
    name: limits.Id | None = None
    json_schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: limits.Text | None = None


class TextConfig(msgspec.Struct):
    """``text``."""

    format: TextFormat | None = None
    verbosity: limits.Id | None = None


class Reasoning(msgspec.Struct):
    """``reasoning``."""

    effort: limits.Id | None = None
    summary: limits.Id | None = None


class ResponsesRequest(SamplingFields, kw_only=True):
    """The body of ``POST /v1/responses``."""

    input: limits.Text | Annotated[list[InputItem], Meta(min_length=1, max_length=limits.MAX_MESSAGES)]
    instructions: limits.Text | None = None
    previous_response_id: limits.Id | None = None
    store: bool | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_NEW_TOKENS)] | None = None
    max_tool_calls: limits.NewTokens | None = None
    top_logprobs: limits.TopLogprobs | None = None
    include: Annotated[list[limits.Id], Meta(max_length=limits.MAX_METADATA)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    chat_template_kwargs: Annotated[dict[limits.Id, Any], Meta(max_length=limits.MAX_METADATA)] | None = None

    @property
    def stores(self) -> bool:
        return self.store is not False

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """What the types cannot say."""
        if self.background:
            raise ApiError(400, "background: true is not supported; stream the response instead", param="background")
        for name in ("conversation", "prompt"):
            if getattr(self, name):
                message = f"{name} is not supported; send input, with previous_response_id to go on"
                raise ApiError(400, message, param=name)
        if (self.n or 1) != 1:
            raise ApiError(400, f"n is {self.n}; a response has one choice", param="n")
        for index, tool in enumerate(self.tools or ()):
            if tool.type != "function" or not tool.name:
                what = f"a tool of type {tool.type!r}" if tool.type != "function" else "a function without a name"
                message = f"tools[{index}] is {what}; only functions that the client runs are supported"
                raise ApiError(400, message, param=f"tools[{index}].type")
        if isinstance(self.tool_choice, ToolChoice) and (self.tool_choice.type, self.tool_choice.name) != (
            "function",
            self.tool_choice.name or "",
        ):
            message = "tool_choice may be none, auto, required, or name a function"
            raise ApiError(400, message, param="tool_choice")
        for key, value in (self.metadata or {}).items():
            if not isinstance(value, str) or len(value) > 512 or len(key) > 64:
                message = "metadata maps keys of at most 64 characters to texts of at most 512"
                raise ApiError(400, message, param="metadata")

    def as_chat(self, messages: list[Message]) -> ChatRequest:
        """The same request in the chat's terms, with the whole conversation."""
        shared = {name: getattr(self, name) for name in SamplingFields.__struct_fields__}
        choice: Any = self.tool_choice
        if isinstance(choice, ToolChoice):
            choice = NamedChoice(NamedFunction(choice.name or ""))
        chat = ChatRequest(
            **shared,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.logprobs or None,
            top_logprobs=self.top_logprobs if self.logprobs else None,
            tools=[_tool(tool) for tool in self.tools or ()] or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._format(),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.check()
        return chat

    def _format(self) -> ResponseFormat | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise ApiError(400, "text.format.schema is missing", param="text.format.schema")
        return ResponseFormat(wanted.type, JsonSchemaSpec(wanted.name, wanted.json_schema, wanted.strict))

    def echo(self) -> dict[str, Any]:
        """The fields of the request that the response repeats."""
        wanted = self.text.format if self.text and self.text.format else TextFormat("text")
        text: dict[str, Any] = {"format": msgspec.to_builtins(wanted)}
        if self.text and self.text.verbosity:
            text["verbosity"] = self.text.verbosity
        choice = self.tool_choice or "auto"
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": msgspec.to_builtins(self.reasoning or Reasoning()),
            "store": self.stores,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": text,
            "tool_choice": choice if isinstance(choice, str) else {"type": "function", "name": choice.name},
            "tools": [msgspec.to_builtins(tool) for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


def _tool(tool: ResponseTool) -> Tool:
    return Tool(FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict))
