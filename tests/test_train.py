"""The training itself, on 16-pixel pictures: it learns, stops, keeps its best epoch, survives a kill, and says what is wrong."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import re
import secrets
from dataclasses import asdict
from dataclasses import replace as replace_epoch
from fcntl import flock
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import ValidationError
from trainings import SMALL, accuracy, loss_of, picture, tiny_network

from pipeline.errors import JobError, ModelError, StoreError, Temporary, UnfitError
from pipeline.job.training import Augment, Training, Workers
from pipeline.model.preprocessing import Preprocessing
from pipeline.model.resnet import ResNet
from pipeline.prepare import checkpoint
from pipeline.prepare.afar import Checkpoints
from pipeline.prepare.checkpoint import BEST, make_folder, open_part, read, replace
from pipeline.prepare.epochs import Epoch, EpochLog, Patience
from pipeline.prepare.finetune import metrics
from pipeline.prepare.images import Images
from pipeline.prepare.learner import MEASURED, CrossEntropy, Learner, balanced_weights, decay_groups, warmup_cosine
from pipeline.prepare.train import Result, Worker, fit

QUICK = Training(epochs=3, batch_size=8, learning_rate=3e-3, augment=Augment(crop=(1, 1), flip=False))


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on two, ten times so when another process takes a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int, *, classes: int = 2, first: int = 0) -> Images:
    encoded = pa.array([picture(number, classes=classes) for number in range(first, first + count)], pa.large_binary())
    return Images(encoded, np.arange(first, first + count) % classes)


def mislabelled(count: int) -> Images:
    """To validate with: the better a model learns, the worse it does on these."""
    wrong = pictures(count, first=64)
    return Images(wrong.encoded, 1 - wrong.labels)


def trained(folder: Path, training: Training = QUICK, *, network: ResNet | None = None, **more) -> tuple[Result, list[str]]:
    data = more.pop("data", (pictures(64), pictures(16, first=64)))
    network = network or tiny_network()
    said: list[str] = []
    learner = Learner(network, more.pop("objective", CrossEntropy(training.label_smoothing)), SMALL, training)
    result = fit(
        learner,
        data,
        preprocessing=SMALL,
        worker=more.pop("worker", Worker()),
        place=Checkpoints(folder),
        say=more.pop("say", said.append),
    )
    return result, said


class Killed(BaseException):
    pass


def kill_in_epoch_3(line: str) -> None:
    if line.startswith("epoch 3"):
        raise Killed


def same(first: Result, second: Result) -> bool:
    return all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_loss_falls_the_model_learns_and_the_epochs_are_told(tmp_path: Path):
    result, said = trained(tmp_path)
    assert [epoch.number for epoch in result.epochs] == [1, 2, 3]
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert result.best.accuracy == 1.0
    assert len(said) == 3
    assert said[0].startswith("epoch 1 of 3: loss ")
    assert result.weights.keys() == tiny_network().state_dict().keys()


def test_bfloat16_is_advised_against_where_the_cpu_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for precision, lacks, warned in (("bfloat16", True, True), ("bfloat16", False, False), (None, True, False)):
        monkeypatch.setattr("pipeline.engines.cpu.lacks", lambda _, lacks=lacks: lacks)
        wanted = QUICK.model_copy(update={"precision": precision, "epochs": 1})
        _, said = trained(tmp_path / f"{precision} {lacks}", wanted)
        assert said[0].startswith("caution: training.precision is bfloat16 on a CPU without") == warned, said


def test_a_long_epoch_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.prepare.epochs.EVERY_S", 0.0)
    _, said = trained(tmp_path, QUICK.model_copy(update={"epochs": 1}), worker=Worker(world=2))
    steps = r"epoch 1 of 1: step (\d) of 4, loss \d\.\d{3}, [\d,]+ images/s, [\d.]+ min to go"
    assert [found[1] for line in said if (found := re.fullmatch(steps, line))] == ["1", "2", "3"]
    assert len(said) == 4, "and the epoch"


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"optimizer": "sgd", "learning_rate": 0.05}])
def test_batches_that_are_accumulated_are_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, object]):
    """Rate, clipping and average go by steps. Norms see batches, so they rest here; 70 images are eight steps of 8 and some."""
    monkeypatch.setattr("pipeline.prepare.epochs.EVERY_S", 0.0)
    data = pictures(70), pictures(16, first=70)
    how = QUICK.model_copy(update={"freeze": 5, "gradient_clip": 0.05, **more})
    whole, said = trained(tmp_path / "a", how, data=data)
    parts, told = trained(tmp_path / "b", how.model_copy(update={"batch_size": 2, "accumulate": 4}), data=data)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value)
    assert [epoch.loss for epoch in parts.epochs] == pytest.approx([epoch.loss for epoch in whole.epochs], abs=1e-5)
    assert [line.split(", ")[0] for line in told] == [line.split(", ")[0] for line in said]
    assert said[0].startswith("epoch 1 of 3: step 1 of 8, loss ")
    states = [read(tmp_path / name / "last.ckpt") for name in "ab"]
    assert [state["global_step"] for state in states] == [24, 24]
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]


@pytest.mark.parametrize("batches", [1, 2])
def test_the_line_of_a_long_epoch_and_the_epochs_that_are_kept(tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch):
    """Every half minute, but for the last step, which the epoch itself tells; a step may be of several batches."""
    now, said = 100.0, list[str]()
    monkeypatch.setattr("time.perf_counter", lambda: now)
    log, trainer = EpochLog(said.append, 3, 64, tmp_path), SimpleNamespace(is_global_zero=True)
    trainer.num_training_batches, trainer.accumulate_grad_batches = 10 * batches, batches
    log.on_train_epoch_start()
    for seconds, done in ((40, 4), (20, 6), (11, 7), (40, 10)):
        now += seconds
        for batch in range(batches * (done - 1), batches * done):
            log.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.5 / batches)}, None, batch)
    assert said == [
        "epoch 1 of 3: step 4 of 10, loss 0.500, 6 images/s, 1.0 min to go",
        "epoch 1 of 3: step 7 of 10, loss 0.500, 6 images/s, 0.5 min to go",
    ]
    trainer.callback_metrics = {"training_loss": 0.5, "validation_loss": 0.25, "accuracy": 0.75}
    log.on_train_epoch_end(trainer)
    assert said[2:] == ["epoch 1 of 3: loss 0.500, validation loss 0.250, 75.00% right, 111.0 s"]
    log.epochs += [replace_epoch(log.epochs[0], number=2, seconds=1.0), replace_epoch(log.epochs[0], number=2, seconds=2.0)]
    log.epochs += [replace_epoch(log.epochs[0], number=3, seconds=4.0)]
    measured = {"number": 2.0, "loss": 0.1, "validation_loss": 0.2, "accuracy": 0.9}
    assert log.kept(measured) == Epoch(2, 0.1, 0.2, 0.9, 3.0), "one that came again after a kill took both times"
    trainer.callback_metrics["training_loss"] = float("inf")
    with pytest.raises(ModelError, match=r"the loss became inf; required: a finite number"):
        log.on_train_epoch_end(trainer)


@pytest.mark.parametrize(
    ("accuracies", "thaw", "epochs"),
    [
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3], None, 6),
        ([0.5, 0.4, 0.3, 0.2], None, 3),
        ([0.5] * 9, None, 3),
        ([0.5] * 9, 4, 5),  # no sooner than two epochs in which all of it was trained
        ([0.5] * 9, 2, 3),
    ],
)
def test_patience_is_with_epochs_that_are_no_better_once_all_is_trained(accuracies: list[float], thaw: int | None, epochs: int):
    settings = {"epochs": 9, "patience": 2} | ({"freeze": 1, "unfreeze_epoch": thaw} if thaw else {})
    patience = Patience(Training.model_validate(QUICK.model_dump() | settings))
    decide = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer = SimpleNamespace(
        state=state, sanity_checking=False, fast_dev_run=False, should_stop=False, strategy=decide, world_size=1
    )
    trainer.val_check_interval, trainer.check_val_every_n_epoch, trainer.num_val_batches = 1.0, 1, [1]
    patience.setup(trainer, None, "fit")
    for number, right in enumerate(accuracies):
        trainer.current_epoch, trainer.callback_metrics = number, {"accuracy": torch.tensor(right)}
        patience.on_train_epoch_end(trainer, None)
        assert patience.spent == trainer.should_stop
        if trainer.should_stop:
            break
    assert number + 1 == epochs


def test_same_seed_same_weights_and_another_seed_others(tmp_path: Path):
    drawn = {"augment": Augment(crop=(0.5, 1), jitter=0.2, trivial=True, erase=0.5), "mixup": 0.2, "cutmix": 1.0}
    changed = QUICK.model_copy(update={**drawn, "epochs": 2})
    first, again = (trained(tmp_path / name, changed)[0] for name in "ab")
    other = trained(tmp_path / "c", changed.model_copy(update={"seed": 6}))[0]
    assert same(first, again)
    assert not same(first, other)


def test_loaders_are_started_once_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changed = QUICK.model_copy(update={"augment": Augment(crop=(0.5, 1)), "mixup": 0.2})
    alone, _ = trained(tmp_path / "a", changed)
    forks, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or fork())
    helped, _ = trained(tmp_path / "b", changed, worker=Worker(loaders=2))
    assert same(alone, helped)
    assert len(forks) == 2


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "precision": "bfloat16", "batch_size": 4, "accumulate": 2}])
def test_a_kill_costs_an_epoch_and_changes_nothing(tmp_path: Path, more: dict[str, object]):
    drawn = {"augment": Augment(crop=(0.5, 1), trivial=True), "mixup": 0.2, "cutmix": 1.0}
    longer = QUICK.model_copy(update={**drawn, "epochs": 5, **more})
    undisturbed, _ = trained(tmp_path / "a", longer)

    with pytest.raises(Killed):
        trained(tmp_path / "b", longer, say=kill_in_epoch_3)
    resumed, said = trained(tmp_path / "b", longer)
    assert said[0] == "resuming: 2 of at most 5 epochs done"
    assert (resumed.resumed, len(resumed.epochs)) == (2, 5)
    assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in undisturbed.epochs]
    assert resumed.best.number == undisturbed.best.number
    assert same(resumed, undisturbed)
    with (tmp_path / "b" / "epochs.csv").open() as table:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(table)]
    assert rows == [asdict(epoch) for epoch in resumed.epochs]
    again, said = trained(tmp_path / "b", longer)
    assert said == ["resuming: 5 of at most 5 epochs done"]
    assert same(again, undisturbed)


def test_a_folder_that_has_moved_keeps_its_best_epoch(tmp_path: Path):
    training, data = QUICK.model_copy(update={"epochs": 6, "patience": 4}), (pictures(64), mislabelled(16))
    undisturbed, _ = trained(tmp_path / "a", training, data=data)
    assert undisturbed.best.number <= 2

    with pytest.raises(Killed):
        trained(tmp_path / "b", training, data=data, say=kill_in_epoch_3)
    (tmp_path / "b").rename(tmp_path / "c")
    resumed, _ = trained(tmp_path / "c", training, data=data)
    assert (resumed.resumed, resumed.best.number) == (2, undisturbed.best.number)
    assert same(resumed, undisturbed)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_a_last_epoch_without_the_best_one_starts_anew(tmp_path: Path, world: int):
    worker = Worker(world=world)
    first, _ = trained(tmp_path, worker=worker)
    (tmp_path / "best.ckpt").unlink()
    again, said = trained(tmp_path, worker=worker)
    assert again.resumed == 0
    assert said[0] == f"starting anew: {tmp_path} holds last.ckpt without best.ckpt"
    assert same(first, again)


def test_checkpoints_that_are_damaged_gone_or_cannot_be_written_are_one_sentence(tmp_path: Path):
    settings = QUICK.model_copy(update={"epochs": 1})
    with pytest.raises(Temporary, match=r"best\.ckpt: somebody has removed it\. Run again: either another run"):
        read(tmp_path / "best.ckpt")
    trained(tmp_path, settings)
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(
        Temporary, match=r"folder\.ckpt: .*Is a directory.*\. Check the rights, the disk and the memory; the same"
    ):
        read(tmp_path / "folder.ckpt")
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(StoreError, match=r"last\.ckpt: cannot be read \(.*\); required: a checkpoint as .* Remove /.* and begin"):
        trained(tmp_path, settings)
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").mkdir()
    for world in (1, 2):
        with pytest.raises(Temporary, match=r"last\.ckpt: .*Is a directory"):
            trained(tmp_path, settings, worker=Worker(world=world))
    with pytest.raises(StoreError, match=r"/dev/full/x/last\.ckpt: Not a directory; required: a place for checkpoints"):
        replace(Path("/dev/full/x/last.ckpt"), b"")


def test_what_a_kill_or_a_full_disk_left_half_written_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (f"last.{os.getppid()}.part", "odd.part"):  # another container's process may have had the number of one here
        (tmp_path / name).write_bytes(b"half")
    other, file = open_part(tmp_path / "last.ckpt")  # somebody else's, who is writing now
    with file:
        trained(tmp_path, QUICK.model_copy(update={"epochs": 1}))
    whole = {"best.ckpt", "last.ckpt", "epochs.csv", other.name}
    assert {path.name for path in tmp_path.iterdir()} == whole

    def full(_: int) -> str:
        (tmp_path / "last.full.part").symlink_to("/dev/full")
        return "full"

    monkeypatch.setattr(secrets, "token_hex", full)
    with pytest.raises(StoreError, match="No space left on device"):
        replace(tmp_path / "last.ckpt", b"more")
    assert {path.name for path in tmp_path.iterdir()} == whole
    make_folder(tmp_path)  # the other one has ended, and left it half written
    assert {path.name for path in tmp_path.iterdir()} == whole - {other.name}


def test_a_part_that_is_swept_away_before_it_is_locked_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    swept = list[str]()

    def sweep_first(file: Any, how: int) -> None:
        if not swept:
            swept.extend(path.name for path in tmp_path.iterdir())
            monkeypatch.setattr(checkpoint, "flock", flock)
            make_folder(tmp_path)
        flock(file, how)

    monkeypatch.setattr(checkpoint, "flock", sweep_first)
    replace(tmp_path / "last.ckpt", b"whole")
    assert swept[0].endswith(".part")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"last.ckpt": b"whole"}


def test_where_a_disk_knows_no_locks_nothing_is_taken_for_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoint, "flock", unknown)
    (tmp_path / "last.1234.part").write_bytes(b"half")
    make_folder(tmp_path)
    replace(tmp_path / "last.ckpt", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"last.1234.part", "last.ckpt"}


@pytest.mark.filterwarnings("ignore")  # torch has its doubts about some
def test_a_checkpoint_with_a_hole_is_one_sentence(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "last.ckpt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "last.ckpt").read_bytes()
    for at in range(len(content)):
        (tmp_path / "last.ckpt").write_bytes(content[:at] + content[at + 1 :])
        with contextlib.suppress(StoreError):
            read(tmp_path / "last.ckpt")


def test_a_loaded_network_trains_its_norms_and_a_stopped_training_stays_stopped(tmp_path: Path):
    wrong = mislabelled(16)
    training = QUICK.model_copy(update={"epochs": 12, "patience": 2})
    network = tiny_network().eval()  # as an artifact's is
    before = network.state_dict()["resnet.embedder.embedder.normalization.running_mean"].clone()
    first, _ = trained(tmp_path, training, network=network, data=(pictures(64), wrong))
    assert not torch.equal(first.weights["resnet.embedder.embedder.normalization.running_mean"], before)
    again, said = trained(tmp_path, training, data=(pictures(64), wrong))
    assert len(again.epochs) == len(first.epochs) < 12
    assert said == [f"resuming: {len(first.epochs)} of at most 12 epochs done"]
    assert same(first, again)


def test_a_rare_class_is_not_the_best_answer_to_common_images():
    weights, logits = balanced_weights([100, 1]), torch.zeros(1, 2, requires_grad=True)
    objective = CrossEntropy(0.1, weights)
    objective.of(logits, torch.tensor([[1.0, 0.0]])).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1], "a step of descent raises the common class"
    assert objective.of(logits, torch.zeros(1, 2)).item() == 0, "an image without a label"


def test_a_mixed_image_without_a_label_counts_for_the_share_of_the_other():
    logits, weights = torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 3.0])
    target, half = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.5]])  # of mixup at 0.5, the other image unlabelled
    for objective in (CrossEntropy(0.0), CrossEntropy(0.1), CrossEntropy(0.1, weights)):
        assert objective.of(logits, half).item() == pytest.approx(objective.of(logits, target).item() / 2)


@pytest.mark.parametrize("wanted", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_images_are_mixed_as_their_targets_are(wanted: dict[str, float]):
    """Every image is all of one level, that of its class, so levels tell shares and whole pixels tell mixup from CutMix."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def objective(network: ResNet, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((images, targets))
        return torch.zeros(())

    learner = Learner(
        tiny_network(), objective, Preprocessing(size=16, mean=(0, 0, 0), std=(1, 1, 1)), QUICK.model_copy(update=wanted)
    )
    labels = torch.arange(8) % 2
    pixels = (255 * labels).to(torch.uint8).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    for number in range(40):
        learner.training_step((pixels, labels), number)
    whole = [bool(((images == 0) | (images == 1)).all()) for images, _ in seen if (images != seen[0][0]).any()]
    assert set(whole) == {name == "cutmix" for name in wanted}
    assert len({round(float(targets[0, 0]), 3) for _, targets in seen}) > 10
    for images, targets in seen:
        torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets[:, 1], atol=1e-5, rtol=0)


