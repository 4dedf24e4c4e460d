"""Machines to simulate: what their iterations and copies cost, what their pools hold, and where each figure is from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from caesura.runtime.executors.cost import MachineCosts
from caesura.scheduler.profile import CostProfile

FREE_COPIES = "+free-copies"  # after a machine's name: the same with a link that takes no time and a host without end
ENDLESS_TOKENS = 1 << 22  # a pool in which nothing is ever given up
FOLDER = Path(__file__).parent / "machines"  # measured ones, written by ``python -m benchmarks calibrate``


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine with a model. ``token_bytes``: KV of one token. ``given``, ``assumed``: whence the figures are."""

    name: str
    costs: MachineCosts
    saturation_tokens: int
    max_step_tokens: int
    max_running: int
    kv_tokens: int
    host_tokens: int
    token_bytes: int
    page_size: int
    given: str
    assumed: str
    threads: int | None = None  # of a measured machine: what the engine may use, None for its own choice
    device: str = "cpu"  # of a measured machine: where the model computes
    dtype: str = "float32"

    @property
    def profile(self) -> CostProfile:
        """What the policies are told."""
        return self.costs.profile(self.saturation_tokens, self.name)

    def sized(self, kv_tokens: int | None, host_tokens: int | None) -> Machine:
        """The same machine with other pools."""
        return replace(
            self,
            kv_tokens=self.kv_tokens if kv_tokens is None else kv_tokens,
            host_tokens=self.host_tokens if host_tokens is None else host_tokens,
        )


def _a100(
    name: str, step_s: float, row_s: float, hidden_copy_tokens: int, *, token_bytes: int, kv: int, host: int, what: str
) -> Machine:
    """Figures of the InferCept artifact: iteration time, S, and tokens that copy for free behind a full iteration."""
    saturation = 384
    copy_token_s = (step_s + saturation * row_s) / hidden_copy_tokens
    return Machine(
        name=name,
        costs=MachineCosts(step_s, row_s, 0.0, copy_token_s),
        saturation_tokens=saturation,
        max_step_tokens=saturation,
        max_running=256,
        kv_tokens=kv,
        host_tokens=host,
        token_bytes=token_bytes,
        page_size=16,
        given=f"iteration time, S = 384 and free copy of {hidden_copy_tokens} tokens an iteration (InferCept's "
        f"artifact, {what}); host memory 128 GiB (its scripts)",
        assumed="80 GB A100s of which 90 % are used, less weights and 2 GB a card for activations; no cost for the "
        "depth of attention (its contexts end at 2,048 tokens); copies cost in proportion, on one link for both ways",
    )


def _long(machine: Machine, name: str, *, flops_pair: float, flops_s: float, bytes_s: float) -> Machine:
    """The same machine with a price for long contexts, derived and not measured."""
    pair_s, read_s = flops_pair / flops_s, machine.token_bytes / bytes_s
    return replace(
        machine,
        name=name,
        costs=replace(machine.costs, pair_s=pair_s, read_s=read_s),
        assumed=f"{machine.assumed}. Instead of no cost of depth: attention computes {flops_pair:.3g} operations a "
        f"pair of tokens at {flops_s:.3g} a second and reads the context once a step at {bytes_s:.3g} bytes a second",
    )


GPTJ = _a100(
    "gptj-6b-a100",
    0.010,
    0.0463e-3,
    605,
    token_bytes=28 * 2 * 4096 * 2,
    kv=126_000,
    host=299_000,
    what="GPT-J-6B on one A100",
)
LLAMA_13B = _a100(
    "13b-2a100",
    0.0154,
    0.0279e-3,
    319,
    token_bytes=40 * 2 * 5120 * 2,
    kv=139_000,
    host=167_000,
    what="13B on two A100s, tensor parallel",
)
GPTJ_LONG = _long(GPTJ, "gptj-6b-a100-long", flops_pair=4 * 4096 * 28, flops_s=150e12, bytes_s=1.5e12)

PUBLISHED = {machine.name: machine for machine in (GPTJ, GPTJ_LONG, LLAMA_13B)}


def machine_names() -> list[str]:
    """Published ones and those measured here."""
    return [*PUBLISHED, *sorted(path.stem for path in FOLDER.glob("*.json"))]


def find_machine(name: str) -> Machine:
    """A published machine, a measured one, or a file of ``write_machine``. ValueError names what there is."""
    if name.endswith(FREE_COPIES):
        machine = find_machine(name.removesuffix(FREE_COPIES))
        costs = replace(machine.costs, copy_base_s=0.0, copy_token_s=0.0)
        return replace(machine, name=name, costs=costs, host_tokens=ENDLESS_TOKENS)
    if name in PUBLISHED:
        return PUBLISHED[name]
    for path in (FOLDER / f"{name}.json", Path(name)):
        if path.is_file():
            return read_machine(path)
    raise ValueError(f"profile is {name!r}; it must be a file or one of {', '.join(machine_names())}")


def read_machine(path: Path) -> Machine:
    """A machine from its file. ValueError says which field is wrong."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return Machine(**{**record, "costs": MachineCosts(**record["costs"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path.name} is no machine profile: {error}; write one with python -m benchmarks calibrate"
        ) from None


def write_machine(machine: Machine, path: Path) -> None:
    """One JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(machine), indent=2) + "\n")
