"""The engine as a model of lm-evaluation-harness: its tasks, its prompts and its scores, our computation.

    from lm_eval import simple_evaluate
    simple_evaluate(EngineLM(engine), tasks=["arc_easy"])

Texts become ids as in the harness's `hf` backend, so that the numbers can be compared: the text of a special
token becomes that token, since the harness hands over a rendered conversation as text. Two things differ
where a tokenizer begins documents with a token: a conversation begins as its template says, which is how it
is served, and a whole text gets that token once. Importing this raises UserError where lm-eval is missing.
"""

import json
import logging
import sys
from collections import Counter, defaultdict
from functools import cached_property
from typing import Any

import tokenizers

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.generate.engine import Completion, Engine, Likelihood
from danlu.generate.generate import load_for_engine
from danlu.generate.sampling import SamplingParams
from danlu.tokens.chat import render_text
from danlu.tokens.tokenizer import Tokenizer

try:
    from lm_eval import __version__ as lm_eval_version
    from lm_eval import evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM, CachingLM, TemplateLM
    from lm_eval.api.registry import metric_registry, register_model
    from lm_eval.api.samplers import ContextSampler
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
except ImportError as error:
    raise UserError(f"lm-eval can't be imported: {error}", "pip install 'danlu[eval]'") from None

__all__ = [
    "LM",
    "CachingLM",
    "ContextSampler",
    "EngineLM",
    "Instance",
    "TaskManager",
    "TemplateLM",
    "evaluate",
    "lm_eval_version",
    "load_yaml",
    "metric_registry",
]

logger = logging.getLogger(__name__)

Request = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""

_UNDERSTOOD = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")


