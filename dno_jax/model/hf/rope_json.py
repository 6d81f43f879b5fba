"""The rotations that a config.json describes, in the words of transformers 4 and of transformers 5.

transformers 4 writes rope_theta, rope_scaling and, for Gemma 3, rope_local_base_freq; transformers 5 writes
rope_parameters with everything inside, for some families one such object per kind of layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dno_jax.errors import DnoError
from dno_jax.model.config import RopeConfig
from dno_jax.model.hf.family import Family
from dno_jax.model.hf.settings import MAX_NUMBER, shown
from dno_jax.model.rope import longrope_attention_factor, yarn_attention_factor

# rope_type -> (keys that must be there, keys that may)
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "factor", "attention_factor"),
    ),
}
# What Phi-3's first files call longrope.
_OLD_LONGROPE = ("su", "yarn")
# What transformers 4 has beside rope_scaling, not in it.
_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_LAYER_KINDS = ("full_attention", "sliding_attention")


def read_ropes(values: dict[str, Any], family: Family, *, sliding: list[bool], place: str) -> dict[str, Any]:
    """Return the fields of ModelConfig that rotations are made of: rope_theta, ropes, layer_ropes, rotary_dim.

    And query_growth, which stands among them in the file.

    Args:
        values: of config.json, with the family's defaults filled in.
        sliding: whether each layer has a sliding window; where such layers have a rotation of their own, it counts.

    Raises:
        DnoError: a rotation that is not understood, naming the key.
    """
    growth = None
    if family.local_theta is None:
        found, rotary_dim, growth = _one(values, family, place=place)
        ropes, kinds = [found], [0] * len(sliding)
    else:
        ropes, kinds, rotary_dim = _two(values, family, place=place), [int(slides) for slides in sliding], None
    if "no_rope_layers" in values:
        ropes, kinds = [*ropes, RopeConfig("none")], [0 if rotates else 1 for rotates in values["no_rope_layers"]]
    if family.rotates_in_windows and values["sliding_window"] is not None:
        ropes, kinds = [*ropes, RopeConfig("none")], [0 if slides else 1 for slides in sliding]
    if "position_embedding_type" in values:
        kind = values["position_embedding_type"]
        if kind not in (None, "rope", "nope"):
            raise DnoError(f"{place}: position_embedding_type is {kind!r}; supported are rope and nope")
        ropes = ropes if kind == "rope" else [RopeConfig("none")]
    ropes = [ropes[kind] for kind in sorted(set(kinds))] if len(set(kinds)) == 1 else ropes
    if len(set(ropes)) == 1:
        ropes, kinds = ropes[:1], [0] * len(kinds)
    theta = ropes[0].theta or family.theta
    ropes = [replace(rope, theta=None) if rope.theta == theta else rope for rope in ropes]
    return {
        "rope_theta": theta,
        "ropes": tuple(ropes),
        "layer_ropes": tuple(kinds) if len(ropes) > 1 else None,
        "rotary_dim": rotary_dim,
        "query_growth": growth,
    }


def _one(
    values: dict[str, Any], family: Family, *, place: str
) -> tuple[RopeConfig, int | None, tuple[float, int] | None]:
    """Return the rotation of every layer, how many dimensions it turns, and how queries grow."""
    scaling, parameters = (_object(values, key, place=place) for key in ("rope_scaling", "rope_parameters"))
    if scaling and parameters:
        _check_same(scaling, parameters, place=place)
    key = "rope_parameters" if parameters or not scaling else "rope_scaling"
    given = {**scaling, **parameters}
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if name not in values:
            continue
        # What the file says twice must be the same; partial_rotary_factor may be nothing but the default.
        assumed = family.keys.get(name) if name == "partial_rotary_factor" else None
        if given.get(name, values[name]) != values[name] and values[name] != assumed:
            raise DnoError(f"{place}: {key} has {name} = {given[name]!r}, but {name} is {values[name]!r}")
        given.setdefault(name, values[name])
    rotary_dim = None
    if "partial_rotary_factor" in values:
        share = _positive(given, "partial_rotary_factor", place=f"{place}: {key}")
        rotary_dim = int(values["head_dim"] * share)
        del given["partial_rotary_factor"]
    if "original_max_position_embeddings" in values:  # Phi-3
        renamed = ((name, given.get(name)) for name in ("rope_type", "type"))
        given |= {name: "longrope" for name, kind in renamed if kind in _OLD_LONGROPE}
        if given.get("rope_type", given.get("type", "default")) == "default":
            del given["original_max_position_embeddings"]
    extra = {name: given.pop(name, None) for name in family.rope_extra}
    if extra.get("max_position_embeddings") not in (None, values["max_position_embeddings"]):
        raise DnoError(
            f"{place}: {key} has max_position_embeddings = {extra['max_position_embeddings']!r}, but "
            f"max_position_embeddings is {values['max_position_embeddings']!r}; make them equal"
        )
    found = _rope(given, values, theta=family.theta, place=f"{place}: {key}")
    growth = None
    if extra.get("llama_4_scaling_beta") is not None:
        if found.original_max_position_embeddings is None:
            raise DnoError(f"{place}: {key} has llama_4_scaling_beta but no original_max_position_embeddings")
        beta = _positive(extra, "llama_4_scaling_beta", place=f"{place}: {key}")
        growth = (beta, found.original_max_position_embeddings)
    return found, None if rotary_dim == values["head_dim"] else rotary_dim, growth


def _two(values: dict[str, Any], family: Family, *, place: str) -> list[RopeConfig]:
    """Return the rotation of layers that see everything, and that of layers with a window."""
    scaling, parameters = (_object(values, key, place=place) for key in ("rope_scaling", "rope_parameters"))
    thetas = {"full_attention": family.theta, "sliding_attention": family.local_theta}
    if parameters:
        for kind in sorted(parameters.keys() - set(_LAYER_KINDS)):
            raise DnoError(
                f"{place}: rope_parameters has {kind} = {parameters[kind]!r}; expected one object for each of "
                f"{', '.join(_LAYER_KINDS)}"
            )
        given = {kind: dict(_object(parameters, kind, place=f"{place}: rope_parameters")) for kind in _LAYER_KINDS}
        for kind in _LAYER_KINDS:
            if "truncate" in given[kind]:
                raise DnoError(f"{place}: rope_parameters of {kind} has truncate, which transformers does not read")
        for key, kind in (("rope_theta", "full_attention"), ("rope_local_base_freq", "sliding_attention")):
            theta = given[kind].get("rope_theta", thetas[kind])
            if values.get(key) not in (None, theta):
                raise DnoError(
                    f"{place}: rope_parameters of {kind} has rope_theta = {theta!r}, but {key} is {values[key]!r}"
                )
        if scaling not in ({}, parameters):
            _check_same(scaling, given["full_attention"], place=place)
    else:
        # Only layers that see everything are stretched.
        given = {"full_attention": dict(scaling), "sliding_attention": {}}
        if values.get("rope_theta") is not None:
            given["full_attention"].setdefault("rope_theta", values["rope_theta"])
            if "rope_local_base_freq" not in values and values["rope_theta"] != family.local_theta:
                raise DnoError(
                    f"{place}: rope_theta is {values['rope_theta']!r}; versions of transformers differ in whether it "
                    "is meant for layers with a sliding window too. Write rope_parameters instead"
                )
        if values.get("rope_local_base_freq") is not None:
            given["sliding_attention"]["rope_theta"] = values["rope_local_base_freq"]
    return [
        _rope(given[kind], values, theta=thetas[kind] or family.theta, place=f"{place}: rope parameters of {kind}")
        for kind in _LAYER_KINDS
    ]


def beside_rope_parameters(tree: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return what transformers 4 reads in place of a config.json's rope_parameters: equal entries beside them."""
    parameters = tree.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    beside: dict[str, Any] = {}
    if parameters.keys() & set(_LAYER_KINDS):
        full, local = (dict(parameters.get(kind) or {}) for kind in _LAYER_KINDS)
        if "rope_local_base_freq" in family.keys:
            beside["rope_local_base_freq"] = local.get("rope_theta", family.local_theta)
        elif local.get("rope_theta") != full.get("rope_theta"):
            return {}  # no words of transformers 4 say this
        parameters = full
    given = {key: value for key, value in parameters.items() if value is not None}
    beside["rope_theta"] = given.pop("rope_theta", family.theta)
    kind = given.get("rope_type", given.get("type", "default"))
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key in family.keys and key in given:
            beside[key] = given.pop(key)
    if "original_max_position_embeddings" in family.keys and kind == "longrope":  # Phi-3's own class wants three words
        given = {"type": kind} | {key: value for key, value in given.items() if key not in ("rope_type", "type")}
    if kind != "default":
        beside["rope_scaling"] = given
    return beside


