"""`danlu serve --engine vllm`: hands the same model, under the same names, to vLLM, for many GPUs."""

import os
import shutil
from collections.abc import Sequence

from danlu.core.errors import UserError
from danlu.model.checkpoint import resolve
from danlu.serve.config import ServeConfig, split_name


def serve_by_vllm(config: ServeConfig) -> None:
    """Becomes vLLM's server. Raises UserError where vLLM isn't installed, or can't do what is asked."""
    program = shutil.which("vllm")
    if program is None:
        raise UserError("vLLM is not installed", "pip install vllm, on a machine with GPUs")
    command = vllm_command(config, config.keys)
    os.execv(program, command)


def vllm_command(config: ServeConfig, keys: Sequence[str] = ()) -> list[str]:
    """vLLM's command line. Raises UserError for what vLLM serves otherwise, or not at all."""
    if len(config.model) > 1:
        raise UserError("vLLM serves one model a process", "start it once for each, on ports of their own")
    if config.dtype in ("int8", "int4"):
        raise UserError(f"dtype {config.dtype} is danlu's own", "leave it out: vLLM takes the checkpoint's")
    name, ref = split_name(config.model[0])
    command = ["vllm", "serve", str(resolve(ref)), "--served-model-name", name]
    command += ["--host", config.host, "--port", str(config.port)]
    if config.dtype != "auto":
        command += ["--dtype", {"bf16": "bfloat16", "float32": "float32"}[config.dtype]]
    if keys:
        command += ["--api-key", *keys]
    if config.adapter:
        adapters = [split_name(one) for one in config.adapter]
        command += [
            "--enable-lora",
            "--lora-modules",
            *(f"{own}={resolve(where)}" for own, where in adapters),
        ]
    return command
