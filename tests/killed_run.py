"""Run by test_resume.py: a small training run that kills itself (SIGKILL) at one place.

python killed_run.py WORKDIR DATA [PHASE COUNT]   # at the COUNT-th entry of a phase; "save...": inside that save
"""

import os
import pathlib
import signal
import sys
import threading
import time

from cgrpo_jax import config
from cgrpo_jax.training import train
from cgrpo_jax.workdir import checkpoints, compilation, progress

workdir, data = pathlib.Path(sys.argv[1]), sys.argv[2]
where, left = (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else ("", 0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def countdown(name):
    global left
    left -= name == where
    return name == where and left == 0


enter_phase = progress.Progress.phase
save = checkpoints.Checkpointer.save


def phase(self, name):
    if countdown(name):
        threading.Timer(0.02, die).start()  # a moment later: inside
    return enter_phase(self, name)


def die_when(pattern):
    """At the first file of the pattern; no sleep, for the next moment of the save is another one."""
    while not any(workdir.glob(pattern)):
        time.sleep(0.0002)
    die()


# Where a save is killed: its folder has just been made, arrays are written, or it has its name and nothing more is done
# (the oldest is not removed, best.json not written).
MOMENTS = {
    "save": "checkpoints/*tmp*",
    "save/arrays": "checkpoints/*tmp*/opt_state*/ocdbt*/d/*",
    "save/named": "checkpoints/{step}",
}


def save_and_die(self, step, state, meta, metrics):
    for name, pattern in MOMENTS.items():
        if countdown(name):
            threading.Thread(target=die_when, args=[pattern.format(step=step)], daemon=True).start()
            save(self, step, state, meta, metrics)
            self.manager.wait_until_finished()
            time.sleep(60)
    save(self, step, state, meta, metrics)


progress.Progress.phase, checkpoints.Checkpointer.save = phase, save_and_die

raw = config.default_config("critique_grpo")
raw.model.path = "package://quickstart"
raw.data.source, raw.eval.source = data, "arithmetic"
raw.data.max_prompt_tokens, raw.refine.max_prompt_tokens = 64, 256
raw.sampling.max_new_tokens, raw.sampler.kv_cache_mb = 64, 4.0
raw.train.steps, raw.train.prompts, raw.train.samples, raw.train.micro_batch = 6, 2, 3, 1
raw.optimizer.learning_rate = 1e-3
raw.checkpoint.every, raw.verifier.workers = 2, 1
raw.eval.every, raw.eval.problems, raw.eval.samples = 3, 4, 1
raw.checkpoint.best = "eval/pass@1"
compilation.keep_on_disk()
train(config.from_config_dict(raw), workdir)
