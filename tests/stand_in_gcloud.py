"""A stand-in for `gcloud compute tpus`: strict about arguments, and failing as the real one does.

Flags, messages and ends are those of gcloud 528 (not of its alpha): an unknown flag ends with status 2; ssh ends as its
command did, without a word; a refused connection is 255, and a copy that fails 1, after ten tries. CLOUD names a folder: `world.json` holds the requests and what is to
fail, `calls.jsonl` what was asked, `vm/NAME` is the home folder of a machine, in which `ssh` really runs its command, with
none of this process's environment. Only the standard library, for it is started for each command.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])
IMAGES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
OFFERED = {"us-central2-b": ("v4",), "us-west4-a": ("v5litepod",), "us-east5-a": ("v5p", "v6e")}
WIDE = {"--zone=", "--project=", "--quiet", "--format="}
SSH = {"--dry-run", "--force-key-file-overwrite", "--internal-ip", "--plain", "--ssh-key-file=", "--worker="}
SSH |= {"--strict-host-key-checking=", "--ssh-key-expiration=", "--ssh-key-expire-after="}
CREATE = {"--accelerator-type=", "--runtime-version=", "--node-id=", "--spot", "--reserved", "--guaranteed", "--async"}
CREATE |= {
    "--network=",
    "--subnetwork=",
    "--internal-ips",
    "--service-account=",
    "--data-disk=",
    "--labels=",
    "--tags=",
}
FLAGS = {
    ("queued-resources", "create"): CREATE,
    ("queued-resources", "describe"): set(),
    ("queued-resources", "delete"): {"--force", "--async"},
    ("queued-resources", "list"): {"--filter=", "--limit="},
    ("tpu-vm", "ssh"): SSH | {"--command=", "--ssh-flag=", "--output-directory="},
    ("tpu-vm", "scp"): SSH | {"--recurse", "--compress", "--scp-flag="},
}


class Fault(Exception):
    """What gcloud says, and the status it ends with."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def parse(group, verb, arguments):
    """Positional words and flags; strict."""
    words, flags = [], {}
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            words.append(argument)
        elif f"{flag}{equals}" not in FLAGS[group, verb] | WIDE:
            raise Fault(f"unrecognized arguments:\n  {argument}", 2)
        else:
            flags[flag] = value
    least, most = {"list": (0, 0), "scp": (2, 99)}.get(verb, (1, 1))
    if not least <= len(words) <= most:
        raise Fault(f"argument QUEUED_RESOURCE: {least} to {most} are needed, not {words}", 2)
    if not flags.get("--zone"):
        raise Fault("argument --zone: Must be specified.", 2)
    return words, flags


def request_of(world, name):
    if name not in world["requests"]:
        place = f"projects/p/locations/z/queuedResources/{name}"
        raise Fault(f"NOT_FOUND: Resource '{place}' was not found")
    return world["requests"][name]


def create(world, words, flags):
    (name,) = words
    for flag in ("--accelerator-type", "--runtime-version", "--node-id"):
        if not flags.get(flag):
            raise Fault(f"argument {flag}: Must be specified.", 2)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise Fault(f"INVALID_ARGUMENT: {name}")
    kind, zone = flags["--accelerator-type"], flags["--zone"]
    generation = kind.partition("-")[0]
    if generation not in OFFERED.get(zone, ()):
        raise Fault(
            "INVALID_ARGUMENT: Cloud TPU received a bad request. The requested accelerator configuration for accelerator "
            f'type, "{kind}", could not be found in the zonal accelerator configurations for "{zone}".; the accelerator '
            f"{kind} was not found in zone {zone} [EID: 0x362c45de1b38c529]"
        )
    if flags["--runtime-version"] != IMAGES[generation]:
        raise Fault(f'INVALID_ARGUMENT: runtime version "{flags["--runtime-version"]}" does not support {kind}')
    if name in world["requests"] or flags["--node-id"] in world["machines"]:
        raise Fault(f"ALREADY_EXISTS: Resource 'projects/p/locations/{zone}/nodes/{flags['--node-id']}' already exists")
    quota = "Preemptible" if "--spot" in flags else ""
    exhausted = f"Quota 'TPUV5s{quota}LitepodServingPerProjectPerZoneForTPUAPI' exhausted. Limit 4 in zone {zone}"
    if world.get("fail") == "quota":
        raise Fault(json.dumps({"code": 8, "message": exhausted}))
    if world.get("fail") == "permission":
        raise Fault(
            f"PERMISSION_DENIED: Permission 'tpu.queuedresources.create' denied on 'projects/p/locations/{zone}'"
        )
    states = list(world.get("states", ["ACTIVE"]))
    world["requests"][name] = {"type": kind, "spot": "--spot" in flags, "states": states, "message": exhausted}
    print(f"Create request issued for: [{name}]", file=sys.stderr)


