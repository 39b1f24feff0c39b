"""Run by test_resume.py: a small training run that kills itself (SIGKILL) at one place.

python killed_run.py WORKDIR DATA [PHASE COUNT]   # at the COUNT-th entry of a phase; "save": inside the COUNT-th save
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
die = lambda: os.kill(os.getpid(), signal.SIGKILL)


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


def save_and_die(self, step, state, meta):
    if not countdown("save"):
        return save(self, step, state, meta)

    def watch():
        while not list(self.folder.glob("*tmp*")):  # the checkpoint under way, before it gets its name
            time.sleep(0.0005)
        die()

    threading.Thread(target=watch, daemon=True).start()
    save(self, step, state, meta)
    time.sleep(60)


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
compilation.keep_on_disk()
train(config.from_config_dict(raw), workdir)
