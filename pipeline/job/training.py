"""What is asked of a training, frozen pydantic models like `spec.Job`: finetune and distill jobs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.job.fields import ClassName, Word
from pipeline.job.quantity import Count, Fraction, Model, Positive, between, in_percent
from pipeline.job.recipe import Label, Preparation, Start, check_label
from pipeline.model.preprocessing import Preprocessing, Resample
from pipeline.spec import Input

Part = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]


def _alpha(value: float) -> float:
    if value and not 0.01 <= value <= 1000:  # below, torch's float32 draws halves alone, where next to nothing should be mixed
        raise ValueError("0, or 0.01 to 1000")
    return value


Alpha = Annotated[NotNegative, AfterValidator(_alpha)]


class RandomNetwork(Model):
    """A network of random weights, where there is no artifact to begin from."""

    depth: Literal[18, 34, 50, 101, 152] = 18
    """Layers of the ResNet."""
    stem: Literal["standard", "small"] = "standard"
    """standard: 7 × 7 convolution of stride 2 and pooling, for 100 pixels and more; small: 3 × 3 of stride 1, for 32 or 64."""


class PreprocessingOverride(Model):
    """Where the preprocessing differs from the artifact's, or from torchvision's (256 → 224 bilinear) for a random start."""

    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Edge of the square that the model sees, pixels; 224 for a random start."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the resized shortest edge that the crop keeps."""
    resample: Resample | None = None
    """Filter of the antialiased resize."""
    mean: Triple | None = None
    """Mean of R, G, B on the scale 0..1."""
    std: Triple | None = None
    """Standard deviation of R, G, B on the scale 0..1."""

    def over(self, base: Preprocessing) -> Preprocessing:
        """`base` with what is set here in its place."""
        changed = self.model_dump(exclude_none=True)
        return Preprocessing(**{name: changed.get(name, getattr(base, name)) for name in base.__slots__})


class Data(Model):
    """Labelled images to train on and to choose the best epoch by."""

    train: Input
    """Images to train on. Every worker holds all of them, encoded, 11 GB for 100,000 photographs of 110 kB: in memory where they
    fit into half of what is free, else in a file beside the checkpoints. What fits into neither is refused after the first
    shards."""
    validation: Input | None = None
    """Images that choose the best epoch; when absent, `validation_share` of `train`, never trained on."""
    validation_share: Annotated[Fraction, between(in_percent, "0.01%", "99.99%")] = 0.1
    """Without `validation`: the share of every class that is held back from training. An image's bytes decide, so when shards
    are added nearly all images that were held back still are."""
    label: Label | None = "cls"
    """Sidecar or column with the label: a class name, or its number in `classes`. For loose images `folder`: the name of each
    one's folder. For distill also null: there are no labels."""
    label_key: Word | None = None
    """Key of the class in the label, where that is a JSON object, as a sidecar of img2dataset is, or a struct."""
    classes: tuple[ClassName, ...] = ()
    """Class names in the order of their numbers. Absent: the model's, if the labels are just those; else those found, sorted."""

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        for wanted in filter(None, (self.train, self.validation)):
            check_label(self.label, self.label_key, wanted)
        return self


class Augment(Model):
    """Random changes of the training images; every image draws its own, anew in every epoch."""

    crop: tuple[Part, Part] = (0.35, 1.0)
    """Range of the area that a random crop keeps before it is resized; [1, 1] keeps all of it."""
    shift: Annotated[int, Field(ge=0, le=4096)] = 0
    """Move the crop by up to so many pixels in each direction; what is empty then is black. 4 is usual for images of 32."""
    flip: bool = True
    """Mirror half of the images left to right; wrong for digits, letters and signs."""
    jitter: Part = 0.0
    """Strength of random changes of brightness, contrast and saturation."""
    trivial: bool = False
    """TrivialAugment (arXiv 2103.10158): one more change of each image, drawn from fourteen of colour and shape, and its strength
    drawn too. Turns by up to 135° are among them."""
    erase: Part = 0.0
    """Share of the images in which a random rectangle, 2 to 33 % of the area, is painted over in the mean colour."""


