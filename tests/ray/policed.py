"""A small Ray whose node has a policy, and drivers that come to it.

Each driver is a process of its own, since namespace and metadata belong to the
job; what it finds out is the JSON that it prints last.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from tests.answers import ALONE

_KEEPER = """
import json, sys
import ray

options = json.loads(sys.argv[1])
ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False, **options)
node = ray._private.worker._global_node
found = {
    "address": node.gcs_address,
    "session": node.get_session_dir_path(),
    "node": node.node_id,
}
print(json.dumps(found))
sys.stdout.flush()
sys.stdin.read()
ray.shutdown()
"""

_DRIVER = """
import json, os, sys, time
import ray
import raysandbox

OPTIONS = json.loads(sys.argv[1])
config = ray.job_config.JobConfig(metadata=OPTIONS["metadata"])
ray.init(
    OPTIONS["address"], namespace=OPTIONS["namespace"], job_config=config,
    runtime_env=OPTIONS["runtime_env"], logging_level="ERROR", log_to_driver=False,
)


def told(run):
    try:
        return run()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return {"error": type(cause).__name__, "text": str(cause)}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}


def ask(tag=None, **options):
    "Run a task with a tag and say which profile it found itself under."
    resources = {f"sandbox:{tag}": 1} if tag else {}
    task = where.options(resources=resources, **options)
    return told(lambda: ray.get(task.remote(), timeout=60))


@ray.remote(max_retries=0)
def where():
    from raysandbox.jail.ray_facade import context
    return context["profile"]


def spoken(word):
    "Tell the test something; wait until it answers."
    print(json.dumps(word), flush=True)
    sys.stdin.readline()
"""


class Policed:
    """One node with a policy.

    Attributes:
        address: Of its GCS.
        session: Ray's session directory.
        node: Ray's id of the node.
    """

    def __init__(
        self,
        policy: str,
        resources: dict[str, float],
        profiles: dict[str, str],
        variables: dict[str, str] | None = None,
    ) -> None:
        # Not in /tmp: who may write there could replace the directory.
        self.home = Path(tempfile.mkdtemp(prefix="rsx-policy-", dir=Path.home()))
        self.temporary = tempfile.mkdtemp(prefix="rsx-ray-", dir="/tmp")
        self.policy = self.home / "policy.toml"
        self.policy.write_text(textwrap.dedent(policy))
        for name, text in profiles.items():
            (self.home / f"{name}.toml").write_text(textwrap.dedent(text))
        self._environment = {
            **os.environ,
            "RAYSANDBOX_POLICY": str(self.policy),
            "RAYSANDBOX_PROFILE_PATH": str(self.home),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **(variables or {}),
        }
        options = {"num_cpus": 2, "resources": resources, "_temp_dir": self.temporary}
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        assert self._keeper.stdout is not None
        told = json.loads(self._keeper.stdout.readline())
        self.address, self.session = told["address"], Path(told["session"])
        self.node = told["node"]

    def drive(
        self,
        body: str,
        *,
        namespace: str = "",
        metadata: dict[str, str] | None = None,
        runtime_env: dict[str, Any] | None = None,
        hook: bool = True,
    ) -> Any:
        """Run a driver; return what ``body`` left in ``result``."""
        with self.driver(
            body,
            namespace=namespace,
            metadata=metadata,
            runtime_env=runtime_env,
            hook=hook,
        ) as driver:
            try:
                out, err = driver.communicate(timeout=150)
            finally:
                driver.kill()
        assert driver.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def driver(
        self,
        body: str,
        *,
        namespace: str = "",
        metadata: dict[str, str] | None = None,
        runtime_env: dict[str, Any] | None = None,
        hook: bool = True,
    ) -> subprocess.Popen[str]:
        """Start a driver; it prints ``result`` at its end."""
        environment = dict(runtime_env or {})
        if hook:
            environment["worker_process_setup_hook"] = "raysandbox.worker_hook"
        options = {
            "address": self.address,
            "namespace": namespace or "anonymous",
            "metadata": metadata or {},
            "runtime_env": environment,
        }
        script = (
            ALONE + _DRIVER + textwrap.dedent(body) + "\nprint(json.dumps(result))\n"
        )
        variables = dict(self._environment)
        variables.pop("RAYSANDBOX_POLICY")
        return subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a raysandbox command against this node."""
        return subprocess.run(
            [sys.executable, "-m", "raysandbox", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**self._environment, "RAY_ADDRESS": self.address},
        )

    def close(self) -> None:
        """End the node and remove its files."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(60)
        shutil.rmtree(self.temporary, ignore_errors=True)
        shutil.rmtree(self.home)
