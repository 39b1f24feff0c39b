"""Several hosts: real processes on loopback, a store of keys of our own, and what the hosts tell each other."""

import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster
from test_train import lines, without_times

from cgrpo_jax.errors import ConfigError, HostsError
from cgrpo_jax.learning.telling import heard, told
from cgrpo_jax.process import pod, stopping, wire
from cgrpo_jax.process.pod import Pod, place_of
from cgrpo_jax.records import Completion, Kind, Name, Segment
from cgrpo_jax.run.resuming import Past
from cgrpo_jax.run.saving import Saves

HERE = pathlib.Path(__file__).parent
STEPS = "--config.train.steps=8"
SMALL = (
    "--config=quickstart",
    "--config.eval.every=0",
    "--config.train.prompts=4",
    "--config.train.samples=3",
    "--config.sampling.max_new_tokens=64",
    "--config.checkpoint.every=2",  # in the background; older ones are deleted meanwhile
    "--config.checkpoint.keep=1",
)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(workdir, count, devices, *options, fault="none", heartbeat=100.0):
    """Starts the hosts of a run; their output goes to files beside the workdir."""
    port, processes = free_port(), []
    for index in range(count):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": f"{HERE.parent}",
        }
        given = [f"--workdir={workdir}", f"--hosts=127.0.0.1:{port},{count},{index}", *SMALL, *options]
        command = [sys.executable, HERE / "pod_run.py", fault, str(heartbeat), *given]
        with open(f"{workdir}.{index}", "w") as said:
            processes.append(subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=HERE.parent))
    return processes


