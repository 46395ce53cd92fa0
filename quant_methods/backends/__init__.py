"""Other compression tools, each run by the Python of an environment of its own.

``llm_compressor_runner.py``, ``autoawq_runner.py`` and ``autogptq_runner.py`` are scripts for those environments, with
``runner_job.py`` beside them; nothing here imports them. A ``.lock`` file pins each environment's packages.
"""
