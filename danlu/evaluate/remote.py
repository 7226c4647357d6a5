"""A model behind OpenAI's API, asked by lm-evaluation-harness: the same tasks, prompts and scores over HTTP.

The server splits texts into its own tokens (`/tokenize`, as danlu and vLLM do), so that a continuation is
scored from the very token that it begins with, as on the engine at hand.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from typing import Any, TypeVar

from requests import Response, Session
from requests.exceptions import RequestException, RetryError

from danlu.core.errors import UserError
from danlu.core.http import patient_session
from danlu.core.progress import Progress
from danlu.data.conversations import Messages
from danlu.evaluate.harness import Instance, TemplateLM, generation_settings

T = TypeVar("T")

AT_ONCE = 16
"""Requests on their way."""
SECONDS = 600.0
"""That a server may take to answer."""


class ServedLM(TemplateLM):
    """`url`: with or without its "/v1"; `name`: the model's, there. A key is read from $OPENAI_API_KEY."""

    def __init__(self, url: str, name: str, chat: bool = False, max_gen_toks: int = 256) -> None:
        super().__init__()
        self.base = url.rstrip("/").removesuffix("/v1")
        self.name, self.chat, self.max_gen_toks = name, chat, max_gen_toks
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._local = threading.local()
        cards = self._get("/v1/models")["data"]
        card = next((card for card in cards if card["id"] == name), None)
        if card is None:
            known = ", ".join(card["id"] for card in cards)
            raise UserError(f'{self.base} serves no model "{name}"', f"it has: {known}")
        self.max_length = int(card.get("max_model_len") or 2048)
        self.tokens = lru_cache(maxsize=100_000)(self._tokens)

    # HTTP

    @property
    def _session(self) -> Session:
        """One a thread."""
        if not hasattr(self._local, "session"):
            self._local.session = patient_session()
        return self._local.session

    def _get(self, path: str) -> Any:
        return self._read(path, lambda: self._session.get(self.base + path, headers=self.headers, timeout=30))

    def _post(self, path: str, body: Any) -> Any:
        return self._read(
            path,
            lambda: self._session.post(self.base + path, json=body, headers=self.headers, timeout=SECONDS),
        )

    def _read(self, path: str, ask: Callable[[], Response]) -> Any:
        try:
            answer = ask()
        except (RequestException, RetryError) as error:
            raise UserError(
                f"{self.base}{path} does not answer: {type(error).__name__}",
                "see that the server runs; the same command goes on where it stopped",
            ) from None
        if answer.status_code != 200:
            raise UserError(f"{self.base}{path} says {answer.status_code}: {answer.text[:300]}", "mend that")
        try:
            return answer.json()
        except json.JSONDecodeError:
            raise UserError(f"{self.base}{path} answers with no JSON", "is this OpenAI's API?") from None

    def _each(self, asks: Sequence[Callable[[], T]], label: str, done: Callable[[int, T], None]) -> list[T]:
        """All of them, some at a time; `done` is told each as soon as it is there."""
        found: dict[int, T] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool, Progress(label, len(asks), "requests") as progress:
            futures = {pool.submit(ask): number for number, ask in enumerate(asks)}
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    found[number] = future.result()
                    done(number, found[number])
                    progress.update(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[number] for number in range(len(asks))]

    # Tokens

    @property
    def eot_token_id(self) -> int:
        raise NotImplementedError("only the server knows it")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the server's own beginning of documents."""
        begin = self.tokens("", True)
        if not begin:
            raise UserError(
                f"{self.base}: its documents begin with no token", "give every question a context"
            )
        return begin[0]

    def _tokens(self, text: str, begins: bool) -> tuple[int, ...]:
        body = {"model": self.name, "prompt": text, "add_special_tokens": begins}
        return tuple(self._post("/tokenize", body)["tokens"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokens(string, add_special_tokens is not False))

    # What the harness asks

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        def keep(number: int, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)

        asks = [
            lambda context=context, continuation=continuation: self._score(context, continuation)
            for _texts, context, continuation in requests
        ]
        return self._each(asks, "likelihoods", keep)

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = [*context, *continuation]
        if len(ids) > self.max_length:
            raise UserError(
                f"a question has {len(ids)} tokens, the model's context {self.max_length}",
                "set num_fewshot lower",
            )
        body = {"model": self.name, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
        found = self._post("/v1/completions", body)["choices"][0]["logprobs"]
        own = found["token_logprobs"][len(context) : len(ids)]
        best = [max(top.values()) for top in found["top_logprobs"][len(context) : len(ids)]]
        return sum(own), all(value >= top for value, top in zip(own, best, strict=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UserError("whole texts are not scored over HTTP", "evaluate the model at hand")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as it is: the server renders it."""
        return json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        def keep(number: int, answer: str) -> None:
            self.cache_hook.add_partial("generate_until", requests[number].args, answer)

        asks = [lambda request=request: self._answer(*request.args) for request in requests]
        return self._each(asks, "answers", keep)

    def answers(
        self,
        prompts: Sequence[str | Messages],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """What the model says to texts, or with `chat` to conversations."""
        settings = {
            "max_gen_toks": max_tokens,
            "temperature": temperature,
            "do_sample": temperature > 0,
            "top_p": top_p,
            "until": list(stop),
        }
        texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in prompts]
        return self.generate_until([Instance("generate_until", {}, (text, settings), 0) for text in texts])

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        wanted = generation_settings(settings, self.max_gen_toks)
        body = {
            "model": self.name,
            "max_tokens": wanted["max_gen_toks"],
            "temperature": wanted.get("temperature", 0.0),
            "top_p": wanted.get("top_p", 1.0),
            "stop": [text for text in wanted["until"] if text][:4] or None,
        }
        if self.chat:
            said = self._post("/v1/chat/completions", {**body, "messages": json.loads(context)})
            text = said["choices"][0]["message"]["content"] or ""
        else:
            text = self._post("/v1/completions", {**body, "prompt": context})["choices"][0]["text"]
        for stop in wanted["until"]:
            text = text.partition(stop)[0] if stop else text
        return text
