"""The shipped checkpoint answers held-out questions with the calculator, and only with it; it is plain Hugging Face."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from caesura.runtime.embedded import FILES, checkpoint_path
from caesura.runtime.embedded.attention import attend
from caesura.runtime.embedded.chat import CALCULATOR_TOOL, CHAT_TEMPLATE, TURN_END, calls_message, render
from caesura.runtime.embedded.data import ConversationMaker
from caesura.runtime.embedded.evaluate import Chat, ask_each, ask_in_a_row, copies_results
from caesura.runtime.embedded.examine import Attempt, Report, Terms
from caesura.runtime.embedded.examples import Example, encode_example
from caesura.runtime.embedded.muon import Muon
from caesura.runtime.embedded.net import Cache, Shape, TinyLlama, load_net
from caesura.runtime.embedded.skills.mixture import held_out_task
from caesura.runtime.embedded.tasks import Split, make_tasks
from caesura.runtime.embedded.train import export
from caesura.runtime.embedded.trainer import Recipe, Trainer
from caesura.runtime.service import EngineService
from caesura.runtime.text.template import ChatTemplate
from rich.console import Console
from tokenizers import Tokenizer

MAX_CHECKPOINT_BYTES = 16 * 1024 * 1024
TASKS = make_tasks(77, 30, Split.HELD_OUT)


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoint_path()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[TinyLlama]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # single rows of a tiny model: a second thread only costs
    yield load_net(folder)
    torch.set_num_threads(threads)


def test_folder_is_complete_and_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_CHECKPOINT_BYTES
    assert {path.name for path in folder.iterdir()} == {*FILES, "eval.json"}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE


def test_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    for text in ("What is 4827 * 396?", "ünïcödé \U0001f600\n\ttabs  and   spaces ", '{"a": [1, {"b": "c"}]}', ""):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("907314", add_special_tokens=False).ids) == 6
    tag = tokenizer.encode("<tool_call>", add_special_tokens=False).ids
    assert len(tag) == 1
    assert tokenizer.decode(tag, skip_special_tokens=True) == "<tool_call>"
    end = tokenizer.encode("<|im_end|>", add_special_tokens=False).ids
    assert len(end) == 1
    assert tokenizer.decode(end, skip_special_tokens=True) == ""


def test_engine_and_servers_tokenize_what_the_model_was_trained_on(tokenizer: Tokenizer) -> None:
    """They tokenize a template's words apart from what is said between them."""
    template = ChatTemplate(CHAT_TEMPLATE, eos_token=TURN_END)
    maker = ConversationMaker(random.Random(3))
    for _ in range(50):
        messages, tools = maker.make(1.0)
        pieces = [piece.text for piece in template.pieces(messages, tools=tools or None)]
        apart = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert apart == tokenizer.encode(render(messages, tools), add_special_tokens=False).ids


def test_only_assistant_turns_are_learned(tokenizer: Tokenizer) -> None:
    messages, tools = ConversationMaker(random.Random(3)).make(1.0)
    example = encode_example(tokenizer, render(messages, tools))
    learned = tokenizer.decode(
        [token for token, own in zip(example.ids, example.learn, strict=True) if own], skip_special_tokens=False
    )
    own_turns = [render([m]).removeprefix("<|im_start|>assistant\n") for m in messages if m["role"] == "assistant"]
    assert learned == "".join(turn.removesuffix("\n") for turn in own_turns)


def test_answers_with_the_calculator(model: TinyLlama, tokenizer: Tokenizer) -> None:
    score = ask_each(model, tokenizer, TASKS, "with")
    assert score.share >= 0.9, score


def test_needs_the_calculator(model: TinyLlama, tokenizer: Tokenizer) -> None:
    score = ask_each(model, tokenizer, TASKS, "without", with_tool=False)
    assert score.share <= 0.2, score


def test_answers_several_questions_after_a_long_prompt(model: TinyLlama, tokenizer: Tokenizer) -> None:
    score = ask_in_a_row(model, tokenizer, TASKS[:20], "row", questions=5, sentences=20)
    assert score.share >= 0.85, score
    assert score.context_tokens > 500


def test_answers_from_the_result_and_not_from_its_head(model: TinyLlama, tokenizer: Tokenizer) -> None:
    score = copies_results(model, tokenizer, TASKS[:20], "odd")
    assert score.share >= 0.9, score


