"""Names by which the plugin's parts find one another across processes."""

CPU_BACKEND = "PARETO_CPU"
CPU_BACKEND_PATH = "vllm_ext.cpu_backend.CPUCodesBackend"
CUDA_BACKEND = "PARETO_CUDA"
CUDA_BACKEND_PATH = "vllm_ext.cuda_backend.CUDACodesBackend"
LOW_BIT_KERNEL_VARIABLE = "VLLM_PARETO_LOW_BIT_KERNEL"
"""Environment variable: 1 offers vLLM the 4-bit kernel of ours for other people's checkpoints, 0 or nothing does not;
``pareto serve`` sets it to 1 unless it is set."""
SCALES_KEY = "pareto_kv_scales"
"""Key of ``--additional-config`` whose value is the folder that holds ``kv_scales/``; set at start-up if it is not."""
DRAFT_SCALES_KEY = "pareto_draft_kv_scales"
"""The same for the draft model of speculative decoding; set only if there is one and its KV cache is quantized too."""
