"""Profiles: which files are read, what they may say, and how a refusal reads."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox import profile as profiles
from raysandbox.errors import ProfileError
from raysandbox.profile.load import ENV, tomllib
from raysandbox.profile.order import _IN_EVERY_SECTION, _ORDER
from raysandbox.profile.schema import Profile

SHIPPED = ("fast", "standard", "strict")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the search path, in front of all others."""
    directory = tmp_path / "site"
    directory.mkdir(mode=0o755)
    monkeypatch.setenv(ENV, str(directory))
    return directory


Write = Callable[..., Path]


@pytest.fixture
def write(site: Path) -> Write:
    """Write a profile into the site's directory."""

    def write(text: str | bytes, name: str = "mine") -> Path:
        path = site / f"{name}.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path) -> ProfileError:
    """Return why a file is refused."""
    with pytest.raises(ProfileError) as caught:
        profiles.load_file(path)
    return caught.value


# --- shipped profiles ----------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_load_and_conform(name: str) -> None:
    """Each loads without a problem, and the JSON Schema accepts its text."""
    path = profiles.shipped_dir() / f"{name}.toml"
    assert profiles.check(path) == []
    jsonschema.validate(tomllib.loads(path.read_text()), profiles.json_schema())


def test_strict_is_what_an_empty_file_means(write: Write) -> None:
    """Every default is the strictest choice: writing nothing weakens nothing.

    What ``strict`` imports ahead, for speed, is the one thing that it adds.
    """
    empty = profiles.load_file(write(""))
    strict = profiles.load_file(profiles.shipped_dir() / "strict.toml")
    assert [each.key for each in profiles.excess(strict, empty)] in ([], ["preload"])
    assert profiles.excess(empty, strict) == []
    apart = {"name", "description", "preload"}
    assert empty.model_dump(exclude=apart) == strict.model_dump(exclude=apart)


def test_shipped_profiles_are_as_promised() -> None:
    """The figures that a user relies on."""
    strict, standard, fast = (profiles.load(n) for n in ("strict", "standard", "fast"))
    assert (strict.boundary, standard.boundary, fast.boundary) == (
        "task",
        "task",
        "job",
    )
    assert (strict.results.mode, standard.results.mode) == ("data", "pickle")
    assert strict.limits.cpu_cores == 1
    assert strict.limits.memory_bytes == 1 << 30
    assert strict.limits.pids == 64
    assert strict.filesystem.scratch_bytes == 256 << 20
    assert strict.limits.wall_time_s == 600
    assert all(p.network.mode == "none" for p in (strict, standard, fast))
    for each in (strict, standard, fast):
        sections = [getattr(each, name) for name in Profile.model_fields]
        assert all(getattr(section, "required", True) for section in sections)


def test_shipped_order() -> None:
    """Strict is stricter than standard, which is stricter than fast."""
    strict, standard, fast = (profiles.load(n) for n in ("strict", "standard", "fast"))
    assert profiles.explain_order(strict, standard)[0] == "stricter"
    assert profiles.explain_order(standard, fast)[0] == "stricter"
    verdict, excess = profiles.explain_order(fast, strict)
    assert verdict == "laxer"
    assert {"boundary", "results.mode", "limits.memory"} <= {e.key for e in excess}


# --- which file ----------------------------------------------------------------


def test_first_find_wins_and_may_shadow_a_shipped_name(write: Write) -> None:
    """A site may replace ``strict`` for those who ask for it by name."""
    path = write("[limits]\npids = 32\n", "strict")
    loaded = profiles.load("strict")
    assert (loaded.source, loaded.limits.pids) == (str(path), 32)


def test_strictest_is_the_shipped_one_whatever_shadows_it(write: Write) -> None:
    """What a refused task falls back to is not for a file of the path to weaken."""
    write('[results]\nmode = "pickle"\nwhy = "lax"\n', "strict")
    assert profiles.load("strict").results.mode == "pickle"
    assert profiles.strictest().results.mode == "data"
    assert Path(profiles.strictest().source).parent == profiles.shipped_dir()


