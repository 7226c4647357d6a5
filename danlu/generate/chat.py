"""`danlu chat`: a conversation in the terminal."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.data.conversations import Messages
from danlu.generate.config import ChatConfig
from danlu.generate.engine import Engine
from danlu.generate.generate import make_engine, sampling_params

HELP = """\
/reset        forget the conversation
/system TEXT  set the system prompt (and start anew)
/regen        another answer to your last message
/save FILE    write the conversation as one JSONL row, ready for fine-tuning
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""

_UNSEEN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters: a model's answer doesn't steer the terminal."""


@dataclass
class Conversation:
    """What has been said, and how often the seed has moved on."""

    system: str = ""
    messages: Messages = field(default_factory=list)
    answers: int = 0

    def all(self) -> Messages:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages


def chat(config: ChatConfig) -> None:
    """Reads from the terminal or a pipe until its end."""
    engine = make_engine(config.model, config.dtype, device=config.device)
    engine.prompt_ids([{"role": "user", "content": "Hi"}])  # a model that can't chat says so at once
    session = Session(config, engine)
    if sys.stdin.isatty():
        session.console.print(f"[dim]{config.model} · /help for help[/dim]")
    while (line := session.read()) is not None:
        if not session.handle(line.strip()):
            return


class Session:
    """One conversation and the commands on it."""

    def __init__(self, config: ChatConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.talk = Conversation(config.system)
        self.console = Console(highlight=False, emoji=False)
        self.beside = Console(highlight=False, emoji=False, stderr=True)

    def read(self) -> str | None:
        """The next line; None at the end of input. Raises UserError where it isn't UTF-8."""
        try:
            line = input("> " if sys.stdin.isatty() else "")
            line.encode()  # fails where surrogates stand for other bytes
            return line
        except EOFError:
            return None
        except UnicodeError:
            raise UserError("the input is not UTF-8", "type or send UTF-8 text") from None
        except KeyboardInterrupt:
            self.console.print()
            return ""

    def handle(self, line: str) -> bool:
        """Acts on a line; False when the user leaves."""
        command, _, rest = line.partition(" ")
        if not line:
            return True
        if not line.startswith("/"):
            self.talk.messages.append({"role": "user", "content": line})
            self.answer()
        elif command in ("/quit", "/exit"):
            return False
        elif command == "/help":
            self.console.print(HELP, markup=False)
        elif command == "/reset":
            self.talk = Conversation(self.talk.system)
            self.say("forgotten")
        elif command == "/system":
            self.talk = Conversation(rest)
            self.say("system prompt set" if rest else "no system prompt")
        elif command == "/regen":
            self.regenerate()
        elif command == "/save":
            self.save(rest.strip())
        else:
            self.say(f"unknown command {command}; /help lists them")
        return True

    def regenerate(self) -> None:
        if self.talk.messages and self.talk.messages[-1]["role"] == "assistant":
            self.talk.messages.pop()
        if not self.talk.messages:
            self.say("nothing to answer yet")
            return
        self.answer()

    def answer(self) -> None:
        """Streams the assistant's turn; Ctrl-C keeps what has come. A message it can't read is taken back."""
        params = sampling_params(self.config, self.config.seed + self.talk.answers)
        text, begin = "", time.monotonic()
        try:
            self.make_room()
            for piece in self.engine.stream(self.talk.all(), params):
                text += piece
                print(piece.translate(_UNSEEN), end="", flush=True)
        except KeyboardInterrupt:
            self.say(" … stopped")
        except UserError as error:
            self.talk.messages.pop()
            self.say(str(error))
            return
        self.talk.answers += 1
        self.console.print()
        n_tokens, seconds = len(self.engine.tokenizer.encode(text)), time.monotonic() - begin
        self.beside.print(f"{n_tokens} tokens · {n_tokens / seconds:.1f} tokens/s", style="dim")
        self.talk.messages.append({"role": "assistant", "content": text})

    def make_room(self) -> None:
        """Drops the oldest exchanges where the conversation and its answer don't fit the context."""
        limit = self.engine.model.config.max_positions
        room = min(self.config.max_tokens, limit // 4)
        dropped = 0
        while len(self.talk.messages) > 2 and len(self.engine.prompt_ids(self.talk.all())) + room > limit:
            del self.talk.messages[:2]
            dropped += 2
        if dropped:
            self.say(f"the context is full: the {dropped} oldest messages are forgotten")

    def save(self, name: str) -> None:
        try:
            if not name:
                raise UserError("no file is named", "/save FILE")
            if not self.talk.messages:
                raise UserError("nothing has been said yet", "talk first, then save")
            with atomic_write(Path(name)) as file:
                file.write(json.dumps({"messages": self.talk.all()}, ensure_ascii=False) + "\n")
            self.say(f"saved to {name}")
        except UserError as error:
            self.say(str(error))

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)
