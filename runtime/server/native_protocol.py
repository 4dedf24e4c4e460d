"""SGLang's native requests, with every bound in the types."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from caesura.runtime.sampling import Constraint, SamplingParams
from caesura.runtime.server import limits
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.params import bias_of, constraint_of, seed_of, strings
from caesura.runtime.server.sessions import SessionParams
from msgspec import Meta

T = TypeVar("T")
DEFAULT_NEW_TOKENS = 128
ANY_JSON = "$$ANY$$"


class NativeSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``sampling_params`` of ``/generate``. Unlike elsewhere, unknown names are refused, as SGLang does."""

    max_new_tokens: limits.NewTokens | None = None
    min_new_tokens: limits.NewTokens | None = None
    n: limits.Choices | None = None
    temperature: limits.Temperature | None = None
    top_p: limits.Share | None = None
    top_k: limits.TopK | None = None
    min_p: limits.Share | None = None
    frequency_penalty: limits.Penalty | None = None
    presence_penalty: limits.Penalty | None = None
    repetition_penalty: limits.Repetition | None = None
    stop: limits.NativeStops | None = None
    stop_token_ids: limits.StopTokens | None = None
    stop_regex: limits.NativeStops | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    regex: limits.Grammar | None = None
    json_schema: limits.Grammar | None = None
    ebnf: limits.Grammar | None = None
    structural_tag: limits.Grammar | None = None
    logit_bias: limits.LogitBias | None = None
    sampling_seed: limits.Seed | None = None
    stream_interval: limits.NewTokens | None = None
    custom_params: dict[str, Any] | None = None
    beam_width: limits.Choices | None = None
    watermark: Any = None

    @property
    def new_tokens(self) -> int:
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def constraint(self) -> Constraint | None:
        """The grammar of the answer. May take a while: call it on a thread."""
        if self.structural_tag:
            raise ApiError(400, "structural_tag is not supported", param="sampling_params.structural_tag")
        schema = self.json_schema or None
        if schema == ANY_JSON:
            schema = '{"type": "object"}'
        return constraint_of(regex=self.regex or None, ebnf=self.ebnf or None, schema=schema)

    def params(
        self, *, new_tokens: int, logprobs: int | None, constraint: Constraint | None, choice: int
    ) -> SamplingParams:
        """The runtime's arguments for one choice."""
        return SamplingParams(
            max_new_tokens=new_tokens,
            min_new_tokens=min(self.min_new_tokens or 0, new_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or -1,
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=None if self.sampling_seed is None else seed_of(self.sampling_seed, choice),
            stop=strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop_regex=strings(self.stop_regex),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            logit_bias=bias_of(self.logit_bias),
            constraint=constraint,
            skip_special_tokens=self.skip_special_tokens is not False,
        )


_Prompts = Meta(min_length=1, max_length=limits.MAX_PROMPTS)
StartLen = Annotated[int, Meta(ge=-1, le=limits.MAX_PROMPT_TOKENS)]


class GenerateRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /generate``. Fields that may be lists hold one value for each prompt then."""

    text: limits.Text | Annotated[list[limits.Text], _Prompts] | None = None
    input_ids: (
        Annotated[
            list[limits.TokenId | limits.TokenIds],
            Meta(min_length=1, max_length=limits.MAX_PROMPT_TOKENS),
        ]
        | None
    ) = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], _Prompts] | None = None
    rid: limits.Name | Annotated[list[limits.Name], _Prompts] | None = None
    return_logprob: bool | Annotated[list[bool | None], _Prompts] | None = None
    logprob_start_len: StartLen | Annotated[list[StartLen | None], _Prompts] | None = None
    top_logprobs_num: limits.TopLogprobs | Annotated[list[limits.TopLogprobs | None], _Prompts] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    cache_salt: limits.Id | None = None
    extra_key: limits.Id | None = None
    session_params: SessionParams | None = None
    session_id: limits.Id | None = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    input_embeds: Any = None

    def check(self) -> None:
        """What the types cannot say."""
        if (self.text is None) == (self.input_ids is None):
            raise ApiError(400, "exactly one of text and input_ids must be given", param="text")
        if isinstance(self.rid, list) and len(set(self.rid)) < len(self.rid):
            raise ApiError(400, "rid names two prompts alike", param="rid")
        if self.session_params is not None:
            several = (
                isinstance(self.text, list) or isinstance(self.rid, list) or isinstance(self.sampling_params, list)
            )
            nested = self.input_ids is not None and any(isinstance(item, list) for item in self.input_ids)
            choices = self.sampling_params.n if isinstance(self.sampling_params, NativeSampling) else None
            if several or nested or (choices or 1) > 1:
                raise ApiError(400, "a request of a session has one prompt and one choice", param="session_params")
            if self.session_id is not None:
                raise ApiError(400, "session_id and session_params exclude each other", param="session_id")
        for name in ("image_data", "video_data", "audio_data", "input_embeds"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported, only text and input_ids", param=name)


def per_prompt(value: T | list[T | None] | list[T] | None, index: int, count: int, field: str) -> T | None:
    """The value for one prompt. Raises ApiError when a list is not as long as there are prompts."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise ApiError(400, f"{field} has {len(value)} entries for {count} prompts", param=field)
    return value[index]
