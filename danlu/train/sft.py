"""Supervised fine-tuning: the loop on conversations, only the assistant's turns supervised."""

from danlu.train.config import SFTConfig
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def sft(config: SFTConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names on conversations; held-out loss before and after."""
    return train(config, "chat", hooks)
