"""`launch_tpu/tpu` against a stand-in for gcloud (tests/stand_in_gcloud.py), whose machines are folders here."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPU = ROOT / "launch_tpu/tpu"
WHEEL = "cgrpo_jax-0.1.0-py3-none-any.whl"
KEYS = {"HF_TOKEN": "hf_'secret $one", "WANDB_API_KEY": "second"}

# What a machine has: the installer of uv behind curl, uv, and the Python that uv makes.
CURL = """[ "$*" = "-LsSf https://astral.sh/uv/install.sh" ] || exit 6
echo 'mkdir -p ~/.local/bin && cp "$CLOUD/uv" ~/.local/bin/uv'"""
UV = """echo "$*" >>"$HOME/uv.log"
case $1 in
venv) [ "$*" = "venv --python=3.12 venv" ] && mkdir -p venv/bin && cp "$CLOUD/python" venv/bin/python ;;
pip)
    [ "$2 $3 $4" = "install --python=venv/bin/python --reinstall-package=cgrpo_jax" ] || exit 2
    case $5 in
    "cgrpo_jax[tpu,api,gym] @ file://"*.whl) [ -f "${5#*file://}" ] ;;
    "cgrpo_jax[tpu,api,gym] @ git+https://example.org/"*) ;;
    *) exit 2 ;;
    esac ;;
