"""The node's policy: what is read, what is refused, what a request gets."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import textwrap
from pathlib import Path

import jsonschema
import pydantic
import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st

from raysandbox import policy as policies
from raysandbox import profile as profiles
from raysandbox.errors import ProfileError
from raysandbox.policy import Percent, Policy, Request, Rule, decide
from raysandbox.policy.schema import NEVER
from raysandbox.profile import dump


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Path:
    """A directory for policies and profiles that nobody else may write."""
    made = tmp_path_factory.mktemp("policy")
    made.chmod(0o755)
    monkeypatch.setenv("RAYSANDBOX_PROFILE_PATH", str(made))
    monkeypatch.delenv("RAYSANDBOX_POLICY", raising=False)
    return made


def write(home: Path, text: str, name: str = "policy.toml", mode: int = 0o644) -> Path:
    path = home / name
    path.write_text(textwrap.dedent(text))
    path.chmod(mode)
    return path


def problems(home: Path, text: str) -> list[str]:
    path = write(home, text)
    node, found = policies.check(path)
    assert (node is None) == bool(found)
    return [line.replace(f"{path}: ", "") for line in found]


# --- reading ----------------------------------------------------------------


def test_an_empty_policy_lets_everybody_have_strict_alone(home):
    """Every default is the strictest choice that lets a node work."""
    node = policies.load_node(write(home, ""))
    assert node.resources() == {"sandbox:strict": 64}
    assert set(node.profiles) == {"strict"}
    assert decide(node.policy, Request()).profile == "strict"
    assert decide(node.policy, Request(tag="standard")).profile is None
    answers = node.policy.runtime_env
    assert {getattr(answers, key) for key in type(answers).weak} == {"refuse"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('untaged = "strict"', "did you mean 'untagged'?"),
        ('[runtime_env]\npy_executeable = "refuse"', "did you mean 'py_executable'?"),
        ("[offer]\nstrict = 0", "offer.strict = 0: must be at least 1"),
        ("[offer]\nStrict = 1", "must be a profile's name"),
        ("[offer]\nnone-such = 1", "no such profile"),
        ('[runtime_env]\npip = "allow"', 'weakens pip: say why = "…"'),
        ("[totals]\nrequired = false", 'weakens required: say why = "…"'),
        ('[totals]\ncpu = "0%"', "must be a number of cores"),
        ('[totals]\nmemory = "1MiB"', "must be a size of at least 256MiB"),
        ("[totals]\npids = true", "must be a number of at least 64"),
        ('[worker]\nuser = "root"', "must not be root"),
        ('[worker]\nuser = "00"', "must not be root"),
        ("[worker]\nconnect = 6379", "worker.connect = 6379: must be a list"),
        *(
            (
                f"[worker]\nconnect = [6379, {item}]",
                f"worker.connect[1] = {item}: must be a TCP port from 1 to 65535, or",
            )
            for item in ("0", "65536", "true", '"6379"', '"9-3"', '"1-70000"', '"0-9"')
        ),
        ('[ceilings]\nmemory = "1KiB"', "must be at least 64MiB"),
        ("[ceilings]\npids = 4", "must be at least 8"),
        ('[ceilings]\nwall_time = "1ms"', "must be at least 100ms"),
        ('[audit]\ndirectory = "logs"', "must be an absolute path"),
        ('[audit]\ndirectory = "/var/../etc"', "must be an absolute path"),
        ('[[rules]]\nname = "a"', "rules[0].profiles: is required"),
        ('[[rules]]\nname = "a"\nprofiles = []\nnamespace = ["x"]', "'namespaces'?"),
        (
            '[[rules]]\nname = "a"\nprofiles = []\nuntagged = "fast"',
            "untagged = 'fast' is not one of its profiles",
        ),
        (
            '[[rules]]\nname = "a"\nprofiles = []\n' * 2,
            "two rules are named 'a'",
        ),
        ("rules = 3", "rules = 3: must be a list"),
        ("[offer", "is not TOML"),
    ],
)
def test_what_can_t_be_used_is_refused_with_place_and_rule(home, text, expected):
    """A problem names the key, what is written there, and the rule."""
    found = problems(home, text)
    assert any(expected in line for line in found), found


def test_all_problems_are_said_at_once(home):
    """Whoever corrects a policy sees everything in one go."""
    text = 'untaged = "x"\n[offer]\nstrict = 0\n[worker]\nuser = "root"'
    assert len(problems(home, text)) == 3


def test_a_policy_that_is_missing_says_how_to_get_one(home):
    """No node starts without a policy, and the error has the command for it."""
    with pytest.raises(ProfileError, match="raysandbox policy init"):
        policies.load_node(home / "none.toml")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_policy_that_others_may_write_is_refused(home, mode):
    """Group and others must not be able to write it; the control is mode 0644."""
    policies.load_node(write(home, "", mode=0o644))
    with pytest.raises(ProfileError, match="chmod go-w"):
        policies.load_node(write(home, "", mode=mode))


def test_a_policy_in_a_directory_that_others_may_write_is_refused(home):
    """Whoever may write the directory can put another file in its place."""
    path = write(home, "")
    home.chmod(0o777)
    with pytest.raises(ProfileError, match="chmod go-w"):
        policies.load_node(path)


@pytest.mark.root
def test_a_policy_of_somebody_else_is_refused(home):
    """It must be root's, or the user's who starts the node."""
    path = write(home, "")
    os.chown(path, 12345, 12345)
    with pytest.raises(ProfileError, match="belongs to uid 12345"):
        policies.load_node(path)


@pytest.mark.root
def test_a_policy_that_can_t_be_read_is_refused(home):
    """What can't be read is an error, not an empty policy."""
    path = write(home, "", mode=0o600)
    home.chmod(0o755)
    parents = [each for each in home.parents if each.stat().st_mode & 0o055 != 0o055]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for each in parents:
                each.chmod(0o755)
            os.setresuid(12345, 12345, 12345)
            policies.load_node(path)
        except ProfileError as error:
            code = 0 if "can't be read: Permission denied" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_place_is_option_then_variable_then_site(home):
    """--policy, RAYSANDBOX_POLICY, /etc/raysandbox/policy.toml, in this order."""
    environ = {"RAYSANDBOX_POLICY": "/x/y.toml"}
    assert policies.find("/a.toml", environ) == Path("/a.toml")
    assert policies.find("", environ) == Path("/x/y.toml")
    assert policies.find("", {}) == Path("/etc/raysandbox/policy.toml")
    with pytest.raises(ProfileError, match="absolute"):
        policies.find("", {"RAYSANDBOX_POLICY": "y.toml"})