def test_re_rendering_is_token_exact(model: TinyLlama, tokenizer: Tokenizer) -> None:
    """What the model wrote is what the template makes of it: a context can go on after a round trip through text."""
    chat = Chat(model, tokenizer)
    for task in TASKS[:4]:
        chat.ask(task.question)
    text = render(chat.messages, [CALCULATOR_TOOL])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # the end of the last turn and its newline are the template's
    assert chat.token_ids == ids[: len(chat.token_ids)]
    assert len(ids) - len(chat.token_ids) <= 3


def test_training_is_reproducible_resumes_and_exports_what_it_trained(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caesura.runtime.embedded.trainer.POOL", 8)  # so that the four steps are of several pools
    shape = Shape(vocab=tokenizer.get_vocab_size(), hidden=32, layers=2, heads=2, kv_heads=2, intermediate=64)
    console = Console(quiet=True)

    def trainer(seed: int) -> Trainer:
        return Trainer(Recipe(seed=seed, rates=((0, 0.0), (2, 1.0), (4, 0.1)), batch_tokens=512), shape, tokenizer)

    models = [trainer(seed) for seed in (1, 1, 2)]
    for each in models:
        assert list(each.run(console)) == [1, 2, 3, 4]
    first, again, other = (each.model.model.embed_tokens.weight for each in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    halted = trainer(1)
    for step in halted.run(console):
        if step == 2:
            halted.save(tmp_path / "state")
            break
    resumed = trainer(1)
    resumed.load(tmp_path / "state")
    assert list(resumed.run(console)) == [3, 4]
    assert torch.equal(resumed.model.model.embed_tokens.weight, first)
    resumed.save(tmp_path / "state")
    finished = trainer(1)
    finished.load(tmp_path / "state")
    assert not list(finished.run(console))
    with pytest.raises(ValueError, match="training with seed 1, and this one has 2"):
        trainer(2).load(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["state.safetensors"]

    export(models[0].model, tokenizer, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.equal(load_net(tmp_path / "out").hidden_states(ids), models[0].model.hidden_states(ids))


def made_freely(skill: str, tool: str, body: str) -> tuple[str, Report]:
    """What becomes of a call without a grammar; NAME and the tool's own arguments stand for those on offer."""
    exam, report = held_out_task(1, 0, skill), Report()
    offer = next(offer for offer in exam.offers if offer.tool == tool)
    for own, shown in {"NAME": offer.name, **offer.arguments}.items():
        body = body.replace(own, shown)
    attempt = Attempt(cast("EngineService", None), exam, Terms.FREE, report)
    return attempt._result(f"{body}</tool_call>"), report


@pytest.mark.parametrize(
    "body",
    [
        '{"name": ["NAME"], "arguments": {}}',
        '{"name": "NAME", "arguments": null}',
        '{"name": "NAME", "arguments": {"expression": ["1"]}}',
        '{"name": "NAME", "arguments": {"expression": 5}}',
        '{"name": "NAME", "arguments": {"expression": NaN}}',
        '{"name": "NAME", "arguments": {"expression": "\\ud800"}}',
        "[" * 100_000,
    ],
)
def test_a_call_that_no_tool_takes_is_malformed(body: str) -> None:
    result, report = made_freely("calculator", "calculator", body)
    assert result.startswith("error: ")
    assert (report.free_calls, report.malformed_calls) == (1, 1)


def test_what_a_tool_cannot_take_is_an_error_for_the_model() -> None:
    values = '{"value": 1e308, "from_unit": "km", "to_unit": "mm"}'
    result, report = made_freely("units", "convert", f'{{"name": "NAME", "arguments": {values}}}')
    assert result.startswith("error: ")
    assert (report.free_calls, report.malformed_calls) == (1, 0)


def test_what_was_wrong_comes_again_until_it_is_right_and_at_most_twice(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = Example([5, 6, 7, 8], [False, False, False, True])
    torn = [Example([9, 10, end], [False, False, True]) for end in (11, 12)]  # one of them is always wrong
    pools: list[list[Example]] = []

    def drawn(_: Tokenizer, rng: random.Random, progress: float, again: list[Example], **__: int) -> Any:
        pools.append(again)
        yield [[easy, *torn, *again]]

    monkeypatch.setattr("caesura.runtime.embedded.trainer.batches", drawn)
    shape = Shape(vocab=tokenizer.get_vocab_size(), hidden=32, layers=1, heads=1, kv_heads=1, intermediate=32)
    for _ in Trainer(Recipe(rates=((0, 1.0), (60, 0.1)), lr=0.03), shape, tokenizer).run(Console(quiet=True)):
        pass
    assert pools[0] == []
    assert replace(easy, asked=1) in pools[1]
    assert replace(easy, asked=2) in pools[2]
    for pool in pools[-5:]:
        assert easy.ids not in [example.ids for example in pool]
        assert {example.ids[2] for example in pool} & {11, 12}
    assert {example.asked for pool in pools for example in pool} == {1, 2}


def test_nothing_is_learned_of_what_has_become_easy(tokenizer: Tokenizer) -> None:
    easy = [Example([5, 6, 7, 8], [False, False, False, True])]
    torn = [Example([9, 10, end], [False, False, True]) for end in (11, 12)]
    shape = Shape(vocab=tokenizer.get_vocab_size(), hidden=32, layers=1, heads=1, kv_heads=1, intermediate=32)
    trainer = Trainer(Recipe(rates=((0, 1.0), (60, 1.0)), lr=0.03), shape, tokenizer)
    for _ in range(40):
        trainer.update([easy, torn])
    weights = trainer.model.model.embed_tokens.weight.detach()

    def change(*batch: list[Example]) -> float:
        before = weights.clone()
        trainer.update(list(batch))
        return float((weights - before).abs().max())

    assert change(easy) == 0.0
    assert change(torn) > 0.0
    assert change(easy, torn) > 0.0


def test_the_last_layer_computes_what_is_wanted_alone(model: TinyLlama) -> None:
    ids = torch.randint(0, model.shape.vocab, (2, 40), generator=torch.Generator().manual_seed(2))
    wanted = torch.tensor([3, 39, 40, 77])
    with torch.no_grad():
        whole, some = model.hidden_states(ids), model.hidden_states(ids, wanted=wanted)
    torch.testing.assert_close(some, whole.flatten(0, 1)[wanted], atol=1e-5, rtol=1e-4)


def test_muon_is_muon() -> None:
    """Updates near those of torch's, which orthogonalizes each matrix by itself in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(24, 24), (40, 24), (24, 40), (24, 24)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers: list[torch.optim.Optimizer] = [
        Muon(ours, lr=0.1, weight_decay=0.05),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for before, mine, wanted in zip(start, ours, theirs, strict=True):
        moved, expected = (mine - before).flatten(), (wanted - before).flatten()
        assert F.cosine_similarity(moved, expected, dim=0) > 0.999
        torch.testing.assert_close(moved.norm(), expected.norm(), rtol=0.01, atol=0.0)
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.zeros(3)], lr=0.1, weight_decay=0.0)


def test_attention_for_training_is_attention() -> None:
    """Over several blocks of queries, and its gradients."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 3, 300, 16, generator=generator, requires_grad=True) for _ in range(3)]
    wanted = F.scaled_dot_product_attention(*inputs, is_causal=True)
    got = attend(*inputs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    weights = torch.randn(wanted.shape, generator=generator)
    expected = torch.autograd.grad((wanted * weights).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), inputs), expected, atol=1e-4, rtol=1e-3)


def test_key_value_cache_changes_nothing(model: TinyLlama) -> None:
    ids = torch.randint(0, model.shape.vocab, (1, 40), generator=torch.Generator().manual_seed(1))
    cache = Cache([], [])
    with torch.inference_mode():
        whole = model.hidden_states(ids)
        parts = torch.cat([model.hidden_states(part, cache) for part in ids.split((17, 1, 22), dim=1)], dim=1)
        cache.crop(10)
        redone = model.hidden_states(ids[:, 10:], cache)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(redone, whole[:, 10:], atol=1e-4, rtol=1e-4)


def test_transformers_agrees(folder: Path, model: TinyLlama, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TASKS[0].question}]
    text = their_tokenizer.apply_chat_template(
        messages, tools=[CALCULATOR_TOOL], add_generation_prompt=True, tokenize=False
    )
    assert text == render(messages, [CALCULATOR_TOOL], add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
    assert their_tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.inference_mode():
        ours = model.logits(model.hidden_states(ids))
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=1e-4)
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
    assert their_tokenizer.decode(written, skip_special_tokens=True) == render(
        [calls_message(TASKS[0].calls[: None if TASKS[0].kind == "parallel" else 1])]
    ).removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
