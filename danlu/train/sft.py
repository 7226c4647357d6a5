"""Supervised fine-tuning: the loop on conversations, only the assistant's turns supervised."""

from danlu.core.errors import UserError
from danlu.train.config import TrainConfig
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def sft(config: TrainConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains the model that `init_from` names on conversations; held-out loss before and after."""
    if config.init_from is None:
        raise UserError("sft: init_from is required and missing", "name a pretrained model's folder")
    return train(config, "chat", hooks)
