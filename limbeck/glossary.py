"""The words of a report's page: what each metric means and misses, what each method does, how a curve is read."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """What the page says about a metric. `aim` is "floor" where the score of real data is best, from either side."""

    name: str
    aim: Literal["lower", "higher", "floor"]
    meaning: str
    blind: str
    percent: bool = False
    echoes: str = ""  # name of the metric that it only restates

    @property
    def about(self) -> str:
        return f"{self.meaning} Blind to {self.blind}"


METRICS: dict[str, Metric] = {
    "fid": Metric(
        "FID",
        "lower",
        "Fréchet distance in the features of the Inception network that the literature's numbers refer to.",
        "what Inception's features ignore, and memorised images. Compare only at the same number of images.",
    ),
    "fd_feature": Metric(
        "Fréchet distance",
        "lower",
        "Distance between the mean and covariance of a network's features on generated and on real images.",
        "what the features ignore, and memorised images. Compare only for the same features and number of images.",
    ),
    "fd_feature_rest": Metric(
        "Fréchet distance to the rest",
        "lower",
        "The same distance to one random half of the real images: the half that the choice of the best step never saw.",
        "what the features ignore, and memorised images.",
    ),
    "fd_feature_infinity": Metric(
        "Fréchet distance, extrapolated",
        "lower",
        "The same distance, extrapolated from subsets to infinitely many generated images; noisy, may be below zero.",
        "what the features ignore, memorised images, and the chance in the choice of the real images.",
    ),
    "fd_pixel": Metric(
        "Fréchet distance, pixels",
        "lower",
        "The same distance on raw pixels, where no feature network can flatter a model.",
        "everything but the mean and covariance of the pixels, hence to fine detail.",
    ),
    "kid": Metric(
        "Kernel distance",
        "lower",
        "Kernel distance between the features of generated and of real images; unbiased, so it can fall below zero.",
        "differences beyond the third moments of the features, and memorised images.",
    ),
    "inception_score": Metric(
        "Inception score",
        "higher",
        "How sure a classifier is of each image, and how varied its answers are over all images.",
        "the real data, which it never sees, and variety within a class.",
    ),
    "classifier_score": Metric(
        "Classifier score",
        "higher",
        "The Inception score's formula with another classifier: compare under that classifier only.",
        "the real data, which it never sees, and variety within a class.",
    ),
    "class_accuracy": Metric(
        "Class accuracy",
        "higher",
        "Share of images in which a separate classifier sees the class that was asked for.",
        "variety: one good image per class scores 100 %.",
        percent=True,
    ),
    "class_balance": Metric(
        "Class imbalance",
        "lower",
        "Share of the samples that would have to change class for the classes to be as frequent as they should be.",
        "quality, and to variety within a class.",
        percent=True,
    ),
    "precision": Metric(
        "Precision",
        "higher",
        "Share of generated samples that lie in the neighbourhood of a real one.",
        "missing kinds of samples.",
        percent=True,
    ),
    "recall": Metric(
        "Recall",
        "higher",
        "Share of real samples that lie in the neighbourhood of a generated one.",
        "poor samples, whose neighbourhoods are large.",
        percent=True,
    ),
    "density": Metric(
        "Density",
        "floor",
        "How crowded with real samples the place of a generated sample is; about 1 for real data, above 1 if samples "
        "crowd where the real ones are densest.",
        "missing kinds of samples.",
    ),
    "coverage": Metric(
        "Coverage",
        "higher",
        "Share of real samples with a generated one in their neighbourhood.",
        "stray samples far from all real ones.",
        percent=True,
    ),
    "c2st": Metric(
        "Two-sample test",
        "floor",
        "How often a classifier tells a generated sample from a real one; 50 % is guessing, less means copies.",
        "what neighbours cannot tell in many dimensions.",
        percent=True,
    ),
    "memorisation_share": Metric(
        "Copies",
        "floor",
        "Share of generated samples that lie nearer to one half of the real ones than all but 1 % of the other half; "
        "1 % for new samples, about 50 % for copies of the real ones.",
        "quality, to copies that the features tell apart, and to single copies among many samples.",
        percent=True,
    ),
    "memorisation_ratio": Metric(
        "Distance to real samples",
        "floor",
        "Median distance of a generated sample to the nearest of one half of the real ones, over the other half's; "
        "below 1 hints at copies or at samples that crowd in the middle of the data, above 1 at noise.",
        "which of these it is, and to copies of fewer than half the samples.",
    ),
    "log_density": Metric(
        "Log-density",
        "floor",
        "Mean log-probability (nats) of the samples under the exact density; above the floor, they crowd at the peaks.",
        "missing modes.",
    ),
    "mmd": Metric(
        "MMD",
        "lower",
        "Kernel distance between the samples and exact ones (maximum mean discrepancy).",
        "differences much finer than its narrowest kernel.",
    ),
    "mmd2": Metric(
        "MMD²", "lower", "The square of MMD, as some papers report it.", "what MMD is blind to.", echoes="MMD"
    ),
    "log_mmd2": Metric(
        "log MMD²",
        "lower",
        "Its natural logarithm, which spreads out small differences.",
        "what MMD is blind to; near the floor, chance rules it.",
        echoes="MMD",
    ),
    "sliced_wasserstein": Metric(
        "Sliced Wasserstein distance",
        "lower",
        "How far the samples, or their features, have to move, seen from many directions, to become real ones; in "
        "spreads of the data.",
        "fine structure: mean, scale and outliers lead it.",
    ),
    "held_out_accuracy": Metric(
        "Held-out accuracy",
        "higher",
        "Share of samples, kept out of training, whose class the network names right.",
        "inputs unlike the data.",
        percent=True,
    ),
    "mode_recall": Metric(
        "Modes found",
        "higher",
        "Share of the target's modes that receive at least half the samples due to them.",
        "how samples lie within a mode, and to those outside all modes.",
        percent=True,
    ),
    "mode_outside": Metric(
        "Outside all modes",
        "floor",
        "Share of samples farther than 3 standard deviations from every mode.",
        "missing modes, and how samples lie within one.",
        percent=True,
    ),
    "mode_spread": Metric(
        "Spread within modes",
        "floor",
        "Root-mean-square radius inside the modes over its exact value; below 1 they are too concentrated.",
        "missing modes, and stray samples.",
    ),
}

HEADLINES = (
    "fid",
    "fd_feature",
    "fd_pixel",
    "kid",
    "mmd",
    "mmd2",
    "sliced_wasserstein",
)  # the summary names the first present

AIMS = {"lower": "↓ lower is better", "higher": "↑ higher is better", "floor": "◎ nearest the floor is best"}

# What a comparison calls the columns that are no metrics.
COLUMNS = {"nfe": "network calls", "ms_per_image": "ms per image"}

# Names as the papers spell them, with what the method does in one clause.
METHODS: dict[str, tuple[str, str]] = {
    "sds": ("SDS", "a single sample moves along the teacher's score until the teacher finds it likely at every level"),
    "sida": ("SiDA", "SiD, helped by a discriminator on real images that grows out of the fake score"),
    "sim": ("SIM", "the student shrinks a robust distance between the teacher's score and the fake score"),
    "dmd": (
        "DMD",
        "the student moves to where the teacher finds its samples likelier than a fake score does, and keeps to "
        "pairs of noise and teacher samples",
    ),
    "f_distill": (
        "f-distill",
        "as DMD2, with each sample weighted by an f-divergence of the density ratio that a discriminator estimates",
    ),
    "pid": (
        "PID",
        "the student learns the teacher's whole path from noise to sample by satisfying its equation of motion",
    ),
    "diff_instruct": (
        "Diff-Instruct",
        "a second network learns the student's samples, which then move to where the teacher finds them likelier",
    ),
    "sid": ("SiD", "the student shrinks the gap between the teacher's clean estimate and that of the fake score"),
    "uni_instruct": (
        "Uni-Instruct",
        "the student shrinks a chosen f-divergence to the teacher, written as a sum over noise levels",
    ),
    "vardiu": (
        "VarDiU",
        "the student and a guess at its own input are trained together on one bound of the divergence",
    ),
    "vdd": ("VDD", "the student is a mixture of Gaussians, each of which climbs to where the teacher finds it likely"),
    "dmd2": ("DMD2", "the student matches the teacher's distribution, helped by a discriminator on real images"),
}


class Product(NamedTuple):
    """What a run has made, in words; `name` heads its column of scores."""

    name: str
    title: str
    subject: str
    origin: str
    about: str
    verb: str


PRODUCTS: dict[str, Product] = {
    "generator": Product(
        "Student",
        "distilled",
        "generator",
        "distilled from the teacher",
        "A diffusion model turns noise into a sample by calling a neural network many times, each call removing a "
        "little noise. Distillation trains a second network, the student, to do the same work in far fewer calls. "
        "This page shows how close the student comes to its teacher, what that cost, and how to repeat it.",
        "distill",
    ),
    "gan": Product(
        "Generator",
        "trained against a discriminator",
        "generator",
        "trained on",
        "A generator turns noise into a sample by one call of a neural network. This one was trained from data, "
        "against a second network that tells its samples from real ones. "
        "This page shows how close its samples come to real ones, what that cost, and how to repeat it.",
        "teach",
    ),
    "denoiser": Product(
        "Model",
        "a diffusion model",
        "diffusion model",
        "trained on",
        "A diffusion model turns noise into a sample by calling a neural network many times, each call removing a "
        "little noise. This one was trained from data, to be the teacher of faster generators. "
        "This page shows how close its samples come to real ones, what that cost, and how to repeat it.",
        "teach",
    ),
    "classifier": Product(
        "Model",
        "a classifier",
        "classifier",
        "trained on",
        "This network names the class of a sample. Limbeck scores generators by its answers and its inner features. "
        "This page shows how often it is right, what training it cost, and how to repeat it.",
        "teach",
    ),
}

READINGS: dict[str, str] = {
    "loss/generator": (
        "PID's loss falls as the student learns. Losses that compare two scores, and those of GANs, have no meaningful "
        "level: only a sudden jump or a steady drift away says something."
    ),
    "loss/fake": (
        "How well the fake score knows the student's present samples. It should fall, then stay level; "
        "a rise means that the student moves faster than the fake score learns."
    ),
    "loss/generator+posterior": (
        "How badly the posterior guesses the latent, weighted: the posterior's share of the bound. It falls as the "
        "posterior learns, and again as noise levels become smaller while the law of the noise is annealed."
    ),
    "loss/posterior": "How well the input is guessed from the noisy sample. It should fall, then stay level.",
    "loss/discriminator": "Near 0 it has won and teaches the generator little; level in between is a fair contest.",
    "loss": "It should settle; a sudden jump or a steady rise late in the run is a warning.",
    "grad_norm": (
        "The size of the update's gradient before clipping. Even noise is healthy; growing spikes announce divergence, "
        "a flat zero means that nothing is learned."
    ),
}
