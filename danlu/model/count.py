"""How large and how costly a model is. Imports no torch."""

from danlu.model.config import Activation, LoraConfig, ModelConfig, is_gated


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: matrices, of experts the active ones, and the head."""
    inner = _attention_parameters(config) * config.n_layers
    inner += sum(_ffn_parameters(config, layer, config.n_active) for layer in range(config.n_layers))
    return inner + _head_parameters(config)


def parameters(config: ModelConfig) -> int:
    """All trained numbers."""
    matrices = config.n_layers * _attention_parameters(config)
    matrices += sum(_ffn_parameters(config, layer, config.n_experts) for layer in range(config.n_layers))
    own_head = 0 if config.tied_embeddings else config.vocab_size * (config.embedding_width or config.width)
    projections = 2 * config.embedding_width * config.width
    scores = config.scores * config.width
    return matrices + embedding_parameters(config) + own_head + projections + scores + _vectors(config)


def active_parameters(config: ModelConfig) -> int:
    """Those that one token goes through: all but the experts that it is not sent to."""
    idle = sum(
        _ffn_parameters(config, layer, config.n_experts) - _ffn_parameters(config, layer, config.n_active)
        for layer in range(config.n_layers)
    )
    experts = sum(config.has_experts(layer) for layer in range(config.n_layers))
    return parameters(config) - idle - experts * (config.n_experts - config.n_active) * _expert_biases(config)


def layer_matrices(config: ModelConfig) -> list[tuple[str, int, int]]:
    """(name within its layer, rows, columns) of every matrix of the layers; of all experts."""
    return [matrix for layer in range(config.n_layers) for matrix in _matrices_of(config, layer)]


def _matrices_of(config: ModelConfig, layer: int) -> list[tuple[str, int, int]]:
    """Those of one layer, in the order in which a token goes through them."""
    q_width, kv_width = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
    found = [("attention.q", q_width, config.width)]
    found += [(f"attention.{name}", kv_width, config.width) for name in ("k", "v")]
    found.append(("attention.out", config.width, q_width))
    places, width, kind = ["ffn"], config.ffn_width, config.ffn
    if config.has_experts(layer):
        found.append(("ffn.router", config.n_experts, config.width))
        places = [f"ffn.experts.{number}" for number in range(config.n_experts)]
        width, kind = config.expert_width or width, config.expert_ffn or kind
    for place in places:
        found += [(f"{place}.{name}", width, config.width) for name in ("up", *["gate"] * is_gated(kind))]
        found.append((f"{place}.down", config.width, width))
    return found


def adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Trained numbers of an adapter: A and B, and with DoRA the rows' lengths."""
    return sum(
        lora.rank * (rows + columns) + lora.dora * rows
        for name, rows, columns in layer_matrices(config)
        if lora.adapts(name)
    )


def embedding_parameters(config: ModelConfig) -> int:
    """The look-up tables: of tokens, and of positions where these are learnt."""
    tokens = config.vocab_size * (config.embedding_width or config.width)
    learned = config.positions == "learned"
    return tokens + learned * (config.max_positions + config.position_offset) * config.width


def _attention_parameters(config: ModelConfig) -> int:
    q_width, kv_width = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
    return 2 * config.width * (q_width + kv_width)


def _ffn_parameters(config: ModelConfig, layer: int, n_experts: int) -> int:
    """Matrices of a layer's feed-forward, of so many experts where it has experts."""
    if not config.has_experts(layer):
        return _matrices(config.ffn) * config.width * config.ffn_width
    expert = _matrices(config.expert_ffn or config.ffn) * config.width
    expert *= config.expert_width or config.ffn_width
    return config.width * config.n_experts + n_experts * expert


def _matrices(ffn: Activation) -> int:
    return 3 if is_gated(ffn) else 2


def _head_parameters(config: ModelConfig) -> int:
    narrow = config.embedding_width
    return config.vocab_size * (narrow or config.width) + 2 * narrow * config.width


def _ffn_biases(config: ModelConfig) -> int:
    return config.ffn_bias * ((_matrices(config.ffn) - 1) * config.ffn_width + config.width)


def _expert_biases(config: ModelConfig) -> int:
    """Those of one expert."""
    matrices = _matrices(config.expert_ffn or config.ffn)
    inner = (matrices - 1) * (config.expert_width or config.ffn_width)
    return config.ffn_bias * (inner + config.width)


def _vectors(config: ModelConfig) -> int:
    """Norms and biases."""
    per_norm = 2 if config.norm == "layernorm" else 1
    norms = {"pre": 2, "post": 2, "both": 4}[config.norm_place] - config.one_norm
    outer = (config.norm_place != "post") + config.embedding_norm
    total = per_norm * config.width * (config.n_layers * norms + outer)
    total += config.qk_norm * 2 * per_norm * config.head_width * config.n_layers
    heads = config.n_heads + 2 * config.n_kv_heads
    total += config.n_layers * (config.qkv_bias * heads * config.head_width + config.out_bias * config.width)
    for layer in range(config.n_layers):
        if config.has_experts(layer):
            total += config.n_experts * _expert_biases(config)
        else:
            total += _ffn_biases(config)
    return total + config.head_bias * config.vocab_size


