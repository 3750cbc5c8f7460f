"""Turns of a conversation -> items: each turn that answers somebody, with what was said before it.

Every chat format ends here, so that a reply looks the same whatever app it was typed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

NUM_TURNS_BEFORE = 3


@dataclass(frozen=True)
class Turn:
    """What one person said at once. `time` is as the source has it, or None."""

    turn_id: str
    speaker: str
    text: str
    time: Any = None


def reply_items(turns: Iterable[Turn]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(speaker, item) for every turn that has another speaker's among the three before it; blank turns are left out."""
    said: list[Turn] = []
    for turn in turns:
        if not turn.text.strip():
            continue
        before = said[-NUM_TURNS_BEFORE:]
        if any(one.speaker != turn.speaker for one in before):
            context = [f"{'You' if one.speaker == turn.speaker else 'Partner'}: {one.text}" for one in before]
            yield turn.speaker, {"id": turn.turn_id, "time": turn.time, "context": context, "text": turn.text}
        said.append(turn)


def joined(turns: Iterable[Turn]) -> Iterator[Turn]:
    """Turns with all that one speaker said in a row as one: in messengers people press Enter often."""
    open_turn: Turn | None = None
    for turn in turns:
        if open_turn and open_turn.speaker == turn.speaker:
            open_turn = replace(open_turn, text=f"{open_turn.text}\n{turn.text}".strip())
            continue
        if open_turn:
            yield open_turn
        open_turn = turn
    if open_turn:
        yield open_turn
