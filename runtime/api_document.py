"""The bodies of the API's routes in its OpenAPI document. They are read by hand, so FastAPI knows nothing of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PLACE = "#/components/schemas/{model}"

JsonSchema = dict[str, Any]


class Bodies:
    """The bodies' schemas, with the parts that several of them share kept once, where the whole document finds them.

    Each form has a field `model`, which takes one name here.
    """

    def __init__(self, forms: Sequence[type[BaseModel]], served_name: str) -> None:
        asked, described = models_json_schema([(form, "validation") for form in forms], ref_template=_PLACE)
        self._references: Mapping[type[BaseModel], JsonSchema] = {
            form: asked[form, "validation"] for form in forms
        }
        self._parts: Mapping[str, JsonSchema] = described["$defs"]
        for form in forms:
            self._parts[form.__name__]["properties"]["model"] = {"enum": [served_name, None], "default": None}

    def of(self, form: type[BaseModel]) -> dict[str, Any]:
        """What a route that reads this body says of itself, beside what FastAPI says of it."""
        content = {"application/json": {"schema": self._references[form]}}
        return {"requestBody": {"required": True, "content": content}}

    def describe_parts(self, app: FastAPI) -> None:
        """Puts what the routes' bodies refer to into the app's document."""
        made_by_fastapi = app.openapi

        def openapi() -> dict[str, Any]:
            document = made_by_fastapi()
            document.setdefault("components", {}).setdefault("schemas", {}).update(self._parts)
            return document

        app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI's documentation shows
