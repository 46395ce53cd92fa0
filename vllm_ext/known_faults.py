"""What supported releases of vLLM are known to answer wrongly without an error, said when an engine starts.

The plugin changes nothing of it: the checkpoint or the flags have to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ext.compat import VllmConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Where configurations say how many experts there are."""
INNER_WIDTHS = ("moe_intermediate_size", "intermediate_size")
"""Where configurations say how wide an expert is inside, the more special name first."""


def warn(config: VllmConfig) -> None:
    """Log a line for each fault that a configuration meets."""
    text, parallel = config.model_config.hf_text_config, config.parallel_config
    ranks = 1 if parallel.enable_expert_parallel else parallel.tensor_parallel_size
    if line := experts_of_one_group(text, group_size(config.model_config.hf_config), ranks):
        from vllm_ext.compat import init_logger

        init_logger(__name__).warning(line)


def group_size(config: Any) -> int | None:
    """Return the group size of a checkpoint's few-bit weights (compressed-tensors, GPTQ, AWQ); None: it has none.

    Args:
        config: the checkpoint's, from transformers.

    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, Mapping):
        return None
    sizes = [settings.get("group_size")]
    for group in (settings.get("config_groups") or {}).values():
        sizes.append(((group or {}).get("weights") or {}).get("group_size"))
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def experts_of_one_group(text: Any, group: int | None, ranks: int) -> str | None:
    """Return a line if vLLM orders the scales of a model's experts wrongly (its pull request 50196), else None.

    Marlin has another order where all input channels are one group. For an expert's first layers, as wide as the
    model, vLLM asks whether a rank's share of the inner width is one group.

    Args:
        text: the language model's configuration.
        group: input channels that share a scale; None: not quantized in groups.
        ranks: that experts are cut among.

    """
    experts, inner, width = (_first(text, names) for names in (EXPERTS, INNER_WIDTHS, ("hidden_size",)))
    if not experts or not group or not inner or not width or inner % ranks:
        return None
    share = inner // ranks
    if (share <= group) == (width <= group):
        return None
    help_ = "use fewer GPUs or --enable-expert-parallel, or " if ranks > 1 and inner > group else ""
    return (
        f"experts are {share} channels wide inside on each GPU and {width} outside, and their weights have groups of "
        f"{group}: vLLM orders such scales wrongly and answers nonsense (its pull request 50196); {help_}take a "
        f"checkpoint with groups smaller than {min(share, width)}"
    )


def _first(text: Any, names: tuple[str, ...]) -> int | None:
    """Return the first of some settings that a configuration has and that is not 0."""
    return next((value for name in names if (value := getattr(text, name, None))), None)