def test_the_search_path_has_its_order(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment names, then the site's directory, then what is shipped."""
    monkeypatch.setenv(ENV, f"{site}::{tmp_path}")
    assert profiles.search_path() == [
        site,
        tmp_path,
        Path("/etc/raysandbox/profiles"),
        profiles.shipped_dir(),
    ]
    (tmp_path / "mine.toml").write_text("")
    assert profiles.find("mine") == tmp_path / "mine.toml"
    (site / "mine.toml").write_text("")
    assert profiles.find("mine") == site / "mine.toml"


def test_names_are_those_of_all_directories(write: Write) -> None:
    """Files whose name can't be a profile's are not listed."""
    write("", "mine")
    write("", "Not-A-Name")
    assert profiles.names() == ["fast", "mine", "standard", "strict"]


@pytest.mark.parametrize(
    "name", ["../strict", "/etc/passwd", "", "a/b", "A", "a\n", "."]
)
def test_a_name_is_no_path(name: str, site: Path) -> None:
    """Nothing outside the search path can be named."""
    with pytest.raises(ProfileError, match=r"must be of a-z, 0-9, _ and -"):
        profiles.find(name)


def test_unknown_name_says_which_there_are(write: Write) -> None:
    """And which one was probably meant."""
    write("", "mine")
    with pytest.raises(
        ProfileError, match=r'"nothing": no such profile; there are fast'
    ):
        profiles.load("nothing")
    with pytest.raises(ProfileError, match=r"did you mean 'standard'\?"):
        profiles.load("standart")


@pytest.mark.parametrize("entry", ["relative/dir", "/no/such/directory", "/etc/passwd"])
def test_search_path_must_be_directories(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped directory must not mean the shipped profile of the same name.

    Guards against going on silently to a laxer file of that name.
    """
    monkeypatch.setenv(ENV, entry)
    with pytest.raises(ProfileError, match=ENV):
        profiles.load("strict")


@pytest.mark.root
def test_a_directory_that_is_closed_to_us_is_an_error() -> None:
    """A profile that can't be looked up is not taken for one that isn't there."""
    with tempfile.TemporaryDirectory(prefix="rsx-closed-", dir="/var/tmp") as closed:
        Path(closed, "strict.toml").write_text("[limits]\npids = 32\n")

        def attempt() -> str:
            os.environ[ENV] = closed
            try:
                return profiles.load("strict").source
            except ProfileError as error:
                return f"refused: {error}"

        place = f"{closed}/strict.toml"
        told = f"refused: {place}: can't be read: Permission denied"
        assert as_user(attempt) == told


def as_user(attempt: Callable[[], str], uid: int = 54321) -> str:
    """Return what ``attempt`` returns in a child that is another user."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = attempt()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


# --- who may have written it ---------------------------------------------------


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646, 0o602])
def test_a_file_that_others_can_write_is_refused(mode: int, write: Write) -> None:
    """With the command that repairs it."""
    path = write("")
    assert profiles.check(path) == []
    path.chmod(mode)
    assert f"mode {mode:04o}" in (message := str(refusal(path)))
    assert f"chmod go-w {path}" in message


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_can_write_is_refused(
    mode: int, site: Path, write: Write
) -> None:
    """Whoever writes the directory can replace the file, sticky or not."""
    path = write("")
    site.chmod(mode)
    assert f"{site}: mode {mode:04o}" in str(refusal(path))


def test_a_directory_further_up_counts_too(tmp_path: Path) -> None:
    """Whoever can rename the directory's parent can replace the directory."""
    inner = tmp_path / "open" / "inner"
    inner.mkdir(parents=True)
    path = inner / "mine.toml"
    path.write_text("")
    assert profiles.check(path) == []
    inner.parent.chmod(0o777)
    assert str(inner.parent) in str(refusal(path))


@pytest.mark.root
def test_a_file_or_directory_of_another_user_is_refused(
    site: Path, write: Write
) -> None:
    """Root and we are trusted, nobody else."""
    path = write("")
    os.chown(path, 54321, 54321)
    assert "belongs to uid 54321" in str(refusal(path))
    os.chown(path, 0, 0)
    os.chown(site, 54321, 54321)
    assert f"{site}: belongs to uid 54321" in str(refusal(path))


@pytest.mark.root
def test_a_link_of_another_user_in_a_sticky_directory_is_refused(
    tmp_path: Path, write: Write
) -> None:
    """Its owner can point it to any other file that root owns.

    Guards against looking at the ends of the way alone: file and directory are
    root's, and the link between them is not.
    """
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    target = write("").parent
    link = sticky / "profiles"
    link.symlink_to(target)
    assert profiles.check(link / "mine.toml") == []
    os.chown(link, 54321, 54321, follow_symlinks=False)
    assert f"{link}: belongs to uid 54321" in str(refusal(link / "mine.toml"))