def test_the_shipped_template_is_fine(home):
    """What `policy init` writes loads, and refuses what it says it refuses."""
    template = Path(policies.__file__).with_name("default.toml").read_text()
    node = policies.load_node(write(home, template))
    assert node.resources() == {"sandbox:strict": 64, "sandbox:standard": 64}
    assert decide(node.policy, Request(tag="standard")).profile == "standard"
    assert decide(node.policy, Request(tag="fast")).profile is None
    assert decide(node.policy, Request()).profile == "strict"


def test_the_json_schema_takes_what_the_loader_takes(home):
    """Editors and the loader read the same file the same way."""
    schema = policies.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    template = Path(policies.__file__).with_name("default.toml").read_text()
    node = policies.load_node(write(home, template))
    ports = '[worker]\nconnect = [6379, "20000-20200"]'
    for text in (template, dump(node.policy), "", ports):
        jsonschema.validate(tomllib.loads(text), schema)
    for text in (
        'untaged = "x"',
        "[offer]\nstrict = 0",
        '[totals]\ncpu = "0%"',
        "[worker]\nconnect = [0]",
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tomllib.loads(text), schema)


# --- deciding ---------------------------------------------------------------


def rules(*many: Rule, untagged: str = "strict") -> Policy:
    return Policy(rules=many, untagged=untagged)


TEAM = Rule(
    name="team",
    namespaces=("team-*",),
    metadata={"stage": "prod*"},
    profiles=("standard", "fast"),
    untagged="standard",
)


