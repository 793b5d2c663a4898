"""schemathesis asks a live server whatever its own schema allows, and what it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.live import serving

FLAGS = (
    "--config.engine.slots=4",
    "--config.limits.tokens=24",
    "--config.sampling.max_new_tokens=8",
    "--config.limits.queue=64",
)
# no schema says that n is at most what this server allows, or that a prompt fits the context
EXCLUDED = "positive_data_acceptance"


def fuzz(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    binary = Path(sys.executable).with_name("schemathesis")
    command = [str(binary), "run", f"{url}/openapi.json", "--request-timeout=300", "--warnings=off", *flags]
    env = os.environ | {"NO_COLOR": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_is_asked_is_answered_as_the_schema_says(artifact, cache, tmp_path, seed):
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with serving(artifact, cache, f"--api_key_file={keys}", *FLAGS) as live:
        done = fuzz(
            live.url,
            tmp_path,
            "--header=Authorization: Bearer secret",
            "--checks=all",
            f"--exclude-checks={EXCLUDED}",
            "--phases=coverage,fuzzing",
            "--max-examples=100",
            "--continue-on-failure",
            f"--seed={seed}",
        )
        assert done.returncode == 0, done.stdout[-8000:]
        assert "Tested: 8" in done.stdout  # every operation
        counted = live.metrics({"Authorization": "Bearer secret"})
        answered = {key: value for key, value in counted.items() if key.startswith("requests_total")}
        assert not [key for key in answered if 'status="5' in key]
        for route in ("/v1/chat/completions", "/v1/completions", "/v1/score"):  # it came through to the model
            assert answered[f'requests_total{{route="{route}",status="200"}}'] > 10
        assert live.request("/health")[0] == 200 and "Traceback" not in live.log.read_text()
        assert live.terminate() == 0
