"""Config of alignment. Imports no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from danlu.core.config import Config, InputMark, InputPath, StageConfig
from danlu.evaluate.config import apart
from danlu.train.config import GuardConfig, OptimConfig, StartedConfig


class PreferenceLossConfig(Config):
    """The numbers in a loss of preferences."""

    beta: float = Field(
        0.1,
        gt=0,
        description="dpo, kto, ipo: how hard the policy is held to its reference; simpo: scale of the "
        "margin; orpo: weight of the odds ratio",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: share of pairs whose label is taken to be wrong (cDPO)"
    )
    gamma: float = Field(0.5, ge=0, description="simpo: the margin that is wanted")
    good_weight: float = Field(1.0, gt=0, description="kto: weight of replies that were judged good")
    bad_weight: float = Field(1.0, gt=0, description="kto: weight of replies that were judged bad")


class RewardConfig(StartedConfig):
    """`danlu reward`: a model of rewards, learnt from preferences."""

    weighting: Literal["pair", "ranking"] = Field(
        "pair",
        description="what counts the same: every pair of replies, or every ranking, over whose pairs the "
        "mean is taken (InstructGPT)",
    )
    margin: float = Field(0.0, ge=0, description="by how much the chosen reply's reward should be higher")
    centre: float = Field(
        0.0, ge=0, description="weight of the squared mean reward of a pair, which draws rewards to 0"
    )
    lm_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the language-model loss on the best replies (Askell et al. 2021)",
    )
    optim: OptimConfig = Field(OptimConfig(lr=1e-4, weight_decay=0.0), description="optimiser")


class DPOConfig(StartedConfig):
    """`danlu dpo`: a policy learns from preferences directly."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = Field(
        "dpo",
        description="dpo (with numbers.label_smoothing: cDPO), ipo, kto; simpo and orpo need no reference",
    )
    numbers: PreferenceLossConfig = Field(PreferenceLossConfig(), description="the numbers in the loss")
    optim: OptimConfig = Field(OptimConfig(lr=2e-5, weight_decay=0.0), description="optimiser")


class RewardSource(Config):
    """One part of a reward: exactly one of rule, regex, model, models and url."""

    rule: Literal["exact_number", "exact_text", "tests", "ended", "length"] | None = Field(
        None,
        description="exact_number, exact_text: against the row's answer; tests: whether the program in the "
        "reply passes the row's test; ended; length, in 100 characters",
    )
    regex: str | None = Field(None, description="1 where it is found in the reply, else 0")
    model: InputPath | None = Field(None, description="a model of rewards, from `danlu reward`")
    models: tuple[InputPath, ...] | None = Field(
        None, min_length=2, description="several, such as of different seeds: the mean of what they say"
    )
    doubt: float = Field(
        0.0,
        ge=0,
        description="models: the mean less so many of their standard deviations (Coste et al. 2023)",
    )
    url: str | None = Field(
        None, description='a server that answers {"prompts": […], "replies": […]} with {"rewards": […]}'
    )
    seconds: float = Field(60.0, gt=0, description="url: that it may take; tests: that a program may run")
    weight: float = Field(1.0, description="of this part in the sum")

    @property
    def name(self) -> str:
        many = None if self.models is None else " + ".join(map(str, self.models))
        return self.rule or self.regex or self.url or many or str(self.model)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        ways = (self.rule, self.regex, self.model, self.models, self.url)
        if sum(value is not None for value in ways) != 1:
            raise ValueError("a reward is one of rule, regex, model, models and url")
        return self


class Drawing(Config):
    """How replies are drawn and rewarded."""

    data: InputPath = Field(
        description="prompts: output folder of `danlu data prepare`, or a JSONL file with prompt or messages "
        "in each row; of messages the last reply is the answer"
    )
    reward_model: InputPath | None = Field(
        None, description="a model of rewards, from `danlu reward`: a part of the sum, of weight 1"
    )
    rewards: tuple[RewardSource, ...] = Field((), description="what replies are worth: parts of a sum")
    max_tokens: int = Field(64, ge=1, description="longest reply, in tokens")
    sequence_length: int = Field(512, ge=2, description="longest prompt with its reply, in tokens")
    temperature: float = Field(
        1.0, gt=0, description="of the draws; the policy that learns has temperature 1"
    )
    rollout_dtype: Literal["bf16", "float32"] | None = Field(
        None, description="of the weights that replies are drawn with; default: as the model computes"
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="share of a file's prompts kept for evaluation")
    held_out_prompts: int = Field(256, ge=0, description="most held-out prompts that are answered each time")
    seed: int = Field(0, ge=0, description="seed of every random choice in this stage")

    @property
    def summed(self) -> tuple[RewardSource, ...]:
        """All parts of the reward."""
        model = () if self.reward_model is None else (RewardSource(model=self.reward_model),)
        return (*model, *self.rewards)


