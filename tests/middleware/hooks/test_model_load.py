"""Load calls of real frameworks are timed while the process is cold, and only then."""

from __future__ import annotations

import json
import subprocess
import sys

LOADING = """
import io, json, sys
import torch
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.hooks.model_calls import wrap_loaded
from stagescope.recorder.decoder import entries_of
from stagescope.middleware.recording.names import CODES

wrap_loaded()
signature = torch.nn.Module.to.__name__, torch.load.__doc__ is not None
model = torch.nn.Linear(2, 2)
saved = io.BytesIO()
torch.save(model.state_dict(), saved)
saved.seek(0)
model.load_state_dict(torch.load(saved))
model.to("cpu")
timeline = cold_start.begin()
names = {code: name for name, code in CODES.items()}
cold = [names[code] for code, _, _ in entries_of(bytes(timeline.slot.raw))]
cold_start.end()
model.to("cpu")
assert cold_start.begin() is None
print(json.dumps([cold, signature]))
"""


def test_torch_loads_are_timed_while_cold() -> None:
    """Reading a file, filling a model and moving it: three loads; none once the process is warm."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, check=True, timeout=100
    )
    loads, signature = json.loads(ran.stdout)

    assert loads == ["imports", "load.torch", "load.torch", "load.torch"]
    assert signature == ["to", True]


CLASS_METHOD = """
import sys, types
module = types.ModuleType("transformers.modeling_utils")
class PreTrainedModel:
    @classmethod
    def from_pretrained(cls, name):
        return cls, name
module.PreTrainedModel = PreTrainedModel
sys.modules["transformers.modeling_utils"] = module
from stagescope.middleware.hooks.model_calls import wrap_loaded
wrap_loaded()
wrap_loaded()
class Bert(PreTrainedModel): pass
print(Bert.from_pretrained("x") == (Bert, "x"))
"""


def test_a_class_method_stays_one_of_the_subclass() -> None:
    """`Model.from_pretrained` gets the model's own class, not the one that was wrapped."""
    ran = subprocess.run(
        [sys.executable, "-c", CLASS_METHOD], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "True"
