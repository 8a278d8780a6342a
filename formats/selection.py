"""Which tensors become int4 by default, and the patterns by which people change that; from names and shapes alone."""

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from formats.errors import UsageError
from formats.layout import TensorSpec

WEIGHT = ".weight"
REGEX = "re:"
FLOAT_DTYPES = ("BF16", "F16", "F32")

# Kept unless a pattern names them: what the path of the module looks like, and the reason given.
KEPT_BY_DEFAULT = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"(^|\.)(gate(\.(wg|down_proj))?|shared_expert_gate)$|(^|\.)[^.]*router[^.]*(\.|$)", "router"),
        (
            r"(^|\.)([^.]*lm_head|mlm_head|embed_out|unembed|score|classifier|qa_outputs|vocab_projector"
            r"|([^.]*predictions|[^.]*lm_head|head)\.decoder)$"
            r"|^(output|proj_out|head|decoder|cls|logits_dense|log_softmax\.mlp\.layer0)$"
            r"|^(?!.*\.\d+\.)([^.]+\.)*output_projection$",
            "output head",
        ),
        (r"(^|\.)([^.]*norm_?\d*|ln_[^.]*)$|\.\d+\.[^.]*layernorm\.", "norm"),
        (
            r"(^|\.)(visual(?!_bert)[^.]*|vision[^.]*|audio[^.]*|image[^.]*|sam_model|qformer|[^.]*_tower"
            r"|[^.]*(projector|merger|aligner|connector)(_list)?)(\.|$)",
            "vision or audio part",
        ),
    )
)

# Never a linear layer, whatever a pattern says: nothing could load it as one.
EMBEDDING = re.compile(
    r"(^|\.)((?!unembed$)[^.]*embed|[^.]*embeddings?(_table|_\d+)?"
    r"|[^.]*embed_(tokens|positions|in|global)(?!.*proj)[^.]*|embed_positions\.[^.]*|(row|column)_embedder"
    r"|token_embd|([^.]*_)?emb|wte|wpe|codebook|shared|relative_attention_bias)$|^(transformer\.)?w$"
)

# What transformers calls a linear layer whose weight is [in, out], and the models that have it.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")

# Parameters that hold a matrix for every expert.
FUSED_EXPERTS = re.compile(r"(^|[._])experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$")

# Where others are, each architecture with its own shapes.
OTHER_EXPERTS = re.compile(r"(^|[._])(experts|moe)\.(?!.*bias$)|(^|\.)(input|output)_linear\.weight$")


def never_quantized(name: str, spec: TensorSpec) -> str | None:
    """Why no option can make the tensor int4, or None if one can."""
    experts = is_fused_experts(name, spec)
    if name.endswith(".bias"):
        return "bias"
    if not experts and _is_other_experts(name, spec):
        return "experts in a layout that is not known"
    if len(spec.shape) != 2 and not experts:
        return f"{len(spec.shape)}-D"
    if spec.dtype not in FLOAT_DTYPES:
        return f"type {spec.dtype}"
    if spec.numel == 0:
        return "empty"
    if not name.endswith(WEIGHT) and not experts:
        return "not named .weight"
    if EMBEDDING.search(name.removesuffix(WEIGHT)):
        return "embedding"
    return None


def is_fused_experts(name: str, spec: TensorSpec) -> bool:
    """Whether the tensor is a stack of the matrices of experts, [E, N, K] or [E, K, N]."""
    return len(spec.shape) == 3 and FUSED_EXPERTS.search(name) is not None


def _is_other_experts(name: str, spec: TensorSpec) -> bool:
    """Whether the tensor holds matrices of several experts in another way."""
    several = len(spec.shape) == 3 or (len(spec.shape) == 2 and not name.endswith(WEIGHT))
    return several and OTHER_EXPERTS.search(name) is not None


def is_conv1d(name: str, model_types: Collection[str]) -> bool:
    """Whether the tensor is the weight [K, N] of a Conv1D in a model of one of these types."""
    return CONV1D.search(name) is not None and not set(CONV1D_MODELS).isdisjoint(model_types)


def kept_by_default(name: str) -> str | None:
    """Why the matrix `name` stays as it is unless it is asked for, or None if it is quantised."""
    module = name.removesuffix(WEIGHT)
    return next((reason for pattern, reason in KEPT_BY_DEFAULT if pattern.search(module)), None)


def matches(pattern: str, name: str) -> bool:
    """Glob on the name of a tensor or its module; after `re:` a regular expression found anywhere in the tensor's.

    Raises `UsageError` for a broken regular expression.
    """
    if not pattern.startswith(REGEX):
        return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(WEIGHT), pattern)
    try:
        return re.search(pattern.removeprefix(REGEX), name) is not None
    except re.error as error:
        raise UsageError(f"pattern {pattern!r}: is no regular expression ({error}); check it after 're:'") from None