def test_a_link_through_an_open_directory_is_refused(
    tmp_path: Path, write: Write
) -> None:
    """A link to a link: the one in the middle can be replaced by anybody."""
    target = write("")
    middle = tmp_path / "middle"
    middle.mkdir()
    (middle / "step.toml").symlink_to(target)
    first = write("", "first")
    first.unlink()
    first.symlink_to(middle / "step.toml")
    assert profiles.check(first) == []
    middle.chmod(0o777)
    assert str(middle) in str(refusal(first))


def test_links_are_followed_and_loops_refused(site: Path, write: Write) -> None:
    """A link of ours is as good as a file; one that goes round is an error."""
    write("[limits]\npids = 99\n", "real")
    (site / "alias.toml").symlink_to("real.toml")
    assert profiles.load("alias").limits.pids == 99
    (site / "loop.toml").symlink_to("loop.toml")
    assert "Too many levels of symbolic links" in str(refusal(site / "loop.toml"))
    (site / "gone.toml").symlink_to("nowhere")
    assert "No such file" in str(refusal(site / "gone.toml"))


def test_what_is_no_file_is_refused_at_once(site: Path) -> None:
    """A FIFO would wait for a writer, a device would go on for ever."""
    os.mkfifo(site / "pipe.toml", 0o600)
    assert "is not a regular file" in str(refusal(site / "pipe.toml"))
    (site / "directory.toml").mkdir()
    assert "is not a regular file" in str(refusal(site / "directory.toml"))
    (site / "zero.toml").symlink_to("/dev/zero")
    refusal(site / "zero.toml")


# --- what is no profile at all -------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a = '\xc3\x28'", "is not UTF-8 text"),
        (b"\xef\xbb\xbf", "is not TOML"),
        (b"[limits", "is not TOML"),
        (b"a = 1\na = 2", "is not TOML"),
        (b"a = \x00", "is not TOML"),
        (b"a = " + b"9" * 5000, "is not TOML"),
        (b"a = " + b"[" * 50_000 + b"]" * 50_000, "is nested too deeply"),
        (b"a = " + b"{a=" * 30_000, "is nested too deeply"),
        (b"a" + b".a" * 400 + b" = 1", "is nested too deeply"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1MiB"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_hostile_text_is_a_profile_error(
    content: bytes, reason: str, write: Write
) -> None:
    """Never a traceback, whatever is in the file."""
    error = refusal(write(content))
    assert error.reason.startswith(reason)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_load_or_are_refused(content: bytes, tmp_path_factory: Any) -> None:
    """Nothing but ProfileError comes out of a file."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    problems = profiles.check(path)
    assert all(isinstance(each, ProfileError) for each in problems)


def test_the_largest_file_loads(write: Write) -> None:
    """1 MiB is allowed; what is larger is not read into memory."""
    assert profiles.check(write(b"#" * ((1 << 20) - 1) + b"\n")) == []


def test_a_sparse_file_of_a_terabyte_is_refused(write: Write) -> None:
    """By its size, before a byte is read."""
    path = write("")
    os.truncate(path, 1 << 40)
    assert "is larger than 1MiB" in str(refusal(path))


def test_the_files_name_is_the_profiles(write: Write, tmp_path: Path) -> None:
    """A name inside that differs, or a file that can't be a profile, is refused."""
    assert "must be the file's name" in str(refusal(write('name = "other"\n')))
    assert profiles.load_file(write('name = "mine"\n')).name == "mine"
    other = tmp_path / "Mine.conf"
    other.write_text("")
    assert "end with .toml" in str(refusal(other))


