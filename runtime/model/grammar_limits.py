"""What a grammar may ask of the compiler. Intersecting regular expressions takes time that doubles with each one, the
compiler's own limits do not see all of it, and nothing can stop a compilation that has begun.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from caesura.runtime.errors import GrammarError

MAX_INTERSECTED = 12  # patterns that one string must match at once; 16 take 0.1 s, 20 take 2 s, 24 half a minute
# an open one to the end of its line: sought again from each mark in it, a long line would take forever
_LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*|/(?:\\.|[^/\\\n])+/?')
_COMBINING = ("allOf", "anyOf", "oneOf")
_EMBEDDED = re.compile(r"%json\s*(?=\{)")


def check_schema(schema: Any, name: str) -> None:
    """Raise GrammarError for a schema in which more than MAX_INTERSECTED patterns may hold one string."""
    count = _Conjunctions(schema).of(schema)
    if count > MAX_INTERSECTED:
        raise GrammarError(
            f"{name} holds one value to up to {count} patterns at once; at most {MAX_INTERSECTED} can be intersected"
        )


def check_lark(source: str) -> None:
    """The same for the terminals of a Lark grammar, and for the schemas in it."""
    count = 1 + _LITERAL.sub("", source).count("&")
    if count > MAX_INTERSECTED:
        raise GrammarError(f"ebnf intersects {count} terms with '&'; at most {MAX_INTERSECTED} are compiled")
    for place in _EMBEDDED.finditer(source):
        try:
            schema, _ = json.JSONDecoder().raw_decode(source, place.end())
        except ValueError:
            continue  # the compiler says what is wrong with it
        check_schema(schema, "a schema in the ebnf")


class _Conjunctions:
    """Counts, from above, the patterns that hold one value: those of ``allOf`` and of references add up with a schema's
    own and with the largest of its alternatives; members and items are other values."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, int] = {}
        self._everything: int | None = None

    def of(self, schema: Any) -> int:
        if isinstance(schema, list):
            return max(map(self.of, schema), default=0)
        if not isinstance(schema, dict):
            return 0
        if id(schema) not in self._known:
            self._known[id(schema)] = 0  # a reference back to here asks for nothing new
            own = isinstance(schema.get("pattern"), str)
            parts = [*schema["allOf"]] if isinstance(schema.get("allOf"), list) else []
            parts += [schema.get("anyOf"), schema.get("oneOf")]  # of each, the largest alternative
            others = max((self.of(value) for key, value in schema.items() if key not in _COMBINING), default=0)
            self._known[id(schema)] = own + sum(map(self.of, parts)) + self._behind(schema.get("$ref")) + others
        return self._known[id(schema)]

    def _behind(self, reference: Any) -> int:
        """The patterns that a reference asks for; all there are when it is not clear where it leads."""
        if not isinstance(reference, str):
            return 0
        found = self._root
        for part in unquote(reference).removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                found = found.get(part) if isinstance(found, dict) else None
        clear = found is not None and (reference == "#" or reference.startswith("#/"))
        if clear:
            return self.of(found)
        if self._everything is None:
            self._everything = _patterns(self._root)
        return self._everything


def _patterns(schema: Any) -> int:
    """All patterns of a document."""
    if isinstance(schema, dict):
        return isinstance(schema.get("pattern"), str) + sum(map(_patterns, schema.values()))
    return sum(map(_patterns, schema)) if isinstance(schema, list) else 0