def describe(world, words, flags):
    if world.get("unseen", 0) > 0 and words[0] in world["requests"]:  # the request is not seen everywhere at once
        world["unseen"] -= 1
        raise Fault("NOT_FOUND: Requested entity was not found.")
    found = request_of(world, words[0])
    shown = flags.get("--format")
    if shown == "value(state.state)":
        print(found["states"][0])
        if len(found["states"]) > 1:
            found["states"].pop(0)
    elif shown == "value(state.failedData.error.message)":
        print(found["message"])
    else:
        raise Fault(f"no such format here: {shown}", 2)


def delete(world, words, flags):
    found = request_of(world, words[0])
    if found["states"][0] == "ACTIVE" and "--force" not in flags:
        raise Fault("FAILED_PRECONDITION: the queued resource still has nodes")
    if "--quiet" not in flags:
        raise Fault("This prompt could not be answered because you are not in an interactive session.")
    del world["requests"][words[0]]
    shutil.rmtree(CLOUD / "vm" / words[0], ignore_errors=True)


def machine_of(world, name):
    """The home folder of a machine that can be reached."""
    if name in world["requests"] and world["requests"][name]["states"][0] in ("SUSPENDING", "SUSPENDED"):
        raise Fault('This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
    request_of(world, name)
    if world.get("refuse", 0) > 0:
        world["refuse"] -= 1
        save(world)
        for _ in range(9):
            print("ssh: connect to host 34.162.99.201 port 22: Connection refused", file=sys.stderr)
            print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
        raise Fault("[/usr/bin/ssh] exited with return code [255].", 255)
    home = CLOUD / "vm" / name
    home.mkdir(parents=True, exist_ok=True)
    print("SSH: Attempting to connect to worker 0...", file=sys.stderr)
    return home


def ssh(world, words, flags):
    home = machine_of(world, words[0])
    if flags.get("--worker") not in ("0", "all") or not flags.get("--command"):
        raise Fault("argument --worker: 0 or all, with a --command", 2)
    given = {"HOME": str(home), "PATH": f"{CLOUD}/vm_bin:/usr/bin:/bin", "CLOUD": str(CLOUD)}
    done = subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=given, stdin=subprocess.DEVNULL)
    sys.exit(done.returncode)


def scp(world, words, flags):
    places = [word.partition(":") for word in words]
    there = {name for name, colon, _ in places if colon}
    if len(there) != 1:
        raise Fault("All sources must be local files when destination is remote.", 2)
    if flags.get("--worker") == "all" and ":" not in words[-1]:
        raise Fault("Invalid value for [--worker]: cannot target multiple workers while copying files to client.")
    home = machine_of(world, there.pop())
    recurse = ["-r"] if "--recurse" in flags else []
    paths = [home / path if colon else pathlib.Path(name) for name, colon, path in places]
    *sources, target = [
        f"{path}/" if word.endswith("/") else str(path) for path, word in zip(paths, words, strict=True)
    ]
    done = subprocess.run(["cp", *recurse, *[source.rstrip("/") for source in sources], target])
    if done.returncode:
        raise Fault(f"[/usr/bin/scp] exited with return code [{done.returncode}].", done.returncode)


def listed(world, words, flags):
    print("NAME ZONE NODE_COUNT ACCELERATOR_TYPE STATE")
    for name, found in world["requests"].items():
        print(name, flags["--zone"], 1, found["type"], found["states"][0])


def save(world):
    (CLOUD / "world.json").write_text(json.dumps(world))


def main():
    arguments = sys.argv[1:]
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    place = ".".join(arguments[:4])
    try:
        if arguments[:2] != ["compute", "tpus"] or tuple(arguments[2:4]) not in FLAGS:
            raise Fault(f"Invalid choice: {arguments[:4]}", 2)
        group, verb = arguments[2:4]
        words, flags = parse(group, verb, arguments[4:])
        world = {"requests": {}, "machines": []} | json.loads((CLOUD / "world.json").read_text())
        try:
            {"list": listed}.get(verb, globals().get(verb))(world, words, flags)
        finally:
            if group != "tpu-vm":  # which may take long, and changes no request
                save(world)
    except Fault as fault:
        print(f"ERROR: (gcloud.{place}) {fault}", file=sys.stderr)
        sys.exit(fault.status)


if __name__ == "__main__":
    main()