# --- what is wrong in it -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[limits]\nmemory = "5"\n',
            'limits.memory = "5": must be a size such as "64MiB" (units B, KiB, MiB',
        ),
        (
            '[limits]\nmemory = "5MiB"\n',
            'limits.memory = "5MiB": must be at least 64MiB',
        ),
        ("[limits]\nmemory = 5\n", "limits.memory = 5: must be a size such as"),
        ("[limits]\npids = 7\n", "limits.pids = 7: must be at least 8"),
        ("[limits]\npids = 64.0\n", "limits.pids = 64.0: must be a whole number"),
        ("[limits]\npids = true\n", "limits.pids = true: must be a whole number"),
        (
            "[limits]\nmemroy = 1\n",
            "limits.memroy = 1: unknown key; did you mean 'memory'?",
        ),
        (
            "[limts]\npids = 9\n",
            "limts = {\"pids\": 9}: unknown key; did you mean 'limits'?",
        ),
        ("limits = 5\n", "limits = 5: must be a table"),
        ("[[limits]]\npids = 9\n", 'limits = [{"pids": 9}]: must be a table'),
        (
            "[results]\nmode = 'all'\n",
            'results.mode = "all": must be "pickle" or "data"',
        ),
        ("[network]\nmode = 'host'\n", 'network.mode = "host": must be "none"'),
        ("[ray_api]\nenabled = true\n", "ray_api.enabled = true: must be false"),
        ("boundary = 1\n", 'boundary = 1: must be "task", "job" or "worker"'),
        ("devices = ['kvm']\n", 'devices[0] = "kvm": must be "null", '),
        ("preload = ['a', 'a']\n", 'preload = ["a", "a"]: lists a more than once'),
        (
            "preload = ['os; evil()']\n",
            'preload[0] = "os; evil()": must be a module\'s',
        ),
        ("[filesystem]\nread = ['/']\n", "must not be the whole root"),
        ("[filesystem]\nread = ['//']\n", "must not be the whole root"),
        ("[filesystem]\nread = ['/a/../..']\n", "must not contain '..'"),
        ("[filesystem]\nread = ['home']\n", "must be an absolute path or an @name"),
        ("[filesystem]\nread = ['@home']\n", "unknown @name; there are @system"),
        ("[filesystem]\nhide = ['@system']\n", "hide takes paths, not @names"),
        ("[filesystem]\nscratch = '2GiB'\n", "must not exceed limits.memory"),
        ("[namespaces]\npid = false\n", "no jail can be built without pid"),
        ("[namespaces]\nhostname = 'a b'\n", "must be a host name"),
        ("[environment]\npass = ['RAY_AUTH_TOKEN']\n", "must not match RAY_*"),
        ("[environment]\npass = ['R*']\n", "must not match RAY_*"),
        ("[environment]\npass = ['*']\n", "must be a variable's name"),
        ('[environment]\nset = { A = "a\\u0000" }\n', "contains a NUL byte"),
        ("[limits]\ncpu = 0\n", "must be between 0.01 and 4096 cores"),
        ("[limits]\ncpu = nan\n", "limits.cpu = NaN: must be between"),
        ("[limits]\nwall_time = '1ms'\n", "wall_time must be at least 100ms"),
        ("[limits]\nwall_time = '4000d'\n", "must be at most 3650d"),
        ("[syscalls]\ngroups = ['bse']\n", "unknown group; there are base, files"),
        ("[syscalls.deny]\nopne = 'x'\n", "no system call of that name"),
        ("[syscalls.deny]\nopen = ''\n", "must not be empty: say why"),
        ("[syscalls.allow]\nclone3 = 'x'\n", "syscalls.allow"),
        ("extends = 5\n", "extends = 5: must be one profile's name"),
        ("extends = 'none'\n", 'extends = "none": no such profile'),
        ("extends = '../strict'\n", "must be of a-z"),
    ],
)
def test_message_names_file_key_value_and_rule(
    text: str, message: str, write: Write
) -> None:
    """What to change, and where, without opening the documentation."""
    path = write(text)
    shown = str(refusal(path))
    assert shown.startswith(f"{path}: ")
    assert message in shown


def test_every_problem_has_its_line(write: Write) -> None:
    """Three mistakes make three lines, each a problem of its own."""
    path = write("[limits]\npids = 1\nopen_files = 1\n[results]\nmode = 'x'\n")
    assert len(profiles.check(path)) == 3
    lines = str(refusal(path)).splitlines()
    assert [line.split(":")[1].split()[0] for line in lines] == [
        "limits.pids",
        "limits.open_files",
        "results.mode",
    ]


