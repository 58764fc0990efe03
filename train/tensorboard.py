"""Epochs as TensorBoard reads them. It needs the extra ``tensorboard``, which only ``--tensorboard`` asks for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from train.loop import Epoch


def logged(ahead: Iterator[Epoch], folder: Path, done: Sequence[Epoch]) -> Iterator[Epoch]:
    """The epochs ahead, each written to ``folder`` as it ends; before them those that are done.

    What a run that was killed has left there is replaced: it may know of epochs that its checkpoints do not.
    """
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder), flush_secs=1) as writer:
        for epoch in list(done):
            _write(writer, epoch)
        for epoch in ahead:
            _write(writer, epoch)
            yield epoch


def _write(writer: SummaryWriter, epoch: Epoch) -> None:
    for name, phase in (("training", epoch.training), ("validation", epoch.validation)):
        writer.add_scalar(f"loss/{name}", phase.loss, epoch.number)
        writer.add_scalar(f"accuracy/{name}", phase.accuracy, epoch.number)
    writer.add_scalar("lr", epoch.lr, epoch.number)