class Training(Model):
    """How to train. The defaults suit a fine-tuning; a random start wants more epochs."""

    epochs: Count = 12
    """Passes over the training images, at most."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images that one worker computes at a time, two at least, for batch normalisation is done over them. A step is workers.count
    × accumulate such batches. Images that make no whole step are left out of an epoch, other ones each time."""
    accumulate: Count = 1
    """Batches whose gradients make one step, for steps of more images than fit into memory."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum of 0.9."""
    learning_rate: Positive = 1e-3
    """Highest rate, after the warm-up; for SGD 0.1 is usual. It is taken as it is: nothing scales it by batch_size, accumulate or
    workers.count."""
    weight_decay: NotNegative = 0.05
    """Decay of convolution and classifier weights; norms and biases have none. For SGD 5e-4 is usual."""
    warmup_epochs: NotNegative = 1.0
    """Epochs in which the rate climbs, no more than `epochs`; then it falls as half a cosine."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target spread over all classes."""
    mixup: Alpha = 0.0
    """Alpha of mixup (arXiv 1710.09412); 0 is off, 0.2 is usual, 0.01 the least."""
    cutmix: Alpha = 0.0
    """Alpha of CutMix (arXiv 1905.04899); 0 is off, 1 is usual. With mixup too, every batch has one of them, by lot."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts in inverse proportion to its images."""
    gradient_clip: NotNegative = 1.0
    """Largest norm of a step's gradient; 0 is off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights, which is then validated and saved in their place. 0 is off; 0.999 is
    usual and looks back some 1,000 steps. After n steps it is (1 + n) / (10 + n) at most, so that the start is forgotten soon."""
    patience: Count = 5
    """Epochs without a better validation accuracy before the training stops."""
    freeze: Annotated[int, Field(ge=0, le=5)] = 0
    """Parts that keep their weights: 1 is the stem, 5 everything but the classifier."""
    unfreeze_epoch: Count | None = None
    """From this epoch on (the first is 1) everything is trained; absent, never."""
    precision: Literal["float32", "float16", "bfloat16"] | None = None
    """Arithmetic; absent: float16 with a scaled gradient on a GPU, float32 on a CPU. bfloat16 is slow on CPUs that have none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the random start, the order of images, the augmentation."""
    augment: Augment = Augment()
    """Random changes of the training images."""

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if self.unfreeze_epoch is not None and not self.freeze:
            raise ValueError(
                "unfreeze_epoch is set and freeze is 0; required: 1 to 5, what is to thaw. Set freeze, or leave it out"
            )
        if self.unfreeze_epoch is not None and self.unfreeze_epoch > self.epochs:
            raise ValueError(f"unfreeze_epoch is {self.unfreeze_epoch} of {self.epochs} epochs; required: one of these. Lower it")
        if self.warmup_epochs > self.epochs:  # the learning rate would never be reached
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; required: no more. Lower it")
        return self


class Workers(Model):
    """Who trains. More than one worker is data parallel, on Ray Train."""

    count: Count = 1
    """Processes that train together, on one machine or on many."""
    cpus_per_worker: Count | None = None
    """CPUs a worker takes, and its threads. Absent: a single worker takes the whole machine, each of several takes one."""
    gpus_per_worker: Literal[0, 1] = 0
    """GPUs a worker takes; 1 needs CUDA, there is no fall back to the CPU."""
    loaders: Annotated[int, Field(ge=0)] = 0
    """Processes beside a worker that decode and augment. 0: the worker does it between its steps, right on a few CPUs."""


class _Trains(Preparation):
    data: Data
    """Labelled images."""
    network: RandomNetwork = RandomNetwork()
    """The network of a random start; ignored when an artifact is given."""
    preprocessing: PreprocessingOverride = PreprocessingOverride()
    """What the model is to see, where that differs from what the artifact prescribes."""
    training: Training = Training()
    """How to train."""
    workers: Workers = Workers()
    """Who trains."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.training.precision == "float16" and not self.workers.gpus_per_worker:
            raise ValueError("training: precision is float16, which needs a GPU. Set workers.gpus_per_worker, or take bfloat16")
        low, high = self.training.augment.crop
        if not 0 < low <= high:
            raise ValueError(f"training.augment.crop is {low} to {high}; required: over 0, the smaller first. Turn them round")
        if len(set(self.data.classes)) < len(self.data.classes):
            raise ValueError("data.classes names a class twice; required: every class once. Leave one out")
        return self


class FinetuneJob(_Trains):
    """Train a model on labelled images: from an artifact, or from a random start."""

    kind: Literal["finetune"]
    """What the job does."""
    model: Start | None = None
    """The artifact to begin from; its classifier is replaced unless the classes are the same. Absent: a random start."""

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.data.label is None:
            raise ValueError(
                "data.label is null, so there is nothing to learn; required: the name of the labels. Set it, or distill"
            )
        return self


class Distillation(Model):
    """How the student learns from the teacher (arXiv 1503.02531)."""

    temperature: Positive = 4.0
    """Divides the logits of both before they are compared."""
    alpha: Part = 0.9
    """Weight of the teacher's answer; the rest is the label's. Unlabelled images have only the teacher's."""
    features: NotNegative = 0.0
    """Weight of the squared distance of the normalised embeddings; 0 is off."""
    baseline: bool = True
    """Train the same student without the teacher too, so that the report can say what the teacher is worth."""


class DistillJob(_Trains):
    """Train a student on the answers of a teacher, with or without labels."""

    kind: Literal["distill"]
    """What the job does."""
    teacher: Start
    """The artifact that answers."""
    student: Start | None = None
    """The artifact to begin from. Absent: a random start."""
    distillation: Distillation = Distillation()
    """How the student learns."""


TrainingJob = FinetuneJob | DistillJob
