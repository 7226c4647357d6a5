"""`danlu data check FILE`: what a file holds, and the first thing that is wrong with it."""

import math
from collections import Counter
from typing import Any

from danlu.core.errors import UserError
from danlu.core.progress import track
from danlu.data.config import CheckConfig
from danlu.data.conversations import has_reply, require_reply
from danlu.data.documents import read_documents
from danlu.data.prepare import Seen


def check(config: CheckConfig) -> dict[str, Any]:
    """Counts, lengths and copies. Raises UserError at the first fault, naming file and line."""
    counts: Counter[str] = Counter()
    shortest, longest = math.inf, 0
    with Seen() as seen:
        for document in track(read_documents(config.file, config.text_key), "check", unit="documents"):
            counts["documents"] += 1
            counts["bytes"] += len(document.text.encode())
            counts["characters"] += len(document.text)
            counts["copies"] += seen.add(document) is not None
            shortest, longest = min(shortest, len(document.text)), max(longest, len(document.text))
            if document.fault is not None:
                raise UserError(f"{document.where}: {document.fault}", "mend or remove the row")
            if document.replies is not None:
                counts["preferences"] += 1
                counts["replies"] += len(document.replies)
                continue
            if config.chat:
                require_reply(document.messages or [], document.where)
            if document.messages is not None:
                counts["conversations"] += 1
                counts["messages"] += len(document.messages)
                counts["without a reply"] += not has_reply(document.messages)
    mean = counts["characters"] / counts["documents"]
    lengths = {"shortest": shortest, "mean": round(mean, 1), "longest": longest}
    return {"file": str(config.file), **counts, "characters in a document": lengths}
