"""Config of the evaluation verbs. Imports nothing heavy."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from danlu.core.config import Config, InputMark, InputPath, StageConfig


def apart(values: Sequence[str]) -> tuple[str, ...]:
    """One text with commas is several values."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


Dtype = Literal["auto", "float32", "bf16", "int8", "int4"]


class CompressConfig(Config):
    """`danlu compress`: a lossless coder driven by a model."""

    file: Path = Field(description="any file")
    out: Path = Field(description="where the compressed file goes")
    model: str = Field("", description="run folder or Hugging Face folder; the decoder needs the same one")
    online: bool = Field(
        False, description="no model: coder and decoder train the same one while they code (prequential)"
    )


class DecompressConfig(Config):
    """`danlu decompress`: the exact inverse of `danlu compress`."""

    file: Path = Field(description="what `danlu compress` wrote")
    out: Path = Field(description="where the original goes")
    model: str = Field("", description="the model that it was compressed with (none for --online)")


class Prompting(Config):
    """How a task is asked, beside its own way; see `danlu.evaluate.prompting` for the papers."""

    method: Literal["direct", "zero-shot-cot", "least-to-most"] = Field(
        "direct", description="think before each answer (zero-shot-cot), or by smaller questions first"
    )
    votes: int = Field(
        1, ge=1, description="self-consistency: so many answers are drawn, the majority counts"
    )
    vote: Literal["all", "longest"] = Field(
        "all", description="who votes: all, or the longest half of the chains"
    )
    temperature: float = Field(0.7, gt=0, description="of drawn answers")
    thought_tokens: int = Field(200, ge=1, description="longest thought")
    examples: Literal["task", "first", "random", "nearest", "complex"] = Field(
        "task", description="which examples: as the task says, …, the most like the question, with most steps"
    )
    calibrate: Literal["none", "pmi", "contextual"] = Field(
        "none",
        description="choices: over their likelihood behind the last line only, or without the question",
    )


