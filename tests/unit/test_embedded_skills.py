"""The embedded model's skills: teachers solve what is asked, tasks follow from their seed, splits are disjoint."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import pytest
from caesura.runtime.embedded.chat import FAILED_TEXT, NO_TOOL_TEXT, render
from caesura.runtime.embedded.data import HELD_OUT_WORDS, ConversationMaker, played, rounds_of, shown_turns
from caesura.runtime.embedded.phrases import NAMES
from caesura.runtime.embedded.skills import adventures
from caesura.runtime.embedded.skills.chores import CHORES, UNLEARNED, listing
from caesura.runtime.embedded.skills.mixture import SKILLS, held_out_task, misspell
from caesura.runtime.embedded.skills.offers import KINDS, offer, toolset, usual
from caesura.runtime.embedded.skills.task import Call, Task, Teacher, careful
from caesura.runtime.embedded.skills.world import FIRST_LETTERS, PIECES, World, split_of_text
from caesura.runtime.embedded.tasks import Split


def answer_of(teacher: Teacher, results: list[list[str]]) -> tuple[str, list[list[Call]]]:
    """A teacher's answer when its calls get these results, and the calls."""
    calls = []
    try:
        calls.append(next(teacher))
        for texts in results:
            calls += [teacher.send(list(texts))]
    except StopIteration as stop:
        return str(stop.value), calls
    raise AssertionError("the teacher wants more results")


def two_calls() -> Teacher:
    first, second = yield [Call("lookup", {"name": "Tolmenn", "field": "river"}), Call("weekday", {"date": "x"})]
    return f"{first} {second}"


@pytest.mark.parametrize("skill", list(SKILLS))
def test_a_teacher_solves_its_task(skill: str) -> None:
    answers: Counter[str] = Counter()
    for number in range(40):
        exam = held_out_task(7, number, skill)
        rounds, answer = rounds_of(exam.task, exam.world)
        assert answer == exam.answer
        assert exam.right(answer)
        assert not exam.right(answer + " Or so.")
        offered = {offer.tool for offer in exam.offers}
        assert {call.tool for calls, _ in rounds for call in calls} <= offered
        assert len({offer.name for offer in exam.offers}) == len(exam.offers)
        answers[answer] += 1
    if skill == "no_tool":
        assert set(answers) == {NO_TOOL_TEXT}
    elif skill == "recovery":
        assert 0 < answers[FAILED_TEXT] < 30
    elif skill == "surprise":  # an odd name may have no entry to go on with
        assert answers[FAILED_TEXT] < 10
    else:
        assert FAILED_TEXT not in answers


def test_tasks_follow_from_their_seed() -> None:
    for skill in SKILLS:
        first, again, other = (held_out_task(seed, 3, skill) for seed in (1, 1, 2))
        assert (first.task.question, first.answer, first.offers) == (again.task.question, again.answer, again.offers)
        assert first.task.question != other.task.question or skill == "no_tool"


def test_adventures_take_10_to_22_steps() -> None:
    lengths = [
        len(rounds_of(exam.task, exam.world)[0]) for exam in (held_out_task(5, n, "adventure") for n in range(30))
    ]
    assert 10 <= min(lengths) < max(lengths) <= 22


@pytest.mark.parametrize("seed", range(10))
def test_in_a_hard_adventure_the_treasure_is_to_be_told_from_what_lies_beside_it(seed: int) -> None:
    world = World(f"hard/{seed}", Split.TRAIN)
    text = render(played(adventures.adventure(world, hard=True), world, {"act": usual("act")}))
    (treasure,) = re.findall(r"bring the (\w+) to", text)
    (found,) = [here for here in re.findall(r"Here: ([^.]*)\.", text) if treasure in here.split(", ")]
    assert len(found.split(", ")) > 1


def test_some_adventures_of_a_training_are_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: set[bool] = set()

    def noted(world: World, *, begun: bool, hard: bool, mistakes: bool) -> Task:
        drawn.add(hard)
        return adventures.adventure(world, begun=begun, hard=hard, mistakes=mistakes)

    monkeypatch.setattr("caesura.runtime.embedded.data.adventure", noted)
    for seed in range(80):
        ConversationMaker(random.Random(seed)).make(1.0)
    assert drawn == {False, True}


def test_late_in_a_training_adventures_go_on_from_mistakes_that_are_not_learned() -> None:
    texts = [render(*ConversationMaker(random.Random(seed)).make(12.0, late=True)) for seed in range(150)]
    begin, end = UNLEARNED
    mistakes = [text for text in texts if f'"command": "{begin}unlock' in text]
    assert mistakes
    for text in mistakes:
        for told in text.split(f'"command": "{begin}unlock')[1:]:
            assert told.split("<tool_response>\n")[1].startswith("You cannot. ")
        assert "I have failed" not in text and text.count(begin) == text.count(end)
    earlier = [render(*ConversationMaker(random.Random(seed)).make(12.0)) for seed in range(150)]
    assert not any(f'"command": "{begin}' in text for text in earlier)
    assert sum("Play the adventure" in text for text in texts) > sum("Play the adventure" in text for text in earlier)


