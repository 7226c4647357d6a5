"""Reinforcement learning of a policy: replies are drawn, rewarded, and made more or less probable.

The loop is the training loop; its batches come from the policy itself (`rollouts.py`). What PPO and GRPO have
in common stands here.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from danlu.align.advantages import gae, whitened
from danlu.align.config import RLConfig
from danlu.align.policy_losses import KL_ESTIMATORS, clipped, count_of, token_weights
from danlu.align.replies import replies_of
from danlu.align.reward import RewardModel
from danlu.align.rewards import SummedReward
from danlu.align.rollouts import (
    OF_REPLIES,
    Drawer,
    Drawn,
    Places,
    Prompts,
    RolloutBatch,
    RolloutLoader,
    pack,
)
from danlu.core.device import choose_device, choose_dtype
from danlu.core.errors import UserError
from danlu.core.files import read_jsonl
from danlu.data.conversations import plain_text
from danlu.evaluate.intervals import wilson_interval
from danlu.model import parallel
from danlu.model.checkpoint import load
from danlu.model.cross_entropy import linear_cross_entropy, log_probabilities, log_probs_of
from danlu.model.lora import adapted_layers, without_adapter
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch, PackedLoader
from danlu.train.config import TrainConfig
from danlu.train.journal import HELD_OUT
from danlu.train.run import Data, Stopped


def check(config: RLConfig, name: str) -> None:
    """Raises UserError for what no policy can be trained with."""
    if config.parallel != "ddp":
        raise UserError(
            f"{name} with parallel {config.parallel}: the policy isn't spread", "set parallel ddp"
        )
    if config.stop_loss:
        raise UserError(f"{name} with stop_loss: no held-out loss is measured", "see stop_kl and stop_alike")
    if config.lora is not None and config.reference_decay < 1:
        raise UserError(
            f"{name} with lora and reference_decay: the reference is the base below the adapter, which stays",
            "leave one of them out",
        )
    if config.reference_decay < 1 and not config.kl and not config.stop_kl:
        raise UserError(
            f"{name} with reference_decay: nothing is held to a reference",
            "set kl or stop_kl, or leave it out",
        )
    replies, processes = config.batch_size * config.group_size, int(os.environ.get("WORLD_SIZE", "1"))
    if replies < config.updates * processes:
        raise UserError(
            f"{name}: {replies} replies in a rollout, for {config.updates} updates in {processes} processes",
            "raise batch_size or lower updates",
        )


@dataclass
class Share:
    """Of one update, the replies that this process learns from."""

    numbers: list[int]
    """Which of the rollout's they are"""
    drawn: Sequence[Drawn]
    places: Places
    batch: RolloutBatch

    @property
    def log_ratio(self) -> Tensor:
        """(B, T) of each token the log ratio of the policy that drew it and the reference."""
        return KL_ESTIMATORS["k1"](self.batch.old, self.batch.reference)