def test_a_message_is_one_line_of_bounded_length(write: Write) -> None:
    """Neither a terminal nor a log can be written to by a file's values."""
    text = json.dumps("\x1b[2J\n" + "x" * 5000)
    shown = str(refusal(write(f"[results]\nmode = {text}\n")))
    assert shown.isprintable()
    assert len(shown) < 600
    shown = str(refusal(write('"a\\nb" = 1\n')))
    assert shown.isprintable()


# --- why -----------------------------------------------------------------------

WEAK = [
    ("", "boundary = 'job'"),
    ("", "boundary = 'worker'"),
    ("", "devices = ['tty']"),
    ("namespaces", "network = false"),
    ("namespaces", "ipc = false"),
    ("namespaces", "uts = false"),
    ("namespaces", "cgroup = false"),
    ("namespaces", "required = false"),
    ("filesystem", "read = ['/srv']"),
    ("filesystem", "write = ['/srv']"),
    ("filesystem", "required = false"),
    ("landlock", "enabled = false"),
    ("landlock", "required = false"),
    ("network", "required = false"),
    ("syscalls", "action = 'log'"),
    ("syscalls", "required = false"),
    ("limits", "required = false"),
    ("results", "mode = 'pickle'"),
    ("environment", "pass = ['HOME']"),
]


@pytest.mark.parametrize(("table", "line"), WEAK)
def test_what_weakens_a_default_says_why(table: str, line: str, write: Write) -> None:
    """Without a reason, or with a blank one, it is refused; with one it loads."""
    head = f"[{table}]\n" if table else ""
    assert "say why" in str(refusal(write(f"{head}{line}\n")))
    assert "say why" in str(refusal(write(f"{head}{line}\nwhy = ' '\n")))
    assert profiles.check(write(f"{head}{line}\nwhy = 'a reason'\n")) == []


def test_a_reason_speaks_for_its_own_file(write: Write) -> None:
    """A child that writes into the section says why again; one that doesn't needn't."""
    write("[results]\nmode = 'pickle'\nwhy = 'known authors'\n", "base")
    assert profiles.check(write("extends = 'base'\n")) == []
    path = write("extends = 'base'\n[results]\nmode = 'pickle'\n")
    assert "say why" in str(refusal(path))


def test_every_allowed_or_denied_call_has_its_reason(write: Write) -> None:
    """As the groups have theirs."""
    assert "must not be empty" in str(refusal(write("[syscalls.allow]\nptrace = ''\n")))
    loaded = profiles.load_file(write("[syscalls.deny]\nptrace = 'no debugging'\n"))
    assert loaded.syscalls.deny == {"ptrace": "no debugging"}


# --- extends -------------------------------------------------------------------


def test_only_what_differs_is_written(write: Write) -> None:
    """Tables merge key by key; lists are replaced; the description is one's own."""
    write(
        "description = 'the base'\n"
        "[limits]\npids = 99\nopen_files = 77\n"
        "[filesystem]\nhide = ['/a', '/b']\n"
        "[syscalls.deny]\nptrace = 'one'\n",
        "base",
    )
    loaded = profiles.load_file(
        write(
            "extends = 'base'\n"
            "[limits]\npids = 50\n"
            "[filesystem]\nhide = ['/c']\n"
            "[syscalls.deny]\nkill = 'two'\n"
        )
    )
    assert (loaded.limits.pids, loaded.limits.open_files) == (50, 77)
    assert loaded.filesystem.hide == ("/c",)
    assert loaded.syscalls.deny == {"ptrace": "one", "kill": "two"}
    assert (loaded.name, loaded.description) == ("mine", "")


def test_a_problem_names_the_file_that_wrote_it(write: Write) -> None:
    """Also where that is the base and not the file that was asked for."""
    base = write("[limits]\npids = 1\n", "base")
    error = profiles.check(write("extends = 'base'\n[limits]\nopen_files = 99\n"))[0]
    assert (error.source, error.where) == (str(base), "limits.pids")


def test_a_broken_base_breaks_what_extends_it(write: Write) -> None:
    """Nothing is loaded from half a chain."""
    write("[limits", "base")
    assert "base.toml: is not TOML" in str(refusal(write("extends = 'base'\n")))
    write("", "base").chmod(0o666)
    assert "mode 0666" in str(refusal(write("extends = 'base'\n")))


