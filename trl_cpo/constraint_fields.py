"""The config's fields of the constraint, generated from the table of forms: a new form's hyperparameters are among them.

Beside it lies a stub, constraint_fields.pyi, for type checkers and editors. After a change of the table or of a
hyperparameter, write it anew:

    python -m trl_cpo.constraint_fields > trl_cpo/constraint_fields.pyi
"""

from dataclasses import Field, field, make_dataclass

from .constraints import CONSTRAINTS
from .hyperparameters import bounds

#: A name in the table; for type checkers, one of them.
FormName = str
#: Every form's hyperparameters, in the order of the table. Forms that share a name declare it alike.
HYPERPARAMETERS: dict[str, Field] = {
    name: declared for form in CONSTRAINTS.values() for name, declared in form.hyperparameters().items()
}


def _config_field(declared: Field):
    forms = [repr(name) for name, form in CONSTRAINTS.items() if declared.name in form.hyperparameters()]
    whose = "" if len(forms) == len(CONSTRAINTS) else f"For {' and '.join(forms)}: "
    text = declared.metadata["help"]
    if whose:
        text = whose + text[0].lower() + text[1:]
    # The parser hands all of a field's metadata but these names to argparse.
    about = {"help": f"{text} [{bounds(declared)}]" if bounds(declared) else text}
    if declared.metadata["choices"]:
        about["choices"] = list(declared.metadata["choices"])
    return declared.name, declared.type, field(default=declared.default, metadata=about)


_CONSTRAINT = field(
    default="none",
    metadata={"help": "Form of the constraint on the preference gap. 'none' is plain DPO.", "choices": list(CONSTRAINTS)},
)

ConstraintFields = make_dataclass(
    "ConstraintFields",
    [("constraint", FormName, _CONSTRAINT), *map(_config_field, HYPERPARAMETERS.values())],
    namespace={"__doc__": "The constraint's name and the hyperparameters of all forms.", "__module__": __name__},
)


def stub() -> str:
    """The text of constraint_fields.pyi."""

    def literal(values, indent: str = "    ") -> str:
        return "Literal[\n" + "".join(f'{indent}    "{value}",\n' for value in values) + f"{indent}]"

    lines = ["    constraint: FormName = ..."]
    for name, declared in HYPERPARAMETERS.items():
        choices, kind = declared.metadata["choices"], declared.type
        kind = literal(choices) if choices else kind.__name__ if isinstance(kind, type) else kind
        lines.append(f"    {name}: {kind} = ...")
    return _STUB.format(forms=literal(CONSTRAINTS, "")) + "\n".join(lines) + "\n"


_STUB = """\
# Generated: python -m trl_cpo.constraint_fields > trl_cpo/constraint_fields.pyi
from dataclasses import Field, dataclass
from typing import Any, Literal, TypeAlias

FormName: TypeAlias = {forms}
HYPERPARAMETERS: dict[str, Field[Any]]

def stub() -> str: ...

@dataclass
class ConstraintFields:
"""

if __name__ == "__main__":
    print(stub(), end="")