*) exit 2 ;;
esac"""
PYTHON = """case $1 in
-c) cat "$CLOUD/devices" ;;
-m)
    printf '%s\\n' "$@" >arguments
    for argument in "$@"; do
        case $argument in
        --workdir=*) workdir=${argument#*=} ;;
        --config.train.steps=*) steps=${argument#*=} ;;
        esac
    done
    mkdir -p "$workdir/checkpoints/7.orbax-checkpoint-tmp"
    echo "$HF_TOKEN+$WANDB_API_KEY+$OPENAI_API_KEY" >seen
    step=$(ls "$workdir/checkpoints" | grep -v tmp | sort -n | tail -n 1)
    touch "$workdir/metrics.jsonl"
    head -n "${step:-0}" "$workdir/metrics.jsonl" >kept && mv kept "$workdir/metrics.jsonl"
    for step in $(seq $((${step:-0} + 1)) "$steps"); do
        echo "step $step" >>"$workdir/metrics.jsonl"
        echo "step $step"
        mkdir "$workdir/checkpoints/$step"
        sleep 0.01
    done ;;
esac"""


def put(path, text, interpreter="/usr/bin/env bash"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)


class Cloud:
    """A cloud in a folder, and a user in front of it."""

    def __init__(self, folder):
        self.folder, self.user = folder / "cloud", folder / "user"
        self.user.mkdir()
        put(folder / "bin/gcloud", (ROOT / "tests/stand_in_gcloud.py").read_text(), f"{sys.executable} -SE")
        for name, text in {"uv": UV, "python": PYTHON, "vm_bin/curl": CURL}.items():
            put(self.folder / name, text)
        (self.folder / "devices").write_text("tpu\n" + "TPU v5 lite\n" * 8)
        (self.folder / "calls.jsonl").touch()
        self.world()
        self.environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder / "home"), "CLOUD": str(self.folder),
            "TPU_POLL": "0.02", "TPU_ZONE": "us-west4-a",
        }  # fmt: skip

    def world(self, **changes):
        """What the cloud holds and how it will fail, with changes."""
        path = self.folder / "world.json"
        found = json.loads(path.read_text()) if path.exists() else {"requests": {}, "machines": []}
        path.write_text(json.dumps(found | changes))
        return found | changes

    def take_away(self, name="first"):
        """Preemption: the machine goes with its disk, the request stays."""
        self.end_runs()
        shutil.rmtree(self.folder / "vm" / name)
        requests = self.world()["requests"]
        requests[name]["states"] = ["SUSPENDED"]
        self.world(requests=requests)

    def end_runs(self):
        for path in self.folder.glob("vm/*/cgrpo/run.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)

    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def verbs(self):
        return [call[3] for call in self.calls()]

    def home(self, name="first"):
        return self.folder / "vm" / name / "cgrpo"

    def ask(self, *arguments, tool=TPU, **environment):
        command = [str(tool), *map(str, arguments)]
        given = self.environment | environment
        return subprocess.run(command, capture_output=True, text=True, cwd=self.user, env=given, timeout=60)

    def must(self, *arguments, **environment):
        done = self.ask(*arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def set_up(self):
        """An active machine with the package."""
        (self.user / WHEEL).touch()
        self.must("create", "first", "--type=v5litepod-8", "--spot")
        self.must("setup", "first", f"--from={WHEEL}")

    def run(self, steps, *arguments, **environment):
        return self.must("run", "first", "--workdir=runs/a", f"--config.train.steps={steps}", *arguments, **environment)


@pytest.mark.slow
def test_the_flags_of_the_stand_in_are_gclouds(tmp_path):
    """By the help texts of the real one, which asks nothing of the network for them."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    stand_in = importlib.util.spec_from_file_location("stand_in_gcloud", ROOT / "tests/stand_in_gcloud.py")
    module = importlib.util.module_from_spec(stand_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUD", str(tmp_path))
        patch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
        stand_in.loader.exec_module(module)
        for (group, verb), known in module.FLAGS.items():
            command = ["gcloud", "compute", "tpus", group, verb, "--help"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
            shown = re.sub(r"\x1b\[\d*m", "", shown)  # bold, underlined
            for flag in known:
                assert re.search(flag if flag.endswith("=") else rf"{flag}(?![-\w=])", shown), (verb, flag)
            assert verb != "create" or "--provisioning-model" not in shown


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.end_runs()


def test_shellcheck_is_content():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", TPU, ROOT / "launch_tpu/on_vm.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_command_of_the_page(cloud):
    """In their order; between `fetch --checkpoints` and `resume` the machine is taken away."""
    (cloud.user / "launch_tpu").symlink_to(ROOT / "launch_tpu")
    (cloud.user / "train.jsonl").write_text("{}\n")
    put(cloud.user.parent / "bin/pip", f'[ "$*" = "wheel --no-deps -w dist ." ] && mkdir -p dist && touch dist/{WHEEL}')
    page = (ROOT / "launch_tpu/README.md").read_text()
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).splitlines()
    zone = lines.pop(0).removeprefix("export ").split("=")
    said = ""
    for line in filter(None, lines):
        words = shlex.split(line, comments=True)
        if words[1] == "resume":
            cloud.take_away()
        done = cloud.ask(
            *words[1:], tool=shutil.which(words[0], path=cloud.environment["PATH"]) or words[0], **dict([zone])
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if words[1] == "fetch":
            assert (cloud.user / "runs/first/metrics.jsonl").read_text().count("\n") == 30
            assert (cloud.user / "runs/first/checkpoints").exists() == ("--checkpoints" in words)
        if words[1] == "resume":
            assert (cloud.home() / "train.jsonl").exists() and (cloud.home() / "runs/first/checkpoints/30").exists()
        said += done.stdout + done.stderr
    assert "jax sees 8 devices" in said and "step 30\nthe run ended with status 0" in said
    assert cloud.world()["requests"] == {} and not (cloud.folder / "vm/first").exists()
    assert "Not yet run on Cloud TPU" in page
    asked = {re.match(r"launch_tpu/tpu (\w+)", line)[1] for line in lines if line.startswith("launch_tpu")}
    known = set(re.findall(r"^  (\w+)(?: NAME|  )", cloud.must("--help"), re.MULTILINE))
    assert asked == known - {"stop"} and len(known) == 11


def test_a_dry_run_prints_what_a_run_does(cloud):
    """The commands it prints, given to a shell, are the calls of the same command without --dry-run."""
    cloud.set_up()
    (cloud.user / "my file").touch()
    start = ["--config=quickstart", "--workdir=runs/a", "--config.data.source=it's $HOME", "--config.train.steps=3"]
    cloud.must("run", "first", *start)
    cloud.must("logs", "first")
    cloud.must("fetch", "first", "--checkpoints")
    other = ["other", "--type=v5litepod-4", "--project=p", "--", "--network=n"]
    for command in (
        ["create", *other], ["setup", "first", "--from=https://example.org/a@b"], ["send", "first", "my file"],
        ["run", "first", *start], ["logs", "first"], ["status", "first"], ["fetch", "first", "--checkpoints"], ["list"],
        ["delete", "first"],
    ):  # fmt: skip
        before = cloud.calls()
        dry = cloud.ask("--dry-run", *command, **KEYS)
        assert dry.returncode == 0 and cloud.calls() == before, dry.stderr
        cloud.must(*command, **KEYS)
        printed = [shlex.split(line) for line in dry.stdout.splitlines()]
        assert printed == [["gcloud", *call] for call in cloud.calls()[len(before) :]], command
        assert not [key for key in KEYS.values() if key in dry.stdout + dry.stderr]


def test_a_dry_run_of_resume_shows_the_whole_way(cloud):
    cloud.set_up()
    cloud.run(3)
    cloud.must("logs", "first")
    cloud.must("fetch", "first", "--checkpoints")
    printed = cloud.must("resume", "first", "--dry-run")
    cloud.take_away()
    before = len(cloud.calls())
    cloud.must("resume", "first")
    done = [["gcloud", *call] for call in cloud.calls()[before:]]
    assert [call[4] for call in done[:3]] == ["describe", "describe", "delete"]  # what a dry run cannot know
    assert [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud")][1:] == done[3:]


def test_keys_stand_on_no_command_line(cloud):
    cloud.set_up()
    cloud.run(2, **KEYS)
    cloud.must("logs", "first")
    assert (cloud.home() / "seen").read_text() == f"{KEYS['HF_TOKEN']}+second+\n"
    assert (cloud.home() / "secrets").stat().st_mode & 0o777 == 0o600 and cloud.home().stat().st_mode & 0o777 == 0o700
    everything = "".join(json.dumps(cloud.calls()))
    assert "secret" in everything and not [key for key in KEYS.values() if key in everything]
    kept = [path.read_bytes() for path in cloud.user.parent.glob("home/.cgrpo_tpu/**/*") if path.is_file()]
    assert len(kept) == 3 and not [key for key in KEYS.values() if any(key.encode() in text for text in kept)]
    cloud.run(4)  # without keys: those that are there stay
    cloud.must("logs", "first")
    assert (cloud.home() / "seen").read_text() == f"{KEYS['HF_TOKEN']}+second+\n"


def test_arguments_arrive_as_they_were(cloud):
    cloud.set_up()
    given = [
        "--config=my.py",
        "--config.a=two words",
        "--config.b='\"$HOME`x`\\",
        "--zone=of the run",
        "--debug",
        "--config.c=",
    ]
    cloud.run(1, *given)
    cloud.must("logs", "first")
    assert (cloud.home() / "arguments").read_text().splitlines()[4:] == given


FAULTS = [  # world, arguments of create, what is said
    (
        {"fail": "quota"},
        [],
        "first: no quota (Quota 'TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI' exhausted. Limit 4",
    ),
    ({"states": ["WAITING_FOR_RESOURCES", "FAILED"]}, [], "first: no quota (Quota 'TPUV5sPreempt"),
    ({"fail": "permission"}, [], "first: not allowed: enable the Cloud TPU API"),
    ({"machines": ["first"]}, [], "first: a TPU VM of this name is there, but no request of ours"),
    ({}, ["--zone=us-central2-b"], "first: us-central2-b has no v5litepod-8: take a zone of"),
    ({}, ["--", "--provisioning-model=SPOT"], "this gcloud does not know a flag; gcloud components update"),
    ({"states": ["PROVISIONING", "SUSPENDING", "SUSPENDED"]}, [], "first was taken away while it was made"),
    ({"unseen": 9}, [], "first: the request is gone"),
]


@pytest.mark.parametrize(("world", "arguments", "words"), FAULTS)
def test_what_create_cannot_have(cloud, world, arguments, words):
    """One line: what, where, the mend."""
    cloud.world(**world)
    done = cloud.ask("create", "first", "--type=v5litepod-8", "--spot", *arguments)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"tpu: {words}") and len(last) < 450, done.stderr
    assert "ERROR" not in "".join(done.stderr.splitlines()[:-1])


def test_create_waits_for_its_turn(cloud):
    cloud.world(
        states=["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], unseen=2
    )
    said = cloud.must("create", "first", "--type=v6e-8", "--zone=us-east5-a")
    states = ["NONE", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert said.splitlines() == [f"tpu: first: {state}" for state in states]
    made = [call for call in cloud.calls() if call[3] == "create"]
    assert len(made) == 1 and "--spot" not in made[0] and "--runtime-version=v2-alpha-tpuv6e" in made[0]
    assert "ACTIVE" in cloud.must("create", "first", "--type=v6e-8", "--zone=us-east5-a")
    assert cloud.verbs().count("create") == 1  # it is there
    other = cloud.ask("create", "first", "--type=v6e-4", "--zone=us-east5-a")
    assert other.returncode == 1 and "first is a v6e-8 already: delete it first" in other.stderr


@pytest.mark.parametrize("states", [["SUSPENDED"], ["FAILED"], ["SUSPENDING", "SUSPENDED"]])
def test_a_suspended_request_is_made_anew(cloud, states):
    """It keeps its quota and never comes back."""
    cloud.world(requests={"first": {"type": "v5litepod-8", "spot": True, "states": states, "message": ""}})
    cloud.must("create", "first", "--type=v5litepod-8", "--spot")
    assert [verb for verb in cloud.verbs() if verb != "describe"] == ["delete", "create"]
    assert cloud.world()["requests"]["first"]["states"] == ["ACTIVE"]


def test_ssh_is_refused_while_a_machine_boots(cloud):
    cloud.must("create", "first", "--type=v5litepod-8")
    cloud.world(refuse=2)
    assert "no connection yet" in cloud.must("setup", "first", "--from=https://example.org/a")
    cloud.world(refuse=99)
    done = cloud.ask("status", "first")
    assert done.returncode == 1 and "is tcp:22 open in the network's firewall?" in done.stderr.splitlines()[-1]
    assert cloud.world()["refuse"] == 96


def test_a_machine_that_was_taken_away_is_named(cloud):
    cloud.set_up()
    cloud.run(1000)
    cloud.take_away()
    for command in (["logs", "first"], ["fetch", "first"], ["setup", "first", f"--from={WHEEL}"]):
        done = cloud.ask(*command)
        wanted = "tpu: first is SUSPENDED, no longer ACTIVE: `tpu resume first` makes it anew and goes on"
        assert (done.returncode, done.stderr.strip()) == (1, wanted), command
    assert "first: SUSPENDED" in cloud.must("status", "first")


def test_a_run_stops_and_resumes_on_its_machine(cloud):
    cloud.set_up()
    cloud.run(1000)
    until = time.monotonic() + 20
    while not (cloud.home() / "runs/a/checkpoints/3").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert "a run is under way" in cloud.must("status", "first")
    assert "under way already" in cloud.run(1000)
    done = cloud.ask("run", "first", "--workdir=runs/b", "--config.train.steps=1")
    assert done.returncode == 1 and "another run is under way" in done.stdout and done.stdout.count("\n") == 1
    cloud.must("stop", "first")
    assert "the run ended with status 143" in cloud.must("status", "first")
    stood = (cloud.home() / "runs/a/metrics.jsonl").read_text().count("\n")
    made = cloud.verbs().count("create")
    cloud.must("resume", "first")
    time.sleep(0.3)
    cloud.must("stop", "first")
    steps = (cloud.home() / "runs/a/metrics.jsonl").read_text().splitlines()
    assert len(steps) > stood and steps == [f"step {step + 1}" for step in range(len(steps))]
    assert cloud.verbs().count("create") == made


def test_a_run_goes_on_elsewhere_from_what_was_fetched(cloud):
    cloud.set_up()
    (cloud.user / "data").mkdir()
    (cloud.user / "data/train.jsonl").write_text("{}\n")
    cloud.must("send", "first", "data")
    cloud.run(5, **KEYS)
    cloud.must("logs", "first")
    cloud.must("fetch", "first", "--checkpoints")
    names = sorted(path.name for path in (cloud.user / "runs/a/checkpoints").iterdir())
    assert names == ["1", "2", "3", "4", "5"]  # not the one that is being written
    assert not (cloud.home() / "staged").exists()
    cloud.take_away()
    cloud.must("resume", "first", **KEYS)
    cloud.must("logs", "first")
    assert (cloud.home() / "data/train.jsonl").exists() and "hf_" in (cloud.home() / "seen").read_text()
    cloud.run(8)
    cloud.must("logs", "first")
    assert (cloud.home() / "runs/a/metrics.jsonl").read_text().split() == [
        w for i in range(8) for w in ("step", str(i + 1))
    ]
    request = cloud.world()["requests"]["first"]
    assert request["spot"] and request["type"] == "v5litepod-8"


def test_a_fetch_that_breaks_leaves_what_was_there(cloud):
    cloud.set_up()
    cloud.run(2)
    cloud.must("logs", "first")
    cloud.must("fetch", "first", "--checkpoints")
    put(cloud.user.parent / "bin/cp", '/usr/bin/cp -r "$2/metrics.jsonl" "$3"; echo \'lost connection\' >&2; exit 1')
    cloud.run(4)
    cloud.must("logs", "first")
    done = cloud.ask("fetch", "first", "--checkpoints")
    assert done.returncode == 1 and "first: no connection" in done.stderr.splitlines()[-1], done.stderr
    assert (cloud.user / "runs/a/metrics.jsonl").read_text().count("\n") == 2
    (cloud.user.parent / "bin/cp").unlink()
    cloud.must("fetch", "first")  # without checkpoints: those that are here stay
    assert (cloud.user / "runs/a/metrics.jsonl").read_text().count("\n") == 4
    assert (cloud.user / "runs/a/checkpoints/2").exists() and not (cloud.user / "runs/a.partial").exists()


def test_setup_says_what_is_missing_on_the_machine(cloud):
    cloud.must("create", "first", "--type=v5litepod-8")
    (cloud.folder / "devices").write_text("cpu\nTFRT_CPU_0\n")
    done = cloud.ask("setup", "first", "--from=https://example.org/a")
    assert done.returncode == 1 and done.stdout == "on the VM: jax sees no TPU, but: TFRT_CPU_0 \n", done
    (cloud.folder / "vm_bin/curl").write_text("#!/bin/sh\nexit 6\n")
    shutil.rmtree(cloud.folder / "vm/first")
    done = cloud.ask("setup", "first", "--from=https://example.org/a")
    assert done.returncode == 1 and "on the VM: uv cannot be installed" in done.stdout


def test_one_variable_names_the_hosts(cloud):
    """For slices of several hosts, which come later."""
    cloud.set_up()
    folder = cloud.user / "launch_tpu"
    shutil.copytree(ROOT / "launch_tpu", folder)
    text = (folder / "tpu").read_text()
    (folder / "tpu").write_text(re.sub(r"^workers=0", "workers=all", text, flags=re.MULTILINE))
    assert text != (folder / "tpu").read_text()
    before = len(cloud.calls())
    for command in (["setup", "first", f"--from={WHEEL}"], ["run", "first", "--workdir=a", "--config.train.steps=1"]):
        assert cloud.ask(*command, tool=folder / "tpu").returncode == 0
    workers = [word for call in cloud.calls()[before:] for word in call if word.startswith("--worker")]
    assert workers == ["--worker=all"] * 4


TYPED = [
    ("", "launch_tpu/tpu COMMAND NAME"),
    ("make first", "unknown command make"),
    ("create", "create: NAME is missing"),
    ("create first", "create: --type=TYPE is missing"),
    ("create first --type=v4-32", "--type=v4-32 is no TPU of one host: v4-8"),
    ("create First --type=v4-8", "NAME=First: a letter, then"),
    ("create first --type=v4-8 --sopt", "unknown option --sopt"),
    ("create first second --type=v4-8", "second is one word too many"),
    ("setup first", "--from=SOURCE is missing"),
    ("setup first --from=a.whl", "there is no a.whl"),
    ("setup first --from=ftp://a", "--from=ftp://a is neither"),
    ("setup first --from=git+https://example.org/a --spot", "setup reads no --type, --runtime, --spot"),
    ("logs first --checkpoints", "logs reads no --checkpoints"),
    ("send first", "send: name a file"),
    ("send first nothing", "send: there is no nothing"),
    ("run first --config=quickstart", "--workdir=FOLDER is missing"),
    ("run first --workdir=/a", "--workdir=/a: letters"),
    ("run first --workdir=../a", "--workdir=../a: letters"),
    ("fetch first", "fetch: no run of first is known here"),
    ("resume first", "resume: no run of first is known here"),
]


@pytest.mark.parametrize(("typed", "words"), TYPED)
def test_what_was_typed_wrongly(cloud, typed, words):
    """One line, status 2, and nothing was asked of the cloud."""
    done = cloud.ask(*typed.split())
    assert done.returncode == 2 and words in done.stderr.splitlines()[0], done.stderr
    assert (done.stderr.count("\n") == 1 or not typed) and cloud.calls() == []


def test_zone_and_gcloud_are_needed(cloud):
    cloud.environment.pop("TPU_ZONE")
    few = cloud.user.parent / "few"
    few.mkdir()
    for program in ("bash", "mktemp", "dirname", "rm"):  # a real gcloud may lie beside them
        (few / program).symlink_to(shutil.which(program))
    done = cloud.ask("create", "first", "--type=v4-8")
    assert done.returncode == 2 and "--zone=ZONE is missing" in done.stderr
    done = cloud.ask("create", "first", "--type=v4-8", "--zone=us-central2-b", PATH=str(few))
    assert done.returncode == 1 and "gcloud is not on PATH" in done.stderr
    cloud.must("create", "first", "--type=v4-8", "--zone=us-central2-b", "--project=mine")
    done = cloud.ask("status", "first")  # the zone is remembered
    assert done.returncode == 1 and "ACTIVE" in done.stderr and "first is not set up: `tpu setup first" in done.stderr
    assert all(call[-2:] == ["--zone=us-central2-b", "--project=mine"] for call in cloud.calls() if call[3] == "list")
    cloud.must("delete", "first")
    assert "--project=mine" in cloud.calls()[-1] and cloud.ask("status", "first").returncode == 2
    cloud.must("delete", "first", "--zone=us-central2-b")  # gone already