def end(processes, seconds=240.0):
    """Exit codes; what still runs after so many seconds is killed."""
    try:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def said(workdir, index):
    return pathlib.Path(f"{workdir}.{index}").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Eight steps by two hosts of one device."""
    workdir = tmp_path_factory.mktemp("pod") / "w"
    assert end(start(workdir, 2, 1, STEPS)) == [0, 0], said(workdir, 0) + said(workdir, 1)
    return workdir


@pytest.mark.thorough
def test_two_hosts_do_what_one_does(undisturbed, tmp_path):
    """Tokens, rewards and critiques to the letter; metrics as closely as sums in another order can be."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": f"{HERE.parent}"}
    command = [sys.executable, "-m", "cgrpo_jax.main", f"--workdir={tmp_path}/w", *SMALL, STEPS]
    subprocess.run(command, env=environment, cwd=HERE.parent, check=True, capture_output=True, timeout=240)
    first = [(folder / "rollouts/000001.jsonl").read_bytes() for folder in (undisturbed, tmp_path / "w")]
    assert first[0] == first[1] and b'"refinements": [{' in first[0]
    ours, alone = (without_times(lines(folder / "metrics.jsonl"))[0] for folder in (undisturbed, tmp_path / "w"))
    assert ours.keys() == alone.keys() and ours["reward/refinements"] == alone["reward/refinements"]
    for name in ours:
        np.testing.assert_allclose(ours[name], alone[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.thorough
def test_two_hosts_generate_and_evaluate_as_one_does(tmp_path):
    """The same rows, and the same answers to a task; --preflight first."""
    (tmp_path / "sums.jsonl").write_text('{"question": "What is 23+46?", "answer": 69}\n' * 3)
    generates = ("--config.method=generate", "--config.refine.trigger=never", "--config.generate.rows=responses")
    evaluates = ("--config.method=eval", f"--config.eval.tasks=sums={tmp_path}/sums.jsonl", "--config.eval.samples=4")
    for name, options in {"rows": (*generates, "--config.train.steps=2", "--preflight"), "eval": evaluates}.items():
        workdirs = tmp_path / f"{name}2", tmp_path / f"{name}1"
        assert end(start(workdirs[0], 2, 1, *options)) == [0, 0], said(workdirs[0], 0) + said(workdirs[0], 1)
        command = [sys.executable, "-m", "cgrpo_jax.main", f"--workdir={workdirs[1]}", *SMALL, *options]
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": f"{HERE.parent}",
        }
        subprocess.run(command, env=environment, cwd=HERE.parent, check=True, capture_output=True, timeout=240)
        written = {"rows": "rows.jsonl", "eval": "eval/sums/graded.jsonl"}[name]
        assert (workdirs[0] / written).read_bytes() == (workdirs[1] / written).read_bytes() != b""


@pytest.mark.thorough
def test_a_signal_to_any_host_stops_all_and_the_run_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "w"
    codes = end(start(workdir, 2, 1, STEPS, fault="stop:1:1"))
    assert codes == [143, 143], said(workdir, 0) + said(workdir, 1)
    words = r"stopped after step ([1-7]), which is saved; the same command goes on after step \1"
    assert re.search(words, said(workdir, 0))[1] == re.search(words, said(workdir, 1))[1]
    assert end(start(workdir, 2, 1, STEPS)) == [0, 0], said(workdir, 0) + said(workdir, 1)
    assert without_times(lines(workdir / "metrics.jsonl")) == without_times(lines(undisturbed / "metrics.jsonl"))
    for path in (undisturbed / "rollouts").iterdir():
        assert path.read_bytes() == (workdir / "rollouts" / path.name).read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize("host", [0, 1])
def test_an_error_on_one_host_ends_all(tmp_path, host):
    workdir = tmp_path / "w"
    processes = start(workdir, 2, 1, STEPS, fault=f"error:{host}:1")
    codes = [processes[host].wait(240)]
    began = time.monotonic()
    codes += end(processes, 60)
    assert codes == [1, 1, 1] and time.monotonic() - began < 10
    assert f"host {1 - host}: host {host} ended: error: RuntimeError: a fault of host {host}" in said(workdir, 1 - host)


@pytest.mark.thorough
def test_a_lost_host_is_named(tmp_path):
    workdir = tmp_path / "w"
    codes = end(start(workdir, 2, 1, STEPS, fault="kill:1:1", heartbeat=20.0))
    assert codes == [pod.LOST, -9], said(workdir, 0)
    assert re.search(r"host 0: host 1 is lost, the last thing it did: (sample|update) \(", said(workdir, 0))


@pytest.mark.thorough
def test_a_frozen_host_is_named(tmp_path):
    workdir = tmp_path / "w"
    processes = start(workdir, 2, 1, STEPS, fault="freeze:1:1", heartbeat=20.0)
    assert processes[0].wait(240) == pod.LOST, said(workdir, 0)
    words = "host 0: host 1 is lost: no sign of life for 10 s, the last thing it did: (sample|update)"
    assert re.search(words, said(workdir, 0))
    processes[1].kill()


@pytest.mark.thorough
def test_hosts_that_are_not_alike_are_refused(tmp_path):
    """Before anything is compiled, with the option that differs."""
    workdir = tmp_path / "w"
    port, processes = free_port(), []
    for index in (0, 1):
        given = [f"--workdir={workdir}", f"--hosts=127.0.0.1:{port},2,{index}", *SMALL, f"--config.train.steps={index}"]
        command = [sys.executable, "-m", "cgrpo_jax.main", *given]
        environment = os.environ | {"PYTHONPATH": f"{HERE.parent}"}
        with open(f"{workdir}.{index}", "w") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
    assert end(processes, 100) == [1, 1]
    for index in (0, 1):
        assert "host 1 has another --config.train.steps than host 0 (1, not 0)" in said(workdir, index)
    assert not workdir.exists()


# ---- What is told, and how ----


class Store:
    """A store of keys as the coordination service has, in memory."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values, key
            self.values[key] = value
            self.changed.notify_all()

    key_value_set_bytes = key_value_set

    def blocking_key_value_get_bytes(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: not there")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_delete(self, folder):
        with self.changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(folder)}


@pytest.fixture
def hosts(monkeypatch):
    """Two hosts of this process; every signal of life is the test's own."""
    monkeypatch.setattr(Pod, "_watch", lambda self: None)
    store = Store()
    return [Pod(2, index, store, print) for index in (0, 1)]


def both(hosts, *calls):
    """What each host's calls return, made side by side."""
    results = [None, None]

    def run(index):
        try:
            results[index] = [call(hosts[index]) for call in calls]
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=[index], daemon=True) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_what_is_told_is_heard(hosts, monkeypatch):
    """Also in pieces; only the leader looks for it; what was heard by all is removed."""
    monkeypatch.setattr(pod, "PIECE", 1000)
    values = [(number, np.arange(number, dtype=np.int32)) for number in (0, 249, 250, 5000)] * 60
    calls = [lambda host, value=value: host.share(lambda: value if host.leader else pytest.fail()) for value in values]
    leader, follower = both(hosts, *calls)
    assert [number for number, _ in follower] == [number for number, _ in leader] == [number for number, _ in values]
    assert all(np.array_equal(array, np.arange(number)) and array.dtype == np.int32 for number, array in follower)
    turns = {int(key.split("/")[1]) for key in hosts[0].client.values if key.startswith("told/")}
    assert len(turns) <= 2 * pod.BEHIND and max(turns) == len(values)
    assert hosts[0].bytes == hosts[1].bytes > 4 * 5000 * 60


