"""Choosing among options by their logprobs. The methods and the calling convention are SGLang's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TokenScores = Sequence[tuple[float, int, str | None]]  # (logprob, token id, text) of each token


@dataclass(frozen=True)
class ChoicesDecision:
    """The chosen option and what it was chosen by."""

    decision: str
    meta_info: dict[str, Any] | None = None


class ChoicesSamplingMethod(ABC):
    """Subclass this to choose in your own way and give an instance to ``select(choices_method=...)``."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether each option must also be scored without its context."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenScores],
        output_token_logprobs: list[TokenScores],
        unconditional_token_logprobs: list[TokenScores] | None = None,
    ) -> ChoicesDecision:
        """Choose. ``normalized_prompt_logprobs`` are means over each option's tokens."""


def mean(scores: TokenScores) -> float:
    """Mean logprob of an option's tokens; minus infinity for an option without tokens."""
    return sum(score[0] for score in scores) / len(scores) if scores else float("-inf")


class TokenLengthNormalized(ChoicesSamplingMethod):
    """The option with the highest mean token logprob."""

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenScores],
        output_token_logprobs: list[TokenScores],
        unconditional_token_logprobs: list[TokenScores] | None = None,
    ) -> ChoicesDecision:
        best = max(range(len(choices)), key=lambda i: normalized_prompt_logprobs[i])
        return ChoicesDecision(
            choices[best],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
            },
        )


class GreedyTokenSelection(ChoicesSamplingMethod):
    """Token by token, only the options with the most likely next token stay.

    An option that ends early competes with the mean of its tokens.
    """

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenScores],
        output_token_logprobs: list[TokenScores],
        unconditional_token_logprobs: list[TokenScores] | None = None,
    ) -> ChoicesDecision:
        alive = list(range(len(choices)))
        longest = max((len(scores) for scores in input_token_logprobs), default=0)
        table = [
            [score[0] for score in scores] + [mean(scores)] * (longest - len(scores)) for scores in input_token_logprobs
        ]
        for position in range(longest):
            if len(alive) == 1:
                break
            best = max(table[i][position] for i in alive)
            alive = [i for i in alive if table[i][position] == best]
        return ChoicesDecision(
            choices[alive[0]],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
                "greedy_logprob_matrix": table,
            },
        )


class UnconditionalLikelihoodNormalized(ChoicesSamplingMethod):
    """The option whose tokens gain most from the context: mean conditional minus unconditional logprob."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return True

    def __call__(
        self,
        *,
        choices: list[str],
        normalized_prompt_logprobs: list[float],
        input_token_logprobs: list[TokenScores],
        output_token_logprobs: list[TokenScores],
        unconditional_token_logprobs: list[TokenScores] | None = None,
    ) -> ChoicesDecision:
        if unconditional_token_logprobs is None:
            raise ValueError("unconditional_likelihood_normalized needs unconditional_token_logprobs")
        gains = [
            mean([(a[0] - b[0], a[1], None) for a, b in zip(given, alone, strict=True)])
            for given, alone in zip(input_token_logprobs, unconditional_token_logprobs, strict=True)
        ]
        best = max(range(len(choices)), key=gains.__getitem__)
        return ChoicesDecision(
            choices[best],
            {
                "normalized_prompt_logprobs": normalized_prompt_logprobs,
                "input_token_logprobs": input_token_logprobs,
                "output_token_logprobs": output_token_logprobs,
                "unconditional_token_logprobs": unconditional_token_logprobs,
                "normalized_unconditional_prompt_logprobs": gains,
            },
        )


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
