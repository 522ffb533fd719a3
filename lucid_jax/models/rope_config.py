"""What a config.json says of rotary positions, in the keys of transformers 5 or those before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lucid_jax.attention.rope import SCALINGS, Scaling, YarnScaling, is_positive

ROPE_THETA = 10000.0  # where nothing is said


def read_rope(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_local_theta`, from old keys or new."""
    new, old = _table(values, "rope_parameters"), _table(values, "rope_scaling")
    nested = "full_attention" in new or "sliding_attention" in new
    local = _table(new, "sliding_attention") if nested else {}
    table = _table(new, "full_attention") if nested else {**old, **new}
    fallback = values.get("rope_theta", defaults.get("rope_theta", ROPE_THETA))
    length = defaults["max_position_embeddings"]
    if _scaling(local, length) is not None:
        raise ValueError(
            f"config.json stretches the rotary positions of layers with a window ({local!r}); only "
            "those of the other layers can be"
        )
    fields = {
        "rope_theta": table.get("rope_theta", fallback),
        "rope_scaling": _scaling(table, length),
    }
    if nested or "rope_local_theta" in defaults:
        fallback = values.get("rope_local_base_freq", defaults.get("rope_local_theta", fallback))
        fields["rope_local_theta"] = local.get("rope_theta", fallback)
    return fields


def _table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object in another; an empty one if it is missing or null."""
    table = values.get(key)
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"config.json must have an object as {key}, got {table!r}")
    return table or {}


def _scaling(table: Mapping[str, Any], length: Any) -> Scaling | None:
    """The scaling that a `rope_scaling` or `rope_parameters` describes."""
    kind = table.get("rope_type", table.get("type", "default"))
    given = {
        key: value
        for key, value in table.items()
        if key not in ("rope_type", "type", "rope_theta") and value is not None
    }
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("config.json has partial_rotary_factor; only whole heads can be rotated")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(
            f"config.json has rope_type={kind!r}; supported are default, {', '.join(SCALINGS)}"
        )
    wanted = [field.name for field in dataclasses.fields(SCALINGS[kind])]
    if "original_max_position_embeddings" in wanted:
        given.setdefault("original_max_position_embeddings", length)
    else:  # some writers note it for every kind
        given.pop("original_max_position_embeddings", None)
    if kind == "yarn":
        both = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        if not all(x is None or is_positive(x) for x in both):
            raise ValueError(f"mscale and mscale_all_dim must be positive numbers, got {both}")
        if all(both) and "attention_factor" not in given and "factor" in given:
            plain = YarnScaling(given["factor"], length).attention_scale - 1
            top, bottom = (1 + plain * m for m in both)  # DeepSeek's: the ratio of two scales
            given["attention_factor"] = top / bottom
    unknown = sorted(set(given) - set(wanted))
    if unknown:
        raise ValueError(
            f"config.json has {', '.join(unknown)} for rope_type={kind!r}; supported are "
            f"{', '.join(wanted)}"
        )
    try:
        return SCALINGS[kind](**given)
    except TypeError as error:
        raise ValueError(
            f"config.json has rope_type={kind!r} with {sorted(given)}; it needs {wanted}"
        ) from error
