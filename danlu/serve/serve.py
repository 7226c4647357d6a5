"""`danlu serve`: loads the models, takes the address, answers until it is told to end."""

import asyncio
import contextlib
import logging
import socket
import sys
import time

import torch

from danlu.core.errors import UserError
from danlu.core.host import memory_bytes
from danlu.core.show import console
from danlu.generate.engine import Engine
from danlu.generate.generate import load_for_engine
from danlu.generate.kernels import POSITIONS
from danlu.generate.packed import Kind
from danlu.generate.paged import bytes_per_block
from danlu.generate.sampling import SamplingParams
from danlu.model.adapters import load_adapter
from danlu.model.checkpoint import base_digest, find_base, is_adapter, resolve
from danlu.model.lora import use_adapter
from danlu.model.transformer import Transformer
from danlu.serve.app import App, make_app
from danlu.serve.config import ServeConfig, split_name
from danlu.serve.served import Catalogue, Served
from danlu.web.server import Server, listen, make_server


def serve(config: ServeConfig) -> None:
    """Blocks until SIGTERM or Ctrl-C, and then until what runs is finished."""
    if config.engine == "vllm":
        from danlu.serve.vllm import serve_by_vllm

        serve_by_vllm(config)
        return
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    keys = config.keys
    with contextlib.closing(listen(config.host, config.port)) as taken:
        catalogue = load(config)
        warm_up(catalogue)
        app = make_app(config, catalogue, keys)
        server = make_server(app, config.grace)
        _say(config, catalogue, taken, keys)
        asyncio.run(_run(server, app, taken))
    _note("ended, with nothing unfinished" if app.kitchen.pending == 0 else "ended")


async def _run(server: Server, app: App, taken: socket.socket) -> None:
    async def watch() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        app.kitchen.ending = True
        if app.kitchen.pending:
            _note(f"finishing {app.kitchen.pending} answers …")

    watching = asyncio.create_task(watch())
    try:
        await server.serve(sockets=[taken])
    finally:
        watching.cancel()


# Models


def load(config: ServeConfig) -> Catalogue:
    """All models and adapters. Raises UserError, also for a name that is there twice."""
    found: list[Served] = []
    for number, ref in enumerate(config.model):
        name, path = split_name(ref)
        _note(f"loading {name} …")
        adapters = [split_name(one) for one in config.adapter] if number == 0 else []
        engine = _engine(path, adapters, config)
        found.append(Served(name, path, engine))
        found += [Served(own, where, engine, own, name) for own, where in adapters]
    names = [served.name for served in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'two models are called "{twice[0]}"', "name one of them: NAME=PATH")
    return Catalogue(found)


def _engine(path: str, adapters: list[tuple[str, str]], config: ServeConfig) -> Engine:
    model, tokenizer, kind = load_for_engine(path, config.dtype, config.device)
    on_cpu = model.head_weight.device.type == "cpu"
    if adapters:
        if is_adapter(resolve(path)):
            raise UserError(f"{path} is an adapter itself", "name its base, and it with --adapter")
        for name, where in adapters:
            _add_adapter(model, name, where, path)
        use_adapter(model, None)
    return Engine(
        model,
        tokenizer,
        dtype=kind,
        deterministic=config.deterministic and on_cpu and not adapters,
        adapters=[name for name, _ in adapters],
        cache_bytes=int(config.cache_gb * 2**30) or (_cache_bytes(model, kind) if on_cpu else None),
    )


def _add_adapter(model: Transformer, name: str, where: str, base: str) -> None:
    """Raises UserError where the adapter belongs to another model."""
    folder = resolve(where)
    if not is_adapter(folder):
        raise UserError(f"{where} is no LoRA adapter", "name it as a model of its own, without --adapter")
    own, kept = find_base(folder)
    if base_digest(own) != base_digest(resolve(base)):
        raise UserError(
            f"the adapter {where} was trained on {own}, not on {base}", "serve it with its own base"
        )
    if kept != "none":
        _note(f"{name} was trained on a base in {kept}; it is served on the base in its own precision")
    load_adapter(model, folder, name)


def _cache_bytes(model: Transformer, kind: Kind) -> int:
    """At least a gigabyte and four whole contexts, at most a quarter of the memory."""
    config = model.config
    per_block = bytes_per_block(config, torch.float32 if kind == "float32" else torch.bfloat16)
    contexts = 4 * -(-config.max_positions // POSITIONS) * per_block
    return min(max(2**30, contexts), memory_bytes() // 4)


def warm_up(catalogue: Catalogue) -> None:
    """Packs the weights, compiles what isn't compiled yet, takes the cache: not at the first request."""
    begin = time.monotonic()
    _note("getting ready …")
    for engine in catalogue.engines:
        cache = engine.scheduler.lanes[0].runner.cache
        if cache.keys.device.type == "cpu":
            cache.keys.zero_()
            cache.values.zero_()
        start = [engine.tokenizer.start_id]
        prompts = [start * n for n in (1, 2, 20, 100)]
        engine.generate(prompts, SamplingParams(max_tokens=4, stop_ids=(), logprobs=1))
    if (seconds := time.monotonic() - begin) > 5:
        _note(f"ready after {seconds:.0f} s of preparation, most of which is kept for the next time")


def _note(text: str) -> None:
    print(f"danlu: {text}", file=sys.stderr, flush=True)


def _say(config: ServeConfig, catalogue: Catalogue, taken: socket.socket, keys: tuple[str, ...]) -> None:
    """Where to go."""
    host, port = taken.getsockname()[:2]
    shown = "localhost" if host in ("127.0.0.1", "::1", "0.0.0.0", "::") else host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    out = console()
    names = ", ".join(served.name for served in catalogue.models)
    out.print(f"Serving {names}\n")
    out.print(f"  chat in a browser   {url}/")
    out.print(f"  OpenAI's API        {url}/v1")
    out.print(f"  metrics, health     {url}/metrics, {url}/health")
    out.print(f"  thumbs are kept in  {config.preferences}\n")
    header = " -H 'Authorization: Bearer KEY'" if keys else ""
    body = f'{{"model": "{catalogue.models[0].name}", "messages": [{{"role": "user", "content": "Hi!"}}]}}'
    out.print(
        f"  curl {url}/v1/chat/completions{header} \\\n    -H 'Content-Type: application/json' -d '{body}'\n",
        soft_wrap=True,
    )
    if host in ("0.0.0.0", "::") and not keys:
        _note("anybody who reaches this machine may ask; set --api-key to change that")
    out.print("Ctrl-C ends it, once running answers are finished.")
    sys.stdout.flush()
