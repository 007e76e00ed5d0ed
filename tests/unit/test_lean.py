"""Our processes start without torch's compiler and distributed runtime; a request loads the compiler."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fedprllm import PruneConfig, prune
from fedprllm.lean import start_lean

START = """
import gc, json, sys
from fedprllm.lean import start_lean
start_lean()
import torch
import transformers.modeling_utils
def heavy():
    names = ("sympy", "torch._inductor", "torch.distributed.tensor", "torch._dynamo.utils")
    return [name for name in names if name in sys.modules]
assert heavy() == []
"""
PRUNE = """
from fedprllm import PruneConfig, prune
torch.set_num_threads(1)
model, text, out = sys.argv[1:]
result = prune(model, {"north": [text]}, PruneConfig(windows=2, window_length=32), out=out)
found = [heavy(), gc.isenabled()]
"""
# Each asks for the compiler in another way.
ASKING = {
    "a function": "found = torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(2)).tolist()",
    "a module": "import torch._dynamo.utils as one\nfound = one is sys.modules['torch._dynamo.utils']",
}
ANSWERS = {"a function": [2.0, 2.0], "a module": True}


def lean(code: str, *arguments: object) -> object:
    """What the code leaves in ``found``, in a process that starts lean."""
    command = [sys.executable, "-W", "ignore", "-c", f"{START}\n{code}\nprint(json.dumps(found))"]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_needs_neither_and_gives_the_same_model(small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Once upon a time there were {n} birds. " for n in range(60)))
    assert lean(PRUNE, small_model, text, tmp_path / "lean") == [[], True]
    config = PruneConfig(windows=2, window_length=32)
    usual = prune(small_model, {"north": [str(text)]}, config, out=tmp_path / "usual").model_dir
    shards = sorted(path.name for path in usual.glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert (tmp_path / "lean" / "model" / name).read_bytes() == (usual / name).read_bytes()


@pytest.mark.parametrize("way", ASKING)
def test_what_asks_for_the_compiler_gets_it(way):
    assert lean(f"{ASKING[way]}\nfound = [found, 'torch._dynamo.utils' in heavy()]") == [ANSWERS[way], True]


def test_a_program_that_has_torch_keeps_it_as_it_is():
    before = list(sys.meta_path)
    start_lean()
    assert sys.meta_path == before
    assert torch.distributed.is_available()
