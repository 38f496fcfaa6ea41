"""The tests of the Triton kernels, run on the CPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
import torch


triton = pytest.importorskip("triton", reason="there is no Triton to interpret with")

FOLDER = Path(__file__).parent


def version(module) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run these tests there with -m cuda")
@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton before 3.7 fails with NumPy 2.4 and later",
)
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    """One process for all modules of kernel tests, which are found by their names. Triton chooses it at its import."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    report, modules = tmp_path / "report.xml", sorted(FOLDER.glob("test_*kernels.py"))
    command = [sys.executable, "-m", "pytest", *modules, "-m", "cuda", "-n0", "-p", "no:cacheprovider", "-q", "-rs"]
    run = subprocess.run(
        [*command, "--durations=15", f"--junitxml={report}"],
        env=environment,
        cwd=FOLDER.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert {case.get("classname").split(".")[-1] for case in cases} == {module.stem for module in modules}
    skipped = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    assert len(cases) > len(skipped), run.stdout
    # What a GPU alone can run says so; nothing else may be left out.
    assert all(skip.get("message", "").startswith("needs a GPU") for skip in skipped), run.stdout