def test_circles_are_refused_with_the_way(site: Path, write: Write) -> None:
    """Of one, of two, and by way of a link."""
    assert "mine -> mine" in str(refusal(write("extends = 'mine'\n")))
    write("extends = 'mine'\n", "other")
    path = write("extends = 'other'\n")
    assert "goes in a circle: mine -> other -> mine" in str(refusal(path))
    (site / "alias.toml").symlink_to("mine.toml")
    assert "goes in a circle" in str(refusal(write("extends = 'alias'\n")))


def test_a_file_that_shadows_what_it_extends_is_told_so(write: Write) -> None:
    """``strict`` of the site extends itself, not the shipped one."""
    assert "use another name" in str(refusal(write("extends = 'strict'\n", "strict")))


def test_a_chain_has_an_end(write: Write) -> None:
    """Sixteen profiles deep is enough for anybody."""
    for number in range(15):
        write(f"extends = 'p{number + 1}'\n", f"p{number}")
    write("", "p15")
    assert profiles.load("p0").name == "p0"
    write("extends = 'p16'\n", "p15")
    write("", "p16")
    assert "extends more than 16 profiles" in str(refusal(profiles.find("p0")))


# --- units ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("1B", 1), ("1KiB", 1024), ("3GiB", 3 << 30), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    """1 KiB is 1024 bytes; what is written back reads the same."""
    from raysandbox.profile import units

    assert units.parse_size(text) == size
    assert units.parse_size(units.format_size(size)) == size


@pytest.mark.parametrize(
    "text",
    ["", "1", "MiB", "1 MiB", "1MB", "1mib", "1.5GiB", "-1B", "+1B", "1MiB\n",
     "\u0661B", "1e3B", "0x1B", "9" * 20 + "B", "4194305TiB", 1, 1.0, True, None],
)  # fmt: skip
def test_no_sizes(text: object) -> None:
    """A unit is never guessed, and no number overflows the kernel's."""
    from raysandbox.profile import units

    with pytest.raises(ValueError, match="must be"):
        units.parse_size(text)
    with pytest.raises(ValueError, match="must be"):
        units.parse_rate(text)
    with pytest.raises(ValueError, match="must be"):
        units.parse_duration(text)


@given(st.integers(0, 1 << 62))
def test_sizes_round_trip(size: int) -> None:
    """Every size, rate and duration that is written reads as what it was."""
    from raysandbox.profile import units

    assert units.parse_size(units.format_size(size)) == size
    assert units.parse_rate(units.format_rate(size)) == size
    milliseconds = size % (3650 * 86_400_000)
    text = units.format_duration(milliseconds / 1000)
    assert round(units.parse_duration(text) * 1000) == milliseconds


# --- schema and model ----------------------------------------------------------