class EvalConfig(StageConfig):
    """`danlu eval`: benchmarks, bits per byte against other compressors, and the quality of small talk."""

    model: Annotated[str, InputMark()] | None = Field(
        None, description="model that is asked, or scored on the held-out text"
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="benchmarks, commas between: names (danlu eval tasks lists them), patterns, YAML files",
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; default: what the task says, else none"
    )
    limit: int = Field(0, ge=0, description="only the first questions of each task; 0 = all")
    chat: bool = Field(False, description="ask through the model's chat template")
    prompting: Prompting = Field(Prompting(), description="another way of asking than the task's own")
    dtype: Dtype = Field(
        "auto",
        description="of the weights that tasks are computed with: auto is bf16 where the hardware has it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    url: str = Field("", description="of an OpenAI API that has the model; `model` is its name there")
    cache: bool = Field(True, description="keep answers by request, and use those that are kept")
    data: InputPath | None = Field(None, description="output folder of `danlu data prepare`")
    contamination: InputPath | None = Field(
        None,
        description="training text that the questions are looked for in: documents, or the output of `danlu "
        "data prepare`; default: what the lineage of a model of danlu's own names",
    )
    text: InputPath | None = Field(None, description="text or documents whose perplexity is measured")
    window: int = Field(
        0, ge=0, description="for text: tokens that are read at most; 0 = the model's context"
    )
    stride: int = Field(0, ge=0, description="for text: tokens that each window predicts; 0 = half of it")
    memorised: int = Field(
        0, ge=0, description="documents of `data` that the model is asked to continue word for word"
    )
    chat_model: InputPath | None = Field(None, description="model that is talked to; none = no chat scores")
    chat_data: InputPath | None = Field(
        None, description="output folder of `danlu tokenize` with kind=chat, for the losses on replies"
    )
    conversations: int = Field(200, ge=2, description="held-out conversations in the losses on replies")

    _apart = field_validator("tasks")(apart)


def evaluation_folder(values: Mapping[str, Any]) -> str | None:
    """Where benchmarks are kept that were asked for without a place: the same command finds them again."""
    if not values.get("tasks"):
        return None
    name = re.sub(r"[^\w.-]+", "-", str(values.get("model", "model"))).strip("-.")[-60:]
    asked = json.dumps(values, sort_keys=True, default=str)
    return f"runs/eval/{name}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


class TasksConfig(Config):
    """`danlu eval tasks`: what can be asked without a network."""


class DiffConfig(Config):
    """`danlu eval diff`: two evaluations on the same questions."""

    a: Path = Field(description="folder of the first evaluation")
    b: Path = Field(description="folder of the second")
    page: Path = Field(Path("diff.html"), description="where the page with what changed goes")


class GopherConfig(Config):
    """`danlu eval gopher`: 152 tasks, and what size brings to them, by category."""

    models: tuple[str, ...] = Field(
        (), description="models of at least two sizes, commas between; none = list"
    )
    each: int = Field(20, ge=5, description="questions of each task at most")
    seed: int = Field(0, ge=0, description="which questions are drawn")
    plot: Path = Field(Path("gopher.png"), description="where the plot goes")

    _apart = field_validator("models")(apart)


class TableConfig(Config):
    """`danlu eval table`: several evaluations side by side."""

    runs: tuple[str, ...] = Field(min_length=1, description="folders that danlu eval --tasks wrote")

    _apart = field_validator("runs")(apart)


class AnswerConfig(Config):
    """`danlu eval answer`: a model's answers to open questions, for a judge."""

    model: str = Field(description="model that answers: any reference, or its name at `url`")
    questions: str = Field(
        "mt-bench", description="mt-bench (needs DANLU_DATA), or JSONL: turns, question or prompt"
    )
    out: Path = Field(Path("answers.jsonl"), description="where the answers go")
    limit: int = Field(0, ge=0, description="only the first questions; 0 = all")
    max_tokens: int = Field(512, ge=1, description="longest answer")
    temperature: float = Field(0.0, ge=0, description="0 = greedy")
    dtype: Dtype = Field("auto", description="of the weights: auto is bf16 where the hardware has it")
    url: str = Field("", description="of an OpenAI API that has the model")


class JudgeConfig(Config):
    """`danlu eval judge`: a model grades answers, or compares two models' answers in both orders."""

    answers: Path = Field(description="answers to be judged, as danlu eval answer writes them")
    judge: str = Field(description="model that judges: any reference, or its name at `url`")
    against: Path | None = Field(None, description="another model's answers; none = grades from 1 to 10")
    truth: Literal["no", "true", "helpful"] = Field(
        "no",
        description="the judge was trained by recipes/truth-judge.yaml: share of true, or helpful answers",
    )
    prompts: InputPath | None = Field(None, description="FastChat's judge_prompts.jsonl; none = danlu's own")
    out: Path = Field(Path("judged.jsonl"), description="where each judgement goes")
    max_tokens: int = Field(512, ge=1, description="longest judgement")
    dtype: Dtype = Field("auto", description="of the weights: auto is bf16 where the hardware has it")
    url: str = Field("", description="of an OpenAI API that has the judge")


class AnnotateConfig(Config):
    """`danlu eval annotate`: people label texts, or compare answers, on a page."""

    items: Path = Field(description="JSONL: text; prompt, a, b; two conversations a, b; or context, response")
    kind: Literal["label", "pair", "acute", "ssa"] = Field(
        "label",
        description="one label a text; the better of two answers, or of two conversations; sense of a reply",
    )
    labels: tuple[str, ...] = Field((), description="for label: what there is to choose from, commas between")
    question: str = Field("", description="asked about each item; default: the kind's own")
    guideline: str = Field("", description="shown above each item")
    db: Path | None = Field(
        None, description="file that answers are kept in; default: beside the items, .sqlite"
    )
    export: Path | None = Field(None, description="JSONL that all answers are written to at the end")
    host: str = Field("127.0.0.1", description="address to listen at")
    port: int = Field(8001, ge=0, le=65535, description="0 = any free one")

    _apart = field_validator("labels")(apart)
