"""JSON Schemas as clients write them, and what claude and the API take of them.

Index: 1 the corpus   2 made up schemas   3 the strict reader   4 values that fit
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

Json = Any

CORPUS = Path(__file__).parent / "data" / "schemas.json"


# ---------------------------------------------------------------------------
# 1 The corpus
# ---------------------------------------------------------------------------

class Sample(NamedTuple):
    """A schema as a client sends it."""
    name: str
    schema: dict[str, Json]
    #: The draft that it is valid in; None if it is in none.
    draft: Optional[int]


def corpus() -> list[Sample]:
    """Schemas that libraries, servers and people wrote."""
    return [
        Sample(name, found["schema"], _draft(found.get("draft", 2020)))
        for name, found in json.loads(CORPUS.read_text()).items()]


def _draft(written: Json) -> Optional[int]:
    return written if isinstance(written, int) else None


# ---------------------------------------------------------------------------
# 2 Made up schemas
# ---------------------------------------------------------------------------

NAMES = (
    "a", "b", "name", "id", "Account Number", "filter[id]", "$filter", "gr\u00f6\u00dfe",
    "constructor", "a b", "a_b", "x" * 70, "type", "properties", "required")
WRONG: tuple[Json, ...] = (
    None, "any", "int", [], {}, -1, 0.5, True, [None], "[", {"$ref": "#/$defs/one"}, 7, "x y",
    ["string", "string"], [{"type": "null"}, "integer"])
#: Keywords that say nothing, or that only some know.
NOISE = (
    "$schema", "$id", "x-order", "example", "xml", "deprecated", "nullable", "discriminator",
    "format", "$comment", "title", "description", "default", "readOnly")


class Maker:
    """Makes schemas of 2020-12, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def root(self) -> dict[str, Json]:
        schema = self.schema(3)
        if self.chance.random() < 0.7:
            schema = self.an_object(3)
        return {**schema, "$defs": {"one": self.an_array(1), "two words": self.an_object(1)}}

    def schema(self, depth: int) -> dict[str, Json]:
        kinds = [self.a_string, self.a_number, self.an_enum, self.a_reference]
        if depth:
            kinds += [self.an_object, self.an_object, self.an_array, self.a_tuple, self.a_choice]
        schema: dict[str, Json] = self.chance.choice(kinds)(depth)
        if self.chance.random() < 0.2:
            schema[self.chance.choice(["title", "description"])] = "Some words."
        return schema

    def an_object(self, depth: int) -> dict[str, Json]:
        names = self.chance.sample(NAMES, self.chance.randrange(4))
        schema: dict[str, Json] = {
            "type": "object",
            "properties": {name: self.schema(max(0, depth - 1)) for name in names}}
        if names and self.chance.random() < 0.5:
            schema["required"] = self.chance.sample(names, 1)
        if self.chance.random() < 0.5:
            schema["additionalProperties"] = self.chance.choice([False, True, {"type": "string"}])
        if len(names) > 1 and self.chance.random() < 0.2:
            schema["dependentRequired"] = {names[0]: [names[1]]}
        if self.chance.random() < 0.1:
            schema["patternProperties"] = {"^x-": self.schema(0)}
        return schema

    def an_array(self, depth: int) -> dict[str, Json]:
        schema: dict[str, Json] = {"type": "array", "items": self.schema(depth - 1)}
        if self.chance.random() < 0.3:
            schema["maxItems"] = self.chance.randrange(1, 4)
        return schema

    def a_tuple(self, depth: int) -> dict[str, Json]:
        first = [self.schema(depth - 1) for _ in range(self.chance.randrange(1, 4))]
        schema: dict[str, Json] = {"type": "array", "prefixItems": first}
        if self.chance.random() < 0.6:
            schema["items"] = self.chance.choice([False, {"type": "boolean"}])
        if self.chance.random() < 0.5:
            schema.update(minItems=len(first), maxItems=len(first))
        return schema

    def a_choice(self, depth: int) -> dict[str, Json]:
        word = self.chance.choice(["anyOf", "anyOf", "oneOf", "allOf"])
        if word == "allOf":
            return {word: [self.an_object(depth - 1)]}
        return {word: [self.schema(depth - 1) for _ in range(2)]}

    def a_string(self, depth: int) -> dict[str, Json]:
        return {"type": "string", **self.chance.choice([
            {}, {"minLength": 1}, {"maxLength": 3}, {"format": "date"}, {"pattern": "^a*$"}])}

    def a_number(self, depth: int) -> dict[str, Json]:
        return {"type": self.chance.choice(["integer", "number"]), **self.chance.choice([
            {}, {"minimum": 1}, {"exclusiveMaximum": 5}, {"minimum": 0, "maximum": 9}])}

    def an_enum(self, depth: int) -> dict[str, Json]:
        return self.chance.choice([
            {"enum": ["a", "b"]}, {"const": 1}, {"enum": [None, True]}, {"type": "boolean"},
            {"type": ["string", "null"]}, {}])

    def a_reference(self, depth: int) -> dict[str, Json]:
        return {"$ref": self.chance.choice(["#/$defs/one", "#/$defs/two%20words"])}

    def spoiled(self, schema: Json) -> Json:
        """A copy in which something is written as it should not be."""
        if isinstance(schema, list):
            return [self.spoiled(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        copy = {key: self.spoiled(value) for key, value in schema.items()}
        if copy and self.chance.random() < 0.12:
            copy[self.chance.choice(list(copy))] = self.chance.choice(WRONG)
        if self.chance.random() < 0.2:
            copy[self.chance.choice(NOISE)] = self.chance.choice(WRONG)
        return copy


def made_up(count: int) -> list[Sample]:
    """Schemas of 2020-12, made up."""
    return [Sample(f"made up {seed}", Maker(seed).root(), 2020) for seed in range(count)]


def spoiled(count: int) -> list[Sample]:
    """Schemas that are nearly some."""
    makers = [(seed, Maker(seed)) for seed in range(count)]
    return [
        Sample(f"spoiled {seed}", maker.spoiled(maker.root()), None) for seed, maker in makers]


# ---------------------------------------------------------------------------
# 3 The strict reader
# ---------------------------------------------------------------------------

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def _is_number(value: Json) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Json) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


#: Keywords that draft-07 and 2020-12 share, and the test of their values.
_PLAIN: dict[str, Callable[[Json], bool]] = {
    **dict.fromkeys(("title", "description", "pattern", "format"), lambda v: isinstance(v, str)),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _is_count),
    "multipleOf": lambda v: _is_number(v) and v > 0,
    "uniqueItems": lambda v: isinstance(v, bool),
    "required": lambda v: all(isinstance(each, str) for each in v) and len(set(v)) == len(v),
    "enum": lambda v: bool(v) and len({json.dumps(each) for each in v}) == len(v),
    "examples": lambda v: isinstance(v, list),
    "const": lambda v: True, "default": lambda v: True,
    "$ref": lambda v: isinstance(v, str),
}
_ONE = ("items", "contains", "propertyNames", "not", "if", "then", "else", "additionalProperties")
_MANY = ("allOf", "anyOf", "oneOf")
_NAMED = ("properties", "patternProperties", "$defs")


