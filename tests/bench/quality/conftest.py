"""What tests of lm-eval's tasks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def definitions_read_once():
    """Read lm-eval's definitions and ours once, which takes seconds; not those that a test writes."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks.manager import TaskIndex

    from bench.quality.tasks.run import OWN

    read, lasting, known = TaskIndex.build, (Path(lm_eval.__file__).parent, OWN), {}

    def build(paths, **settings):
        index = {}
        for path in paths:
            if not any(path.is_relative_to(folder) for folder in lasting):
                index |= read([path], **settings)
                continue
            if path not in known:
                known[path] = read([path], **settings)
            index |= known[path]
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build))
        yield
