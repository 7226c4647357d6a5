"""What people prefer, as rows: one answer judged good or bad (KTO's form), or one of two chosen (DPO's form).

    {"prompt": [messages], "completion": [messages], "label": true}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}

The prompt ends with what is answered; the rest is the assistant's turn. trl reads both forms as they are.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import os_errors
from danlu.data.conversations import Messages, check_messages

KEYS = {"judged": {"prompt", "completion", "label"}, "pair": {"prompt", "chosen", "rejected"}}
"""Form → the keys that a row of it must have; "model" and "made" may stand beside them."""
BESIDE = {"model", "made"}


def form_of(row: dict[str, Any]) -> str | None:
    """judged, pair, or None."""
    return next((name for name, keys in KEYS.items() if keys <= row.keys()), None)


def check_preference(row: Any, where: str) -> dict[str, Any]:
    """The row itself, where it is one of the two forms. Raises UserError that names the place."""
    form = form_of(row) if isinstance(row, dict) else None
    if form is None:
        wanted = " or ".join(", ".join(sorted(keys)) for keys in KEYS.values())
        raise UserError(f"{where}: not a preference", f"a row has {wanted}")
    if unknown := sorted(row.keys() - KEYS[form] - BESIDE):
        raise UserError(f'{where}: unknown key "{unknown[0]}"', f"known: {', '.join(sorted(KEYS[form]))}")
    _check_prompt(check_messages(row["prompt"], f"{where}, prompt"), f"{where}, prompt")
    for name in sorted(KEYS[form] - {"prompt", "label"}):
        _check_answer(check_messages(row[name], f"{where}, {name}"), f"{where}, {name}")
    if form == "judged" and not isinstance(row["label"], bool):
        raise UserError(f"{where}: the label is neither true nor false")
    if form == "pair" and row["chosen"] == row["rejected"]:
        raise UserError(f"{where}: chosen and rejected are the same")
    return row


def _check_prompt(messages: Messages, where: str) -> None:
    if messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{where}: its last message is the {messages[-1]['role']}'s", "end with the user's")


def _check_answer(messages: Messages, where: str) -> None:
    if [message["role"] for message in messages] != ["assistant"]:
        raise UserError(f"{where}: expected one message of the assistant")
    if not messages[0]["content"].strip():
        raise UserError(f"{where}: the answer is empty")


def append_preference(path: Path, row: dict[str, Any]) -> None:
    """Writes one checked row behind the others, whole or not at all. Raises UserError."""
    check_preference(row, "the preference")
    try:
        data = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (ValueError, TypeError, RecursionError) as error:  # NaN, half a surrogate pair, no JSON at all
        raise UserError(f"the preference can't be written: {error}", "mend the row") from None
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            begin = file.seek(0, os.SEEK_END)
            if _ends_inside_a_line(file):
                data = b"\n" + data  # a kill or a hand has left it so
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # of a device there is nothing to take back
                    file.truncate(begin)
                raise


def _ends_inside_a_line(file: io.FileIO) -> bool:
    """The file stands at its end, and does so behind."""
    if file.tell() == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
