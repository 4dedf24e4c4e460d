"""The embedded model's chat format: ChatML turns, tool calls as JSON in tags, results in a user turn. No torch.

What the template renders for a past assistant turn is, token for token, what the model wrote: a tool call is
``<tool_call>\\n{"name": "calculator", "arguments": {"expression": "48 * 39"}}\\n</tool_call>`` and nothing else.
No space stands before the names of tools and arguments on offer: so they are the same tokens there as in a call, and
can be copied without knowing how a word is spelled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# Added but not special: they print, so that a tool parser sees them.
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FAILED_TEXT = "I have no answer: the tool failed."
NO_TOOL_TEXT = "I have no tool for that."

Message = Mapping[str, Any]

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if has_system or tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if has_system -%}
        {{- messages[0].content -}}
    {%- endif -%}
    {%- if tools -%}
        {%- if has_system and messages[0].content -%}
            {{- '\\n\\n' -}}
        {%- endif -%}
        {{- 'Tools, called as JSON in <tool_call></tool_call>:' -}}
        {%- for tool in tools -%}
            {%- set spec = tool.function if tool.function else tool -%}
            {{- '\\n-' ~ spec.name ~ '(' -}}
            {%- if spec.parameters and spec.parameters.properties -%}
                {{- spec.parameters.properties.keys() | join(',') -}}
            {%- endif -%}
            {{- ')' -}}
            {%- if spec.description -%}
                {{- ': ' ~ spec.description -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' -}}
        {{- message.content -}}
        {{- '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.content -%}
            {{- message.content -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- if not loop.first or message.content -%}
                {{- '\\n' -}}
            {%- endif -%}
            {%- set call = call.function if call.function else call -%}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' -}}
            {%- if call.arguments is string -%}
                {{- call.arguments -}}
            {%- else -%}
                {{- call.arguments | tojson -}}
            {%- endif -%}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif not (message.role == 'system' and loop.first) -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
        {{- message.content -}}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _json(value: Any, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["tojson"] = _json
_TEMPLATE = _ENVIRONMENT.from_string(CHAT_TEMPLATE)


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation as text, by the template that is stored with the checkpoint."""
    return _TEMPLATE.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def calls_message(
    expressions: Sequence[str], *, name: str = "calculator", argument: str = "expression"
) -> dict[str, Any]:
    """The assistant turn that calls the calculator once per expression."""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": json.dumps({argument: expression})}}
        for expression in expressions
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def parse_calls(text: str, *, argument: str = "expression") -> list[str]:
    """The expressions of the calculator calls in an assistant turn; malformed calls are left out."""
    expressions = []
    for part in text.split("<tool_call>")[1:]:
        body = part.split("</tool_call>")[0]
        try:
            expression = json.loads(body)["arguments"][argument]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(expression, str):
            expressions.append(expression)
    return expressions


def answer_text(values: Sequence[str]) -> str:
    """The final assistant turn of a task."""
    if len(values) == 1:
        return f"The answer is {values[0]}."
    return f"The answers are {' and '.join(values)}."