def test_the_first_rule_that_matches_decides_alone():
    """A later, laxer rule gives nothing to a job that an earlier one is for."""
    first = Rule(name="first", namespaces=("a",), profiles=())
    lax = Rule(name="lax", profiles=("fast",))
    assert decide(rules(first, lax), Request(tag="fast", namespace="a")).rule == "first"
    refused = decide(rules(first, lax), Request(tag="fast", namespace="a"))
    assert refused.profile is None
    assert "add 'fast' to the rule's profiles" in refused.remedy
    assert decide(rules(lax, first), Request(tag="fast", namespace="a")).rule == "lax"


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request(namespace="other", metadata={"stage": "prod"}), "namespace 'other'"),
        (Request(namespace="team-a"), "no metadata 'stage'"),
        (Request(namespace="team-a", metadata={"stage": "dev"}), "stage = 'dev'"),
    ],
)
def test_all_conditions_of_a_rule_must_hold(request_, why):
    """A rule is for a job only if everything that it says is so."""
    good = Request(namespace="team-a", metadata={"stage": "prod1", "more": "x"})
    assert decide(rules(TEAM), good).profile == "standard"
    decision = decide(rules(TEAM), request_)
    assert (decision.profile, decision.rule) == ("strict", "")
    assert why in decision.skipped[0]


def test_a_rule_for_signers_matches_no_unsigned_code():
    """A condition that nobody can have verified is not met."""
    signed = Rule(name="signed", signers=("alice",), profiles=("fast",))
    assert decide(rules(signed), Request(tag="fast")).profile is None
    assert decide(rules(signed), Request(tag="fast", signer="bob")).profile is None
    assert decide(rules(signed), Request(tag="fast", signer="alice")).profile == "fast"


def test_untagged_tasks_get_strict_where_the_rule_does_not_allow_better():
    """The policy's profile for untagged tasks is no way around a rule."""
    narrow = Rule(name="narrow", profiles=())
    wide = Rule(name="wide", profiles=("standard",))
    assert decide(rules(narrow, untagged="standard"), Request()).profile == "strict"
    assert decide(rules(wide, untagged="standard"), Request()).profile == "standard"
    assert decide(rules(untagged="standard"), Request()).profile == "strict"


names = st.text("abc*?-_", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            Rule,
            name=st.text("rule ", min_size=1, max_size=5).map(lambda t: "r" + t),
            namespaces=st.lists(names, max_size=2, unique=True).map(tuple),
            metadata=st.dictionaries(names, names, max_size=2),
            profiles=st.lists(
                st.sampled_from(["standard", "fast", "own"]), max_size=3, unique=True
            ).map(tuple),
            signers=st.lists(names, max_size=1).map(tuple),
            untagged=st.none(),
        ),
        max_size=4,
        unique_by=lambda rule: rule.name,
    ),
    st.builds(
        Request,
        tag=st.none() | st.sampled_from(["strict", "standard", "fast", "own", "other"]),
        namespace=names,
        metadata=st.dictionaries(names, names, max_size=2),
        signer=st.none() | names,
    ),
    st.sampled_from(["strict", "standard", "fast"]),
)
def test_nobody_gets_what_no_rule_names(made, request_, untagged):
    """Whatever the rules: a profile other than strict comes from the rule alone."""
    policy = rules(*made, untagged=untagged)
    decision = decide(policy, request_)
    if decision.profile in (None, "strict"):
        return
    (rule,) = [rule for rule in made if rule.name == decision.rule]
    assert decision.profile in rule.profiles
    assert request_.tag in (None, decision.profile)
    assert request_.signer or not rule.signers


@pytest.mark.parametrize(
    ("resources", "tag"),
    [
        ({}, None),
        ({"CPU": 1}, None),
        ({"sandbox:fast": 0.1, "CPU": 1}, "fast"),
        ({"sandbox:fast_group_0123456789abcdef01": 1}, "fast"),
        (
            {
                "sandbox:a_group_1_0123456789abcdef01": 1,
                "sandbox:a_group_" + "0" * 18: 1,
            },
            "a",
        ),
    ],
)
def test_the_tag_is_read_from_resources(resources, tag):
    """Also as placement groups rename it."""
    assert policies.tag_of(resources) == tag


