"""What things cost on one machine with one model: seconds per iteration and per copy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostProfile:
    """An affine model of one iteration and of one copy (InferCept, section 4: T_fwd and T_swap).

    An iteration over ``q`` query tokens with ``k`` KV tokens behind each costs
    ``step_s + q * token_s + q * k * attention_s``; ``saturation_tokens`` is S, the query tokens after which adding
    one costs the full ``token_s``. Copying ``x`` tokens one way costs ``swap_base_s + x * swap_token_s``.
    """

    step_s: float
    token_s: float
    attention_s: float
    swap_base_s: float
    swap_token_s: float
    saturation_tokens: int
    source: str = "given"

    def forward_s(self, query_tokens: int, context_tokens: float = 0.0) -> float:
        """Seconds of one iteration: ``query_tokens`` rows, each attending to ``context_tokens``."""
        return self.step_s + query_tokens * (self.token_s + context_tokens * self.attention_s)

    def recompute_s(self, start: int, num_tokens: int) -> float:
        """Seconds added by recomputing ``[start, start + num_tokens)`` in chunks of S beside other work."""
        chunks = -(-num_tokens // max(1, self.saturation_tokens))
        own = num_tokens * (self.token_s + (start + num_tokens / 2) * self.attention_s)
        return chunks * self.step_s + own

    def copy_s(self, num_tokens: int) -> float:
        """Seconds to copy ``num_tokens`` one way between the tiers (T_swap)."""
        return self.swap_base_s + num_tokens * self.swap_token_s if num_tokens else 0.0

    def hidden_tokens(self, query_tokens: int) -> int:
        """N with T_swap(N) = T_fwd(B): what can be copied behind one iteration (InferCept, section 4.2)."""
        room = self.forward_s(max(1, query_tokens)) - self.swap_base_s
        return max(0, int(room / self.swap_token_s)) if self.swap_token_s > 0 else 1 << 40


GPT_J_6B_A100 = CostProfile(
    step_s=0.010,
    token_s=0.0463e-3,
    attention_s=0.0,
    swap_base_s=0.0,
    swap_token_s=(0.010 + 384 * 0.0463e-3) / 605,
    saturation_tokens=384,
    source="InferCept artifact: GPT-J-6B on one A100 (iteration time, S, free swap tokens per iteration)",
)