def test_late_in_a_training_more_sums_are_small() -> None:
    def drawn(*, late: bool) -> int:
        makers = (ConversationMaker(random.Random(seed)) for seed in range(400))
        texts = [render(*maker.make(12.0, late=late)) for maker in makers]
        return sum(re.search(r'": "\d\d? [-+*/] \d\d?"', text) is not None for text in texts)

    assert drawn(late=True) > 2 * drawn(late=False) > 0


@pytest.mark.parametrize("seed", range(10))
def test_every_command_of_an_adventure_follows_from_a_thing_that_is_listed(seed: int) -> None:
    world, act = World(f"moves/{seed}", Split.TRAIN), usual("act")
    messages = played(adventures.adventure(world), world, {"act": act})
    text = render(messages, [act.spec])
    moves = list(adventures.moves(text))
    commands = [message["tool_calls"][0]["function"]["arguments"]["command"] for message in messages[1:-1:2]]
    assert [text[slice(*move.command)] for move in moves] == commands
    for move in moves:
        thing, reason = text[slice(*move.thing)], text[slice(*move.reason)]
        assert reason in (thing, f"{thing} new") or re.fullmatch(rf"{thing} locked \(\w+ key\)", reason)
        assert move.reason in move.things
        assert move.reason[1] < move.command[0] < move.thing[0] < move.thing[1] == move.command[1]


def test_evaluation_shares_no_name_and_no_number_with_training() -> None:
    trained = "\n".join(render(*make(seed)) for seed in range(300))
    known = set(re.findall(r"[A-Za-z]+|\d{2,}", trained))
    for skill in ("lookup", "calculator", "units", "notebook"):
        for number in range(40):
            exam = held_out_task(9, number, skill)
            for word in re.findall(r"\d{3,}(?![.\d])", exam.task.question):
                assert split_of_text(word) is Split.HELD_OUT, exam.task.question
    for split in Split:
        entries = World(f"entries of {split}", split).encyclopedia.entries
        assert {split_of_text(name) for name in entries} == {split}
        assert {split_of_text(entry["population"]) for entry in entries.values() if "population" in entry} == {split}
    assert not known & set(NAMES["held_out"])


def test_training_says_no_word_of_the_evaluation() -> None:
    for number in range(60):
        world = World(f"train/{number}", Split.TRAIN, odd_share=1.0)
        said = [part for person in world.encyclopedia.people for part in person.split()]
        said += [world.run(Call("lookup", {"name": name, "field": "river"})) for name in world.encyclopedia.towns]
        said += [world.run(Call("calculator", {"expression": f"{number} + {more}"})) for more in range(20)]
        name = world.encyclopedia.people[0]
        said += misspell(world, Task(name, (), two_calls)).question.split()
        assert {split_of_text(text) for text in said} == {Split.TRAIN}


def test_a_note_is_right_when_it_is_the_teachers() -> None:
    exams = (held_out_task(7, number, "multi_hop") for number in range(200))
    exam = next(exam for exam in exams if exam.task.writes)
    (key,) = exam.task.writes
    for value, right in (("Wrong", False), (exam.notes[key], True)):
        exam.world.run(Call("put_note", {"key": key, "value": value}))
        assert exam.right("Noted.") == right


def make(seed: int):  # type: ignore[no-untyped-def]
    return ConversationMaker(random.Random(seed)).make(1.0)


def test_a_careful_teacher_corrects_once() -> None:
    suggestion = 'error: no entry "Tolmenn"; did you mean "Tolmen"?'
    answer, calls = answer_of(careful(two_calls()), [[suggestion, "Monday"], ["Sil"]])
    assert answer == "Sil Monday"
    assert calls[1] == [Call("lookup", {"name": "Tolmen", "field": "river"})]
    answer, calls = answer_of(careful(two_calls()), [["Sil", "Error: busy, try again"], ["Monday"]])
    assert (answer, calls[1]) == ("Sil Monday", [calls[0][1]])


@pytest.mark.parametrize(
    "results",
    [
        [["error: the tool failed", "Monday"]],
        [["error: timed out, try again", "error: cancelled"]],
        [["error: timed out, try again", "Monday"], ["error: timed out, try again"]],
    ],
)
def test_a_careful_teacher_gives_up(results: list[list[str]]) -> None:
    assert answer_of(careful(two_calls()), results)[0] == FAILED_TEXT


def test_odd_results_and_faults_are_the_same_for_the_same_call() -> None:
    call = Call("calculator", {"expression": "2 + 2"})
    odd = [World("w", Split.TRAIN, odd_share=1.0).run(call) for _ in range(2)]
    assert odd[0] == odd[1] != "4"
    failing = World("w", Split.TRAIN, fault_share=1.0)
    assert failing.run(call).lower().startswith("error: ")
    assert World("w", Split.TRAIN).run(call) == "4"


