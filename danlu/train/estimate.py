"""What a training stage will cost here, for `danlu plan`."""

from collections.abc import Mapping

from danlu.core.device import machine
from danlu.core.errors import UserError
from danlu.core.verbs import Estimate
from danlu.model import count
from danlu.model.checkpoint import sizes_of
from danlu.model.compiling import should_compile
from danlu.model.config import ModelConfig
from danlu.train.config import TrainConfig

UTILISATION = 0.35
"""Share of the machine's matrix-product rate that training reaches: `benchmarks/train_throughput.py`
measures 30 to 50 % from 10 to 50 million parameters; smaller models reach less."""

LOADED_BYTES = 150_000_000
"""What a first step, torch's distributed checkpoints and the tokenizer keep resident besides."""
PACKED_A_SECOND = 1e9
"""Bytes of weights that are packed for sampling: the 269 MB of `smollm2` took 0.28 s on two cores."""
SAMPLING_BYTES = 150_000_000
"""What compiling the engine's kernels for the first time takes, and keys and values in large pages."""
START_SECONDS, COMPILE_SECONDS = 2, 5
"""Until the first step; the compiler takes twice that the first time, and less from its cache."""


def estimate_training(config: TrainConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """`upstream`: the estimates of the stages that `data` and `init_from` read, where these are stages."""
    data = upstream.get("data", Estimate()).outputs
    sizes, problems = _sizes(config, upstream)
    vocabulary = data.get("vocab_size")
    if config.model is not None and vocabulary not in (None, sizes.vocab_size):
        problems.append(f"model.vocab_size is {sizes.vocab_size}, the tokenizer has {vocabulary} entries")
    if config.sequence_length > sizes.max_positions:
        problems.append(
            f"sequence_length {config.sequence_length} is beyond max_positions {sizes.max_positions}"
        )
    tokens = config.steps * config.batch_size * config.sequence_length
    here = machine()
    low = config.dtype == "bf16" or (config.dtype == "auto" and here.bf16_native)
    flops = tokens * count.flops_per_token(sizes, config.sequence_length, lora=config.lora)
    micro_batch = max(1, config.batch_size // config.accumulate) * config.sequence_length
    try:
        compiled = should_compile(config.compile, sizes, tokens, config.sequence_length, config.lora)
    except UserError as error:
        compiled = False
        problems.append(f"{error.message}: {error.remedy}")
    size = 2 if low else 4

    training = LOADED_BYTES + count.training_memory(
        sizes, micro_batch, size, config.checkpoint_activations, config.optim.name, compiled, config.lora
    )
    # Samples come from copies of the weights, in two orders; what training has freed stays with it meanwhile.
    packed = 2 * size * count.parameters(sizes) if config.sample_prompts else 0
    memory = training + packed + (SAMPLING_BYTES if config.sample_prompts else 0)
    if memory > here.memory_bytes:
        problems.append(
            f"needs about {memory / 1e9:.1f} GB of memory, this machine has {here.memory_bytes / 1e9:.1f}"
        )
    rate = 1e9 * (here.bf16_gflops if low else here.f32_gflops) * UTILISATION
    whole = count.parameters(sizes)
    trained = whole if config.lora is None else count.adapter_parameters(sizes, config.lora)
    outputs = {
        "parameters": whole,
        "trained_parameters": trained,
        "model": sizes.model_dump(),
        "packed_bytes": packed,
    }
    samples = config.steps // config.sample_every if config.sample_every else 1
    packing = samples * packed / PACKED_A_SECOND
    seconds = START_SECONDS + (COMPILE_SECONDS if compiled else 0) + flops / rate + packing
    return Estimate(tokens, flops, memory, seconds, outputs, problems)


def _sizes(config: TrainConfig, upstream: Mapping[str, Estimate]) -> tuple[ModelConfig, list[str]]:
    """The sizes of the model to be trained, and what speaks against them."""
    if config.model is not None:
        return config.model, []
    if config.init_from is None:
        vocabulary = upstream.get("data", Estimate()).outputs.get("vocab_size", 4096)
        return ModelConfig(vocab_size=vocabulary, max_positions=config.sequence_length), []
    return sizes_of_start(str(config.init_from), upstream)


def sizes_of_start(init_from: str, upstream: Mapping[str, Estimate]) -> tuple[ModelConfig, list[str]]:
    """The sizes of the model that a stage begins with, and that they are guessed where that isn't there."""
    if "init_from" in upstream and "model" in upstream["init_from"].outputs:
        return ModelConfig(**upstream["init_from"].outputs["model"]), []
    try:
        return sizes_of(init_from), []
    except UserError as error:
        return ModelConfig(), [f"{error.message}; its size is guessed"]
