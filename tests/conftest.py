"""Set before anything imports triton: its kernels are interpreted on the CPU, unless the run is for a GPU.

``MOEFACTORY_TEST_GPU=1`` (make test-gpu) runs the same cases compiled, on cuda. A process is one or the other.
"""

import os
import shutil
import sys
import tempfile

GPU = os.environ.get("MOEFACTORY_TEST_GPU", "") == "1"
if "triton" in sys.modules:
    raise RuntimeError("triton was imported before tests/conftest.py could choose between interpreter and compiler")
if GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"

# tuned kernel configs of this machine's user must not decide which kernels the tests run
os.environ["MOEFACTORY_CACHE"] = tempfile.mkdtemp(prefix="moefactory-tests-")

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(os.environ["MOEFACTORY_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "interpreter: needs Triton's interpreter, deselected on a GPU")
    config.addinivalue_line("markers", "gpu: needs a GPU, deselected without")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, rather than skip, what belongs to the other kind of run: a skip stays a thing to explain."""
    other = "interpreter" if GPU else "gpu"
    dropped = [item for item in items if item.get_closest_marker(other)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def device() -> str:
    """Where the cases run."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def instruments() -> Iterator[None]:
    """Every interpreted kernel runs with honest bfloat16, checked addresses and integers, and poisoned masked lanes."""
    if GPU:
        yield
        return
    import interpreter

    interpreter.install_bfloat16_shim()
    interpreter.install_launch_fixes()
    with interpreter.bounds_checker(), interpreter.overflow_checker(), interpreter.poisoned_lanes():
        yield