class Policy(ABC):
    """Where a run gets its batches, and the part of its loss that is the policy's."""

    nothing, measure = "no reply was drawn", "held_out_reward"
    config: RLConfig

    def __init__(self, config: RLConfig) -> None:
        self.config = config
        self.tokenizer = load(str(config.init_from))[1]
        self.prompts = Prompts(config.data, self.tokenizer, config)
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        self.reward = SummedReward(config.summed, partial(RewardModel, dtype=dtype, device=device))
        self._held_out: Sequence[Drawn] = ()
        self.reference: Transformer | None = None
        self._seen: list[tuple[dict[str, float], float, float, float]] = []

    @property
    def once(self) -> bool:
        """Whether a rollout has one update: then the policy that learns is the one that drew."""
        return self.config.updates * self.config.passes == 1

    def fingerprint(self) -> str:
        return self.prompts.sha256

    def objective(self, model: Transformer) -> "Policy":
        """`model`: as it is before the run; of it a copy is kept where a reference is needed."""
        self.model = model
        if self.is_held and not adapted_layers(model):
            device = model.embedding.weight.device
            self.reference = load(str(self.config.init_from), dtype=torch.float32, device=device)[0]
            self.reference.requires_grad_(False)
        self.drawer = Drawer(model, self.tokenizer, self.config, self.reward)
        return self

    # Batches

    def loader(self, config: TrainConfig) -> RolloutLoader:
        self.rollouts = RolloutLoader(
            self.prompts, self.drawer, self.finish_rollout, self.config, self.text_loader(config)
        )
        return self.rollouts

    def text_loader(self, config: TrainConfig) -> PackedLoader | None:
        """Of what is learnt beside. Raises UserError where its tokens are not the model's."""
        if self.config.pretraining is None:
            return None
        changes = {
            "data": self.config.pretraining,
            "batch_size": self.config.pretraining_rows,
            "accumulate": 1,
        }
        own = config.model_copy(update=changes)
        text = Data(own, "text")
        if text.tokenizer.fingerprint() != self.tokenizer.fingerprint():
            raise UserError(
                f"{self.config.pretraining} has the tokens of another tokenizer than {self.config.init_from}",
                "run `danlu tokenize` with the model's",
            )
        return text.loader(own)

    def finish_rollout(self, drawn: Sequence[Drawn]) -> tuple[list[RolloutBatch], dict[str, float]]:
        """The batches of one rollout's updates, this process's part of each, and the rollout's figures."""
        figures = self.said(drawn)
        shares = [self.look(part, [drawn[i] for i in part]) for part in self.parts(len(drawn))]
        if self.is_held:
            sums = [float((share.log_ratio * share.batch.weights).sum()) for share in shares]
            figures["reply_kl"] = parallel.sum_over_ranks([sum(sums)])[0] / len(drawn)
            if self.config.stop_kl and figures["reply_kl"] > self.config.stop_kl:
                raise Stopped(
                    f"replies are {figures['reply_kl']:.2f} nats from the reference, stop_kl is "
                    f"{self.config.stop_kl:g}"
                )
        self._end_where_nothing_is_learnt(figures)
        self.judge(shares, drawn, figures)
        self._follow()
        return [share.batch for share in shares] * self.config.passes, figures

    @abstractmethod
    def judge(self, shares: Sequence[Share], drawn: Sequence[Drawn], figures: dict[str, float]) -> None:
        """Sets the advantages in the shares, of all that were `drawn`; adds to the figures."""

    def said(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """Figures of a rollout; `alike`: share of the groups whose rewards are equal (of one: of all)."""
        rewards = torch.tensor([one.reward for one in drawn])
        groups = rewards.view(-1, self.config.group_size) if self.config.group_size > 1 else rewards[None]
        return {
            "reward": float(rewards.mean()),
            "reply_tokens": sum(len(one.ids) for one in drawn) / len(drawn),
            "ended": sum(one.reply.ended for one in drawn) / len(drawn),
            "alike": float((groups == groups[:, :1]).all(1).float().mean()),
            **self.by_part(drawn, "reward"),
        }

    def by_part(self, drawn: Sequence[Drawn], prefix: str) -> dict[str, float]:
        """Means of the rewards that are summed, where there are several; one of weight 0 is only measured."""
        names = self.reward.names
        if len(names) == 1:
            return {}
        return {
            f"{prefix}: {name}": sum(one.parts[place] for one in drawn) / len(drawn)
            for place, name in enumerate(names)
        }

    def _end_where_nothing_is_learnt(self, figures: dict[str, float]) -> None:
        before = self.rollouts.figures.get("alike_for", 0.0)
        figures["alike_for"] = before + 1 if figures["alike"] == 1 else 0.0
        if self.config.stop_alike and figures["alike_for"] >= self.config.stop_alike:
            raise Stopped(
                f"all rewards were alike in {self.config.stop_alike} rollouts, the last "
                f"{figures['reward']:g}: nothing can be learnt from them"
            )

    def parts(self, n: int) -> list[list[int]]:
        """Of each update the replies that this process learns from."""
        rank, size, updates = parallel.rank(), parallel.world_size(), self.config.updates
        return [list(range(first, n, updates))[rank::size] for first in range(min(updates, n))]

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """One reply to each held-out prompt."""
        rows = [self.prompts.rows[number] for number in self.prompts.held_out]
        if rows:
            drawn = self._held_out = self.drawer.draw(rows, 1, 0)
            batch, places = pack([one.pair for one in drawn], self.config.sequence_length)
            rewards = spread(torch.tensor([one.reward for one in drawn]), places, batch.weights)
            others = dict.fromkeys((*OF_REPLIES, "text"), rewards)  # the others are not looked at here
            yield RolloutBatch(**vars(batch), **others)

    @torch.no_grad()
    def look(self, numbers: list[int], drawn: Sequence[Drawn]) -> Share:
        """The replies packed, with what policy and reference say of them, as yet without a judgement."""
        packed, places = pack([one.pair for one in drawn], self.config.sequence_length)
        engine = torch.zeros_like(packed.weights)
        for row, spans in enumerate(places):
            for number, begin, end in spans:
                engine[row, begin:end] = torch.tensor(drawn[number].log_probs)
        device = self.model.embedding.weight.device
        packed, engine = packed.to(device), engine.to(device)
        old, values = self.of_policy(packed)
        zeros = torch.zeros_like(engine)
        batch = RolloutBatch(
            **vars(packed),
            advantages=zeros,
            engine=engine,
            old=engine if old is None else old,
            reference=self.of_reference(packed) if self.is_held else zeros,
            values=zeros if values is None else values,
            returns=zeros,
            text=zeros,
        )
        return Share(numbers, drawn, places, batch)

    def of_policy(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities of the replies under the policy as it is, and values, where they are needed."""
        return None if self.once else log_probabilities(self.model, batch, counted=True), None

    @property
    def is_held(self) -> bool:
        """Whether the divergence from a reference counts."""
        return self.config.kl > 0 or self.config.stop_kl > 0

    @property
    def kept(self) -> dict[str, Tensor]:
        """A reference that moves is no longer the model of `init_from`."""
        if self.reference is None or self.config.reference_decay == 1:
            return {}
        return {f"reference.{name}": one.data for name, one in self.reference.named_parameters()}

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the reference a little towards the policy."""
        if self.reference is None or self.config.reference_decay == 1:
            return
        policy = dict(self.model.named_parameters())
        for name, one in self.reference.named_parameters():
            one.lerp_(policy[name].detach(), 1 - self.config.reference_decay)

    def of_reference(self, batch: Batch) -> Tensor:
        """Log-probabilities under the model before the run."""
        if self.reference is None:
            with without_adapter(self.model):
                return log_probabilities(self.model, batch, counted=True)
        self.reference.compute_dtype = self.model.compute_dtype
        return log_probabilities(self.reference, batch, counted=True)

    # The objective

    def count(self, batch: Batch) -> Tensor:
        self._seen = []  # all are counted before the first loss
        return count_of(batch, self.config.averaging).to(batch.ids.device, torch.float64)

    def loss(self, model: Transformer, batch: Batch, count: float) -> Tensor:
        assert isinstance(batch, RolloutBatch)
        hidden = model.hidden(batch.ids, batch.positions, batch.segments)
        log_probs, entropies = log_probs_of(model, batch, hidden, counted=True)
        log_ratio = log_probs - (log_probs.detach() if self.once else batch.old)
        losses = clipped(log_ratio, batch.advantages, self.config.clip_low, self.config.clip_high)
        if self.config.engine_cap:
            drawn_by_another = (log_probs - log_ratio).detach() - batch.engine
            losses = losses * drawn_by_another.exp().clamp(max=self.config.engine_cap)
        losses = losses + self.further(model, batch, hidden, log_probs)
        beside = self._text_loss(model, batch, hidden)
        self._see(batch, log_probs.detach(), log_ratio.detach(), entropies, float(beside.detach()))
        weights = token_weights(batch, self.config.averaging, self.config.max_tokens)
        of_replies = (losses * weights).sum() / count
        return of_replies + self.config.pretraining_weight * beside

    def _text_loss(self, model: Transformer, batch: RolloutBatch, hidden: Tensor) -> Tensor:
        """This part's share of the mean over the tokens that are learnt beside; a scalar."""
        rows = batch.text.flatten().nonzero()[:, 0]
        if not len(rows):
            return hidden.new_zeros(())
        return linear_cross_entropy(
            hidden.flatten(0, 1)[rows],
            model.head_weight,
            batch.targets.flatten()[rows],
            batch.text.flatten()[rows],
            model.head_bias,
            model.config.logit_softcap,
        )

    def further(self, model: Transformer, batch: RolloutBatch, hidden: Tensor, log_probs: Tensor) -> Any:
        """What is added to each token's loss."""
        return 0.0

    def _see(
        self, batch: RolloutBatch, log_probs: Tensor, log_ratio: Tensor, entropies: Tensor, beside: float
    ) -> None:
        """Keeps what `shown` says of this part of a step."""
        ratio, before = log_ratio.exp(), log_probs - log_ratio
        outside = (ratio < 1 - self.config.clip_low) | (ratio > 1 + self.config.clip_high)
        tokens = {"entropy": entropies, "clipped": outside.float()}
        if self.is_held:
            tokens["kl"] = KL_ESTIMATORS["k1"](log_probs, batch.reference)
        sums = {name: float((values * batch.weights).sum()) for name, values in tokens.items()}
        gap = float(((before - batch.engine).abs() * batch.weights).max())
        self._seen.append((sums, float(batch.weights.sum()), gap, beside))

    @property
    def shown(self) -> dict[str, float]:
        """Of the rollout, and means over the tokens of the last step, in all its parts and processes.

        `engine_gap`, the largest difference between two programs that compute the same, is rounding.
        """
        seen = [part for process in parallel.gather(self._seen) for part in process]
        if not seen:
            return self.rollouts.figures
        n = sum(tokens for _, tokens, _, _ in seen)
        means = {name: sum(sums[name] for sums, _, _, _ in seen) / n for name in seen[0][0]}
        if self.config.pretraining is not None:
            means["pretraining_loss"] = sum(beside for _, _, _, beside in seen)
        return {**self.rollouts.figures, **means, "engine_gap": max(gap for _, _, gap, _ in seen)}

    def sums(self, model: Transformer, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, RolloutBatch)
        replies = replies_of(batch)
        rewards = replies.sums(batch.advantages) / replies.lengths
        return float(rewards.double().sum()), float(len(rewards))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        total, n = sums
        if not n:
            return {}
        found = {"held_out_reward": total / n, **self.by_part(self._held_out, "held_out_reward")}
        first = [row["reward"] for row in read_jsonl(self.config.out / HELD_OUT) if row["step"] == 0]
        if len(first) == len(self._held_out):
            wins = [
                (one.reward > old) + 0.5 * (one.reward == old)
                for one, old in zip(self._held_out, first, strict=True)
            ]
            share = sum(wins) / len(wins)
            low, high = wilson_interval(share, len(wins))
            found |= {"wins": share, "wins_low": low, "wins_high": high}
        return found

    def held_out_rows(self) -> Sequence[dict[str, Any]]:
        return [
            {"prompt": plain_text(one.reply.prompt), "reply": one.reply.text, "reward": one.reward}
            for one in self._held_out
        ]

    def text(self, figures: dict[str, float]) -> str:
        said = f"the mean reward of one reply to each held-out prompt is {figures['held_out_reward']:.4f}"
        if "wins" in figures:
            low, high = figures["wins_low"], figures["wins_high"]
            said += f"; it beats the first model's in {figures['wins']:.1%} [{low:.1%}, {high:.1%}]"
        return said

    @abstractmethod
    def finish(self, model: Transformer) -> None:
        """Takes off what the trained model needs no more."""


def spread(values: Tensor, places: Places, like: Tensor) -> Tensor:
    """(B, T): each reply's value at all of its tokens."""
    found = torch.zeros_like(like)
    for row, spans in enumerate(places):
        for number, begin, end in spans:
            found[row, begin:end] = values[number]
    return found


def end_rewards(share: Share) -> Tensor:
    """(B, T): each reply's reward at its last token."""
    found = torch.zeros_like(share.batch.weights)
    for row, spans in enumerate(share.places):
        for number, _, end in spans:
            found[row, end - 1] = share.drawn[number].reward
    return found


def by_reply_gae(rewards: Tensor, values: Tensor, places: Places, discount: float, decay: float) -> Tensor:
    """`gae` of replies that are packed: (B, T)."""
    spans = [(row, begin, end) for row, of_row in enumerate(places) for _, begin, end in of_row]
    longest = max(end - begin for _, begin, end in spans)
    index = torch.tensor([[row, begin] for row, begin, _ in spans], device=rewards.device)
    offsets = torch.arange(longest, device=rewards.device)
    lengths = torch.tensor([end - begin for _, begin, end in spans], device=rewards.device)
    mask = offsets < lengths[:, None]
    column = (index[:, 1:] + offsets).clamp(max=rewards.shape[1] - 1)
    row = index[:, :1].expand_as(column)
    found = gae(rewards[row, column] * mask, values[row, column] * mask, mask.float(), discount, decay)
    out = torch.zeros_like(rewards)
    out[row[mask], column[mask]] = found[mask]
    return out


def whiten(shares: Sequence[Share]) -> None:
    """Advantages of mean 0 and variance 1 over the rollout's tokens, in all processes."""
    batches = [share.batch for share in shares]
    whole, mask = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("advantages", "weights")
    )
    white = whitened(whole, mask, total=parallel.sum_over_ranks)
    for batch, part in zip(batches, white.split([len(batch.ids) for batch in batches]), strict=True):
        batch.advantages = part
