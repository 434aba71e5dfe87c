"""What every section of the settings has in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, finite numbers, and no yes or no where a number belongs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `on`, `yes` and `no` as booleans, and pydantic would take True for 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be a yes or no, but got {value!r}. Put text in quotes")
        return value

    @model_validator(mode="before")
    @classmethod
    def _take_empty_section_for_default(cls, data: Any) -> Any:
        # `experiment:` with every line below it commented out is nothing, to YAML.
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or not _is_section(cls, key)}


def _is_section(model: type[BaseModel], key: Any) -> bool:
    annotation = model.model_fields[key].annotation if key in model.model_fields else None
    return isinstance(annotation, type) and issubclass(annotation, Section)