@pytest.mark.parametrize(("split", "least", "most"), [(Split.TRAIN, 240, 290), (Split.HELD_OUT, 70, 150)])
def test_offers_rename_tools_and_arguments_in_calls_and_declarations(split: Split, least: int, most: int) -> None:
    """In training the usual name is the exception; in the evaluation it is the rule."""
    rng = random.Random(1)
    renamed = 0
    for _ in range(300):
        offers = toolset(("convert", "lookup"), rng, split, distractors=3, without=("search",))
        assert len(offers) == 5
        assert "search" not in {offer.tool for offer in offers}
        (units,) = (offer for offer in offers if offer.tool == "convert")
        shown = units.shown(Call("convert", {"value": 2, "from_unit": "km", "to_unit": "m"}))["function"]
        assert shown["name"] == units.name == units.spec["function"]["name"]
        assert list(shown["arguments"]) == list(units.spec["function"]["parameters"]["properties"])
        renamed += units.name != "convert"
    assert least < renamed < most
    assert usual("convert").name == "convert"
    for kind in KINDS.values():
        assert not set(kind.names) & set(kind.held_out_names)


def test_training_never_makes_up_a_held_out_word() -> None:
    pieces = [*PIECES, *map("".join, itertools.product(PIECES, repeat=2))]
    words = {first + rest for first, rest in itertools.product(FIRST_LETTERS, pieces)}
    held_out = adventures.HELD_OUT
    assert not words & {*held_out.rooms, *held_out.treasures, *held_out.metals, *held_out.decoys}
    rng = random.Random(1)
    names = {offer("weekday", rng, Split.TRAIN).name for _ in range(20_000)}
    assert not names & {name for kind in KINDS.values() for name in kind.held_out_names}


def test_adventures_are_told_in_words_of_pieces_and_none_that_is_held_out() -> None:
    pieces, said = ["nick", "el", "bar", "n", "key", "go"], set()
    for number in range(60):
        world = World(f"pieces/{number}", Split.TRAIN, pieces=pieces, never=HELD_OUT_WORDS)
        said |= set(re.findall(r"\w+", adventures.adventure(world).question.lower()))
    assert sum(bool(re.fullmatch(f"({'|'.join(pieces)}){{2,3}}", word)) for word in said) > 30
    assert not said & {"nickel", "barn"}


def test_nothing_in_an_adventure_is_called_by_a_word_that_observations_are_made_of() -> None:
    for number in range(20):
        world = World(f"reserved/{number}", Split.TRAIN, pieces=["do", "or"])
        assert "door" not in re.findall(r"\w+", adventures.adventure(world).question.split(".")[0])


def test_made_up_names_have_the_spelling_of_those_that_programs_use() -> None:
    """A token that no name in training has is one that the model cannot copy."""
    rng = random.Random(1)
    names = "\n".join({offer("weekday", rng, Split.TRAIN).name for _ in range(20_000)})
    held_out = {name for kind in KINDS.values() for name in kind.held_out_names}
    triples = {word[at : at + 3] for name in held_out for word in name.split("_") for at in range(len(word) - 2)}
    missing = {triple for triple in triples if triple not in names}
    assert len(missing) < len(triples) / 50, missing


def test_a_declaration_gives_each_argument_the_type_its_tool_takes() -> None:
    """A grammar holds calls to these types: a note must not have to be a number because a measurement is one."""
    types = {
        tool: {k: v["type"] for k, v in usual(tool).spec["function"]["parameters"]["properties"].items()}
        for tool in ("convert", "add_days", "put_note")
    }
    assert types == {
        "convert": {"value": "number", "from_unit": "string", "to_unit": "string"},
        "add_days": {"date": "string", "days": "integer"},
        "put_note": {"key": "string", "value": "string"},
    }


def test_every_chore_renders() -> None:
    for chore, _ in CHORES:
        for number in range(20):
            messages, tools = chore(World(f"chore/{number}", Split.TRAIN))
            assert messages[-1]["role"] == "assistant"
            assert render(messages, tools).endswith("<|im_end|>\n")


def test_a_listing_copies_words_and_none_that_is_held_out() -> None:
    words = set()
    pieces = ["nick", "Nick", "el", "con", "version", "conversion", "Wanda", "tul", "ips"]
    for number in range(200):
        messages, tools = listing(World(f"listing/{number}", Split.TRAIN, pieces=pieces, never=HELD_OUT_WORDS))
        asked, answer = (message["content"] for message in messages)
        listed = asked.split(": ", 1)[1].split(", ")
        assert answer in (json.dumps(listed), ", ".join(listed))
        assert not tools
        words |= set(listed)
    assert {"version", "elversion", "conversionel"} <= words
    assert not words & {"nickel", "Nickel", "conversion", "Wanda", "tulips"}


def test_shown_turns_hold_parallel_calls_in_one_turn() -> None:
    exam = held_out_task(1, 0, "parallel")
    rounds, answer = rounds_of(exam.task, exam.world)
    messages = shown_turns(exam.task.question, rounds, answer, {offer.tool: offer for offer in exam.offers})
    assert [message["role"] for message in messages[:2]] == ["user", "assistant"]
    assert len(messages[1]["tool_calls"]) == len(rounds[0][0]) >= 2
    assert messages[-1]["content"] == answer
