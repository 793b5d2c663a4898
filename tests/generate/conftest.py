"""A server that fails on purpose."""

from collections.abc import Iterator

import pytest

from tests.generate.unreliable import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server