def test_part_of_a_tag_is_none():
    """The policy's counts hold whatever share a client asks for.

    But where the count is as good as none: there a share is anybody's.
    """
    policy = rules(Rule(name="all", profiles=("fast",)))
    policy = policy.model_copy(update={"offer": {"fast": 2}})
    whole = decide(policy, policies.Request(tag="fast"))
    part = decide(policy, policies.Request(tag="fast", amount=0.5))
    assert (whole.profile, part.profile) == ("fast", None)
    assert "it takes 0.5 of the tag, and the policy offers 2 of 'fast'" in part.why
    loose = policy.model_copy(update={"offer": {"fast": policies.MOST_AT_ONCE}})
    assert decide(loose, policies.Request(tag="fast", amount=0.5)).profile == "fast"


@pytest.mark.parametrize(
    ("resources", "amount"),
    [
        ({"CPU": 4}, 1.0),
        ({"sandbox:fast": 0.1, "CPU": 1}, 0.1),
        ({"sandbox:fast_group_0123456789abcdef01": 1}, 1.0),
        (
            {
                "sandbox:a_group_1_0123456789abcdef01": 0.5,
                "sandbox:a_group_" + "0" * 18: 0.5,
            },
            0.5,
        ),
    ],
)
def test_the_share_of_a_tag_is_read_from_resources(resources, amount):
    """Also as placement groups rename it, twice."""
    assert policies.amount_of(resources) == amount


def test_two_tags_are_refused():
    """A task has one profile."""
    with pytest.raises(ProfileError, match="one sandbox tag"):
        policies.tag_of({"sandbox:strict": 1, "sandbox:fast": 1})


# --- runtime environments ---------------------------------------------------


@pytest.mark.parametrize(
    ("runtime_env", "key"),
    [
        ({"pip": ["./evil"]}, "pip"),
        ({"uv": ["x"]}, "uv"),
        ({"my_plugin": {"a": 1}}, "other"),
        ({"working_dir": "https://example.com/x.zip"}, "remote_uris"),
        ({"py_modules": ["gcs://_ray_pkg_0.zip", "s3://b/x.zip"]}, "remote_uris"),
        ({"py_modules": ["gcs://evil-1.0-py3-none-any.whl"]}, "pip"),
    ],
)
def test_keys_that_reach_around_the_wall_are_refused_by_name(runtime_env, key):
    """Each names the policy's key that would allow it, and that key does."""
    (text,) = policies.runtime_env_refusals(Policy(), runtime_env)
    assert f'runtime_env.{key} = "allow"' in text
    allowing = Policy.model_validate({"runtime_env": {key: "allow", "why": "a test"}})
    assert policies.runtime_env_refusals(allowing, runtime_env) == []


def test_keys_that_no_policy_allows_are_refused_by_name():
    """The error says that there is no such permission, and why."""
    (text,) = policies.runtime_env_refusals(Policy(), {"java_jars": ["x.jar"]})
    assert "no value of runtime_env.java_jars allows it" in text
    assert "Python workers alone" in text


URI = "docker.example/team/tools:1"
NAMED = {
    "image_uri": {URI: "/srv/tools", "other": {"root": "/srv/o", "python": "/py"}},
    "container": "image_uri",
    "nsight": "/opt/nsys-python",
    "rocprof_sys": {"program": "/opt/rocprof", "read": ("/opt/rocm",)},
    "why": "a test",
}


@pytest.mark.parametrize(
    ("runtime_env", "asked", "would_allow"),
    [
        ({"image_uri": URI}, f"image_uri:{URI}", "image_uri = {URI = DIRECTORY}"),
        ({"container": {"image": URI}}, f"image_uri:{URI}", 'container = "image_uri"'),
        ({"nsight": "default"}, "nsight:/opt/nsys-python", "nsight = PATH"),
        ({"_nsight": "default"}, "nsight:/opt/nsys-python", "nsight = PATH"),
        (
            {"_rocprof_sys": "default"},
            "rocprof_sys:/opt/rocprof",
            "rocprof_sys = PATH",
        ),
    ],
)
def test_what_replaces_the_interpreter_is_what_the_operator_made(
    runtime_env, asked, would_allow
):
    """Refused with the key that would allow it; no plugin of Ray's runs for it."""
    (text,) = policies.runtime_env_refusals(Policy(), runtime_env)
    assert f"runtime_env.{would_allow} would allow" in text
    policy = Policy.model_validate({"runtime_env": NAMED})
    assert policies.runtime_env_refusals(policy, runtime_env) == []
    more = {**runtime_env, "env_vars": {"A": "b"}}
    assert policies.as_made(policy, more) == {
        "py_executable": asked, "env_vars": {"A": "b"}
    }  # fmt: skip
    assert asked in policy.runtime_env.interpreters()
    # Not what Ray's agent may be asked for by that name.
    assert policies.runtime_env_refusals(policy, {"py_executable": asked})