def refusals(schema: Json, *, is_tool: bool) -> list[str]:
    """What claude's validator or the API would say against a schema; nothing if they take it."""
    found = list(_refusals(schema, "", schema, is_tool))
    if schema.get("type") != "object":
        found.append("the root is no object")
    return found + [f"{word} at the root" for word in (*_MANY, "$ref") if word in schema]


def _refusals(schema: Json, path: str, root: Json, is_tool: bool) -> Iterator[str]:
    if not isinstance(schema, dict):
        yield f"{path}: no object"
        return
    for word, value in schema.items():
        here = f"{path}/{word}"
        if word == "format" and not is_tool:
            yield f"{here}: unknown to old claudes"
        elif word in _PLAIN:
            if not _PLAIN[word](value):
                yield f"{here}: {value!r}"
        elif word == "type":
            types = value if isinstance(value, list) else [value]
            if not types or len(set(types)) != len(types) or not set(types) <= set(TYPES):
                yield f"{here}: {value!r}"
        elif word in _ONE:
            if not isinstance(value, bool):
                yield from _refusals(value, here, root, is_tool)
        elif word in _MANY and value:
            for index, each in enumerate(value):
                yield from _refusals(each, f"{here}/{index}", root, is_tool)
        elif word in _NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield from _refusals(each, f"{here}/{name}", root, is_tool)
        else:
            yield f"{here}: not taken"
    yield from _refused_together(schema, path, root)


