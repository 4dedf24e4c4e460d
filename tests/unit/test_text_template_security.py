"""Hostile templates: no way into Python, no endless work, no flood of output."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
from caesura.runtime.errors import TemplateError
from caesura.runtime.text.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.__class__ }}",
    "{{ messages[0].__class__.__init__.__globals__ }}",
    "{{ messages[0].content.mask }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ dict.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).x }}",
    "{{ [''] | map(attribute='__class__') | list }}{{ ([''] | map(attribute='__class__') | first).x }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format(messages[0].content) }}",
    "{{ '{x.__init__.__globals__}'.format_map({'x': cycler}) }}",
    "{% set ns = namespace(_x=1) %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% extends 'base' %}",
    "{{ caller.__globals__ }}",
    "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{{ loop._iterable }}{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
    "{{ (messages|tojson).__class__ }}",
    "{{ undefined_name.__class__.__mro__ }}",
    "{{ (1).__class__ }}",
    "{{ (1.5).real.__class__ }}",
    "{{ none.__class__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{% set x = messages[0].content.split %}{{ x.__func__.__globals__ }}",
]

FLOODS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% set x = i %}{% endfor %}{% endfor %}{% endfor %}",  # noqa: E501
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{% for i in range(9) %}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=['ab']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x]|join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{% for i in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
    "{{ range(99999) | list | tojson(indent=999999) }}{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",  # noqa: E501
    "{{ 'x'.zfill(999999999) }}",
    "{{ 'x'.expandtabs(999999999) }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% set f = ''.format %}{{ f.__self__ }}",
        "{% macro m() %}{{ caller }}{% endmacro %}{{ m.__globals__ }}",
        "{{ ''|attr('__class__') }}",
    ],
)
def test_what_is_not_there_prints_nothing(source: str) -> None:
    with contextlib.suppress(TemplateError):
        assert ChatTemplate(source).render(MESSAGES) == ""


@pytest.mark.parametrize("source", FLOODS)
def test_work_is_bounded(source: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TemplateError):
        ChatTemplate(source, deadline_s=0.3).render(MESSAGES)
    assert time.monotonic() - begun < 5


def test_an_endless_template_meets_its_deadline_and_ends() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, deadline_s=0.2)
    with pytest.raises(TemplateError, match=r"deadline|finish within"):
        template.render(MESSAGES)
    for _ in range(100):
        if not any(thread.name == "chat-template" for thread in threading.enumerate()):
            return
        time.sleep(0.02)
    pytest.fail("the thread of a late template keeps running")


def test_messages_are_not_changed() -> None:
    messages: list[Any] = [{"role": "user", "content": "x", "tool_calls": [{"a": [1]}]}]
    ChatTemplate("{% for m in messages %}{% set m = 1 %}{% endfor %}").render(messages)
    assert messages == [{"role": "user", "content": "x", "tool_calls": [{"a": [1]}]}]


def test_honest_tools_of_templates_still_work() -> None:
    source = (
        "{%- set ns = namespace(found=false) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.found = true -%}{%- break -%}{%- endif -%}{%- endfor -%}"
        "{{- ns.found }} {{ range(3) | list }} {{ dict(a=1).a }} {{ 'a,b'.split(',') | join('-') }} "
        "{{ '%03d' % 7 }} {{ '{:>4}'.format('x') }} {{ 2 ** 10 }} {{ loop is defined }} "
        "{% for x in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}{% endfor %} "
        "{% generation %}{{ messages[0]['content'][::-1] }}{% endgeneration %} {{ {'b': 1, 'a': '<'} | tojson }} "
        "{{ strftime_now('%Y') | length }}"
    )
    assert ChatTemplate(source).render(MESSAGES) == (
        'True [0, 1, 2] 1 a-b 007    x 1024 False 1/3,2/3,3/3 olleh {"b": 1, "a": "<"} 4'
    )
