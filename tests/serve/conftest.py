"""One server for all tests that leave it as they found it."""

import pytest

from tests.serve.live import make_artifact, serving

FLAGS = (
    "--config.engine.slots=8",
    "--config.engine.decode_steps=4",
    "--config.limits.queue=24",
    "--config.limits.body=200000",
    "--config.limits.tokens=900",
    "--config.limits.n=8",
    "--config.limits.stops=4",
    "--config.sampling.max_new_tokens=200",
    "--config.limits.io_seconds=2",
)


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def server(artifact, cache):
    with serving(artifact, cache, "--served_name=tiny/model", *FLAGS) as live:
        yield live


@pytest.fixture(autouse=True)
def nothing_left_over(request):
    """After every test on the shared server: it lives, and no sequence holds a slot."""
    yield
    if "server" in request.fixturenames:
        live = request.getfixturevalue("server")
        assert live.request("/health")[0] == 200
        live.wait_until(sequences_running=0, sequences_waiting=0)
