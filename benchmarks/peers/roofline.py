"""The least time a machine needs for a scenario: bytes over bandwidth or operations over the matrix rate.

A step reads the weights once and every distinct KV token of its contexts once (a shared prefix once for all sharers);
it cannot be faster than that, nor than its arithmetic at the best rate this machine was seen to reach. Attention is
computed in float32 at any weight width. Waiting for tools, scheduling and moving KV cost nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers.workload import (
    BATCH,
    LONG_PROMPT_TOKENS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    SMALL_POOL_TOKENS,
    Agents,
    Scenario,
)

KV_BYTES = 4  # of one value: float32


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def body(self) -> int:
        """Weights of all layers' products."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the product that gives the logits."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All weights but the norms'."""
        return self.body + self.head * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * KV_BYTES


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine was seen to do at its best."""

    read_bytes_s: float
    fp32_ops_s: float
    int8_ops_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Least times of one model, with weights of ``weight_bytes`` (4: float32, 1: int8), on one machine."""

    shape: Shape
    machine: Machine
    weight_bytes: int = 4

    @property
    def _ops_s(self) -> float:
        floats = self.machine.fp32_ops_s
        return max(floats, self.machine.int8_ops_s) if self.weight_bytes == 1 else floats  # int8 may be widened

    def step_s(self, contexts: float, context_tokens: float, distinct_tokens: float | None = None) -> float:
        """One decode step of ``contexts`` of that length, with ``distinct_tokens`` of KV among them (default: all)."""
        distinct = contexts * context_tokens if distinct_tokens is None else distinct_tokens
        weights = self.shape.body + self.shape.head
        read_s = (weights * self.weight_bytes + self.shape.kv_bytes * distinct) / self.machine.read_bytes_s
        return max(read_s, 2 * weights * contexts / self._ops_s + self._attention_s(contexts, context_tokens))

    def prefill_s(self, tokens: float, mean_context_tokens: float) -> float:
        """``tokens`` of prompt, each attending to ``mean_context_tokens``; logits left out."""
        ops_s = 2 * self.shape.body * tokens / self._ops_s + self._attention_s(tokens, mean_context_tokens)
        return max(ops_s, self.shape.body * self.weight_bytes / self.machine.read_bytes_s)

    def limit(self, scenario: Scenario) -> float:
        """Tokens per second that ``scenario``'s metric cannot exceed."""
        if scenario.agents is not None:
            pool = None if scenario.pool == "ample" else SMALL_POOL_TOKENS
            agents = scenario.agents
            return agents.count * agents.rounds * agents.new_tokens / self.agents_s(agents, pool)
        if scenario.name == "a":
            return 1 / self.step_s(1, PROMPT_TOKENS + NEW_TOKENS / 2)
        if scenario.name == "b":
            prompts_s = BATCH * self.prefill_s(PROMPT_TOKENS, PROMPT_TOKENS / 2)
            steps_s = (NEW_TOKENS - 1) * self.step_s(BATCH, PROMPT_TOKENS + NEW_TOKENS / 2)
            return BATCH * NEW_TOKENS / (prompts_s + steps_s)
        return LONG_PROMPT_TOKENS / self.prefill_s(LONG_PROMPT_TOKENS, LONG_PROMPT_TOKENS / 2)

    def agents_s(self, agents: Agents, pool_tokens: int | None) -> float:
        """All agents' turns, the prefix computed once and read once a step, no token computed twice.

        With a pool, as many agents decode together as fit it with the tokens they end the round with; contexts come
        and go for nothing. At most 64 agents run at once in any case, as everybody here is told.
        """
        total_s = self.prefill_s(agents.prefix_tokens, agents.prefix_tokens / 2)
        for number in range(agents.rounds):
            own = agents.own_at(number)
            read = agents.own_tokens if number == 0 else agents.tool_tokens
            total_s += agents.count * self.prefill_s(read, agents.prefix_tokens + own - read / 2)
            together = float(min(agents.count, 64))
            if pool_tokens is not None:
                together = min(together, (pool_tokens - agents.prefix_tokens) / (own + agents.new_tokens))
            mean = own + agents.new_tokens / 2
            step_s = self.step_s(together, agents.prefix_tokens + mean, agents.prefix_tokens + together * mean)
            total_s += agents.new_tokens * step_s * agents.count / together
        return total_s

    def _attention_s(self, rows: float, context_tokens: float) -> float:
        ops = 4 * rows * context_tokens * self.shape.heads * self.shape.head_dim * self.shape.layers
        return ops / self.machine.fp32_ops_s


SHAPES = {
    "135m": Shape(hidden=576, layers=30, heads=9, kv_heads=3, inner=1536, vocab=49152, tied=True),
    "10m": Shape(hidden=256, layers=8, heads=8, kv_heads=4, inner=768, vocab=8192, tied=False),
}
