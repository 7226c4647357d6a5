"""Config of alignment. Imports no torch."""

from pydantic import Field

from danlu.core.config import Config


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