def test_logits_are_float32_in_half_precision(tmp_path: Path):
    """In bfloat16's 8 bits classes tie, and the validation would not judge what is labelled with."""
    logits: list[torch.Tensor] = []

    class Seen(CrossEntropy):
        def of(self, given: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits.append(given.detach())
            return super().of(given, targets)

    def judged(module: torch.nn.Module, _: object, given: torch.Tensor) -> None:
        logits.append(given.detach())

    network = tiny_network()
    network.register_forward_hook(judged)  # training and validation
    trained(
        tmp_path,
        QUICK.model_copy(update={"epochs": 1, "precision": "bfloat16"}),
        network=network,
        objective=Seen(0.1),
    )
    assert {given.dtype for given in logits} == {torch.float32}
    assert not any(torch.equal(given, given.bfloat16().float()) for given in logits)


def test_stops_early_and_keeps_the_best_epoch(tmp_path: Path):
    wrong = mislabelled(40)  # three batches
    result, _ = trained(tmp_path, QUICK.model_copy(update={"epochs": 12, "patience": 2}), data=(pictures(64), wrong))
    assert result.stopped_early
    assert result.best.number == len(result.epochs) - 2
    assert result.best.accuracy == max(epoch.accuracy for epoch in result.epochs)
    assert metrics(result) == {
        **{"accuracy": result.best.accuracy, "validation_loss": result.best.validation_loss},
        **{"epoch": len(result.epochs) - 2, "epochs": len(result.epochs)},
    }
    network = tiny_network()
    network.load_state_dict(result.weights)
    assert accuracy(network, wrong) == pytest.approx(result.best.accuracy)


@pytest.mark.parametrize(
    "changes", [{"precision": "bfloat16"}, {"optimizer": "sgd", "learning_rate": 0.05}, {"mixup": 0.2}, {"cutmix": 1.0}]
)
def test_other_ways_of_training_learn_too(tmp_path: Path, changes: dict[str, object]):
    assert trained(tmp_path, Training.model_validate(QUICK.model_dump() | {"epochs": 5, **changes}))[0].best.accuracy > 0.9


def test_of_epochs_that_are_right_as_often_the_surest_is_kept(tmp_path: Path):
    result, _ = trained(tmp_path, QUICK.model_copy(update={"epochs": 6, "patience": 6}))
    equal = [epoch for epoch in result.epochs if epoch.accuracy == result.best.accuracy]
    assert len(equal) > 1, "nothing to choose from"
    assert result.best == min(equal, key=lambda epoch: epoch.validation_loss)
    assert result.best.validation_loss < equal[0].validation_loss
    network = tiny_network()
    network.load_state_dict(result.weights)
    assert loss_of(network, pictures(16, first=64)) == pytest.approx(result.best.validation_loss, abs=1e-5)


def test_the_epoch_to_keep_has_most_images_right_and_of_as_many_the_smaller_loss():
    """In several batches, the last of them smaller: the loss is the mean over images, and one image more outweighs any loss."""
    labels = torch.arange(37) % 2
    learner = Learner(tiny_network(), CrossEntropy(0.0), SMALL, QUICK)
    said: dict[str, float] = {}
    learner.log = lambda name, value: said.update({name: float(value)})

    def score(right: int, sure: float) -> float:
        guess = torch.where(torch.arange(37) < right, labels, 1 - labels)
        logits = sure * torch.nn.functional.one_hot(guess, 2).float()
        parts = iter(logits.split(16))
        learner.network = torch.nn.Module()
        learner.network.forward = lambda _: next(parts)
        learner.loss.update(1.0)
        for some in labels.split(16):
            learner.validation_step((torch.zeros(len(some), 3, 16, 16, dtype=torch.uint8), some), 0)
        learner.on_validation_epoch_end()
        assert said["accuracy"] == pytest.approx(right / 37)
        assert said["validation_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        return said["score"]

    assert score(20, 0.1) < score(21, 9.0) < score(21, 5.0) < score(22, 20.0) < score(37, 0.1) < score(37, 9.0)


def test_what_is_told_of_the_best_epoch_is_what_its_weights_came_to(tmp_path: Path):
    """A kill between the two checkpoints of an epoch may leave the weights of one that came again with other figures."""
    first, _ = trained(tmp_path)
    lost = read(tmp_path / BEST)
    lost[MEASURED] |= {"number": 2, "accuracy": 0.75, "loss": 0.5, "validation_loss": 0.25}
    torch.save(lost, tmp_path / BEST)
    again, _ = trained(tmp_path)
    assert (again.best.number, again.best.accuracy, again.best.loss, again.best.validation_loss) == (2, 0.75, 0.5, 0.25)
    assert again.epochs == first.epochs


def test_another_objective_is_used(tmp_path: Path):
    def only_first(network: ResNet, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.int64))

    result, _ = trained(tmp_path, objective=only_first)
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert result.epochs[-1].accuracy == 0.5


@pytest.mark.parametrize("frozen", [{}, {"freeze": 1}, {"freeze": 1, "unfreeze_epoch": 2}])
def test_the_average_of_the_weights_is_what_validates_and_is_kept(tmp_path: Path, frozen: dict[str, int]):
    """Of statistics too; the steps themselves are those of a training without it."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(CrossEntropy):
        def forward(self, network: ResNet, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.append({name: value.clone() for name, value in network.state_dict().items()})
            return super().forward(network, images, targets)

    how = QUICK.model_copy(update={"patience": 3, **frozen})
    result, _ = trained(tmp_path / "a", how.model_copy(update={"ema": 0.7}), objective=Watched(0.1))
    trained(tmp_path / "b", how)
    state, plain = (read(tmp_path / name / "last.ckpt")["state_dict"] for name in "ab")
    after = [*seen[1:], {name: state[f"network.{name}"] for name in seen[0]}]
    expected = after[0]
    for steps, now in enumerate(after[1:], 1):
        decay = min(0.7, (1 + steps) / (10 + steps))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()}
    assert len(after) == 24
    for name, value in expected.items():
        assert torch.equal(state[f"network.{name}"], plain[f"network.{name}"])
        averaged = state[f"average.module.{name}"]
        if averaged.is_floating_point():
            torch.testing.assert_close(averaged, value)
    network, held = tiny_network(), pictures(16, first=64)
    network.load_state_dict(result.weights)
    assert loss_of(network, held) == pytest.approx(result.best.validation_loss, abs=1e-5)
    network.load_state_dict({name: plain[f"network.{name}"] for name in seen[0]})
    assert loss_of(network, held) != pytest.approx(result.best.validation_loss, abs=1e-3)
    if frozen == {"freeze": 1}:
        stem = {name for name in seen[0] if "embedder" in name and "tracked" not in name}
        assert stem
        assert all(torch.equal(result.weights[name], seen[0][name]) for name in stem)


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "learning_rate": 0.05}])
def test_frozen_parts_stay_until_they_are_thawed(tmp_path: Path, optimizer: dict[str, object]):
    before = tiny_network().state_dict()

    def moved(folder: Path) -> set[str]:
        """Parts whose weights or statistics the last epoch left changed."""
        state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        names = {name for name in before if not torch.equal(before[name], state[f"network.{name}"])}
        return {"".join(re.findall(r"embedder|stages\.\d|classifier", name)[:1]) for name in names}

    how = QUICK.model_copy(update=optimizer)
    trained(tmp_path / "a", how.model_copy(update={"freeze": 2}))
    assert moved(tmp_path / "a") == {"stages.1", "classifier"}
    trained(tmp_path / "b", how.model_copy(update={"freeze": 2, "unfreeze_epoch": 2}))
    assert moved(tmp_path / "b") == {"embedder", "stages.0", "stages.1", "classifier"}


def test_norms_and_biases_do_not_decay():
    model = tiny_network()
    decayed, spared = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith(("convolution.weight", "classifier.1.weight")) for p in decayed["params"])
    assert all("normalization" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_rate_climbs_then_falls():
    rate = warmup_cosine(warmup=4, total=20)
    rates = [rate(step) for step in range(20)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[4] == 1.0
    assert 0 < rates[-1] < 0.05


def test_balanced_weights_count_one_on_average():
    weights = balanced_weights([90, 10, 0])
    assert weights.tolist() == pytest.approx([100 / 180, 100 / 20, 0])
    assert float((weights * torch.tensor([90.0, 10.0, 0.0])).sum() / 100) == pytest.approx(1)


def test_a_diverging_training_says_what_to_do(tmp_path: Path):
    settings = QUICK.model_copy(update={"learning_rate": 1e30, "epochs": 5, "gradient_clip": 0.0})
    with pytest.raises(ModelError, match=r"loss became nan; required: a finite number\. Lower training.learning_rate"):
        trained(tmp_path, settings)


def test_fewer_images_than_a_batch(tmp_path: Path):
    with pytest.raises(JobError, match=r"7 images to train on .* a step of 8 and one\. Give .* lower training\.batch_size\.$"):
        trained(tmp_path, data=(pictures(7), pictures(2)))
    with pytest.raises(JobError, match=r"16 images to train on .* a step of 24 and one\. .* or training\.accumulate\.$"):
        trained(tmp_path, QUICK.model_copy(update={"accumulate": 3}), data=(pictures(16), pictures(2)))


def test_settings_refuse_what_cannot_be():
    for wrong in (
        {"epochs": 0},
        {"batch_size": 1},
        {"ema": 1.0},
        {"label_smoothing": 1.0},
        {"epoch": 3},
        {"augment": {"crop": [0.1, 2]}},
        {"unfreeze_epoch": 2},
        {"freeze": 1, "unfreeze_epoch": 9, "epochs": 8},
    ):
        with pytest.raises(ValidationError):
            Training.model_validate(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said():
    with pytest.raises(UnfitError, match="torch sees no CUDA device"):
        Worker.here(Workers(gpus_per_worker=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [{}, {"ema": 0.9}])
def test_training_on_a_gpu_in_float16(tmp_path: Path, more: dict[str, float]):
    assert trained(tmp_path, QUICK.model_copy(update=more), worker=Worker("gpu"))[0].best.accuracy > 0.9
