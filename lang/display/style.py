"""Colours and styles, the same in notebooks and in saved pages. The palette is the dashboard's, of Okabe and Ito."""

from __future__ import annotations

from importlib.resources import files

GENERATED = "16,163,127"
CONSTRAINED = "86,150,233"
TOOL = "230,159,0"
CACHED = "190,120,175"
CHOICE = "200,180,30"
GREY = "128,128,128"
ACTIONS = {"preserve": "86,180,233", "swap": "230,159,0", "discard": "213,94,0", "release": CACHED}

_COLOURS = {
    "generated": GENERATED,
    "constrained": CONSTRAINED,
    "tool": TOOL,
    "cached": CACHED,
    "choice": CHOICE,
    "grey": GREY,
    **ACTIONS,
}
_SHEET = " ".join(files("caesura.lang.display").joinpath("style.css").read_text(encoding="utf-8").split())
STYLE = f".cz {{ {' '.join(f'--{name}: {colour};' for name, colour in _COLOURS.items())} }} {_SHEET}"
