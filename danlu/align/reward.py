"""`danlu reward`: a model of rewards, and what it says of replies.

A language model whose output matrix is replaced by one row: the reward of a reply is its number at the token
that ends it (Ouyang et al. 2022, section 3.5; Bai et al. 2022, section 3). Saved as transformers'
…ForSequenceClassification with one label.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from danlu.align.config import RewardConfig
from danlu.align.preference_losses import bradley_terry
from danlu.align.replies import Replies, replies_of
from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.model.checkpoint import load
from danlu.model.cross_entropy import linear_cross_entropy
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render_reply
from danlu.tokens.loader import Batch
from danlu.train.checkpoint import NOTHING
from danlu.train.loop import Hooks, train
from danlu.train.result import TrainResult


def reward(config: RewardConfig, hooks: Hooks | None = None) -> TrainResult:
    """Trains a model of rewards from the model that `init_from` names; accuracy on held-out pairs."""
    if config.lora is not None:
        raise UserError("reward with lora: the head is trained with all weights", "leave lora out")
    if config.parallel == "tensor":
        raise UserError("reward with parallel tensor: its head isn't split", "set parallel ddp or fsdp")
    return train(config, "preferences", hooks, lambda model: Rewards(model, config))


class Rewards:
    """Bradley-Terry's loss, the mean over all pairs or over all rankings."""

    nothing, measure, kept = "a batch has no pair of replies", "held_out_loss", NOTHING

    def __init__(self, model: Transformer, config: RewardConfig) -> None:
        """`model` gets a head with a score, where it has none."""
        self.config = config
        self.shown: dict[str, float] = {}
        if config.lm_weight and not model.config.tied_embeddings:
            raise UserError(
                f"{config.init_from}: its output matrix is replaced, so lm_weight can't be", "set lm_weight 0"
            )
        if model.score is None:
            model.give_scores()
        elif model.config.scores != 1:
            raise UserError(f"{config.init_from} gives {model.config.scores} scores", "a reward is one")

    def count(self, batch: Batch) -> Tensor:
        replies = replies_of(batch)
        better, _ = replies.pairs()
        n = len(better) if self.config.weighting == "pair" else len(replies.group[better].unique())
        return torch.tensor(n, dtype=torch.float64, device=batch.ids.device)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        replies = replies_of(batch)
        hidden = model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1)
        losses, weights = self._losses(rewards_at(model, hidden, replies), replies)
        loss = (losses * weights).sum()
        if self.config.lm_weight:
            best = replies.tokens[replies.rank[replies.of_token] == 0]
            # A mean over each reply's tokens, so that a reply counts as much as a pair.
            share = 1 / replies.lengths[replies.of_token][replies.rank[replies.of_token] == 0]
            loss = loss + self.config.lm_weight * linear_cross_entropy(
                hidden[best], model.head_weight, batch.targets.flatten()[best], share.float()
            )
        return loss / count

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        replies = replies_of(batch)
        found = rewards_at(
            model, model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1), replies
        )
        losses, weights = self._losses(found, replies)
        better, worse = replies.pairs()
        margins = found[better] - found[worse]
        right = (margins > 0).double() + 0.5 * (margins == 0)
        values = (losses * weights, weights, right, margins.abs())
        return *(float(value.sum()) for value in values), float(len(margins))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        loss, weight, right, margin, n = sums
        return (
            {"held_out_loss": loss / weight, "accuracy": right / n, "reward_margin": margin / n} if n else {}
        )

    def text(self, figures: dict[str, float]) -> str:
        return (
            f"held-out loss {figures['held_out_loss']:.4f}, the chosen reply has the higher reward in "
            f"{figures['accuracy']:.1%}; rewards of a pair differ by {figures['reward_margin']:.3f}"
        )

    def finish(self, model: Transformer) -> None:
        """Nothing."""

    def _losses(self, found: Tensor, replies: Replies) -> tuple[Tensor, Tensor]:
        """Of each pair its loss and its weight."""
        better, worse = replies.pairs()
        losses = bradley_terry(found[better], found[worse], self.config.margin)
        if self.config.centre:
            losses = losses + self.config.centre * (found[better] + found[worse]).square()
        if self.config.weighting == "pair":
            return losses, torch.ones_like(losses)
        _, of_pair, sizes = replies.group[better].unique(return_inverse=True, return_counts=True)
        return losses, 1 / sizes[of_pair].to(losses.dtype)


def rewards_at(model: Transformer, hidden: Tensor, replies: Replies) -> Tensor:
    """(S,) float32: each reply's reward, from the hidden states (N, D) of its batch."""
    assert model.score is not None
    return model.score(hidden[replies.ends].float())[:, 0]


class RewardModel:
    """A trained model of rewards. It has its own tokenizer: between it and a policy there is only text."""

    def __init__(
        self,
        ref: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        batch_tokens: int = 8192,
    ) -> None:
        """`ref`: a model reference; `dtype`: None keeps the saved one; `batch_tokens`: computed at a time.

        Raises UserError for a language model.
        """
        self.model, self.tokenizer = load(ref, dtype, device)
        self.batch_tokens = batch_tokens
        if not self.model.config.scores:
            raise UserError(f"{ref} is no model of rewards", "train one: danlu reward")

    def __call__(self, prompts: Sequence[Messages], replies: Sequence[str]) -> list[float]:
        """The reward of each reply to its prompt. Raises UserError for one beyond the model's context."""
        rows = []
        for prompt, reply in zip(prompts, replies, strict=True):
            rendered = render_reply(prompt, reply, self.tokenizer)
            rows.append(rendered.ids[: len(rendered.mask) - rendered.mask[::-1].index(True)])
        return self.of_rows(rows)

    @torch.no_grad()
    def of_rows(self, rows: Sequence[list[int]]) -> list[float]:
        """The rewards of rows of ids, each up to the token that ends its reply."""
        assert self.model.score is not None
        return self.model.score(self.states(rows))[:, 0].tolist()

    @torch.no_grad()
    def states(self, rows: Sequence[list[int]]) -> Tensor:
        """(N, D) float32: the last layer's state at the last token of each row of ids.

        Raises UserError for a row beyond the model's context.
        """
        longest = self.model.config.max_positions
        if too_long := next((row for row in rows if len(row) > longest), None):
            raise UserError(
                f"a prompt with its reply has {len(too_long)} tokens, the model of rewards reads {longest}",
                "give shorter ones",
            )
        device = self.model.embedding.weight.device
        found = torch.zeros(len(rows), self.model.config.width, device=device)
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        while order:
            size = max(1, self.batch_tokens // len(rows[order[-1]]))
            some, order = order[-size:], order[:-size]
            length = max(len(rows[number]) for number in some)
            ids = torch.tensor(
                [[*rows[number], *[0] * (length - len(rows[number]))] for number in some], device=device
            )
            hidden = self.model.hidden(ids)  # what follows a row's end is not seen by it
            ends = torch.tensor([len(rows[number]) - 1 for number in some], device=device)
            found[some] = hidden[torch.arange(len(some), device=device), ends].float()
        return found
