#!/usr/bin/env bash
# What runs on the TPU VM. `tpu setup` sends it there; each command of `tpu` is one call of it, in ~/cgrpo:
#
#     venv/      the package            run.log    all that the runs have said, one after the other
#     secrets    keys, mode 600         run.pid    the process of the run; run.arguments: what it was asked
#                                       run.status how it ended
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH=$HOME/.local/bin:$PATH

fail() {
    printf 'on the VM: %s\n' "$*" >&2
    exit 1
}

# Whether the process of the last run lives; a number that another process has by now does not count.
running() { [ -s run.pid ] && ps -p "$(cat run.pid)" -o args= | grep -q cgrpo_jax; }

# A wheel in this folder, or an address that pip reads -> an environment with the package, and a look at the chips.
setup() {
    local source=$1
    case $source in *.whl) source="file://$PWD/$source" ;; esac
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh || fail "uv cannot be installed"
    [ -x venv/bin/python ] || uv venv --python=3.12 venv || fail "uv finds no Python 3.12"
    uv pip install --python=venv/bin/python --reinstall-package=cgrpo_jax "cgrpo_jax[tpu,api,gym] @ $source" ||
        fail "$source cannot be installed"
    timeout 300 venv/bin/python -c 'import jax; print(jax.default_backend(), *jax.devices(), sep="\n")' >devices ||
        fail "jax cannot open the TPU; another process may hold it"
    [ "$(head -n 1 devices)" = tpu ] || fail "jax sees no TPU, but: $(tail -n +2 devices | tr '\n' ' ')"
    echo "jax sees $(tail -n +2 devices | wc -l | tr -d ' ') devices"
}

# Begins a run, or goes on with one, apart from this connection.
start() {
    if running; then
        [ "$(printf '%q ' "$@")" = "$(cat run.arguments)" ] ||
            fail "another run is under way (process $(cat run.pid)); \`tpu logs\` follows it, \`tpu stop\` ends it"
        echo "this run is under way already (process $(cat run.pid))"
        return
    fi
    [ -x venv/bin/python ] || fail "there is no environment; \`tpu setup\` makes it"
    rm -f run.status
    printf '%q ' "$@" >run.arguments
    set -a
    # shellcheck source=/dev/null
    [ ! -f secrets ] || . ./secrets
    set +a
    # shellcheck disable=SC2016  # "$@" is for the inner shell, which outlives the signal of `stop` to say how it ended
    nohup setsid bash -c 'trap : TERM; "$@"; echo $? >run.status' run venv/bin/python -m cgrpo_jax.main "$@" \
        >>run.log 2>&1 </dev/null &
    echo $! >run.pid
    echo "the run is under way (process $!)"
}

# Asks the run to end, and waits until it has.
stop() {
    running || fail "no run is under way"
    kill -TERM -- "-$(cat run.pid)"
    for _ in $(seq 600); do
        running || return 0
        sleep 0.1
    done
    kill -KILL -- "-$(cat run.pid)"
}

status() {
    if running; then
        echo "a run is under way (process $(cat run.pid))"
    elif [ -f run.status ]; then
        echo "the run ended with status $(cat run.status)"
    elif [ -f run.pid ]; then
        echo "the run was killed"
    else
        echo "no run was begun"
    fi
}

# The last lines and what comes after them, until the run ends.
logs() {
    [ -f run.log ] || fail "no run was begun"
    if running; then
        tail -n 100 --pid="$(cat run.pid)" --sleep-interval=0.2 -F run.log
    else
        tail -n 100 run.log
    fi
    status
}

# A workdir as it is now -> staged/, by links, so that it takes no room and what is deleted meanwhile stays readable.
stage() {
    local workdir=$1 checkpoints=$2
    [ -d "$workdir" ] || fail "there is no workdir $workdir"
    rm -rf staged
    cp -al "$workdir" staged 2>/dev/null || { rm -rf staged && cp -al "$workdir" staged; } # a file went meanwhile
    if [ "$checkpoints" = yes ]; then # those that are whole: their names are numbers
        find staged/checkpoints -mindepth 1 -maxdepth 1 -name '*[!0-9]*' -exec rm -rf {} +
    else
        rm -rf staged/checkpoints
    fi
}

"$@"
