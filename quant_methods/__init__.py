"""Offline weight compression: a Hugging Face model and a recipe in, a checkpoint that vLLM loads out.

====================  ==================================================================
``compress.py``       the way in from Python; ``command.py`` from the shell
``recipe.py``         what a recipe is; ``steps.py`` the kinds of its steps
``handlers.py``       the registry of methods: what performs each step
``stock_vllm.py``     what stock vLLM serves, and what takes the plugin
``kv_scales.py``      scales of the KV cache alone, as a process of its own
``plan.py``           which layer gets which step; ``run.py`` and ``block_solver.py`` do it
``formats/``          what a quantized weight is, and how it lies in tensors
``kernels/``          arithmetic of quantized layers at serving time
``checkpoints/``      reading sources, writing results, running either in float32
``calibration/``      text, and the model run over it block by block
``methods/``          the steps of recipes
``training/``         those that train whole models
``mixed_precision/``  a width for each layer, from a budget
``activations/``      statistics of layers' inputs
``sweeps/``           many recipes, one table
``backends/``         other compression tools
====================  ==================================================================

Folders import only those above them (``tests/test_rooms.py``). ``recipes/`` and ``models/``
hold data; ``embedded.py`` finds the latter.
"""
