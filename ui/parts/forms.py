"""A form made from a pydantic model: name, bound, unit and meaning are written once, on the model's own fields."""

from __future__ import annotations

import types
import typing
from typing import Any

import annotated_types
import gradio as gr
from pydantic import BaseModel
from pydantic.fields import FieldInfo

BOUNDS = ((annotated_types.Ge, "ge", "at least"), (annotated_types.Gt, "gt", "above"),
          (annotated_types.Le, "le", "at most"), (annotated_types.Lt, "lt", "below"))  # fmt: skip


class SettingsForm:
    """Widgets for each field of a model. The model itself judges the values, so that a refusal is its own sentence."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model
        self.widgets: dict[str, gr.components.Component] = {}

    def build(self) -> SettingsForm:
        """Make the widgets where the caller stands in the page, with the model's defaults in them."""
        if not self.model.model_fields:
            gr.Markdown("There is nothing to set.")
        fields = list(self.model.model_fields.items())
        for start in range(0, len(fields), 3):
            with gr.Row():
                for name, field in fields[start : start + 3]:
                    self.widgets[name] = widget(name, field)
        return self

    def read(self, values: list[Any]) -> dict[str, Any]:
        """Return {field: value} from the widgets' values in their own order; an empty text means: not given."""
        return {name: self._read(name, value) for name, value in zip(self.widgets, values, strict=True)}

    def _read(self, name: str, value: Any) -> Any:
        if _is_several(self.model.model_fields[name].annotation):
            return [part.strip() for part in value.split(",") if part.strip()]
        return None if value == "" else value


def widget(name: str, field: FieldInfo) -> gr.components.Component:
    """Return the widget that fits a field."""
    label, info = name.replace("_", " ").capitalize(), meaning(field)
    kinds = _kinds(field.annotation)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if typing.get_origin(field.annotation) is typing.Literal:
        return gr.Dropdown(list(typing.get_args(field.annotation)), value=default, label=label, info=info)
    if kinds == [bool]:
        return gr.Checkbox(value=default, label=label, info=info, min_width=220)
    if _is_several(field.annotation):
        return gr.Textbox(
            value=", ".join(default or ()), label=label, info=f"{info} (with commas between)", min_width=220
        )
    is_optional = field.annotation is not kinds[0]
    if kinds in ([int], [float]) and not is_optional:  # an empty number widget sends 0, so it cannot say "not given"
        return gr.Number(value=default, label=label, info=info, min_width=220)  # no bounds: the model refuses in words
    return gr.Textbox(value="" if default is None else str(default), label=label, info=info, min_width=220)


def meaning(field: FieldInfo) -> str:
    """Return a field's description with its bounds, for the line under its name."""
    said = []
    for kind, name, words in BOUNDS:
        said += [f"{words} {_number(getattr(m, name))}" for m in field.metadata if isinstance(m, kind)]
    return (field.description or "") + (f" ({', '.join(said)})" if said else "")


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _is_several(annotation: Any) -> bool:
    """Say whether a field holds several words, such as list[str] or tuple[str, ...]."""
    return typing.get_origin(annotation) in (list, tuple) and typing.get_args(annotation)[0] is str


def _kinds(annotation: Any) -> list[type]:
    """Return the plain types of an annotation, None left out."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [a for a in typing.get_args(annotation) if a is not type(None)]
    return [annotation]
