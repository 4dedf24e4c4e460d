"""A notebook of keys and values."""

from __future__ import annotations

from caesura.runtime.embedded.tools.fault import ToolFault, unknown

MAX_NOTES = 1000
MAX_NOTE_CHARS = 1000


class Notebook:
    """Notes by key, in the order they were first written. Its methods are tools."""

    def __init__(self, notes: dict[str, str] | None = None) -> None:
        self.notes: dict[str, str] = dict(notes or {})

    def put_note(self, key: str, value: str) -> str:
        """Save a note."""
        if not key or len(key) + len(value) > MAX_NOTE_CHARS:
            raise ToolFault(f"a note needs a key, and at most {MAX_NOTE_CHARS} characters in all")
        if key not in self.notes and len(self.notes) >= MAX_NOTES:
            raise ToolFault(f"the notebook is full: it holds {MAX_NOTES} notes")
        self.notes[key] = value
        return "saved"

    def get_note(self, key: str) -> str:
        """Read a note."""
        if key not in self.notes:
            raise unknown("note", key, self.notes)
        return self.notes[key]

    def list_notes(self) -> str:
        """List the keys of all notes."""
        return ", ".join(self.notes) or "none"