def _refused_together(schema: Json, path: str, root: Json) -> Iterator[str]:
    names = list(schema.get("properties", ()))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or hasattr(object, name):
            yield f"{path}: property {name!r}"
    for pattern in schema.get("patternProperties", ()):
        if any(re.search(pattern, name) for name in names):
            yield f"{path}: {pattern!r} matches a property"
    conditions = {"if", "then", "else"} & set(schema)
    if conditions and ("if" not in conditions or len(conditions) == 1):
        yield f"{path}: half a condition"
    if "$ref" in schema:
        start, _, name = schema["$ref"].rpartition("/")
        if start != "#/$defs" or name not in root.get("$defs", {}):
            yield f"{path}: {schema['$ref']} leads nowhere"


# ---------------------------------------------------------------------------
# 4 Values that fit
# ---------------------------------------------------------------------------

class Answerer:
    """Makes up values for a schema that the strict reader takes: most of them fit."""

    def __init__(self, root: Json, chance: random.Random) -> None:
        self.root = root
        self.chance = chance

    def value(self, schema: Json = None, depth: int = 0) -> Json:
        schema = self.root if schema is None else schema
        if depth > 8:
            return None
        if isinstance(schema, bool):
            schema = {}
        if "$ref" in schema:
            return self.value(self.root["$defs"][schema["$ref"].rpartition("/")[2]], depth)
        if "const" in schema or "enum" in schema:
            return self.chance.choice(schema.get("enum", [schema.get("const")]))
        if "allOf" in schema:
            parts = [self.value(each, depth) for each in schema["allOf"]]
            whole = self.typed(schema, depth) if "type" in schema else {}
            if all(isinstance(part, dict) for part in (*parts, whole)):
                return {key: each for part in (whole, *parts) for key, each in part.items()}
            return parts[0]
        for word in ("anyOf", "oneOf"):
            if word in schema:
                part = self.value(self.chance.choice(schema[word]), depth)
                whole = self.typed(schema, depth) if "type" in schema else part
                both = isinstance(part, dict) and isinstance(whole, dict)
                return {**part, **whole} if both else whole
        return self.typed(schema, depth)

    def typed(self, schema: Json, depth: int) -> Json:
        types = schema.get("type", ["string", "integer", "null"])
        kind = self.chance.choice(types) if isinstance(types, list) else types
        if kind == "object":
            return self.an_object(schema, depth)
        if kind == "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", least + 2), 0 if depth > 4 else 9)
            count = self.chance.randint(least, max(least, most))
            items = schema.get("items", {})
            return [self.value(items, depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            return self.chance.choice([least, least + 1, schema.get("maximum", least)])
        if kind == "string":
            letters = schema.get("minLength", self.chance.randrange(3))
            return "a" * letters
        return {"null": None, "boolean": self.chance.random() < 0.5}[kind]

    def an_object(self, schema: Json, depth: int) -> Json:
        needed = schema.get("required", ())
        names = [
            name for name in schema.get("properties", ())
            if name in needed or (depth < 5 and self.chance.random() < 0.6)]
        found = {name: self.value(schema["properties"][name], depth + 1) for name in names}
        return {**dict.fromkeys(needed), **found}
