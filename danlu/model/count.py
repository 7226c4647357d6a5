"""How large and how costly a model is. Imports no torch."""

from danlu.model.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices and the head, not the embedding look-up."""
    kv_width = config.n_kv_heads * config.head_width
    attention = 2 * config.width * config.width + 2 * config.width * kv_width
    feed_forward = 3 * config.width * config.ffn_width
    return config.n_layers * (attention + feed_forward) + config.vocab_size * config.width


def parameters(config: ModelConfig) -> int:
    """All trained numbers."""
    norms = (2 * config.n_layers + 1) * config.width
    embedding = 0 if config.tied_embeddings else config.vocab_size * config.width
    return matmul_parameters(config) + norms + embedding


def flops_per_token(config: ModelConfig, sequence_length: int, backward: bool = True) -> float:
    """6 N + 6 L d T: N weights in matrix products, L layers, d width, T tokens of causal attention.

    Two operations a multiply-add; a token sees T / 2 earlier ones on average, by two products (QKᵀ, PV) of
    width d: 2 · 2 · d · T / 2 a layer. Backward costs twice the forward pass. Kaplan et al. 2020, table 1.
    """
    forward = 2 * matmul_parameters(config) + 2 * config.n_layers * config.width * sequence_length
    return forward * (3 if backward else 1)


def kv_cache_bytes(config: ModelConfig, batch_size: int, length: int, bytes_per_number: int = 2) -> int:
    """Bytes of the keys and values of `batch_size` rows of `length` tokens."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_width
    return per_token * batch_size * length * bytes_per_number


def activation_bytes(config: ModelConfig, bytes_per_number: int = 2, fused: bool = False) -> int:
    """Bytes that one layer keeps of one token for the backward pass.

    Inputs of the matrices, q, k, v and what attention read; of the feed-forward gate, silu(gate), up and
    their product; of each norm two float32 vectors. `fused`, as torch.compile does it: the norms keep their
    input only, and silu(gate) is computed again.
    """
    kv_width = config.n_kv_heads * config.head_width
    if fused:
        return bytes_per_number * (6 * config.width + 2 * kv_width + 3 * config.ffn_width)
    norms = 2 * 2 * 4 * config.width
    return norms + bytes_per_number * (4 * config.width + 2 * kv_width + 4 * config.ffn_width)


def training_memory(
    config: ModelConfig,
    tokens: int,
    bytes_per_activation: int = 2,
    checkpoint_activations: bool = False,
    optimizer: str = "adamw",
    compiled: bool = False,
) -> int:
    """Estimated bytes of weights, gradients, optimiser state and activations of one micro-batch.

    `tokens` is the micro-batch's. Weights, gradients and each of the optimiser's moments are float32.
    What the backward pass works with, and what the allocator can't use in between, was measured on a CPU
    from 6 to 40 million parameters: as much as the activations of `work` more layers.
    """
    matrices = matmul_parameters(config) - config.vocab_size * config.width
    moments = 2 * parameters(config) - (matrices if optimizer == "muon" else 0)
    state = 4 * (2 * parameters(config) + moments)
    shadow = parameters(config) * bytes_per_activation if bytes_per_activation < 4 else 0
    layer = activation_bytes(config, bytes_per_activation, compiled)
    kept = config.width * bytes_per_activation if checkpoint_activations else layer
    work = 3 if compiled else 5
    ends = 4 * config.width * bytes_per_activation  # embedding, last norm, and their gradients
    logits = 10 * max(2**22, 64 * config.vocab_size)  # of one chunk of the loss, in two dtypes
    compiler = 150_000_000 if compiled else 0
    return state + shadow + tokens * (config.n_layers * kept + work * layer + ends) + logits + compiler
