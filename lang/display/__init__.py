"""How programs, states, traces and decisions look in a notebook: static HTML without scripts.

Texts are escaped by their type (`markup.Markup`). Colours are tints that lie on any background, so light and dark need
no telling apart; where a code host takes the styles away, tables, bold and folded details still say everything.
"""

from __future__ import annotations

from caesura.lang.display.kv_tree import TreePicture
from caesura.lang.display.live import watch

__all__ = ["TreePicture", "watch"]
