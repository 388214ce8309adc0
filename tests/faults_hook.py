"""What a kernel of `test_faults.py` does on top of its notebook; the notebook's added cell runs it.

Each run notes that it began and every epoch that it has finished, so that a test knows what was
trained, by which process, and when to strike. A run's own faults, if any, stand in faults/<run>.py:
`begin()` is called before the training, `epoch(number)` after each epoch. A run waits after the
epochs that stand in faults/<run>.hold, as long as they do.
"""

import os
import time

import keras

from dermnb.core import project_root

PLACE = project_root() / "faults"
PAUSE = float(os.environ.get("FAULTS_PAUSE", "0"))  # seconds an epoch


def note(run: str, text: str) -> None:
    "One line of one write, as several kernels share the file."
    with (PLACE / "seen.txt").open("a") as file:
        file.write(f"{run} {os.getpid()} {text}\n")


def held(run: str, epoch: int) -> bool:
    "Whether a run is to wait after this epoch, for a test to strike in."
    file = PLACE / f"{run}.hold"
    return file.is_file() and str(epoch) in file.read_text().split()


def begin(run: str) -> None:
    "Note the run's epochs from now on, and do to it what its file says."
    own, file = {}, PLACE / f"{run}.py"
    if file.is_file():
        exec(file.read_text(), own)
    note(run, "begins")
    own.get("begin", lambda: None)()

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            note(run, f"epoch {epoch + 1}")

    class Strike(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            time.sleep(PAUSE)
            if held(run, epoch + 1):
                note(run, f"waits after {epoch + 1}")
            while held(run, epoch + 1):
                time.sleep(0.02)
            own.get("epoch", lambda number: None)(epoch + 1)

    fit = keras.Model.fit

    def watched(self, *args, callbacks=(), **more):
        # The last ones act when a checkpoint of the epoch has been written.
        return fit(self, *args, callbacks=[Note(), *callbacks, Strike()], **more)

    keras.Model.fit = watched