@pytest.mark.parametrize(
    ("runtime_env", "says"),
    [
        ({"image_uri": "docker.example/team/tools"}, "image_uri allows"),
        ({"image_uri": [URI]}, "image_uri allows"),
        ({"image_uri": "/srv/tools"}, "image_uri allows"),
        ({"container": {"image": "x"}}, "image_uri allows"),
        ({"container": URI}, "container allows {image = URI} alone"),
        ({"container": {"image": URI, "run_options": []}}, "{image = URI} alone"),
        ({"nsight": {"o": "/etc/x"}}, 'nsight allows "default" alone'),
        ({"_nsight": "default -o /etc/x"}, 'nsight allows "default" alone'),
        ({"image_uri": URI, "nsight": "default"}, "'image_uri', 'nsight': one"),
        ({"image_uri": URI, "pip": ["x"]}, "'image_uri', 'pip': one interpreter"),
    ],
)
def test_another_than_what_the_operator_made_is_refused(runtime_env, says):
    """By exactly its name, without options, and one at a time."""
    policy = Policy.model_validate({"runtime_env": {**NAMED, "pip": "allow"}})
    assert says in "; ".join(policies.runtime_env_refusals(policy, runtime_env))
    assert "py_executable" not in policies.as_made(policy, runtime_env) or says == (
        "'image_uri', 'pip': one interpreter"
    )


@pytest.mark.parametrize(
    "table",
    [
        {"image_uri": {"a b": "/srv/x"}},
        {"image_uri": {URI: "srv/x"}},
        {"image_uri": {URI: {"python": "/py"}}},
        {"image_uri": {URI: {"root": "/srv/x", "shell": "/bin/sh"}}},
        {"image_uri": "allow"},
        {"container": "allow"},
        {"container": "image_uri"},
        {"image_uri": {URI: "/"}},
        {"nsight": "allow"},
        {"nsight": {"read": ("/opt",)}},
    ],
)
def test_what_names_no_file_of_the_operator_s_is_an_error(table):
    """A value that would promise something else is none."""
    with pytest.raises(pydantic.ValidationError):
        Policy.model_validate({"runtime_env": {**table, "why": "a test"}})
    with pytest.raises(pydantic.ValidationError, match="why"):
        Policy.model_validate({"runtime_env": {"image_uri": {URI: "/srv/x"}}})


def test_a_sealed_policy_has_what_the_operator_made():
    """As worker and agent read it."""
    policy = Policy.model_validate({"runtime_env": NAMED})
    sealed = policies.unseal(policies.resolve(policy).seal())
    assert sealed.policy.runtime_env == policy.runtime_env


@pytest.mark.parametrize(
    "value", ["sh -c evil", "/opt/ml/bin/python -u", "/opt/ml/bin/../bin/python", "", 7]
)
def test_an_interpreter_is_one_of_the_policy_s_or_refused(value):
    """By exactly its path: with arguments, or another way there, it is another."""
    ours = {"py_executable": ("/opt/ml/bin/python",), "why": "a test"}
    policy = Policy.model_validate({"runtime_env": ours})
    allowed = {"py_executable": "/opt/ml/bin/python"}
    assert policies.runtime_env_refusals(policy, allowed) == []
    (text,) = policies.runtime_env_refusals(Policy(), allowed)
    assert "runtime_env.py_executable = [PATH] would allow one" in text
    found = policies.runtime_env_refusals(policy, {"py_executable": value})
    assert bool(found) == (value != "")  # Ray takes that for none
    assert all("allows /opt/ml/bin/python alone" in text for text in found)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("other", "allows science alone"),
        ("/opt/science", "allows science alone"),
        ({"dependencies": ["x"]}, "a specification"),
        (["science"], "a specification"),
        (7, "a specification"),
    ],
)
def test_a_conda_environment_is_one_of_the_policy_s_or_refused(value, says):
    """By its name; the agent is asked for its interpreter instead."""
    ours = {"conda": {"science": "/opt/science"}, "why": "a test"}
    policy = Policy.model_validate({"runtime_env": ours})
    named = {"conda": "science", "env_vars": {"A": "b"}}
    assert policies.runtime_env_refusals(policy, named) == []
    assert policies.as_made(policy, named) == {
        "py_executable": "/opt/science/bin/python", "env_vars": {"A": "b"}
    }  # fmt: skip
    (found,) = policy.runtime_env.interpreters().values()
    assert (found.path, found.key) == ("/opt/science/bin/python", "conda.science")
    (text,) = policies.runtime_env_refusals(policy, {"conda": value})
    assert says in text
    assert policies.as_made(policy, {"conda": value}) == {"conda": value}
    (text,) = policies.runtime_env_refusals(Policy(), {"conda": "science"})
    assert "runtime_env.conda = {NAME = PREFIX} would allow one" in text
    both = {"conda": "science", "py_executable": "/opt/science/bin/python"}
    assert len(policies.runtime_env_refusals(policy, both)) == 2


