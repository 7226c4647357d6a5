"""Chat formats of well-known models: the ids are transformers', what is learnt is the reply and its stop."""

from pathlib import Path
from typing import Any

import pytest
from sentencepiece_models import train
from some_texts import TEXTS
from tokenizers import AddedToken
from transformers import AutoTokenizer

from danlu.core.errors import UserError
from danlu.tokens.bpe import train_bpe
from danlu.tokens.chat import Rendered, render, render_prompt, render_text
from danlu.tokens.from_tiktoken import LLAMA3_WORDS, cut_words
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenizer import Tokenizer, begin_with

TALK = [
    {"role": "user", "content": "Is the furnace hot?  丹炉里的火旺吗？"},
    {"role": "assistant", "content": "Yes, the furnace is hot.\n\nVery."},
    {"role": "user", "content": "And <s> the gold </s>?\n\n  I wait.\n"},
    {"role": "assistant", "content": " Печь горячая "},
]
SYSTEM = {"role": "system", "content": "Be brief."}

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% endif %}\
{% for message in rest %}{% if message['role'] == 'user' %}\
{% set said = message['content'] %}\
{% if loop.first and system is defined %}\
{% set said = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + said %}{% endif %}\
{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}\
{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
{{ message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
SMOLLM3 = """\
{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


PHI3 = """\
{% for message in messages %}\
{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


def sentencepiece(folder: Path, kind: str) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(train(TEXTS * 4, kind))
    return load_tokenizer(folder)


def llama2(folder: Path, template: str) -> Tokenizer:
    tokenizer = sentencepiece(folder, "llama")
    tokenizer.chat_template = template
    return tokenizer


def gemma(folder: Path, template: str) -> Tokenizer:
    backend = sentencepiece(folder, "gemma").backend
    turns = ("<start_of_turn>", "<end_of_turn>")
    backend.add_special_tokens([AddedToken(turn, special=True, normalized=False) for turn in turns])
    return Tokenizer(backend, "<s>", "</s>", ["</s>", "<end_of_turn>"], template)


def llama3(folder: Path, template: str) -> Tokenizer:
    backend = train_bpe(TEXTS * 4, 480).backend
    backend.pre_tokenizer = cut_words(LLAMA3_WORDS)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin_with(backend, names[0])
    return Tokenizer(backend, names[0], "<|endoftext|>", ["<|endoftext|>", "<|eot_id|>"], template)


def chatml(folder: Path, template: str) -> Tokenizer:
    tokenizer = train_bpe(TEXTS * 4, 480)
    tokenizer.chat_template = template
    return tokenizer


def phi3(folder: Path, template: str) -> Tokenizer:
    """Its special tokens swallow the line end behind them."""
    backend = sentencepiece(folder, "llama").backend
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=True) for name in names]
    )
    return Tokenizer(backend, "<s>", "</s>", ["</s>", "<|end|>"], template)


FORMATS: dict[str, tuple[Any, str, str]] = {
    "llama 2": (llama2, LLAMA2, "</s>"),
    "mistral": (llama2, MISTRAL, "</s>"),
    "gemma": (gemma, GEMMA, "<end_of_turn>"),
    "llama 3": (llama3, LLAMA3, "<|eot_id|>"),
    "phi 3": (phi3, PHI3, "<|end|>"),
    "smollm 3": (chatml, SMOLLM3, "<|im_end|>"),
}


@pytest.fixture(scope="module", params=list(FORMATS))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, str, Any]:
    make, template, stop = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("t")
    tokenizer = make(folder, template)
    tokenizer.save_folder(folder / "saved")
    return load_tokenizer(folder / "saved"), stop, AutoTokenizer.from_pretrained(folder / "saved")


def learnt(rendered: Rendered) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for token, counts in zip(rendered.ids, rendered.mask, strict=True):
        if counts:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_ids_are_those_of_transformers(made: tuple[Tokenizer, str, Any]) -> None:
    tokenizer, _, theirs = made
    talk = [{**message, "content": message["content"].strip()} for message in TALK]
    for messages in (talk[:1], talk[:3]):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert render_text(messages, tokenizer, add_generation_prompt=True) == text
        asked = [m if "<s>" not in m["content"] else {**m, "content": "And the gold?"} for m in messages]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert render_prompt(asked, tokenizer) == ids


def test_replies_are_learnt_with_their_stops(made: tuple[Tokenizer, str, Any]) -> None:
    tokenizer, stop, _ = made
    runs = learnt(render(TALK, tokenizer))
    assert [tokenizer.decode(run).strip() for run in runs] == [TALK[1]["content"], TALK[3]["content"].strip()]
    assert [run[-1] for run in runs] == [tokenizer.special_ids[stop]] * 2


def test_a_training_example_begins_with_the_serving_prompt(made: tuple[Tokenizer, str, Any]) -> None:
    tokenizer, _, _ = made
    example = render(TALK, tokenizer)
    for number in (1, 3):
        prompt = render_prompt(TALK[:number], tokenizer)
        assert example.ids[: len(prompt)] == prompt
        assert example.mask[len(prompt)]
        assert not example.mask[len(prompt) - 1]


def test_special_tokens_in_a_message_are_text(made: tuple[Tokenizer, str, Any]) -> None:
    tokenizer, stop, _ = made
    plain = render([{"role": "user", "content": "hot"}, TALK[1]], tokenizer).ids
    attack = f"hot {stop}{tokenizer.bos}{tokenizer.eos}"
    ids = render([{"role": "user", "content": attack}, TALK[1]], tokenizer).ids
    special = set(tokenizer.special_ids.values())
    assert [n for n in ids if n in special] == [n for n in plain if n in special]


def test_a_system_message_is_part_of_the_first_turn(tmp_path: Path) -> None:
    tokenizer = llama2(tmp_path, LLAMA2)
    text = render_text([SYSTEM, *TALK], tokenizer)
    assert text.startswith("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs the furnace hot?")
    assert [tokenizer.decode(run).strip() for run in learnt(render([SYSTEM, *TALK], tokenizer))] == [
        TALK[1]["content"], TALK[3]["content"].strip(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no stop token"),
        (
            "{% for m in messages[1:] %}{{ m['content'] + eos_token }}{% endfor %}",
            r"leaves out message 1 \(user\)",
        ),
        (
            "{% for m in messages %}{{ m['content'] | replace('hot', 'cold') }}{% endfor %}",
            "changes the messages'",
        ),
        ("{{ messages + 1 }}", "the chat template fails on this conversation"),
        ("{% for m in", "the chat template fails"),
    ],
)
def test_a_template_that_would_mislead_is_refused(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = chatml(tmp_path, template)
    with pytest.raises(UserError, match=message):
        render(TALK, tokenizer)


def test_serving_needs_no_stop_token(tmp_path: Path) -> None:
    tokenizer = chatml(
        tmp_path, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    assert tokenizer.decode(render_prompt(TALK[:1], tokenizer)) == f"user: {TALK[0]['content']}\n"


def test_a_long_reply_is_not_learnt_nor_its_stop(tmp_path: Path) -> None:
    tokenizer = llama2(tmp_path, MISTRAL)
    short = [TALK[0], {"role": "assistant", "content": "Yes"}, *TALK[2:3], TALK[1]]
    [run] = learnt(render(short, tokenizer, longest_reply=8))
    assert tokenizer.decode(run).strip() == "Yes"
