"""Pretraining: the loop on running text, every token supervised."""

from danlu.train.config import TrainConfig
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def pretrain(config: TrainConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains a new model, or one that `init_from` names (continued pretraining)."""
    return train(config, "text", hooks)