@pytest.mark.parametrize("path", ["python3", "/opt/../bin/python", "/opt/a b/python"])
def test_an_interpreter_of_the_policy_is_an_absolute_path(home, path):
    """Ray gives the words to a shell: a space would be an argument."""
    text = f'[runtime_env]\npy_executable = ["{path}"]\nwhy = "a test"'
    with pytest.raises(ProfileError, match="must be an absolute path"):
        policies.load(write(home, text))
    text = f'[runtime_env]\nconda = {{x = "{path}"}}\nwhy = "a test"'
    with pytest.raises(ProfileError, match="must be an absolute path"):
        policies.load(write(home, text))
    for key in ("py_executable", "conda"):
        assert policies.load(write(home, f'[runtime_env]\n{key} = "refuse"'))


@pytest.mark.parametrize(
    "uri",
    [
        "file:///root/secret.zip", "FILE:///root/secret.zip", "local:///root", "/root",
        "\nfile:///root/secret.zip", "gcs://...zip", "gcs://..", "gcs://_ray_pkg_0.tar.gz",
        "gcs://_ray_pkg_0/../x.zip", "gcs://_ray_pkg_0.zip\n", "GCS://_ray_pkg_0.zip",
        "gcs://_ray_pkg_0.whl", "gcs://...whl", "https://h/...whl", "https://h/a b.zip",
        "s3+file:///x.zip", "", 7, None, ["gcs://_ray_pkg_0.zip"],
    ],
)  # fmt: skip
def test_no_policy_allows_a_package_of_that_name(uri):
    """The node's own files, and names that Ray's agent takes for another place."""
    laxest = {"remote_uris": "allow", "pip": "allow", "why": "a test"}
    policy = Policy.model_validate({"runtime_env": laxest})
    wanted = {"py_modules": ["gcs://_ray_pkg_0123abcd.zip", uri]}
    (text,) = policies.runtime_env_refusals(policy, wanted)
    assert "runtime_env key 'py_modules': " in text


def test_packages_that_a_driver_uploads_need_no_permission():
    """Both keys, as Ray's driver writes them."""
    uri = "gcs://_ray_pkg_947859090d6eecb0.zip"
    wanted = {"working_dir": uri, "py_modules": [uri, uri]}
    assert policies.runtime_env_refusals(Policy(), wanted) == []


@pytest.mark.parametrize("key", sorted(NEVER))
def test_a_permission_that_would_have_no_effect_is_an_error(home, key):
    """Guards against a policy that reads as if it allowed what nobody gets."""
    text = f'[runtime_env]\n{key} = "allow"\nwhy = "a test"'
    with pytest.raises(ProfileError) as caught:
        policies.load(write(home, text))
    message = str(caught.value)
    assert f'runtime_env.{key} = "allow": must be "refuse": ' in message
    assert NEVER[key] in message
    assert policies.load(write(home, text.replace("allow", "refuse")))
    schema = policies.json_schema()["$defs"]["RuntimeEnv"]["properties"][key]
    assert schema["const"] == "refuse"


