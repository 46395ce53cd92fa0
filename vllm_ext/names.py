"""Names by which the plugin's parts find one another across processes."""

CPU_BACKEND = "PARETO_CPU"
CPU_BACKEND_PATH = "vllm_ext.cpu_backend.CPUCodesBackend"
CUDA_BACKEND = "PARETO_CUDA"
CUDA_BACKEND_PATH = "vllm_ext.cuda_backend.CUDACodesBackend"
SCALES_KEY = "pareto_kv_scales"
"""Key of ``--additional-config`` whose value is the folder that holds ``kv_scales/``; set at start-up if it is not."""
