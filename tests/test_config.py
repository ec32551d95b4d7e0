"""Recipes: one form of error, defaults merged, and a file that says everything."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import config, critic, game, methods, noise
from limbeck.ema import Average
from limbeck.methods.pid import PID
from limbeck.noise import Karras
from limbeck.optimizer import Optimizer
from limbeck.teaching import Classification, Denoising


def resolve(table: dict[str, Any]) -> config.Recipe:
    return config.resolve({"method": "pid", **table}, methods.METHODS)


def dotted(**keys: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in keys.items():
        config.set_dotted(table, key.replace("__", "."), value)
    return table


def message(table: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(table)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("stpes", "steps"),
        ("evry.save", "every"),
        ("every.sav", "every.save"),
        ("method.metrc", "method.metric"),
        ("method.levels.sigma_mx", "method.levels.sigma_max"),
        ("optimizer.generator.rl", "optimizer.generator.lr"),
        ("optimizer.genrator.lr", "optimizer.generator"),
        ("evaluate.sample", "evaluate.samples"),
        ("ema.halflife", "ema.half_life"),
        ("microbatches", "micro_batches"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(key: str, meant: str) -> None:
    table: dict[str, Any] = {"method": {"name": "pid"}}
    config.set_dotted(table, key, 1)
    line = message(table)
    wrong = {"evry.save": "evry", "optimizer.genrator.lr": "optimizer.genrator"}.get(key, key)
    assert line.startswith(f"{wrong}: unknown ") and line.endswith(f", perhaps you meant {meant}")


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"levels": {"sdt": 1}}, "method.levels.sdt: unknown key, perhaps you meant method.levels.std"),
        ({"levels": {"std": -1}}, "method.levels.std: must be positive and the mean finite, got mean -1.2 and std -1"),
        ({"levels": {"stop": 7}}, "method.levels.stop: must lie in (0, 1], got 7"),
        (
            {"levels": {"qqqq": 1}},
            "method.levels.qqqq: unknown key; expected one of sigma_min, sigma_max, rho, stop, mean, std, power",
        ),
        ({"game": {"fake_stps": 2}}, "method.game.fake_stps: unknown key, perhaps you meant method.game.fake_steps"),
        (
            {"game": {"adversarial": {"weigt": 1}}},
            "method.game.adversarial.weigt: unknown key, perhaps you meant method.game.adversarial.weight",
        ),
        (
            {"game": {"adversarial": {"weight": -1}}},
            "method.game.adversarial.weight: must be finite and not negative, got -1.0",
        ),
        ({"game": {"calls": 0}}, "method.game.calls: must be at least 1, got 0"),
    ],
)
def test_mistakes_in_tables_of_a_method(table: dict[str, Any], line: str) -> None:
    assert message({"method": {"name": "diff_instruct", **table}}) == line


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (methods.METHODS["sim"](distance="l2"), "distance"),
        (methods.METHODS["dmd"](distance="lpips"), "distance"),
        (methods.METHODS["f_distill"](weight="l1"), "weight"),
        (methods.METHODS["uni_instruct"](normalizer="L1"), "normalizer"),
        (methods.METHODS["sid"](game=game.Game(adversarial=critic.Adversarial(loss="bse"))), "game.adversarial.loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_objective_made_in_python_is_checked_as_a_recipe_is(method: Any, field: str) -> None:
    assert message({"method": method}).startswith(f"method.{field}: ")


def test_one_key_of_a_table_leaves_the_rest_as_the_method_has_it() -> None:
    sida = resolve({"method": {"name": "sida", "game": {"fake_steps": 3, "adversarial": {"weight": 0.5}}}}).method
    default = methods.METHODS["sida"]().game
    adversarial = dataclasses.replace(default.adversarial, weight=0.5)
    assert sida.game == dataclasses.replace(default, fake_steps=3, adversarial=adversarial)
    assert resolve({"method": {"name": "sid", "levels": {"std": 1.0}}}).method.levels == noise.LogNormal(-1.2, 1.0)
    other = resolve({"method": {"name": "sida", "game": {"fake_levels": {"power": 2.0}}}}).method.game
    assert other == dataclasses.replace(default, fake_levels=noise.Power(power=2.0))
    assert resolve({"method": {"name": "sid", "game": {"adversarial": {"r1": 1.0}}}}).method.needs_real


def test_a_noise_law_is_the_one_whose_keys_are_given() -> None:
    for table, law in (
        ({"stop": 0.8}, noise.Karras(stop=0.8)),
        ({"mean": -2.0}, noise.LogNormal(-2.0)),
        ({"power": 2.0}, noise.Power(power=2.0)),
    ):
        recipe = resolve({"method": {"name": "diff_instruct", "levels": table}})
        assert recipe.method.levels == law and resolve(config.to_table(recipe)) == recipe


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    assert message(dotted(ema__qqqq=1)) == "ema.qqqq: unknown key; expected one of half_life, ramp"
    assert message({"method": "xyz"}).startswith("method.name: unknown method 'xyz'; expected one of pid")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"), ("steps", 1.5), ("steps", [3]), ("steps", {"a": 1}), ("steps", None), ("steps", math.nan),
        ("steps", "3" * 5000), ("steps", 0), ("steps", -1), ("batch", 0), ("batch", "x"), ("seed", -1),
        ("seed", 2**63), ("threads", 0), ("threads", 10**9), ("keep", 0), ("micro_batches", -1),
        ("stratified", "maybe"), ("stratified", 2), ("precision", "bf16"),
        ("precision.teacher", "int8"), ("precision.teacher", 16), ("compile", "maybe"), ("checkpointing", 3),
        ("clip", 0.0), ("clip", -1.0), ("clip", math.nan), ("clip", math.inf), ("clip", "x"),
        ("teacher", 3), ("data", ["digits"]), ("template", "mlp"), ("template", [1]), ("optimizer", 3),
        ("optimizer.generator", 3), ("optimizer.generator.lr", 0.0), ("optimizer.generator.lr", -1e-3),
        ("optimizer.generator.lr", math.nan), ("optimizer.generator.lr", math.inf), ("optimizer.generator.lr", "fast"),
        ("optimizer.generator.eps", math.nan), ("optimizer.generator.betas", 0.9), ("optimizer.generator.betas", [0.9]),
        ("optimizer.generator.betas", [0.9, 1.0]), ("optimizer.generator.betas", [0.9, math.nan]),
        ("optimizer.generator.betas", [0.9, 0.9, 0.9]), ("optimizer.generator.name", "sgd"),
        ("optimizer.generator.weight_decay", -1.0), ("optimizer.generator.warmup", -1),
        ("optimizer.generator.schedule", "step"), ("ema.half_life", 0), ("ema.half_life", math.inf),
        ("ema.half_life", math.nan), ("ema.ramp", -0.1), ("ema", 3), ("every", 3), ("every.save", -1),
        ("every.log", "x"),
        ("every.log", 1.5), ("evaluate.samples", 1), ("evaluate.draws", 0), ("evaluate.seed", -1),
        ("evaluate.teacher_steps", 1), ("evaluate.quantize", "perhaps"), ("evaluate.data", 3),
        ("method.N", 1), ("method.N", "x"), ("method.metric", "l3"), ("method.metric", "features"),
        ("method.features", "digits"), ("method.last_index", "wrap"), ("method.gradient", None), ("method.levels", 3),
        ("method.levels.sigma_min", -1.0), ("method.levels.sigma_min", 100.0), ("method.levels.sigma_max", math.nan),
        ("method.levels.sigma_max", math.inf), ("method.levels.rho", 0.0), ("method.levels.stop", 1.5),
        ("method.levels.stop", "x"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(key: str, value: object) -> None:
    table: dict[str, Any] = {"method": {"name": "pid"}}
    config.set_dotted(table, key, value)
    line = message(table)
    # a pair of values that do not fit is reported under one of the two
    same = {"method.metric": "method.features"} if value == "features" else {}
    if key.startswith("method.levels.sigma"):
        same = {key: "method.levels.sigma_min"}
    assert line.startswith((f"{same.get(key, key)}: ", f"{key}.1: is missing")), line
    assert len(line) < 300


def test_micro_batches_cannot_exceed_the_batch() -> None:
    assert message({"batch": 4, "micro_batches": 5}) == "micro_batches: cannot exceed the batch of 4, got 5"


def test_a_single_value_has_no_fields() -> None:
    table = dotted(every__save=3)
    with pytest.raises(ValueError, match=r"^every\.save\.x: every\.save is a single value"):
        config.set_dotted(table, "every.save.x", 1)


def test_long_and_many_lined_values_are_shortened() -> None:
    assert len(message({"steps": "9" * 10_000})) < 200
    assert len(message({"steps": list(range(10_000))})) < 200
    assert len(message({"steps": "a\nb\n"})) < 200


def test_keys_that_are_no_strings() -> None:
    tables: list[dict[Any, Any]] = [
        {1: 2}, {"every": {1: 2}}, {"optimizer": {1: {}}}, {"optimizer": {"generator": {1: 2}}}, {"template": {1: 2}},
    ]  # fmt: skip
    for table in tables:
        message(table)


def test_the_defaults_of_optimizers_are_merged_key_by_key() -> None:
    default = PID().optimizers()["generator"]
    assert resolve({}).optimizer == {"generator": default}
    partial = resolve(dotted(optimizer__generator__lr=3e-4)).optimizer["generator"]
    assert partial == dataclasses.replace(default, lr=3e-4)
    taught = config.resolve(
        {"method": "denoising", "data": "digits", "optimizer": {"denoiser": {"warmup": 7}}}, config.TEACHING
    )
    # the method's values, not the dataclass's
    assert taught.optimizer["denoiser"] == dataclasses.replace(Denoising().optimizers()["denoiser"], warmup=7)
    assert taught.optimizer["denoiser"] != Optimizer(warmup=7)


def test_values_may_be_text() -> None:
    """The command line gives every value as text."""
    recipe = resolve(
        dotted(
            steps="300", stratified="true", clip="1.5", optimizer__generator__lr="1e-4", every__save="7",
            optimizer__generator__betas=["0", "0.9"], evaluate__quantize="false",
        )
        | {"method": {"name": "pid", "N": "35", "levels": {"sigma_max": "40"}}}
    )  # fmt: skip
    assert (recipe.steps, recipe.stratified, recipe.clip, recipe.every.save) == (300, True, 1.5, 7)
    assert recipe.optimizer["generator"].betas == (0.0, 0.9) and recipe.evaluate.quantize is False
    assert recipe.method == PID(N=35, levels=Karras(sigma_max=40.0))


def test_resolve_does_not_change_its_argument() -> None:
    table = {"method": {"name": "pid", "N": 10}, "optimizer": {"generator": {"lr": 1e-4}}}
    config.resolve(table, methods.METHODS)
    assert table == {"method": {"name": "pid", "N": 10}, "optimizer": {"generator": {"lr": 1e-4}}}


def test_an_objective_may_be_given_as_it_is() -> None:
    method = PID(N=12)
    assert resolve({"method": method}).method is method


RECIPES: list[tuple[dict[str, Any], dict[str, type]]] = [
    ({"method": "pid", "teacher": "exact:ring8"}, methods.METHODS),
    (
        {
            "method": {"name": "pid", "N": 12, "levels": {"sigma_max": 20, "rho": 3.5}, "metric": "huber"},
            "teacher": 'a "quoted" \\ path/ü.toml', "template": {"network": "mlp", "width": 8, "lists": [1, 2.5, "x"]},
            "optimizer": {"generator": {"betas": [0, 0.9], "schedule": "linear"}}, "clip": 0.1 + 0.2, "threads": 2,
            "ema": {"half_life": 1e5}, "every": {"save": 3}, "evaluate": {"draws": 2, "quantize": False},
            "seed": 2**63 - 1,
        },
        methods.METHODS,
    ),
    ({"method": {"name": "pid", "metric": "features", "features": "digits"}, "teacher": "digits"}, methods.METHODS),
    ({"method": "denoising", "data": "digits", "stratified": True}, config.TEACHING),
    ({"method": {"name": "classification", "width": 4, "noise": 0}, "data": "x.npz"}, config.TEACHING),
]  # fmt: skip


@pytest.mark.parametrize(("table", "known"), RECIPES)
def test_a_recipe_survives_its_file(table: dict[str, Any], known: dict[str, type]) -> None:
    """resolve -> to_table -> TOML -> resolve gives the same recipe and the same table."""
    recipe = config.resolve(table, known)
    text = config.dump_toml(config.to_table(recipe))
    again = config.resolve(tomllib.loads(text), known)
    assert again == recipe
    assert config.to_table(again) == config.to_table(recipe)
    assert config.differences(tomllib.loads(text), config.to_table(recipe)) == []


def test_the_file_says_everything() -> None:
    """Defaults are written out, so that a later version with other defaults cannot change what a file means."""
    table = config.to_table(resolve({"teacher": "exact:ring8"}))
    assert table["method"] == {
        "name": "pid", "N": 250, "levels": {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "stop": 1.0},
        "metric": "l2", "last_index": "flip", "gradient": "both",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(Optimizer)} == table["optimizer"]["generator"].keys()
    assert {f.name for f in dataclasses.fields(Average)} == table["ema"].keys()
    assert {f.name for f in dataclasses.fields(config.Every)} == table["every"].keys()


def test_none_is_left_out() -> None:
    recipe = resolve({"clip": None, "template": {"network": "mlp", "width": None}})
    table = config.to_table(recipe)
    assert "clip" not in table and table["template"] == {"network": "mlp"}
    assert tomllib.loads(config.dump_toml(table)) == table


def test_an_object_is_written_by_its_class() -> None:
    assert config.plain({"features": object(), "pair": (1, 2)}) == {"features": "<builtins.object>", "pair": [1, 2]}


def test_differences() -> None:
    a = config.to_table(resolve({"method": {"name": "pid", "N": 10}}))
    b = config.to_table(
        resolve({"method": {"name": "pid", "N": 11}, "clip": 1.0, "optimizer": {"generator": {"lr": 1}}})
    )
    assert config.differences(a, a) == []
    assert config.differences(a, b) == ["clip", "method.N", "optimizer.generator.lr"]
    assert config.differences(b, a) == ["clip", "method.N", "optimizer.generator.lr"]
    assert config.differences({"x": 1}, {"x": {"y": 1}}) == ["x"]
    assert config.differences({"x": 1}, {"x": 1.0}) == []


def test_method_names() -> None:
    assert config.method_name(PID()) == "pid"
    assert config.method_name(Denoising()) == "denoising"
    assert config.method_name(Classification()) == "classification"
    assert config.method_name(Karras()) == "limbeck.noise:Karras"


FOREIGN = ("os:system", "antigravity:fly", "limbeck.methods.pid:PID", "builtins:exec", ":", ".:x", "nowhere:x", "a:b:c")


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("as_table", [True, False])
def test_foreign_methods_are_refused_in_files(name: str, as_table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(target: str) -> None:
        raise AssertionError(f"imported {target}")

    known = dict(methods.METHODS)
    monkeypatch.setattr(methods, "resolve", imported)
    with pytest.raises(ValueError, match="names code") as caught:
        config.resolve({"method": {"name": name} if as_table else name}, known)
    assert str(caught.value).startswith("method.name: ")


@pytest.mark.parametrize("name", [n for n in FOREIGN if not n.endswith((":PID", ":fly"))])
def test_foreign_methods_that_are_none(name: str) -> None:
    """Given by the caller, a name is looked up, and must be an objective; a function of that name is not called."""
    with pytest.raises(ValueError, match=r"^method\.name: "):
        config.resolve({"method": name}, methods.METHODS, foreign=True)


def test_a_foreign_method_from_the_caller() -> None:
    recipe = config.resolve({"method": {"name": "limbeck.methods.pid:PID", "N": 9}}, methods.METHODS, foreign=True)
    assert recipe.method == PID(N=9)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"N": 3}, {"name": None}, {"name": 3}, {"name": ["pid"]}])
def test_a_method_without_a_name(value: object) -> None:
    assert message({"method": value}).startswith("method.name: m")


@pytest.mark.parametrize("content", [b"steps = = 3", b"\xff\xfe", b"[a]\n[a]\n", b"steps = 1\nsteps = 2\n"])
def test_unreadable_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable TOML file") as caught:
        config.read_toml(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a readable TOML file"):
        config.read_toml(tmp_path)


# Fuzz: the keys are those of recipes, so that the values reach every field.

CLASSES: tuple[type, ...] = (config.Recipe, config.Every, config.Evaluation, Average, Optimizer, PID, Karras)
WORDS = sorted({f.name for cls in CLASSES for f in dataclasses.fields(cls)} | {"name", "generator", "network", "", "."})
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.binary(max_size=3), st.dates(),
    st.sampled_from(["pid", "mlp", "l2", "adam", "digits", "os:system", "1", "nan"]), st.lists(st.floats(), max_size=3),
)  # fmt: skip
NESTED = st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from(WORDS), inner, max_size=4), max_leaves=8)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(WORDS), NESTED, max_size=3), st.booleans())
def test_fuzz(table: dict[str, Any], named: bool) -> None:
    """Any table is either a recipe, which survives its file, or one line of ValueError."""
    if named:
        method = table.get("method")
        table = {**table, "method": {**(method if isinstance(method, dict) else {}), "name": "pid"}}
    try:
        recipe = config.resolve(table, methods.METHODS)
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and ": " in str(error)
        return
    written = config.to_table(recipe)
    assert tomllib.loads(config.dump_toml(written)).keys() == written.keys()
    again = config.resolve(tomllib.loads(config.dump_toml(written)), methods.METHODS)
    assert repr(config.to_table(again)) == repr(config.to_table(config.resolve(written, methods.METHODS)))  # NaN != NaN


@pytest.mark.parametrize(
    ("levels", "line"),
    [
        ({"sigma_mx": 1.0}, "method.levels.sigma_mx: unknown key, perhaps you meant method.levels.sigma_max"),
        ({"meen": 1.0}, "method.levels.meen: unknown key, perhaps you meant method.levels.mean"),
        ({"sigma_min": 3.0, "sigma_max": 1.0}, "method.levels.sigma_min: must satisfy 0 < sigma_min < sigma_max"),
        ({"std": -1.0}, "method.levels.std: must be positive"),
        ({"power": "two"}, "method.levels.power: input should be a valid number"),
    ],
)
def test_one_of_several_laws_is_chosen_by_its_keys(levels: dict[str, Any], line: str) -> None:
    assert message({"method": {"name": "diff_instruct", "levels": levels}}).startswith(line)


@pytest.mark.parametrize("levels", [{"mean": -2.0, "std": 1.0}, {"sigma_min": 0.1, "sigma_max": 2.0, "power": 1.5}])
def test_laws_survive_a_file(levels: dict[str, float]) -> None:
    recipe = resolve({"method": {"name": "diff_instruct", "levels": levels, "game": {"fake_levels": levels}}})
    assert dataclasses.asdict(recipe.method.levels) == levels
    assert resolve(tomllib.loads(config.dump_toml(config.to_table(recipe)))) == recipe