def test_harmless_keys_are_not_refused():
    """What a jail gets, or what changes nothing, is no way around."""
    runtime_env = {
        "working_dir": "gcs://_ray_pkg_0.zip",
        "py_modules": ["gcs://_ray_pkg_1.zip"],
        "env_vars": {"LD_PRELOAD": "/x.so", "RAY_x": "1"},
        "config": {"setup_timeout_seconds": 1},
        "worker_process_setup_hook": "mine.hook",
        "pip": None,
        "_ray_commit": "x",
    }
    assert policies.runtime_env_refusals(Policy(), runtime_env) == []
    strict = {"setup_hook": "refuse", "loader_variables": "refuse"}
    refusing = Policy.model_validate(
        {"runtime_env": {**strict, "ray_variables": "refuse"}}
    )
    found = policies.runtime_env_refusals(refusing, runtime_env, own_hook="our.hook")
    assert len(found) == 3


def test_variables_for_jails():
    """RAY_* reaches nobody; LD_* and PYTHON* only as the policy says."""
    given_ = {"A": "1", "LD_PRELOAD": "x", "PYTHONPATH": "y", "RAY_TOKEN": "z"}
    given_ |= {"RAYSANDBOX_POLICY": "/x", "GLIBC_TUNABLES": "q"}
    assert policies.jail_variables(None, given_).keys() == {
        "A", "LD_PRELOAD", "PYTHONPATH", "GLIBC_TUNABLES",
    }  # fmt: skip
    dropping = Policy.model_validate({"runtime_env": {"loader_variables": "drop"}})
    assert policies.jail_variables(dropping, given_) == {"A": "1"}


# --- ceilings ---------------------------------------------------------------


def test_no_profile_exceeds_a_ceiling(home):
    """A profile that asks for more is lowered, and what was lowered is told."""
    write(home, 'extends = "standard"\n[limits]\ncpu = "unlimited"', "big.toml")
    node = policies.load_node(
        write(
            home,
            """
            [offer]
            strict = 1
            big = 1
            [ceilings]
            cpu = 2
            memory = "512MiB"
            pids = 32
            wall_time = "1min"
            cpu_time = "30s"
            scratch = "1GiB"
            output = "1MiB"
            max_argument = "2MiB"
            max_result = "3MiB"
            max_put = "4MiB"
            """,
        )
    )
    big = node.profiles["big"]
    assert (big.limits.cpu_cores, big.limits.memory_bytes) == (2.0, 512 << 20)
    assert (big.limits.pids, big.limits.wall_time_s) == (32, 60.0)
    assert (big.limits.cpu_time_s, big.limits.output_bytes) == (30.0, 1 << 20)
    # Scratch counts in memory, so it goes with it.
    assert big.filesystem.scratch_bytes == 512 << 20
    store = big.object_store
    assert store.max_argument_bytes == 2 << 20
    assert store.max_result_bytes == 3 << 20
    assert store.max_put_bytes == 4 << 20
    assert 'limits.cpu = "unlimited" exceeds 2' in map(str, node.lowered["big"])
    assert profiles.excess(big, profiles.load("big")) == []
    # What is below a ceiling stays as it is.
    assert node.profiles["strict"].limits.cpu_cores == 1.0
    assert big.digest != profiles.load("big").digest


def test_a_boundary_above_the_ceiling_is_refused(home):
    """A weaker boundary can't be lowered: the node does not start with it."""
    text = '[offer]\nfast = 1\n[ceilings]\nboundary = "task"'
    assert 'has boundary = "job"' in problems(home, text)[0]
    assert not problems(home, text.replace('"task"', '"job"'))


# --- the sealed form --------------------------------------------------------


def test_what_was_sealed_is_what_workers_read(home):
    """Policy, profiles, ceilings and variables arrive as they were loaded."""
    oci = write(home, json.dumps(_OCI), "oci.json")
    write(
        home,
        f'extends = "standard"\n[syscalls]\noci = "{oci}"\nwhy = "a test"',
        "mine.toml",
    )
    text = '[offer]\nmine = 3\n[ceilings]\nmemory = "256MiB"\n[[rules]]\nname = "a"\n'
    node = policies.load_node(write(home, text + 'profiles = ["mine", "fast"]'))
    data = node.seal({"RAYSANDBOX_CGROUP": "/x"})
    for each in home.iterdir():
        each.unlink()  # a worker reads nothing but the sealed form
    found = policies.unseal(data)
    assert found.policy == node.policy
    assert found.policy.source == node.policy.source
    assert found.profiles == node.profiles
    assert found.profiles["mine"].limits.memory_bytes == 256 << 20
    assert policies.sealed_variables(data) == {"RAYSANDBOX_CGROUP": "/x"}