# For each key, values to try: good ones, odd ones, bad ones.
_SIZES = ["64MiB", "1GiB", "0B", "1MiB", "4096", 4096, "1MB", "", "9" * 20 + "B"]
_PATHS = ["@system", "@scratch", "/srv", "/", "//", "/a/../b", "/..a", "home", "@x", ""]
_NUMBERS = [0, 1, 8, 64, 100, 10_001, 1 << 40, -1, 1.5, "8", True]
_TIMES = ["100ms", "1s", "1min", "1ms", "1", 1, "unlimited", "9" * 20 + "s"]
_BOOLS = [True, False, "true", 0]
VALUES: dict[str, list[Any]] = {
    "name": ["mine", "other", "Mine", "", 1],
    "description": ["text", 1],
    "boundary": ["task", "job", "worker", "none", 1],
    "preload": [[], ["numpy"], ["a.b"], ["a b"], ["a", "a"], ["1a"], "numpy"],
    "devices": [[], ["null"], ["tty"], ["kvm"], ["null", "null"]],
    "namespaces": [{}, 1, []],
    **{f"namespaces.{n}": _BOOLS for n in ("user", "pid", "mount", "network", "ipc")},
    "namespaces.hostname": ["jail", "a-b", "-a", "a_b", "", "A"],
    "filesystem.read": [[], *([path] for path in _PATHS), ["/a", "/a"], "/srv", [1]],
    "filesystem.write": [[], *([path] for path in _PATHS)],
    "filesystem.hide": [[], *([path] for path in _PATHS)],
    "filesystem.scratch": _SIZES,
    "filesystem.scratch_inodes": _NUMBERS,
    "landlock.enabled": _BOOLS,
    "landlock.min_abi": _NUMBERS,
    "network.mode": ["none", "host", 0],
    "syscalls.groups": [[], ["base"], ["base", "base"], ["bse"], "base", [1]],
    "syscalls.allow": [
        {},
        {"ptrace": "why"},
        {"ptrace": ""},
        {"A": "x"},
        {"nope": "x"},
    ],
    "syscalls.deny": [{}, {"ptrace": "why"}, {"ptrace": 1}, {"a b": "x"}, []],
    "syscalls.action": ["errno", "kill", "log", "allow"],
    "limits.cpu": [1, 0.5, 0.001, 0, -1, 5000, "unlimited", "1", True],
    "limits.cpu_weight": _NUMBERS,
    "limits.memory": _SIZES,
    "limits.swap": _SIZES,
    "limits.pids": _NUMBERS,
    "limits.open_files": _NUMBERS,
    "limits.file_size": [*_SIZES, "unlimited"],
    "limits.wall_time": _TIMES,
    "limits.cpu_time": _TIMES,
    "limits.io_read": ["50MiB/s", "1B/s", "50MiB", "unlimited", 1],
    "limits.output": _SIZES,
    "object_store.max_put": _SIZES,
    "results.mode": ["data", "pickle", "json"],
    "environment.pass": [[], ["LANG"], ["HOME"], ["RAY_X"], ["A*"], ["*"], ["a b"]],
    "environment.set": [{}, {"A": "b"}, {"A": 1}, {"a b": "c"}],
    "ray_api.enabled": [False, True, 0],
    "limits.required": _BOOLS,
    "limits.unknown": [1],
    "unknown": [1],
    "extends": ["strict", "standard", "none", "Bad Name", 1],
}
# Rules that a JSON Schema of reasonable size does not say; see json_schema().
ONLY_THE_LOADER = re.compile(
    r"say why|must be at least (\d+[A-Z]|100ms|\w+/s)|_time must be at least|"
    r"no such profile|no system call|unknown group|must not match RAY|"
    r"must not exceed|can't be in both|hide takes paths|must be the file's name|"
    r"whole number|must be at most (4194304TiB|3650d)"
)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def _compare(path: Path, tables: dict[str, Any], validator: Any) -> None:
    path.write_text("".join(f"{k} = {_toml(v)}\n" for k, v in tables.items()))
    assert tomllib.loads(path.read_text()) == tables
    problems = [str(problem) for problem in profiles.check(path)]
    if validator.is_valid(tables):
        unexpected = [p for p in problems if not ONLY_THE_LOADER.search(p)]
        assert not unexpected, f"the schema accepts {tables}"
    else:
        why = next(validator.iter_errors(tables)).message
        assert problems, f"the model accepts {tables}; the schema: {why}"


def _tables(chosen: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for key, value in chosen.items():
        table, _, name = key.rpartition(".")
        if not table:
            tables[key] = value
        elif isinstance(tables.setdefault(table, {"why": "w"}), dict):
            tables[table][name] = value
    return tables


@pytest.fixture(scope="module")
def validator() -> Any:
    """The generated schema, itself checked to be one."""
    schema = profiles.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_and_model_agree_key_by_key(validator: Any, write: Write) -> None:
    """What one accepts the other accepts, but for the rules that are listed."""
    path = write("")
    for key, values in VALUES.items():
        for value in values:
            _compare(path, _tables({key: value}), validator)


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.fixed_dictionaries(
        {}, optional={key: st.sampled_from(values) for key, values in VALUES.items()}
    )
)
def test_schema_and_model_agree_on_whole_profiles(
    chosen: dict[str, Any], validator: Any, tmp_path_factory: Any
) -> None:
    """The same for keys together."""
    path = tmp_path_factory.getbasetemp() / "mine.toml"
    _compare(path, {"why": "w", **_tables(chosen)}, validator)


def test_schema_knows_every_key_of_the_model(validator: Any) -> None:
    """And its defaults are written as a file would, so that editors may use them."""
    schema = validator.schema
    for name, field in Profile.model_fields.items():
        section = field.annotation
        if not hasattr(section, "model_fields"):
            assert (field.alias or name) in schema["properties"]
            continue
        properties = schema["$defs"][section.__name__]["properties"]
        assert set(properties) == {
            inner.alias or key for key, inner in section.model_fields.items()
        }
        written = {k: v["default"] for k, v in properties.items() if "default" in v}
        assert validator.is_valid({name: written}), (name, written)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dumped_profile_loads_as_the_same(name: str, write: Write) -> None:
    """``profiles show`` prints a file that means what it shows."""
    loaded = profiles.load(name)
    text = profiles.dump(loaded).replace(f'name = "{name}"', 'name = "mine"')
    again = profiles.load_file(write(text))
    assert again.model_dump(exclude={"name"}) == loaded.model_dump(exclude={"name"})


