"""Try a built package as a user has it: installed in an environment of its own, outside any checkout.

    python tests/try_package.py DIST

Wheel and sdist are installed without their dependencies, which come from the environment of this script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

_TRY = """
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import fedprllm
from fedprllm import PruneConfig, prune
from fedprllm.report.page import write_report

assert {where!r} in fedprllm.__file__, fedprllm.__file__
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32)
windows = torch.randint(0, 64, (2, 8))
result = prune(LlamaForCausalLM(config), [windows, windows], PruneConfig(sparsity=0.5), out="run")
assert result.record.sparsity == 0.5
assert write_report(Path("run")).stat().st_size > 10_000
"""


def install(package: Path, folder: Path) -> Path:
    """Install a wheel or sdist in an environment of its own; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    run(python, "-m", "pip", "install", *options, package.resolve(), cwd=folder)
    return python


def run(python: Path, *words: object, cwd: Path) -> str:
    """Run Python with the dependencies of this environment, which come after those of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def borrow(folder: Path) -> None:
    """Let an environment find the packages of this one."""
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


def main() -> None:
    """Try the wheel and the sdist of a folder."""
    dist = Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CITATION.cff",
        "Makefile",
        "constraints.txt",
        "LICENSE",
    ):
        assert needed in names, f"{sdist.name} lacks {needed}"
    with tempfile.TemporaryDirectory() as temporary:
        for package in (wheel, sdist):
            folder = Path(temporary) / package.suffix.strip(".")
            python = install(package, folder)
            borrow(folder)
            work = folder / "work"
            work.mkdir()
            run(python, "-c", _TRY.format(where=str(folder)), cwd=work)
            shown = run(python, "-m", "fedprllm", "--version", cwd=work)
            assert shown.startswith("fedprllm "), shown
            print(f"{package.name}: installed, pruned, reported")


if __name__ == "__main__":
    main()