_OCI = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}],
}


def test_a_sealed_policy_that_is_cut_or_foreign_is_refused(home):
    """What is not whole decides nothing."""
    data = policies.load_node(write(home, "")).seal()
    whole = json.loads(data)
    for broken in (
        b"",
        data[:-1],
        b"[]",
        json.dumps(whole | {"version": 2}).encode(),
        json.dumps(whole | {"profiles": {}}).encode(),
        json.dumps(whole | {"policy": "offer = 1"}).encode(),
    ):
        with pytest.raises(ProfileError):
            policies.unseal(broken)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_policy_or_an_error(data):
    """Whatever a file holds, the loader answers with a policy or a ProfileError."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as home:
        path = Path(home, "policy.toml")
        path.write_bytes(data)
        path.chmod(0o644)
        node, found = policies.check(path)
        assert node is not None or found


simple = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(
        ["", "80%", "1GiB", "unlimited", "strict", "refuse", "allow", "\0", "1-9"]
    ),
)
tables = st.dictionaries(
    st.sampled_from([*Policy.model_fields, "cpu", "memory", "pids", "why", "user"]),
    st.recursive(
        simple,
        lambda inner: (
            st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(
                st.sampled_from(
                    ["cpu", "memory", "pids", "name", "profiles", "why", "x", "connect"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(tables)
def test_any_tables_are_a_policy_that_dumps_to_itself_or_an_error(found):
    """What the model takes can be written and read again; else it is ours to say."""
    from raysandbox.policy.load import _policy, as_tuples

    try:
        policy = _policy(found, "x.toml")
    except ProfileError:
        return
    assert _policy(as_tuples(tomllib.loads(dump(policy))), "x.toml") == policy


def test_a_share_is_of_what_there_is():
    """Percent of a machine's amount."""
    assert Percent(80).of(10) == 8
    assert str(Percent(5)) == "5%"


def test_policy_init_writes_a_file_that_only_its_owner_may_write(home):
    """Whatever the umask: what init writes, a node takes."""
    from typer.testing import CliRunner

    from raysandbox.cli.policy import app

    path, old = home / "new" / "policy.toml", os.umask(0)
    try:
        done = CliRunner().invoke(app, ["init", "--output", str(path)])
    finally:
        os.umask(old)
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    policies.load_node(path)
    again = CliRunner().invoke(app, ["init", "--output", str(path)])
    assert isinstance(again.exception, ProfileError)


def test_policy_explain_says_rule_profile_and_reason(home):
    """explain answers without a cluster for what is given on the command line."""
    from typer.testing import CliRunner

    from raysandbox.cli.policy import app

    path = write(
        home,
        """
        [[rules]]
        name = "team a"
        namespaces = ["a"]
        metadata = { stage = "prod" }
        profiles = ["standard"]
        [ceilings]
        memory = "1GiB"
        [worker]
        connect = [6379, "20000-20200"]
        """,
    )

    def explain(*arguments: str) -> tuple[int, dict[str, object]]:
        done = CliRunner().invoke(
            app, ["explain", "--policy", str(path), "--json", *arguments]
        )
        return done.exit_code, json.loads(done.output)

    code, found = explain(
        "--namespace", "a", "--metadata", "stage=prod", "--tag", "standard"
    )
    assert (code, found["profile"], found["rule"]) == (0, "standard", "team a")
    assert found["gets"]["lowered"]  # type: ignore[index]
    connects = found["gets"]["worker_connects"]  # type: ignore[index]
    assert connects == ["this node's own ports", "6379", "20000-20200"]
    code, found = explain("--namespace", "b", "--tag", "standard")
    assert (code, found["profile"], found["rule"]) == (1, None, None)
    assert "team a: namespace 'b' is none of a" in found["skipped"]  # type: ignore[operator]
