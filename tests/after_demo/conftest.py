from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-dir", default=None, help="the run that `make demo` left")


@pytest.fixture
def run_dir(request: pytest.FixtureRequest) -> Path:
    value = request.config.getoption("--run-dir")
    if value is None:
        pytest.skip("needs --run-dir, the folder of a finished demo")
    return Path(str(value))
