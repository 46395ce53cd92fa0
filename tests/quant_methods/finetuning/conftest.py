"""A checkpoint whose layers have every kind of part, which adapters learn over."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quant_methods.formats.flat_form import flat_form
from quant_methods.formats.form import Form
from quant_methods.formats.native_format import NativeConfig, pack
from quant_methods.formats.parts.bitmap_codes import BitmapForm
from quant_methods.formats.parts.semi_sparse import SemiSparseForm
from quant_methods.formats.parts.trellis_codes import TrellisForm
from tests.quant_methods.random_layers import random_layer

FORMS = [
    flat_form(4, 32, symmetric=False),
    flat_form(3, 32),
    flat_form(4, table=True, sparse=True, columns=3),
    flat_form(3, 32, symmetric=False, columns=4, rank=2),
    flat_form(8, -1, activations="int8"),
    flat_form(6, 64, activations="int8", columns=2, rank=3),
    Form((TrellisForm(3, 32),)),
    Form((SemiSparseForm(4, 32, False),)),
    Form((BitmapForm(4, 32, False),)),
    flat_form(5, 32, sparse=True, columns=5, column_bits=8),
]


@pytest.fixture(scope="session")
def coded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random layers in our format, one form after the other."""
    folder = tmp_path_factory.mktemp("models") / "coded"
    shutil.copytree(tiny_model, folder)
    tensors, forms = load_file(folder / "model.safetensors"), {}
    for number, full in enumerate(sorted(name for name in tensors if name.endswith("_proj.weight"))):
        name, (rows, inputs) = full.removesuffix(".weight"), tensors[full].shape
        forms[name] = FORMS[number % len(FORMS)]
        del tensors[full]
        tensors |= pack(name, random_layer(forms[name], rows, inputs, number))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": NativeConfig(forms).to_dict()}))
    return folder
