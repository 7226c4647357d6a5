"""A step of GRPO: danlu beside TRL's GRPOTrainer, in turns, and danlu's PPO beside both.

    python benchmarks/rlhf.py [--shape 135M] [--prompts 2] [--group 8] [--reply-tokens 64] [--turns 7]
                              [--dtype float32 bf16] [--tokenizer smollm2] [--device cpu] [--json FILE]

A step is everything from one batch of prompts to the next: replies are drawn, rewarded (by their length,
which costs nothing), and one update is made by all of them. Both have the same weights at the start, the same
prompts in each step (questions of 20 to 150 tokens, in the tokenizer's chat form), and replies as long:
weights are drawn at random, and such a model all but never ends a reply by itself. No reference model, ratios
cut at 0.2, AdamW on float32 weights, norm clipped at 1; in bf16 the products and the activations are rounded
(TRL: autocast). "TRL, bf16 weights" is what TRL can do besides: weights, and with them the small steps of the
optimiser, are rounded too; it isn't what danlu is compared with.

Every contestant is a process of its own. danlu's and TRL's GRPO take turns, each sleeping while the other
works, and the ratio of times is taken within a turn; then the others come, one after another, as all do on a
GPU: memory is short (a step of 32 replies by 135M parameters takes 12 GB in either). Where the time of a step
goes is measured inside of it: drawing replies, rewards, and the rest, which is training.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _racing import Absent, Loop, Quietness, median_interval, say

from danlu.model.config import ModelConfig

SHAPES = {
    "135M": ModelConfig(
        vocab_size=49152, width=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_width=1536, max_positions=2048
    ),
    "0.6B": ModelConfig(
        vocab_size=49152,
        width=1536,
        n_layers=20,
        n_heads=16,
        n_kv_heads=4,
        ffn_width=4096,
        max_positions=2048,
    ),
}
LR = 1e-6
WARM_UP = 2


@dataclass(frozen=True)
class Race:
    """What is equal for all contestants. `model`: the folder of weights and tokenizer."""

    model: Path
    data: Path
    device: str
    prompts: int
    group: int
    reply_tokens: int


def questions(n: int) -> list[str]:
    """Sums of three to thirty numbers."""
    chance = random.Random(0)
    return [
        "What is " + " + ".join(str(chance.randrange(100, 1000)) for _ in range(chance.randint(3, 30))) + "?"
        for _ in range(n)
    ]


def write_model(shape: ModelConfig, ref: str, folder: Path) -> None:
    """Weights at random behind an existing tokenizer, as a Hugging Face folder.

    `ref`: a model whose tokenizer it is, or a folder of it alone.
    """
    import torch

    from danlu.model.checkpoint import load, save_model
    from danlu.model.transformer import Transformer
    from danlu.tokens.load import load_tokenizer

    tokenizer = load_tokenizer(ref) if Path(ref).is_dir() else load(ref)[1]
    torch.manual_seed(0)
    save_model(Transformer(shape), folder, tokenizer)


# The contestants: each calls `turn(seconds by part)` before every step, and stops when it returns False.


class Over(Exception):
    """The last turn is over."""


def run_danlu(race: Race, turn: Any, dtype: str, algorithm: str) -> None:
    from danlu.align.config import GRPOConfig, PPOConfig, RewardSource
    from danlu.align.grpo import Grouped
    from danlu.align.ppo import Critic
    from danlu.train.config import OptimConfig, ScheduleConfig
    from danlu.train.loop import Hooks, train

    turn.imported()
    with tempfile.TemporaryDirectory() as folder:
        make, source_of = {"grpo": (GRPOConfig, Grouped), "ppo": (PPOConfig, Critic)}[algorithm]
        source: Any = source_of(
            make(
                data=race.data,
                init_from=race.model,
                out=Path(folder) / "run",
                rewards=(RewardSource(rule="length"),),
                steps=10**6,
                batch_size=race.prompts,
                group_size=race.group,
                updates=1,
                max_tokens=race.reply_tokens,
                sequence_length=1024,
                held_out=0.0,
                eval_every=10**6,
                checkpoint_every=10**6,
                optim=OptimConfig(lr=LR, weight_decay=0.0),
                schedule=ScheduleConfig(name="constant", warmup=0),
                device=race.device,
                dtype=dtype,
            )
        )

        class Turns(Hooks):
            def batches(self, index: int, batches: list[Any]) -> list[Any]:
                took = source.drawer.seconds
                if not turn({part: took[f"{part}_seconds"] for part in ("generation", "reward")}):
                    raise Over
                return batches

        try:
            train(source.config, "prompts", Turns(), source.objective, source)
        except Over:
            return


def run_trl(race: Race, turn: Any, dtype: str, weights: str = "float32") -> None:
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    turn.imported()

    class Timed(GRPOTrainer):
        seconds: dict[str, float]

        def _generate(self, *arguments: Any, **named: Any) -> Any:
            return self._timed("generation", super()._generate, *arguments, **named)

        def _calculate_rewards(self, *arguments: Any, **named: Any) -> Any:
            return self._timed("reward", super()._calculate_rewards, *arguments, **named)

        def _timed(self, part: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            found = function(*arguments, **named)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin
            return found

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            said, trainer.seconds = trainer.seconds, {}
            if not turn(said):
                raise Over

    def length(completions: list[Any], **_: Any) -> list[float | None]:
        return [len(one[0]["content"]) / 100 for one in completions]

    rows = [json.loads(line) for line in race.data.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": weights, "attn_implementation": "sdpa"},
            use_cpu=race.device == "cpu",
            bf16=dtype == "bf16",
            max_steps=10**6,
            per_device_train_batch_size=race.prompts * race.group,
            num_generations=race.group,
            max_completion_length=race.reply_tokens,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            num_iterations=1,
            beta=0.0,
            loss_type="grpo",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Timed(
            str(race.model), reward_funcs=length, args=arguments, train_dataset=data, callbacks=[Turns()]
        )
        trainer.seconds = {}
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train()
        except Over:
            return


CONTESTANTS: dict[str, dict[str, Callable[..., None]]] = {
    "float32": {
        "danlu": partial(run_danlu, dtype="float32", algorithm="grpo"),
        "TRL": partial(run_trl, dtype="float32"),
        "danlu PPO": partial(run_danlu, dtype="float32", algorithm="ppo"),
    },
    "bf16": {
        "danlu": partial(run_danlu, dtype="bf16", algorithm="grpo"),
        "TRL": partial(run_trl, dtype="bf16"),
        "TRL, bf16 weights": partial(run_trl, dtype="bf16", weights="bfloat16"),
        "danlu PPO": partial(run_danlu, dtype="bf16", algorithm="ppo"),
    },
}


# The controller.


def in_turns(loops: list[Loop], turns: int) -> dict[str, list[dict[str, float]]]:
    """Of each contestant and turn its seconds, whole and by part, and its memory so far."""
    found: dict[str, list[dict[str, float]]] = {loop.name: [] for loop in loops}
    for number in range(turns):
        for loop in loops if number % 2 == 0 else loops[::-1]:
            found[loop.name].append(one_turn(loop))
        say(
            f"{number + 1}/{turns}  "
            + "  ".join(f"{name} {rows[-1]['step']:.2f} s" for name, rows in found.items())
        )
    return found


def one_turn(loop: Loop) -> dict[str, float]:
    seconds, said, memory = loop.steps(1)
    parts = {"generation": 0.0, "reward": 0.0, **said[-1]}
    return {"step": seconds, **parts, "training": seconds - sum(parts.values()), "bytes": memory}


def measure(dtype: str, race: Race, turns: int) -> dict[str, Any]:
    names = CONTESTANTS[dtype]

    def start(name: str) -> Loop:
        loop = Loop(name, race.device, names[name], race)
        first, _, _ = loop.steps(1)
        loop.steps(WARM_UP - 1)
        say(f"{dtype}: {name} is warm; first step {first:.1f} s")
        return loop

    rows: dict[str, list[dict[str, float]]] = {}
    others_share = 0.0
    alone = [[name] for name in names]
    pair = ["danlu", "TRL"]
    for together in alone if race.device == "cuda" else [pair, *(one for one in alone if one[0] not in pair)]:
        try:
            loops = [start(name) for name in together]
        except Absent as absent:
            say(str(absent))
            continue
        quiet = Quietness()
        rows |= in_turns(loops, turns)
        others_share = max(others_share, quiet.others())
        for loop in loops:
            loop.stop()
    return {"rows": rows, "others_share_of_processor": others_share}


def table(dtype: str, measured: dict[str, Any], race: Race) -> str:
    rows = measured["rows"]
    tokens = race.prompts * race.group * race.reply_tokens
    heads = ("step", "generation", "reward", "training", "tokens/s", "memory")
    lines = [f"{dtype:24}" + "".join(f" {head:>10}" for head in heads)]
    for name, turns in rows.items():
        middle = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
        lines.append(
            f"{name:24} {middle['step']:8.2f} s {middle['generation']:8.2f} s {middle['reward']:8.2f} s "
            f"{middle['training']:8.2f} s {tokens / middle['step']:10.0f} {middle['bytes'] / 1e6:7.0f} MB"
        )
    if "danlu" in rows and "TRL" in rows:
        each = [peer["step"] / own["step"] for own, peer in zip(rows["danlu"], rows["TRL"], strict=True)]
        low, high = median_interval(each)
        measured["ratio"] = {"median": statistics.median(each), "interval": [low, high], "each": each}
        lines.append(
            f"a step of danlu's GRPO is {statistics.median(each):.2f} times as fast as TRL's "
            f"[{low:.2f}, {high:.2f}]; "
            f"other processes took {measured['others_share_of_processor']:.1%} of the processor"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135M", help="of the model, as LLaMA")
    parser.add_argument("--prompts", type=int, default=2, help="in a step")
    parser.add_argument("--group", type=int, default=8, help="replies to each prompt")
    parser.add_argument("--reply-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--dtype", nargs="+", choices=CONTESTANTS, help="default: both, bf16 where it is native"
    )
    parser.add_argument("--tokenizer", default="smollm2", help="whose tokenizer and chat form")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()

    from danlu.core.device import machine

    native = options.device == "cuda" or machine().bf16_native
    dtypes = options.dtype or (["float32", "bf16"] if native else ["float32"])
    result: dict[str, Any] = {"machine": asdict(machine()), "options": vars(options) | {"json": None}}
    with tempfile.TemporaryDirectory() as folder:
        race = Race(
            Path(folder) / "model",
            Path(folder) / "prompts.jsonl",
            options.device,
            options.prompts,
            options.group,
            options.reply_tokens,
        )
        write_model(SHAPES[options.shape], options.tokenizer, race.model)
        rows = [json.dumps({"prompt": question}) + "\n" for question in questions(options.prompts)]
        race.data.write_text("".join(rows), encoding="utf-8")
        for dtype in dtypes:
            result[dtype] = measure(dtype, race, options.turns)
            print(table(dtype, result[dtype], race), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
