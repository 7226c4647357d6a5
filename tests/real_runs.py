"""The real command line, and what it is given."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DANLU = str(Path(sys.executable).with_name("danlu"))
ANIMALS = ["cat", "dog", "fox", "owl", "hare", "goose", "otter", "heron"]
PLACES = ["in the garden", "by the river", "under the bridge", "at the mill", "behind the old wall"]

TINY = """
name: tiny
seed: 1
stages:
  - name: data
    verb: data prepare
    options: {source: chats.jsonl, held_out: 0.1}
  - name: tokenizer
    verb: tokenizer train
    reads: {data: data}
    options: {vocab_size: 320}
  - name: text-tokens
    verb: tokenize
    reads: {data: data, tokenizer: tokenizer}
  - name: chat-tokens
    verb: tokenize
    reads: {data: data, tokenizer: tokenizer}
    options: {kind: chat}
  - name: pretrain
    verb: pretrain
    reads: {data: text-tokens}
    options:
      model: {vocab_size: 320, width: 32, n_layers: 1, n_heads: 2, n_kv_heads: 2, ffn_width: 64}
      steps: 20
      batch_size: 4
      sequence_length: 64
      compile: off
      eval_every: 10
      sample_every: 10
      sample_prompts: ["It is <b>late</b> & cold"]
  - name: chat
    verb: sft
    reads: {data: chat-tokens, init_from: pretrain}
    options: {steps: 10, batch_size: 4, sequence_length: 64, compile: off}
  - name: scores
    verb: eval
    reads: {model: pretrain, data: data, chat_model: chat, chat_data: chat-tokens}
    options: {conversations: 10}
"""


def conversations(count: int, seed: int) -> str:
    """JSON lines of conversations that are all different, each answer decided by its question."""
    chance = random.Random(seed)
    lines = []
    for number in range(count):
        messages = []
        for _ in range(chance.randint(1, 4)):
            animal = chance.choice(ANIMALS)
            place = PLACES[len(animal) % len(PLACES)]
            question = f"Where is {animal} {number}?"
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"The {animal} is {place}."},
            ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def danlu(
    *arguments: str | Path, cwd: Path, timeout: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the installed `danlu` in a folder, its caches kept."""
    environment = {**os.environ, "COLUMNS": "160", **(env or {})}
    return subprocess.run(
        [DANLU, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass(frozen=True)
class Quickstart:
    """A finished `danlu quickstart`."""

    cwd: Path
    """Where it was started."""
    stdout: str
    seconds: float
    peak_memory_bytes: int
    """Resident memory at most, as the system counted it from outside."""

    @property
    def run(self) -> Path:
        return self.cwd / "kept/quickstart"

    def danlu(self, *arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs another command beside it; it has to succeed."""
        done = danlu(*arguments, cwd=self.cwd, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done
