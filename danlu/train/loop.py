"""The one training loop. Pretraining and fine-tuning are this loop with other data."""

from danlu.model import parallel
from danlu.tokens.loader import Batch
from danlu.train.config import TrainConfig
from danlu.train.interrupt import Interrupt
from danlu.train.result import TrainResult
from danlu.train.run import Source, Stopped, exactness
from danlu.train.training import MakeObjective, Training


class Hooks:
    """Where an experiment may interfere with a run, e.g. to poison it. The defaults change nothing."""

    def batches(self, index: int, batches: list[Batch]) -> list[Batch]:
        """`index`: place of this batch in the data, from 1; skipped ones count."""
        return batches

    def learning_rate(self, step: int, scale: float) -> float:
        """`step`: number of the update, from 1. `scale`: multiple of the peak learning rate."""
        return scale


def train(
    config: TrainConfig,
    kind: str,
    hooks: Hooks | None = None,
    make_objective: MakeObjective | None = None,
    data: Source | None = None,
) -> TrainResult:
    """Trains on tokens of `kind`, resuming where the folder holds an unfinished run. See `Training`.

    Raises UserError for data, model and settings that don't fit together; KeyboardInterrupt when
    interrupted, after a checkpoint.
    """
    hooks = hooks or Hooks()
    with (
        exactness(config.deterministic),
        Training(config, kind, make_objective, data) as training,
        Interrupt() as interrupt,
    ):
        training.begin()
        while training.step < config.steps and not training.is_learnt():
            number = training.step + 1
            try:
                batches = training.draw()
            except Stopped as reason:
                training.stop(str(reason))
                break
            batches = hooks.batches(training.drawn, batches)
            scale = hooks.learning_rate(number, training.learning_rate_scale(number))
            result = training.update(batches, scale)
            alarm = training.guard.observe(number, result.loss, result.grad_norm)
            if alarm and training.go_back(alarm):
                continue
            training.count(number, result, scale)
            if training.is_due(config.checkpoint_every) or training.is_due(config.eval_every):
                training.save()  # before the evaluation: what fails there must not cost the training
            training.evaluate_and_sample()
            if parallel.any_of(interrupt.asked):
                training.interrupted()
        return training.finish()
