"""`danlu chat` and `danlu generate` as they are called, with what is typed as a script."""

import io
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import danlu
from danlu.core.device import choose_dtype
from danlu.core.errors import UserError
from danlu.data.conversations import to_messages
from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.chat import chat
from danlu.generate.config import ChatConfig, GenerateConfig
from danlu.generate.engine import Engine
from danlu.generate.generate import generate, make_engine, sampling_params, show
from danlu.model.checkpoint import load, save_model

TOKENS, SEED = 12, 3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Chatter:
    """Runs the verb on a script, and knows what the model has to answer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        model, tokenizer = danlu.load(folder, dtype=torch.float32)
        model.compute_dtype = choose_dtype("auto", torch.device("cpu"))
        self.engine = Engine(model, tokenizer)

    def run(self, *lines: str, **options: Any) -> None:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat(self.config(**options))

    def config(self, **options: Any) -> ChatConfig:
        return ChatConfig(**{"model": str(self.folder), "max_tokens": TOKENS, "seed": SEED, **options})

    def answer(self, messages: list[dict[str, str]], seed: int, **options: Any) -> dict[str, str]:
        params = sampling_params(self.config(**options), seed)
        return {"role": "assistant", "content": self.engine.generate([messages], params)[0].text}


@pytest.fixture
def chatter(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Chatter:
    return Chatter(folder, monkeypatch)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def saved(name: str) -> list[dict[str, str]]:
    """The conversation in a file, as data preparation reads it."""
    [line] = Path(name).read_text("utf-8").splitlines()
    messages = to_messages(json.loads(line), name)
    assert messages is not None
    return messages


def test_each_answer_has_the_whole_conversation(chatter: Chatter, capsys: pytest.CaptureFixture[str]) -> None:
    chatter.run("Is it hot?", "", "And the gold? 🔥", "/save talk.jsonl", "/quit", "not read")
    messages: list[dict[str, str]] = []
    for number, text in enumerate(["Is it hot?", "And the gold? 🔥"]):
        messages.append(user(text))
        messages.append(chatter.answer(messages, SEED + number))
    assert saved("talk.jsonl") == messages
    out = capsys.readouterr().out
    unseen = {code: None for code in range(160) if not chr(code).isprintable() and chr(code) not in "\n\t"}
    for message in messages[1::2]:
        assert message["content"].translate(unseen) in out
    assert "saved to talk.jsonl" in out


def test_the_end_of_input_ends_it(chatter: Chatter) -> None:
    chatter.run()
    chatter.run("/exit", "/save never.jsonl")
    assert not Path("never.jsonl").exists()


def test_reset_forgets_all_but_the_system_prompt(chatter: Chatter) -> None:
    chatter.run("One.", "/reset", "Two.", "/save talk.jsonl", system="Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, user("Two.")]
    assert saved("talk.jsonl") == [*asked, chatter.answer(asked, SEED)]


def test_system_sets_the_prompt_and_starts_anew(chatter: Chatter) -> None:
    chatter.run("One.", "/system 简短。", "Two.", "/save a.jsonl", "/system", "Three.", "/save b.jsonl")
    asked = [{"role": "system", "content": "简短。"}, user("Two.")]
    assert saved("a.jsonl") == [*asked, chatter.answer(asked, SEED)]
    assert saved("b.jsonl") == [user("Three."), chatter.answer([user("Three.")], SEED)]


def test_regen_gives_another_answer(chatter: Chatter) -> None:
    chatter.run("One.", "/save a.jsonl", "/regen", "/save b.jsonl")
    first, second = saved("a.jsonl"), saved("b.jsonl")
    assert first == [user("One."), chatter.answer([user("One.")], SEED)]
    assert second == [user("One."), chatter.answer([user("One.")], SEED + 1)]
    assert first != second


def test_what_cannot_be_done_is_said(chatter: Chatter, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    chatter.run(
        "/fly [bold] :fire:", "/regen", "/save", "/save x.jsonl", "One.", "/save", "/save file/x", "/help"
    )
    out = capsys.readouterr().out
    for expected in (
        "unknown command /fly",
        "nothing to answer yet",
        "nothing has been said yet",
        "no file is named",
        "where a folder is needed",
        "/regen        another answer",
    ):
        assert expected in out
    assert not Path("x.jsonl").exists()


def test_the_oldest_exchanges_leave_a_full_context(
    chatter: Chatter, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [f"Where is {number}?" for number in range(6)]
    chatter.run(*questions, "/save talk.jsonl")
    messages = saved("talk.jsonl")
    assert 2 < len(messages) < 12
    assert messages[::2] == [user(question) for question in questions[-len(messages) // 2 :]]
    assert messages[-1] == chatter.answer(messages[:-1], SEED + 5)
    assert "the context is full: the 2 oldest messages are forgotten" in capsys.readouterr().out


def test_a_message_beyond_the_context_is_taken_back(
    chatter: Chatter, capsys: pytest.CaptureFixture[str]
) -> None:
    chatter.run("word " * 200, "Two.", "/save talk.jsonl")
    assert "shorten the prompt" in capsys.readouterr().out
    assert saved("talk.jsonl") == [user("Two."), chatter.answer([user("Two.")], SEED)]


class Impatient(io.StringIO):
    """A terminal whose user presses Ctrl-C at the third write."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def write(self, text: str) -> int:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_the_speed_is_said_beside_the_answer(chatter: Chatter, capsys: pytest.CaptureFixture[str]) -> None:
    chatter.run("One.")
    said = capsys.readouterr()
    text = chatter.answer([user("One.")], SEED)["content"]
    n_tokens = len(chatter.engine.tokenizer.encode(text))
    assert re.fullmatch(rf"{n_tokens} tokens · \d+\.\d tokens/s", said.err.strip())
    assert "tokens/s" not in said.out


