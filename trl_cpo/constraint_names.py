"""The names of the forms of the constraint and of their hyperparameters, for what must do without torch.

They are read from constraint_fields.pyi, which a test holds against the table of forms.
"""

import ast
from pathlib import Path

_STUB = ast.parse(Path(__file__).with_name("constraint_fields.pyi").read_text(encoding="utf-8"))
_ALIAS, *_ = (node for node in _STUB.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FormName")
(_FIELDS,) = (node.body for node in _STUB.body if isinstance(node, ast.ClassDef))

FORM_NAMES: tuple[str, ...] = tuple(ast.literal_eval(_ALIAS.value.slice))
HYPERPARAMETER_NAMES: tuple[str, ...] = tuple(ast.unparse(node.target) for node in _FIELDS[1:])
