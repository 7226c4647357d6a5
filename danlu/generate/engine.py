"""The engine: prompts in, completions out, with a key-value cache. Every token in danlu comes from here."""

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.generate.sampling import Row, SamplingParams, choose, process
from danlu.model.cache import KVCache
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render_prompt
from danlu.tokens.tokenizer import Tokenizer

Prompt = str | list[int] | Messages


@dataclass
class Completion:
    """One answer. `logprobs`: of each of `ids`, from the model's own distribution, before any warping."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    """stop (a stop token came; it is the last of `ids`) or length."""
    logprobs: list[float] = field(default_factory=list)


class Engine:
    """Generates from a model that it doesn't copy: live weights are always the current ones."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """A text begins like a document; messages are rendered up to the assistant's turn."""
        if isinstance(prompt, str):
            return [*self.tokenizer.document_start, *self.tokenizer.encode(prompt)]
        parts: list[Any] = list(prompt)
        return render_prompt(parts, self.tokenizer) if _is_chat(parts) else [int(token) for token in parts]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, as one batch. Raises UserError for a prompt beyond the context."""
        completions = [Completion() for _ in prompts]
        for row, token, logprob, done in self._steps([self.prompt_ids(p) for p in prompts], params):
            completion = completions[row]
            completion.ids.append(token)
            completion.logprobs.append(logprob)
            completion.finish_reason = "stop" if done else "length"
        for prompt, completion in zip(prompts, completions, strict=True):
            completion.text = "".join(self._pieces(prompt, completion.ids))
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """The answer piece by piece, each piece whole characters; together they are `generate`'s text."""
        return self._pieces(
            prompt, (token for _, token, _, _ in self._steps([self.prompt_ids(prompt)], params))
        )

    def _pieces(self, prompt: Prompt, ids: Iterable[int]) -> Iterator[str]:
        """The text of an answer: behind a text it begins with a blank where a word does; a reply does not."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begins = _is_chat(prompt) and self.tokenizer.drops_first_blank
        for token in ids:
            if piece := decoder.decode(self.tokenizer.decode_bytes([token])):
                yield piece.removeprefix(" ") if begins else piece
                begins = False
        if rest := decoder.decode(b"", final=True):
            yield rest

    def chat(self, messages: Messages, params: SamplingParams) -> Completion:
        """The assistant's next turn."""
        return self.generate([messages], params)[0]

    @torch.no_grad()
    def _steps(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> Iterator[tuple[int, int, float, bool]]:
        """(row, token, log-probability, whether it ends the row), token by token."""
        stops = self.tokenizer.stop_ids if params.stop_ids is None else params.stop_ids
        limit = self.model.config.max_positions
        for ids in prompts:
            self._check_prompt(ids)
        if not prompts:
            return
        longest = max(map(len, prompts))
        room = min(limit, longest + params.max_tokens)
        device = self.model.head_weight.device
        dtype = self.model.compute_dtype or self.model.head_weight.dtype
        cache = KVCache(self.model.config, len(prompts), room, dtype, device)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=device)
        last = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
        hidden = self.model.hidden(padded, cache=cache)
        cache.set_lengths([len(ids) for ids in prompts])
        logits = self.model.logits(hidden[torch.arange(len(prompts), device=device), last]).float()
        states = [Row(ids, params, self.tokenizer) for ids in prompts]
        rows = list(range(len(prompts)))
        for count in range(1, params.max_tokens + 1):
            own = [params] * len(rows)
            tokens = choose(process(logits, states, own), states, own)
            logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
            kept = []
            for index, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
                if math.isnan(logprob):
                    raise UserError("the model's logits are not numbers", "take an earlier checkpoint")
                states[index].accept(token)
                done = token in stops or states[index].complete
                yield rows[index], token, logprob, done
                if not done and cache.lengths[index] < room:
                    kept.append(index)
            if not kept or count == params.max_tokens:
                return
            if len(kept) < len(rows):
                cache.select(kept)
                rows = [rows[index] for index in kept]
                states = [states[index] for index in kept]
                tokens = tokens[kept]
            logits = self.model.logits(self.model.hidden(tokens[:, None], cache=cache)[:, -1]).float()

    def _check_prompt(self, ids: list[int]) -> None:
        config = self.model.config
        if not ids:
            raise UserError("the prompt is empty", "give at least one token")
        if len(ids) >= config.max_positions:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context {config.max_positions}",
                "shorten the prompt",
            )
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < config.vocab_size)
            raise UserError(
                f"the prompt holds the id {wrong}, the model's vocabulary has {config.vocab_size} entries",
                "use the tokenizer that belongs to the model",
            )


def _is_chat(prompt: Prompt) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], dict)
