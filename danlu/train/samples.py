"""Samples while training: the same engine that generates later."""

import torch

from danlu.generate.engine import Engine, Packing
from danlu.generate.sampling import SamplingParams
from danlu.model import parallel
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer
from danlu.train.config import TrainConfig


def sample(
    model: Transformer, tokenizer: Tokenizer, config: TrainConfig, kind: str
) -> tuple[list[str], Packing | None]:
    """One continuation (of text) or reply (in chat) for each of `sample_prompts`, by the main process.

    And what it took to pack the weights for it. The engine lives no longer than that: its copies would take
    memory from training.

    Leaves torch's random generator as it was. A sharded model is gathered on the main process's CPU.
    """
    if parallel.world_size() > 1 and config.parallel != "ddp":
        weights = parallel.whole_state_dict(model)
        model = Transformer(model.config)
        if parallel.is_main():
            model.load_state_dict(weights)
    if not parallel.is_main():
        return [], None
    prompts = [
        prompt if kind == "text" else [{"role": "user", "content": prompt}]
        for prompt in config.sample_prompts
    ]
    params = SamplingParams(max_tokens=config.sample_tokens, temperature=0.8, top_p=0.95, seed=config.seed)
    with torch.random.fork_rng():
        engine = Engine(model, tokenizer)
        return [completion.text for completion in engine.generate(prompts, params)], engine.packing
