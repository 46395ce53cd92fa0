"""Tasks of this project, as lm-eval's definitions: one more task is one more YAML file here.

A definition says in its ``metadata`` which file of ``--task-data`` it reads (``data.rows``), and whether its questions
go into the chat template of a model that has one (``chat: true``). Functions are named by their whole path.
"""