def test_ctrl_c_stops_the_answer_and_keeps_what_came(
    chatter: Chatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Impatient())
    chatter.run("One.", "/save a.jsonl", "Two.", "/save b.jsonl", max_tokens=40)
    whole = chatter.answer([user("One.")], SEED, max_tokens=40)["content"]
    part = saved("a.jsonl")[1]["content"]
    assert whole.startswith(part)
    assert 0 < len(part) < len(whole)
    assert "stopped" in terminal.getvalue()
    talk = saved("b.jsonl")
    assert talk[-1] == chatter.answer(talk[:-1], SEED + 1, max_tokens=40)
    assert len(talk) == 4


class Nervous(io.StringIO):
    """A keyboard on which Ctrl-C comes before the first line."""

    interrupted = False

    def readline(self, *size: Any) -> str:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().readline(*size)


def test_ctrl_c_at_the_prompt_is_no_end(chatter: Chatter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Nervous("One.\n/save talk.jsonl\n"))
    chat(chatter.config())
    assert saved("talk.jsonl") == [user("One."), chatter.answer([user("One.")], SEED)]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_utf_8_is_an_error(
    chatter: Chatter, monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    with pytest.raises(UserError, match="not UTF-8"):
        chat(chatter.config())


def test_a_model_without_template_says_so_at_once(chatter: Chatter, tmp_path: Path) -> None:
    model, tokenizer = load(chatter.folder)
    tokenizer.chat_template = ""
    save_model(model, tmp_path / "base", tokenizer)
    chatter.folder = tmp_path / "base"
    with pytest.raises(UserError, match="no chat template"):
        chatter.run("Hi!")


@pytest.mark.parametrize("as_chat", [False, True])
def test_generate_gives_n_answers_by_consecutive_seeds(
    chatter: Chatter, capsys: pytest.CaptureFixture[str], as_chat: bool
) -> None:
    config = GenerateConfig(
        model=str(chatter.folder), prompt="The furnace", n=3, seed=5, max_tokens=9, chat=as_chat
    )
    result = generate(config)
    prompt: Any = [user("The furnace")] if as_chat else "The furnace"
    engine = make_engine(config.model, deterministic=True)
    expected = [engine.generate([prompt], sampling_params(config, seed))[0].text for seed in (5, 6, 7)]
    assert [answer["text"] for answer in result["answers"]] == expected
    assert len(set(expected)) == 3
    show(result)
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)


def test_beams_from_the_command(folder: Path) -> None:
    """The best answers of the search, their text, and a penalty that draws have too."""
    values = {"model": str(folder), "prompt": "The furnace", "max_tokens": 8, "beams": 3, "n": 2}
    values["dtype"] = "float32"
    found = generate(GenerateConfig.model_validate(values))["answers"]
    engine = Engine(*load(folder))
    ids = engine.prompt_ids("The furnace")
    params = BeamParams(beams=3, n=2, max_tokens=8, stop_ids=tuple(engine.tokenizer.stop_ids))
    [expected] = engine.run(lambda sequences: beam_search(sequences, ids, params))
    assert [answer["text"] for answer in found] == [engine.text("", answer.ids) for answer in expected]
    blocked = generate(GenerateConfig.model_validate({**values, "no_repeat_ngram": 1}))["answers"]
    assert blocked != found