@register_model("danlu")
class EngineLM(TemplateLM):
    """An engine, asked by lm-evaluation-harness.

    `max_gen_toks`: longest answer, in tokens, where a task names none.
    """

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> "EngineLM":
        """`lm_eval --model danlu --model_args pretrained=REF,dtype=…`: REF is any reference to a model."""
        known = {"pretrained", "dtype", "device", "max_gen_toks"}
        if unknown := sorted(arg_dict.keys() - known):
            raise UserError(f"model_args has {unknown[0]}", f"known: {', '.join(sorted(known))}")
        if "pretrained" not in arg_dict:
            raise UserError("model_args names no model", "--model_args pretrained=MODEL")
        # The harness says cuda:0 where nothing was said, and means a GPU if there is one.
        usual = "cpu" if (additional_config or {}).get("device") == "cpu" else "auto"
        where = str(arg_dict.get("device", usual)).partition(":")[0]
        model, tokenizer, kind = load_for_engine(
            str(arg_dict["pretrained"]), arg_dict.get("dtype", "auto"), where
        )
        return cls(Engine(model, tokenizer, dtype=kind), int(arg_dict.get("max_gen_toks", 256)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "EngineLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def __init__(self, engine: Engine, max_gen_toks: int = 256) -> None:
        super().__init__()
        self.engine, self.max_gen_toks = engine, max_gen_toks

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the tokenizer and its chat template by."""
        return self.tokenizer.fingerprint()

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.engine.model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text's first token is predicted from where there is no context."""
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        """The tokenizer, reading special tokens out of text."""
        return tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. None: it begins like a document, unless a special token begins it already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tuple(self.tokenizer.special_ids))
        return self._parser.encode(string, add_special_tokens=add_special_tokens).ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; an assistant's last message stays open where no prompt is asked for.

        Raises UserError where a message spells a special token, which would become one.
        """
        messages: Messages = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        for message in messages:
            if spelt := [name for name in self.tokenizer.special_ids if name in message["content"]]:
                raise UserError(
                    f"a {message['role']} message spells the special token {spelt[0]}",
                    "take it out of the task's data, or evaluate without the chat template",
                )
        if add_generation_prompt or messages[-1]["role"] != "assistant":
            return render_text(messages, self.tokenizer, add_generation_prompt)
        *before, begun = messages
        return render_text(before, self.tokenizer, add_generation_prompt=True) + begun["content"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether every token of it is the most probable one)."""
        pairs = [self._fitting(context, continuation) for _texts, context, continuation in requests]

        def keep(number: int, found: Likelihood) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number][0], (found.logprob, found.greedy))

        scored = self.engine.likelihoods(pairs, progress="likelihoods", found=keep)
        return [(found.logprob, found.greedy) for found in scored]

    def _fitting(self, context: list[int], continuation: list[int]) -> Request:
        """Without the beginning of a context that is too long. The last token is predicted, never read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, the model's context {self.max_length}",
                "take a model that reads more, or leave the task out",
            )
        if len(context) > room:
            logger.warning("a context of %d tokens is cut on the left to %d", len(context), room)
        return context[-room:], continuation

    def is_cut(self, context: str, asked: str | dict[str, Any]) -> bool:
        """Whether a request, a continuation or how to generate, needs more than the model reads."""
        if isinstance(asked, str):
            return len(self.tok_encode(context + asked)) > self.max_length + 1
        longest = generation_settings(asked, self.max_gen_toks)["max_gen_toks"]
        return len(self.tok_encode(context)) > self.max_length - longest

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; a long one in windows, each with all the context that fits."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            found = [make_disjoint_window(pair) for pair in rolling]
            windows += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for number, part in zip(owners, self.engine.likelihoods(windows), strict=True):
            totals[number] += part.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of a task's stop strings.

        Raises UserError for a setting of the generation that the engine doesn't have.
        """
        together: dict[str, list[int]] = defaultdict(list)
        asked: Counter[str] = Counter()
        for number, request in enumerate(requests):
            # A task that draws several answers repeats its request: each time another seed.
            same = json.dumps(request.args, sort_keys=True)
            together[json.dumps([request.args[1], asked[same]], sort_keys=True)].append(number)
            asked[same] += 1
        answers = [""] * len(requests)
        for key, numbers in together.items():
            settings, seed = json.loads(key)
            group = [requests[number] for number in numbers]
            for number, text in zip(numbers, self._answers(group, settings, seed), strict=True):
                answers[number] = text
        return answers

    def _answers(self, requests: list["Instance"], settings: dict[str, Any], seed: int) -> list[str]:
        settings = generation_settings(settings, self.max_gen_toks)
        until, longest = settings["until"], settings["max_gen_toks"]
        room = self.max_length - longest
        if room < 1:
            raise UserError(
                f"a task asks for {longest} tokens, the model's context is {self.max_length}",
                "set max_gen_toks lower, with gen_kwargs",
            )
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for ids in prompts:
            if len(ids) > room:
                logger.warning("a context of %d tokens is cut on the left to %d", len(ids), room)
        special = self.tokenizer.special_ids
        stops = {special[name] for name in (self.tokenizer.eos, *until) if name in special}
        params = SamplingParams(
            max_tokens=longest,
            temperature=settings.get("temperature", 0.0),
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 1.0),
            stop_ids=tuple(stops.union(self.tokenizer.stop_ids)),
            stop=tuple(text for text in until if text and text not in special),
            seed=seed,
        )

        def text_of(completion: Completion) -> str:
            return postprocess_generated_text(self.tokenizer.decode(completion.ids), until, None)

        def keep(number: int, completion: Completion) -> None:
            self.cache_hook.add_partial("generate_until", requests[number].args, text_of(completion))

        prompts = [ids[-room:] for ids in prompts]
        return [text_of(done) for done in self.engine.generate(prompts, params, "answers", keep)]


def generation_settings(settings: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """A task's settings with all defaults. Raises UserError for one that the engine doesn't have."""
    found = dict(normalize_gen_kwargs(settings, max_gen_toks))
    if unknown := sorted(found.keys() - set(_UNDERSTOOD)):
        raise UserError(
            f"a task sets {unknown[0]} for its generation, which the engine doesn't have",
            f"known: {', '.join(_UNDERSTOOD)}",
        )
    return found


def lm_eval_command() -> None:
    """The harness's own command line, which knows `--model danlu` too."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"danlu: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    lm_eval_command()
