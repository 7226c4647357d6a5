"""A server under mixed load for minutes: are the answers right, is memory steady, is nothing left over.

    python benchmarks/serve_soak.py [--requests 2000] [--clients 32] [--minutes 10] [--json FILE]

Starts `danlu serve smollm2` and asks it from many clients at once: chats and completions, whole and streamed,
with seeds, schemas, stop strings, log-probabilities, several choices, shared beginnings; of 8 to 64 tokens. A
third is cut off half-way, and some are malformed. Afterwards each valid request is answered alone, by an
engine in this process, and the two are compared: equal, or for one that was cut off, equal as far as it came.
Ends with 1 where something isn't as promised.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import psutil
from _racing import say

from danlu.core import host
from danlu.core.device import machine
from danlu.generate.engine import Engine
from danlu.generate.generate import load_for_engine
from danlu.generate.sampling import SamplingParams

MODEL = "smollm2"
GROWTH = 1.02
"""Most that resident memory may grow by, from the end of the second minute to the end."""
TOPICS = [
    "gold",
    "iron",
    "the sea",
    "a long journey",
    "old clocks",
    "rain in spring",
    "bread",
    "trains",
    "the moon",
    "glass",
    "music",
    "salt",
]
BEGINNINGS = [
    "You are a patient teacher. Answer in one sentence.",
    "You are a poet. Answer briefly, and never twice the same.",
    "Answer as a list of at most three words.",
]
NUMBERS = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}


@dataclass
class Asked:
    """One request of the soak, and what came of it."""

    number: int
    kind: str
    body: dict[str, Any]
    cut_off_after: int = 0
    """Tokens after which the client goes; 0 = it stays."""
    texts: list[str] = field(default_factory=list)
    status: int = 0
    first: float = 0.0
    """Seconds to the first token, of streams."""
    per_token: float = 0.0
    fault: str = ""


def make_requests(n: int, seed: int) -> list[Asked]:
    """The same for the same seed."""
    dice = random.Random(seed)
    found = []
    for number in range(n):
        if dice.random() < 0.05:
            found.append(Asked(number, "malformed", dice.choice(MALFORMED)))
            continue
        topic = " ".join(dice.sample(TOPICS, 3))
        body: dict[str, Any] = {"model": MODEL, "max_tokens": dice.randint(8, 64), "seed": number}
        body["temperature"] = dice.choice([0, 0.7, 1.0])
        if dice.random() < 0.3:
            kind = "completion"
            body["prompt"] = f"A story of {topic}:" * dice.choice([1, 1, 8])
            if dice.random() < 0.3:
                body |= {"echo": True, "logprobs": 2}
        else:
            kind = "chat"
            system = {"role": "system", "content": dice.choice(BEGINNINGS)}
            body["messages"] = [system, {"role": "user", "content": f"Tell me about {topic}."}]
            if dice.random() < 0.2:
                body |= {"logprobs": True, "top_logprobs": 3}
            if dice.random() < 0.1:
                body["guided_json"] = NUMBERS
        if dice.random() < 0.2:
            body["stop"] = [".", "\n\n"]
        if dice.random() < 0.1:
            body["n"] = 2
        if dice.random() < 0.2:
            body["top_k"] = 20
        asked = Asked(number, kind, body)
        body["stream"] = dice.random() < 0.7
        if dice.random() < 1 / 3:
            body["stream"] = True
            asked.cut_off_after = max(1, body["max_tokens"] // 2)
        found.append(asked)
    return found


MALFORMED: list[dict[str, Any]] = [
    {"model": MODEL, "messages": []},
    {"model": MODEL, "messages": "hello"},
    {"model": "nobody", "messages": [{"role": "user", "content": "x"}]},
    {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 10**9},
    {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "guided_regex": "("},
    {"model": MODEL, "messages": [{"role": "user", "content": "x " * 20000}]},
    {"not": "json", "raw": "{]"},
]


async def ask(client: httpx.AsyncClient, asked: Asked) -> None:
    """Sends one request, and keeps what comes."""
    path = "/v1/completions" if asked.kind == "completion" else "/v1/chat/completions"
    begin = time.monotonic()
    content = asked.body.get("raw") or json.dumps(asked.body)
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", path, content=content, headers=headers) as response:
            asked.status = response.status_code
            if response.status_code != 200 or not asked.body.get("stream"):
                found = json.loads(await response.aread())
                if response.status_code == 200:
                    asked.texts = [_text(choice) for choice in found["choices"]]
                return
            asked.texts = [""] * asked.body.get("n", 1)
            n_chunks, last = 0, begin
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                [choice] = json.loads(line[6:])["choices"]
                piece = _text(choice)
                asked.texts[choice["index"]] += piece
                if piece:
                    last = time.monotonic()
                    n_chunks += 1
                    asked.first = asked.first or last - begin
                if asked.cut_off_after and n_chunks >= asked.cut_off_after:
                    return
            if n_chunks > 1:
                asked.per_token = (last - begin - asked.first) / (n_chunks - 1)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        asked.fault = f"{type(error).__name__}: {error}"


def _text(choice: dict[str, Any]) -> str:
    part = choice.get("delta") or choice.get("message") or choice
    return part.get("text") or part.get("content") or ""


async def load(
    url: str, requests: list[Asked], clients: int, seconds: float, rss: list[tuple[float, int]], pid: int
) -> None:
    """Each client asks its share one after the other, in step with the clock."""
    begin, process = time.monotonic(), psutil.Process(pid)
    done = 0

    async def one(number: int, client: httpx.AsyncClient) -> None:
        nonlocal done
        for asked in requests[number::clients]:
            await asyncio.sleep(max(0.0, begin + asked.number / len(requests) * seconds - time.monotonic()))
            await ask(client, asked)
            done += 1

    async def watch() -> None:
        while True:
            rss.append((time.monotonic() - begin, process.memory_info().rss))
            if len(rss) % 30 == 0:
                say(f"{rss[-1][0]:.0f} s · {done} of {len(requests)} · {rss[-1][1] / 1e6:.0f} MB")
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number, client) for number in range(clients)))
        rss.append((time.monotonic() - begin, process.memory_info().rss))
        watching.cancel()


def alone(engine: Engine, asked: Asked) -> list[str]:
    """The answers of an engine that has nothing else to do."""
    body = asked.body
    found = []
    for number in range(body.get("n", 1)):
        params = SamplingParams(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"] + number,
            stop=body.get("stop", ()),
            top_k=body.get("top_k", 0),
            schema=body.get("guided_json"),
        )
        [answer] = engine.generate([body.get("prompt") or body["messages"]], params)
        found.append((body["prompt"] if body.get("echo") else "") + answer.text)
    return found


def is_right(asked: Asked, expected: list[str]) -> bool:
    if asked.cut_off_after:
        return all(whole.startswith(text) for text, whole in zip(asked.texts, expected, strict=True))
    return asked.texts == expected


def metric(url: str, name: str) -> float:
    found = re.findall(
        rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE
    )
    return sum(map(float, found))


def start(port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "danlu.cli", "serve", MODEL, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return process
    raise SystemExit("the server did not start")


def end_in_the_middle(url: str, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """SIGTERM while answers are being streamed: each of them must still come whole."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    wanted: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 200,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    streams = [iter(client.chat.completions.create(**wanted, seed=number)) for number in range(4)]
    for stream in streams:
        next(stream)
    process.terminate()
    reasons = [[chunk.choices[0].finish_reason for chunk in stream][-1] for stream in streams]
    return {"finished": reasons == ["length"] * 4, "exit_status": process.wait(60)}


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(1000 * float(np.percentile(values, p)), 1) for p in (50, 99)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    requests = make_requests(options.requests, options.seed)
    process = start(options.port)
    url = f"http://127.0.0.1:{options.port}"
    rss: list[tuple[float, int]] = []
    try:
        asyncio.run(load(url, requests, options.clients, 60 * options.minutes, rss, process.pid))
        time.sleep(2)
        blocks, pending = metric(url, "danlu_cache_blocks_in_use"), metric(url, "danlu_answers_pending")
        ended = end_in_the_middle(url, process)
    finally:
        process.kill()
        process.wait()
    say("comparing with answers computed alone …")
    engine = Engine(*load_for_engine(MODEL, "auto", "auto")[:2], dtype=_kind(), deterministic=True)
    valid = [asked for asked in requests if asked.kind != "malformed"]
    wrong = [
        asked
        for asked in valid
        if asked.status != 200 or asked.fault or not is_right(asked, alone(engine, asked))
    ]
    malformed = [asked for asked in requests if asked.kind == "malformed"]
    refused = sum(400 <= asked.status < 500 for asked in malformed)
    early = np.median([size for at, size in rss if 115 <= at <= 125] or [rss[0][1]])
    growth = float(rss[-1][1] / early)
    streams = [asked for asked in valid if asked.first]
    row: dict[str, Any] = {
        "requests": len(requests),
        "cut off": sum(asked.cut_off_after > 0 for asked in valid),
        "malformed, refused": [len(malformed), refused],
        "answered otherwise than alone": len(wrong),
        "time to first token": percentiles([asked.first for asked in streams]),
        "time per token": percentiles([asked.per_token for asked in streams if asked.per_token]),
        "resident MB after two minutes, at the end": [round(early / 1e6), round(rss[-1][1] / 1e6)],
        "blocks in use at the end": blocks,
        "answers pending at the end": pending,
        "SIGTERM": ended,
    }
    for name, value in row.items():
        print(f"{name:45}{value}")
    for asked in wrong[:5]:
        print(f"wrong: {asked}", file=sys.stderr)
    statuses = Counter(asked.status for asked in requests)
    print(f"{'statuses':45}{dict(statuses)}")
    if options.json:
        result = {
            "machine": machine().name,
            "cores": host.cores(),
            "rows": [row],
            "ratios": {"memory": growth},
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    good = not wrong and refused == len(malformed) and growth <= GROWTH and blocks == 0 and pending == 0
    good = good and ended["finished"] and ended["exit_status"] == 0
    print("as promised" if good else "NOT as promised")
    return 0 if good else 1


def _kind() -> Any:
    return load_for_engine(MODEL, "auto", "auto")[2]


if __name__ == "__main__":
    sys.exit(main())