def _check_same(scaling: dict[str, Any], parameters: dict[str, Any], *, place: str) -> None:
    """Raise DnoError where rope_scaling, by which transformers 4 reads, says other things than rope_parameters."""

    def plain(given: dict[str, Any]) -> dict[str, Any]:
        kind = given.get("rope_type", given.get("type", "default"))
        return {"rope_type": "longrope" if kind == "su" else kind} | {
            key: value for key, value in given.items() if value is not None and key not in ("rope_type", "type")
        }

    mine, other = plain(scaling), plain(parameters)
    for key in sorted(mine.keys() | other.keys()):
        if mine.get(key) != other.get(key) and (key in mine or key not in _BESIDE):
            raise DnoError(
                f"{place}: rope_scaling and rope_parameters are both given and differ in {key} "
                f"({mine.get(key)!r:.60} and {other.get(key)!r:.60}); keep rope_parameters"
            )


def _rope(given: dict[str, Any], values: dict[str, Any], *, theta: float, place: str) -> RopeConfig:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _KEYS or given.get("type", kind) != kind:
        raise DnoError(f"{place} has rope_type = {kind!r}; supported are {', '.join(_KEYS)}")
    required, optional = _KEYS[kind]
    for name in required:
        if name not in given:
            raise DnoError(f"{place} has rope_type = {kind!r} but no {name}")
    for name in sorted(given.keys() - {"rope_type", "type", "rope_theta", *required, *optional}):
        raise DnoError(f"{place} has {name} = {given[name]!r}, which rope_type {kind!r} does not know")
    numbers: dict[str, float] = {
        name: _positive(given, name, place=place)
        for name in given.keys() - {"rope_type", "type", "rope_theta", "truncate", "short_factor", "long_factor"}
        if given[name] is not None
    }
    context: int = values["max_position_embeddings"]
    original = int(numbers.get("original_max_position_embeddings", context))
    if original < 2:
        raise DnoError(f"{place} has original_max_position_embeddings = {original}; expected at least 2")
    factor = numbers.get("factor", context / original)
    fields: dict[str, Any] = {"factor": factor} if kind in ("linear", "dynamic", "llama3", "yarn") else {}
    if kind in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = original
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if name in numbers:
            fields[name] = numbers[name]
    if kind == "yarn":
        fields["truncate"] = given.get("truncate", True) is not False
        fields["attention_factor"] = yarn_attention_factor(
            factor, mscale=numbers.get("mscale"), mscale_all_dim=numbers.get("mscale_all_dim")
        )
    if kind == "longrope":
        fields["attention_factor"] = longrope_attention_factor(factor, original=original)
        for name in ("short_factor", "long_factor"):
            fields[name] = _factors(given, name, place=place)
    if "attention_factor" in numbers:
        fields["attention_factor"] = numbers["attention_factor"]
    base = _positive(given, "rope_theta", place=place) if given.get("rope_theta") is not None else theta
    try:
        return RopeConfig(rope_type=kind, theta=base, **fields)
    except ValueError as error:
        raise DnoError(f"{place}: {error}") from None


def _object(tree: dict[str, Any], key: str, *, place: str) -> dict[str, Any]:
    value = tree.get(key)
    if value is not None and not isinstance(value, dict):
        raise DnoError(f"{place}: {key} is {value!r}; expected an object")
    return value or {}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < MAX_NUMBER


def _positive(given: dict[str, Any], name: str, *, place: str) -> float:
    value = given[name]
    if not _is_positive(value):
        raise DnoError(f"{place} has {name} = {shown(value)}; expected a positive number")
    return float(value)


def _factors(given: dict[str, Any], name: str, *, place: str) -> tuple[float, ...]:
    values = given[name]
    if not isinstance(values, list) or not values or not all(map(_is_positive, values)):
        raise DnoError(f"{place} has {name} = {shown(values)}; expected a list of positive numbers")
    return tuple(float(value) for value in values)