class BestOfNConfig(StageConfig, Drawing):
    """`danlu best-of-n`: of several replies those with the best rewards become data."""

    init_from: Annotated[str, InputMark()] = Field(description="chat model that answers")
    n: int = Field(16, ge=2, description="replies to each prompt")
    keep: Literal["best", "pairs", "questions"] = Field(
        "best",
        description="best: conversations, with the best reply; pairs: preferences, of the best and the "
        "worst; questions: pairs for people to compare (danlu eval annotate)",
    )
    questions: int = Field(100, ge=1, description="most questions")
    judges: tuple[InputPath, ...] = Field(
        (),
        description="questions: models of rewards, commas between; the pairs about which they disagree most "
        "are asked; none = at random",
    )
    least: float | None = Field(
        None,
        description="best: only replies that are worth so much, even if all are; else: where one is worth "
        "more than another",
    )
    limit: int = Field(0, ge=0, description="only the first prompts that are learnt from; 0 = all")

    @field_validator("judges", mode="before")
    @classmethod
    def _paths(cls, values: Any) -> Any:
        return apart([values] if isinstance(values, str) else [str(value) for value in values])


class RLConfig(Drawing, StartedConfig):
    """What PPO and GRPO have in common: replies are drawn, rewarded and learnt from."""

    sequence_length: int = Field(512, ge=2, description="tokens in a packed sequence")
    batch_size: int = Field(16, ge=1, description="prompts in one rollout")
    group_size: int = Field(8, ge=1, description="replies to each prompt")
    updates: int = Field(1, ge=1, description="optimiser steps on one rollout, each on a part of its replies")
    passes: int = Field(1, ge=1, description="how often a rollout's replies are learnt from")
    clip_low: float = Field(0.2, gt=0, description="the ratio of policies is cut at 1 − this")
    clip_high: float = Field(0.2, gt=0, description="and at 1 + this")
    engine_cap: float = Field(
        0.0,
        ge=0,
        description="weigh each token by the ratio of the policy as it is trained to the one that drew it "
        "(rounding), cut at this (truncated importance sampling: Yao et al. 2025); 0 = not",
    )
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the reference")
    stop_kl: float = Field(
        0.0,
        ge=0,
        description="end the run, with its last checkpoint, where the replies' mean divergence from the "
        "reference is above this, in nats; 0 = never",
    )
    stop_alike: int = Field(
        50,
        ge=0,
        description="end the run after so many rollouts without any difference between rewards; 0 = never",
    )
    reference_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="after each rollout the reference is so much of itself, the rest of it the policy (a "
        "moving average); 1 = it stays the model before the run",
    )
    pretraining: InputPath | None = Field(
        None,
        description="text that is learnt beside, so that what the model knew is kept (InstructGPT's "
        "PPO-ptx): output folder of `danlu tokenize` with the model's own tokenizer",
    )
    pretraining_weight: float = Field(1.0, gt=0, description="of the text's loss, a mean over its tokens")
    pretraining_rows: int = Field(4, ge=1, description="sequences of text in one update")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="how it is estimated (Schulman 2020)")
    averaging: Literal["reply", "token", "length"] = Field(
        "reply",
        description="the loss is a mean over each reply's tokens (GRPO), over all tokens (DAPO), or a sum by "
        "max_tokens (Dr. GRPO)",
    )
    guard: GuardConfig = Field(
        GuardConfig(remedy="off"), description="loss-spike guard: here the loss says nothing, only NaN counts"
    )
    optim: OptimConfig = Field(OptimConfig(lr=1e-5, weight_decay=0.0), description="optimiser")


class GRPOConfig(RLConfig):
    """`danlu grpo`: a reply's advantage is how much better it is than the others to its prompt."""

    advantage: Literal["group", "centred", "leave_one_out", "global"] = Field(
        "group",
        description="group: less the group's mean, by its deviation (GRPO); centred: not by it (Dr. GRPO); "
        "leave_one_out: less the mean of the others (RLOO); global: less the divergence of the tokens from "
        "it on, whitened over the rollout (REINFORCE++)",
    )


class PPOConfig(RLConfig):
    """`danlu ppo`: a value head says what is to be expected; a token's advantage is what came beyond that."""

    group_size: int = Field(1, ge=1, description="replies to each prompt")
    updates: int = Field(4, ge=1, description="optimiser steps on one rollout, each on a part of its replies")
    averaging: Literal["reply", "token", "length"] = Field("token", description="as of grpo")
    kl: float = Field(0.05, ge=0, description="weight of the divergence from the reference")
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the divergence counts")
    kl_target: float = Field(
        0.0,
        ge=0,
        description="divergence of a reply, in nats, that the weight adapts to; 0 = the weight stays",
    )
    kl_gain: float = Field(0.1, gt=0, description="how fast the weight adapts")
    discount: float = Field(1.0, gt=0, le=1, description="γ, of what comes a token later")
    decay: float = Field(0.95, ge=0, le=1, description="λ of the generalised advantage estimation")
    value_weight: float = Field(0.1, gt=0, description="of the value head's loss")
    value_clip: float = Field(0.2, ge=0, description="values are cut to this around the old ones; 0 = not")
    whiten_rewards: bool = Field(False, description="divide rewards by their deviation over the rollout")
    whiten_advantages: bool = Field(True, description="advantages of mean 0 and variance 1 over the rollout")
