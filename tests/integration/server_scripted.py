"""A service that says what a test tells it to, chunk by chunk: for what the embedded model never writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from caesura.runtime.generation import Finish, TokenChunk, ToolCalling
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.text.template import ChatTemplate
from caesura.runtime.text.tool_parser import ToolFormat, parse
from caesura.scheduler.types import ContextId

from tests.integration.server_client import embedded_service

THINKING_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% elif opened %}<think>
{% endif %}{%- endif -%}
"""


class ScriptedHandle:
    """A context whose every generation says the next text of the script."""

    def __init__(self, service: ScriptedService) -> None:
        self._service = service
        self.id = ContextId(0)
        self.tokens: list[int] = []
        service.handles.append(self)

    @property
    def is_open(self) -> bool:
        return True

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    async def append(self, token_ids: Sequence[int]) -> int:
        self.tokens += token_ids
        return len(self.tokens)

    async def resume(self, deadline_s: float | None = None) -> None:
        """Nothing waits."""

    async def token_ids(self) -> list[int]:
        return list(self.tokens)

    async def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]:
        text = self._service.script.pop(0)
        self._service.asked.append(params)
        prompt = len(self.tokens)
        ids = self._service.tokenizer.encode(text)
        size = self._service.chunk_chars
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            yield TokenChunk(piece, tuple(self._service.tokenizer.encode(piece)))
        self.tokens += ids
        names = [str(tool["name"]) for tool in tools.tools] if tools else []
        calls = tuple(parse(text, ToolFormat.HERMES, names)[1]) if tools else ()
        reason = "tool_calls" if calls else "stop"
        yield TokenChunk("", (), (), Finish(reason, None, calls, prompt, len(ids), 0))

    async def fork(self, count: int) -> list[ScriptedHandle]:
        forks = [ScriptedHandle(self._service) for _ in range(count)]
        for fork in forks:
            fork.tokens = list(self.tokens)
        return forks

    async def pause(self, calls: Sequence[Any], wait: str = "all", deadline_s: float | None = None) -> None:
        pass

    async def close(self) -> None:
        pass


class ScriptedService:
    """An engine with a script, behind the embedded model's tokenizer and a template of a model that thinks."""

    ready = True
    life = 0
    tool_format = ToolFormat.HERMES
    model_name = "scripted"

    def __init__(self, *script: str, opened: bool = False, chunk_chars: int = 3) -> None:
        self.script = list(script)
        self.chunk_chars = chunk_chars
        self.handles: list[ScriptedHandle] = []
        self.asked: list[SamplingParams] = []
        self.tokenizer = embedded_service().tokenizer
        source = THINKING_TEMPLATE.replace("elif opened", f"elif {str(opened).lower()}")
        self.template = ChatTemplate(source, eos_token="<|im_end|>")

    def prompt(self, index: int) -> str:
        """What a context held when it was first asked, as text; for contexts that were asked once."""
        return self.tokenizer.decode(self.handles[index].tokens, skip_special=False)

    async def open(self, namespace: str = "", deadline_s: float | None = None) -> ScriptedHandle:
        return ScriptedHandle(self)

    async def read_stats(self) -> dict[str, Any]:
        return {"max_context_tokens": 4096, "contexts": {}}
