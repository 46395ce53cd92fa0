"""The one file that knows where vLLM keeps what this project uses of it, and in what form.

Other files write ``from vllm_ext.compat import VllmConfig`` as if it were defined here. The name is looked up in the
table below and its module is imported at that moment, not before: this file itself imports nothing of vLLM. So the
plugin can be loaded at almost no cost, and a vLLM that moved a name is adapted to by one line here.

The same table is a contract. ``vllm_ext/contract.py`` reads vLLM's source text and says which names are there and
whether they still take what we pass; ``pareto vllm-contract`` prints that, and a test demands it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_ext.versions import SUPPORTED_VLLM, vllm_release


@dataclass(frozen=True)
class Name:
    """One name of vLLM's, and what we expect of it. Lists are words separated by spaces.

    In ``calls`` and ``overrides`` the key "" means the name itself, any other key a method of the class.

    Attributes:
        module: where the name is imported from.
        attribute: the name there; "" for the module itself.
        has: attributes that must be there: of a module, of a class, fields of a dataclass, members of an enum.
        calls: parameters that we pass. The function must have them all and need no others.
        overrides: parameters of a method that a class of ours replaces. vLLM calls ours with them, so that they must be
            exactly these; ``self`` and ``cls`` are not counted.
        wraps: parameters that a wrapper of ours around the method knows by name; it passes all others on.
        releases: of vLLM in which it is used.
        moved: module in the releases of vLLM that keep it elsewhere than in ``module``.

    """

    module: str
    attribute: str = ""
    has: str = ""
    calls: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    wraps: Mapping[str, str] = field(default_factory=dict)
    releases: tuple[str, ...] = SUPPORTED_VLLM
    moved: Mapping[str, str] = field(default_factory=dict)

    def module_in(self, release: str) -> str:
        """Return the module that has the name in a release of vLLM."""
        return self.moved.get(release, self.module)


_CLOSED_LIST = ("0.32",)
"""Releases whose names of KV-cache dtypes are a closed list; all others have a registry."""
_REGISTRY = tuple(release for release in SUPPORTED_VLLM if release not in _CLOSED_LIST)
_LAYERS = "vllm.model_executor.layers"
_KERNELS = "vllm.model_executor.kernels.linear"
_MP_KERNEL = f"{_KERNELS}.mixed_precision.MPLinearKernel"
_PARAMETER = "vllm.model_executor.parameter"
_MARLIN = f"{_LAYERS}.quantization.utils.marlin_utils"

NAMES: dict[str, Name] = {
    # How a KV-cache dtype gets its name (patches.py). 0.32 has a closed list in three modules, 0.33 a registry.
    "config_module": Name("vllm.config", has="VllmConfig", releases=_CLOSED_LIST),
    "speculative_module": Name("vllm.config.speculative", has="CacheDType", releases=_CLOSED_LIST),
    "cache_module": Name("vllm.config.cache", has="CacheConfig CacheDType", releases=_CLOSED_LIST),
    "arg_utils_module": Name("vllm.engine.arg_utils", has="CacheDType", releases=_CLOSED_LIST),
    "selector_with_list": Name("vllm.v1.attention.selector", has="CacheDType", releases=_CLOSED_LIST),
    "selector_with_function": Name("vllm.v1.attention.selector", has="is_known_kv_cache_dtype", releases=_REGISTRY),
    "is_known_kv_cache_dtype": Name(
        "vllm.config.cache", "is_known_kv_cache_dtype", calls={"": "name"}, releases=_REGISTRY
    ),
    "CacheDType": Name("vllm.config.cache", "CacheDType", releases=_CLOSED_LIST),
    "KV_CACHE_DTYPES": Name("vllm.config.cache", "KV_CACHE_DTYPES", releases=_REGISTRY),
    "register_kv_cache_dtype": Name(
        "vllm.config.cache", "register_kv_cache_dtype", calls={"": "name"}, releases=_REGISTRY
    ),
    "STR_DTYPE_TO_TORCH_DTYPE": Name("vllm.utils.torch_utils", "STR_DTYPE_TO_TORCH_DTYPE"),
    "KVQuantMode": Name("vllm.v1.kv_cache_interface", "KVQuantMode", has="NONE", releases=_REGISTRY),
    # Where the engine's configuration is made, and what of it is read.
    "EngineArgs": Name("vllm.engine.arg_utils", "EngineArgs", "kv_cache_dtype", wraps={"create_engine_config": ""}),
    "VllmConfig": Name(
        "vllm.config",
        "VllmConfig",
        "cache_config model_config scheduler_config load_config parallel_config kv_transfer_config speculative_config "
        "additional_config compilation_config use_v2_model_runner",
    ),
    "ModelConfig": Name(
        "vllm.config",
        "ModelConfig",
        "model revision tokenizer tokenizer_revision hf_token hf_config hf_text_config dtype max_model_len "
        "served_model_name use_mla is_attention_free model_arch_config",
        calls={"get_total_num_hidden_layers": "", "get_num_kv_heads": "parallel_config arch_config"},
    ),
    "ModelArchitectureConfig": Name(
        "vllm.config.model_arch",
        "ModelArchitectureConfig",
        "total_num_kv_heads head_size",
        calls={"__getitem__": "layer_idx"},
    ),
    "CacheConfig": Name(
        "vllm.config.cache",
        "CacheConfig",
        "cache_dtype block_size kv_cache_dtype_skip_layers skip_page_size_padded",
    ),
    "SchedulerConfig": Name("vllm.config", "SchedulerConfig", "max_num_seqs disable_hybrid_kv_cache_manager"),
    "SpeculativeConfig": Name(
        "vllm.config.speculative",
        "SpeculativeConfig",
        "num_speculative_tokens method kv_cache_dtype draft_model_config draft_load_config",
    ),
    "KVTransferConfig": Name(
        "vllm.config", "KVTransferConfig", "kv_connector kv_connector_extra_config kv_connector_module_path"
    ),
    "ParallelConfig": Name("vllm.config", "ParallelConfig", "world_size tensor_parallel_size enable_expert_parallel"),
    "LoadConfig": Name("vllm.config", "LoadConfig", "load_format download_dir"),
    "get_current_vllm_config": Name("vllm.config", "get_current_vllm_config", calls={"": ""}),
    "get_current_vllm_config_or_none": Name("vllm.config", "get_current_vllm_config_or_none", calls={"": ""}),
    "current_platform": Name("vllm.platforms", "current_platform"),
    "Platform": Name(
        "vllm.platforms.interface",
        "Platform",
        calls={"is_cpu": "", "is_cuda": "", "has_device_capability": "capability"},
    ),
    "PlatformEnum": Name("vllm.platforms", "PlatformEnum", "CUDA"),
    # The attention backends (codes_backend.py, cpu_backend.py, cuda_backend.py).
    "CpuPlatform": Name(
        "vllm.platforms.cpu", "CpuPlatform", wraps={"get_attn_backend_cls": "selected_backend attn_selector_config"}
    ),
    "CudaPlatformBase": Name(
        "vllm.platforms.cuda",
        "CudaPlatformBase",
        wraps={"get_attn_backend_cls": "selected_backend attn_selector_config"},
    ),
    "AttentionBackendEnum": Name(
        "vllm.v1.attention.backends.registry", "AttentionBackendEnum", calls={"register": "name value"}
    ),
    "AttentionSelectorConfig": Name(
        "vllm.v1.attention.selector",
        "AttentionSelectorConfig",
        "kv_cache_dtype head_size use_mla has_sink use_sparse use_mm_prefix attn_type use_non_causal use_dcp use_pcp",
    ),
    "Attention": Name(
        f"{_LAYERS}.attention.attention",
        "Attention",
        "layer_name",
        wraps={"__init__": "num_heads head_size cache_config prefix", "get_kv_cache_spec": "vllm_config"},
    ),
    "AttentionBackend": Name(
        "vllm.v1.attention.backend",
        "AttentionBackend",
        "supported_dtypes supported_kv_cache_dtypes forward_includes_kv_cache_update",
        overrides={
            "get_name": "",
            "get_impl_cls": "",
            "get_builder_cls": "",
            "get_supported_kernel_block_sizes": "kv_cache_spec",
            "get_supported_head_sizes": "",
            "supported_kv_cache_layouts": "",
            "supports_sliding_window": "",
            "customize_spec": "spec",
        },
    ),
    "AttentionImpl": Name(
        "vllm.v1.attention.backend",
        "AttentionImpl",
        overrides={
            "__init__": "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
            "logits_soft_cap attn_type kv_sharing_target_layer_name",
            "forward": "layer query key value kv_cache attn_metadata output output_scale output_block_scale",
            "process_weights_after_loading": "act_dtype",
        },
    ),
    "AttentionMetadataBuilder": Name(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder",
        "reorder_batch_threshold _cudagraph_support",
        calls={"_init_reorder_batch_threshold": "reorder_batch_threshold supports_spec_as_decode"},
        overrides={
            "__init__": "kv_cache_spec layer_names vllm_config device",
            "build": "common_prefix_len common_attn_metadata fast_build",
        },
    ),
    "CommonAttentionMetadata": Name(
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "block_table_tensor slot_mapping causal positions",
    ),
    "AttentionCGSupport": Name("vllm.v1.attention.backend", "AttentionCGSupport", "UNIFORM_BATCH"),
    "AttentionType": Name("vllm.v1.attention.backend", "AttentionType", "DECODER"),
    "MultipleOf": Name("vllm.v1.attention.backend", "MultipleOf", calls={"__init__": "base"}),
    "AttentionSpec": Name(
        "vllm.v1.kv_cache_interface", "AttentionSpec", "dtype head_size state_content_bytes page_size_bytes"
    ),
    "KVCacheLayout": Name("vllm.v1.kv_cache_interface", "KVCacheLayout", "LBHNC"),
    "ForwardContext": Name("vllm.forward_context", "ForwardContext", "attn_metadata"),
    "get_forward_context": Name("vllm.forward_context", "get_forward_context", calls={"": ""}),
    "flash_attn_varlen_func": Name(
        "vllm.v1.attention.backends.fa_utils",
        "flash_attn_varlen_func",
        calls={
            "": "q k v out cu_seqlens_q max_seqlen_q cu_seqlens_k max_seqlen_k softmax_scale causal window_size "
            "softcap fa_version s_aux"
        },
    ),
    "get_flash_attn_version": Name(
        "vllm.v1.attention.backends.fa_utils", "get_flash_attn_version", calls={"": "head_size has_sinks"}
    ),
    "flash_attn_supports_sinks": Name(
        "vllm.v1.attention.backends.fa_utils", "flash_attn_supports_sinks", calls={"": ""}
    ),
    "split_decodes_and_prefills": Name(
        "vllm.v1.attention.backends.utils",
        "split_decodes_and_prefills",
        calls={"": "common_attn_metadata decode_threshold"},
    ),
    "extract_layer_index": Name("vllm.model_executor.models.utils", "extract_layer_index", calls={"": "layer_name"}),
    "get_tensor_model_parallel_rank": Name("vllm.distributed", "get_tensor_model_parallel_rank", calls={"": ""}),
    "get_tensor_model_parallel_world_size": Name(
        "vllm.distributed", "get_tensor_model_parallel_world_size", calls={"": ""}
    ),
    "get_pp_group": Name("vllm.distributed", "get_pp_group", calls={"": ""}),
    # What a bench without an engine sets up around a layer (bench/lab/bitmap_on_cpu.py).
    "set_current_vllm_config": Name("vllm.config", "set_current_vllm_config", calls={"": "vllm_config"}),
    "init_distributed_environment": Name(
        "vllm.distributed",
        "init_distributed_environment",
        calls={"": "world_size rank distributed_init_method local_rank backend"},
    ),
    "initialize_model_parallel": Name("vllm.distributed", "initialize_model_parallel", calls={"": ""}),
    # The checkpoint format of ours (weights_config.py, weights_method.py).
    "QUANTIZATION_METHODS": Name(f"{_LAYERS}.quantization", "QUANTIZATION_METHODS"),
    "register_quantization_config": Name(
        f"{_LAYERS}.quantization", "register_quantization_config", calls={"": "quantization"}
    ),
    "QuantizationConfig": Name(
        f"{_LAYERS}.quantization.base_config",
        "QuantizationConfig",
        "packed_modules_mapping",
        overrides={
            "get_name": "",
            "get_supported_act_dtypes": "",
            "get_min_capability": "",
            "get_config_filenames": "",
            "from_config": "config",
            "apply_vllm_mapper": "hf_to_vllm_mapper",
            "get_quant_method": "layer prefix",
        },
    ),
    # Sparse checkpoints of others (sparse_checkpoints.py).
    "DefaultModelLoader": Name(
        "vllm.model_executor.model_loader.default_loader",
        "DefaultModelLoader",
        wraps={"get_all_weights": "model_config model"},
    ),
    "CompressedTensorsConfig": Name(
        f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors",
        "CompressedTensorsConfig",
        "quant_format",
        calls={"from_config": "config", "get_scheme_dict": "layer layer_name"},
        overrides={"get_quant_method": "layer prefix"},
    ),
    "RoutedExperts": Name(f"{_LAYERS}.fused_moe", "RoutedExperts"),
    "QuantizeMethodBase": Name(f"{_LAYERS}.quantization.base_config", "QuantizeMethodBase"),
    "LinearBase": Name(f"{_LAYERS}.linear", "LinearBase", "prefix tp_rank tp_size"),
    "QKVParallelLinear": Name(
        f"{_LAYERS}.linear", "QKVParallelLinear", "total_num_heads total_num_kv_heads head_size v_head_size"
    ),
    "UnquantizedLinearMethod": Name(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    "LinearMethodBase": Name(
        f"{_LAYERS}.linear",
        "LinearMethodBase",
        overrides={
            "create_weights": "layer input_size_per_partition output_partition_sizes input_size output_size "
            "params_dtype **extra_weight_attrs",
            "process_weights_after_loading": "layer",
            "apply": "layer x bias",
        },
    ),
    "set_weight_attrs": Name("vllm.model_executor.utils", "set_weight_attrs", calls={"": "weight weight_attrs"}),
    # Kernels of vLLM's for quantized layers, and ours among them (bulk.py, low_bit_kernel.py).
    "MPLinearKernel": Name(
        _MP_KERNEL,
        "MPLinearKernel",
        "config w_q_name w_s_name w_zp_name",
        calls={
            "__init__": "c w_q_param_name w_s_param_name w_zp_param_name",
            "_get_weight_params": "layer",
            "_transform_param": "layer name fn",
        },
        overrides={
            "get_min_capability": "",
            "can_implement": "c",
            "process_weights_after_loading": "layer",
            "apply_weights": "layer x bias",
        },
    ),
    "MPLinearLayerConfig": Name(
        _MP_KERNEL,
        "MPLinearLayerConfig",
        calls={"__init__": "full_weight_shape partition_weight_shape weight_type act_type group_size zero_points"},
    ),
    "linear_kernels_module": Name(_KERNELS, has="_POSSIBLE_KERNELS"),
    "choose_mp_linear_kernel": Name(_KERNELS, "choose_mp_linear_kernel", calls={"": "config"}),
    "init_int8_linear_kernel": Name(
        _KERNELS,
        "init_int8_linear_kernel",
        calls={"": "is_channelwise is_static_input_scheme input_symmetric module_name"},
    ),
    "dispatch_cpu_unquantized_gemm": Name(
        f"{_LAYERS}.utils", "dispatch_cpu_unquantized_gemm", calls={"": "layer remove_weight"}
    ),
    "unpack_quantized_values_into_int32": Name(
        f"{_LAYERS}.quantization.utils.quant_utils",
        "unpack_quantized_values_into_int32",
        calls={"": "w_q wtype packed_dim"},
    ),
    "ModelWeightParameter": Name(
        _PARAMETER, "ModelWeightParameter", calls={"__init__": "data input_dim output_dim weight_loader"}
    ),
    "ChannelQuantScaleParameter": Name(
        _PARAMETER, "ChannelQuantScaleParameter", calls={"__init__": "data output_dim weight_loader"}
    ),
    "GroupQuantScaleParameter": Name(
        _PARAMETER, "GroupQuantScaleParameter", calls={"__init__": "data input_dim output_dim weight_loader"}
    ),
    "PackedvLLMParameter": Name(
        _PARAMETER,
        "PackedvLLMParameter",
        calls={"__init__": "data input_dim output_dim packed_dim packed_factor weight_loader"},
    ),
    "permute_param_layout_": Name(
        _PARAMETER, "permute_param_layout_", calls={"": "param input_dim output_dim packed_dim"}
    ),
    "scalar_types": Name("vllm.scalar_type", "scalar_types", "uint4 uint4b8 uint8b128"),
    "apply_gptq_marlin_linear": Name(
        _MARLIN,
        "apply_gptq_marlin_linear",
        calls={
            "": "input weight weight_scale weight_zp workspace wtype output_size_per_partition input_size_per_partition"
        },
    ),
    "marlin_make_empty": Name(_MARLIN, "marlin_make_empty", calls={"": "device"}),
    "marlin_make_workspace_new": Name(_MARLIN, "marlin_make_workspace_new", calls={"": "device"}),
    # vLLM's command line and what is around it (launch.py, serve.py).
    "vllm_main": Name("vllm.entrypoints.cli.main", "main", calls={"": ""}),
    "make_arg_parser": Name(
        "vllm.entrypoints.common.cli_args",
        "make_arg_parser",
        calls={"": "parser"},
        moved={"0.32": "vllm.entrypoints.launchers.cli_args"},
    ),
    "FlexibleArgumentParser": Name("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    "get_allowed_cpu_list": Name("vllm.utils.cpu_resource_utils", "get_allowed_cpu_list", calls={"": ""}),
    "get_memory_node_info": Name("vllm.utils.cpu_resource_utils", "get_memory_node_info", calls={"": "node_id"}),
    "envs": Name("vllm.envs", has="VLLM_DISABLED_KERNELS"),
    "init_logger": Name("vllm.logger", "init_logger", calls={"": "name"}),
}
"""Every name of vLLM's that this project uses, but those that vLLM documents for its users (``LLM``,
``SamplingParams``), by the name under which this file offers it."""


def module_of(name: str) -> str:
    """Return the module that the installed vLLM has a name of the table in, without importing it."""
    return NAMES[name].module_in(vllm_release())


def __getattr__(name: str) -> Any:
    """Return what vLLM has under a name of the table. It is looked up anew each time: tests and patches replace it."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = importlib.import_module(module_of(name)), NAMES[name].attribute
    return getattr(module, attribute) if attribute else module
