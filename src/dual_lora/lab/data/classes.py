"""The classes of a model's head, by the records: needs neither the model nor a library."""

from dual_lora.lab.data.encode import VALUE, class_names
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError


def classes_of(head: str, examples: list[Example]) -> list[str]:
    """Names of classes, the one value of a regression, [] for a language model.

    Raises UserError for records that do not fit the head, and for those of a single class.
    """
    fit_head(examples, head)
    if head == "regression":
        return [VALUE]
    names = class_names(examples) if head == "classification" else []
    if len(names) == 1:
        raise UserError(f"The training records hold one class only ({names[0]}); a classifier needs two.")
    return names


def fit_head(examples: list[Example], head: str) -> None:
    """Raise UserError for an example that does not fit the head: of several sources each may have its own format."""
    for example in examples:
        if head != "causal" and not example.text:
            raise UserError(f"{example.where}: model.head is {head}, but the record has no text and label.")
        if head == "causal" and not example.messages:
            raise UserError(f"{example.where}: the record has a text and a label: set model.head to classification.")
