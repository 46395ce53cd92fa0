from dataclasses import replace

import pytest

from tests.end_to_end.engines import REF_7M


@pytest.fixture(scope="session")
def ref_7m(tmp_path_factory):
    """ref-7m with calibrated KV scales in its folder."""
    from quant_methods.compress import compress
    from quant_methods.recipe import Calibration
    from quant_methods.recipe_file import load_recipe

    out = tmp_path_factory.mktemp("models") / "ref-7m-kv"
    compress(REF_7M, replace(load_recipe("kv-scales"), calibration=Calibration(num_samples=8, length=256)), out)
    return out
