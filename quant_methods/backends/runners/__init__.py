"""Scripts that other tools' environments run by path, with ``runner_job.py`` beside them; nothing here imports them.

This folder comes first on ``sys.path`` there, so no file in it may be named like a module that a tool imports.
"""
