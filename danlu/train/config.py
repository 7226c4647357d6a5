"""Config of training: optimiser, schedule, loss-spike guard, the loop. Imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from danlu.core.config import Config, InputPath, StageConfig
from danlu.model.aliases import ALIASES, packaged
from danlu.model.config import LoraConfig, ModelConfig


class OptimConfig(Config):
    """The optimiser. Learning rates are peaks; the schedule multiplies them."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw, or muon for the matrices with adamw for embeddings, norms and head"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices (not of norms)")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 = no clipping")


class ScheduleConfig(Config):
    """The learning rate over the steps, as a multiple of its peak."""

    name: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: cosine decay; wsd (warm-up, stable, decay); constant"
    )
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.2, gt=0, le=1, description="last fraction of the steps in which wsd decays")
    final: float = Field(0.1, ge=0, le=1, description="multiple of the peak at the last step")


class GuardConfig(Config):
    """The loss-spike guard: when it sees a spike, and what it does then."""

    remedy: Literal["opt", "palm", "off"] = Field(
        "palm",
        description="opt: earlier checkpoint, lower learning rate for a while; "
        "palm: earlier checkpoint, skip the data around the spike; off: only NaN ends the run",
    )
    window: int = Field(50, ge=10, description="recent clean steps that a step is compared with")
    threshold: float = Field(5.0, gt=0, description="standard deviations above the window's median")
    rise: float = Field(
        0.05, ge=0, description="least rise of the loss that counts, as a fraction of the median"
    )
    patience: int = Field(3, ge=1, description="abnormal steps in a row that make a spike")
    rollback: int = Field(
        20,
        ge=0,
        description="palm: go back to a checkpoint at least so many steps before the spike; "
        "opt: to the newest one before it, and so many steps further back when two lower rates don't help",
    )
    skip_after: int = Field(
        20, ge=0, description="palm: batches skipped beyond the one that raised the alarm"
    )
    lr_factor: float = Field(0.1, gt=0, le=1, description="opt: the learning rate is multiplied by this")
    clip_factor: float = Field(0.1, gt=0, le=1, description="opt: so is the largest gradient norm, by this")
    lr_steps: int = Field(2, ge=1, description="opt: normal steps in a row until both are as they were")
    grace: int = Field(20, ge=1, description="steps after an alarm until the remedy is judged")
    max_interventions: int = Field(
        5, ge=0, description="alarms acted on; after that the guard stands by, and only NaN ends the run"
    )


class TrainConfig(StageConfig):
    """Everything the training loop is told; the base of every training verb's config."""

    data: InputPath = Field(description="tokens: the output folder of `danlu tokenize`")
    init_from: InputPath | None = Field(
        None,
        description="model to start from: a run folder, a Hugging Face folder, a .gguf file or smollm2; "
        "none = a new model",
    )
    model: ModelConfig | None = Field(None, description="sizes of a new model; not with init_from")
    lora: LoraConfig | None = Field(
        None, description="train an adapter on the frozen model of init_from; none = all weights"
    )
    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="sequences in one step, over all processes")
    accumulate: int = Field(
        1, ge=1, description="parts that a process cuts its batch into: less memory, the same gradient"
    )
    sequence_length: int = Field(512, ge=2, description="tokens in a sequence")
    optim: OptimConfig = Field(OptimConfig(), description="optimiser")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate over time")
    guard: GuardConfig = Field(GuardConfig(), description="loss-spike guard")
    eval_every: int = Field(
        200, ge=0, description="steps between evaluations on held-out data; 0 = at the end"
    )
    stop_loss: float = Field(
        0.0, ge=0, description="the run ends where an evaluation's held-out loss is at most this; 0 = never"
    )
    eval_batches: int = Field(0, ge=0, description="held-out batches in one evaluation; 0 = all of them")
    sample_every: int = Field(0, ge=0, description="steps between samples; 0 = at the end")
    sample_prompts: tuple[str, ...] = Field((), description="prompts that the samples continue or answer")
    sample_tokens: int = Field(60, ge=1, description="longest sample, in tokens")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints that are kept")
    log_every: int = Field(1, ge=1, description="steps between rows of metrics.jsonl")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    dtype: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="of the computation (weights stay float32); auto: bf16 where it is native"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: where a compiler is found and it pays"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more time"
    )
    deterministic: bool = Field(
        True, description="deterministic algorithms: a resumed run is exact to the bit"
    )
    parallel: Literal["ddp", "fsdp", "tensor"] = Field(
        "ddp",
        description="under torchrun: ddp = data-parallel, fsdp = fully sharded (FSDP2), tensor = each matrix "
        "split over the processes, which all have the same batch",
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events")

    @field_validator("init_from")
    @classmethod
    def _named(cls, path: Path | None) -> Path | None:
        """The file that an alias such as smollm2 means."""
        return packaged(str(path)) if str(path) in ALIASES and path and not path.exists() else path

    @model_validator(mode="after")
    def _lora_fits(self) -> Self:
        if self.lora is None:
            return self
        if self.init_from is None:
            raise ValueError("lora needs init_from, the model that the adapter is put on")
        if self.optim.name == "muon":
            raise ValueError("lora with optim.name muon: adapters are trained by adamw")
        if self.parallel != "ddp":
            raise ValueError(
                f"lora with parallel {self.parallel}: a frozen base isn't spread; set parallel ddp"
            )
        if self.lora.quantise != "none" and self.compile == "on":
            raise ValueError("lora.quantise with compile on: a packed base isn't compiled; set compile off")
        return self


class PretrainConfig(TrainConfig):
    """`danlu pretrain`: a new model, or (with `init_from`) continued pretraining."""


class StartedConfig(TrainConfig):
    """Of a verb that teaches a model something more."""

    init_from: InputPath = Field(
        description="model to start from: a run folder, a Hugging Face folder, a .gguf file or smollm2"
    )


class SFTConfig(StartedConfig):
    """`danlu sft`: supervised fine-tuning on conversations, loss on the replies only."""

    optim: OptimConfig = Field(OptimConfig(lr=3e-4), description="optimiser")
