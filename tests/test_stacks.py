"""Frames: whose code they are, and how their files are named for people."""

import pytest

from stagescope.stacks import is_library, short_file


@pytest.mark.parametrize(
    "file",
    [
        "/usr/lib/python3.11/asyncio/base_events.py",
        "/srv/venv/lib/python3.12/site-packages/uvicorn/server.py",
        "/srv/venv/bin/uvicorn",
        "/usr/sbin/gunicorn",
        "<frozen runpy>",
        "asyncio/runners.py",
    ],
)
def test_what_is_not_the_users_own_code(file: str) -> None:
    """Python itself, installed packages, and the launchers that these install."""
    assert is_library(file)


@pytest.mark.parametrize("file", ["/srv/app/server.py", "/srv/bin/serve.d/app.py", "model.py"])
def test_what_is(file: str) -> None:
    """A folder called `bin` somewhere above makes no launcher."""
    assert not is_library(file)


@pytest.mark.parametrize(
    ("file", "short"),
    [
        ("/srv/app/server.py", "app/server.py"),
        ("/srv/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py",
         "torch/nn/modules/linear.py"),
        ("/tmp/models/5f0c1be2a3d84c66b1d8e37fa0c2e9aa/handler.py", "models/handler.py"),
        ("/tmp/tmpa1b2c3d4/models/0123456789abcdef0123/image_handler.py",
         "models/image_handler.py"),
    ],
)  # fmt: skip
def test_a_files_short_name_says_something(file: str, short: str) -> None:
    """TorchServe unpacks each model into a folder named by a hash."""
    assert short_file(file) == short
