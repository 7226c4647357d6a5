"""Config of alignment. Imports no torch."""

from typing import Literal

from pydantic import Field

from danlu.core.config import Config
from danlu.train.config import OptimConfig, TrainConfig


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


class RewardConfig(TrainConfig):
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


class DPOConfig(TrainConfig):
    """`danlu dpo`: a policy learns from preferences directly."""

    loss: Literal["dpo", "ipo", "simpo", "orpo"] = Field(
        "dpo", description="dpo (with numbers.label_smoothing: cDPO), ipo; simpo and orpo need no reference"
    )
    numbers: PreferenceLossConfig = Field(PreferenceLossConfig(), description="the numbers in the loss")
    optim: OptimConfig = Field(OptimConfig(lr=2e-5, weight_decay=0.0), description="optimiser")
