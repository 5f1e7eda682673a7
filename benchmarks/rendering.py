"""What every rendered table shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def made_by(result: dict[str, Any]) -> str:
    """The machine and the command of a result, and a note that goes when it is measured again."""
    m, note = result["machine"], result.get("note", "")
    made = f"`{m['command']}` on {m['cpu']}, {m['threads']} threads, torch {m['torch']}."
    return f"{made} {note}".strip()