def test_a_message_is_kept_until_the_slowest_host_has_heard_it(hosts, monkeypatch):
    """One that is late just where it says how far it has come."""
    hear = Pod._heard

    def late(self):
        time.sleep(0.5 if self.turn == pod.BEHIND else 0)
        return hear(self)

    monkeypatch.setattr(Pod, "_heard", late)
    numbers = range(3 * pod.BEHIND)
    assert both(hosts, *[lambda host, n=n: host.share(lambda: n) for n in numbers])[1] == list(numbers)


def test_the_leader_decides_for_all_whether_a_save_has_ended():
    """Whatever a host finds itself: the deletion of older checkpoints that follows waits for all hosts."""
    waited = []
    for of_leader, own in ((True, False), (False, True)):
        saves = Saves.__new__(Saves)
        saves.hosts = SimpleNamespace(share=lambda find, found=of_leader: found)
        saves.checkpointer = SimpleNamespace(ended=lambda own=own: own, wait=lambda: waited.append(True))
        saves.check()
    assert waited == [True]


def test_an_error_of_the_leader_is_raised_by_all(hosts):
    def find():
        raise ConfigError("no such file")

    leader, follower = both(hosts, lambda host: host.share(find))
    assert isinstance(leader, ConfigError) and isinstance(follower, HostsError)
    assert str(follower) == "host 0 ended: ConfigError: no such file"


def test_all_stop_at_the_same_place(hosts, monkeypatch):
    monkeypatch.setattr(stopping, "_asked", [15])
    leader, follower = both(hosts, lambda host: host.share(stopping.look))
    assert isinstance(leader, stopping.Stopped) and isinstance(follower, stopping.Stopped)
    assert stopping.exit_code() == 143


def test_a_host_that_differs_is_named(hosts):
    assert both(hosts, lambda host: host.check_alike(lambda: {"jax": "1"})) == [[None], [None]]
    facts = [{"jax": "1", "code": "ab"}, {"jax": "1", "code": "cd"}]
    leader, follower = both(hosts, lambda host: host.check_alike(lambda: facts[host.index]))
    for error in (leader, follower):
        assert isinstance(error, ConfigError)
        assert str(error) == "host 1 has another code than host 0 (cd, not ab); all hosts of a run start alike"


def test_a_workdir_that_is_not_shared_is_refused(hosts, tmp_path, monkeypatch):
    """Each host has a folder of its own by the same name; and where it is shared nothing stays in it."""
    monkeypatch.setattr(pod, "SEEN_WITHIN", 0.3)
    own = [tmp_path / "first", tmp_path / "second"]
    for folder in own:
        folder.mkdir()
    assert both(hosts, lambda host: host.check_folder(own[0])) == [[None], [None]]
    for error in both(hosts, lambda host: host.check_folder(own[host.index])):
        assert isinstance(error, ConfigError) and "host 1 cannot see what host 0 writes there" in str(error)
    assert not list(own[0].iterdir())


def test_a_meeting_waits_for_all_and_says_for_whom(monkeypatch):
    monkeypatch.setattr(Pod, "_watch", lambda self: None)
    monkeypatch.setattr(pod, "TOLD_EVERY", 0.2)
    store, lines_said = Store(), []
    first, second, third = (Pod(3, index, store, lines_said.append) for index in range(3))
    waiting = threading.Thread(target=first.meet, args=["compile"])
    waiting.start()
    time.sleep(0.5)
    second.turn += 1
    second._sign(f"met/{second.turn}")
    time.sleep(0.4)
    assert waiting.is_alive()
    third.turn += 1
    third._sign(f"met/{third.turn}")
    waiting.join(5)
    assert not waiting.is_alive()
    assert lines_said[0] == "host 0: waiting for hosts 1, 2 to compile"
    assert lines_said[-1] == "host 0: waiting for host 2 to compile"


@pytest.mark.parametrize("text", ["here", "here:1", "here:1,2", "here:1,2,2", "here:x,2,0", ":1,2,0", "here:1,2,0,4"])
def test_a_place_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="give ADDRESS:PORT,COUNT,INDEX"):
        place_of(text)


