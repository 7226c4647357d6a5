"""What came out of a training run."""

from pydantic import BaseModel


class TrainResult(BaseModel):
    """The figures of a run; `result.json` of its stage."""

    parameters: int
    trained_parameters: int
    """All of them, or the adapter's."""
    steps: int
    tokens: int
    epochs: float
    loss: float
    """Mean training loss of the last tenth of the steps, nats per supervised token or per pair."""
    held_out_loss: float | None
    """The same of held-out data, after."""
    held_out_loss_before: float | None
    """Before the first step; only where the run started from a model."""
    bits_per_byte: float | None
    """Of the supervised held-out text, after."""
    held_out_reward: float | None = None
    """Mean reward of one reply to each held-out prompt, after."""
    held_out_reward_before: float | None = None
    accuracy: float | None = None
    """Share of held-out pairs in which the chosen reply gets the higher reward, after."""
    accuracy_before: float | None = None
    interventions: int
    """Of the loss-spike guard."""
    seconds: float
    """Spent in training steps, over all resumes."""
    tokens_per_second: float
    model: str
    """Folder of the model, or of the adapter."""
