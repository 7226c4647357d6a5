"""A run's parts and its place in time: what the loop drives, and what a checkpoint holds."""

import time
from collections.abc import Callable
from typing import Any

import torch

from danlu.core.device import peak_rss_bytes
from danlu.core.errors import UserError
from danlu.core.metrics import read_metrics
from danlu.model import parallel
from danlu.model.checkpoint import base_digest, resolve, save_adapted, save_model
from danlu.model.compiling import should_compile
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train import held_out, run
from danlu.train.checkpoint import Checkpointer, random_state, set_random_state
from danlu.train.config import TrainConfig
from danlu.train.guard import Alarm, Guard
from danlu.train.journal import Journal
from danlu.train.objective import LanguageModelling, Objective
from danlu.train.optim import make_optimizer
from danlu.train.result import TrainResult
from danlu.train.samples import sample
from danlu.train.schedule import learning_rate_scale
from danlu.train.step import StepResult, TrainStep

MakeObjective = Callable[[Transformer], Objective]


class Training:
    """Model, optimiser, data and journal of one run; resumed from its folder where that holds a checkpoint.

    `kind`: of the tokens, text, chat or preferences; `make_objective`: of the model as it is before the run,
    language modelling where there is none; `data`: where it is no folder of tokens.
    """

    def __init__(
        self,
        config: TrainConfig,
        kind: str,
        make_objective: MakeObjective | None = None,
        data: run.Source | None = None,
    ) -> None:
        self.config, self.kind = config, kind
        self.device, self.dtype = run.choose_machine(config)
        run.seed_everything(config.seed)
        self.data = data or run.Data(config, kind)
        self.model = run.build_model(config, self.data.tokenizer, self.device)
        self.parameters = self.trained = sum(p.numel() for p in self.model.parameters())
        self.base = ""
        if config.lora is not None and config.init_from is not None:
            self.base = parallel.agree(base_digest(resolve(config.init_from)))
            run.adapt(self.model, config.lora, self.dtype)
            self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            torch.manual_seed(config.seed + parallel.rank())  # of the dropout, in every process its own
        self.objective: Objective = (
            make_objective(self.model) if make_objective else LanguageModelling(self.data.tokenizer)
        )
        if config.lora is None:  # an objective may have given the model another head
            self.parameters = self.trained = sum(p.numel() for p in self.model.parameters())
        self.loader = self.data.loader(config)
        self.batches = iter(self.loader)
        self.sharded = parallel.spread(self.model, config.parallel)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        tokens = config.steps * config.batch_size * config.sequence_length
        self.compiled = should_compile(
            config.compile, self.model.config, tokens, config.sequence_length, config.lora
        )
        self.updater = TrainStep(
            self.model,
            self.optimizer,
            dtype=self.dtype,
            compile=self.compiled,
            clip=config.optim.clip,
            way=config.parallel,
            checkpoint_activations=config.checkpoint_activations,
            objective=self.objective,
        )
        self.guard = Guard(config.guard)
        self.step = self.drawn = self.tokens = 0
        self.seconds = 0.0
        self.checkpoints = Checkpointer(config.out / "checkpoints", config.keep_checkpoints)
        self.resumed = self._resume()
        self.journal = Journal(config, self.step if self.resumed else None, parallel.is_main())
        self.clock = time.monotonic()

    # State: saved in every checkpoint, restored on a resume and when the guard goes back.

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "drawn": self.drawn,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "random": random_state(),
            "data": self.data.fingerprint(),
            "base": self.base,
            "config": self.config.model_dump(mode="json"),
            "surroundings": self._surroundings(),
        }

    def save(self) -> None:
        self.checkpoints.save(self.step, self.model, self.optimizer, self.state(), self.objective.kept)

    def _restore(self, step: int) -> dict[str, Any]:
        state = self.checkpoints.read_state(step)
        self.checkpoints.load(step, self.model, self.optimizer, self.objective.kept)
        self.step, self.drawn, self.tokens = state["step"], state["drawn"], state["tokens"]
        self.loader.load_state_dict(state["loader"])
        self.batches = iter(self.loader)
        set_random_state(state["random"])
        return state

    def _resume(self) -> dict[str, Any] | None:
        """The state of the newest checkpoint, put in place; None where there is none."""
        steps = self.checkpoints.steps()
        if not steps:
            return None
        saved = self.checkpoints.read_state(steps[-1])
        run.require_same_run(self.config, self.data.fingerprint(), self.base, saved)
        self._restore(steps[-1])
        self.guard.load_state_dict(saved["guard"])
        self.seconds = saved["seconds"]
        return saved

    # What the loop calls, in its order.

    def begin(self) -> None:
        """Says what starts; a new run is checkpointed, a given model measured, before the first step."""
        if self.resumed:
            self.journal.event(self.step, self._resume_text(self.resumed))
        else:
            self.journal.event(0, self._start_text())
            if text := self.loader.note:
                self.journal.event(0, text)
            self.save()
        if self.step == 0 and self.config.init_from is not None:
            self._evaluate()
        self.evaluate_and_sample()

    def draw(self) -> list[Batch]:
        """The next step's micro-batches."""
        batch = next(self.batches)
        self.drawn += 1
        self.drawn_tokens = batch.ids.numel() * parallel.data_processes(self.config.parallel)
        return batch.split(self.config.accumulate)

    def learning_rate_scale(self, number: int) -> float:
        """Multiple of the peak for update `number` (from 1): the schedule's, lowered by the guard."""
        schedule = learning_rate_scale(number - 1, self.config.steps, self.config.schedule)
        return schedule * self.guard.learning_rate_scale

    def update(self, batches: list[Batch], scale: float) -> StepResult:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        self.updater.clip = self.config.optim.clip * self.guard.clip_scale
        return self.updater.step([batch.to(self.device) for batch in batches])

    def go_back(self, alarm: Alarm) -> bool:
        """Applies the guard's remedy; False where there is none and the run goes on as it is."""
        action = self.guard.act(alarm, self.checkpoints.steps())
        if action is None:
            if alarm.fatal:
                raise UserError(
                    f"{self.config.out}: {alarm.reason}, and the guard has no remedy (left)",
                    "lower optim.lr, or set guard.remedy to opt or palm",
                )
            self.journal.event(
                self.step, f"{alarm.reason}. No checkpoint before it is kept: going on", "guard"
            )
            return False
        state = self._restore(action.target)
        self.guard.load_statistics(state["guard"])
        self.checkpoints.discard_after(action.target)
        for _ in range(action.skip):
            self.draw()
        self.journal.event(self.step, action.text, "guard")
        return True

    def count(self, number: int, result: StepResult, scale: float) -> None:
        """Counts the update as done, and reports it."""
        now = time.monotonic()
        elapsed, self.clock = now - self.clock, now
        tokens = self.drawn_tokens
        self.step = number
        self.tokens += tokens
        self.seconds += elapsed
        self.checkpoints.check()
        if self.is_due(self.config.log_every):
            shown = self.objective.shown
            self.journal.step(
                number,
                {"loss": result.loss, **shown, "tokens/s": round(tokens / elapsed)},
                loss=result.loss,
                lr=self.config.optim.lr * scale,
                grad_norm=result.grad_norm,
                tokens=self.tokens,
                tokens_per_second=tokens / elapsed,
                memory=memory_bytes(self.device),
                epoch=self.loader.epoch,
                **shown,
            )

    def is_due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step > 0 and self.step % every == 0)

    def evaluate_and_sample(self) -> None:
        """Evaluates and samples where this step is due for it."""
        if self.is_due(self.config.eval_every):
            self._evaluate()
        if self.is_due(self.config.sample_every):
            self._sample()
        self.clock = time.monotonic()

    def _evaluate(self) -> None:
        if parallel.agree(self.journal.has(self.step, self.objective.measure)):  # done before a kill
            return
        batches = self.data.held_out_batches(self.config)
        figures = held_out.evaluate(self.objective, self.model, batches, self.device, self.config.parallel)
        if figures:
            self.journal.held_out(self.step, self.data.held_out_rows())
            self.journal.event(self.step, self.objective.text(figures))
            self.journal.row(self.step, **figures)

    def _sample(self) -> None:
        prompts = self.config.sample_prompts
        if not prompts or parallel.agree(self.journal.has_samples(self.step)):
            return
        texts, packing = sample(self.model, self.data.tokenizer, self.config, self.kind)
        self.journal.samples(self.step, prompts, texts)
        if packing is not None:
            figures = {"packed_bytes": packing.n_bytes, "packing_seconds": packing.seconds}
            self.journal.row(self.step, **figures)

    def is_learnt(self) -> bool:
        """Whether the evaluation of this step is as good as `stop_loss` asks for; then that is said."""
        if not (self.config.stop_loss and self.is_due(self.config.eval_every)):
            return False
        rows = read_metrics(self.config.out) if parallel.is_main() else []
        losses = [row["held_out_loss"] for row in rows if row["step"] == self.step and "held_out_loss" in row]
        if not parallel.agree(bool(losses) and losses[-1] <= self.config.stop_loss):
            return False
        self.journal.event(self.step, f"held-out loss is at most stop_loss, {self.config.stop_loss:g}: ended")
        self._sample()
        return True

    def stop(self, reason: str) -> None:
        """Ends the run before its last step, with the newest checkpoint."""
        last = self.step
        self._restore(self.checkpoints.steps()[-1])
        self.journal.event(last, f"stopped: {reason}; the model of step {self.step} is kept")
        self._evaluate()

    def interrupted(self) -> None:
        """Leaves a checkpoint and ends the run; the same command resumes it."""
        if not (self.is_due(self.config.checkpoint_every) or self.is_due(self.config.eval_every)):
            self.save()
        self.checkpoints.wait()
        self.journal.event(self.step, "interrupted; checkpoint written")
        raise KeyboardInterrupt

    def finish(self) -> TrainResult:
        """Writes the model's folder, or the adapter's; returns the figures."""
        self.checkpoints.wait()
        self.objective.finish(self.model)
        kind = "model" if self.config.lora is None else "adapter"
        folder = self.config.out / kind
        weights = parallel.whole_state_dict(self.model) if self.sharded else None
        if parallel.is_main():
            if self.config.lora is not None and self.config.init_from is not None:
                base, kept = resolve(self.config.init_from), self.config.lora.quantise
                save_adapted(self.model, folder, self.data.tokenizer, base, kept)
            else:
                save_model(self.model, folder, self.data.tokenizer, state=weights)
        self.journal.event(self.step, f"finished; the {kind} is in {folder}")
        parallel.barrier()
        rows = read_metrics(self.config.out)
        measured = [row for row in rows if self.objective.measure in row]
        losses = [row["loss"] for row in rows if "loss" in row and row["step"] > 0.9 * self.step]
        before = measured[0] if measured and measured[0]["step"] == 0 else {}
        after = measured[-1] if measured else {}
        return TrainResult(
            parameters=self.parameters,
            trained_parameters=self.trained,
            steps=self.step,
            tokens=self.tokens,
            epochs=float(self.loader.epoch),
            loss=sum(losses) / len(losses),
            held_out_loss=after.get("held_out_loss"),
            held_out_loss_before=before.get("held_out_loss"),
            bits_per_byte=after.get("bits_per_byte"),
            held_out_reward=after.get("held_out_reward"),
            held_out_reward_before=before.get("held_out_reward"),
            accuracy=after.get("accuracy"),
            accuracy_before=before.get("accuracy"),
            interventions=self.guard.decisions.interventions,
            seconds=self.seconds,
            tokens_per_second=self.tokens / self.seconds,
            model=str(folder),
        )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exc: object) -> None:
        self.checkpoints.close()
        self.journal.close(*exc)

    # What is said about a run.

    def _start_text(self) -> str:
        config = self.config
        exact = "deterministic algorithms" if config.deterministic else "algorithms that may vary"
        adapter = f", {self.trained:,} of an adapter trained" if config.lora else ""
        return (
            f"started: {self.parameters:,} parameters{adapter}, {config.steps:,} steps of "
            f"{config.batch_size} × {config.sequence_length} tokens on {self.device} in "
            f"{str(self.dtype).removeprefix('torch.')}, "
            f"{parallel.world_size()} process(es), {torch.get_num_threads()} threads, "
            f"{'compiled' if self.compiled else 'not compiled'}, {exact}"
        )

    def _resume_text(self, saved: dict[str, Any]) -> str:
        then, now = saved["surroundings"], self._surroundings()
        changed = [f"{name} {then[name]} → {now[name]}" for name in now if then[name] != now[name]]
        exact = f"; exact only to rounding, since {', '.join(changed)}" if changed else ""
        return f"resumed from the checkpoint of step {self.step}{exact}"

    def _surroundings(self) -> dict[str, Any]:
        """What has to stay the same for a resume to be exact to the bit, beside config and data."""
        return {"threads": torch.get_num_threads(), "torch": torch.__version__, "compiled": self.compiled}


def memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the GPU, else of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
