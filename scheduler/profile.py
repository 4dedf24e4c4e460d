"""What things cost on one machine with one model: seconds per iteration and per copy."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CostProfile:
    """An affine model of one iteration and of one copy (InferCept, section 4: T_fwd and T_swap).

    An iteration over ``q`` query tokens with ``k`` KV tokens behind each costs
    ``step_s + q * token_s + q * k * attention_s``; ``saturation_tokens`` is S, the query tokens after which adding
    one costs the full ``token_s``. Copying ``x`` tokens one way costs ``swap_base_s + x * swap_token_s``, to or from
    the disk tier ``disk_base_s + x * disk_token_s`` (0 where there is none).
    """

    step_s: float
    token_s: float
    attention_s: float
    swap_base_s: float
    swap_token_s: float
    saturation_tokens: int
    source: str = "given"
    disk_base_s: float = 0.0
    disk_token_s: float = 0.0

    def forward_s(self, query_tokens: int, context_tokens: float = 0.0) -> float:
        """Seconds of one iteration: ``query_tokens`` rows, each attending to ``context_tokens``."""
        return self.step_s + query_tokens * (self.token_s + context_tokens * self.attention_s)

    def recompute_s(self, start: int, num_tokens: int) -> float:
        """Seconds added by recomputing ``[start, start + num_tokens)`` in chunks of S beside other work."""
        chunks = -(-num_tokens // max(1, self.saturation_tokens))
        own = num_tokens * (self.token_s + (start + num_tokens / 2) * self.attention_s)
        return chunks * self.step_s + own

    def copy_s(self, num_tokens: int, *, on_disk: bool = False) -> float:
        """Seconds to copy ``num_tokens`` one way between the device and what is below it (T_swap)."""
        if not num_tokens:
            return 0.0
        if on_disk:
            return self.disk_base_s + num_tokens * self.disk_token_s
        return self.swap_base_s + num_tokens * self.swap_token_s

    def disk_pays(self, start: int, num_tokens: int) -> bool:
        """Reading ``[start, start + num_tokens)`` from the disk takes less time than computing it again."""
        measured = self.disk_token_s > 0
        return measured and self.copy_s(num_tokens, on_disk=True) < self.recompute_s(start, num_tokens)

    def at_disk_rate(self) -> CostProfile:
        """The same machine when all that is copied goes to the disk, because host memory is full or there is none."""
        return replace(self, swap_base_s=self.disk_base_s, swap_token_s=self.disk_token_s)

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