def test_a_place():
    assert place_of("10.0.0.2:8476,4,3") == ("10.0.0.2:8476", 4, 3) and place_of("") is None


@pytest.mark.parametrize(("workers", "several"), [("", False), ("a", False), ("a,b,c,d", True)])
def test_a_slice_tells_how_many_hosts_it_has(monkeypatch, workers, several):
    """As in a JobSet; not where only the CPU is asked for."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name, value in {"TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}.items():
        monkeypatch.setenv(name, value)
    if workers:
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", workers)
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "")
        assert pod.slice_of_several() == several
        jax.config.update("jax_platforms", "cpu")
        assert not pod.slice_of_several()
    finally:
        jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize("value", [SimpleNamespace(a=1), os.system, pathlib.Path("/"), wire.packed, pod.Pod])
def test_nothing_but_plain_data_is_unpacked(value):
    with pytest.raises(pickle.UnpicklingError):
        wire.unpacked(pickle.dumps(value))


def test_records_and_arrays_are_plain_data():
    name = Name(Kind.REFINEMENT, 3, 1)
    past = Past(3, 12, {"a": "b"}, True, "0f", "")
    value = {"a": [name, 1.5, None, (True, "x"), past], "b": np.arange(3.0), "c": np.float32(2), "d": frozenset([1])}
    found = wire.unpacked(wire.packed(value))
    assert found["a"] == value["a"] and found["a"][0].kind is Kind.REFINEMENT
    assert np.array_equal(found["b"], value["b"]) and found["d"] == value["d"]


def made(rng, count, length, problems):
    """Completions by name, and segments of them as credit makes them."""
    completions, segments = {}, []
    for index in range(count):
        n = int(rng.integers(1, length + 1))
        sampled_T = rng.random(n) < 0.9 if index % 3 == 0 else None
        completion = Completion(
            rng.integers(0, 50_000, n, np.int32), rng.normal(size=n).astype(np.float32), np.ones(n, np.float32), True,
            sampled_T,
        )  # fmt: skip
        completions[Name(Kind.RESPONSE, index % problems, index)] = completion
        one_T = completion.has_loss_T.astype(np.float64)
        pg, ent, kl = rng.normal(size=3)
        prompt = list(range(index % problems, 100 + index % problems))
        weights = pg * one_T, 0.0 * (pg * one_T), ent * one_T, kl * one_T
        segments.append(Segment(prompt, completion.ids, index % 2 == 0, *weights, completion.logp, sampled_T))
    return completions, segments


def same(a, b):
    """Equal to the bit."""
    arrays = (
        ("ids", "pg_T", "ce_T", "ent_T", "kl_T")
        + (("sampler_logp_T",) if a.sampler_logp_T is not None else ())
        + (("sampled_T",) if a.sampled_T is not None else ())
    )
    return (
        list(a.prompt_ids) == list(b.prompt_ids)
        and a.refined == b.refined
        and all(getattr(a, n).tobytes() == getattr(b, n).tobytes() for n in arrays)
        and (a.sampled_T is None) == (b.sampled_T is None)
        and (a.sampler_logp_T is None) == (b.sampler_logp_T is None)
    )


def test_segments_are_heard_as_they_were_told():
    """Sampled ones by name; texts that nobody sampled, and weights that differ from token to token, as they are."""
    rng = np.random.default_rng(0)
    completions, segments = made(rng, 24, 30, 4)
    uneven = segments[1]._replace(pg_T=rng.normal(size=len(segments[1].ids)))
    written = Segment([1, 2], np.arange(5, dtype=np.int32), True, *np.zeros((4, 5)), None)
    segments += [uneven, written, segments[2]._replace(sampler_logp_T=np.zeros(len(segments[2].ids), np.float32))]
    copies = {name: Completion(*[x.copy() if isinstance(x, np.ndarray) else x for x in completion]) for name, completion
              in completions.items()}  # fmt: skip
    found = heard(wire.unpacked(wire.packed(told(segments, completions))), copies)
    assert len(found) == len(segments) and all(map(same, segments, found))


def test_an_update_of_four_million_tokens_is_told_in_less_than_a_megabyte():
    completions, segments = made(np.random.default_rng(0), 896, 9216, 112)
    assert sum(len(segment.ids) for segment in segments) > 4_000_000
    assert len(wire.packed(told(segments, completions))) < 1_000_000