def flops_per_token(
    config: ModelConfig, sequence_length: int, backward: bool = True, lora: LoraConfig | None = None
) -> float:
    """6 N + 6 L d T: N weights in matrix products, L layers, d width of all heads, T tokens.

    Two operations a multiply-add; a token sees T / 2 earlier ones on average, by two products (QKᵀ, PV) of
    width d: 2 · 2 · d · T / 2 a layer, less in a layer with a window. Backward costs twice the forward pass.
    Kaplan et al. 2020, table 1. `lora`: see `_adapter_flops`. What is computed twice is counted once: QKᵀ of
    attention by blocks, and a layer under `checkpoint_activations`.
    """
    forward: float = 2 * matmul_parameters(config)
    forward += sum(_attention_flops(config, layer, sequence_length) for layer in range(config.n_layers))
    if lora is None:
        return forward * (3 if backward else 1)
    own, back = _adapter_flops(config, sequence_length, lora)
    return forward + own + (back if backward else 0)


def _attention_flops(config: ModelConfig, layer: int, length: int) -> float:
    """Of QKᵀ and PV in one layer, forward, for one token."""
    return 4 * config.n_heads * config.head_width * _mean_seen(length, config.window_of(layer))


_FLOW = {
    "q": ("stream", "mixed"),
    "k": ("stream", "mixed"),
    "v": ("stream", "mixed"),
    "out": ("mixed", "sum"),
    "router": ("sum", "end"),
    "up": ("sum", "inner"),
    "gate": ("sum", "inner"),
    "down": ("inner", "end"),
}
"""Matrix of a layer: (what it reads, what it goes into)."""


def _adapter_flops(config: ModelConfig, length: int, lora: LoraConfig) -> tuple[float, float]:
    """What an adapter adds to the forward pass, and the whole backward pass under it, for one token.

    An adapter on a matrix of n × m costs 2 r (n + m) forward and twice that backward. A frozen matrix has no
    gradient of its own; that of its input costs 2 n m, and is needed only where an adapter stands below it:
    nothing below the first one is run backward. The same holds for attention, and for A's input. So with
    adapters everywhere it is close to 4 N, and 6 for each number of the adapter. The output matrix is frozen
    and gives its input's gradient. Left out: DoRA's B A and lengths, once a batch, and its second product
    under dropout.
    """
    forward = backward = 0.0
    reached = False  # whether an adapter stands below
    for layer in range(config.n_layers):
        below = dict.fromkeys(("stream", "mixed", "sum", "inner", "end"), reached)
        for name, rows, columns in _matrices_of(config, layer):
            adapted = lora.adapts(name)
            share = config.n_active / config.n_experts if ".experts." in name else 1
            reads, goes_into = _FLOW[name.rsplit(".", 1)[1]]
            if goes_into == "sum" and config.parallel_residual:
                goes_into = "end"
            forward += share * adapted * 2 * lora.rank * (rows + columns)
            backward += share * adapted * 2 * lora.rank * (2 * rows + columns)
            backward += share * below[reads] * 2 * columns * (rows + adapted * lora.rank)
            below[goes_into] |= adapted or below[reads]
        backward += below["mixed"] * 2 * _attention_flops(config, layer, length)
        reached = any(below.values())
    head = (
        _head_parameters(config) - config.embedding_width * config.width
    )  # the embedding's projection is below
    return forward, backward + reached * 2 * head


def _mean_seen(length: int, window: int) -> float:
    """Tokens that a query sees on average, over a sequence."""
    return length / 2 if not 0 < window < length else window - window**2 / (2 * length)


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
    lora: LoraConfig | None = None,
) -> int:
    """Estimated bytes of weights, gradients, optimiser state and activations of one micro-batch.

    `tokens` is the micro-batch's. Weights, gradients and each of the optimiser's moments are float32.
    What the backward pass works with, and what the allocator can't use in between, was measured on a CPU
    from 6 to 40 million parameters: as much as the activations of `work` more layers.

    With `lora` the base has neither gradient nor state, and is kept in the dtype of the activations, or
    packed; it is loaded in float32, which may be the peak. Each matrix gives its output in four parts then
    (its own, the adapter's, that times s, the sum), which was measured as three more layers.
    """
    layer = activation_bytes(config, bytes_per_activation, compiled)
    kept = config.width * bytes_per_activation if checkpoint_activations else layer
    work = (3 if compiled else 5) + 3 * (lora is not None)
    ends = 4 * config.width * bytes_per_activation  # embedding, last norm, and their gradients
    logits = 10 * max(2**22, 64 * config.vocab_size)  # of one chunk of the loss, in two dtypes
    compiler = 150_000_000 if compiled else 0
    working = tokens * (config.n_layers * kept + work * layer + ends) + logits + compiler
    if lora is not None:
        return max(4 * parameters(config), adapted_bytes(config, bytes_per_activation, lora) + working)
    matrices = matmul_parameters(config) - config.vocab_size * config.width
    moments = 2 * parameters(config) - (matrices if optimizer == "muon" else 0)
    state = 4 * (2 * parameters(config) + moments)
    shadow = parameters(config) * bytes_per_activation if bytes_per_activation < 4 else 0
    return state + shadow + working


BITS = {"int8": 8.0, "nf4": 4 + 8 / 64 + 32 / (64 * 256)}
"""Of a packed weight; int8's factor a row, and nf4's mean of a matrix, are left out."""


def adapted_bytes(config: ModelConfig, bytes_per_activation: int, lora: LoraConfig) -> int:
    """Bytes of a frozen base, and of an adapter with its gradient and two moments in float32."""
    matrices = sum(rows * columns for _, rows, columns in layer_matrices(config))
    bits = BITS.get(lora.quantise, 8 * bytes_per_activation)
    base = matrices * bits / 8 + (parameters(config) - matrices) * bytes_per_activation
    return round(base) + 16 * adapter_parameters(config, lora)