# --- order ---------------------------------------------------------------------


def test_every_key_has_its_place_in_the_order() -> None:
    """A key without one would make comparing profiles fail, or lie."""
    for name, field in Profile.model_fields.items():
        section = field.annotation
        inner = getattr(section, "model_fields", None)
        keys = [f"{name}.{key}" for key in inner] if inner else [name]
        for key in keys:
            if key.rpartition(".")[2] not in _IN_EVERY_SECTION:
                assert key in _ORDER


@pytest.mark.parametrize(("table", "line"), WEAK)
def test_what_weakens_a_default_exceeds_strict(
    table: str, line: str, write: Write
) -> None:
    """Whatever needs a reason is laxer in the order too, by exactly that key."""
    head = f"[{table}]\n" if table else ""
    weak = profiles.load_file(write(f"{head}{line}\nwhy = 'a reason'\n"))
    key = line.partition(" ")[0]
    keys = [e.key for e in profiles.excess(weak, profiles.load("strict"))]
    assert keys == [f"{table}.{key}" if table else key]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("[limits]\nmemory = '2GiB'", "limits.memory"),
        ("[limits]\nwall_time = 'unlimited'", "limits.wall_time"),
        ("[limits]\nfile_size = 'unlimited'", "limits.file_size"),
        ("[limits]\ncpu = 'unlimited'", "limits.cpu"),
        ("[limits]\nswap = '1MiB'", "limits.swap"),
        ("[object_store]\nmax_put = '1GiB'", "object_store.max_put"),
        ("[syscalls.allow]\nptrace = 'x'", "syscalls.allow"),
        ("preload = ['a_module']", "preload"),
    ],
)
def test_larger_limits_exceed(line: str, key: str, write: Write) -> None:
    """More of anything is laxer, and no limit is the most."""
    lax = profiles.load_file(write(line))
    excess = profiles.excess(lax, profiles.load("strict"))
    assert [each.key for each in excess] == [key]
    assert str(excess[0]).startswith(f"{key} = ")


def test_two_profiles_may_be_incomparable(write: Write) -> None:
    """More memory and fewer processes is neither stricter nor laxer."""
    mixed = profiles.load_file(write("[limits]\nmemory = '2GiB'\npids = 32\n"))
    strict = profiles.load("strict")
    verdict, excess = profiles.explain_order(mixed, strict)
    assert (verdict, [e.key for e in excess]) == ("neither", ["limits.memory"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_is_an_order(data: st.DataObject) -> None:
    """Nothing exceeds itself; what is within what is within a third is within it."""

    def draw() -> Profile:
        small = st.integers(0, 2)
        memory = ("64MiB", "1GiB", "2GiB")[data.draw(small)]
        pids = (8, 64, 128)[data.draw(small)]
        deny = [{}, {"kill": "x"}, {"kill": "x", "ptrace": "x"}][data.draw(small)]
        action = ("kill", "errno", "log")[data.draw(small)]
        return Profile.model_validate(
            {
                "name": "x",
                "limits": {"memory": memory, "pids": pids},
                "filesystem": {"scratch": "1MiB"},
                "syscalls": {"deny": deny, "action": action, "why": "w"},
            }
        )

    a, b, c = draw(), draw(), draw()
    assert profiles.excess(a, a) == []
    if not profiles.excess(a, b) and not profiles.excess(b, c):
        assert profiles.excess(a, c) == []
    if not profiles.excess(a, b) and not profiles.excess(b, a):
        assert a.limits == b.limits


def test_digest_follows_what_has_an_effect(write: Write) -> None:
    """Reasons and descriptions change nothing; a limit does."""
    plain = profiles.load_file(write("")).digest
    assert profiles.load_file(write("description = 'x'\nwhy = 'y'\n")).digest == plain
    assert profiles.load_file(write("[limits]\npids = 65\n")).digest != plain
